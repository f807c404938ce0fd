"""Packs under Ray Train: resident worker groups, each with one base model, that train the trials of a search."""

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import islice, tee
from pathlib import Path
from typing import Any

import ray
from ray import train
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ftray.data import TokenizedData
from ftray.data.ray_loader import RankedShards, training_row_groups, validation_row_groups
from ftray.data.shards import WINDOW
from ftray.errors import UserError
from ftray.runtime.cluster import cpus_each, node_resources, room_for
from ftray.runtime.preemption import noticed
from ftray.search.broker import SearchBroken, TrialBroker
from ftray.search.metrics import PackMetrics
from ftray.search.progress import last_line, training_failure
from ftray.search.results import PACKED_REPORT, newest_whole, places, trial_name, write_json
from ftray.search.sampler import BASELINE
from ftray.search.trial_worker import SearchContext, group_trainer
from ftray.storage.atomic import publish
from ftray.storage.location import Location, Stored, as_local_dir, parse_location, remove
from ftray.storage.manifest import MANIFEST, seal
from ftray.training.run_spec import RunSpec, micro_batch_size

MOST_TRIALS = 32  # that a pack takes by itself
# each trial is a process too, if a light one; and fewer at once are fewer that are drawn without knowing of each other
STAND_INS_PER_CPU = 2
EARLY = 8  # trials whose processes start while the packs load
KEPT_BYTES = 2**30  # of micro-batches that a worker keeps for the next trial of the same order
TOKEN_BYTES = 24  # ids, labels and positions, int64


@dataclass(frozen=True)
class PackContext:
    """One pack's place in a search."""

    job: SearchContext
    broker: Any
    index: int
    experiment: Location


@dataclass
class Capacity:
    """How many trials can train at once, a guess until the first pack is ready; and since when they can."""

    trials: int
    since: float | None = None

    def measure(self, broker: Any, packs: int) -> None:
        """Wait for the first pack."""
        with suppress(ray.exceptions.RayError, RuntimeError):  # none comes: who waits for it is told by the broker
            self.trials = ray.get(broker.capacity.remote(packs))
            self.since = time.monotonic()
            print(f"packed: {packs} worker group(s), {self.trials} trials at once", flush=True)


@contextmanager
def packs(job: SearchContext, experiment: Location, trials: int) -> Iterator[tuple[Any, Capacity]]:
    """The broker, for `trials` to come, of as many packs as the cluster has room for; they load while Tune starts.

    Raises:
        UserError: none of them started; the message says why.
    """
    count = packs_that_fit(job)
    # beside the driver: then no other node's loss ends the search
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    broker = ray.remote(TrialBroker).options(num_cpus=0, max_concurrency=1000, scheduling_strategy=here).remote(trials)
    places = [PackContext(job, broker, i, experiment) for i in range(count)]
    groups = [threading.Thread(target=_run, args=(place,), daemon=True) for place in places]
    room = Capacity(min(EARLY, count * most_trials(job)))
    for thread in (*groups, threading.Thread(target=room.measure, args=(broker, count), daemon=True)):
        thread.start()
    patience = threading.TIMEOUT_MAX
    try:
        yield broker, room
    except SearchBroken as error:
        patience = 5.0  # seconds: a store that doesn't answer holds up each of a pack's last words for a minute
        with suppress(ray.exceptions.RayActorError):
            if not ray.get(broker.ready_packs.remote()):
                raise UserError(f"no pack could start: {error}") from None
        raise
    finally:
        with suppress(ray.exceptions.RayActorError):  # it has died, and the packs with it
            ray.get(broker.close.remote("the search is over"))
            deadline = time.monotonic() + patience
            for index in ray.get(broker.ready_packs.remote()):  # the others still wait for a node: Ray takes them down
                groups[index].join(max(0.0, deadline - time.monotonic()))


