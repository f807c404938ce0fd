"""Which settings mattered, by Optuna's fANOVA over what all trials had reached after equal records."""

from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, create_trial

from ftray.config import Goal
from ftray.reports import svg
from ftray.reports.figures import Common, Figure
from ftray.reports.run_files import SearchFiles
from ftray.reports.svg import Scale, element, label, tip

LEAST_TRIALS = 4  # of fewer, nothing is said of all methods; of one method, twice as many are asked for
MOST = 8  # settings shown of each group
BAR, GAP = 22, 34


@dataclass(frozen=True)
class Importances:
    """Shares of the variance between trials, by setting, the greatest first; they sum to 1.

    Attributes:
        of: which trials.
        trials: how many.
    """

    of: str
    trials: int
    shares: dict[str, float]


def importances(search: SearchFiles, common: Common) -> list[Importances]:
    """Of all trials over the settings that all have, then of each method over its own."""
    known = [trial for number, trial in search.trials.items() if number in common.values and trial.params]
    found = [_importances("all methods", known, common, search.goals[0], LEAST_TRIALS)]
    methods = dict.fromkeys(trial.params["method"] for trial in known if "method" in trial.params)
    for method in methods if len(methods) > 1 else ():
        own = [trial for trial in known if trial.params.get("method") == method]
        found.append(_importances(str(method), own, common, search.goals[0], 2 * LEAST_TRIALS))
    return [group for group in found if group]


def _importances(of: str, trials: Sequence[FrozenTrial], common: Common, goal: Goal, least: int) -> Importances | None:
    """Of the settings in which they differ; None: they are too few, or all alike."""
    if len(trials) < least:
        return None
    study = optuna.create_study(direction=goal.optuna_direction)
    study.add_trials(
        create_trial(value=common.values[t.number], params=t.params, distributions=t.distributions) for t in trials
    )
    common_to_all = set.intersection(*(set(trial.params) for trial in trials))
    varied = sorted(name for name in common_to_all if len({str(trial.params[name]) for trial in trials}) > 1)
    try:
        shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0), params=varied)
    except (RuntimeError, ValueError):  # there is no variance to share out
        return None
    return Importances(of, len(trials), shares) if sum(shares.values()) > 0 else None


def importance_figure(groups: Sequence[Importances], common: Common) -> Figure | None:
    """A bar a setting; None: there is nothing to show."""
    if not groups:
        return None
    bars, y, width = "", 8.0, float(svg.WIDTH)
    x = Scale(0, 1, 170, width - 52)
    for group in groups:
        y += GAP - BAR
        bars += label(f"{group.of}, {group.trials} trials", 8, y, "start", class_="title")
        y += 10
        for name, share in [*group.shares.items()][:MOST]:
            said = f"{_setting(name)}: {share:.0%} of the differences"
            bars += label(_setting(name), x.start - 8, y + 13, "end", class_="key")
            wide = max(1.0, x(share) - x.start)
            bars += element("rect", tip(said), class_="mark bar plain", x=x.start, y=y + 2, width=wide, height=BAR - 8)
            bars += label(f"{share:.0%}", x(share) + 6, y + 13, "start", class_="tick")
            y += BAR
    caption = (
        f"How much of the differences in {common.said} each setting explains, by fANOVA (Optuna). Settings that only "
        "some methods have are judged among the trials of those methods."
    )
    return Figure("importances", "What mattered", caption, svg.svg(bars, width, y + 8, caption))


def _setting(name: str) -> str:
    """`lora/rank` as `rank`."""
    return name.rsplit("/", 1)[-1].replace("_", " ")
