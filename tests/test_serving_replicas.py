"""Replicas that come, go and are killed while they answer, and an endpoint that is killed."""

import asyncio
import contextlib
import json
import os
import queue
import signal
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
from helpers.packs import Trial
from helpers.ports import free_port
from helpers.servers import KEY, Server
from ray import serve
from transformers import AutoModelForCausalLM

from ftray.config import Config
from ftray.serving.admission import Admission
from ftray.serving.app import application, endpoint
from ftray.serving.catalog import find_catalog
from ftray.serving.generation_request import GenerationRequest, OutputDelta, Sampling
from ftray.serving.replica import Replica


def processes(of: str, below: int | None = None) -> list[psutil.Process]:
    """Those of a deployment, below this process or another one."""
    found = []
    for process in psutil.Process(below).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # gone by now
            if f"ServeReplica:ftray:{of}" in " ".join(process.cmdline()):
                found.append(process)
    return found


def until(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def raises(*args, **kwargs):
    raise RuntimeError("on purpose")


class Panic(BaseException):
    """As tokenizers' own, which is no Exception."""


def panics():
    raise Panic


def test_nothing_ends_the_engines_thread(tiny_llama, monkeypatch):
    replica = Replica(Config(model={"name": tiny_llama, "dtype": "fp32"}).model_dump(), tiny_llama, 1)
    request = GenerationRequest([[5, 6, 7]], None, 1, None, None, 6, Sampling(0.0), False, 100, 100)

    async def answered() -> list[OutputDelta]:
        return [delta async for message in replica.generate(request) for delta in message.deltas]

    wanted = asyncio.run(answered())
    assert wanted[-1].finish in ("stop", "length")
    for harm in (raises, panics):
        replica.inbox.put(harm)
    replica.inbox.put(lambda: replica.outbox.update({raises: []}))  # the engine's thread alone touches it
    step = replica.engine.step
    for harm in (raises, panics):
        monkeypatch.setattr(replica.engine, "step", harm)
        (failed,) = asyncio.run(answered())
        assert (failed.finish, "on purpose" in failed.error or "Panic" in failed.error) == ("error", True)
        monkeypatch.setattr(replica.engine, "step", step)
        assert asyncio.run(answered()) == wanted
    monkeypatch.setattr(replica.engine, "submit", raises)
    with pytest.raises(RuntimeError, match="on purpose"):
        asyncio.run(answered())
    monkeypatch.undo()
    assert asyncio.run(answered()) == wanted
    asyncio.run(replica.check_health())


def test_requests_are_let_in_in_order_while_there_is_room():
    async def scenario():
        admission, entered = Admission(4), []  # and one more

        async def ask(name, count):
            taken = await admission.enter(count)
            entered.append((name, taken))

        tasks = [asyncio.create_task(ask(*what)) for what in (("a", 3), ("b", 2), ("c", 99), ("d", 1), ("e", 2))]
        await asyncio.sleep(0)
        assert entered == [("a", 3), ("b", 2)]
        tasks[3].cancel()
        admission.leave(3)
        await asyncio.sleep(0)
        assert entered[2:] == []  # the next one needs them all
        admission.leave(2)
        await asyncio.sleep(0)
        assert entered[2:] == [("c", 5)]
        late = asyncio.create_task(ask("f", 3))
        await asyncio.sleep(0)
        admission.leave(5)
        tasks[4].cancel()  # let in, and gone at the same time
        await asyncio.sleep(0)
        assert entered[3:] == [("f", 3)]
        assert await admission.enter(2) == 2  # nothing was lost
        await late

    asyncio.run(scenario())


def test_a_request_begins_only_when_a_slot_is_free(tiny_llama):
    cfg = Config(model={"name": tiny_llama, "dtype": "fp32"}, serving={"slots": 1})
    replica = Replica(cfg.model_dump(), tiny_llama, 1)
    request = GenerationRequest([[5, 6, 7]], None, 1, None, None, 20, Sampling(0.0), True, 100, 1000)

    async def scenario():
        begun: list[int] = []

        async def ask(number):
            messages = [message async for message in watched(number)]
            assert messages[-1].deltas[-1].finish in ("stop", "length")

        async def watched(number):
            async for message in replica.generate(request):
                if message.begun:
                    begun.append(number)
                    assert len(begun) - sum(task.done() for task in tasks) <= 3  # two, and one that is just done
                yield message

        tasks = [asyncio.create_task(ask(number)) for number in range(6)]
        await asyncio.gather(*tasks)
        assert begun == [*range(6)]

    asyncio.run(scenario())


def test_a_client_that_goes_away_while_its_request_is_queued_leaves_nothing(tiny_llama):
    replica = Replica(Config(model={"name": tiny_llama, "dtype": "fp32"}).model_dump(), tiny_llama, 1)
    request = GenerationRequest([[5, 6, 7]], None, 2, None, None, 400, Sampling(0.0), False, 100, 1000)
    go = threading.Event()
    replica.inbox.put(go.wait)  # the engine is in a step

    async def leave() -> None:
        async def ask():
            return [message async for message in replica.generate(request)]

        task = asyncio.create_task(ask())
        await asyncio.sleep(0.2)
        assert replica.inbox.qsize() == 1
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    busy: queue.SimpleQueue[bool] = queue.SimpleQueue()
    replica.inbox.put(lambda: busy.put(replica.engine.busy))
    go.set()
    assert not busy.get(timeout=60)


class App:
    """The application in a cluster of this process, which sees what becomes of its replicas."""

    def __init__(self, tiny_llama, directory):
        base = AutoModelForCausalLM.from_pretrained(tiny_llama).requires_grad_(False)
        Trial("lora", seed=1).model(base).save_pretrained(directory / "lora")
        self.base, self.source, self.url = os.path.basename(tiny_llama), str(directory / "lora"), ""
        self.serving = {
            "adapter_sources": [str(directory)],
            "registry": str(directory / "registry.json"),
            "min_replicas": 1,
            "max_replicas": 3,
            "target_ongoing": 2,
            "scale_up_seconds": 1,
            "scale_down_seconds": 3,
        }
        self.model = {"name": tiny_llama, "dtype": "fp32"}
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        self.url = f"http://127.0.0.1:{port}"
        self.deploy()

    def deploy(self, **changes):
        cfg = Config.model_validate({"model": self.model, "serving": {**self.serving, **changes}})
        serve.run(application(cfg, find_catalog(cfg), None, 1, 0), name="ftray")

    def running(self) -> int:
        return serve.status().applications["ftray"].deployments["replica"].replica_states.get("RUNNING", 0)

    def names(self) -> list[str]:
        try:
            got = httpx.get(f"{self.url}/v1/models", timeout=60)
            return [model["id"] for model in got.json()["data"]] if got.status_code == 200 else []
        except httpx.TransportError:
            return []


@pytest.fixture(scope="module")
def app(cluster, tiny_llama, tmp_path_factory):
    yield App(tiny_llama, tmp_path_factory.mktemp("app"))
    serve.shutdown()


@pytest.mark.slow
def test_replicas_come_with_load_and_go_without_and_no_answer_is_cut(app):
    ended, clients = [], {"wanted": 9, "running": 0}
    ask = {"model": app.base, "prompt": "the cat", "max_tokens": 400, "temperature": 1.5, "stream": True}

    async def keep_asking(client, number):
        while number < clients["wanted"]:
            clients["running"] += 1
            got = await client.post(f"{app.url}/v1/completions", json=ask, timeout=300)
            ended.append(got.status_code == 200 and got.text.endswith("data: [DONE]\n\n") and "error" not in got.text)
            clients["running"] -= 1

    async def wait_for(condition):
        await asyncio.to_thread(until, condition, 200)

    async def scenario():
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None)) as client:
            asking = [asyncio.create_task(keep_asking(client, number)) for number in range(clients["wanted"])]
            await wait_for(lambda: app.running() == 3)
            clients["wanted"] = 3  # for which two are enough
            await wait_for(lambda: app.running() < 3)
            before = {p.pid for p in processes("replica")}
            await asyncio.to_thread(app.deploy, slots=8)
            await wait_for(lambda: not before & {p.pid for p in processes("replica")})
            answered = len(ended)
            await wait_for(lambda: len(ended) > answered + 3)
            clients["wanted"] = 0
            await asyncio.gather(*asking)

    asyncio.run(scenario())
    until(lambda: app.running() == 1)
    assert len(ended) > 12
    assert all(ended)


