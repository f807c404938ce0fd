"""What a user asks of a search that runs, from another terminal: its journal is where the two meet."""

import json
import time
import uuid
from typing import Any

import optuna
from optuna.trial import TrialState
from ray import tune
from ray.tune.experiment import Trial

from ftray.config import Config
from ftray.errors import UserError
from ftray.search.sampler import STUDY, Sampler, open_journal, past_trials, stored_id, whole
from ftray.search.space import Space
from ftray.storage.location import Location, Stored, reason

STOP, ADDED = "stop", "added"  # user attributes of a trial
ASKED = "requests"  # where an object store is: nobody but the driver writes its journal
LISTENS, LOOKS = 1.0, 5.0  # seconds between two looks at the journal, at an object store


def ask_to_stop(journal: Location, number: int) -> None:
    """Mark a trial for its driver to stop.

    Raises:
        UserError: there is no such trial, or it doesn't run.
    """
    found = [trial for trial in past_trials(journal) if trial.number == number]
    if not found:
        raise UserError(f"trial {number}: the search has none of that number")
    if found[0].state is not TrialState.RUNNING:
        raise UserError(f"trial {number}: it does not run ({found[0].state.name.lower()})")
    if isinstance(journal, Stored):
        _leave(journal, {STOP: number})
    else:
        storage = open_journal(journal)
        storage.set_trial_user_attr(stored_id(storage, number), STOP, True)


def ask_to_add(journal: Location, cfg: Config, space: Space, configuration: dict[str, Any]) -> int:
    """Put a configuration at the head of the line; returns its trial's number (in a store: as far as can be seen).

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
    inside = space.locate(whole(cfg, configuration)) or {}
    if isinstance(journal, Stored):
        _leave(journal, {ADDED: configuration, "inside": inside})
        return len(known)
    study = optuna.load_study(study_name=STUDY, storage=open_journal(journal))
    study.enqueue_trial(inside, user_attrs={ADDED: configuration})
    trials = reversed(study.get_trials(deepcopy=False))
    return next(trial.number for trial in trials if trial.user_attrs.get(ADDED) == configuration)


def _leave(journal: Stored, request: dict[str, Any]) -> None:
    (journal.parent / ASKED / f"{time.time():.3f}-{uuid.uuid4().hex}.json").write_text(json.dumps(request))


class Requests(tune.Callback, tune.Stopper):
    """The driver's ear: stops the trials that were marked, at their next report.

    Args:
        broker: of the packs, which make that report at once; None: it comes at the trial's next rung.
    """

    def __init__(self, sampler: Sampler, broker: Any | None):
        self.sampler, self.broker = sampler, broker
        self.stopping: set[int] = set()
        self._heard = self._looked = 0.0

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Tune goes through this many times a second."""
        if time.monotonic() - self._heard < LISTENS:
            return
        self._heard = time.monotonic()
        if isinstance(self.sampler.journal, Stored) and self._heard - self._looked > LOOKS:
            self._looked = self._heard
            try:
                self._take_up(self.sampler.journal.parent / ASKED)
            except OSError as error:
                self.sampler.broken = f"{self.sampler.journal.parent} can't be reached: {reason(error)}"
        running = self.sampler.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        requested = {trial.number for trial in running if trial.user_attrs.get(STOP)}
        for number in requested - self.stopping:
            if self.broker is not None:
                self.broker.report_early.remote(number)
        self.stopping = requested

    def _take_up(self, asked: Stored) -> None:
        """Write into the journal what others left in the store."""
        study, storage = self.sampler.study, self.sampler.storage
        for file in sorted(asked.glob("*.json"), key=str):
            request = json.loads(file.read_text())
            known = study.get_trials(deepcopy=False)
            if ADDED in request and request[ADDED] not in [trial.user_attrs.get(ADDED) for trial in known]:
                study.enqueue_trial(request["inside"], user_attrs={ADDED: request[ADDED]})
            for trial in known:
                if trial.number == request.get(STOP) and trial.state is TrialState.RUNNING:
                    storage.set_trial_user_attr(stored_id(storage, trial.number), STOP, True)
            self.sampler.keep()
            if not self.sampler.broken:
                file.unlink()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether the trial stops after this report."""
        return result["config"]["number"] in self.stopping

    def stop_all(self) -> bool:
        """Never: a request ends single trials."""
        return False
