"""Which of a few candidates is better, over records and seeds, and how sure that is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ftray.evaluation.intervals import interval_of
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
        interval, shown, reason: see :class:`ftray.evaluation.intervals.Told`.
    """

    best: int
    other: int
    seeds: list[int]
    difference: float
    interval: list[float] | None
    shown: bool
    reason: str | None = None

    @property
    def is_alike(self) -> bool:
        """Whether enough records were asked, and show none."""
        return not self.shown and (self.interval is not None or self.difference == 0)


@dataclass(frozen=True)
class Choice:
    """The winner, the candidate that was best on average, and its difference from each of the others."""

    winner: int
    best: int
    differences: list[Difference]


def choose(candidates: Sequence[Candidate], metric: str, direction: str, resamples: int) -> Choice:
    """Choose the candidate with the best mean; of those that don't differ from it, the one with fewest parameters.

    Records that are too few to show any difference don't make candidates alike: the best mean wins.

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
    alike = [best, *(c for c, d in zip(others, differences, strict=True) if d.is_alike)]
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
    difference = float(by_seed[:, 0].mean())
    return Difference(
        best.trial, other.trial, seeds, difference, **interval_of(means, difference, records, comparisons)
    )
