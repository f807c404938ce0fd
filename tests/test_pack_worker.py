"""Packs under Ray: the broker between Tune and the workers, and a search over two workers."""

import asyncio
import os
import platform
import subprocess
import sys
import time
from itertools import islice
from types import SimpleNamespace

import pytest
from helpers.faults import victims
from helpers.trainers import with_trainer
from ray.cluster_utils import Cluster

from ftray.config import Config
from ftray.search.broker import TrialBroker
from ftray.search.driver import TimeBudget
from ftray.search.failures import PacksGone, TrialFailed
from ftray.search.packs import Capacity
from ftray.search.trial_proxy import TrialProxies
from ftray.storage.local import LocalLocation
from ftray.training.zero3_trainer import Zero3Trainer


def test_a_broker_assigns_places_and_takes_them_back():
    async def play() -> None:
        broker = TrialBroker(4)
        await broker.ready(0, 2)
        for number in range(3):
            await broker.enter(number, {"number": number})
        reading = [asyncio.create_task(broker.next(number, 0)) for number in range(3)]
        await asyncio.sleep(0)
        first = await broker.orders(0, {}, {})
        assert first.join == {0: {"number": 0}, 1: {"number": 1}}
        assert first.run == [0, 1]
        second = await broker.orders(0, {0: [{"step": 5}]}, {1: "diverged"})
        assert second.join == {2: {"number": 2}}  # in the place of the one that failed
        assert second.run == [2]  # 0 waits until its report has been judged
        heard = await reading[0]
        assert {key: heard[key] for key in ("step", "config", "done", "training_iteration")} == {
            "step": 5,
            "config": {"number": 0},
            "done": False,
            "training_iteration": 1,
        }
        assert heard["time_this_iter_s"] == heard["time_total_s"] > 0
        with pytest.raises(TrialFailed, match="diverged"):
            await reading[1]
        again = asyncio.create_task(broker.next(0, 1))
        await asyncio.sleep(0)
        assert (await broker.orders(0, {}, {})).run == [0, 2]
        await broker.leave(0)
        with pytest.raises(TrialFailed):
            await again
        assert (await broker.orders(0, {}, {})).leave == {0}
        await broker.ready(0, 2)  # the workers died and came back: their trials have to join again
        assert (await broker.orders(0, {}, {})).join == {2: {"number": 2}}
        await broker.enter(2, {"number": 2})  # Tune begins a trial twice where it was paused
        assert (await broker.orders(0, {}, {})).run == [2]
        await broker.leave(2)
        await broker.enter(2, {"number": 2})  # one that comes late, for a trial that is over, takes no place
        with pytest.raises(TrialFailed):
            await reading[2]
        assert (await broker.orders(0, {}, {})).join == {}
        await broker.enter(3, {"number": 3})
        reading.append(asyncio.create_task(broker.next(3, 0)))
        await broker.close("over")
        assert (await broker.orders(0, {}, {})).close
        with pytest.raises(PacksGone, match="over"):
            await reading[3]

    asyncio.run(play())


def test_a_pack_waits_a_moment_for_those_that_are_about_to_train():
    async def play() -> None:
        broker = TrialBroker(3)
        await broker.ready(0, 3)
        for number in (0, 1):
            await broker.enter(number, {"number": number})
        reading = [asyncio.create_task(broker.next(number, 0)) for number in (0, 1)]
        orders = asyncio.create_task(broker.orders(0, {}, {}))
        await asyncio.sleep(0.1)
        assert not orders.done()  # a third is to come
        await broker.enter(2, {"number": 2})
        await asyncio.sleep(0.1)
        assert not orders.done()  # and says at once that it may train
        reading.append(asyncio.create_task(broker.next(2, 0)))
        assert (await orders).run == [0, 1, 2]
        assert (await broker.orders(0, {}, {})).run == [0, 1, 2]  # between two rungs nobody is waited for
        await asyncio.sleep(0.5)  # a step
        orders = asyncio.create_task(broker.orders(0, {n: [{"step": 5}] for n in range(3)}, {}))
        await asyncio.gather(*reading)
        reading = [asyncio.create_task(broker.next(1, 1))]
        await asyncio.sleep(0)
        assert (await asyncio.wait_for(orders, 0.5)).run == [1]  # not for longer than half of what a step takes
        reading[0].cancel()

    asyncio.run(play())


