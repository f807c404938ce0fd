"""KTO: answers that are marked as good become likelier, and bad ones less likely, than before training.

Ethayarajh et al., KTO (arXiv 2402.01306).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ftray.config import EvaluationConfig
from ftray.data.preference import UnpairedTask
from ftray.data.shards import REFERENCE
from ftray.evaluation.answers import UNDESIRABLE
from ftray.evaluation.generation import generate
from ftray.evaluation.metrics import Scores, ratio
from ftray.models.next_token import packed_row
from ftray.task_spec import IGNORE
from ftray.tasks import causal, objective, preference
from ftray.tasks.objective import Batch, text_sums, validation_metrics
from ftray.tasks.task import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DESIRABLE = "desirable"  # float32 [1, texts]: 1 where people found the answer good, else 0
MISMATCHED = "mismatched_"  # before the columns of the rows that the divergence is estimated on


class Objective(objective.Objective):
    """The loss of each answer's log-ratio to the base, compared with the divergence from the base.

    That is estimated in each step, over all its records, by answers to other prompts (section 3.2 of the paper).
    A validation adds up: cross-entropy of all answers; that of the good ones, and their tokens; answers whose log-ratio
    has the right sign, 0 as a half; log-ratios and number of the good answers, and of the bad.
    """

    settings: ClassVar[Mapping[str, float | str]] = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    reported = ("loss", "perplexity", "preference_accuracy", "margin")
    totals = 8

    def estimated_on(self, batch: Batch) -> Batch:
        return {name.removeprefix(MISMATCHED): batch[name] for name in batch if name.startswith(MISMATCHED)}

    def estimates(self, losses: torch.Tensor, batch: Batch) -> Sequence[float]:
        return [self._rewards(losses, batch).sum().item()]

    def loss(self, losses: torch.Tensor, batch: Batch, counts: Sequence[float]) -> torch.Tensor:
        records, log_ratios = counts
        divergence, desirable = max(0.0, log_ratios / records), batch[DESIRABLE][0].to(losses)
        gains = (self._rewards(losses, batch) - divergence) * (2 * desirable - 1)
        good, bad = (float(self.values[name]) for name in ("desirable_weight", "undesirable_weight"))
        weights = good * desirable + bad * (1 - desirable)
        return (weights * (1 - torch.sigmoid(float(self.values["beta"]) * gains))).sum()

    def sums(self, losses: torch.Tensor, batch: Batch) -> list[float]:
        rewards, good = self._rewards(losses, batch), batch[DESIRABLE][0].to(losses)
        tokens, bad = text_sums(torch.ones_like(losses), batch), 1 - good
        numbers = [losses, text_sums(losses, batch) * good, tokens * good, preference.right(rewards * (good - bad))]
        return [number.sum().item() for number in (*numbers, rewards * good, good, rewards * bad, bad)]

    def metrics(self, sums: Sequence[float], targets: float) -> dict[str, float]:
        _, loss, tokens, ranked_right, good, goods, bad, bads = sums
        margin = good / max(1.0, goods) - bad / max(1.0, bads)
        own = {"validation_preference_accuracy": ranked_right / targets, "validation_margin": margin}
        return validation_metrics(loss, max(1.0, tokens)) | own

    @staticmethod
    def _rewards(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The log-ratio of each answer to the base, float64 [texts]."""
        return text_sums(-losses, batch) - batch[REFERENCE][0].to(losses)


class Task(UnpairedTask, causal.Task):
    """Answers that are good or bad; each record also has an answer to another prompt, which is not learnt from.

    A target is a record. A batch holds `reference` and `desirable`, float32 [1, texts], and with `mismatched_` before
    their names all columns of the other answers but `desirable`.
    """

    metrics: ClassVar[Mapping[str, str]] = {
        "preference_accuracy": "max",
        "margin": "max",
        "loss": "min",
        "perplexity": "min",
    }
    metric = "preference_accuracy"
    columns = ("input_ids", "labels", "lengths", "score", REFERENCE)
    objective = Objective
    space = "kto"
    generated: ClassVar[tuple[str, ...]] = ()  # what people found bad is nothing to compare an answer with

    def collate(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, torch.Tensor]:
        names = ("input_ids", "labels")
        texts: list[dict[str, list[Any]]] = [{name: [] for name in names}, {name: [] for name in names}]
        for i, (first, _) in enumerate(columns["lengths"]):
            for name in names:
                row = np.asarray(columns[name][i])
                texts[0][name].append(row[:first])
                texts[1][name].append(row[first:])
        own, other = (packed_row(part) for part in texts)
        reference = torch.from_numpy(np.stack([np.asarray(pair, np.float32) for pair in columns[REFERENCE]]))
        batch = own | {REFERENCE: reference[None, :, 0], DESIRABLE: torch.tensor(columns["score"]).float()[None]}
        return batch | {f"{MISMATCHED}{k}": v for k, v in {**other, REFERENCE: reference[None, :, 1]}.items()}

    def num_targets(self, batch: Mapping[str, torch.Tensor]) -> int:
        return int((batch["position_ids"] == 0).sum())

    def empty(self) -> dict[str, torch.Tensor]:
        nothing: dict[str, Any] = {"input_ids": [[0] * 4], "labels": [[IGNORE] * 4], "lengths": [[2, 2]]}
        return self.collate({**nothing, "score": [1.0], REFERENCE: [[0.0, 0.0]]})

    def compared_with(self, base: "PreTrainedModel", rows: list[Row], cfg: EvaluationConfig) -> list[Row]:
        return [self.as_shown(row) for row in preference.compared_with(base, rows, cfg)]

    def as_shown(self, row: Row) -> Row:
        is_bad = not row["score"] and UNDESIRABLE not in row
        return row | {"target": "", UNDESIRABLE: row["target"]} if is_bad else row

    def score(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: list[Row], cfg: EvaluationConfig
    ) -> Scores:
        """Metrics of preference, and cross-entropy of the good answers."""
        model.eval()
        texts = [preference.texts_of(row)[0] for row in rows]
        loss, counts = causal.losses(model, texts, cfg.batch_size)
        good = np.array([row["score"] for row in rows])
        rewards = -loss - np.array([row[REFERENCE][0] for row in rows])
        scores = Scores(loss * good, counts * good)
        scores.generated = generate(model, tokenizer, rows, cfg) if cfg.generate else []
        margins, each = torch.from_numpy(rewards * (2 * good - 1)), np.ones(len(rows))
        of_good, of_bad = ratio(rewards * good, good), ratio(rewards * (1 - good), 1 - good)
        scores.metrics = {
            "preference_accuracy": ratio(preference.right(margins).numpy(), each),
            "margin": lambda draws: of_good(draws) - of_bad(draws),
        }
        answers = [row.get(UNDESIRABLE) or row["target"] for row in rows]
        own = {
            name: [text for text, row in zip(answers, rows, strict=True) if row["score"] == i]
            for i, name in enumerate(["bad", "good"])
        }
        preference.add_lengths(scores, tokenizer, own)
        return scores
