"""REWARD: a score for a text, higher for answers that people prefer; the reward model of RLHF.

Ouyang et al., Training language models to follow instructions (arXiv 2203.02155), section 3.5.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from ftray.config import EvaluationConfig
from ftray.data.preference import PairTask
from ftray.evaluation.metrics import Scores, ratio
from ftray.tasks import task
from ftray.tasks.preference import right
from ftray.tasks.task import Batch, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Task(PairTask, task.PaddedTask):
    """The loss of the margin between the scores of two answers (Bradley and Terry); one target a pair.

    A batch holds the preferred texts, then the rejected ones.
    """

    auto_class = "AutoModelForSequenceClassification"
    pipeline_tag = "text-classification"
    columns = ("input_ids", "lengths")
    metrics: ClassVar[Mapping[str, str]] = {"preference_accuracy": "max", "margin": "max", "loss": "min"}
    metric = "preference_accuracy"
    by_token = False
    usage_example = (
        "python -c \"import transformers as t; print(t.pipeline('text-classification', '{path}', "
        "function_to_apply='none')('TEXT'))\""
    )

    def collate(self, columns: Mapping[str, Sequence[Any]]) -> Batch:
        pairs = [
            np.split(np.asarray(ids), [first])
            for ids, (first, _) in zip(columns["input_ids"], columns["lengths"], strict=True)
        ]
        return self.below([pair[i] for i in (0, 1) for pair in pairs], [[]] * 2 * len(pairs))

    def empty(self) -> Batch:
        return self.collate({"input_ids": [[0, 0]], "lengths": [[1, 1]]})

    def num_targets(self, batch: Mapping[str, torch.Tensor]) -> int:
        return len(batch["input_ids"]) // 2

    def logits(self, model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
        return self.forward(model, batch)["logits"].float()

    def read(self, model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
        """Float32 [texts, 1]: the scores."""
        return self.logits(model, batch)

    def loss(self, model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
        return -F.logsigmoid(self._margins(model, batch)).sum()

    def _margins(self, model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
        """Float32 [pairs]."""
        preferred, rejected = self.logits(model, batch)[:, 0].chunk(2)
        return preferred - rejected

    @torch.inference_mode()
    def score(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: list[Row], cfg: EvaluationConfig
    ) -> Scores:
        margins = torch.zeros(len(rows))
        for part, batch in self.batches(model, rows, cfg.batch_size):
            margins[part] = self._margins(model, batch).cpu()
        each = np.ones(len(rows))
        metrics = {"preference_accuracy": ratio(right(margins).double().numpy(), each)}
        metrics["margin"] = ratio(margins.double().numpy(), each)
        return Scores(-F.logsigmoid(margins).double().numpy(), each, metrics=metrics, of_text=False)
