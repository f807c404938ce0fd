"""One worker of a pack: trains the trials that the broker assigns to the pack, all on one base model."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import ray
from ray import cloudpickle
from ray.actor import ActorHandle

from ftray.data.ray_loader import SharedBatches, training_batches, validation_batches
from ftray.data.shards import ROW_GROUP_ROWS
from ftray.evaluation.user_metric import UserMetricError
from ftray.runtime.preemption import preempted
from ftray.search.broker import Orders
from ftray.search.clones import start_of
from ftray.search.failures import last_line
from ftray.search.final_calls import FinalCalls
from ftray.search.live import Answers, Heartbeat, sampling
from ftray.search.pack_metrics import PackMetrics
from ftray.search.results import LOSSES_SO_FAR, PACKED_REPORT, newest_whole, places, trial_name, write_json
from ftray.search.rungs import LEAST_FINALISTS, Rung, cohort_size
from ftray.search.space import BASELINE
from ftray.search.trial_worker import SearchContext
from ftray.storage.location import Location, parse_location
from ftray.training.run_spec import RunSpec, micro_batch_size
from ftray.training.train_state import best_report

if TYPE_CHECKING:
    from ftray.tasks.task import Batch
    from ftray.training.pack_trainer import PackedTrial, PackTrainer

MOST_TRIALS = 32  # of a pack whose size is not configured
# each trial is also a light process; and the fewer run at once, the fewer are suggested without each other's results
TRIALS_PER_CPU = 2
KEPT_BYTES = 2**30  # most memory of micro-batches that a worker keeps for later trials with the same data order
VALIDATION_ROWS = 4  # times those of a micro-batch: validation keeps no activations
TOKEN_BYTES = 24  # of a token in a batch: id, label and position, int64


@dataclass(frozen=True)
class PackPlace:
    """What a pack's workers are started with.

    Attributes:
        broker: handle of the :class:`ftray.search.broker.TrialBroker`.
        index: of the pack, from 0.
        experiment: directory of the trials.
    """

    broker: ActorHandle
    index: int
    experiment: Location


@dataclass(frozen=True)
class PackContext(PackPlace):
    """What a pack's workers know once the search has begun.

    Attributes:
        search: what all trials of the search share.
    """

    search: SearchContext


def most_trials(search: SearchContext) -> int:
    """The most trials that a pack takes, however many fit in its memory."""
    cfg = search.config.search
    if isinstance(cfg.pack, int):
        return cfg.pack
    if cfg.scheduler == "halving":
        first, *later = search.rungs()
        # the survivors of a cohort train beside the next one
        useful = min(math.ceil(cohort_size(cfg) * (1 + first.share)), cfg.trials)
        if later:
            useful = max(useful, LEAST_FINALISTS * (1 + cfg.further_seeds))  # which train beside each other
    else:
        useful = -(-cfg.trials // 2)  # the other half is suggested with the results of these
        useful = min(useful, max(1, TRIALS_PER_CPU * int(ray.cluster_resources().get("CPU", 0))))
    return min(useful, MOST_TRIALS, cfg.concurrency or useful)


def pack_worker(config: dict[str, Any]) -> bool:
    """Run one worker of a pack until the search is over (returns true) or its node is about to end (false)."""
    from ftray.training.pack_trainer import PackTrainer  # takes seconds, in which the driver may still tokenize

    place: PackPlace = config["place"]
    begun: bytes | None = ray.get(place.broker.search.remote())
    if begun is None:
        return True
    context = PackContext(place.broker, place.index, place.experiment, cloudpickle.loads(begun))
    settings = context.search.config
    task = context.search.tokenized.task
    trainer = PackTrainer(settings.model, context.search.model_path, settings.training, task, settings.data.longest)
    if trainer.rank == 0:
        print(f"pack {context.index}: {trainer.pack.verdict}", flush=True)
    trainer.measure = context.search.measure()
    trainer.measure_together = context.search.measure_together(trainer.base.model)
    trainer.rollouts = context.search.rollouts(trainer)
    worker = PackWorker(context, trainer)
    if trainer.rank == 0:
        output = context.experiment.parent
        worker.heartbeat = Heartbeat(output, context.index)
        worker.answers = sampling(context.search, trainer.base.model, output)
    worker.report_capacity()
    over = worker.train()
    if worker.stays:
        as_loaded = not (settings.training.shard_base or settings.training.liger)
        calls = FinalCalls(context, trainer.base if as_loaded else None)
        del worker, trainer  # what trained is freed
        calls.serve()
    return over


@dataclass
class Results:
    """What a pack reports to the broker.

    Attributes:
        reports: by trial, all its reports so far.
        failures: by trial, why it failed.
    """

    reports: dict[int, list[Any]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)


class PackWorker:
    """One worker of a pack: carries out the broker's orders with a :class:`ftray.training.pack_trainer.PackTrainer`."""

    def __init__(self, context: PackContext, trainer: "PackTrainer"):
        self.context, self.trainer = context, trainer
        self.data = context.search.tokenized
        self.streams: dict[tuple[int, int, int], list[SharedBatches]] = {}  # by seed, micro-batch size, last position
        self.compared = context.search.rungs()
        self.unsaved: set[str] = set()  # trials that are due to report, until they have their checkpoint
        self.held: list[Batch] | None = None  # the validation batches, if they fit in memory
        self.stays = False  # after its trials, for the calls of the driver
        self.metrics = PackMetrics(context.search.config.output, context.index) if trainer.rank == 0 else None
        self.heartbeat: Heartbeat | None = None
        self.answers: Answers | None = None  # keeps what trials answer

    def report_capacity(self) -> None:
        """Measure how many trials fit, and report it to the broker."""
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
        results, held = Results(), False
        while True:
            orders = self._exchange(results)
            must_end = self.trainer.any_rank(preempted())
            self._leave(str(number) for number in orders.leave)
            if orders.close or must_end:
                self._save_unfinished()
                self.stays = orders.stay and not must_end
                if self.stays:
                    self._leave([*self.trainer.trials])
                return not must_end
            if orders.hold and not held:  # who knows for how long
                self._save_unfinished()
                if self.heartbeat:
                    self.heartbeat.rest(self.trainer.trials)
            results, held = Results(), orders.hold
            for number, config in orders.join.items():
                self._join(str(number), config, results)
            names = [str(number) for number in orders.run if number not in results.reports]
            known = {n: self.trainer.trials[n].history for n in names if n in self.trainer.trials}
            active = [n for n, history in known.items() if not history.over or history.owes_report]
            try:
                if active:
                    self._step(active, {str(number) for number in orders.report}, results)
            except UserMetricError as error:  # nothing is wrong with the trials: mended, the search resumes
                self._save_unfinished()
                if self.trainer.rank == 0:
                    ray.get(self.context.broker.close.remote(str(error)))
                return True

    def _exchange(self, results: Results) -> Orders:
        """Report the results of the last orders to the broker; returns its next ones, the same on all ranks."""
        orders: Orders | None = None
        if self.trainer.rank == 0:
            call = self.context.broker.orders.remote(self.context.index, results.reports, results.failures)
            orders = ray.get(call)
        return cast("Orders", self.trainer.from_first_rank(orders))

    def _leave(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self.trainer.trials:
                self.trainer.leave(name)

    def _save_unfinished(self) -> None:
        for name, trial in self.trainer.trials.items():
            if trial.history.step and (not trial.history.over or name in self.unsaved):
                self._save(name)

    def _join(self, name: str, config: dict[str, Any], results: Results) -> None:
        """Add a trial to the pack, from its newest checkpoint; it fails on all ranks if it fails on one."""
        kept = self.trainer.from_first_rank(newest_whole(self.context.experiment / trial_name(int(name))))
        with parse_location(kept).as_local_dir() if kept else nullcontext() as directory:
            reason = self._join_rank(name, config, str(directory) if directory else None)
        if reason := self.trainer.first_of_ranks(reason):
            self._leave([name])
            results.failures[int(name)] = reason
        elif reports := _marked(self.trainer.trials[name]):
            results.reports[int(name)] = reports

    def _join_rank(self, name: str, config: dict[str, Any], checkpoint: str | None) -> str | None:
        """Add a trial on this rank; returns the reason if that fails."""
        from ftray.adapters.lora_init import SAMPLES

        try:
            start = start_of(config, self.context.experiment) or self.context.search.start or None
            run = self.context.search.run(config["adapter"], config["training"], start)
            first = partial(self.batches, run, 0)
            isolation_reason = self.trainer.join(name, run, checkpoint, lambda: list(islice(first(), SAMPLES)))
            if isolation_reason and self.trainer.rank == 0:
                print(f"trial {name} trains by itself: {isolation_reason}", flush=True)
            trial = self.trainer.trials[name]
            if not trial.history.over:
                trial.batches = self.batches(run, trial.history.step)
        except Exception as error:  # it concerns one trial: the others continue
            return last_line(error)
        return None

    def _step(self, active: list[str], early: set[str], results: Results) -> None:
        """Make one step of the `active` trials; those that are due to report, or named in `early`, do.

        They are validated first, unless the rung compares them by their training losses.
        """
        trials = self.trainer.trials
        tokens, started = self._tokens(), time.monotonic()
        owing = {name for name in active if trials[name].history.owes_report}  # they are validated where they are
        stepping = [name for name in active if name not in owing]
        failed = self.trainer.step(stepping) if stepping else {}
        tokens, seconds = self._tokens() - tokens, time.monotonic() - started
        if self.metrics and stepping:
            self.metrics.step(len(trials), tokens, seconds)
        if self.heartbeat and stepping:
            self.heartbeat.step(trials, tokens, seconds)
        due = [n for n in active if n not in failed and (trials[n].history.due or n in early)]
        self.unsaved = set(due)
        unvalidated = [n for n in due if n not in early and (rung := self._rung(n)) and rung.paired]
        if unvalidated and (paired := self.context.search.paired):
            self.trainer.report_training(unvalidated, {n for n in unvalidated if paired.holds_for(trials[n].run)})
        if validated := [n for n in due if n not in unvalidated]:
            failed |= self._validate(validated)
        for name in due:
            if name not in failed:
                self._save(name)
                results.reports[int(name)] = _marked(trials[name])
        self.unsaved = set()
        self._keep_answers([name for name in due if name not in failed])
        self._leave(failed)
        results.failures |= {int(name): reason for name, reason in failed.items()}

    def _keep_answers(self, names: Sequence[str]) -> None:
        """Keep what trials answer now, for whoever looks on; whatever fails in it, the search does without."""
        if not (self.answers and names):
            return
        try:
            known = {name: self.trainer.trials[name] for name in names}
            models = {name: self.trainer.pack.adapters[name].model for name in names}
            self.answers(models, {n: t.history.step * t.run.training.batch_size for n, t in known.items()})
        except Exception as error:
            print(f"answers of the trials are not kept: {last_line(error)}", flush=True)
            self.answers = None

    def _validate(self, names: Iterable[str]) -> dict[str, str]:
        """Validate trials, each on as many records as its rung has; returns the reason for each that failed."""
        at: dict[int | None, list[str]] = {}
        for name in names:
            rung = self._rung(name)
            at.setdefault(rung.validated if rung else None, []).append(name)
        failed: dict[str, str] = {}
        for part, group in at.items():
            failed |= self.trainer.validate(group, *self._part(part))
        return failed

    def _rung(self, name: str) -> Rung | None:
        """The last rung that a trial has reached; None: none yet, or its end."""
        trial = self.trainer.trials[name]
        records = trial.history.step * trial.run.training.batch_size
        reached = [rung for rung in self.compared if rung.records <= records]
        return reached[-1] if reached and not trial.history.over else None

    def _part(self, records: int | None) -> "tuple[Iterable[Batch], int | None]":
        """This rank's validation batches that have `records` over all ranks, or more, and how many; None: all."""
        training, ranks = self.context.search.config.training, self.trainer.world_size
        known = min(self.data.splits["validation"].records, training.validation_records)
        rows = VALIDATION_ROWS * micro_batch_size(training, ranks)
        count = -(-(records or known) // (rows * ranks))
        if records is None or count * rows * ranks >= known:
            return self.validation(), None
        return islice(self.validation(), count), count * rows * ranks

    def _tokens(self) -> int:
        return sum(trial.history.tokens for trial in self.trainer.trials.values())

    def batches(self, run: RunSpec, step: int) -> "Iterator[Batch]":
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
        if kept / ranks * split.drawn_tokens / split.drawn * TOKEN_BYTES >= KEPT_BYTES:
            return batches
        shared.append(SharedBatches(batches, first, rows * ranks))
        return shared[-1].start_at(first)

    def validation(self) -> "Iterable[Batch]":
        """This rank's batches of the validation records; kept from the first pass on, if they are few."""
        if self.held is not None:
            return self.held
        training = self.context.search.config.training
        rows, rank, ranks = VALIDATION_ROWS, self.trainer.rank, self.trainer.world_size
        rows *= micro_batch_size(training, ranks)
        batches: Iterable[Batch] = validation_batches(self.data, training.validation_records, rows, rank, ranks)
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
        best = best_report(history.reports, search.goal.metric, search.goal.direction)
        report = history.reports[-1] if history.reports and history.reports[-1]["step"] == history.step else None
        target = directory / f"checkpoint_{history.step:08d}"
        rank, ranks, wait = self.trainer.rank, self.trainer.world_size, self.trainer.wait_for_all
        with target.shared_dir(rank, ranks, wait, last=[PACKED_REPORT]) as made:
            self.trainer.save(name, str(made))
            if report and rank == 0:
                write_json({**report, LOSSES_SO_FAR: history.losses}, made / PACKED_REPORT)
        if self.trainer.rank:
            return
        kept = {str(target), *([str(directory / f"checkpoint_{best['step']:08d}")] if best else [])}
        for old in places(directory):
            if str(old) not in kept:
                old.remove()


def _marked(trial: "PackedTrial") -> list[dict[str, Any]]:
    return [report | {"done": report["step"] >= trial.run.steps} for report in trial.history.reports]
