"""The progress of a search, read from its output: trials, rungs, the best so far, the time left."""

import json
import time
from dataclasses import dataclass, replace
from typing import Any

from ftray.config import Config, Goal, config_from
from ftray.data.shards import Split
from ftray.errors import UserError
from ftray.search.goals import Ranked, front, place
from ftray.search.live import ENDING, OVER, PAUSED, SEARCHING, Beat, DriverNote, fresh_beats
from ftray.search.progress import describe, summary, time_told
from ftray.search.trial_status import TrialStatus, journal_status, live_status
from ftray.storage.location import Location, reason
from ftray.storage.manifest import refuse_damaged
from ftray.training.train_state import Report, best_report, metric_value, tie_breaker

PREPARING = "prepares"  # what a search is about before its driver notes it


class TrialProgress(Ranked):
    """One trial of a search.

    Attributes:
        trial: its number.
        configuration: on one line.
        config: the same, `adapter` and `training`.
        rung: number of rungs that it has reached.
        records: seen at its last report.
        value: the best of its reports; None: it made none.
        metrics, validated, tie_breaker: as those of a :class:`~ftray.search.results.TrialRow`.
        tokens_per_second: its speed; None: it does not run.
        reason: why it failed; None: it did not.
        ended: seconds since 1970; None: it has not.
        seed_of: of a further run of a finalist, with another seed, the finalist's number; else None.
    """

    configuration: str
    config: dict[str, Any]
    state: TrialStatus
    rung: int
    records: int
    tokens_per_second: float | None
    ended: float | None
    seed_of: int | None


