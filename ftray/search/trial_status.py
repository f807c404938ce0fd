"""The words for the state of a trial, wherever one is shown or stored."""

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

FULL_BUDGET = 0.95  # a trial that has seen this share of its records is finished: the last batch may be cut short


class TrialStatus(StrEnum):
    """The state of a trial: as Tune's driver sees it while the search runs, or as the journal tells it afterwards."""

    WAITING = "waits"
    RUNNING = "runs"
    PAUSED = "paused"
    STOPPING = "stopping"  # a user asked for it
    DONE = "done"  # finished or stopped early: Tune doesn't tell them apart
    FINISHED = "finished"
    STOPPED_EARLY = "stopped early"
    FAILED = "failed"
    UNFINISHED = "unfinished"  # whoever trained it is gone; a resumed search continues it

    @property
    def runs(self) -> bool:
        """Whether it trains, as far as the journal tells."""
        return self in (TrialStatus.RUNNING, TrialStatus.STOPPING)


IN_JOURNAL = {  # by the name of Optuna's `TrialState`
    "WAITING": TrialStatus.WAITING,
    "RUNNING": TrialStatus.UNFINISHED,
    "COMPLETE": TrialStatus.FINISHED,
    "PRUNED": TrialStatus.STOPPED_EARLY,
    "FAIL": TrialStatus.FAILED,
}
IN_TUNE = {  # by the `status` of Tune's trial
    "PENDING": TrialStatus.WAITING,
    "RUNNING": TrialStatus.RUNNING,
    "PAUSED": TrialStatus.PAUSED,
    "TERMINATED": TrialStatus.DONE,
    "ERROR": TrialStatus.FAILED,
}


def journal_status(trial: "FrozenTrial", has_driver: bool = False, stop_requested: bool = False) -> TrialStatus:
    """The state of a trial in the journal.

    Args:
        trial: as Optuna stored it.
        has_driver: whether a driver works on the search, so that a trial that the journal holds as running does run.
        stop_requested: whether a user has asked for its end.
    """
    if trial.state.name == "RUNNING" and has_driver:
        return TrialStatus.STOPPING if stop_requested else TrialStatus.RUNNING
    return IN_JOURNAL[trial.state.name]


def ended_status(records: int, budget: int) -> TrialStatus:
    """The state of a trial that ended without failing, after so many records of its budget."""
    return TrialStatus.FINISHED if records >= FULL_BUDGET * budget else TrialStatus.STOPPED_EARLY
