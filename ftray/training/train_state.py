"""The state of a run between steps, and what it has reported."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict, cast

from ftray.training.run_spec import RunSpec

ANSWERS = "answers"  # their number, among sums over them


class Report(TypedDict):
    """What a run reports after a validation; every metric of the validation is a further key, in natural units.

    It is made here alone. The train state keeps all reports of a run, the file `report.json` of a checkpoint in a pack
    the one that was made with it, and a search's journal the fields that a resumed search needs.

    Attributes:
        step: optimiser steps made.
        records, tokens, supervised_tokens: seen so far, over all ranks.
        seconds: spent so far in steps and validations.
        train_loss: mean since the last report, nats per supervised token.
        validated: validation records that were read; missing where it was all that the settings allow, as in reports
            of older versions. 0: there was no validation, and the report has no metric of one.
        paired_loss: mean loss, nats per supervised token, of the last steps before the report, the same ones as other
            trials report; see :meth:`TrainState.last_third`. Missing where trials are not compared by it.
        train_reward, answer_tokens, kl: of answers that were drawn since the last report, means over answers: reward,
            length, and divergence from the base at their tokens, nats; missing where none were drawn.
    """

    step: int
    records: int
    tokens: int
    seconds: float
    tokens_per_second: float
    supervised_tokens: NotRequired[int]
    train_loss: NotRequired[float]
    learning_rate: NotRequired[float]
    validated: NotRequired[int]
    paired_loss: NotRequired[float]
    train_reward: NotRequired[float]
    answer_tokens: NotRequired[float]
    kl: NotRequired[float]


def metric_value(report: Report, metric: str) -> float:
    """A metric of a report, by name."""
    return cast(Mapping[str, float], report)[metric]


def best_report(reports: Iterable[Report], metric: str, direction: str) -> Report | None:
    """The best of the reports that read most validation records, the first of equals; None if none has the metric.

    Args:
        direction: `min` or `max`.
    """
    sign, known = 1 if direction == "min" else -1, [report for report in reports if metric in report]
    most = max(map(validated, known), default=0.0)
    alike = [report for report in known if validated(report) == most]
    return min(alike, key=lambda report: sign * metric_value(report, metric), default=None)


def tie_breaker(report: Mapping[str, Any]) -> float:
    """What tells apart reports that are equal in the metric, less is better: of preferences the margin, else the loss.

    0: the report has neither.
    """
    margin: float | None = report.get("validation_margin")
    return report.get("validation_loss", 0.0) if margin is None else -margin


def validated(report: Report) -> float:
    """Validation records that a report read; infinite where it was all."""
    return report.get("validated", math.inf)


@dataclass
class TrainState:
    """Counts what one adapter has seen, over all ranks; a checkpoint holds it.

    Attributes:
        step: optimiser steps made.
        tokens, supervised_tokens: seen in them.
        seconds: spent in them and in validations.
        reports: all so far.
        losses: the training loss of each step, nats per supervised token; steps made before a version of ftray that
            kept them are missing.
    """

    run: RunSpec
    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    reports: list[Report] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    _since: tuple[float, int] = (0.0, 0)  # summed loss and supervised tokens since the last report
    _drawn: dict[str, float] = field(default_factory=dict)  # sums over the answers drawn since then, and their number

    def add(self, loss: float, supervised: int, tokens: int, seconds: float) -> None:
        """Count one more step, with its summed loss."""
        self.step += 1
        self.tokens += tokens
        self.supervised_tokens += supervised
        self.seconds += seconds
        self.losses.append(loss / supervised)
        self._since = self._since[0] + loss, self._since[1] + supervised

    def add_drawn(self, sums: Mapping[str, float], answers: float) -> None:
        """Count the answers that were drawn for the next step."""
        for name, value in {**sums, ANSWERS: answers}.items():
            self._drawn[name] = self._drawn.get(name, 0.0) + value

    @property
    def due(self) -> bool:
        """Whether a report is due after this step."""
        return self.over or self.step in self.run.evaluate_at

    @property
    def owes_report(self) -> bool:
        """Whether the report that was due after the last step is missing: the validation was cut off."""
        return self.step > 0 and self.due and (not self.reports or self.reports[-1]["step"] < self.step)

    @property
    def over(self) -> bool:
        """Whether the last step is made."""
        return self.step >= self.run.steps

    def last_third(self) -> float | None:
        """Mean training loss over the last third of the steps since the last evaluation that was due, at least one.

        None: the losses of some steps are missing.
        """
        before = max((step for step in self.run.evaluate_at if step < self.step), default=0)
        last = self.losses[-max(1, (self.step - before) // 3) :]
        return sum(last) / len(last) if len(self.losses) == self.step else None

    def report(
        self, learning_rate: float, validation: dict[str, float], seconds: float, validated: int | None = None
    ) -> Report:
        """Make the report that is due, with the metrics of a validation that took `seconds`.

        `validated` is that of a :class:`Report`; None: all.
        """
        self.seconds += seconds
        loss, supervised = self._since
        self._since = 0.0, 0
        report: Report = {
            "step": self.step,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "seconds": self.seconds,
            "records": self.step * self.run.training.batch_size,
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
            "train_loss": loss / supervised,
            "learning_rate": learning_rate,
        }
        if validated is not None:
            report["validated"] = validated
        if answers := self._drawn.pop(ANSWERS, 0.0):
            validation = {name: value / answers for name, value in self._drawn.items()} | validation
            self._drawn = {}
        self.reports.append(cast(Report, {**report, **validation}))
        return self.reports[-1]

    def state(self) -> dict[str, Any]:
        """The state after any step, for :meth:`restore`."""
        names = ("step", "tokens", "supervised_tokens", "seconds", "reports", "losses", "_since", "_drawn")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        for name, value in state.items():
            setattr(self, name, value)
