"""Show how far a search is: its trials, their rungs, the best so far, tokens a second and the time left."""

import sys
from typing import TYPE_CHECKING

from rich.table import Table

from ftray.arguments import Settings, StrPath, command, config_of
from ftray.cli import run_command
from ftray.config import Config
from ftray.reports.search import console

if TYPE_CHECKING:
    from ftray.reports.status import Search


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
    """The command.

    Raises:
        UserError: `output` holds no search.
    """
    search = status(config=cfg)
    table = Table("trial", "configuration", "state", "rung", "records", search.metric, *search.further, "tokens/s")
    for row in search.trials:
        value = "" if row["value"] is None else f"{row['value']:.4f}"
        speed = f"{row['tokens_per_second']:.0f}" if row["tokens_per_second"] else ""
        state = row["state"] + (f": {row['reason']}" if row["reason"] else "")
        rung, records = f"{row['rung']}/{search.rungs}", f"{row['records']}/{search.budget}"
        others = [f"{row['metrics'][name]:.6g}" if name in row["metrics"] else "" for name in search.further]
        table.add_row(str(row["trial"]), row["configuration"], state, rung, records, value, *others, speed)
    console().print(table)
    print("\n".join([search.summary(), *search.reliability]))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("status"))
