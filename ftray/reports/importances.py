"""Which settings mattered, by Optuna's fANOVA over what all trials had reached after equal records."""

from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
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


@dataclass(frozen=True)
class Judged:
    """What was found of all trials over the settings that all have, then of each method over its own.

    Attributes:
        left_out: the settings that differ and could not be judged, with the reason, in words; empty: none.
    """

    groups: list[Importances]
    left_out: str


def importances(search: SearchFiles, common: Common) -> Judged:
    """Judge the settings of a search, those that only some methods have among the trials of each method."""
    known = [trial for number, trial in search.trials.items() if number in common.values and trial.params]
    whole = _importances("all methods", known, common, search.goals[0], LEAST_TRIALS)
    groups, missing = [whole] if whole else [], []
    methods = dict.fromkeys(str(trial.params["method"]) for trial in known if "method" in trial.params)
    for method in methods if len(methods) > 1 else ():
        own = [trial for trial in known if trial.params.get("method") == method]
        found = _importances(method, own, common, search.goals[0], 2 * LEAST_TRIALS)
        if found:
            groups.append(found)
        judged = {*(found.shares if found else ()), *(whole.shares if whole else ())}
        if names := [name for name in _searched(own) if name != "method" and name not in judged]:
            settings = ", ".join(name.replace("_", " ") for name in names)
            missing.append(f"{settings} of {method} ({len(own)} trial{'' if len(own) == 1 else 's'})")
    said = f"Not judged, as it takes {2 * LEAST_TRIALS} trials of a method that differ: " if missing else ""
    return Judged(groups, said + "; ".join(missing) + "." * bool(missing))


def _importances(of: str, trials: Sequence[FrozenTrial], common: Common, goal: Goal, least: int) -> Importances | None:
    """Of the settings in which they differ; None: they are too few, all alike, or differ in one alone."""
    if len(trials) < least:
        return None
    columns = {name: domain for name in _searched(trials) if (domain := _domain(name, trials))}
    rows = [{name.rsplit("/", 1)[-1]: value for name, value in trial.params.items()} for trial in trials]
    varied = sorted(name for name in columns if len({str(row[name]) for row in rows}) > 1)
    if len(varied) < 2:  # the shares of one would be 1, whatever it does
        return None
    study = optuna.create_study(direction=goal.optuna_direction)
    study.add_trials(
        create_trial(
            value=common.values[trial.number],
            params={name: row[name] for name in varied},
            distributions={name: columns[name] for name in varied},
        )
        for trial, row in zip(trials, rows, strict=True)
    )
    try:
        shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0), params=varied)
    except (RuntimeError, ValueError):  # there is no variance to share out
        return None
    return Importances(of, len(trials), shares) if sum(shares.values()) > 0 else None


def _searched(trials: Sequence[FrozenTrial]) -> list[str]:
    """The settings that were searched over, without the method in front: `rank` of `lora/rank`."""
    return [*dict.fromkeys(name.rsplit("/", 1)[-1] for trial in trials for name in trial.params)]


def _domain(name: str, trials: Sequence[FrozenTrial]) -> BaseDistribution | None:
    """Of a setting, one domain that holds those of all methods; None: a trial lacks it, or has another kind."""
    found = [
        [domain for key, domain in trial.distributions.items() if key.rsplit("/", 1)[-1] == name] for trial in trials
    ]
    domains = [own[0] for own in found if len(own) == 1]
    first = domains[0] if len(domains) == len(trials) else None
    if isinstance(first, CategoricalDistribution) and all(isinstance(d, CategoricalDistribution) for d in domains):
        choices = [choice for d in domains for choice in d.choices]  # type: ignore[attr-defined]
        return CategoricalDistribution([*dict.fromkeys(choices)])
    if isinstance(first, FloatDistribution) and all(
        isinstance(d, FloatDistribution) and d.log == first.log for d in domains
    ):
        ends = [(d.low, d.high) for d in domains]  # type: ignore[attr-defined]
        return FloatDistribution(min(low for low, _ in ends), max(high for _, high in ends), log=first.log)
    if isinstance(first, IntDistribution) and all(d == first for d in domains):
        return first
    return None


def importance_figure(found: Judged, common: Common) -> Figure | None:
    """A bar a setting; None: there is nothing to show."""
    if not found.groups:
        return None
    bars, y, width = "", 8.0, float(svg.WIDTH)
    x = Scale(0, 1, 170, width - 52)
    for group in found.groups:
        y += GAP - BAR
        bars += label(f"{group.of}, {group.trials} trials", 8, y, "start", class_="title")
        y += 10
        for name, share in [*group.shares.items()][:MOST]:
            shown = name.replace("_", " ")
            said = f"{shown}: {share:.0%} of what these explain"
            bars += label(shown, x.start - 8, y + 13, "end", class_="key")
            wide = max(1.0, x(share) - x.start)
            bars += element("rect", tip(said), class_="mark bar plain", x=x.start, y=y + 2, width=wide, height=BAR - 8)
            bars += label(f"{share:.0%}", x(share) + 6, y + 13, "start", class_="tick")
            y += BAR
    caption = (
        f"Of the differences in {common.said} that these settings explain, the share of each, by fANOVA (Optuna). "
        "Settings that only some methods have are judged among the trials of those methods. "
    )
    return Figure("importances", "What mattered", caption + found.left_out, svg.svg(bars, width, y + 8, caption))
