"""What follows the last trial runs in the pack's process, and in one of its own when that is gone."""

import asyncio
import json
import os
import random
from pathlib import Path

import pytest
from helpers.searches import command, run_here

from ftray.search.broker import TrialBroker
from ftray.search.failures import PacksGone

SPACE = "method: lora\nlora: {rank: {choice: [2, 4]}, dropout: 0.0}\n"
# notes its process; in the first one that is to score test records, it kills it
METRIC = """
import os, signal

def noted(records, answers):
    tested = "z" in records[0]["prompt"]
    with open("{log}", "a") as log:
        print(os.getpid(), "test" if tested else "validation", file=log)
    if tested and os.path.exists("{armed}"):
        os.unlink("{armed}")
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(answer)) for answer in answers]
"""


def test_a_broker_keeps_a_pack_for_calls():
    async def story() -> None:
        broker = TrialBroker(1)
        assert not await broker.keep()  # there is no pack
        await broker.ready(0, 2)
        keeping = asyncio.create_task(broker.keep())
        await asyncio.sleep(0)
        orders = await broker.orders(0, {}, {})
        assert (orders.close, orders.stay) == (True, True)
        asking = asyncio.create_task(broker.next_call(0, None))  # after the checkpoints
        assert await keeping
        calling = asyncio.create_task(broker.call(b"prove"))
        assert await asking == b"prove"
        assert await broker.in_call()
        asking = asyncio.create_task(broker.next_call(0, b"proof"))
        assert await calling == b"proof"
        assert not await broker.in_call()
        calling = asyncio.create_task(broker.call(b"merge"))
        assert await asking == b"merge"
        await broker.ready(0, 2)  # it has died, and begins anew
        with pytest.raises(PacksGone):
            await calling
        with pytest.raises(PacksGone):
            await broker.call(b"merge")
        orders = await broker.orders(0, {}, {})
        assert (orders.close, orders.stay) == (True, False)

    asyncio.run(story())


@pytest.mark.parametrize("end", ["close", "lost"])
def test_a_pack_that_is_kept_is_let_go(end):
    async def story() -> None:
        broker = TrialBroker(1)
        await broker.ready(0, 2)
        keeping, asking = asyncio.create_task(broker.keep()), asyncio.create_task(broker.next_call(0, None))
        assert await keeping
        calling = asyncio.create_task(broker.call(b"prove"))
        await asking
        await (broker.close("the search is over") if end == "close" else broker.lost(0))
        with pytest.raises(PacksGone):
            await calling
        assert await broker.next_call(0, b"late") is None
        assert not await broker.in_call()

    asyncio.run(story())


def calls_in(log: Path) -> list[list[str]]:
    """Process and split of each call of the metric, without those of the driver, which tries it first."""
    calls = [line.split() for line in log.read_text().splitlines()]
    return [call for call in calls if call[0] != str(os.getpid())]


@pytest.mark.parametrize("armed", [False, True])
def test_the_proof_is_made_by_the_pack_or_without_it_if_that_dies(cluster, tmp_path, tiny_llama, armed):
    log, trigger, draw = tmp_path / "log", tmp_path / "armed", random.Random(0)
    (tmp_path / "metric.py").write_text(METRIC.replace("{log}", str(log)).replace("{armed}", str(trigger)))
    for name, letters in (("train", "abcdef"), ("test", "z")):
        words = [" ".join(["z" * (name == "test"), *draw.choices(letters, k=3)]).strip() for _ in range(40)]
        records = [json.dumps({"input": word, "output": word.upper()}) + "\n" for word in words]
        (tmp_path / f"{name}.jsonl").write_text("".join(records))
    if armed:
        trigger.touch()
    output = tmp_path / "out"
    arguments = command(output, str(tmp_path / "train.jsonl"), tiny_llama, space=SPACE, steps=2)
    arguments += ["--data.test", str(tmp_path / "test.jsonl"), "--trials", "2", "--training.validation_records", "4"]
    arguments += ["--search.metric", f"{tmp_path / 'metric.py'}:noted", "--search.direction", "max"]
    arguments += ["--evaluation.records", "8", "--evaluation.max_new_tokens", "4"]
    done = run_here(arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not trigger.exists()
    calls = calls_in(log)
    (trained_by,) = {process for process, split in calls if split == "validation"}
    proved_by = [process for process, split in calls if split == "test"]
    assert proved_by[0] == trained_by
    assert (proved_by[-1] == trained_by) is not armed
    proof = json.loads((output / "summary.json").read_text())["proof"]
    assert (output / "best" / "merged" / "config.json").exists()

    (output / "summary.json").unlink()  # as if it had been killed in between
    done = run_here([*arguments, "--resume"])
    assert done.returncode == 0, done.stdout + done.stderr
    calls = calls_in(log)[len(calls) :]
    assert calls
    assert {split for _, split in calls} == {"test"}  # the search is over
    assert trained_by not in {process for process, _ in calls}
    assert json.loads((output / "summary.json").read_text())["proof"] == proof
