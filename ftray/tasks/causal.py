"""CAUSAL_LM: text that goes on from a prompt; records lie packed in one row."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ftray.config import DataConfig, EvaluationConfig
from ftray.data import records
from ftray.data.loader import collate
from ftray.data.tokens import IGNORE, Tokens, tokenize
from ftray.evaluation.metrics import Scores
from ftray.tasks import task
from ftray.tasks.next_token import score, supervised_loss, supervised_tokens
from ftray.tasks.task import Batch, Row


class Task(task.Task):
    """See :mod:`ftray.data.tokens`, :func:`ftray.data.loader.collate` and :mod:`ftray.tasks.next_token`."""

    auto_class = "AutoModelForCausalLM"
    pipeline_tag = "text-generation"
    packed = True
    metrics: ClassVar[Mapping[str, str]] = {**task.TEXT, "token_error_rate": "min", "character_error_rate": "min"}
    shapes = records.SHAPES
    record_keys = records.KNOWN
    usage_example = "ftray serve --run {run}"
    pad = True  # whoever has tried a model may find that it keeps the records of one row apart

    def tokenize(self, examples: list[Any], tokenizer: Any, cfg: DataConfig) -> list[Tokens | None]:
        return tokenize(examples, tokenizer, cfg)

    def collate(self, columns: Mapping[str, Sequence[Any]]) -> Batch:
        return collate(columns)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return supervised_loss(model, batch, self.pad)

    def num_targets(self, batch: Mapping[str, torch.Tensor]) -> int:
        return supervised_tokens(batch)

    def tokens(self, batch: Mapping[str, torch.Tensor]) -> int:
        return batch["labels"].numel()

    def empty(self) -> Batch:
        ids = torch.zeros(1, 2, dtype=torch.int64)
        return {"input_ids": ids, "position_ids": torch.arange(2)[None], "labels": torch.full_like(ids, IGNORE)}

    def score(self, model: Any, tokenizer: Any, rows: list[Row], cfg: EvaluationConfig) -> Scores:
        return score(model, tokenizer, rows, cfg)
