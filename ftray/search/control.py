"""Requests to a running search from another terminal; the search finds them in its journal."""

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from optuna.trial import TrialState
from ray import tune
from ray.actor import ActorHandle
from ray.tune.experiment import Trial

from ftray.config import Config
from ftray.errors import UserError
from ftray.search.clones import CLONE
from ftray.search.journal import ADDED, END, PAUSE, REQUESTS, STOP, fulfil, journal_at, past_trials
from ftray.search.results import JOURNAL
from ftray.search.run_manifest import running_since, trains_in_packs
from ftray.search.sampler import Sampler, whole
from ftray.search.space import Space
from ftray.search.trial_status import IN_TUNE, TrialStatus, live_status
from ftray.storage.location import Location, reason

if TYPE_CHECKING:
    from ftray.search.packs import Capacity


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


def ask_to_pause(output: Location, cfg: Config, space: Space, pause: bool) -> None:
    """Let the search in `output` hold its trials where they are, or train on.

    Raises:
        UserError: no search is running there, or its trials train outside of packs.
    """
    since = _running(output)
    if not trains_in_packs(cfg, space):
        raise UserError("its trials have workers of their own, which can't pause: Ctrl-C ends them, --resume continues")
    journal_at(output / JOURNAL).submit({PAUSE: since if pause else None})


def ask_to_end(output: Location, cfg: Config, space: Space) -> None:
    """Let the search in `output` end now, with what its trials have reached, and prove the best.

    Raises:
        UserError: no search is running there, or there would be nothing to prove.
    """
    since, known = _running(output), past_trials(output / JOURNAL)
    reports = [report for trial in known for report in trial.user_attrs.get("reports", [])]
    if not trains_in_packs(cfg, space) and not any(report.get("validated") != 0 for report in reports):
        raise UserError("no trial has a result yet: its trials have workers of their own, which report at their rungs")
    journal_at(output / JOURNAL).submit({END: since})


def _running(output: Location) -> float:
    """When the driver began that searches in `output`."""
    since = running_since(output)
    if since is None:
        raise UserError(f"output {output}: no search is running there")
    if not past_trials(output / JOURNAL):
        raise UserError("the search has not begun its first trial yet: try again in a moment")
    return since


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


class ShowsStates(tune.Callback):
    """A callback that shows the states of trials.

    Attributes:
        requests: what users ask of the search, once it runs: a trial may be stopping, all may be paused.
    """

    requests: "Requests | None" = None

    def state(self, trial: Trial) -> TrialStatus:
        """The state of a trial, in the words that `ftray status` has too."""
        in_tune, asked = IN_TUNE[trial.status], self.requests
        if asked is None or trial.is_finished():
            return in_tune
        return live_status(in_tune, trial.config["number"] in asked.stopping, asked.paused)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "requests": None}


class Requests(tune.Callback, tune.Stopper):
    """Carries out, in the driver, what other processes ask for.

    Trials that were marked stop at their next report. While the search is paused, packs hold their trials. When it is
    to end, each trial that trains reports what it has reached, and then all stay as they are: a resumed search trains
    them on.

    Args:
        sampler: of the search, with its journal.
        broker: of the packs, which make reports at once; None: they come at the trials' next rungs.
        capacity: of the packs, whose time goes by only while trials train.
        since: when this driver began: requests to another one are not heeded.
        has_result: whether a trial has been validated before.
    """

    def __init__(
        self, sampler: Sampler, broker: ActorHandle | None, capacity: "Capacity", since: float | None, has_result: bool
    ):
        self.sampler, self.broker, self.capacity, self.since = sampler, broker, capacity, since
        self.has_result = has_result
        self.stopping: set[int] = set()
        self.paused = self.ending = self._all_over = False
        self._awaited: set[int] = set()  # trials whose reports the end waits for
        self._reported: set[int] = set()  # those that have reported since it was asked for
        self._heard = self._looked = 0.0

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: object) -> None:
        """Read new requests; Tune calls this many times a second."""
        passed = time.monotonic() - self._heard
        if passed < LISTENS:
            return
        self._heard += passed
        if self.paused and self.capacity.since is not None:
            self.capacity.since += passed
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
        asked = {} if self.since is None else self.sampler.study.user_attrs
        self._end(trials, END in asked and asked[END] == self.since)
        self._pause(PAUSE in asked and asked[PAUSE] == self.since and not self.ending)

    def _pause(self, paused: bool) -> None:
        if paused is not self.paused:
            self.paused = paused
            print("paused: the trials wait where they are" if paused else "the trials train on", flush=True)
            if self.broker is not None:
                self.broker.pause.remote(paused)

    def _end(self, trials: list[Trial], ending: bool) -> None:
        if ending and not self.ending:
            print("ending: each trial reports what it has reached", flush=True)
        self.ending = self.sampler.ending = ending
        if ending and self.broker is not None:
            left = [n for t in trials if t.status == Trial.RUNNING and (n := t.config["number"]) not in self._reported]
            train = ray.get([self.broker.report_early.remote(number) for number in left])
            self._awaited = {number for number, trains in zip(left, train, strict=True) if trains}
        self._all_over = not any(trial.status in (Trial.RUNNING, Trial.PENDING) for trial in trials)

    def _take_up(self, requests: Location) -> None:
        """Write into the journal the requests of other processes, which could not append to it themselves."""
        for file in sorted(requests.glob("*.json"), key=str):
            fulfil(json.loads(file.read_text()), self.sampler.study, self.sampler.storage)
            self.sampler.keep()
            if not self.sampler.broken:
                file.unlink()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether the trial stops after this report."""
        self.has_result = self.has_result or result.get("validated") != 0
        number: int = result["config"]["number"]
        if self.ending:
            self._reported.add(number)
            self._awaited.discard(number)
        return number in self.stopping

    def stop_all(self) -> bool:
        """Whether the search was to end, and all that it has reached is known."""
        return self.ending and not self._awaited and (self.has_result or self._all_over)