@dataclass(frozen=True)
class Search:
    """A search as its output directory shows it.

    Attributes:
        total: trials that it will have.
        budget: records of a trial that nothing stops.
        running_since: seconds since 1970; None: no driver runs it.
        trials: by number.
        reliability: of a search that is over, a line for each cut: what it was worth.
        further: what the search measures beside `metric`.
        front: of several goals, numbers of the trials that no other beats in all; else none.
        phase: what its driver is about; empty: no driver runs it.
        beats: of the packs that train now.
        progress: share of all records that it will train on; None: it can't be told.
        seconds_left: of training; None: it can't be told.
    """

    metric: str
    direction: str
    total: int
    rungs: int
    budget: int
    running_since: float | None
    trials: list[TrialProgress]
    reliability: list[str]
    further: tuple[str, ...] = ()
    front: tuple[int, ...] = ()
    phase: str = ""
    beats: tuple[Beat, ...] = ()
    progress: float | None = None
    seconds_left: float | None = None

    def summary(self) -> str:
        """One line: how many trials are over, the best, the speed, and the time left or how to resume."""
        over = [t for t in self.trials if t["ended"] and t["seed_of"] is None]
        further = [t["ended"] is not None for t in self.trials if t["seed_of"] is not None]
        parts = summary(len(over), self.total, further, self.metric, self.best)
        if self.front:
            parts.append(f"on the front: {', '.join(map(str, self.front))}")
        if self.running_since is None:
            return ", ".join([*parts, "not running" + ("" if len(over) >= self.total else ": --resume continues it")])
        told = (
            [self.phase] if self.phase != SEARCHING else [f"{self.speed:.0f} tokens/s", *time_told(self.seconds_left)]
        )
        return ", ".join([*parts, *told])

    @property
    def best(self) -> tuple[float, int] | None:
        """The best value so far, and its trial."""
        first = next((row for row in self.ranked if row["seed_of"] is None), None)
        if first is None or first["value"] is None or first["state"] is TrialStatus.FAILED:
            return None
        return first["value"], first["trial"]

    @property
    def ranked(self) -> list[TrialProgress]:
        """The trials as the leaderboard of the report has them, each followed by its further runs with other seeds."""
        goal = Goal(self.metric, self.direction)
        own = [row for row in self.trials if row["seed_of"] is None]
        own.sort(key=lambda row: place(row, goal, row["state"] is TrialStatus.FAILED))
        again = [row for row in self.trials if row["seed_of"] is not None]
        return [found for row in own for found in (row, *(run for run in again if run["seed_of"] == row["trial"]))]

    @property
    def speed(self) -> float:
        """Tokens a second, by all trials that train: as their packs say, else as they last reported."""
        if self.phase not in (SEARCHING, ENDING):
            return 0.0
        if self.beats:
            return sum(beat["tokens_per_second"] for beat in self.beats)
        return sum(t["tokens_per_second"] or 0 for t in self.trials)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that the first workers of the packs take, by device."""
        found: dict[str, int] = {}
        for beat in self.beats:
            for device, taken in beat["memory"].items():
                found[device] = found.get(device, 0) + taken
        return found


def read(output: Location) -> Search:
    """Read the state of a search from its output directory.

    Raises:
        UserError: there is no search, or it has not come to its first trial.
    """
    from ftray.search.driver_notes import driver_note
    from ftray.search.journal import ADDED, END, PAUSE, SEED_OF, STOP, past_study
    from ftray.search.reliability import described
    from ftray.search.results import JOURNAL
    from ftray.search.run_manifest import DATA, running_since
    from ftray.search.rungs import budget, rung_records

    cfg = searched(output)
    if not (output / DATA).exists() or not (output / JOURNAL).exists():
        raise UserError(f"output {output}: the search has not come to its first trial yet")
    with refuse_damaged(output / DATA):
        whole = budget(cfg, Split.from_json(json.loads((output / DATA).read_text())["train"]).drawn)
    metric = cfg.search.goal.metric
    study, beats, noted = past_study(output / JOURNAL), fresh_beats(output), driver_note(output)
    since = None if noted and noted["phase"] == OVER else running_since(output)
    seen = {int(name): trial["records"] for beat in beats for name, trial in beat["trials"].items()}
    asked = study.user_attrs if study else {}
    ends, paused = (since is not None and asked.get(request) == since for request in (END, PAUSE))
    trains = since is not None and (noted is None or noted["phase"] == SEARCHING)  # and does not prove what it has
    rows: list[TrialProgress] = []
    for trial in study.get_trials(deepcopy=False) if study else []:
        attributes = trial.user_attrs
        configuration = attributes.get("config") or attributes.get(ADDED)
        if not configuration:  # its driver died before it could begin
            continue
        reports: list[Report] = attributes.get("reports", [])
        best = best_report(reports, metric, cfg.search.goal.direction)
        state = journal_status(trial)
        if in_hand := state is TrialStatus.UNFINISHED and trains:
            in_tune = _in_tune(noted, trial.number, bool(reports))
            state = live_status(in_tune, bool(attributes.get(STOP)), paused and not ends)
        rows.append(
            {
                "trial": trial.number,
                "configuration": describe(configuration),
                "config": configuration,
                "state": state,
                "rung": len(reports),
                "records": max(reports[-1]["records"] if reports else 0, seen.get(trial.number, 0) if in_hand else 0),
                "value": metric_value(best, metric) if best else None,
                "metrics": {k: metric_value(best, k) for k in cfg.search.measured if k in best} if best else {},
                "validated": best.get("validated") if best else None,
                "tie_breaker": tie_breaker(best) if best else 0.0,
                "tokens_per_second": reports[-1]["tokens_per_second"] if reports and state.runs else None,
                "reason": attributes.get("reason"),
                "ended": trial.datetime_complete.timestamp() if trial.datetime_complete else None,
                "seed_of": attributes.get(SEED_OF),
            }
        )
    rungs, summary, cuts = len(rung_records(whole, cfg)), output / "summary.json", list[str]()
    if since is None and summary.exists():
        with refuse_damaged(summary):
            cuts = described(json.loads(summary.read_text()).get("rungs", []))
    on_front = tuple(row["trial"] for row in front(rows, cfg)) if len(cfg.search.goals) > 1 else ()
    goal, *_ = cfg.search.goals
    further = cfg.search.measured[1:]
    found = Search(metric, goal.direction, cfg.search.trials, rungs, whole, since, rows, cuts, further, on_front)
    if since is None or study is None:
        return found
    phase = noted["phase"] if noted else PREPARING
    if phase == SEARCHING:
        phase = ENDING if ends else PAUSED if paused else SEARCHING
    return replace(found, phase=phase, beats=tuple(beats), **_told(noted, phase))


def _in_tune(noted: DriverNote | None, number: int, has_report: bool) -> TrialStatus:
    """The state of a trial that the journal holds as running, as its driver has noted it."""
    if noted is None or "states" not in noted:  # an older driver notes none
        return TrialStatus.RUNNING
    begun = TrialStatus.RUNNING if has_report else TrialStatus.WAITING  # it has not been noted yet
    return TrialStatus(noted["states"].get(str(number), begun))


def _told(noted: DriverNote | None, phase: str) -> dict[str, Any]:
    """How far the driver has noted that the search is, `progress` and `seconds_left`."""
    if noted is None or not noted["seen"] + noted["left"]:
        return {}
    share = noted["seen"] / (noted["seen"] + noted["left"])
    left = noted["seconds_left"]
    if left is not None and phase == SEARCHING:
        left = max(0.0, left - (time.time() - noted["at"]))
    return {"progress": share, "seconds_left": left}


def searched(output: Location) -> Config:
    """The configuration of the search in `output`.

    Raises:
        UserError: there is none.
    """
    import yaml

    from ftray.search.run_manifest import CONFIG, SPACE

    try:
        there = (output / CONFIG).exists() and (output / SPACE).exists()
    except OSError as error:  # of an object store
        raise UserError(f"output {output}: can't be read ({reason(error)})") from None
    if not there:
        raise UserError(f"output {output} holds no search: name one by --run")
    with refuse_damaged(output / CONFIG):
        return config_from(yaml.safe_load((output / CONFIG).read_text(encoding="utf-8")))
