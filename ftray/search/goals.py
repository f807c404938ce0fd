"""Several goals at once: which trials no other beats, and which of them is the best, by the rule of `search.best`."""

import math
from collections.abc import Sequence
from typing import TypedDict, TypeVar

from ftray.config import KNEE, Config, Goal


class Judged(TypedDict):
    """What the goals go by of a trial.

    Attributes:
        metrics: by their keys in a report; empty: it made none.
        validated: validation records behind them; None: all that the settings allow.
        reason: why it failed; None: it did not.
    """

    metrics: dict[str, float]
    validated: int | None
    reason: str | None


class Ranked(Judged):
    """What a leaderboard goes by.

    Attributes:
        trial: its number.
        value: the best of its reports; None: it made none.
        tie_breaker: of the report that has the value, see :func:`ftray.training.train_state.tie_breaker`.
    """

    trial: int
    value: float | None
    tie_breaker: float


Row = TypeVar("Row", bound=Judged)
Point = Sequence[float]  # a number a goal, less is better


def dominates(one: Point, other: Point) -> bool:
    """Whether `one` is as good in all goals, and better in one."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def nondominated_ranks(points: Sequence[Point]) -> list[int]:
    """The front of each point: 0 where no other dominates it, 1 where none does without those, and so on.

    As in NSGA-II (https://doi.org/10.1109/4235.996017).
    """
    ranks = [-1] * len(points)
    rank = 0
    while -1 in ranks:
        left = [i for i, known in enumerate(ranks) if known < 0]
        for i in [i for i in left if not any(dominates(points[j], points[i]) for j in left)]:
            ranks[i] = rank
        rank += 1
    return ranks


def from_knee(points: Sequence[Point]) -> list[int]:
    """The places of a front's points, the knee first: of two goals, the one farthest from the line through the ends.

    That is the one with the least sum of goals, each of them scaled to 0 at the front's best and 1 at its worst
    (https://doi.org/10.1137/S1052623496307510).
    """
    columns = list(zip(*points, strict=True))
    lows, spans = [min(column) for column in columns], [max(column) - min(column) for column in columns]
    sums = [
        sum((value - low) / span for value, low, span in zip(point, lows, spans, strict=True) if span)
        for point in points
    ]
    return sorted(range(len(points)), key=lambda i: (sums[i], i))


def front(rows: Sequence[Row], cfg: Config) -> list[Row]:
    """The trials that no other beats in all goals, of those that did not fail and were validated on most records."""
    goals = cfg.search.goals
    whole = [row for row in rows if row["reason"] is None and all(goal.metric in row["metrics"] for goal in goals)]
    most = max(map(_validated, whole), default=0.0)
    alike = [row for row in whole if _validated(row) == most]
    ranks = nondominated_ranks([_point(row, cfg) for row in alike])
    return [row for row, rank in zip(alike, ranks, strict=True) if rank == 0]


def place(row: Ranked, goal: Goal, failed: bool) -> tuple[bool, bool, float, float, float, int]:
    """What trials are sorted by, best first: those without a value come behind those with one, failed ones last.

    Values are compared among trials that were validated on as many records: those on all of them come first. Of equal
    values the tie-breaker decides, then the trial's number.
    """
    if row["value"] is None:
        return failed, True, 0.0, 0.0, 0.0, row["trial"]
    value = goal.sign * row["value"]
    return failed, False, -_validated(row), value, row["tie_breaker"], row["trial"]


def is_tie(one: Ranked, other: Ranked) -> bool:
    """Whether nothing but their numbers tells two trials apart."""
    keys = ("value", "tie_breaker", "validated", "metrics")
    return all(one[key] == other[key] for key in keys)  # type: ignore[literal-required]


def preferred(rows: Sequence[Row], cfg: Config) -> list[Row]:
    """The trials in the order in which they may be the best, by `search.best`; those that may not be are left out.

    Args:
        rows: best first, as of the first goal.
    """
    if cfg.search.constraints:
        return [row for row in rows if all(one.holds(row["metrics"]) for one in cfg.search.constraints)]
    if cfg.search.best != KNEE and len(cfg.search.goals) == 1:
        return list(rows)
    shown = front(rows, cfg)
    first = [shown[i] for i in from_knee([_point(row, cfg) for row in shown])]
    return first + [row for row in rows if row not in first]


def _validated(row: Judged) -> float:
    return math.inf if row["validated"] is None else row["validated"]


def _point(row: Judged, cfg: Config) -> Point:
    return [goal.sign * row["metrics"][goal.metric] for goal in cfg.search.goals]
