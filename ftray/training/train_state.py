"""Where a run stands, and what it has reported."""

import math
from dataclasses import dataclass, field
from typing import Any

from ftray.training.run_spec import RunSpec


@dataclass
class TrainState:
    """Counts what one adapter has seen, over all ranks; a checkpoint holds it.

    Attributes:
        step: optimiser steps made.
        seconds: spent in them and in validations.
        reports: all so far, in natural units (losses in nats per supervised token).
    """

    run: RunSpec
    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    reports: list[dict[str, Any]] = field(default_factory=list)
    _since: tuple[float, int] = (0.0, 0)  # summed loss and supervised tokens since the last report

    def add(self, loss: float, supervised: int, tokens: int, seconds: float) -> None:
        """One more step, with its summed loss."""
        self.step += 1
        self.tokens += tokens
        self.supervised_tokens += supervised
        self.seconds += seconds
        self._since = self._since[0] + loss, self._since[1] + supervised

    @property
    def due(self) -> bool:
        """Whether a report is due after this step."""
        return self.over or self.step in self.run.evaluate_at

    @property
    def over(self) -> bool:
        """Whether the last step is made."""
        return self.step >= self.run.steps

    def report(self, learning_rate: float, validation: dict[str, float], seconds: float) -> dict[str, Any]:
        """The report that is due, with the metrics of a validation that took `seconds`."""
        self.seconds += seconds
        loss, supervised = self._since
        self._since = 0.0, 0
        self.reports.append(
            {
                "step": self.step,
                "tokens": self.tokens,
                "supervised_tokens": self.supervised_tokens,
                "seconds": self.seconds,
                "records": self.step * self.run.training.batch_size,
                "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
                "train_loss": loss / supervised,
                "learning_rate": learning_rate,
                **validation,
            }
        )
        return self.reports[-1]

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs; after any step."""
        names = ("step", "tokens", "supervised_tokens", "seconds", "reports", "_since")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, value in state.items():
            setattr(self, name, value)


def validation_metrics(loss: float, supervised: float) -> dict[str, float]:
    """Mean loss (nats per supervised token) and perplexity from the summed `loss` of a validation."""
    mean = loss / supervised
    return {"validation_loss": mean, "validation_perplexity": math.exp(min(mean, 700.0))}
