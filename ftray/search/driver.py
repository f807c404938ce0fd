"""The search itself: Ray Tune over Optuna's suggestions, weak trials stopped early, everything resumable."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from optuna.trial import FrozenTrial
from ray import tune
from ray.actor import ActorHandle
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, HyperBandScheduler, TrialScheduler
from ray.tune.stopper import CombinedStopper

from ftray.compat.ray_tune import trials_without_actors
from ftray.config import Config
from ftray.data.pipeline import read_here
from ftray.data.shards import REFERENCE
from ftray.data.splits import Sources
from ftray.errors import UserError
from ftray.models.find import hidden_size
from ftray.runtime.cluster import node_resources, say_if_waiting, workers_that_fit
from ftray.runtime.preemption import notice
from ftray.search.advisor import Advisor
from ftray.search.cohorts import Cohorts
from ftray.search.control import Requests, ShowsStates
from ftray.search.failures import PROCESS_DIED, PacksGone, SearchBroken, failure_reason, trial_error
from ftray.search.final_calls import Hardware, pack_suffices
from ftray.search.finalists import runs_left
from ftray.search.journal import SEED_OF, past_trials
from ftray.search.packs import Capacity, cpus_of_pack_worker, packs
from ftray.search.results import EXPERIMENT, JOURNAL, trial_name
from ftray.search.run_manifest import running_since, trains_in_packs
from ftray.search.rungs import FACTOR, cohort_size, rung_records
from ftray.search.sampler import Sampler
from ftray.search.scheduler import CohortScheduler
from ftray.search.space import Space
from ftray.search.trial_proxy import PackTrial, TrialProxies
from ftray.search.trial_runner import run_trial
from ftray.search.trial_worker import SearchContext, release, release_until_none_is_left
from ftray.search.warm_start import earlier_trials
from ftray.storage.location import Location
from ftray.task_spec import TaskSpec


class TimeBudget(tune.Stopper):
    """Ends the search so many seconds after trials could train: the time that a cluster takes to grow doesn't count.

    It waits for a first result: without one, all that time would have been for nothing.
    """

    def __init__(self, seconds: float, capacity: Capacity, has_result: bool):
        self.seconds, self.capacity, self.has_result = seconds, capacity, has_result

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial ends by itself."""
        self.has_result = self.has_result or result.get("validated") != 0
        return False

    def stop_all(self) -> bool:
        """Whether the time is over."""
        since = self.capacity.since
        return self.has_result and since is not None and time.monotonic() - since > self.seconds


class TrialEnd(tune.Callback):
    """Frees the workers of a trial soon after it was stopped, and records why a failed one failed."""

    def __init__(self, sampler: Sampler, packed: bool):
        self.sampler, self.packed = sampler, packed
        self._released = 0.0
        self._gone = ""

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: object) -> None:
        """Called many times a second.

        Raises:
            SearchBroken: as :meth:`refuse_broken`.
        """
        self.refuse_broken()
        if time.monotonic() - self._released > 1:
            release()
            self._released = time.monotonic()

    def refuse_broken(self) -> None:
        """Call this also when all is over: the last trial may have ended because of it.

        Raises:
            SearchBroken: no pack trains any more, the journal can't be written, or the user's metric failed.
        """
        if gone := self._gone or self.sampler.broken:
            raise SearchBroken(gone)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        """Record why the trial failed; if it was because the packs are gone, it stays unfinished in the journal."""
        reason, error = failure_reason(trial), trial_error(trial)
        if isinstance(error, PacksGone):
            self._gone = reason
        elif self.packed and isinstance(error, PROCESS_DIED):
            self._gone = "the process between the trials and the packs has died"
        else:
            self.sampler.fail(trial.trial_id, reason)


Prepared = tuple[SearchContext, list[tune.Callback]]  # what all trials share; who hears of their reports


