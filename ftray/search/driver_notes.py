"""The driver's own notes of a running search: what it is about, and how long it will take."""

import time
from contextlib import suppress
from typing import TYPE_CHECKING, cast

from ray import tune
from ray.tune.experiment import Trial

from ftray.config import Config
from ftray.search.journal import SEED_OF
from ftray.search.live import (
    DRIVER,
    EVERY_STORED,
    LIVE,
    SEARCHING,
    Beat,
    DriverNote,
    interval,
    last_beats,
    note,
    read_json,
)
from ftray.search.run_manifest import running_since
from ftray.search.time_left import TimeLeft, Workload
from ftray.search.trial_status import IN_TUNE, TrialStatus
from ftray.storage.location import Location

if TYPE_CHECKING:
    from ftray.search.results import TrialRow


class DriverNotes(tune.Callback):
    """Notes, in the driver, what the search is about and how long it will train.

    Args:
        budget: records of a trial that nothing stops.
        past: all rows of the journal, if the search is resumed.

    Attributes:
        seconds_left: of training; None: it can't be told yet.
    """

    def __init__(self, cfg: Config, output: Location, budget: int, past: list["TrialRow"]):
        self.output, self.budget, self.seconds_left = output, budget, cast("float | None", None)
        self._workload, self._time = Workload(cfg, budget), TimeLeft()
        self._every, self._looked = interval(output), -EVERY_STORED
        over = [row for row in past if row["status"] is not TrialStatus.UNFINISHED]
        self._before = [sum((row["seed_of"] is None) is own for row in over) for own in (True, False)]
        self._past = {row["trial"]: row["records"] for row in past}

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: object) -> None:
        """Look, if it is time to; Tune calls this many times a second."""
        if time.monotonic() - self._looked < self._every:
            return
        self._looked = time.monotonic()
        with suppress(OSError):  # of an object store: the search does without
            self._note(trials, last_beats(self.output))

    def _note(self, trials: list[Trial], beats: list[Beat]) -> None:
        seen = {name: trial["records"] for beat in beats for name, trial in beat["trials"].items()}
        at = {trial.config["number"]: (trial.last_result or {}).get("records", 0) for trial in trials}
        at = {k: max(records, seen.get(str(k), 0), self._past.get(k, 0)) for k, records in at.items()}
        own, further = ([t for t in trials if (SEED_OF not in t.config) is kind] for kind in (True, False))
        left = self._workload.left(
            self._before[0] + len(own),
            {t.config["number"]: at[t.config["number"]] for t in own if not t.is_finished()},
            self._before[1] + len(further),
            [at[t.config["number"]] for t in further if not t.is_finished()],
        )
        whole = sum((self._past | at).values())
        trains = not beats or any(beat["tokens_per_second"] for beat in beats)  # else it is paused
        self.seconds_left = self._time.look(time.monotonic(), whole, left, trains)
        states = {trial.config["number"]: IN_TUNE[trial.status] for trial in trials if not trial.is_finished()}
        note(self.output, SEARCHING, whole, left, self.seconds_left, states)


def driver_note(output: Location) -> DriverNote | None:
    """What the driver that holds the output is about; None: there is none, or it has yet to begin."""
    since = running_since(output)
    noted = read_json(output / LIVE / DRIVER) if since is not None else None
    return cast("DriverNote", noted) if noted and since is not None and noted["at"] >= since else None


def is_searching(output: Location) -> bool:
    """Whether a driver trains there: what an earlier one has left as a summary is not the last word."""
    noted = driver_note(output)
    return noted is not None and noted["phase"] == SEARCHING
