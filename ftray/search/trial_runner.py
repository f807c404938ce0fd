"""A trial that has workers of its own, as a Tune trainable: one `TorchTrainer`, whose reports reach Tune."""

import json
from typing import Any

from ray import tune
from ray.train import Checkpoint, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from ftray.search.clones import start_of
from ftray.search.failures import PacksGone, TrialFailed, training_failure
from ftray.search.results import checkpoints, trial_name, write_json
from ftray.search.run_manifest import is_full
from ftray.search.trial_worker import CUT_OFF, MENDABLE, SearchContext, trainer
from ftray.storage.location import Location


def run_trial(config: dict[str, Any], context: SearchContext, experiment: Location) -> None:
    """Train one trial; Tune calls this in a process of the trial.

    The outcome is written to a file before it is reported to Tune: after a driver that died in between, the next one
    reads it from there.

    Raises:
        TrialFailed: the trial gives no result; the message is the reason.
        PacksGone: the disk is full, or the user's metric failed; the trial is unfinished.
    """
    directory = experiment / trial_name(config["number"])
    outcome_file = directory / "outcome.json"
    if outcome_file.exists():
        outcome = json.loads(outcome_file.read_text())
        for report in outcome["reports"]:
            tune.report(report)
    else:
        outcome = _train(config, context, experiment)
        write_json(outcome, outcome_file)
    if outcome["failure"]:
        raise TrialFailed(outcome["failure"])


def _train(config: dict[str, Any], context: SearchContext, experiment: Location) -> dict[str, Any]:
    """Train until the trial is over; returns what :func:`ftray.search.trial_worker.train_worker` does."""
    name = trial_name(config["number"])
    directory = experiment / name
    run = context.run(config["adapter"], config["training"], start_of(config, experiment) or context.start or None)
    if not checkpoints(directory):  # none, or its list was cut off by a kill: Ray Train would fail on that
        directory.remove()
    directory.mkdir(parents=True, exist_ok=True)
    outcome: dict[str, Any] = {CUT_OFF: True}
    error: TrainingFailedError | None = None
    while outcome[CUT_OFF]:
        outcome, error = _fit(trainer(context, run, name, experiment, [ReportToTune()]))
    if outcome["failure"] and (outcome.get(MENDABLE) or is_full(experiment, error)):
        raise PacksGone(outcome["failure"])
    return outcome


def _fit(trainer: TorchTrainer) -> tuple[dict[str, Any], TrainingFailedError | None]:
    """The outcome of a trainer, and the error that ended it, if any."""
    try:
        return trainer.fit().return_value, None
    except TrainingFailedError as error:
        return {"failure": training_failure(error), "reports": [], CUT_OFF: False}, error


class ReportToTune(TuneReportCallback):
    """Reports to Tune what the workers report."""

    def after_report(self, run_context: object, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Called for each report; one that only brings a checkpoint from between two rungs is left out."""
        if CUT_OFF not in metrics[0]:
            super().after_report(run_context, metrics, checkpoint)
