"""Requests to a running search from another terminal; the search finds them in its journal."""

import json
import time
from dataclasses import dataclass
from typing import Any

from optuna.trial import TrialState
from ray import tune
from ray.actor import ActorHandle
from ray.tune.experiment import Trial

from ftray.config import Config
from ftray.errors import UserError
from ftray.search.clones import CLONE
from ftray.search.journal import ADDED, REQUESTS, STOP, fulfil, journal_at, past_trials
from ftray.search.run_manifest import running_since
from ftray.search.sampler import Sampler, whole
from ftray.search.space import Space
from ftray.storage.location import Location, reason


@dataclass(frozen=True)
class NewTrial:
    """A trial that a user has added to a search.

    Attributes:
        number: of the trial; in an object store the expected one.
        begins: when, in words.
        checkpoint: whose weights it begins with; empty: new ones.
    """

    number: int
    begins: str
    checkpoint: str = ""


LISTENS, LOOKS = 1.0, 5.0  # seconds between two looks at the journal, and at the directory of requests


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
    journal_at(journal).submit({STOP: number})


def ask_to_add(journal: Location, cfg: Config, space: Space, configuration: dict[str, Any]) -> int:
    """Enqueue a configuration to be tried next; returns its trial's number (in an object store: the expected one).

    Optuna returns what is enqueued before it draws anew. TPE learns from it if the space holds it.

    Raises:
        UserError: the search has not begun, or has this configuration waiting or tried already.
    """
    known = past_trials(journal)
    if not known:
        raise UserError("the search has not begun its first trial yet: try again in a moment")
    is_clone = CLONE in configuration  # which may be like another but for its beginning
    for trial in known if not is_clone else ():
        tried = trial.user_attrs.get("config") or trial.user_attrs.get(ADDED)
        if tried and whole(cfg, tried) == whole(cfg, configuration):
            raise UserError(f"trial {trial.number} has this configuration already")
    inside = {} if is_clone else space.locate(whole(cfg, configuration)) or {}
    journal_at(journal).submit({ADDED: configuration, "inside": inside})
    added = (trial.number for trial in past_trials(journal) if trial.user_attrs.get(ADDED) == configuration)
    return next(added, len(known))


def when_it_begins(number: int, cfg: Config, output: Location) -> str:
    """What to tell a user who has added a trial of that number to the search in `output`."""
    if number >= cfg.search.trials:
        more = f"--resume --trials {number + 1}"
        return f"trial {number} waits: all {cfg.search.trials} of the search have begun; {more} continues with it"
    if running_since(output) is None:
        return f"trial {number} is the next to begin when the search continues: --resume"
    return f"trial {number} is the next to begin"


class Requests(tune.Callback, tune.Stopper):
    """Stops, in the driver, the trials that were marked, at their next report.

    Args:
        broker: of the packs, which make that report at once; None: it comes at the trial's next rung.
    """

    def __init__(self, sampler: Sampler, broker: ActorHandle | None):
        self.sampler, self.broker = sampler, broker
        self.stopping: set[int] = set()
        self._heard = self._looked = 0.0

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: object) -> None:
        """Read new requests; Tune calls this many times a second."""
        if time.monotonic() - self._heard < LISTENS:
            return
        self._heard = time.monotonic()
        if self._heard - self._looked > LOOKS:
            self._looked = self._heard
            try:
                self._take_up(self.sampler.journal.parent / REQUESTS)
            except OSError as error:
                self.sampler.broken = f"{self.sampler.journal.parent} can't be reached: {reason(error)}"
        running = self.sampler.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        requested = {trial.number for trial in running if trial.user_attrs.get(STOP)}
        for number in requested - self.stopping:
            if self.broker is not None:
                self.broker.report_early.remote(number)
        self.stopping = requested

    def _take_up(self, requests: Location) -> None:
        """Write into the journal the requests of other processes, which could not append to it themselves."""
        for file in sorted(requests.glob("*.json"), key=str):
            fulfil(json.loads(file.read_text()), self.sampler.study, self.sampler.storage)
            self.sampler.keep()
            if not self.sampler.broken:
                file.unlink()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether the trial stops after this report."""
        return result["config"]["number"] in self.stopping

    def stop_all(self) -> bool:
        """Never: a request ends single trials."""
        return False
