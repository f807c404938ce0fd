"""DISTILLATION: a teacher's distribution over its most likely next tokens is learnt, from stored log-probabilities.

Hinton et al., Distilling the Knowledge in a Neural Network (arXiv 1503.02531), at temperature 1.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ftray.config import EvaluationConfig, TrainingConfig
from ftray.data.distillation import DistillationTask
from ftray.evaluation.metrics import Scores, ratio
from ftray.models.next_token import SHARES, TARGETS, packed_row, token_losses
from ftray.tasks import causal, objective
from ftray.tasks.objective import Batch
from ftray.tasks.task import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Objective(objective.Objective):
    """The mean Kullback-Leibler divergence of the model's next token from the teacher's, nats.

    What the teacher gave its most likely tokens is scaled to sum to 1.
    """

    reported = ("divergence",)

    def loss(self, losses: torch.Tensor, batch: Batch, counts: Sequence[float]) -> torch.Tensor:
        shares = batch[SHARES].to(losses)
        divergence: torch.Tensor = losses + torch.special.xlogy(shares, shares).sum(1)
        return divergence.sum()

    def sums(self, losses: torch.Tensor, batch: Batch) -> list[float]:
        return [self.loss(losses, batch, ()).item()]

    def metrics(self, sums: Sequence[float], targets: float) -> dict[str, float]:
        return {"validation_divergence": sums[0] / targets}


class Task(DistillationTask, causal.Task):
    """Answers, each token with the teacher's most likely ones: `targets` and `shares`, both [S, K]."""

    metrics: ClassVar[Mapping[str, str]] = {"divergence": "min", **causal.Task.metrics}
    metric = "divergence"
    columns = ("input_ids", "labels", "lengths", "teacher_ids", "teacher_logprobs")
    objective = Objective

    def collate(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, torch.Tensor]:
        most = max(k for (k,) in columns["lengths"])
        targets, shares = [], []
        for (k,), ids, said in zip(*(columns[name] for name in self.columns[2:]), strict=True):
            room = ((0, 0), (0, most - k))
            likely = np.exp(np.asarray(said, np.float64).reshape(-1, k))
            shares.append(np.pad(likely / likely.sum(1, keepdims=True), room))
            targets.append(np.pad(np.asarray(ids, np.int64).reshape(-1, k), room))
        batch = packed_row({name: columns[name] for name in ("input_ids", "labels")})
        batch[TARGETS] = torch.from_numpy(np.concatenate(targets))
        batch[SHARES] = torch.from_numpy(np.concatenate(shares)).float()
        return batch

    def empty(self) -> dict[str, torch.Tensor]:
        return super().empty() | {TARGETS: torch.zeros(0, 1, dtype=torch.int64), SHARES: torch.zeros(0, 1)}

    @torch.inference_mode()
    def score(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: list[Row], cfg: EvaluationConfig
    ) -> Scores:
        """As supervised fine-tuning of the answers is scored, and the divergence from the teacher."""
        scores = causal.score(model, tokenizer, rows, cfg)
        own = self.objective(TrainingConfig())
        divergence = []
        for row in rows:
            batch = self.collate({name: [row[name]] for name in self.columns})
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            divergence.append(own.loss(token_losses(model, batch).double(), batch, ()).item())
        scores.metrics["divergence"] = ratio(np.array(divergence), scores.tokens)
        return scores
