"""Metrics of a pack for Prometheus, as those of :mod:`ftray.search.metrics`."""

import psutil
from ray.util.metrics import Gauge


def as_tag(text: str) -> str:
    """A text as Ray's metrics take it in a tag: of ASCII alone."""
    return text.encode("ascii", "backslashreplace").decode()


class PackMetrics:
    """The metrics of a pack, from its first worker: number of trials, speed and memory."""

    def __init__(self, search: str, pack: int):
        tags = {"search": as_tag(search), "pack": str(pack)}
        self.trials = Gauge("ftray_pack_trials", "trials that train together", tuple(tags))
        self.speed = Gauge("ftray_pack_tokens_per_second", "tokens trained a second, by the pack", tuple(tags))
        self.memory = Gauge("ftray_pack_memory_bytes", "taken by the pack's first worker", (*tags, "device"))
        for metric in (self.trials, self.speed, self.memory):
            metric.set_default_tags(tags)
        self._process = psutil.Process()

    def step(self, trials: int, tokens: int, seconds: float) -> None:
        """Set the metrics after a step of `trials` trials."""
        import torch

        self.trials.set(trials)
        self.speed.set(tokens / seconds)
        self.memory.set(self._process.memory_info().rss, {"device": "cpu"})
        if torch.cuda.is_available():
            self.memory.set(torch.cuda.memory_allocated(), {"device": "gpu"})
