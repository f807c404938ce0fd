"""The words for the state of a trial, wherever one is shown or stored."""

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

FULL_BUDGET = 0.95  # a trial that has seen this share of its records is finished: the last batch may be cut short


class TrialStatus(StrEnum):
    """The state of a trial: as Tune's driver sees it while the search runs, or as the journal tells it afterwards."""

    WAITING = "waits"  # it has not begun
    RUNNING = "runs"
    AT_RUNG = "waits at a rung"  # until the others of its cohort are there
    PAUSED = "paused"  # with its search, by a user
    STOPPING = "stopping"  # a user asked for it
    DONE = "done"  # finished or stopped early: Tune doesn't tell them apart
    FINISHED = "finished"
    STOPPED_EARLY = "stopped early"
    FAILED = "failed"
    UNFINISHED = "unfinished"  # whoever trained it is gone; a resumed search continues it

    @property
    def runs(self) -> bool:
        """Whether it trains, as far as is known."""
        return self in (TrialStatus.RUNNING, TrialStatus.STOPPING)

    @property
    def can_stop(self) -> bool:
        """Whether a user can ask for its end."""
        return self in (TrialStatus.RUNNING, TrialStatus.AT_RUNG, TrialStatus.PAUSED)


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
    "PAUSED": TrialStatus.AT_RUNG,
    "TERMINATED": TrialStatus.DONE,
    "ERROR": TrialStatus.FAILED,
}


def journal_status(trial: "FrozenTrial") -> TrialStatus:
    """The state of a trial in the journal of a search that no driver works on."""
    return IN_JOURNAL[trial.state.name]


def live_status(in_tune: TrialStatus, stop_requested: bool, search_paused: bool) -> TrialStatus:
    """The state of a trial that is not over, in a search that a driver works on.

    Args:
        in_tune: as `IN_TUNE` has it.
        stop_requested: whether a user has asked for its end.
        search_paused: whether a user has paused the search.
    """
    if stop_requested:
        return TrialStatus.STOPPING
    return TrialStatus.PAUSED if search_paused and in_tune is TrialStatus.RUNNING else in_tune


def ended_status(records: int, budget: int) -> TrialStatus:
    """The state of a trial that ended without failing, after so many records of its budget."""
    return TrialStatus.FINISHED if records >= FULL_BUDGET * budget else TrialStatus.STOPPED_EARLY
