"""The output of `ftray tune` after a search: leaderboard, proof, samples and the paths of everything."""

import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ftray.config import Config
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
    table = Table("metric", "base", "best", "difference", "95 % interval", title=f"{proof['records']} test records")
    for name, m in proof["metrics"].items():
        low, high = m["interval"]
        numbers = [f"{v:.4g}" for v in (m["base"], m["best"], m["difference"])]
        table.add_row(name, *numbers, f"{low:.4g} to {high:.4g}")
    for source, own in proof["sources"].items():
        low, high = own["interval"]
        numbers = [f"{own[key]:.4g}" for key in ("base", "best", "difference")]
        table.add_row(f"loss, {own['records']} of {source}", *numbers, f"{low:.4g} to {high:.4g}")
    console().print(table)
    for sample in proof["samples"]:
        shown = {k: " ".join(v.split())[:80] for k, v in sample.items()}
        print(f"  {shown['prompt']!r}: target {shown['target']!r}, base {shown['base']!r}, best {shown['best']!r}")
    print(f"adapter  {output / 'best' / 'adapter'}")
    merged = proof["merged"]
    loss = f", loss {merged['loss']:.4g} without quantisation" if "loss" in merged else ""
    print(f"merged   {output / 'best' / 'merged'}{loss}" if "path" in merged else f"merged   none: {merged['reason']}")
    print(f"trials   {output / 'leaderboard.csv'}\nstudy    optuna-dashboard {output / 'study.log'}")
    generates = cfg.task == "CAUSAL_LM"  # served as it is, merged or not
    if generates or "path" in merged:
        use = TaskSpec(cfg.task).load().usage_example.format(run=output, path=output / "best" / "merged")
        print(f"{'serve' if generates else 'use  '}    {use}")
    print(f"summary  {output / 'summary.json'}", flush=True)


def console() -> Console:
    """A console that is wide enough for a table even if the output goes to a file."""
    return Console() if sys.stdout.isatty() else Console(width=160)