@contextmanager
def search(
    cfg: Config,
    space: Space,
    output: Location,
    gpus_per_worker: float,
    prepare: Callable[[], Prepared],
    prepared_here: bool = False,
) -> Iterator[tuple[SearchContext, Hardware]]:
    """Run, or resume, the search whose journal is in `output`, until `search.trials` are over; then yield its hardware.

    A pack that has all of the hardware stays for what is run there, until the context ends. Ctrl-C and the time budget
    end the search early: the journal then holds what has been reported so far.

    Args:
        prepare: makes the data.
        prepared_here: it needs none of the packs' hardware: their processes start meanwhile.

    Raises:
        SearchBroken: what trains the trials is gone.
        KeyboardInterrupt: after checkpoints; see :func:`ftray.runtime.preemption.ending_on_sigterm`.
    """
    output = output.resolve()
    experiment, journal = output / EXPERIMENT, output / JOURNAL
    begins, known = not experiment.exists(), past_trials(journal) if journal.exists() else []
    past = [trial for trial in known if trial.state.is_finished() and SEED_OF not in trial.user_attrs]
    over = len(past) >= cfg.search.trials and not runs_left(journal, cfg)
    packed = _in_packs(cfg, space)
    prepared = None if packed and not over and prepared_here else prepare()
    if over and prepared:
        yield prepared[0], Hardware(prepared[0])
        return
    cpus = cpus_of_pack_worker(cfg, gpus_per_worker) if packed else cfg.scaling.cpus_per_worker or 1
    say_if_waiting(cfg.scaling.workers, {"CPU": cpus, "GPU": gpus_per_worker})
    if not packed and prepared:
        context, callbacks = prepared
        trainable = tune.with_parameters(run_trial, context=context, experiment=experiment)
        with notice():
            capacity = Capacity(trials_that_fit(context), time.monotonic())
            try:
                _tune(trainable, capacity, context, space, output, callbacks, past, None)
            except BaseException:  # what goes on releases them where it needs them
                with suppress(Exception):  # the first failure is the one to tell
                    release_until_none_is_left()
                raise
        yield context, Hardware(context)
        return
    with packs(cfg, gpus_per_worker, experiment, cfg.search.trials - len(past)) as group:
        try:
            context, callbacks = prepared or prepare()
        except UserError:
            if begins:  # else the output would hold a search, to be resumed
                experiment.remove()
            raise
        group.begin(context)
        if not context.tokenized.task.load().packed:
            print(f"one base model, one trial a pass: {cfg.task} pads its records", flush=True)
        proxies = TrialProxies(group.broker)
        with trials_without_actors(proxies.answer):
            _tune(PackTrial, group.capacity, context, space, output, [*callbacks, proxies], past, group.broker)
        if pack_suffices(context) and _keeps_pack(group.broker):
            yield context, Hardware(context, group.broker)
            return
    yield context, Hardware(context)


def _keeps_pack(broker: ActorHandle) -> bool:
    """Whether there is a pack to keep; see :meth:`ftray.search.broker.TrialBroker.keep`."""
    try:
        kept: bool = ray.get(broker.keep.remote())
    except PROCESS_DIED:
        return False
    return kept


def is_prepared_here(cfg: Config, sources: Sources) -> bool:
    """Whether this process alone makes the data of `sources`: tasks would wait for what the packs hold."""
    computed = REFERENCE in TaskSpec.named(cfg.task).load().columns
    return not computed and cfg.start.adapter is None and read_here(sources)


def _in_packs(cfg: Config, space: Space) -> bool:
    """Whether trials train in packs; prints the reason where they don't although a user may expect it."""
    packed = trains_in_packs(cfg, space)
    if not packed and cfg.search.pack != "off":
        print("one trainer a trial: ZeRO 3 shards the base model over its workers", flush=True)
    return packed


