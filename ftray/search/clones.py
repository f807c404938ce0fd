"""Trials that begin with the weights of another: what they need of it is kept as long as the search.

A trial's own checkpoints come and go while it trains on.
"""

import shutil
from typing import Any

from ftray.errors import UserError
from ftray.search.results import EXPERIMENT, newest_whole, trial_name
from ftray.storage.atomic import atomic_dir
from ftray.storage.location import Location, parse_location

CLONE = "clone"  # of a configuration: which weights it begins with
CLONES = "clones"  # directory in the output of a search
ATTEMPTS = 3  # to copy a checkpoint before the search replaces it by a newer one


def keep_weights(output: Location, number: int) -> dict[str, Any]:
    """Copy the newest checkpoint of a trial of the search in `output`.

    Returns:
        `trial`, the name of its `checkpoint`, and `start`, the copy's directory in `output`.

    Raises:
        UserError: it has none yet.
    """
    for attempt in range(ATTEMPTS):
        newest = newest_whole(output / EXPERIMENT / trial_name(number))
        if newest is None:
            break
        name = newest.rstrip("/").rpartition("/")[2]
        start = f"{CLONES}/{trial_name(number)}-{name}"
        try:
            if not (output / start).exists():
                (output / CLONES).mkdir(parents=True, exist_ok=True)
                with parse_location(newest).as_local_dir() as whole, atomic_dir(output / start) as made:
                    shutil.copytree(whole, made, dirs_exist_ok=True)
        except OSError:  # a newer one has taken its place
            if attempt == ATTEMPTS - 1:
                raise
            continue
        return {"trial": number, "checkpoint": name, "start": start}
    raise UserError(f"trial {number}: it has no checkpoint yet: the first comes with its first report")


def start_of(configuration: dict[str, Any], experiment: Location) -> str | None:
    """Where the weights lie with which a trial begins; None: it begins anew."""
    clone = configuration.get(CLONE)
    return str(experiment.parent / clone["start"]) if clone else None
