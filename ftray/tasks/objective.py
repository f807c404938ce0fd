"""What a run minimises, given the losses of the tokens that its records supervise.

A pack holds runs with objectives of one kind and different settings: each scales the gradient of its own rows.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from ftray.errors import UserError
from ftray.task_spec import IGNORE, OBJECTIVE_SETTINGS

if TYPE_CHECKING:
    from ftray.config import TrainingConfig

Batch = Mapping[str, torch.Tensor]
PREFIXES = "prefixes"  # of a packed row, int64 [1, texts]: first tokens that each shares with the text before, unlearnt


class Objective:
    """Supervised fine-tuning: the mean loss of the supervised tokens.

    Attributes:
        settings: those of the training section that this kind of objective has, with their defaults.
        values: what they are in this run.
        reported: the metrics of :meth:`metrics`, by name.
        totals: how many numbers :meth:`sums` gives.
        beta_may_be_zero: whether it does without what `beta` weighs.
    """

    settings: ClassVar[Mapping[str, float | str]] = {}
    reported: ClassVar[tuple[str, ...]] = ("loss", "perplexity")
    totals: ClassVar[int] = 1
    beta_may_be_zero: ClassVar[bool] = False

    def __init__(self, training: "TrainingConfig | None" = None):
        """
        Args:
            training: the section; None: its defaults.

        Raises:
            UserError: the training section holds a setting that this objective has no use for.
        """
        given = {name: value for name in OBJECTIVE_SETTINGS if (value := getattr(training, name, None)) is not None}
        if unused := next((name for name in given if name not in self.settings), None):
            known = f"it has {', '.join(self.settings)}" if self.settings else "only preferences and GRPO have some"
            raise UserError(f"training.{unused}: what is learnt here has no such setting: {known}")
        self.values = {**self.settings, **given}
        if self.values.get("beta") == 0 and not self.beta_may_be_zero:
            raise UserError("training.beta: must be greater than 0")

    @property
    def temperature(self) -> float:
        """By which logits are divided before losses are made of them."""
        return 1.0

    def counts(self, batch: Batch) -> Sequence[float]:
        """Numbers whose sums over all micro-batches of the step, on all ranks, :meth:`loss` is given."""
        return ()

    def estimated_on(self, batch: Batch) -> Batch | None:
        """Rows that a pass without gradients reads before the step; see :meth:`estimates`."""
        return None

    def estimates(self, losses: torch.Tensor, batch: Batch) -> Sequence[float]:
        """Further numbers of that kind, from the losses of the rows that :meth:`estimated_on` gave."""
        return ()

    def loss(self, losses: torch.Tensor, batch: Batch, counts: Sequence[float]) -> torch.Tensor:
        """What is minimised, summed over the targets of `batch`; a scalar.

        Args:
            losses: cross-entropy of each supervised token of `batch` at the `temperature`, float64 [S], nats.
            counts: targets, then the sums of :meth:`counts` and :meth:`estimates`, of the step on all ranks.
        """
        return losses.sum()

    def sums(self, losses: torch.Tensor, batch: Batch) -> list[float]:
        """What a validation adds up over batches and ranks; the first is infinite or NaN where the run diverged."""
        return [losses.sum().item()]

    def metrics(self, sums: Sequence[float], targets: float) -> dict[str, float]:
        """Metrics of a validation, by their keys in a report, from the totals of :meth:`sums`."""
        return validation_metrics(sums[0], targets)


def validation_metrics(loss: float, supervised: float) -> dict[str, float]:
    """Mean loss (nats per supervised item) and perplexity from the summed `loss` of a validation."""
    mean = loss / supervised
    return {"validation_loss": mean, "validation_perplexity": math.exp(min(mean, 700.0))}


def text_of_each(batch: Batch) -> torch.Tensor:
    """The text of a packed row that each supervised token belongs to, int64 [S]."""
    text = (batch["position_ids"][0] == 0).cumsum(0) - 1
    return text[1:][batch["labels"][0, 1:] != IGNORE]


def text_sums(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The sums of `values` [S], of supervised tokens, over each text of a packed row, [texts]."""
    texts = int((batch["position_ids"] == 0).sum())
    return values.new_zeros(texts).index_add(0, text_of_each(batch).to(values.device), values)
