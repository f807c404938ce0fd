"""Halving by cohorts as a scheduler of Ray Tune: a trial waits at a rung, paused, until its whole cohort is there."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from ftray.config import Goal
from ftray.search.cohorts import Cohorts, further
from ftray.training.train_state import tie_breaker

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController


CONTINUE, PAUSE, STOP = "CONTINUE", "PAUSE", "STOP"  # as TrialScheduler has them


class CohortScheduler(FIFOScheduler):
    """Pauses trials at the rungs of their cohort, ends those that are cut and lets the others train on.

    Args:
        cohorts: who is compared with whom; a trial's number is in its configuration.
        metric: of the first goal.
        others: further goals, by which they are cut as well.
        most: trials that may train at once; None: as many as have room.
    """

    def __init__(self, cohorts: Cohorts, metric: str, others: Sequence[Goal] = (), most: int | None = None):
        super().__init__()
        self.most = most
        self.cohorts, self._metric, self._others = cohorts, metric, others
        self._trials: dict[int, Trial] = {}
        self._train_on: set[int] = set()  # of those that are paused

    def on_trial_add(self, tune_controller: "TuneController", trial: Trial) -> None:
        """Called when Tune has a new trial."""
        self._trials[trial.config["number"]] = trial

    def on_trial_result(self, tune_controller: "TuneController", trial: Trial, result: dict[str, Any]) -> str:
        """Called for each report of a running trial."""
        number = trial.config["number"]
        self._train_on.discard(number)
        value, paired, others = result.get(self._metric), result.get("paired_loss"), further(result, self._others)
        if not self.cohorts.report(number, result["records"], value, paired, others, tie_breaker(result)):
            return STOP if self.cohorts.lost(number) else CONTINUE
        survivors, losers = self._cut(number)
        self._end(tune_controller, losers - {number})
        self._train_on |= survivors - {number}
        if number in losers:
            return STOP
        return CONTINUE if number in survivors else PAUSE

    def _cut(self, number: int) -> tuple[set[int], set[int]]:
        """Numbers of the trials that train on, and of those that end, now that a trial has arrived or ended."""
        cohort = self.cohorts.cohort_of(number)
        cut = None if cohort is None else self.cohorts.cut(cohort)
        if cut is None:
            return set(), set()
        signal = "the training loss of the same batches" if cut.rung.paired else f"{self._metric} of the same records"
        alive = len(cut.survivors) + len(cut.losers)
        print(
            f"cohort {cut.cohort} after {cut.rung.records} records: {len(cut.survivors)} of {alive} train on, "
            f"by {signal}",
            flush=True,
        )
        return set(cut.survivors), set(cut.losers)

    def _end(self, tune_controller: "TuneController", numbers: set[int]) -> None:
        for number in sorted(numbers & self._trials.keys()):
            trial = self._trials[number]
            if trial.status == Trial.PAUSED or trial.is_saving:
                tune_controller.stop_trial(trial)

    def _ended(self, tune_controller: "TuneController", trial: Trial) -> None:
        number = trial.config["number"]
        self.cohorts.end(number)
        if not self.cohorts.lost(number):  # the others may have waited for this one alone
            survivors, losers = self._cut(number)
            self._end(tune_controller, losers)
            self._train_on |= survivors

    def on_trial_complete(self, tune_controller: "TuneController", trial: Trial, result: dict[str, Any]) -> None:
        """Called for a running trial that has ended, by itself or by hand."""
        self._ended(tune_controller, trial)

    def on_trial_error(self, tune_controller: "TuneController", trial: Trial) -> None:
        """Called for a trial that has failed."""
        self._ended(tune_controller, trial)

    def on_trial_remove(self, tune_controller: "TuneController", trial: Trial) -> None:
        """Called for a trial that has ended while it was paused or had not begun."""
        self._ended(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: "TuneController") -> Trial | None:
        """The next trial to start: of those that train on, else the first that has not begun."""
        if self.most and sum(trial.status == Trial.RUNNING for trial in self._trials.values()) >= self.most:
            return None
        # a trial that is about to be paused still runs, as Tune sees it, until Tune has saved it
        resumed = (self._trials[number] for number in sorted(self._train_on))
        paused = next((trial for trial in resumed if trial.status == Trial.PAUSED), None)
        return paused or next((trial for trial in self._trials.values() if trial.status == Trial.PENDING), None)
