"""CPO: as DPO with a base that finds all answers equally likely, and with the preferred answers' own loss.

Xu et al., Contrastive Preference Optimization (arXiv 2401.08417).
"""

from collections.abc import Mapping
from typing import ClassVar

import torch

from ftray.tasks import preference
from ftray.tasks.dpo import margin_losses


class Objective(preference.PairObjective):
    """The loss of the margin between the answers' log-probabilities, as that of DPO; `sft_weight` is the paper's 1."""

    settings: ClassVar[Mapping[str, float | str]] = {
        "beta": 0.1,
        "loss": "sigmoid",
        "label_smoothing": 0.0,
        "sft_weight": 1.0,
    }

    @staticmethod
    def rewards(log_probabilities: torch.Tensor, counts: torch.Tensor, reference: torch.Tensor | None) -> torch.Tensor:
        return log_probabilities

    def pair_losses(self, rewards: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        if self.values["loss"] == "ipo":
            rewards = rewards / counts
        return margin_losses(rewards[:, 0] - rewards[:, 1], self.values)


class Task(preference.Task):
    """Pairs."""

    objective = Objective
