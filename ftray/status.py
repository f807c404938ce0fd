"""Show how far a search is: its trials, their rungs, the best so far, tokens a second and the time left."""

import sys
import time
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ftray.arguments import Settings, StrPath, command, config_of
from ftray.cli import run_command
from ftray.config import Config
from ftray.reports.search import console

if TYPE_CHECKING:
    from ftray.reports.status import Search
    from ftray.storage.location import Location

LOOKS = 2.0  # seconds between two looks of `--watch`


@command
def status(
    run: StrPath | None = None,
    *,
    scaling: Settings | None = None,
    config: Config | StrPath | Settings | None = None,
    verbose: bool | None = None,
) -> "Search":
    """How far a search is: its trials, the best so far, the time left.

    Args:
        run: output directory or URI, or the id of the Ray job that drives the search.

    Raises:
        UserError: there is no search.
    """
    cfg = config_of("status", locals())
    from ftray.reports.status import read
    from ftray.search.jobs import output_of

    return read(output_of(cfg))


def run(cfg: Config) -> int:
    """The command; with `--watch`, until the search is over or Ctrl-C.

    Raises:
        UserError: `output` holds no search.
    """
    from ftray.search.jobs import output_of

    search = status(config=cfg)
    if cfg.request.watch:
        search = watch(output_of(cfg), search)
    console().print(table(search))
    print("\n".join([search.summary(), *search.reliability]))
    return 0


def watch(output: "Location", search: "Search") -> "Search":
    """Show a search anew and anew until it is over, in place on a terminal, else its last line; returns its end."""
    from ftray.reports.status import read

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


def table(search: "Search") -> Table:
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
