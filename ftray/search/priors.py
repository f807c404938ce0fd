"""Where the best learning rate of each method is likely to lie for a model, before anything was tried.

A prior is only ever a preference: it shapes the first cohort of a search, a third of which is still drawn from the
whole space, and never leaves anything out.
"""

import math
from typing import Any

from ftray.search.space import Domain

# LoRA's best rate falls with the width of the model, and is some ten times that of full fine-tuning, whatever the rank,
# where alpha is a constant of 32: "LoRA Without Regret", Thinking Machines Lab, 2025,
# https://thinkingmachines.ai/blog/lora/
LORA_RATE, WIDTH, WIDTH_POWER, ALPHA = 5e-4, 2000, 0.4, 32
SHORT_RUN, SHORT_FACTOR = 100, 1.5  # in fewer steps than this, rates are higher by this: same source
LADDER = (0.5, 1.0, 2.0, 4.0)  # multiples of the likeliest rate that are tried
SPREAD = math.log(2.5)  # standard deviation of the rate's logarithm
# the best rate of a method, in multiples of LoRA's
METHOD_FACTORS = {
    "lora": 1.0,
    "oft": 1.0,
    "boft": 5.0,
    "adalora": 10.0,  # https://arxiv.org/abs/2303.10512, appendix D: 5e-4 to 1e-3 where LoRA took 1e-4
    "loha": 10.0,
    "lokr": 20.0,
    "vera": 20.0,  # https://arxiv.org/abs/2310.11454, table 8: some 20 times LoRA's
    "ia3": 40.0,  # https://arxiv.org/abs/2205.05638: 3e-3
    "prefix": 50.0,
}
# LoRA on all linear layers is at least as good as on fewer: https://arxiv.org/abs/2305.14314, figure 2; on those of the
# MLP alone it is as good, on attention alone it is not: https://thinkingmachines.ai/blog/lora/
TARGET_WEIGHTS = {"all-linear": 1.0, "mlp": 1.0, "attention": 0.3}
OTHER_TARGETS = 0.15
OTHER_CHOICE = 0.25  # weight of a choice that is not the one that a user's `prior` names


def likely_rate(adapter: dict[str, Any], hidden: int | None, steps: int) -> float | None:
    """The learning rate at which to look first; None: nothing is known of the method.

    Args:
        adapter: fields of AdapterConfig.
        hidden: size of the model's hidden states; None: unknown, as of a model of usual width.
        steps: optimiser steps of a full budget.
    """
    factor = METHOD_FACTORS.get(adapter["method"])
    if factor is None:
        return None
    rate: float = LORA_RATE * factor * (WIDTH / (hidden or WIDTH)) ** WIDTH_POWER
    if steps < SHORT_RUN:
        rate *= SHORT_FACTOR
    if adapter["method"] == "lora" and "alpha" in adapter:
        rate *= ALPHA / float(adapter["alpha"])  # what counts is the product: the update is scaled by alpha / rank
    return rate


def density(configuration: dict[str, Any], hidden: int | None, steps: int) -> float:
    """How likely a configuration is under the prior, not normalised; 1 at its peak.

    Args:
        configuration: `{"adapter": {...}, "training": {...}}`, see :meth:`ftray.search.space.Space.suggest`.
        hidden, steps: as those of :func:`likely_rate`.
    """
    adapter, rate = configuration["adapter"], configuration["training"].get("learning_rate")
    likely = likely_rate(adapter, hidden, steps)
    weight = TARGET_WEIGHTS.get(str(adapter.get("target_modules")), OTHER_TARGETS) if likely else 1.0
    if likely and rate:
        peak = math.log(likely) + sum(map(math.log, LADDER)) / len(LADDER)
        # a number that YAML takes for a text: 1e-4 has no point
        weight *= math.exp(-0.5 * ((math.log(float(rate)) - peak) / SPREAD) ** 2)
    return weight


def prior_weight(domain: Domain, value: object) -> float:
    """How likely a drawn value is under the `prior` that a user gave its domain; 1 at its peak, and without one.

    Args:
        value: as Optuna stores it.
    """
    if domain.prior is None:
        return 1.0
    if domain.kind == "choice":
        return 1.0 if value == domain.stored(domain.prior) else OTHER_CHOICE
    number, prior, (low, high) = float(str(value)), float(domain.prior), domain.values
    if domain.kind == "log" or domain.log:
        return math.exp(-0.5 * (math.log(number / prior) / SPREAD) ** 2)
    return math.exp(-0.5 * ((number - prior) / max((high - low) / 4, 1e-12)) ** 2)
