"""How many records a trial sees, and after how many it is compared with others."""

import math
from dataclasses import dataclass

from ftray.config import Config, SearchConfig

# of halving, where nothing else is configured; chosen by benchmarks.policy
FIRST_SHARE = 1 / 8  # of the budget, before the first cut
KEPT_SHARES = (1 / 8, 1 / 16)  # of a cohort, after each cut
LEAST_STEPS, LEAST_WARMUPS = 6, 3  # before the first cut: earlier, losses tell little
# validation records at a cut, as a share of those trained on since the last one: a record costs a third of what it
# costs in training, as there is no backward pass, and validating at most a fifth of training
VALIDATED_SHARE = 3 / 5
RUNGS, FACTOR = 3, 3  # of ASHA and Hyperband
LEAST_FINALISTS = 2  # that are trained with further seeds
MOST_IN_COHORT = 16  # trials that are compared with each other, by default


@dataclass(frozen=True)
class Rung:
    """Where trials are compared.

    Attributes:
        records: seen by each of them.
        share: of them, of those that began, that train on.
        validated: validation records that are read there; None: all.
        paired: whether trials are compared by their training losses there, and nothing is validated.
    """

    records: int
    share: float
    validated: int | None = None
    paired: bool = False


def cohort_size(search: SearchConfig) -> int:
    """Trials that halving compares with each other, if they fit in memory."""
    return min(search.cohort or MOST_IN_COHORT, search.trials)


def budget(cfg: Config, records: int) -> int:
    """Records that a trial sees when nothing stops it; `records` are those of an epoch."""
    training = cfg.training
    if training.steps:
        return training.steps * training.batch_size
    return max(training.batch_size, round(training.epochs * records))


def rungs(budget: int, cfg: Config, fresh: int = 0) -> list[Rung]:
    """The rungs, the last one at `budget` records, where nobody trains on.

    Args:
        fresh: records up to which trials can be compared by their training losses. At the last cut, which makes the
            finalists, they are always validated.
    """
    search, training = cfg.search, cfg.training
    if search.scheduler == "none":
        n = training.evaluations
        known = {max(1, round(budget * k / n)): 1.0 for k in range(1, n)}
    elif search.scheduler == "halving":
        known = _halving(budget, cfg)
    else:  # geometric, as in ASHA (https://arxiv.org/abs/1810.05934)
        factor, count = search.reduction_factor or FACTOR, search.rungs or RUNGS
        first = max(1, budget // factor ** (count - 1))
        known = {min(budget, first * factor**k): factor ** -(k + 1) for k in range(count - 1)}
    known = {records: share for records, share in known.items() if records < budget}
    found, before, halving = [], 0, search.scheduler == "halving"
    for records, share in sorted(known.items()):
        paired = halving and records <= fresh and records < max(known)
        validated = math.ceil(VALIDATED_SHARE * (records - before)) if halving and not paired else None
        found.append(Rung(records, share, validated, paired))
        before = records
    return [*found, Rung(budget, 0.0)]


def _halving(budget: int, cfg: Config) -> dict[int, float]:
    """By records, the share that trains on: a first rung that tells something, and each next one twice as far."""
    search, training = cfg.search, cfg.training
    if search.rungs or search.reduction_factor:
        factor, count = search.reduction_factor or FACTOR, search.rungs or RUNGS
        return {max(1, round(budget / factor ** (count - 1 - k))): factor ** -(k + 1) for k in range(count - 1)}
    steps, warmups = LEAST_STEPS * training.batch_size, LEAST_WARMUPS * training.warmup * budget
    first = math.ceil(max(FIRST_SHARE * budget, steps, round(warmups, 6)))
    return {first * 2**k: share for k, share in enumerate(KEPT_SHARES) if first * 2**k <= budget / 2}


def rung_records(budget: int, cfg: Config) -> list[int]:
    """Records seen at each rung, the last one `budget`."""
    return [rung.records for rung in rungs(budget, cfg)]
