"""How many records a trial sees, and after how many it is compared with others."""

from ftray.config import Config


def budget(cfg: Config, records: int) -> int:
    """Records that a trial sees when nothing stops it; `records` are those of an epoch."""
    training = cfg.training
    if training.steps:
        return training.steps * training.batch_size
    return max(training.batch_size, round(training.epochs * records))


def rung_records(budget: int, cfg: Config) -> list[int]:
    """Records seen at each rung, the last one `budget`: geometric, as in ASHA (arXiv 1810.05934)."""
    if cfg.search.scheduler == "none":
        n = cfg.training.evaluations
        return [max(1, round(budget * k / n)) for k in range(1, n + 1)]
    factor = cfg.search.reduction_factor
    first = max(1, budget // factor ** (cfg.search.rungs - 1))
    return sorted({min(budget, first * factor**k) for k in range(cfg.search.rungs - 1)} | {budget})