@pytest.mark.slow
def test_a_killed_endpoint_remembers_the_adapters_and_a_removed_one_is_freed(app):
    def kill():
        (victim,) = processes("endpoint")
        victim.kill()
        until(lambda: processes("endpoint") and processes("endpoint")[0].pid != victim.pid)
        until(app.names)

    def answer():
        ask = {"model": "late", "prompt": "the cat", "max_tokens": 8, "temperature": 0}
        return httpx.post(f"{app.url}/v1/completions", json=ask, timeout=60)

    def drop(adapter):
        replicas = serve.get_deployment_handle("replica", "ftray")
        return any(replicas.broadcast("drop", adapter).results(timeout_s=60))

    new = {"name": "late", "source": app.source}
    assert httpx.post(f"{app.url}/v1/adapters", json=new, timeout=60).status_code == 200
    text = answer().json()["choices"][0]["text"]
    kill()
    assert app.names() == [app.base, "late"]
    assert answer().json()["choices"][0]["text"] == text
    (kept,) = [offer["id"] for offer in _registry(app)["added"].values()]
    assert httpx.delete(f"{app.url}/v1/adapters/late", timeout=60).json()["deleted"]
    assert not drop(kept)  # it has been
    assert answer().status_code == 404
    kill()
    assert app.names() == [app.base]
    assert httpx.post(f"{app.url}/v1/adapters", json=new, timeout=60).status_code == 200
    (kept,) = [offer["id"] for offer in _registry(app)["added"].values()]
    assert drop(kept)  # it was there


