"""CPO: as DPO with a base that finds all answers equally likely, and with the preferred answers' own loss.

Xu et al., Contrastive Preference Optimization (arXiv 2401.08417).
"""

from collections.abc import Mapping
from typing import ClassVar

import torch

from ftray.tasks import dpo, preference


class Objective(dpo.Objective):
    """As that of DPO, of the answers' log-probabilities themselves; `sft_weight` is the paper's 1."""

    settings: ClassVar[Mapping[str, float | str]] = {**dpo.Objective.settings, "sft_weight": 1.0}

    @staticmethod
    def rewards(log_probabilities: torch.Tensor, counts: torch.Tensor, reference: torch.Tensor | None) -> torch.Tensor:
        return log_probabilities


class Task(preference.Task):
    """Pairs."""

    objective = Objective
