"""Show how far a search is: its trials, their rungs, the best so far, tokens a second and the time left."""

import sys

from rich.table import Table

from ftray.cli import run_command
from ftray.config import Config
from ftray.reports.search import console
from ftray.reports.status import read


def run(cfg: Config) -> int:
    """The command.

    Raises:
        UserError: `output` holds no search.
    """
    from ftray.runtime.cluster import quiet

    quiet()
    from ftray.search.jobs import output_of

    search = read(output_of(cfg))
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
