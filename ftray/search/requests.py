"""What a user asks of a search that runs, from another terminal: its journal is where the two meet."""

import time
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray import tune
from ray.tune.experiment import Trial

from ftray.config import Config, UserError
from ftray.search.sampler import STUDY, Sampler, open_journal, past_trials, whole
from ftray.search.space import Space

STOP, ADDED = "stop", "added"  # user attributes of a trial
LISTENS = 1.0  # seconds


def ask_to_stop(journal: Path, number: int) -> None:
    """Mark a trial for its driver to stop.

    Raises:
        UserError: there is no such trial, or it doesn't run.
    """
    found = [trial for trial in past_trials(journal) if trial.number == number]
    if not found:
        raise UserError(f"trial {number}: the search has none of that number")
    if found[0].state is not TrialState.RUNNING:
        raise UserError(f"trial {number}: it does not run ({found[0].state.name.lower()})")
    open_journal(journal).set_trial_user_attr(found[0]._trial_id, STOP, True)


def ask_to_add(journal: Path, cfg: Config, space: Space, configuration: dict[str, Any]) -> FrozenTrial:
    """Put a configuration at the head of the line; returns its trial, which waits.

    Optuna hands out what is enqueued before it draws anew. TPE learns from it if the space holds it.

    Raises:
        UserError: the search has not begun, or has this configuration waiting or tried already.
    """
    known = past_trials(journal)
    if not known:
        raise UserError("the search has not begun its first trial yet: try again in a moment")
    for trial in known:
        tried = trial.user_attrs.get("config") or trial.user_attrs.get(ADDED)
        if tried and whole(cfg, tried) == whole(cfg, configuration):
            raise UserError(f"trial {trial.number} has this configuration already")
    study = optuna.load_study(study_name=STUDY, storage=open_journal(journal))
    inside = space.locate(whole(cfg, configuration))
    study.enqueue_trial(inside or {}, user_attrs={ADDED: configuration})
    return next(t for t in reversed(study.get_trials(deepcopy=False)) if t.user_attrs.get(ADDED) == configuration)


class Requests(tune.Callback, tune.Stopper):
    """The driver's ear: stops the trials that were marked, at their next report.

    Args:
        board: of the packs, which make that report at once; None: it comes at the trial's next rung.
    """

    def __init__(self, sampler: Sampler, board: Any | None):
        self.sampler, self.board = sampler, board
        self.stopping: set[int] = set()
        self._heard = 0.0

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Tune goes through this many times a second."""
        if time.monotonic() - self._heard < LISTENS:
            return
        self._heard = time.monotonic()
        running = self.sampler._ot_study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        asked = {trial.number for trial in running if trial.user_attrs.get(STOP)}
        for number in asked - self.stopping:
            if self.board is not None:
                self.board.hurry.remote(number)
        self.stopping = asked

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether the trial stops after this report."""
        return result["config"]["number"] in self.stopping

    def stop_all(self) -> bool:
        """The search goes on."""
        return False
