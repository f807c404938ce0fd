"""Let a search that runs hold its trials where they are, or train on: what they take in memory stays taken."""

import sys

from ftray.arguments import Settings, StrPath, command, config_of
from ftray.cli import run_command
from ftray.config import Config


@command
def pause(
    run: StrPath | None = None,
    *,
    off: bool | None = None,
    scaling: Settings | None = None,
    config: Config | StrPath | Settings | None = None,
    verbose: bool | None = None,
) -> str:
    """Let a search that runs hold its trials where they are, or train on. Returns what it does, in words.

    Args:
        run: output directory or URI, or the id of the Ray job that drives the search.
        off: let it train on.

    Raises:
        UserError: no search is running there, or its trials have workers of their own.
    """
    return _pause(config_of("pause", locals()))


def _pause(cfg: Config) -> str:
    from ftray.reports.status import searched
    from ftray.search.control import ask_to_pause
    from ftray.search.jobs import output_of
    from ftray.search.run_manifest import SPACE
    from ftray.search.space import load_space

    output = output_of(cfg)
    ask_to_pause(output, searched(output), load_space(str(output / SPACE)), pause=not cfg.request.off)
    if cfg.request.off:
        return "the search trains on"
    return f"the search pauses after its next step: ftray pause --run {output} --off lets it train on"


def run(cfg: Config) -> int:
    """The command.

    Raises:
        UserError: no search is running there, or its trials have workers of their own.
    """
    print(pause(config=cfg))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("pause"))
