"""Intervals that hold with a chance of 95 %, and when there is none: records are too few, or all alike."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

if TYPE_CHECKING:
    import numpy as np

CHANCE = 0.05  # of being wrong, for all comparisons together


class Told(TypedDict):
    """What the records tell of a difference.

    Attributes:
        interval: where it lies with a chance of 95 %; None: that can't be said.
        shown: whether there is one.
        reason: why there is no interval.
    """

    interval: list[float] | None
    shown: bool
    reason: NotRequired[str]


def least_records(comparisons: int = 1) -> int:
    """Records below which nothing can be told.

    If all of n records differ in the same direction, chance does that in 2 of 2^n cases (two-sided sign test; R. A.
    Fisher, The design of experiments, 1935, § 21). An interval within the range of n values, as that of a bootstrap,
    misses the middle of their distribution as often: in more than 5 % of cases where n is less than 6.
    """
    return math.ceil(math.log2(2 * comparisons / CHANCE))


def interval_of(resampled: "np.ndarray", difference: float, records: int, comparisons: int = 1) -> Told:
    """The percentiles of resampled differences (B. Efron and R. Tibshirani 1993, chapter 13), where they tell anything.

    Args:
        resampled: float64 [resamples].
        difference: over the records as they are.
        records: behind it.
        comparisons: that are to hold together (Bonferroni; O. J. Dunn, Multiple comparisons among means, 1961).
    """
    import numpy as np  # here: what reads a result alone needs none of it

    tail = 100 * CHANCE / 2 / comparisons
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return judged(float(low), float(high), difference, records, comparisons)


def judged(low: float, high: float, difference: float, records: int, comparisons: int = 1) -> Told:
    """The ends of an interval, where so many records can bear it; arguments as of :func:`interval_of`."""
    least = least_records(comparisons)
    if records < least:
        few = "1 record is" if records == 1 else f"{records} records are"
        return {"interval": None, "shown": False, "reason": f"{few} too few: it takes {least}"}
    if not all(map(math.isfinite, (low, high, difference))):
        return {"interval": None, "shown": False, "reason": "a model's value is no finite number"}
    if math.isclose(low, high, rel_tol=1e-9, abs_tol=1e-12):  # rounding apart, all records are alike: how sure is that?
        is_any = not math.isclose(difference, 0, abs_tol=1e-12)
        return {"interval": None, "shown": is_any, "reason": f"the same on all {records} records"}
    return {"interval": [low, high], "shown": not low <= 0 <= high}


def as_told(entry: Mapping[str, Any], records: int, comparisons: int = 1) -> Mapping[str, Any]:
    """An entry of :func:`ftray.evaluation.metrics.compare`; one that an earlier version has left is judged anew."""
    if "shown" in entry:
        return entry
    if entry["interval"] is None:
        return {**entry, "shown": False, "reason": "its error is not known"}
    low, high = entry["interval"]
    return {**entry, **judged(low, high, entry["difference"], records, comparisons)}


def said(told: Mapping[str, Any], shown: Callable[[float], str] = "{:.4g}".format) -> str:
    """An interval in words, or why there is none."""
    if told["interval"] is None:
        return f"no interval: {told['reason']}"
    return " to ".join(map(shown, told["interval"]))


def any_interval(tables: Sequence[Mapping[str, Mapping[str, Any]]]) -> bool:
    """Whether one of the metrics of :func:`ftray.evaluation.metrics.compare` has an interval."""
    return any(entry["interval"] for table in tables for entry in table.values())
