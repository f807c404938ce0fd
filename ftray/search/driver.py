"""The search itself: Ray Tune over Optuna's suggestions, weak trials stopped early, everything resumable."""

import json
import math
import os
import time
from typing import Any

from optuna.trial import FrozenTrial
from ray import tune
from ray.train import TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, HyperBandScheduler, TrialScheduler
from ray.tune.stopper import CombinedStopper

from ftray.config import Config
from ftray.data import TokenizedData
from ftray.runtime.cluster import node_resources, room_for
from ftray.runtime.preemption import notice
from ftray.search.broker import PacksGone, SearchBroken, TrialEndCallback, TrialFailed, TrialProxy
from ftray.search.control import Requests
from ftray.search.journal import past_trials
from ftray.search.pack_worker import Capacity, packs
from ftray.search.progress import failure_reason, training_failure
from ftray.search.results import EXPERIMENT, JOURNAL, checkpoints, trial_name, write_json
from ftray.search.run_manifest import is_full, packable
from ftray.search.rungs import rung_records
from ftray.search.sampler import Sampler
from ftray.search.space import Space
from ftray.search.trial_worker import CUT_OFF, SearchContext, release, trainer
from ftray.storage.location import Location


def run_trial(config: dict[str, Any], job: SearchContext, experiment: Location) -> None:
    """A Tune trial: one `TorchTrainer`, whose reports go on to Tune.

    What it came to is written down before Tune hears of it: a driver that died in between asks again, and is answered
    from there.
    """
    directory = experiment / trial_name(config["number"])
    outcome_file = directory / "outcome.json"
    if outcome_file.exists():
        outcome = json.loads(outcome_file.read_text())
        for report in outcome["reports"]:
            tune.report(report)
    else:
        run = job.run(config["adapter"], config["training"])
        if not checkpoints(directory):  # none, or its list was cut off by a kill: Ray Train would stumble over that
            directory.remove()
        directory.mkdir(parents=True, exist_ok=True)
        outcome = {CUT_OFF: True}
        while outcome[CUT_OFF]:
            outcome = _outcome(trainer(job, run, trial_name(config["number"]), experiment, [Reports()]))
        if outcome["failure"] and is_full(experiment, RuntimeError(outcome["failure"])):
            raise PacksGone(outcome["failure"])
        write_json(outcome, outcome_file)
    if outcome["failure"]:
        raise TrialFailed(outcome["failure"])


def _outcome(trainer: TorchTrainer) -> dict[str, Any]:
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        return {"failure": training_failure(error), "reports": [], CUT_OFF: False}
    return result.return_value


class Reports(TuneReportCallback):
    """Hands the workers' reports on to Tune."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """What only brings a checkpoint is none."""
        if CUT_OFF not in metrics[0]:
            super().after_report(run_context, metrics, checkpoint)


class TimeBudget(tune.Stopper):
    """Ends the search so many seconds after trials could train: a cluster that has to grow first costs none.

    It waits for a first result: without one, all that time would have been for nothing.
    """

    def __init__(self, seconds: float, room: Capacity, has_result: bool):
        self.seconds, self.room, self.has_result = seconds, room, has_result

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial ends by itself."""
        self.has_result = True
        return False

    def stop_all(self) -> bool:
        """Whether the time is over."""
        since = self.room.since
        return self.has_result and since is not None and time.monotonic() - since > self.seconds


