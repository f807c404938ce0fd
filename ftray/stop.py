"""End one trial of a search that runs; what it has reached counts."""

import sys

from ftray.arguments import Settings, StrPath, command, config_of
from ftray.cli import run_command
from ftray.config import Config
from ftray.errors import UserError


@command
def stop(
    trial: int | None = None,
    run: StrPath | None = None,
    *,
    scaling: Settings | None = None,
    config: Config | StrPath | Settings | None = None,
    verbose: bool | None = None,
) -> str:
    """End one trial of a search that runs; what it has reached counts. Returns when it stops, in words.

    Args:
        trial: its number.
        run: output directory or URI, or the id of the Ray job that drives the search.

    Raises:
        UserError: no trial is named, or it does not run.
    """
    return _stop(config_of("stop", locals()))


def _stop(cfg: Config) -> str:
    from ftray.reports.status import searched
    from ftray.search.control import ask_to_stop
    from ftray.search.jobs import output_of
    from ftray.search.results import JOURNAL
    from ftray.search.run_manifest import running_since

    number = cfg.request.trial
    if number is None:
        raise UserError("which trial? ftray status shows their numbers")
    output = output_of(cfg)
    pack = searched(output).search.pack
    if running_since(output) is None:
        raise UserError(f"output {output}: no search is running there")
    ask_to_stop(output / JOURNAL, number)
    when = "at its next rung" if pack == "off" else "after its next step, with a report of what it has reached"
    return f"trial {number} stops {when}"


def run(cfg: Config) -> int:
    """The command.

    Raises:
        UserError: no trial is named, or it does not run.
    """
    print(stop(config=cfg))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("stop"))