def test_packs_wait_for_what_they_train_or_for_the_end():
    async def play() -> None:
        begun, closed = TrialBroker(1), TrialBroker(1)
        waiting = [asyncio.create_task(broker.search()) for broker in (begun, closed)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        await begun.begin(b"all")
        await closed.close("over")
        assert await asyncio.gather(*waiting) == [b"all", None]

    asyncio.run(play())


def test_what_tune_adds_to_a_configuration_stays_in_the_driver():
    """The broker's process would import Tune to read it."""
    entered = []
    broker = SimpleNamespace(enter=SimpleNamespace(remote=lambda *args: entered.append(args)))
    TrialProxies(broker).answer({"number": 3, "adapter": {}, "__trial_info__": object()}, "__ray_ready__")
    assert entered == [(3, {"number": 3, "adapter": {}})]


def test_a_time_budget_counts_from_when_trials_can_train():
    capacity = Capacity(2)
    budget = TimeBudget(0.2, capacity, has_result=True)
    time.sleep(0.3)  # nodes come up
    assert not budget.stop_all()
    capacity.since = time.monotonic()
    assert not budget.stop_all()
    time.sleep(0.3)
    assert budget.stop_all()


def test_a_time_budget_waits_for_a_first_result():
    budget = TimeBudget(0.0, Capacity(2, since=time.monotonic() - 1), has_result=False)
    assert not budget.stop_all()
    assert not budget("a trial", {"validation_loss": 1.0})
    assert budget.stop_all()


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("ftray.search.broker", "ray.tune ray.train ray.data pandas optuna torch"),
        ("ftray.search.pack_worker", "ray.tune optuna transformers peft deepspeed"),  # Train's controller
        ("ftray.runtime.preemption", "ray.tune optuna torch"),
        ("ftray.search.results", "ray.train optuna torch"),
        ("ftray.search.run_manifest", "ray torch transformers"),  # refuses an output before Ray starts
    ],
)
def test_a_process_imports_only_what_it_needs(module, heavy):
    code = f"import sys, {module}; print([name for name in {heavy.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_worker_asks_for_what_one_node_has(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # the GPUs are none
    # else what other tests start meanwhile would join it
    monkeypatch.setattr("ray._private.utils.write_ray_address", lambda address: None)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=5)
    cluster.add_node(num_cpus=2, num_gpus=2)
    code = """if True:
        import ray
        from ftray.runtime.cluster import cpus_each, node_resources, workers_that_fit
        ray.init(log_to_driver=False)
        print([cpus_each(workers, gpus) for workers, gpus in [(1, 0), (2, 0), (3, 0), (9, 0), (1, 1), (2, 1), (1, 2)]])
        nodes = node_resources()
        print([workers_that_fit(*one, nodes) for one in [(1, 0), (2, 0), (3, 0), (6, 0), (1, 1), (2, 1), (1, 0.5)]])
    """
    asked = os.environ | {"RAY_ADDRESS": cluster.address}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=asked)
    cluster.shutdown()
    assert done.stdout.splitlines() == ["[5, 2, 2, 1, 2, 1, 2]", "[7, 3, 1, 0, 2, 1, 2]"], done.stderr


