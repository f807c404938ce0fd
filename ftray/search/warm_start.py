"""The trials of earlier searches, as far as the space of a new one holds them."""

import math
from typing import Any

import yaml
from optuna.trial import FixedTrial, FrozenTrial, create_trial

from ftray.config import Config, config_from
from ftray.errors import UserError
from ftray.search.clones import CLONE
from ftray.search.journal import SEED_OF, past_trials
from ftray.search.results import JOURNAL
from ftray.search.run_manifest import CONFIG
from ftray.search.sampler import whole
from ftray.search.space import Space
from ftray.storage.location import Location, parse_location, reason
from ftray.storage.manifest import refuse_damaged


def earlier_trials(cfg: Config, space: Space) -> list[FrozenTrial]:
    """The trials of the searches named by `search.warm_start` whose configurations the space can draw.

    The value of each is its place in its own search, from 0, the best, to 1: those that trained longer first, then by
    their last value. Losses of different data can't be compared, places can.

    Raises:
        UserError: one of them is no search, can't be read, or has no trial that the space holds.
    """
    return [trial for name in cfg.search.warm_start for trial in _of(name, cfg, space)]


def _of(name: str, cfg: Config, space: Space) -> list[FrozenTrial]:
    output = parse_location(name)
    try:
        there = (output / JOURNAL).exists() and (output / CONFIG).exists()
    except OSError as error:  # of an object store
        raise UserError(f"search.warm_start {name}: can't be read ({reason(error)})") from None
    if not there:
        raise UserError(f"search.warm_start {name}: holds no search; name the --output of one")
    known = _ranked(output)
    found = [_in_space(configuration, place, cfg, space) for configuration, place in known]
    if not any(found):
        raise UserError(
            f"search.warm_start {name}: {space.source} holds none of its {len(known)} trials that gave a result; "
            "name a search over the same methods and ranges"
        )
    return [trial for trial in found if trial]


def _ranked(output: Location) -> list[tuple[dict[str, Any], float]]:
    """The configurations of a search, each with its place."""
    with refuse_damaged(output / CONFIG):
        search = config_from(yaml.safe_load((output / CONFIG).read_text(encoding="utf-8"))).search
    goal = search.goal
    attributes = [trial.user_attrs for trial in past_trials(output / JOURNAL)]
    known = [trial for trial in attributes if trial.get("reports") and SEED_OF not in trial]
    known = [trial for trial in known if CLONE not in trial["config"]]  # what it has reached isn't its settings' alone

    def rank(trial: dict[str, Any]) -> tuple[int, float]:
        last = trial["reports"][-1]  # those that were cut together were compared by the same
        return -last["records"], goal.sign * last.get(goal.metric, last.get("paired_loss", goal.sign * math.inf))

    known.sort(key=rank)
    return [(trial["config"], place / max(1, len(known) - 1)) for place, trial in enumerate(known)]


def _in_space(configuration: dict[str, Any], value: float, cfg: Config, space: Space) -> FrozenTrial | None:
    params = space.locate(whole(cfg, configuration))
    if params is None:
        return None
    drawn = FixedTrial(params)
    space.suggest(drawn)
    return create_trial(values=[value] * len(cfg.search.goals), params=drawn.params, distributions=drawn.distributions)
