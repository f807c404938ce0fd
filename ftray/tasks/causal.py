"""CAUSAL_LM: text that continues a prompt; records lie packed in one row."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch

from ftray.config import EvaluationConfig
from ftray.data.record_task import TextTask
from ftray.evaluation.generation import generate
from ftray.evaluation.metrics import Scores
from ftray.models.next_token import packed_row, supervised_loss, supervised_tokens, token_losses
from ftray.models.probe import padding_obstacle
from ftray.task_spec import IGNORE
from ftray.tasks import task
from ftray.tasks.objective import Objective
from ftray.tasks.task import Batch, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_alone: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # of models that were tried: whether padding changes them
SCORED_TOKENS = 2048  # of a batch that is scored: its logits lie in memory at once


class Task(TextTask, task.Task):
    """See :mod:`ftray.data.tokens` and :mod:`ftray.models.next_token`."""

    auto_class = "AutoModelForCausalLM"
    pipeline_tag = "text-generation"
    packed = True
    metrics: ClassVar[Mapping[str, str]] = {**task.TEXT, "token_error_rate": "min", "character_error_rate": "min"}
    generated: ClassVar[tuple[str, ...]] = task.GENERATED
    usage_example = "ftray serve --run {run}"

    def collate(self, columns: Mapping[str, Sequence[Any]]) -> Batch:
        return packed_row(columns)

    def loss(self, model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
        return supervised_loss(model, batch, self.pad)

    def token_losses(self, model: "PreTrainedModel", batch: Batch, temperature: float = 1.0) -> torch.Tensor:
        """The cross-entropy of each supervised token, float64 [S]."""
        return token_losses(model, batch, self.pad, temperature).double()

    def objective_loss(
        self, model: "PreTrainedModel", batch: Batch, objective: Objective, counts: Sequence[float]
    ) -> torch.Tensor:
        return objective.loss(self.token_losses(model, batch, objective.temperature), batch, counts)

    def sums(self, model: "PreTrainedModel", batch: Batch, objective: Objective) -> list[float]:
        return objective.sums(self.token_losses(model, batch), batch)

    def estimates(self, model: "PreTrainedModel", batch: Batch, objective: Objective) -> Sequence[float]:
        """See :meth:`Objective.estimates`."""
        return objective.estimates(self.token_losses(model, batch), batch)

    def num_targets(self, batch: Mapping[str, torch.Tensor]) -> int:
        return supervised_tokens(batch)

    def tokens(self, batch: Mapping[str, torch.Tensor]) -> int:
        return batch["labels"].numel()

    def empty(self) -> Batch:
        ids = torch.zeros(1, 2, dtype=torch.int64)
        return {"input_ids": ids, "position_ids": torch.arange(2)[None], "labels": torch.full_like(ids, IGNORE)}

    def score(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: list[Row], cfg: EvaluationConfig
    ) -> Scores:
        return score(model, tokenizer, rows, cfg)


def score(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: list[Row], cfg: EvaluationConfig
) -> Scores:
    """Loss of every record and, if asked, the text that `model` generates greedily from its prompt."""
    model.eval()
    return with_answers(Scores(*losses(model, rows, cfg.batch_size)), model, tokenizer, rows, cfg)


def with_answers(
    scores: Scores,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: list[Row],
    cfg: EvaluationConfig,
) -> Scores:
    """`scores` and, if asked for, the texts that `model` generates greedily from the prompts of `rows`."""
    if cfg.generate:
        scores.add_generated(generate(model, tokenizer, rows, cfg), [row["target"] for row in rows])
    return scores


@torch.inference_mode()
def losses(model: "PreTrainedModel", rows: list[Row], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss and supervised tokens of each row, of which those of like length share a batch; each has its own
    where the model does not say of a padded record what it says of the record alone."""
    found, counts = np.zeros(len(rows)), np.zeros(len(rows))
    if len(rows) > 1 and model not in _alone:
        _alone[model] = padding_obstacle(model) is not None
    if _alone.get(model):
        batch_size = 1
    waiting = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    while waiting:
        longest = len(rows[waiting[:batch_size][-1]]["input_ids"])
        fit = max(1, min(batch_size, SCORED_TOKENS // longest))
        part, waiting = waiting[:fit], waiting[fit:]
        columns = {name: [rows[i][name] for i in part] for name in ("input_ids", "labels")}
        batch = {name: tensor.to(model.device) for name, tensor in packed_row(columns).items()}
        record = (batch["position_ids"][0] == 0).cumsum(0) - 1
        record = record[1:][batch["labels"][0, 1:] != IGNORE].cpu()
        each = token_losses(model, batch).double().cpu()
        found[part] = torch.zeros(len(part), dtype=torch.float64).index_add(0, record, each).numpy()
        counts[part] = torch.bincount(record, minlength=len(part)).numpy()
    return found, counts
