"""Two replicas, one of which is killed while it answers."""

import asyncio
import os
import signal

import httpx
import psutil
import pytest
from test_serving_app import KEY, Server


@pytest.mark.slow
def test_no_request_is_lost_when_a_replica_is_killed(tiny_llama, tmp_path):
    extra = ["--serving.min_replicas", "2", "--serving.max_replicas", "2", "--scaling.cpus_per_worker", "1"]
    server = Server(tiny_llama, tmp_path, [*extra, "--serving.max_queue", "64"])
    # the base model's requests are spread over both; an adapter's go where it is loaded
    ask = {"model": server.base, "prompt": "the cat", "max_tokens": 400, "temperature": 1.5, "seed": 3}
    kinds = [False] * 12 + [True] * 12

    async def one(client, stream, seed):
        body = ask | ({"stream": True, "seed": seed} if stream else {})
        return await client.post(server.url + "/v1/completions", json=body, timeout=300)

    async def all_of_them():
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}) as client:
            tasks = [asyncio.create_task(one(client, stream, i)) for i, stream in enumerate(kinds)]
            await asyncio.sleep(0.7)
            victims = [
                p
                for p in psutil.Process(server.process.pid).children(recursive=True)
                if "ServeReplica:ftray:replica" in " ".join(p.cmdline())
            ]
            assert len(victims) == 2
            os.kill(victims[0].pid, signal.SIGKILL)
            assert not all(task.done() for task in tasks)
            return await asyncio.gather(*tasks)

    try:
        got = asyncio.run(all_of_them())
        whole = [answer for answer, stream in zip(got, kinds, strict=True) if not stream]
        assert {answer.status_code for answer in whole} == {200}
        assert len({answer.json()["choices"][0]["text"] for answer in whole}) == 1
        streams = [answer.text for answer, stream in zip(got, kinds, strict=True) if stream]
        ended = [text for text in streams if "event: error" in text]
        assert ended
        assert all("replica_died" in text for text in ended)
        assert all(text.endswith("data: [DONE]\n\n") for text in streams if text not in ended)
    finally:
        server.process.terminate()
        server.process.wait(60)