def most_trials(job: SearchContext) -> int:
    """That a pack takes, whatever its memory has room for."""
    search = job.config.search
    if isinstance(search.pack, int):
        return search.pack
    useful = -(-search.trials // 2)  # the other half is suggested in the light of these
    useful = min(useful, MOST_TRIALS, max(1, STAND_INS_PER_CPU * int(ray.cluster_resources().get("CPU", 0))))
    return min(useful, search.concurrency or useful)


def packs_that_fit(job: SearchContext) -> int:
    """As configured, else those that the cluster has room for: by GPUs where it has any, or `workers` nodes each."""
    if job.config.scaling.packs:
        return job.config.scaling.packs
    nodes = node_resources()
    fit = room_for(0, job.gpus_per_worker, nodes) if job.gpus_per_worker else sum("CPU" in node for node in nodes)
    return max(1, fit // job.config.scaling.workers)


def pack_trainer(
    job: SearchContext, worker: Callable[[dict[str, Any]], Any], config: dict[str, Any], name: str, storage: Location
) -> TorchTrainer:
    """A `TorchTrainer` whose workers, with a pack's share of the CPUs each, run `worker(config)`."""
    workers = packs_that_fit(job) * job.config.scaling.workers
    cpus = job.config.scaling.cpus_per_worker or cpus_each(workers, job.gpus_per_worker)
    seed = job.config.training.seed
    held_out = validation_row_groups(TokenizedData.load(job.data), job.config.training.validation_records)
    return group_trainer(job, worker, config, cpus, {"validation": held_out}, seed, name, storage)


def _run(place: PackContext) -> None:
    name, left = f"pack-{place.index}", place.job.config.search.max_failures
    while True:
        remove(place.experiment / name)  # trials keep their own checkpoints
        trainer = pack_trainer(place.job, pack_worker, {"place": place}, name, place.experiment)
        try:
            if trainer.fit().return_value:
                break
            print(f"pack {place.index}: its node goes away; it starts again from checkpoints", flush=True)
        except ray.exceptions.RayActorError as error:  # what watches over the workers has died: not for Train to mend
            if not left:
                _close(place, last_line(error))
                break
            left -= 1
        except Exception as error:
            _close(place, training_failure(error))
            break


def _close(place: PackContext, reason: str) -> None:
    with suppress(ray.exceptions.RayActorError):  # nobody is left to be told
        ray.get(place.broker.close.remote(reason))


def pack_worker(config: dict[str, Any]) -> bool:
    """What each worker of a pack runs until the search is over (true), or the node goes away (false)."""
    from ftray.training.pack_trainer import PackTrainer  # here: the driver needs none of it

    place: PackContext = config["place"]
    settings = place.job.config
    task = TokenizedData.load(place.job.data).task
    checkpointing = settings.training.gradient_checkpointing
    trainer = PackTrainer(settings.model, place.job.model_path, checkpointing, task, settings.data.max_length)
    if trainer.rank == 0:
        print(f"pack {place.index}: {trainer.pack.verdict}", flush=True)
    trainer.measure = place.job.measure()
    pack = PackWorker(place, trainer)
    pack.size_up()
    return pack.train()


class PackWorker:
    """One worker's view of its pack: what the broker orders, the trainer does."""

    def __init__(self, place: PackContext, trainer: Any):
        self.place, self.trainer = place, trainer
        self.data = TokenizedData.load(place.job.data)
        self.collate = self.data.task.load().collate
        self.streams: dict[tuple[int, int, int], Any] = {}  # each at its start, what was read of it is kept
        self.held: list[Any] | None = None  # the validation batches, if they are few
        first = trainer.rank == 0
        self.metrics = PackMetrics(place.job.config.output, place.index) if first else None

    def size_up(self) -> None:
        """Tell the broker how many trials fit."""
        capacity = self.measured_capacity()
        if self.trainer.rank == 0:
            ray.get(self.place.broker.ready.remote(self.place.index, capacity))

    def measured_capacity(self) -> int:
        """Set the tokens of a pass by a probe step; returns how many trials the pack takes."""
        probe = self.place.job.run(BASELINE | {"target_modules": "all-linear"}, {})
        fit = self.trainer.fit_memory(probe, next(self.batches(probe, 0)))
        most = most_trials(self.place.job)
        return most if isinstance(self.place.job.config.search.pack, int) else min(fit, most)

    def train(self) -> bool:
        """Until the broker closes (true), or a rank's process has not long to live (false).

        Trials that are not over then leave a checkpoint of where they are.
        """
        reports: dict[int, list[Any]] = {}
        failures: dict[int, str] = {}
        while True:
            orders = self._orders(reports, failures)
            reports, failures = {}, {}
            cut_off = self.trainer.any_rank(noticed())
            for number in orders["leave"]:
                if str(number) in self.trainer.trials:
                    self.trainer.leave(str(number))
            if orders["close"] or cut_off:
                for name, trial in self.trainer.trials.items():
                    if trial.history.step and not trial.history.over:
                        self._save(name)
                return not cut_off
            for number, config in orders["join"].items():
                if reason := self._join(number, config):
                    failures[number] = reason
                elif past := _marked(self.trainer.trials[str(number)]):
                    reports[number] = past
            trials = self.trainer.trials
            active = [str(n) for n in orders["run"] if str(n) in trials and not trials[str(n)].history.over]
            active = [name for name in active if int(name) not in reports]
            if not active:
                continue
            before, started = self._tokens(), time.monotonic()
            failed = self.trainer.step(active)
            if self.metrics:
                self.metrics.step(len(trials), self._tokens() - before, time.monotonic() - started)
            hurried = {str(number) for number in orders["report"]}
            due = [n for n in active if n not in failed and (trials[n].history.due or n in hurried)]
            if due:
                failed |= self.trainer.validate(due, self.validation())
            for name in due:
                if name not in failed:
                    self._save(name)
                    reports[int(name)] = _marked(trials[name])
            for name, reason in failed.items():
                self.trainer.leave(name)
                failures[int(name)] = reason

    def _tokens(self) -> int:
        return sum(trial.history.tokens for trial in self.trainer.trials.values())

    def _orders(self, reports: dict[int, list[Any]], failures: dict[int, str]) -> dict[str, Any]:
        orders = None
        if self.trainer.rank == 0:
            orders = ray.get(self.place.broker.orders.remote(self.place.index, reports, failures))
        return self.trainer.from_first_rank(orders)

    def _join(self, number: int, config: dict[str, Any]) -> str | None:
        """Bring a trial in; returns why it can't be, on whichever rank."""
        name = str(number)
        kept = self.trainer.from_first_rank(newest_whole(self.place.experiment / trial_name(number)))
        with as_local_dir(parse_location(kept)) if kept else nullcontext() as directory:
            reason = self._bring(name, config, str(directory) if directory else None)
        reason = self.trainer.first_of_ranks(reason)
        if reason and name in self.trainer.trials:
            self.trainer.leave(name)
        return reason

    def _bring(self, name: str, config: dict[str, Any], checkpoint: str | None) -> str | None:
        from ftray.adapters.lora_init import SAMPLES

        try:
            run = self.place.job.run(config["adapter"], config["training"])
            first = partial(self.batches, run, 0)
            apart = self.trainer.join(name, run, checkpoint, lambda: list(islice(first(), SAMPLES)))
            if apart and self.trainer.rank == 0:
                print(f"trial {name} trains by itself: {apart}", flush=True)
            trial = self.trainer.trials[name]
            trial.batches = self.batches(run, trial.history.step)
        except Exception as error:  # of one trial: its mates go on
            return last_line(error)
        return None

    def batches(self, run: RunSpec, step: int) -> Iterator[Any]:
        """This rank's micro-batches from `step` on, streamed by Ray Data.

        Trials of the same order share a stream: to start one takes seconds, in which all of the pack would wait.
        """
        rows, ranks = micro_batch_size(run.training, self.trainer.world_size), self.trainer.world_size
        seed, records = run.training.seed, run.steps * run.training.batch_size
        seen = step * run.training.batch_size // (rows * ranks)
        if kept := self.streams.get((seed, rows, records)):
            return islice(copy(kept), seen, None)
        windows = training_row_groups(self.data, seed, records)
        stream = RankedShards(self.data, seed).stream("train", windows, self.trainer.rank, ranks).iterator()
        batches = iter(stream.iter_torch_batches(batch_size=rows, collate_fn=self.collate, prefetch_batches=2))
        split = self.data.splits["train"]
        if records / ranks * split.tokens / split.records * TOKEN_BYTES < KEPT_BYTES:
            self.streams[seed, rows, records], batches = tee(batches)
        return islice(batches, seen, None)

    def validation(self) -> Iterable[Any]:
        """This rank's batches of the validation records; kept from the first pass on, if they are few."""
        if self.held is not None:
            return self.held
        training = self.place.job.config.training
        rows = 4 * micro_batch_size(training, self.trainer.world_size)  # no activation is kept
        shard = train.get_dataset_shard("validation")
        batches = shard.iter_torch_batches(batch_size=rows, collate_fn=self.collate, prefetch_batches=2)
        if min(self.data.splits["validation"].records, training.validation_records) > WINDOW:
            return batches
        self.held = list(batches)
        return self.held

    def _save(self, name: str) -> None:
        """Write a trial's checkpoint, whole or not at all; its best one and this one are kept.

        One from between two rungs bears no report: it is there to go on from.
        """
        directory, search = self.place.experiment / trial_name(int(name)), self.place.job.config.search
        history = self.trainer.trials[name].history
        sign = 1 if search.direction == "min" else -1
        best = min(history.reports, key=lambda report: sign * report[search.metric], default=None)
        report = history.reports[-1] if best and history.reports[-1]["step"] == history.step else None
        target = directory / f"checkpoint_{history.step:08d}"
        if isinstance(target, Stored):
            self._upload(name, target, report)
        else:
            self._rename(name, target, report)
        if self.trainer.rank:
            return
        kept = {str(target), *([str(directory / f"checkpoint_{best['step']:08d}")] if best else [])}
        for old in places(directory):
            if str(old) not in kept:
                remove(old)

    def _rename(self, name: str, target: Path, report: dict[str, Any] | None) -> None:
        aside = target.with_name(".checkpoint")
        if self.trainer.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.trainer.wait_for_all()
        self.trainer.save(name, str(aside))
        self.trainer.wait_for_all()
        if self.trainer.rank == 0:
            if report:
                write_json(report, aside / PACKED_REPORT)
            publish(aside, target)

    def _upload(self, name: str, target: Stored, report: dict[str, Any] | None) -> None:
        """Every rank uploads what it wrote; manifest and report come last, and without them there is no checkpoint."""
        rank, ranks = self.trainer.rank, self.trainer.world_size
        if rank == 0:
            remove(target)
        self.trainer.wait_for_all()
        with tempfile.TemporaryDirectory(prefix="ftray-") as name_of_directory:
            directory, last = Path(name_of_directory), []
            self.trainer.save(name, str(directory))
            if report and rank == 0:
                write_json(report, directory / PACKED_REPORT)
            seal(directory, rank, ranks)
            for path in (directory / f"{MANIFEST}.json", directory / PACKED_REPORT):
                if path.exists():
                    last.append((path.name, path.read_bytes()))
                    path.unlink()
            target.upload(directory)
        self.trainer.wait_for_all()
        for file, content in last:
            (target / file).write_bytes(content)


def _marked(trial: Any) -> list[dict[str, Any]]:
    return [report | {"done": report["step"] >= trial.run.steps} for report in trial.history.reports]
