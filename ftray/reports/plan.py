"""What a search would come to, before anything is trained: as text, and as an object in Python."""

import io
import json
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING

import yaml
from rich.console import Console
from rich.table import Table

from ftray.config import Config
from ftray.reports.data import describe

if TYPE_CHECKING:
    from ftray.data import TokenizedData
    from ftray.search.estimate import Estimate

OF_A_CALL = {"resume", "plan", "verbose"}  # no settings of a search
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What a search would come to; it prints as `ftray tune --plan` does.

    Attributes:
        config: all settings, with those that follow from records, model and space.
        data: the records as tokens; `splits` has their counts.
        estimate: what would run, and what that needs.
        later: plans of further `stages`, which begin with what this one leaves.
    """

    config: Config
    data: "TokenizedData"
    estimate: "Estimate"
    later: tuple["Plan", ...] = ()

    def __str__(self) -> str:
        shown = Console(file=io.StringIO(), record=True, width=160)
        show_estimate(self.estimate, shown)
        return "\n".join([settings(self.config), describe(self.data), shown.export_text(), *map(str, self.later)])

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def settings(cfg: Config) -> str:
    """All settings of a search, as YAML."""
    text: str = yaml.safe_dump(cfg.model_dump(exclude=OF_A_CALL), sort_keys=False)
    return text


def show_estimate(found: "Estimate", console: Console) -> None:
    """A table of methods, then a line each of trials, tokens, memory and time; the last one is the whole as JSON."""
    table = Table("method", "runs", "largest configuration", "trained parameters", title="methods")
    for name, method in found.methods.items():
        largest = " ".join(f"{k}={v}" for k, v in method.largest.items() if k != "method")
        table.add_row(name, method.runs, largest, f"{method.parameters:,}")
    console.print(table)
    lines = [f"adapted  {name}: {method.adapts or 'no layers of the model'}" for name, method in found.methods.items()]
    rungs = ", ".join(f"{r['trials']:g} to {r['records']} records" for r in found.rungs)
    lines.append(f"trials   {found.trials}, {found.at_once} at once; expected: {rungs}")
    if found.further_runs:
        lines.append(
            f"finals   {found.further_runs} further runs of the finalists, with other seeds, "
            f"to {found.rungs[-1]['records']} records"
        )
    memory = {name: f"{value / GIB:.2f}" for name, value in found.memory.items()}
    probe = found.probe
    lines += [
        f"tokens   {found.tokens['expected']:,} expected, {found.tokens['at_most']:,} if no trial is stopped",
        f"memory   {memory['total']} GiB a worker: base {memory['base']}, "
        f"adapters and optimisers {memory['adapters']}, activations {memory['activations']}",
        f"probe    {probe.trials} trial(s): {probe.step:.2f} s for a step of {probe.tokens} tokens, "
        f"{probe.validation:.2f} s for a validation",
        f"time     {found.seconds / 60:.1f} minutes of training and validation; start, proof and merging are not "
        "included",
        f"plan     {json.dumps(asdict(found))}",
    ]
    console.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False, emoji=False)