def _tune(
    trainable: type[tune.Trainable] | Callable[..., object],
    capacity: Capacity,
    context: SearchContext,
    space: Space,
    output: Location,
    callbacks: list[tune.Callback],
    past: list[FrozenTrial],
    broker: ActorHandle | None,
) -> None:
    cfg, budget = context.config, context.budget()
    # Tune would begin the trials one after the other; `capacity` limits their number
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(cfg.search.trials)
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # not every rung validates
    cohorts = restored_cohorts(context, output, capacity, broker is not None)

    def at_once() -> int:
        # outside of a pack, a trial that waits at a rung leaves its workers to another
        return capacity.trials + (cohorts.waiting() if cohorts and broker is None else 0)

    hidden = hidden_size(context.model_path, cfg.model.trust_remote_code)
    steps, first = max(1, round(budget / cfg.training.batch_size)), context.rungs()[0]
    signals = ("paired_loss",) if first.paired else tuple(goal.metric for goal in cfg.search.goals)
    advisor = Advisor(space, cfg, hidden, steps, first.records, earlier_trials(cfg, space), signals)
    sampler = Sampler(space, cfg, budget, output / JOURNAL, at_once, advisor, cohorts)
    goal, *others = cfg.search.goals
    has_result = any(report.get("validated") != 0 for trial in past for report in trial.user_attrs.get("reports", []))
    requests = Requests(sampler, broker, capacity, running_since(output), has_result)
    for shown in callbacks:
        if isinstance(shown, ShowsStates):
            shown.requests = requests
    trial_end = TrialEnd(sampler, broker is not None)
    time_budget = TimeBudget(cfg.search.time_budget or math.inf, capacity, has_result)
    most = cfg.search.concurrency if broker is None else None  # a pack takes no more
    tuner = tune.Tuner(
        # the trial itself only waits: the CPUs and GPUs belong to the training workers
        tune.with_resources(trainable, {"memory": 200 * 2**20 if broker is None else 1}),
        tune_config=tune.TuneConfig(
            search_alg=sampler,
            scheduler=CohortScheduler(cohorts, goal.metric, others, most) if cohorts else scheduler(cfg, budget, past),
            num_samples=-1 if cohorts else cfg.search.trials - len(past),  # -1: the sampler says what is the last one
            trial_dirname_creator=lambda trial: trial_name(trial.config["number"]),
        ),
        run_config=tune.RunConfig(
            name=EXPERIMENT,
            **output.ray_storage(),
            # a trial of a pack fails for reasons of its own: it would fail again
            failure_config=tune.FailureConfig(max_failures=cfg.search.max_failures if broker is None else 0),
            callbacks=[*callbacks, trial_end, requests],
            stop=CombinedStopper(time_budget, requests),  # in this order: the time budget hears of every result
            verbose=0,
        ),
    )
    tuner.fit()
    trial_end.refuse_broken()


def restored_cohorts(context: SearchContext, output: Location, capacity: Capacity, packed: bool) -> Cohorts | None:
    """The cohorts of the search in `output`, with all its trials so far; None: trials are not compared in cohorts."""
    cfg = context.config
    if cfg.search.scheduler != "halving":
        return None
    known = context.rungs()
    beside = 1 + known[0].share  # survivors of a cohort stay in the pack while the next one trains

    def size() -> int:
        if packed and capacity.since is not None:
            fit = capacity.trials if capacity.trials >= cfg.search.trials else max(1, int(capacity.trials / beside))
            return min(cfg.search.cohort or cfg.search.trials, fit)
        return cohort_size(cfg.search)

    cohorts = Cohorts(known, cfg.search.goal.direction, size, cfg.search.trials)
    cohorts.restore(past_trials(output / JOURNAL), cfg.search.goal.metric, cfg.search.goals[1:])
    return cohorts


def scheduler(cfg: Config, budget: int, past: list[FrozenTrial]) -> TrialScheduler:
    """The scheduler that stops weak trials: they are compared at equal numbers of records seen.

    Args:
        budget: records of a trial that nothing stops.
        past: finished trials of a resumed search. ASHA compares with them too; Hyperband begins new brackets.
    """
    goal = cfg.search.goal
    common = {"time_attr": "records", "metric": goal.metric, "mode": goal.direction, "max_t": budget}
    if cfg.search.scheduler == "asha":
        first = rung_records(budget, cfg)[0]
        asha = ASHAScheduler(**common, grace_period=first, reduction_factor=cfg.search.reduction_factor or FACTOR)
        for known in past:
            trial = Trial("past", stub=True, trial_id=f"past-{known.number}")
            asha.on_trial_add(None, trial)
            for report in known.user_attrs.get("reports", []):
                asha.on_trial_result(None, trial, report)
        return asha
    if cfg.search.scheduler == "hyperband":
        return HyperBandScheduler(**common, reduction_factor=cfg.search.reduction_factor or FACTOR)
    return FIFOScheduler()


def trials_that_fit(context: SearchContext) -> int:
    """Number of trials that the cluster, as it is now, can run at once."""
    scaling = context.config.scaling
    workers = workers_that_fit(scaling.cpus_per_worker or 1, context.gpus_per_worker, node_resources())
    return max(1, workers // scaling.workers)
