"""ORPO: supervised fine-tuning of preferred answers, with the odds of the others held down.

Hong et al., ORPO (arXiv 2403.07691).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from ftray.task_spec import IGNORE
from ftray.tasks import preference
from ftray.tasks.preference import ANSWER


class Objective(preference.PairObjective):
    """The mean cross-entropy of the preferred texts, their prompts included, and beta times the log odds ratio's loss.

    beta is the paper's lambda; odds are those of a token, the geometric mean over the answer.
    """

    settings: ClassVar[Mapping[str, float | str]] = {"beta": 0.1, "sft_weight": 1.0}

    @staticmethod
    def rewards(log_probabilities: torch.Tensor, counts: torch.Tensor, reference: torch.Tensor | None) -> torch.Tensor:
        return log_probabilities / counts

    def pair_losses(self, rewards: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        log_odds = rewards - torch.log(-torch.expm1(rewards.clamp_max(-1e-7)))  # a sure token's odds are infinite
        return -float(self.values["beta"]) * F.logsigmoid(log_odds[:, 0] - log_odds[:, 1])


class Task(preference.Task):
    """Pairs. Prompts of preferred texts are supervised too, so `answer`, float32 [1, S], tells what is not one."""

    objective = Objective
    space = "orpo"

    def collate(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, torch.Tensor]:
        labels = []
        for ids, own, (first, _) in zip(columns["input_ids"], columns["labels"], columns["lengths"], strict=True):
            labels.append(np.concatenate([ids[:first], own[first:]]))
        batch = preference.collate({**columns, "labels": labels})
        answers = preference.collate(columns)["labels"][0, 1:] != IGNORE
        batch[ANSWER] = answers[batch["labels"][0, 1:] != IGNORE].float()[None]
        return batch
