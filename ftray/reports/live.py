"""What the live page shows of a run, made of the run's files: on any machine that sees them, whoever wrote them."""

import hashlib
import math
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftray.errors import UserError
from ftray.storage.location import Location

if TYPE_CHECKING:
    from ftray.config import Config
    from ftray.reports.status import Search, TrialProgress

STATE_AGE, REPORT_AGE = 1.0, 8.0  # seconds that what was read counts as new, at least
PATIENCE = 5  # times as long as reading took
SECTION = re.compile(r'<section id="([\w-]+)">.*?</section>', re.DOTALL)


class LiveRun:
    """An output that is looked on; several who do cost as much as one."""

    def __init__(self, output: Location):
        self.output = output
        self._lock = threading.RLock()
        self._shown: dict[str, Any] = {}
        self._reported: dict[str, Any] = {}
        self._report_of: tuple[object, object] = (None, None)  # phase and version
        self._next_state = self._next_report = 0.0

    def state(self) -> dict[str, Any]:
        """All that changes from one second to the next, as plain data; `kind` None: there is nothing to look on."""
        with self._lock:
            started = time.monotonic()
            if started >= self._next_state:
                self._shown = self._state()
                now = time.monotonic()
                self._next_state = now + max(STATE_AGE, PATIENCE * (now - started))
            return self._shown

    def report(self) -> dict[str, Any]:
        """The sections of the report, as HTML by their ids, and its `headline`."""
        with self._lock:
            state, started = self.state(), time.monotonic()
            of = state.get("phase"), state.get("version")
            if of[0] != self._report_of[0] or (of != self._report_of and started >= self._next_report):
                self._reported, self._report_of = self._report(), of
                now = time.monotonic()
                self._next_report = now + PATIENCE * (now - started)
            return self._reported

    def _state(self) -> dict[str, Any]:
        from ftray.reports.status import read, searched
        from ftray.search.run_manifest import SPACE, running_since

        whole = {"name": Path(self.output.absolute().path).name, "output": str(self.output), "at": time.time()}
        try:
            if (self.output / "training.json").exists() and not (self.output / SPACE).exists():
                return whole | {"kind": "training run", "phase": "over", "summary": "", "trials": []}
            cfg = searched(self.output)
        except (UserError, OSError) as error:
            return whole | {"kind": None, "problem": str(error)}
        try:
            return whole | search_state(read(self.output), cfg, self._summary(), self.output)
        except UserError as error:  # it has not come to its first trial
            runs = running_since(self.output) is not None
            phase = "prepares" if runs else "has no driver"
            return whole | {"kind": "search", "phase": phase, "summary": str(error), "trials": [], "runs": runs}

    def _summary(self) -> dict[str, Any]:
        from ftray.reports.run_files import SUMMARY
        from ftray.search.live import read_json

        return read_json(self.output / SUMMARY) or {}

    def _report(self) -> dict[str, Any]:
        from ftray.reports.contents import contents
        from ftray.reports.page import rendered
        from ftray.reports.run_files import read_run

        found = contents(read_run(self.output))
        page = rendered(found, "sections.html").replace('id="leaderboard"', 'id="report-leaderboard"')
        sections = {match[1]: match[0] for match in SECTION.finditer(page)}
        return {"headline": found.headline, "sections": sections}

    def trial(self, number: int) -> dict[str, Any]:
        """What a trial has answered so far, as HTML, newest first; `html` empty: nothing."""
        from ftray.evaluation.answers import UNDESIRABLE
        from ftray.reports.page import rendered
        from ftray.reports.samples import differences, shown
        from ftray.search.live import sampled

        kept = sampled(self.output, number)
        if kept is None:
            return {"trial": number, "html": ""}
        asked = []
        for place, record in enumerate(kept["asked"]):
            answers: list[dict[str, Any]] = []
            before = ""
            for own in kept["answers"]:
                text = shown(own["texts"][place])
                _, marked = differences(before, text) if answers else ([], [(text, False)])
                right = bool(record["target"]) and own["texts"][place].strip() == record["target"].strip()
                answers.append({"records": own["records"], "marked": marked, "right": right})
                before = text
            texts = {name: shown(record.get(name, "")) for name in ("prompt", "target", UNDESIRABLE)}
            asked.append({**texts, "answers": answers[::-1]})
        return {"trial": number, "html": rendered(asked, "trial.html")}


def search_state(search: "Search", cfg: "Config", summary: Mapping[str, Any], output: Location) -> dict[str, Any]:
    """A search as the page shows it.

    Args:
        summary: what it has left at its end; empty: it has not come to one.
    """
    from ftray.search.live import LIVE
    from ftray.search.time_left import said

    runs = search.running_since is not None
    winner = None if runs or not summary.get("best") else summary["best"]["trial"]
    value = next((row["value"] for row in search.trials if row["trial"] == winner), None)
    best = search.best if value is None else (value, winner)
    answered = {file.path.rpartition("-")[2].removesuffix(".json") for file in (output / LIVE).glob("trial-*.json")}
    over = sum(t["ended"] is not None for t in search.trials if t["seed_of"] is None)
    whole = search.total > 0 and over >= search.total
    phase = search.phase if runs else "over" if summary.get("proof") else "has no driver"
    order = search.ranked
    chosen = None if runs else (summary.get("finalists") or {}).get("winner")
    if chosen is not None:  # it leads the report's leaderboard too
        order.sort(key=lambda row: chosen not in (row["trial"], row["seed_of"]))
    places = iter(range(1, len(order) + 1))
    trials = [_row(row, answered, next(places) if row["seed_of"] is None else None) for row in order]
    marks = [phase, *([row["trial"], row["state"], row["rung"]] for row in search.trials)]
    beats = int(time.time() / REPORT_AGE) if runs and search.speed else 0  # its curves grow
    return {
        "kind": "search",
        "phase": phase,
        "runs": runs,
        "summary": search.summary(),
        "metric": search.metric,
        "further": list(search.further),
        "over": over,
        "total": search.total,
        "rungs": search.rungs,
        "budget": search.budget,
        "progress": search.progress if runs else 1.0 if whole else None,
        "seconds_left": search.seconds_left,
        "left_said": None if search.seconds_left is None else said(search.seconds_left).removesuffix(" left"),
        "tokens_per_second": search.speed if runs else None,
        "memory": search.memory,
        "best": {"value": best[0], "trial": best[1]} if best else None,
        "trials": trials,
        "pausable": cfg.search.pack != "off" and cfg.training.zero_stage != 3,
        "version": hashlib.sha256(repr((marks, beats)).encode()).hexdigest()[:16],
    }


def _row(row: "TrialProgress", answered: set[str], place: int | None) -> dict[str, Any]:
    """A trial; `place` in the leaderboard, None: a further run of a finalist, which has none of its own."""
    kept = ("trial", "configuration", "rung", "records", "value", "metrics", "reason", "seed_of", "tokens_per_second")
    finite = {key: value for key, value in row["metrics"].items() if math.isfinite(value)}
    value = row["value"]
    return {
        **{key: value for key, value in row.items() if key in kept},
        "place": place,
        "value": value if value is not None and math.isfinite(value) else None,
        "metrics": finite,
        "state": str(row["state"]),
        "runs": row["state"].runs,
        "can_stop": row["state"].can_stop,
        "config": {section: row["config"][section] for section in ("adapter", "training")},
        "answered": str(row["trial"]) in answered,
    }