@pytest.mark.parametrize(
    ("stage", "shard_base", "scheduler"), [(0, False, "halving"), (2, False, "asha"), (2, True, "halving")]
)
def test_two_workers_search_as_each_trial_would_alone(
    cluster, tiny_llama, data, words, tmp_path, stage, shard_base, scheduler
):
    """Also beside trials that can't join the pack, which fail alone; workers start while the data is made."""
    from ftray.search.driver import search
    from ftray.search.results import trial_rows
    from ftray.search.space import load_space
    from ftray.search.trial_worker import SearchContext

    space = tmp_path / "space.yaml"
    space.write_text(
        "method: {choice: [lora, oft]}\n"
        "lora:\n"
        "  learning_rate: {log: [1.0e-5, 3.0e-2]}\n"  # above, one rounding more or less is seen after 18 steps
        "  dropout: 0.0\n"
        "  target_modules: {choice: [attention, nonsense, mlp, more-nonsense]}\n"
        "oft: {block_size: 16, learning_rate: {log: [1.0e-4, 1.0e-2]}}\n"
    )
    sections = {
        "model": {"dtype": "fp32"},
        "data": {"source": words},
        "task": "CAUSAL_LM",
        "training": {
            "steps": 18,
            "zero_stage": stage,
            "validation_records": 7 if stage else 1000,
            "shard_base": shard_base,
        },
        "scaling": {"workers": 2, "cpus_per_worker": 1},
        "search": {"trials": 12, "pack": 3, "scheduler": scheduler, "finalist_seeds": 1},
    }
    job = SearchContext(Config.model_validate(sections), tiny_llama, data.directory, 0.0)

    def prepare():
        deadline = time.monotonic() + 60
        while not victims("ray::RayTrainWorker", os.getpid()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return job, []

    with search(job.config, load_space(str(space)), LocalLocation(tmp_path), 0.0, prepare, prepared_here=True):
        pass
    rows = trial_rows(job.config, LocalLocation(tmp_path))
    assert len(rows) == 12
    wrong = [row for row in rows if "nonsense" in row["config"]["adapter"].get("target_modules", "")]
    assert 0 < len(wrong) < 12
    assert {row["status"] for row in wrong} == {"failed"}
    assert all("nonsense" in row["reason"] for row in wrong)
    assert {row["status"] for row in rows if row not in wrong} == {"finished", "stopped early"}
    for row in [row for row in rows if row["status"] == "finished" and row["trial"]][:2]:
        run = job.run(row["config"]["adapter"], row["config"]["training"])
        wanted = with_trainer(run, data, make=Zero3Trainer)
        assert row["curve"][-1]["validation_loss"] == pytest.approx(wanted[-1][2], rel=1e-4)
        assert row["checkpoint"]


def job_of_packs(tiny_llama, data, **sections):
    from ftray.search.trial_worker import SearchContext

    settings = {"model": {"dtype": "fp32"}, "training": {"steps": 6, "batch_size": 4}} | sections
    return SearchContext(Config.model_validate(settings), tiny_llama, data.directory, 0.0)


@pytest.mark.parametrize("few", [0, 4])
def test_a_validation_reads_no_more_records_than_it_is_to(cluster, data, monkeypatch, few):
    from ftray.data import ray_loader

    monkeypatch.setattr(ray_loader, "FEW_ROW_GROUPS", few)
    if few:  # no task starts
        monkeypatch.setattr(ray_loader.ray.data, "from_items", None)
    assert data.splits["validation"].records > 5
    found = [(batch["position_ids"] == 0).sum() for batch in ray_loader.validation_batches(data, 5, 2, 0, 1)]
    assert found == [2, 2, 1]


@pytest.mark.parametrize("few", [0, 4])
@pytest.mark.parametrize("kept", [2**30, 0])
def test_trials_of_the_same_order_share_a_stream(cluster, tiny_llama, data, tmp_path, monkeypatch, kept, few):
    from ftray.data import ray_loader
    from ftray.data.loader import batches
    from ftray.search import pack_worker

    started, training_batches = [], pack_worker.training_batches
    monkeypatch.setattr(ray_loader, "FEW_ROW_GROUPS", few)
    monkeypatch.setattr(pack_worker, "training_batches", lambda *args: started.append(args) or training_batches(*args))
    monkeypatch.setattr(pack_worker, "KEPT_BYTES", kept)
    job, second_of_two = job_of_packs(tiny_llama, data), SimpleNamespace(rank=1, world_size=2)
    group = pack_worker.PackWorker(pack_worker.PackContext(None, 0, tmp_path, job), second_of_two)
    run, other = (job.run({"method": "lora"}, {"seed": seed}) for seed in (0, 1))
    wanted = {seed: list(islice(batches(data, seed, 0, 2, 1, 2), 6)) for seed in (0, 1)}
    first = group.batches(run, 0)
    ahead = [next(first) for _ in range(4)]
    from_start, resumed, differing = group.batches(run, 0), group.batches(run, 3), group.batches(other, 0)
    found = {0: [*ahead, *first], 1: list(differing)}
    for seed in (0, 1):
        assert [b["input_ids"].tolist() for b in found[seed]] == [b["input_ids"].tolist() for b in wanted[seed]]
    assert [b["labels"].tolist() for b in from_start] == [b["labels"].tolist() for b in wanted[0]]
    assert [b["labels"].tolist() for b in resumed] == [b["labels"].tolist() for b in wanted[0][3:]]
    assert len(started) == (2 if kept else 4)


@pytest.mark.parametrize("few", [0, 4])
def test_a_resumed_trial_reads_only_what_is_left(cluster, tiny_llama, data, tmp_path, monkeypatch, few):
    """Also after the first batch was read to measure the memory; trials that resume at the same step share a stream."""
    from ftray.data import loader, ray_loader
    from ftray.data.loader import batches
    from ftray.search import pack_worker

    monkeypatch.setattr(ray_loader, "ROW_GROUP_ROWS", 4)
    monkeypatch.setattr(ray_loader, "FEW_ROW_GROUPS", few)
    row_groups, read = ray_loader.row_group_order, []

    def counted(data, seed, first, last=None):
        listed = list(row_groups(data, seed, first, last))
        read.append(sum(part.stop - part.start for part in listed))
        return iter(listed)

    first_of_two = SimpleNamespace(rank=0, world_size=2)
    job = job_of_packs(tiny_llama, data, training={"steps": 9, "batch_size": 8, "micro_batch": 2})
    group = pack_worker.PackWorker(pack_worker.PackContext(None, 0, tmp_path, job), first_of_two)
    run = job.run({"method": "lora"}, {})
    wanted = [b["input_ids"].tolist() for b in islice(batches(data, 0, 0, 2, 0, 2), 18)]
    for module in (ray_loader, loader):
        monkeypatch.setattr(module, "row_group_order", counted)
    next(group.batches(run, 0))
    resumed = [group.batches(run, step) for step in (5, 5, 6, 1)]  # 1: as near as a row group
    assert read == [9 * 8, (9 - 5) * 8, (9 - 6) * 8]
    for step, found in zip((5, 5, 6, 1), resumed, strict=True):
        assert [b["input_ids"].tolist() for b in found] == wanted[2 * step :]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_workers_keep_what_a_step_frees(cluster, tiny_llama, data, tmp_path):
    from ftray.search.packs import pack_trainer

    def pages_of_a_second_buffer(config):
        """That the system has to give anew for a tensor as large as one that was just freed."""
        import resource

        import torch

        counts = []
        for _ in range(2):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(2**24)  # 64 MiB
            counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        return counts[1]

    job = job_of_packs(tiny_llama, data, scaling={"cpus_per_worker": 1})
    trainer = pack_trainer(job.config, 0.0, pages_of_a_second_buffer, {}, "pages", LocalLocation(tmp_path))
    assert trainer.fit().return_value < 100  # of 16,384