class TrialEnd(tune.Callback):
    """Frees the workers of a trial soon after it was stopped, and says why a failed one failed."""

    def __init__(self, sampler: Sampler):
        self.sampler = sampler
        self._released = 0.0
        self._gone = ""

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Tune goes through this many times a second.

        Raises:
            SearchBroken: no pack trains any more, or the journal can't be written.
        """
        if gone := self._gone or self.sampler.broken:
            raise SearchBroken(gone)
        if time.monotonic() - self._released > 1:
            release()
            self._released = time.monotonic()

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """It failed; or the packs did, and it is left as it is in the journal."""
        reason = failure_reason(trial)
        if f"{PacksGone.__name__}: " in reason:
            self._gone = reason.rpartition(": ")[2]
        else:
            self.sampler.fail(trial.trial_id, reason)


def search(job: SearchContext, space: Space, output: Location, callbacks: list[tune.Callback]) -> None:
    """Run, or go on with, the search whose journal lies in `output`, until `search.trials` are over.

    Ctrl-C and the time budget end it early: the journal then holds what has been reported so far.

    Raises:
        SearchBroken: what trains the trials is gone.
        KeyboardInterrupt: after checkpoints; see :func:`ftray.runtime.preemption.ending_on_sigterm`.
    """
    output = output.resolve()
    cfg, experiment, journal = job.config, output / EXPERIMENT, output / JOURNAL
    past = [trial for trial in past_trials(journal) if trial.state.is_finished()]
    if len(past) >= cfg.search.trials:
        return
    shared = packable(cfg, space)
    if not shared and cfg.search.pack != "off":
        print("one trainer a trial: ZeRO 3 shares the base model out over its workers", flush=True)
    if cfg.search.pack == "off" or not shared:
        trainable = tune.with_parameters(run_trial, job=job, experiment=experiment)
        with notice():
            room = Capacity(trials_that_fit(job), time.monotonic())
            _tune(trainable, room, job, space, output, callbacks, past, None)
        return
    if not TokenizedData.load(job.data).task.load().packed:
        print(f"one base model, one trial a pass: {cfg.task} pads its records", flush=True)
    with packs(job, experiment, cfg.search.trials - len(past)) as (broker, room):
        trainable = tune.with_parameters(TrialProxy, broker=broker)
        _tune(trainable, room, job, space, output, [*callbacks, TrialEndCallback(broker)], past, broker)


def _tune(
    trainable: Any,
    room: Capacity,
    job: SearchContext,
    space: Space,
    output: Location,
    callbacks: list[tune.Callback],
    past: list[FrozenTrial],
    broker: Any | None,
) -> None:
    cfg = job.config
    # Tune would start one trial's process after the other; `room` says how many there may be
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(cfg.search.trials)
    sampler = Sampler(space, cfg, job.budget(), output / JOURNAL, lambda: room.trials)
    requests = Requests(sampler, broker)
    has_result = any(trial.user_attrs.get("reports") for trial in past)
    budget = TimeBudget(cfg.search.time_budget or math.inf, room, has_result)
    tuner = tune.Tuner(
        # the trial itself only waits: the CPUs and GPUs belong to the training workers
        tune.with_resources(trainable, {"memory": 200 * 2**20}),
        tune_config=tune.TuneConfig(
            search_alg=sampler,
            scheduler=scheduler(cfg, job.budget(), past),
            num_samples=cfg.search.trials - len(past),
            reuse_actors=cfg.search.pack != "off",
            trial_dirname_creator=lambda trial: trial_name(trial.config["number"]),
        ),
        run_config=tune.RunConfig(
            name=EXPERIMENT,
            **output.ray_storage(),
            failure_config=tune.FailureConfig(max_failures=cfg.search.max_failures),
            callbacks=[*callbacks, TrialEnd(sampler), requests],
            stop=CombinedStopper(budget, requests),  # in this order: the budget hears of every result
            verbose=0,
        ),
    )
    tuner.fit()


def scheduler(cfg: Config, budget: int, past: list[FrozenTrial]) -> TrialScheduler:
    """What stops weak trials: they are compared at equal numbers of records seen.

    ASHA compares with `past` trials too, those of a search that goes on; Hyperband begins new brackets.
    """
    common = {"time_attr": "records", "metric": cfg.search.metric, "mode": cfg.search.direction, "max_t": budget}
    if cfg.search.scheduler == "asha":
        first = rung_records(budget, cfg)[0]
        asha = ASHAScheduler(**common, grace_period=first, reduction_factor=cfg.search.reduction_factor)
        for known in past:
            trial = Trial("past", stub=True, trial_id=f"past-{known.number}")
            asha.on_trial_add(None, trial)
            for report in known.user_attrs.get("reports", []):
                asha.on_trial_result(None, trial, report)
        return asha
    if cfg.search.scheduler == "hyperband":
        return HyperBandScheduler(**common, reduction_factor=cfg.search.reduction_factor)
    return FIFOScheduler()


def trials_that_fit(job: SearchContext) -> int:
    """Trials that the cluster, as it is now, can run at once."""
    scaling = job.config.scaling
    workers = room_for(scaling.cpus_per_worker or 1, job.gpus_per_worker, node_resources())
    return max(1, workers // scaling.workers)
