"""Packs under Ray Train: long-lived worker groups, each with one base model, that train the trials of a search."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import ray
from ray import train
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ftray.data import TokenizedData
from ftray.data.ray_loader import SharedBatches, training_batches, validation_row_groups
from ftray.data.shards import ROW_GROUP_ROWS
from ftray.errors import UserError
from ftray.runtime.cluster import cpus_each, node_resources, room_for
from ftray.runtime.preemption import noticed
from ftray.search.broker import SearchBroken, TrialBroker
from ftray.search.metrics import PackMetrics
from ftray.search.progress import last_line, training_failure
from ftray.search.results import PACKED_REPORT, newest_whole, places, trial_name, write_json
from ftray.search.sampler import BASELINE
from ftray.search.trial_worker import SearchContext, group_trainer
from ftray.storage.location import Location, parse_location
from ftray.training.run_spec import RunSpec, micro_batch_size

MOST_TRIALS = 32  # of a pack whose size is not configured
# each trial is also a light process; and the fewer run at once, the fewer are drawn without each other's results
STAND_INS_PER_CPU = 2
EARLY = 8  # trials whose processes start while the packs load their models
KEPT_BYTES = 2**30  # most memory of micro-batches that a worker keeps for later trials with the same data order
TOKEN_BYTES = 24  # of a token in a batch: id, label and position, int64


@dataclass(frozen=True)
class PackContext:
    """What a pack's workers are started with.

    Attributes:
        search: what all trials of the search share.
        broker: handle of the :class:`ftray.search.broker.TrialBroker`.
        index: of the pack, from 0.
        experiment: directory of the trials.
    """

    search: SearchContext
    broker: Any
    index: int
    experiment: Location


@dataclass
class Capacity:
    """How many trials can train at once.

    Attributes:
        trials: an estimate until the first pack is ready.
        since: when it was, by `time.monotonic`; None: none is ready yet.
    """

    trials: int
    since: float | None = None

    def measure(self, broker: Any, packs: int) -> None:
        """Wait for the first pack, and take its number of trials."""
        with suppress(ray.exceptions.RayError, RuntimeError):  # no pack can start: the broker tells the trials
            self.trials = ray.get(broker.capacity.remote(packs))
            self.since = time.monotonic()
            print(f"packed: {packs} worker group(s), {self.trials} trials at once", flush=True)


@contextmanager
def packs(search: SearchContext, experiment: Location, trials: int) -> Iterator[tuple[Any, Capacity]]:
    """Start a broker for `trials` and as many packs as the cluster has room for; they load while Tune starts.

    Yields the broker and the capacity of the packs.

    Raises:
        UserError: no pack could start; the message says why.
    """
    count = packs_that_fit(search)
    # on the driver's node: then losing another node doesn't end the search
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    broker = ray.remote(TrialBroker).options(num_cpus=0, max_concurrency=1000, scheduling_strategy=here).remote(trials)
    contexts = [PackContext(search, broker, i, experiment) for i in range(count)]
    groups = [threading.Thread(target=_run, args=(context,), daemon=True) for context in contexts]
    capacity = Capacity(min(EARLY, count * most_trials(search)))
    for thread in (*groups, threading.Thread(target=capacity.measure, args=(broker, count), daemon=True)):
        thread.start()
    patience = threading.TIMEOUT_MAX
    try:
        yield broker, capacity
    except SearchBroken as error:
        patience = 5.0  # seconds: an object store that doesn't answer delays each last write of a pack by a minute
        with suppress(ray.exceptions.RayActorError):
            if not ray.get(broker.ready_packs.remote()):
                raise UserError(f"no pack could start: {error}") from None
        raise
    finally:
        with suppress(ray.exceptions.RayActorError):  # the broker has died, and the packs with it
            ray.get(broker.close.remote("the search is over"))
            deadline = time.monotonic() + patience
            for index in ray.get(broker.ready_packs.remote()):  # Ray ends the others, which still wait for a node
                groups[index].join(max(0.0, deadline - time.monotonic()))


def most_trials(search: SearchContext) -> int:
    """The most trials that a pack takes, however many its memory has room for."""
    cfg = search.config.search
    if isinstance(cfg.pack, int):
        return cfg.pack
    useful = -(-cfg.trials // 2)  # the other half is suggested with the results of these
    useful = min(useful, MOST_TRIALS, max(1, STAND_INS_PER_CPU * int(ray.cluster_resources().get("CPU", 0))))
    return min(useful, cfg.concurrency or useful)


def packs_that_fit(search: SearchContext) -> int:
    """Number of packs: as configured, else as many as the GPUs allow, without GPUs one per `workers` nodes."""
    if search.config.scaling.packs:
        return search.config.scaling.packs
    nodes = node_resources()
    fit = room_for(0, search.gpus_per_worker, nodes) if search.gpus_per_worker else sum("CPU" in node for node in nodes)
    return max(1, fit // search.config.scaling.workers)


def pack_trainer(
    search: SearchContext, worker: Callable[[dict[str, Any]], Any], config: dict[str, Any], name: str, storage: Location
) -> TorchTrainer:
    """A `TorchTrainer` whose workers run `worker(config)`, each with its share of the CPUs."""
    workers = packs_that_fit(search) * search.config.scaling.workers
    cpus = search.config.scaling.cpus_per_worker or cpus_each(workers, search.gpus_per_worker)
    seed = search.config.training.seed
    held_out = validation_row_groups(TokenizedData.load(search.data), search.config.training.validation_records)
    return group_trainer(search, worker, config, cpus, {"validation": held_out}, seed, name, storage)


def _run(context: PackContext) -> None:
    name, left = f"pack-{context.index}", context.search.config.search.max_failures
    while True:
        (context.experiment / name).remove()  # trials keep their own checkpoints
        trainer = pack_trainer(context.search, pack_worker, {"context": context}, name, context.experiment)
        try:
            if trainer.fit().return_value:
                break
            print(f"pack {context.index}: its node goes away; it restarts from checkpoints", flush=True)
        except ray.exceptions.RayActorError as error:  # Train's controller has died, which Train itself doesn't restart
            if not left:
                _close(context, last_line(error))
                break
            left -= 1
        except Exception as error:
            _close(context, training_failure(error))
            break


def _close(context: PackContext, reason: str) -> None:
    with suppress(ray.exceptions.RayActorError):  # the broker is gone, and with it everyone to tell
        ray.get(context.broker.close.remote(reason))


def pack_worker(config: dict[str, Any]) -> bool:
    """Runs in each worker of a pack until the search is over (returns true) or its node goes away (false)."""
    from ftray.training.pack_trainer import PackTrainer  # here, as the driver doesn't need torch

    context: PackContext = config["context"]
    settings = context.search.config
    task = TokenizedData.load(context.search.data).task
    checkpointing = settings.training.gradient_checkpointing
    trainer = PackTrainer(settings.model, context.search.model_path, checkpointing, task, settings.data.max_length)
    if trainer.rank == 0:
        print(f"pack {context.index}: {trainer.pack.verdict}", flush=True)
    trainer.measure = context.search.measure()
    pack = PackWorker(context, trainer)
    pack.size_up()
    return pack.train()


class PackWorker:
    """One worker of a pack: carries out the broker's orders with a :class:`ftray.training.pack_trainer.PackTrainer`."""

    def __init__(self, context: PackContext, trainer: Any):
        self.context, self.trainer = context, trainer
        self.data = TokenizedData.load(context.search.data)
        self.collate = self.data.task.load().collate
        self.streams: dict[tuple[int, int, int], list[SharedBatches]] = {}  # by seed, micro-batch size, last position
        self.held: list[Any] | None = None  # the validation batches, if they fit in memory
        first = trainer.rank == 0
        self.metrics = PackMetrics(context.search.config.output, context.index) if first else None

    def size_up(self) -> None:
        """Measure how many trials fit, and tell the broker."""
        capacity = self.measured_capacity()
        if self.trainer.rank == 0:
            ray.get(self.context.broker.ready.remote(self.context.index, capacity))

    def measured_capacity(self) -> int:
        """Set the tokens of a pass from a probe step; returns how many trials the pack takes."""
        probe = self.context.search.run(BASELINE | {"target_modules": "all-linear"}, {})
        fit = self.trainer.fit_memory(probe, next(self.batches(probe, 0)))
        most = most_trials(self.context.search)
        return most if isinstance(self.context.search.config.search.pack, int) else min(fit, most)

    def train(self) -> bool:
        """Train until the broker closes (returns true) or the process of a rank must end soon (false).

        Then writes a checkpoint of each trial that is not over.
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
            orders = ray.get(self.context.broker.orders.remote(self.context.index, reports, failures))
        return self.trainer.from_first_rank(orders)

    def _join(self, number: int, config: dict[str, Any]) -> str | None:
        """Add a trial to the pack; returns the reason if that fails on any rank."""
        name = str(number)
        kept = self.trainer.from_first_rank(newest_whole(self.context.experiment / trial_name(number)))
        with parse_location(kept).as_local_dir() if kept else nullcontext() as directory:
            reason = self._bring(name, config, str(directory) if directory else None)
        reason = self.trainer.first_of_ranks(reason)
        if reason and name in self.trainer.trials:
            self.trainer.leave(name)
        return reason

    def _bring(self, name: str, config: dict[str, Any], checkpoint: str | None) -> str | None:
        from ftray.adapters.lora_init import SAMPLES

        try:
            run = self.context.search.run(config["adapter"], config["training"])
            first = partial(self.batches, run, 0)
            apart = self.trainer.join(name, run, checkpoint, lambda: list(islice(first(), SAMPLES)))
            if apart and self.trainer.rank == 0:
                print(f"trial {name} trains by itself: {apart}", flush=True)
            trial = self.trainer.trials[name]
            trial.batches = self.batches(run, trial.history.step)
        except Exception as error:  # it concerns one trial: the others continue
            return last_line(error)
        return None

    def batches(self, run: RunSpec, step: int) -> Iterator[Any]:
        """This rank's micro-batches from optimiser step `step` on, streamed by Ray Data.

        Trials with the same data order share a stream: starting one takes seconds, in which the whole pack would wait.
        """
        rows, ranks = micro_batch_size(run.training, self.trainer.world_size), self.trainer.world_size
        seed, first, last = run.training.seed, step * run.training.batch_size, run.steps * run.training.batch_size
        shared = self.streams.setdefault((seed, rows, last), [])
        for stream in shared:
            if stream.has(first):
                return stream.start_at(first)
        batches = training_batches(self.data, seed, first, last, rows, self.trainer.rank, ranks)
        split = self.data.splits["train"]
        kept = last - first + sum(last - stream.first for stream in shared)
        if kept / ranks * split.tokens / split.records * TOKEN_BYTES >= KEPT_BYTES:
            return batches
        shared.append(SharedBatches(batches, first, rows * ranks))
        return shared[-1].start_at(first)

    def validation(self) -> Iterable[Any]:
        """This rank's batches of the validation records; kept from the first pass on, if they are few."""
        if self.held is not None:
            return self.held
        training = self.context.search.config.training
        rows = 4 * micro_batch_size(training, self.trainer.world_size)  # four times: validation keeps no activations
        shard = train.get_dataset_shard("validation")
        batches = shard.iter_torch_batches(batch_size=rows, collate_fn=self.collate, prefetch_batches=2)
        if min(self.data.splits["validation"].records, training.validation_records) > ROW_GROUP_ROWS:
            return batches
        self.held = list(batches)
        return self.held

    def _save(self, name: str) -> None:
        """Write a trial's checkpoint atomically; keep it and the best one, remove the others.

        A checkpoint from between two rungs holds no report: it only serves to resume from.
        """
        directory, search = self.context.experiment / trial_name(int(name)), self.context.search.config.search
        history = self.trainer.trials[name].history
        sign = 1 if search.direction == "min" else -1
        best = min(history.reports, key=lambda report: sign * report[search.metric], default=None)
        report = history.reports[-1] if best and history.reports[-1]["step"] == history.step else None
        target = directory / f"checkpoint_{history.step:08d}"
        rank, ranks, wait = self.trainer.rank, self.trainer.world_size, self.trainer.wait_for_all
        with target.shared_dir(rank, ranks, wait, last=[PACKED_REPORT]) as made:
            self.trainer.save(name, str(made))
            if report and rank == 0:
                write_json(report, made / PACKED_REPORT)
        if self.trainer.rank:
            return
        kept = {str(target), *([str(directory / f"checkpoint_{best['step']:08d}")] if best else [])}
        for old in places(directory):
            if str(old) not in kept:
                old.remove()


def _marked(trial: Any) -> list[dict[str, Any]]:
    return [report | {"done": report["step"] >= trial.run.steps} for report in trial.history.reports]
