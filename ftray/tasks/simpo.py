"""SimPO: preferred answers become likelier than others, token for token, without a base to compare with.

Meng et al., SimPO (arXiv 2405.14734).
"""

from typing import ClassVar

import torch
from torch.nn import functional as F

from ftray.tasks import preference


class Objective(preference.PairObjective):
    """The loss of the margin between the answers' mean log-probabilities, times beta, less gamma.

    The defaults are those that the paper found to do well. With `sft_weight` it is CPO-SimPO.
    """

    settings: ClassVar = {"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.0, "sft_weight": 0.0}

    @staticmethod
    def rewards(log_probabilities: torch.Tensor, counts: torch.Tensor, reference: torch.Tensor | None) -> torch.Tensor:
        return log_probabilities / counts

    def pair_losses(self, rewards: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        beta, gamma, smoothing = (float(self.values[name]) for name in ("beta", "gamma", "label_smoothing"))
        margins = beta * (rewards[:, 0] - rewards[:, 1]) - gamma
        return -F.logsigmoid(margins) * (1 - smoothing) - F.logsigmoid(-margins) * smoothing


class Task(preference.Task):
    """Pairs."""

    objective = Objective
    space = "simpo"
