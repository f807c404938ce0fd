"""How far a search's early cuts can be trusted: what the trials that reached the end tell of those that did not."""

import math
from typing import TypedDict

import numpy as np
from scipy.stats import norm, spearmanr

from ftray.config import Config
from ftray.search.results import TrialRow
from ftray.search.rungs import Rung
from ftray.search.trial_status import TrialStatus

LEAST_TRIALS = 3  # that reached the end: of fewer, nothing can be said


class RungReliability(TypedDict):
    """What a rung was worth.

    Attributes:
        records: seen by a trial at the rung.
        signal: what trials were compared by: `training loss` of the same batches, or `validation`.
        finished, stopped: trials that reached the end, and those that were stopped at this rung.
        rank_correlation: Spearman's, between the values at the rung and at the end, of those that finished.
        missed: chance that one of those stopped here would have had the best value at the end.
    """

    records: int
    signal: str
    finished: int
    stopped: int
    rank_correlation: float | None
    missed: float | None


def reliability(rows: list[TrialRow], rungs: list[Rung], cfg: Config) -> list[RungReliability]:
    """One entry a rung but the last.

    The values of stopped trials at the end are taken to be their last ones, changed as those of the finished trials
    have changed from the rung to the end: by a normal distribution of the same mean and deviation.
    """
    metric, sign = cfg.search.goal.metric, cfg.search.goal.sign
    finished = [row for row in rows if row["status"] == TrialStatus.FINISHED]
    found: list[RungReliability] = []
    compared = rungs[:-1]
    for place, rung in enumerate(compared, 1):
        signal = "paired_loss" if rung.paired else metric
        pairs = [(value_at(row, rung.records, signal), row["curve"][-1][metric]) for row in finished]
        known = np.array([(sign * at, sign * end) for at, end in pairs if at is not None], float).reshape(-1, 2)
        stopped = [
            sign * row["curve"][-1][signal]
            for row in rows
            if row["status"] == TrialStatus.STOPPED_EARLY
            and sum(row["records"] >= reached.records for reached in compared) == place
            and signal in row["curve"][-1]
        ]
        correlation = missed = None
        if len(known) >= LEAST_TRIALS:
            spread = known.std(axis=0).min()
            correlation = float(spearmanr(known[:, 0], known[:, 1]).statistic) if spread > 0 else None
            change, best = known[:, 1] - known[:, 0], min(sign * end for _, end in pairs)
            scale = float(change.std(ddof=1))
            won = [float(norm.cdf(best, value + change.mean(), scale)) for value in stopped] if scale > 0 else []
            missed = 1 - math.prod(1 - chance for chance in won)
        found.append(
            {
                "records": rung.records,
                "signal": "training loss" if rung.paired else "validation",
                "finished": len(known),
                "stopped": len(stopped),
                "rank_correlation": correlation,
                "missed": missed,
            }
        )
    return found


def value_at(row: TrialRow, records: int, metric: str) -> float | None:
    """The metric of a trial's first report after so many records; None: there is none."""
    return next((point.get(metric) for point in row["curve"] if point["records"] >= records), None)


def described(found: list[RungReliability]) -> list[str]:
    """A line for each rung of which something can be said."""
    return [
        f"after {rung['records']} records, by {rung.get('signal', 'validation')}: "
        f"order as at the end {rung['rank_correlation']:.2f} "
        f"(Spearman, {rung['finished']} trials); chance that one of {rung['stopped']} stopped there would have won "
        f"{rung['missed']:.0%}"
        for rung in found
        if rung["rank_correlation"] is not None and rung["missed"] is not None and rung["stopped"]
    ]
