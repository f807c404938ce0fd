"""Write the report of a search, a training run or an evaluation that is over, or of a search that runs."""

import sys

from ftray.cli import run_command
from ftray.config import Config
from ftray.reports.page import write_report


def run(cfg: Config) -> int:
    """The command: leaves `report.html` in the output, and with `--png` its figures in `figures/`.

    `tune`, `train` and `evaluate` write the report themselves; this writes it again, also for what an earlier version
    has left. The file of an evaluation, as `scores.json`, gets `scores.html` beside it.

    Raises:
        UserError: there is nothing to report, or resvg, which `--png` needs, is not installed.
    """
    from ftray.runtime.cluster import quiet

    quiet()
    from ftray.search.jobs import output_of

    print(f"report   {write_report(output_of(cfg), cfg.scaling.price_per_hour, cfg.png)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("report"))