@pytest.mark.slow
def test_a_request_that_kills_costs_one_replica_and_those_that_waited_are_answered(app):
    class Deadly(Replica):
        """Dies of a prompt of one token."""

        def _enqueue(self, request, *args):
            if request.prompts == [[7]]:
                os._exit(1)
            return super()._enqueue(request, *args)

    seen = set()

    async def one(client, prompt):
        ask = {"model": app.base, "prompt": prompt, "max_tokens": 400, "temperature": 1.5, "seed": 3}
        return await client.post(f"{app.url}/v1/completions", json=ask, timeout=300)

    async def crowd():
        async with httpx.AsyncClient() as client:
            prompts = ["the cat"] * 6 + [[7]] + ["the cat"] * 5
            tasks = [asyncio.create_task(one(client, prompt)) for prompt in prompts]
            while not all(task.done() for task in tasks):
                seen.update(process.pid for process in processes("replica"))
                await asyncio.sleep(0.05)
            return [task.result() for task in tasks]

    cfg = Config.model_validate({"model": app.model, "serving": app.serving | {"slots": 2}})
    options = {"num_replicas": 2, "health_check_period_s": 5, "ray_actor_options": {"num_cpus": 1}}
    deadly = serve.deployment(Deadly, name="replica", **options).bind(cfg.model_dump(), app.model["name"], 1)
    serve.run(endpoint(cfg, find_catalog(cfg), None, deadly), name="ftray")
    until(lambda: app.running() == 2)
    try:
        before = {process.pid for process in processes("replica")}
        got = asyncio.run(crowd())
        given_up = [number for number, g in enumerate(got) if g.status_code != 200]
        assert 6 in given_up
        assert len(given_up) <= Admission(2).most  # those that were in the replica with it
        assert {got[number].status_code for number in given_up} == {500}
        assert {got[number].headers["x-should-retry"] for number in given_up} == {"false"}
        assert {got[number].json()["error"]["code"] for number in given_up} == {"replica_died"}
        assert len({g.json()["choices"][0]["text"] for g in got if g.status_code == 200}) == 1
        until(lambda: app.running() == 2)
        assert len(before - {process.pid for process in processes("replica")}) == 1
        assert len(seen | before) <= len(before) + 1
    finally:
        app.deploy()


def _registry(app):
    return json.loads(Path(app.serving["registry"]).read_text())


@pytest.mark.slow
def test_no_request_that_waits_is_lost_when_a_replica_is_killed(tiny_llama, tmp_path):
    extra = ["--serving.min_replicas", "2", "--serving.max_replicas", "2", "--scaling.cpus_per_worker", "1"]
    server = Server(tiny_llama, tmp_path, [*extra, "--serving.max_queue", "64"])
    # the base model's requests are spread over both; an adapter's go where it is loaded
    ask = {"model": server.base, "prompt": "the cat", "max_tokens": 400, "temperature": 1.5, "seed": 3}
    kinds = [True] * 12 + [False] * 12
    begun, enough_have = set(), asyncio.Event()

    async def one(client, number, stream):
        body = ask | ({"stream": True, "seed": number} if stream else {})
        async with client.stream("POST", server.url + "/v1/completions", json=body, timeout=300) as got:
            text = ""
            async for part in got.aiter_text():
                text += part
                if stream:
                    begun.add(number)
                if len(begun) >= 6:  # a replica gives four at once
                    enough_have.set()
            assert got.status_code == 200 or (got.status_code, "replica_died" in text) == (500, True)
            return text

    async def all_of_them():
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}) as client:
            tasks = [asyncio.create_task(one(client, *which)) for which in enumerate(kinds)]
            await asyncio.wait_for(enough_have.wait(), 60)
            victims = processes("replica", server.process.pid)
            assert len(victims) == 2
            os.kill(victims[0].pid, signal.SIGKILL)
            assert not all(task.done() for task in tasks)
            return await asyncio.gather(*tasks)

    try:
        got = asyncio.run(all_of_them())
        given_up = [text for text in got if "replica_died" in text]
        assert 1 <= len(given_up) <= Admission(4).most  # all that one replica held
        whole = [json.loads(text) for text, stream in zip(got, kinds, strict=True) if not stream]
        assert len({answer["choices"][0]["text"] for answer in whole if "choices" in answer}) == 1
        streams = [text for text, stream in zip(got, kinds, strict=True) if stream]
        assert all(text.endswith("data: [DONE]\n\n") for text in streams if text not in given_up)
    finally:
        server.process.terminate()
        server.process.wait(60)
