"""Which of a few candidates is better, over records and seeds, and how sure that is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ftray.evaluation.metrics import Scores, resampled


@dataclass(frozen=True)
class Candidate:
    """A configuration, trained with several seeds.

    Attributes:
        trial: number that names it.
        parameters: trained ones.
        scores: by seed, on the same records as those of the other candidates.
    """

    trial: int
    parameters: int
    scores: Mapping[int, Scores]


@dataclass(frozen=True)
class Difference:
    """The mean difference of a metric between two candidates, `other - best`.

    Attributes:
        seeds: over which it is the mean.
        interval: it lies there with the chance that was asked for.
    """

    best: int
    other: int
    seeds: list[int]
    difference: float
    interval: tuple[float, float]

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out 0."""
        return not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True)
class Choice:
    """The winner, the candidate that was best on average, and its difference from each of the others."""

    winner: int
    best: int
    differences: list[Difference]


def choose(candidates: Sequence[Candidate], metric: str, direction: str, resamples: int) -> Choice:
    """Choose the candidate with the best mean; of those that don't differ from it, the one with fewest parameters.

    The intervals hold together with a chance of 95 %: each is widened for the number of comparisons (Bonferroni; O. J.
    Dunn, Multiple comparisons among means, 1961).

    Args:
        candidates: two or more; any two have a seed in common.
        metric: of :meth:`ftray.evaluation.metrics.Scores.all_metrics`.
        direction: `min` or `max`.
    """
    sign, first = 1 if direction == "min" else -1, candidates[0]
    means = {c.trial: sign * paired_difference(first, c, metric, 1).difference for c in candidates}
    best = min(candidates, key=lambda c: means[c.trial])
    others = [c for c in candidates if c is not best]
    differences = [paired_difference(best, other, metric, resamples, len(others)) for other in others]
    alike = [best, *(c for c, d in zip(others, differences, strict=True) if not d.shown)]
    winner = min(alike, key=lambda c: (c.parameters, means[c.trial]))
    return Choice(winner.trial, best.trial, differences)


def paired_difference(
    best: Candidate, other: Candidate, metric: str, resamples: int, comparisons: int = 1
) -> Difference:
    """The difference `other - best` over the records and the seeds that both have.

    Both are resampled, records and seeds each on their own, as both are crossed: every seed is scored on every record
    (A. B. Owen, The pigeonhole bootstrap, https://arxiv.org/abs/0712.1111; the interval errs on the wide side).

    Args:
        comparisons: that are to hold together with a chance of 95 %.
    """
    seeds = sorted(best.scores.keys() & other.scores.keys())
    records = len(best.scores[seeds[0]].loss)
    draws = np.vstack([np.ones((1, records), int), resampled(records, resamples)])
    by_seed = np.array(
        [
            other.scores[seed].all_metrics()[metric](draws) - best.scores[seed].all_metrics()[metric](draws)
            for seed in seeds
        ]
    )  # [seeds, 1 + resamples], the first over all records as they are
    drawn = np.random.default_rng(1).integers(len(seeds), size=(len(seeds), resamples))
    means = np.take_along_axis(by_seed[:, 1:], drawn, axis=0).mean(axis=0)
    tail = 2.5 / comparisons
    low, high = np.percentile(means, [tail, 100 - tail])
    return Difference(best.trial, other.trial, seeds, float(by_seed[:, 0].mean()), (float(low), float(high)))
