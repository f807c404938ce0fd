"""Metrics of a search for Prometheus, exported by Ray on every node (see cluster/observability)."""

import time
from collections import Counter as Counts
from typing import Any

from ray.tune.experiment import Trial
from ray.util.metrics import Counter, Gauge

from ftray.config import Config
from ftray.search.control import ShowsStates
from ftray.search.pack_metrics import as_tag
from ftray.search.trial_status import IN_TUNE, TrialStatus

EVERY = 2.0  # seconds


class Metrics(ShowsStates):
    """The metrics of Tune's driver: trials by state, the best value, tokens a second, records trained at each rung.

    Ray puts `ray_` before the names.
    """

    def __init__(self, cfg: Config, padding: float):
        self.cfg, self.padding = cfg, padding
        self._gauges: dict[str, Any] = {}
        self._records: dict[str, int] = {}  # seen by each trial
        self._best: float | None = None
        self._counted = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_gauges": {}}

    def setup(self, *args: object, **info: object) -> None:
        """Make the metrics; all are tagged with the search's output."""
        search = {"search": as_tag(self.cfg.output)}
        made = {
            "trials": Gauge("ftray_trials", "trials by state", ("search", "state")),
            "best": Gauge("ftray_best", "best value of the search's metric so far", ("search", "metric")),
            "speed": Gauge("ftray_tokens_per_second", "tokens trained a second, by all trials that run", ("search",)),
            "padding": Gauge("ftray_padding_share", "share of a batch that is padding", ("search",)),
            "rungs": Counter("ftray_rung_records_total", "records trained to reach a rung", ("search", "rung")),
        }
        for metric in made.values():
            metric.set_default_tags(search)
        made["padding"].set(self.padding)
        self._gauges = made

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: object) -> None:
        """Count the trials every few seconds; Tune calls this many times a second."""
        if time.monotonic() - self._counted >= EVERY:
            self._counted = time.monotonic()
            self._count(trials)

    def on_experiment_end(self, trials: list[Trial], **info: object) -> None:
        """Count the trials as they ended."""
        self._count(trials)

    def _count(self, trials: list[Trial]) -> None:
        counts = Counts(self.state(trial) for trial in trials)
        for state in (*IN_TUNE.values(), TrialStatus.PAUSED, TrialStatus.STOPPING):
            self._gauges["trials"].set(counts[state], {"state": state.value})
        running = [t.last_result or {} for t in trials if t.status == Trial.RUNNING]
        self._gauges["speed"].set(sum(result.get("tokens_per_second", 0.0) for result in running))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: object
    ) -> None:
        """Count the records of a rung."""
        more = result["records"] - self._records.get(trial.trial_id, 0)
        self._records[trial.trial_id] = result["records"]
        if more > 0:
            self._gauges["rungs"].inc(more, {"rung": str(result["training_iteration"])})
        metric, best = self.cfg.search.goal.metric, min if self.cfg.search.goal.direction == "min" else max
        if metric not in result:
            return
        self._best = result[metric] if self._best is None else best(self._best, result[metric])
        self._gauges["best"].set(self._best, {"metric": as_tag(metric)})
