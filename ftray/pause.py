"""Let a search that runs hold its trials where they are, or train on: what they take in memory stays taken."""

import sys

from ftray.cli import run_command
from ftray.config import Config


def run(cfg: Config) -> int:
    """The command.

    Raises:
        UserError: no search is running there, or its trials have workers of their own.
    """
    from ftray.runtime.cluster import quiet

    quiet()
    from ftray.reports.status import searched
    from ftray.search.control import ask_to_pause
    from ftray.search.jobs import output_of
    from ftray.search.run_manifest import SPACE
    from ftray.search.space import load_space

    output = output_of(cfg)
    ask_to_pause(output, searched(output), load_space(str(output / SPACE)), pause=not cfg.request.off)
    print(
        "the search trains on"
        if cfg.request.off
        else f"the search pauses after its next step: ftray pause --run {output} --off lets it train on"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command("pause"))
