"""Write the report of a search, a training run or an evaluation that is over, or of a search that runs."""

import sys
from typing import TYPE_CHECKING

from ftray.arguments import Settings, StrPath, command, config_of
from ftray.cli import run_command
from ftray.config import Config
from ftray.reports.page import write_report

if TYPE_CHECKING:
    from ftray.reports.plots import Page


@command
def report(
    run: StrPath | None = None,
    *,
    png: bool | None = None,
    scaling: Settings | None = None,
    config: Config | StrPath | Settings | None = None,
    verbose: bool | None = None,
) -> "Page":
    """Write `report.html` of a search, a training run or an evaluation.

    Args:
        run: output directory or URI, the file of an evaluation, or the id of the Ray job that drives a search.
        png: whether the figures go to `figures/` too.

    Raises:
        UserError: there is nothing to report, or resvg, which `png` needs, is not installed.
    """
    cfg = config_of("report", locals())
    from ftray.reports.plots import Page
    from ftray.search.jobs import output_of

    return Page(write_report(output_of(cfg), cfg.scaling.price_per_hour, cfg.png))


def run(cfg: Config) -> int:
    """The command: leaves `report.html` in the output, and with `--png` its figures in `figures/`.

    `tune`, `train` and `evaluate` write the report themselves; this writes it again, also for what an earlier version
    has left. The file of an evaluation, as `scores.json`, gets `scores.html` beside it.

    Raises:
        UserError: there is nothing to report, or resvg, which `--png` needs, is not installed.
    """
    print(f"report   {report(config=cfg)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("report"))
