"""Synchronous successive halving (https://arxiv.org/abs/1502.07943): cohorts of trials that are cut together.

The trials of a cohort train in step. At each rung, when the whole cohort has reported, the best share of it trains on
where it is and the others end: no trial is promoted because it came first.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from optuna.trial import FrozenTrial

from ftray.config import Goal
from ftray.search.goals import nondominated_ranks
from ftray.search.rungs import LEAST_FINALISTS, Rung
from ftray.training.train_state import tie_breaker

COHORT = "cohort"  # user attribute of a trial in the journal: index of its cohort
BASELINE_TRIAL = 0  # it always gets its full budget, so that a search can be seen to beat it


@dataclass
class CohortTrial:
    """A trial in its cohort.

    Attributes:
        values: what it is compared by at each rung that it has reached: the first goal, or the loss of its training;
            None: it has nothing that compares.
        further: the other goals there, less is better.
        ties: what decides among equal values there, less is better.
        over: whether it has ended, however.
        lost: whether it was cut, and must end.
    """

    values: list[float | None] = field(default_factory=list)
    further: list[tuple[float, ...]] = field(default_factory=list)
    ties: list[float] = field(default_factory=list)
    over: bool = False
    lost: bool = False


@dataclass
class Cut:
    """What follows from a rung that all have reached: numbers of the trials that train on, and of those that end.

    Attributes:
        cohort: index of the cohort.
        rung: where it was cut.
    """

    cohort: int
    rung: Rung
    survivors: list[int]
    losers: list[int]


def further(report: Mapping[str, float], others: Sequence[Goal]) -> tuple[float, ...]:
    """What a report holds of the goals but the first, less is better."""
    return tuple(goal.sign * report[goal.metric] for goal in others)


class Cohorts:
    """Which trials are compared with which, and who trains on. Knows nothing of how trials run.

    Attributes:
        rungs: without the end of the budget.
        cohorts: the trials of each cohort, by number.
    """

    def __init__(self, rungs: list[Rung], direction: str, size: Callable[[], int], total: int):
        """Begin without trials.

        Args:
            rungs: ascending; at the last one, the end of the budget, nobody is cut.
            direction: `min` or `max`.
            size: of a cohort, as it is now: what fits is known only when the first pack has started.
            total: trials of the search; the last cohort may be smaller.
        """
        self.rungs, self.size, self.total = rungs[:-1], size, total
        self.sign = 1 if direction == "min" else -1
        self.cohorts: list[dict[int, CohortTrial]] = []
        self._cut: list[int] = []  # by cohort, rungs that were cut

    def restore(self, past: Iterable[FrozenTrial], metric: str, others: Sequence[Goal] = ()) -> None:
        """Take up the trials of a search that is resumed: its cuts come out as they were.

        `metric` is that of the first goal.
        """
        for trial in sorted(past, key=lambda trial: trial.number):
            if COHORT in trial.user_attrs:
                self.add(trial.number, trial.user_attrs[COHORT])
                for report in trial.user_attrs.get("reports", []):
                    value, paired = report.get(metric), report.get("paired_loss")
                    rest, tie = further(report, others), tie_breaker(report)
                    self.report(trial.number, report["records"], value, paired, rest, tie)
                if trial.state.is_finished():
                    self.end(trial.number)

    def may_begin(self) -> bool:
        """Whether another trial may begin: a new cohort is suggested with what the last one's first rung has told."""
        full = bool(self.cohorts) and len(self.cohorts[-1]) >= self.size()
        return not full or not self.rungs or self._cut[-1] > 0 or all(m.over for m in self.cohorts[-1].values())

    def waiting(self) -> int:
        """Number of trials that wait at a rung."""
        return sum(
            len(member.values) > cut and not member.over and not member.lost
            for members, cut in zip(self.cohorts, self._cut, strict=True)
            for member in members.values()
        )

    def add(self, number: int, cohort: int | None = None) -> int:
        """Add a trial to a cohort, to the newest one if not said otherwise; returns the cohort's index."""
        if cohort is None:
            cohort = len(self.cohorts) - 1
            if not self.cohorts or len(self.cohorts[-1]) >= self.size() or self._cut[-1]:
                cohort += 1
        while len(self.cohorts) <= cohort:
            self.cohorts.append({})
            self._cut.append(0)
        self.cohorts[cohort].setdefault(number, CohortTrial())
        return cohort

    def cohort_of(self, number: int) -> int | None:
        """Index of a trial's cohort."""
        return next((index for index, members in enumerate(self.cohorts) if number in members), None)

    def report(
        self,
        number: int,
        records: int,
        value: float | None,
        paired: float | None = None,
        further: tuple[float, ...] = (),
        tie: float = 0.0,
    ) -> bool:
        """Note what a trial has reached; returns whether it must wait for the others at a rung.

        Args:
            records: seen by it.
            value: the first goal, by a validation; None: there was none.
            paired: the loss of training batches that are the same ones for other trials; None: it doesn't compare.
            further: values of the other goals, less is better.
            tie: what decides among equal values, less is better.
        """
        cohort = self.cohort_of(number)
        if cohort is None:
            return False
        member = self.cohorts[cohort][number]
        reached = sum(records >= rung.records for rung in self.rungs)
        while len(member.values) < reached:
            member.values.append(paired if self.rungs[len(member.values)].paired else value)
            member.further.append(further)
            member.ties.append(tie)
        return not member.lost and len(member.values) > self._cut[cohort]

    def lost(self, number: int) -> bool:
        """Whether a trial was cut."""
        cohort = self.cohort_of(number)
        return cohort is not None and self.cohorts[cohort][number].lost

    def end(self, number: int) -> None:
        """Note that a trial has ended: it holds nobody up any more."""
        if (cohort := self.cohort_of(number)) is not None:
            self.cohorts[cohort][number].over = True

    def cut(self, cohort: int) -> Cut | None:
        """Cut a cohort if all of its trials that are not over wait at its next rung; None: they don't.

        A trial whose training loss doesn't compare with the others' is not cut by it: it trains on to the next rung.
        """
        members, rung = self.cohorts[cohort], self._cut[cohort]
        complete = len(members) >= self.size() or cohort < len(self.cohorts) - 1 or self._known() >= self.total
        if rung == len(self.rungs) or not complete:
            return None
        if any(len(member.values) <= rung and not member.over and not member.lost for member in members.values()):
            return None
        self._cut[cohort] += 1
        arrived = {number: member for number, member in members.items() if len(member.values) > rung}
        points = {
            number: (self.sign * value, *member.further[rung])
            for number, member in arrived.items()
            if (value := member.values[rung]) is not None
        }
        ranks = dict(zip(points, nondominated_ranks([*points.values()]), strict=True))
        # of one goal, the order of values
        ranked = sorted(points, key=lambda number: (ranks[number], points[number], members[number].ties[rung], number))
        unranked = arrived.keys() - points.keys()
        kept = {*ranked[: math.ceil(self.rungs[rung].share * len(members))], *unranked, BASELINE_TRIAL}
        losers = [number for number in ranked if number not in kept]
        for number in losers:
            members[number].lost = True
        over = {number for number, member in members.items() if member.over}
        survivors = [number for number in (*ranked, *sorted(unranked)) if number in kept - over]
        return Cut(cohort, self.rungs[rung], survivors, [number for number in losers if number not in over])

    def finalists(self) -> list[int] | None:
        """The best of the trials that train on after their last cut: two, or as many as a cohort keeps; best first.

        None: a trial that is known has yet to come to its last cut. Where nobody is cut, there are no finalists.
        """
        if not self.rungs:
            return []
        last, places = len(self.rungs) - 1, LEAST_FINALISTS
        kept: dict[int, tuple[float, float]] = {}
        for members in self.cohorts:
            if any(len(member.values) <= last and not member.over and not member.lost for member in members.values()):
                return None
            arrived = {n: member.values[last] for n, member in members.items() if len(member.values) > last}
            values = {
                number: (self.sign * value, members[number].ties[last])
                for number, value in arrived.items()
                if value is not None
            }
            share = math.ceil(self.rungs[last].share * len(members))
            best = sorted(values, key=lambda number: (values[number], number))[:share]
            kept |= {number: values[number] for number in values if number in (*best, BASELINE_TRIAL)}
            places = max(places, share)
        return sorted(kept, key=lambda number: (kept[number], number))[:places]

    def _known(self) -> int:
        return sum(map(len, self.cohorts))
