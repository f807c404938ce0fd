"""How long a search will still train: what is left of it in records, at the rate at which it has trained so far."""

import math
from collections.abc import Mapping

from ftray.config import Config
from ftray.search.cohorts import BASELINE_TRIAL
from ftray.search.rungs import LEAST_FINALISTS, Rung, rungs

LEAST_SECONDS = 5.0  # of training, before a rate can be told
SETTLING = 30.0  # seconds, at least, over which a new estimate takes the place of the old one


class Workload:
    """Records that a search is still to train on, on average over what its cuts may decide.

    Args:
        budget: records of a trial that nothing stops.
    """

    def __init__(self, cfg: Config, budget: int):
        self.trials, self.budget, self.rungs = cfg.search.trials, budget, rungs(budget, cfg)
        halving = cfg.search.scheduler == "halving" and len(self.rungs) > 1
        self.further = min(LEAST_FINALISTS, self.trials) * cfg.search.further_seeds if halving else 0

    def left(self, begun: int, running: Mapping[int, int], further_begun: int, further_running: list[int]) -> float:
        """Records to come.

        Args:
            begun: number of trials that have begun, or are over.
            running: records seen by those that are not over, by number.
            further_begun, further_running: the same of further runs of finalists.
        """
        to_begin = max(0, self.trials - begun) * expected(self.rungs, 0)
        known = sum(self.budget - n if k == BASELINE_TRIAL else expected(self.rungs, n) for k, n in running.items())
        further = max(0, self.further - further_begun) * self.budget + sum(self.budget - n for n in further_running)
        return to_begin + known + further


def expected(rungs: list[Rung], seen: int) -> float:
    """Records that a trial which has seen so many is still to see: at each rung, a share of trials trains on."""
    left, chance, before = 0.0, 1.0, seen
    share = 1.0  # of the trials that began, that trained up to this rung
    for rung in rungs:
        if rung.records >= seen:
            left += chance * (rung.records - before)
            chance *= rung.share / share
            before = rung.records
        share = rung.share or 1.0
    return left


class TimeLeft:
    """Seconds left, which fall as the clock goes: a new estimate is taken over little by little."""

    def __init__(self) -> None:
        self._begun: tuple[float, float] | None = None  # when training began, and the records seen before
        self._looked = 0.0
        self._told: float | None = None  # at the last look

    def look(self, now: float, seen: float, left: float, trains: bool = True) -> float | None:
        """Seconds left; None: nothing can be told yet.

        Args:
            now: by a clock that goes on, in seconds.
            seen: records by all trials so far.
            left: records to come.
            trains: whether trials train at all; while they don't, no time goes by.
        """
        passed, self._looked = now - self._looked, now
        if self._begun is None or seen <= self._begun[1]:  # it loads its models first
            self._begun = now, seen
        since, before = self._begun
        if not trains:
            self._begun = since + passed, before
            return self._told
        if now - since < LEAST_SECONDS:
            return self._told
        estimate = left * (now - since) / (seen - before)
        if self._told is not None:
            told = max(0.0, self._told - passed)
            weight = 1 - math.exp(-passed / max(SETTLING, told / 4))
            estimate = told + weight * (estimate - told)
        self._told = estimate
        return estimate


def said(seconds: float) -> str:
    """As a person says it: about how long."""
    if seconds < 90:
        return f"about {max(1, round(seconds / 10)) * 10} s left"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} min left"
    return f"about {seconds / 3600:.1f} h left"
