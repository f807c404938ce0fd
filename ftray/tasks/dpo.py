"""DPO: answers that people prefer become likelier than others, compared with how likely they were before training.

Rafailov et al., Direct Preference Optimization (arXiv 2305.18290).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn import functional as F

from ftray.config import EvaluationConfig
from ftray.data.shards import REFERENCE
from ftray.tasks import preference
from ftray.tasks.task import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Objective(preference.PairObjective):
    """The loss of the margin between two log-ratios to the base, times beta.

    `sigmoid` is the paper's, with the conservative `label_smoothing` of its authors, which `hinge` and `ipo` take too;
    `hinge` is that of SLiC (arXiv 2305.10425); `ipo` the squared one of Azar et al. (arXiv 2310.12036), of means over
    tokens; `robust` that of Chowdhury et al. (arXiv 2403.00409), which corrects for the share `label_smoothing` of
    turned pairs. `sft_weight` adds the preferred answers' own loss (RPO, arXiv 2404.19733).
    """

    settings: ClassVar[Mapping[str, float | str]] = {
        "beta": 0.1,
        "loss": "sigmoid",
        "label_smoothing": 0.0,
        "sft_weight": 0.0,
    }

    @staticmethod
    def rewards(log_probabilities: torch.Tensor, counts: torch.Tensor, reference: torch.Tensor | None) -> torch.Tensor:
        assert reference is not None  # it is among the columns
        return log_probabilities - reference

    def pair_losses(self, rewards: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        if self.values["loss"] == "ipo":
            rewards = rewards / counts
        return margin_losses(rewards[:, 0] - rewards[:, 1], self.values)


def margin_losses(margins: torch.Tensor, settings: Mapping[str, float | str]) -> torch.Tensor:
    """The loss of each pair's margin, by the settings `beta`, `loss` and `label_smoothing`.

    That share of the pairs is taken for turned round: each counts in part as its opposite.
    """
    beta, smoothing, kind = float(settings["beta"]), float(settings["label_smoothing"]), settings["loss"]

    def of(margin: torch.Tensor) -> torch.Tensor:
        if kind == "hinge":
            return torch.relu(1 - beta * margin)
        return (margin - 1 / (2 * beta)).square() if kind == "ipo" else -F.logsigmoid(beta * margin)

    right, wrong = of(margins) * (1 - smoothing), of(-margins) * smoothing
    return (right - wrong) / (1 - 2 * smoothing) if kind == "robust" else right + wrong


class Task(preference.Task):
    """Pairs, with the log-probabilities of both answers before training."""

    columns = ("input_ids", "labels", "lengths", REFERENCE)
    objective = Objective

    def compared_with(self, base: "PreTrainedModel", rows: list[Row], cfg: EvaluationConfig) -> list[Row]:
        return preference.compared_with(base, rows, cfg)
