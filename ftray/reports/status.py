"""The progress of a search, read from its output: trials, rungs, the best so far, the time left."""

import json
import time
from dataclasses import dataclass

from ftray.config import Config, config_from
from ftray.data.shards import Split
from ftray.errors import UserError
from ftray.search.goals import Judged, front
from ftray.search.trial_status import TrialStatus, journal_status
from ftray.storage.location import Location, reason
from ftray.storage.manifest import refuse_damaged
from ftray.training.train_state import Report, best_report, metric_value


class TrialProgress(Judged):
    """One trial of a search.

    Attributes:
        trial: its number.
        configuration: on one line.
        rung: number of rungs that it has reached.
        records: seen at its last report.
        value: the best of its reports; None: it made none.
        metrics, validated: as those of a :class:`~ftray.search.results.TrialRow`.
        tokens_per_second: its speed; None: it does not run.
        reason: why it failed; None: it did not.
        ended: seconds since 1970; None: it has not.
        seed_of: of a further run of a finalist, with another seed, the finalist's number; else None.
    """

    trial: int
    configuration: str
    state: TrialStatus
    rung: int
    records: int
    value: float | None
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

    def summary(self) -> str:
        """One line: how many trials are over, the best, the speed, and the time left or how to resume."""
        over = [t for t in self.trials if t["ended"] and t["seed_of"] is None]
        parts = [f"{len(over)}/{self.total} trials over"]
        if further := [t for t in self.trials if t["seed_of"] is not None]:
            parts.append(f"{sum(t['ended'] is not None for t in further)}/{len(further)} further runs of finalists")
        values = [
            (t["value"], t["trial"])
            for t in self.trials
            if t["value"] is not None and t["state"] is not TrialStatus.FAILED and t["seed_of"] is None
        ]
        if values:
            value, number = min(values) if self.direction == "min" else max(values)
            parts.append(f"best {self.metric} {value:.4f} (trial {number})")
        if self.front:
            parts.append(f"on the front: {', '.join(map(str, self.front))}")
        if self.running_since is None:
            return ", ".join([*parts, "not running" + ("" if len(over) >= self.total else ": --resume continues it")])
        parts.append(f"{sum(t['tokens_per_second'] or 0 for t in self.trials):.0f} tokens/s")
        here = sum((t["ended"] or 0.0) > self.running_since for t in over)
        if here and len(over) < self.total:
            left = (time.time() - self.running_since) / here * (self.total - len(over))
            parts.append(f"about {left / 60:.0f} min left")
        return ", ".join(parts)


def read(output: Location) -> Search:
    """Read the state of a search from its output directory.

    Raises:
        UserError: there is no search, or it has not come to its first trial.
    """
    from ftray.search.journal import ADDED, SEED_OF, STOP, past_trials
    from ftray.search.progress import describe
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
    since = running_since(output)
    rows: list[TrialProgress] = []
    for trial in past_trials(output / JOURNAL):
        attributes = trial.user_attrs
        configuration = attributes.get("config") or attributes.get(ADDED)
        if not configuration:  # its driver died before it could begin
            continue
        reports: list[Report] = attributes.get("reports", [])
        best = best_report(reports, metric, cfg.search.goal.direction)
        state = journal_status(trial, since is not None, bool(attributes.get(STOP)))
        runs = state in (TrialStatus.RUNNING, TrialStatus.STOPPING)
        rows.append(
            {
                "trial": trial.number,
                "configuration": describe(configuration),
                "state": state,
                "rung": len(reports),
                "records": reports[-1]["records"] if reports else 0,
                "value": metric_value(best, metric) if best else None,
                "metrics": {k: metric_value(best, k) for k in cfg.search.measured if k in best} if best else {},
                "validated": best.get("validated") if best else None,
                "tokens_per_second": reports[-1]["tokens_per_second"] if reports and runs else None,
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
    return Search(metric, goal.direction, cfg.search.trials, rungs, whole, since, rows, cuts, further, on_front)


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
