"""Suggests the next configuration: at first where each method is likely to work, then by what the trials have shown."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from ftray.config import Config
from ftray.search.priors import LADDER, density, likely_rate, prior_weight
from ftray.search.space import Domain, Space

CANDIDATES = 64  # drawn at random, one of which is taken by its weight
UNIFORM_EVERY = 3  # of the first trials, one in so many is drawn from the whole space: a prior may be wrong


class Advisor:
    """Draws the first trials by a prior; then by seeded, grouped, multivariate TPE (https://arxiv.org/abs/2304.11127).

    TPE sees all trials after the same number of records, finished or not: the ones that were stopped early are no
    worse for that.

    Args:
        space: what to draw from.
        cfg: with the seed, the number of trials, the direction and the metric of the search.
        hidden: size of the model's hidden states; None: unknown.
        steps: of a full budget.
        common: records after which trials are compared.
        earlier: trials of earlier searches, see :func:`ftray.search.warm_start.earlier_trials`.
        signals: of a report, what they are compared by: values of a report; None: those of the search's goals.
    """

    def __init__(
        self,
        space: Space,
        cfg: Config,
        hidden: int | None,
        steps: int,
        common: int,
        earlier: Sequence[FrozenTrial] = (),
        signals: tuple[str, ...] | None = None,
    ):
        self.earlier = list(earlier)
        self.signals = signals or tuple(goal.metric for goal in cfg.search.goals)
        self.space, self.search, self.hidden, self.steps, self.common = space, cfg.search, hidden, steps, common
        self.startup = min(10, max(3, cfg.search.trials // 3))  # trials before TPE has something to go by

    def suggest(self, number: int, known: Sequence[FrozenTrial]) -> dict[str, Any]:
        """Optuna's parameters for trial `number`, given all others; equal for equal arguments."""
        seed = self.search.seed + number
        seen = [trial for trial in map(self._at_common, known) if trial]
        if sum(trial.state is TrialState.COMPLETE for trial in seen) >= self.startup:
            return self._tpe(seed, seen)
        place = number - 1  # trial 0 is the default configuration
        if place % UNIFORM_EVERY == UNIFORM_EVERY - 1:
            return self._draw(optuna.create_study(sampler=RandomSampler(seed)))[0]
        if self.earlier:  # their values are no losses of these data: they count until there are some
            return self._tpe(seed, [*self.earlier, *(trial for trial in seen if trial.values is None)])
        return self._prior(seed, place - place // UNIFORM_EVERY)

    def _at_common(self, trial: FrozenTrial) -> FrozenTrial | None:
        """A trial as it was after the common number of records; one that has not come so far is still running.

        None: it has failed, lies outside the space, or there is nothing by which it compares.
        """
        if not trial.params or trial.state in (TrialState.WAITING, TrialState.FAIL):
            return None
        reports = trial.user_attrs.get("reports", [])
        reached = next((report for report in reports if report["records"] >= self.common), None)
        if reached and not all(signal in reached for signal in self.signals):
            return None
        values = [reached[signal] for signal in self.signals] if reached else None
        state = TrialState.RUNNING if values is None else TrialState.COMPLETE
        return create_trial(state=state, values=values, params=trial.params, distributions=trial.distributions)

    def _tpe(self, seed: int, seen: list[FrozenTrial]) -> dict[str, Any]:
        sampler = TPESampler(
            seed=seed,
            multivariate=True,
            group=True,
            constant_liar=True,  # trials run side by side: those still running must not be suggested again
            n_startup_trials=0,
            warn_independent_sampling=False,
        )
        directions = [goal.optuna_direction for goal in self.search.goals]
        study = optuna.create_study(sampler=sampler, directions=directions)
        study.add_trials(seen)
        return self._draw(study)[0]

    def _draw(self, study: optuna.Study) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters and configuration of one draw."""
        trial = study.ask()
        configuration = self.space.suggest(trial)
        return trial.params, configuration

    def _prior(self, seed: int, place: int) -> dict[str, Any]:
        """One of many random draws by its weight; the first ones take the rungs of the ladder of learning rates."""
        rng, study = np.random.default_rng(seed), optuna.create_study(sampler=RandomSampler(seed))
        drawn = [self._draw(study) for _ in range(CANDIDATES)]
        weights = np.array([self._weight(*draw) for draw in drawn])
        even = np.full(CANDIDATES, 1 / CANDIDATES)
        params, configuration = drawn[rng.choice(CANDIDATES, p=weights / weights.sum() if weights.sum() else even)]
        rate, domain = self._rate(configuration["adapter"]["method"])
        likely = likely_rate(configuration["adapter"], self.hidden, self.steps)
        if place < len(LADDER) and rate in params and domain.kind != "choice" and domain.prior is None and likely:
            low, high = domain.values
            params[rate] = min(max(likely * LADDER[place], low), high)
        return params

    def _rate(self, method: str) -> tuple[str, Any]:
        """Optuna's name of a method's learning rate, and its domain or constant."""
        return next(
            ((name, s) for name, s in self.space.settings(method).items() if name.split("/")[-1] == "learning_rate"),
            ("", None),
        )

    def _weight(self, params: dict[str, Any], configuration: dict[str, Any]) -> float:
        method = configuration["adapter"]["method"]
        domains = {name: s for name, s in self.space.settings(method).items() if isinstance(s, Domain)}
        own = math.prod(prior_weight(domain, params[name]) for name, domain in domains.items() if name in params)
        _, rate = self._rate(method)
        if isinstance(rate, Domain) and rate.prior is not None:  # the user knows better
            training = {k: v for k, v in configuration["training"].items() if k != "learning_rate"}
            configuration = configuration | {"training": training}
        return own * density(configuration, self.hidden, self.steps)
