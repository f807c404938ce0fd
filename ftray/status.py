"""Show how far a search is: its trials, their rungs, the best so far, tokens a second and the time left."""

import sys
import time
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ftray.cli import run_command
from ftray.config import Config
from ftray.reports.search import console
from ftray.reports.status import Search, read

if TYPE_CHECKING:
    from ftray.storage.location import Location

LOOKS = 2.0  # seconds between two looks of `--watch`


def run(cfg: Config) -> int:
    """The command; with `--watch`, until the search is over or Ctrl-C.

    Raises:
        UserError: `output` holds no search.
    """
    from ftray.runtime.cluster import quiet

    quiet()
    from ftray.search.jobs import output_of

    output = output_of(cfg)
    search = read(output)
    if cfg.request.watch:
        search = watch(output, search)
    console().print(table(search))
    print("\n".join([search.summary(), *search.reliability]))
    return 0


def watch(output: "Location", search: Search) -> Search:
    """Show a search anew and anew until it is over, in place on a terminal, else its last line; returns its end."""
    shown = console()
    with Live(console=shown, auto_refresh=False, transient=True) as live:
        while search.running_since is not None:
            if shown.is_terminal:
                live.update(Group(table(search), Text(search.summary())), refresh=True)
            else:
                print(search.summary(), flush=True)
            time.sleep(LOOKS)
            search = read(output)
    return search


def table(search: Search) -> Table:
    """The trials, by number."""
    found = Table("trial", "configuration", "state", "rung", "records", search.metric, *search.further, "tokens/s")
    for row in search.trials:
        value = "" if row["value"] is None else f"{row['value']:.4f}"
        speed = f"{row['tokens_per_second']:.0f}" if row["tokens_per_second"] else ""
        state = row["state"] + (f": {row['reason']}" if row["reason"] else "")
        rung, records = f"{row['rung']}/{search.rungs}", f"{row['records']}/{search.budget}"
        others = [f"{row['metrics'][name]:.6g}" if name in row["metrics"] else "" for name in search.further]
        found.add_row(str(row["trial"]), row["configuration"], state, rung, records, value, *others, speed)
    return found


if __name__ == "__main__":
    sys.exit(run_command("status"))
