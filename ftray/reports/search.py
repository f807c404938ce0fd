"""The output of `ftray tune` after a search: leaderboard, proof, samples and the paths of everything."""

import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ftray.config import Config
from ftray.evaluation.answers import UNDESIRABLE
from ftray.evaluation.intervals import any_interval, said
from ftray.reports.words import SAME, counted
from ftray.storage.location import Location
from ftray.task_spec import TaskSpec

if TYPE_CHECKING:
    from ftray.search.results import TrialRow


def print_leaderboard(rows: list["TrialRow"], cfg: Config) -> None:
    """Print the trials, best first."""
    from ftray.search.goals import front
    from ftray.search.progress import describe

    metric, *further = cfg.search.measured
    several = len(cfg.search.goals) > 1
    title = "leaderboard (* on the front: no other is as good in all and better in one)" if several else "leaderboard"
    table = Table("", "trial", metric, *further, "configuration", "records", "state", title=title)
    on_front = [row["trial"] for row in front(rows, cfg)] if several else []
    for place, row in enumerate(rows, 1):
        value = "" if row["value"] is None else f"{row['value']:.4f}"
        state = row["status"] + (f": {row['reason']}" if row["reason"] else "")
        others = [f"{row['metrics'][name]:.6g}" if name in row["metrics"] else "" for name in further]
        mark = "*" if row["trial"] in on_front else ""
        settings = describe(row["config"])
        table.add_row(f"{place}{mark}", str(row["trial"]), value, *others, settings, str(row["records"]), state)
    console().print(table)


def show(rows: list["TrialRow"], proof: dict[str, Any], cfg: Config, output: Location) -> None:
    """Print leaderboard, proof, samples, the paths of everything and how to serve it."""
    print_leaderboard(rows, cfg)
    console().print(proof_table(proof))
    if proof["lengths"]:
        print(lengths_line(proof["lengths"]))
    for sample in proof["samples"]:
        shown = {k: " ".join(v.split())[:80] for k, v in sample.items()}
        wanted = f"judged bad {shown[UNDESIRABLE]!r}" if UNDESIRABLE in shown else f"target {shown['target']!r}"
        print(f"  {shown['prompt']!r}: {wanted}, base {shown['base']!r}, best {shown['best']!r}")
    print(f"adapter  {output / 'best' / 'adapter'}")
    merged = proof["merged"]
    loss = f", loss {merged['loss']:.4g} without quantisation" if "loss" in merged else ""
    print(f"merged   {output / 'best' / 'merged'}{loss}" if "path" in merged else f"merged   none: {merged['reason']}")
    print(f"trials   {output / 'leaderboard.csv'}\nstudy    optuna-dashboard {output / 'study.log'}")
    task = TaskSpec.named(cfg.task)
    generates = task.name == "CAUSAL_LM"  # served as it is, merged or not
    if generates or "path" in merged:
        use = task.load().usage_example.format(run=output, path=output / "best" / "merged")
        print(f"{'serve' if generates else 'use  '}    {use}")
    print(f"summary  {output / 'summary.json'}", flush=True)


def proof_table(proof: dict[str, Any]) -> Table:
    """Base, default configuration and best on the test records, with the intervals of the differences."""
    is_best = proof.get("default_is_best", False)
    chosen = f", of {proof['candidates']} finalists" if proof["candidates"] > 1 else ""
    intervals = "95 % intervals" if any_interval([proof["metrics"], proof["sources"]]) else "no 95 % intervals"
    title = f"{counted(proof['records'], 'test record')}; {intervals} of what is best{chosen}"
    table = Table("metric", "base", "default", "best", "best - base", "best - default", title=title)

    def added(name: str, base: dict[str, Any], default: dict[str, Any] | None) -> None:
        both = [base, *([default] if default else [])]
        usual = f"{default['base']:.4g}" if default else f"{base['best']:.4g}" if is_best else ""
        gains = [f"{m['difference']:.4g} ({said(m)})" for m in both]
        gains += [SAME] if is_best else []
        table.add_row(name, f"{base['base']:.4g}", usual, f"{base['best']:.4g}", *gains)

    for name, metric in proof["metrics"].items():
        added(name, metric, (proof["over_default"] or {}).get(name))
    for source, own in proof["sources"].items():
        added(f"loss, {own['records']} of {source}", own, None)
    return table


def lengths_line(lengths: dict[str, Any]) -> str:
    """How long the models' answers and the records' are, so that a win by length shows."""
    shown = [f"{name} {own['mean']:.1f} ({said(own, '{:.1f}'.format)})" for name, own in lengths.items()]
    return f"mean tokens of answers, 95 % intervals: {', '.join(shown)}"


def console() -> Console:
    """A console that is wide enough for a table even if the output goes to a file."""
    return Console() if sys.stdout.isatty() else Console(width=160)
