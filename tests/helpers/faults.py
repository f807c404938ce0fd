"""A search that can be disturbed, and how it is compared with an undisturbed one."""

import json
import os
import random
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import optuna
import psutil
import pytest

from helpers.searches import command, environment, finished, run, run_here, study

TRIALS, STEPS = 3, 240
FLAGS = ["--trials", str(TRIALS), "--search.scheduler", "none", "--training.evaluations", "4"]
SPACE = "method: {choice: [lora, ia3]}\nlearning_rate: {log: [1.0e-3, 1.0e-2]}\n"
RESUME = "the same command with --resume continues"
MOMENTS = int(os.environ.get("FTRAY_FAULT_MOMENTS", "1"))
SEARCHES = [(seed, min(5, MOMENTS - seed)) for seed in range(0, MOMENTS, 5)]  # and how often each is hit
TABLE = os.environ.get("FTRAY_FAULT_TABLE")
OUTCOMES: dict[str, list[tuple[str, float]]] = defaultdict(list)
HEAD = """# Faults and what becomes of a search

Written by `FTRAY_FAULT_TABLE=docs/faults.md pytest -m 'slow or not slow' tests/test_faults.py`, row by row. Each fault
is real and comes at a random moment (seeded) of a search of three trials, which may be hit again later. Afterwards no
trial is lost or there twice, and none that was finished has been run again. The difference is the largest relative one
of any reported loss from that of an undisturbed search.

| fault | moments | outcome | difference |
| --- | --- | --- | --- |
"""


class Search:
    """A search in a process of its own.

    Attributes:
        text: what it has said, as soon as it is over.
    """

    def __init__(self, output: Path, words: str, model: str, *more: str, address: str | None = None):
        self.output, self.text = output, ""
        self.arguments = command(output, words, model, *FLAGS, *more, space=SPACE, steps=STEPS)
        self.log = output.parent.with_name(f"{output.parent.name}.log")  # beside the disk, where that may be full
        self.environment = environment() | ({"RAY_ADDRESS": address} if address else {})
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(self.arguments, stdout=log, stderr=subprocess.STDOUT, env=self.environment)

    def wait_for(self, condition: Callable[[], object], seconds: float = 600) -> None:
        """Or until it is over."""
        deadline = time.monotonic() + seconds
        while not condition() and self.process.poll() is None:
            if time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"in {seconds} s: {self.log.read_text()}")
            time.sleep(0.05)

    def end(self, seconds: float = 600) -> int:
        """Wait for its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError("hangs: " + self.log.read_text()) from None
        finally:
            self.text = self.log.read_text()

    def lines(self) -> list[str]:
        """What it has said of its end."""
        return [line for line in self.text.splitlines() if line.startswith("ftray tune:")]

    def resume(self, address: str | None = None, here: bool = False) -> subprocess.CompletedProcess:
        """The same command, or, `here`, in this process; what was finished is not touched."""
        before = finished(self.output)
        where = ["--scaling.address", address] if address else []
        again = [*self.arguments, *where, "--resume"]
        done = run_here(again) if here else run(again, timeout=600)
        assert done.returncode == 0, self.text + done.stdout + done.stderr
        untouched(self.output, before)
        return done


def untouched(output: Path, before: dict[str, tuple[str, int]]) -> None:
    """What was `finished` is as it was."""
    after = finished(output)
    assert {path: after.get(path) for path in before} == before


def curves(output: Path) -> dict[int, list[tuple[int, float]]]:
    """Step and value of each report of each trial, by number.

    Every trial is finished, and there once, in the journal and in the summary.
    """
    trials = study(output).get_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * TRIALS
    rows = json.loads((output / "summary.json").read_text())["trials"]
    assert sorted(row["trial"] for row in rows) == list(range(TRIALS))
    assert {row["status"] for row in rows} == {"finished"}
    found = {t.number: [(r["step"], r["validation_loss"]) for r in t.user_attrs["reports"]] for t in trials}
    assert {row["trial"]: row["value"] for row in rows} == {n: min(v for _, v in own) for n, own in found.items()}
    return found


def undisturbed(output: Path, words: str, model: str) -> dict[int, list[tuple[int, float]]]:
    """The `curves` of a search without any fault."""
    search = Search(output, words, model)
    assert search.end() == 0, search.text
    return curves(output)


def record(name: str, what: str, difference: float) -> None:
    """Note what a fault came to; and write it into the table, whose other rows stay, if that is asked for."""
    OUTCOMES[name].append((what, difference))
    if not TABLE:
        return
    rows = {}
    if Path(TABLE).exists():
        rows = {line.split("|")[1].strip(): line for line in Path(TABLE).read_text().splitlines() if line[:1] == "|"}
    for known, seen in OUTCOMES.items():
        counts = ", ".join(f"{what}: {n}" for what, n in Counter(what for what, _ in seen).items())
        rows[known] = f"| {known} | {len(seen)} | {counts} | {max(difference for _, difference in seen):.1g} |"
    lines = [row for known, row in rows.items() if known not in ("fault", "---")]
    Path(TABLE).write_text(HEAD + "\n".join(lines) + "\n")


def compare(output: Path, undisturbed: dict[int, list[tuple[int, float]]], numbers: set[int]) -> float:
    """The largest relative difference of any report of these trials; no trial has more reports, or fewer."""
    got = curves(output)
    assert {n: [s for s, _ in own] for n, own in got.items()} == {n: [s for s, _ in o] for n, o in undisturbed.items()}
    pairs = [(a, b) for n in numbers for (_, a), (_, b) in zip(got[n], undisturbed[n], strict=True)]
    for a, b in pairs:
        assert a == pytest.approx(b, rel=1e-5)
    return max((abs(a - b) / b for a, b in pairs), default=0.0)


def journal(output: Path) -> list[optuna.trial.FrozenTrial]:
    """All trials so far."""
    if not (output / "study.log").exists() or "ftray" not in (output / "study.log").read_text():
        return []
    return study(output).get_trials()


def reports(output: Path) -> int:
    """Rungs that are in the journal; -1: not even a trial is."""
    trials = journal(output)
    return sum(len(trial.user_attrs.get("reports", [])) for trial in trials) if trials else -1


def begun(output: Path) -> set[int]:
    """The trials that have a configuration: a driver that resumes draws the others anew."""
    return {trial.number for trial in journal(output) if "config" in trial.user_attrs}


def victims(titles: str, parent: int) -> list[psutil.Process]:
    """The processes of that search whose title holds one of the names."""
    found = []
    for process in [psutil.Process(parent), *psutil.Process(parent).children(recursive=True)]:
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if any(name in title for name in titles.split("|")):
            found.append(process)
    return found


def moments(draw: random.Random, hits: int) -> list[int]:
    """After how many reports a search is hit."""
    return sorted(draw.randrange(0, TRIALS * 4 - 2) for _ in range(hits))


def raylet(node) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)
