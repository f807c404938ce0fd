"""End one trial of a search that runs, or, with `--prove`, the search: what was reached counts."""

import sys

from ftray.arguments import Settings, StrPath, command, config_of
from ftray.cli import run_command
from ftray.config import Config
from ftray.errors import UserError

NO_TRIAL = "which trial? ftray status shows their numbers; --prove ends the whole search"


@command
def stop(
    trial: int | None = None,
    run: StrPath | None = None,
    *,
    prove: bool | None = None,
    scaling: Settings | None = None,
    config: Config | StrPath | Settings | None = None,
    verbose: bool | None = None,
) -> str:
    """End one trial of a search that runs, or the search; what was reached counts. Returns when it stops, in words.

    Args:
        trial: its number.
        run: output directory or URI, or the id of the Ray job that drives the search.
        prove: in place of a trial: end the search now, and prove the best of what it has reached.

    Raises:
        UserError: no trial is named, or it does not run; with `--prove`, there would be nothing to prove.
    """
    return _stop(config_of("stop", locals()))


def _stop(cfg: Config) -> str:
    from ftray.reports.status import searched
    from ftray.search.control import ask_to_end, ask_to_stop
    from ftray.search.jobs import output_of
    from ftray.search.results import JOURNAL
    from ftray.search.run_manifest import SPACE, running_since
    from ftray.search.space import load_space

    number = cfg.request.trial
    if (number is None) is not cfg.request.prove:
        raise UserError("a trial, or --prove? --prove ends the whole search" if cfg.request.prove else NO_TRIAL)
    output = output_of(cfg)
    of = searched(output)
    if number is None:
        ask_to_end(output, of, load_space(str(output / SPACE)))
        return "the search ends, as soon as its trials have reported what they have reached, and proves the best of it"
    if running_since(output) is None:
        raise UserError(f"output {output}: no search is running there")
    ask_to_stop(output / JOURNAL, number)
    when = (
        "at its next rung" if of.search.pack == "off" else "after its next step, with a report of what it has reached"
    )
    return f"trial {number} stops {when}"


def run(cfg: Config) -> int:
    """The command.

    Raises:
        UserError: no trial is named, or it does not run; with `--prove`, there would be nothing to prove.
    """
    print(stop(config=cfg))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("stop"))
