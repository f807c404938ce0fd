"""What objectives over preferred and rejected answers have in common."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ftray.config import EvaluationConfig
from ftray.data.preference import PairTask
from ftray.data.shards import REFERENCE
from ftray.evaluation.metrics import Scores, ratio
from ftray.models.next_token import packed_row
from ftray.task_spec import IGNORE
from ftray.tasks import causal
from ftray.tasks.objective import PREFIXES, Batch, Objective, text_of_each, text_sums, validation_metrics
from ftray.tasks.task import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ANSWER = "answer"  # float32 [1, S]: 1 where a supervised token is part of the answer; without it, all are


class PairObjective(Objective):
    """A loss of each pair, from the log-probabilities of its answers.

    A validation adds up: this loss; cross-entropy and tokens of the preferred answers; the pairs that are ranked as
    people ranked them, ties as a half; the margins by which.
    """

    reported = ("loss", "perplexity", "objective", "preference_accuracy", "margin")
    totals = 5

    @staticmethod
    def rewards(log_probabilities: torch.Tensor, counts: torch.Tensor, reference: torch.Tensor | None) -> torch.Tensor:
        """What answers are ranked by, in nats, [texts]: free of settings, so that runs can be compared.

        Args:
            log_probabilities: of each text's answer, float64 [texts], preferred and rejected in turn.
            counts: tokens of each answer, float64 [texts].
            reference: its log-probability before training, float64 [texts]; None: the objective needs none.
        """
        raise NotImplementedError

    def pair_losses(self, rewards: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The loss of each pair, [pairs], given rewards and tokens of its two answers, both [pairs, 2]."""
        raise NotImplementedError

    @property
    def sft_weight(self) -> float:
        """What the mean cross-entropy of the preferred texts' supervised tokens counts beside it."""
        return float(self.values.get("sft_weight", 0.0))

    def counts(self, batch: Batch) -> Sequence[float]:
        return [float((text_of_each(batch) % 2 == 0).sum())]

    def loss(self, losses: torch.Tensor, batch: Batch, counts: Sequence[float]) -> torch.Tensor:
        rewards, tokens, _ = self._pairs(losses, batch)
        pairs, supervised = counts  # means over these, of the whole step
        preferred = (text_of_each(batch) % 2 == 0).to(losses.device)
        supervised_loss = (losses * preferred).sum() * (pairs / max(1.0, supervised))
        return self.pair_losses(rewards, tokens).sum() + self.sft_weight * supervised_loss

    def sums(self, losses: torch.Tensor, batch: Batch) -> list[float]:
        rewards, tokens, log_probability = self._pairs(losses, batch)
        margins = rewards[:, 0] - rewards[:, 1]
        numbers = [self.pair_losses(rewards, tokens), -log_probability[:, 0], tokens[:, 0], right(margins), margins]
        return [number.sum().item() for number in numbers]

    def metrics(self, sums: Sequence[float], targets: float) -> dict[str, float]:
        objective, loss, tokens, ranked_right, margin = sums
        own = {"objective": objective / targets, "preference_accuracy": ranked_right / targets}
        own["margin"] = margin / targets
        return validation_metrics(loss, tokens) | {f"validation_{name}": value for name, value in own.items()}

    def _pairs(self, losses: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rewards, tokens and log-probabilities of the answers, each [pairs, 2]."""
        is_answer = batch[ANSWER][0].to(losses) if ANSWER in batch else torch.ones_like(losses)
        found, counts = text_sums(-losses * is_answer, batch), text_sums(is_answer, batch)
        reference = batch[REFERENCE][0].to(losses) if REFERENCE in batch else None
        rewards = self.rewards(found, counts, reference)
        return rewards.view(-1, 2), counts.view(-1, 2), found.view(-1, 2)


def compared_with(base: "PreTrainedModel", rows: list[Row], cfg: EvaluationConfig) -> list[Row]:
    """`rows` with what `base` says of their answers, computed as :func:`ftray.tasks.causal.losses` computes a score.

    That in the shards may differ by rounding, which would give the base preferences of its own.
    """
    loss, _ = causal.losses(base.eval(), [text for row in rows for text in texts_of(row)], cfg.batch_size)
    values = iter((-loss).tolist())
    return [row | {REFERENCE: [next(values) for _ in row["lengths"]]} for row in rows]


def right(margins: torch.Tensor) -> torch.Tensor:
    """1 where a margin is positive, a half where it is 0."""
    return (margins > 0).to(margins.dtype) + (margins == 0).to(margins.dtype) / 2


class Task(PairTask, causal.Task):
    """Two answers to a prompt, each in a text of its own of the packed row: preferred, rejected, preferred, ...

    A target is a pair. A batch holds `reference` too, float32 [1, texts], where the objective needs it.
    """

    metrics: ClassVar[Mapping[str, str]] = {"preference_accuracy": "max", "margin": "max", **causal.Task.metrics}
    metric = "preference_accuracy"
    columns: ClassVar[tuple[str, ...]] = ("input_ids", "labels", "lengths")
    objective: ClassVar[type[PairObjective]] = PairObjective
    space = "preference"

    def collate(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, torch.Tensor]:
        return collate(columns)

    def num_targets(self, batch: Mapping[str, torch.Tensor]) -> int:
        return int((batch["position_ids"] == 0).sum()) // 2

    def empty(self) -> dict[str, torch.Tensor]:
        nothing = {"input_ids": [[0] * 4], "labels": [[IGNORE] * 4], "lengths": [[2, 2]]}
        return self.collate(nothing | ({REFERENCE: [[0.0, 0.0]]} if REFERENCE in self.columns else {}))

    def score(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: list[Row], cfg: EvaluationConfig
    ) -> Scores:
        """Metrics of preference, and what supervised fine-tuning of the preferred answers is scored by."""
        model.eval()
        loss, counts = causal.losses(model, [text for row in rows for text in texts_of(row)], cfg.batch_size)
        reference = [row[REFERENCE] for row in rows] if REFERENCE in self.columns else None
        rewards = self.objective.rewards(
            -torch.from_numpy(loss),
            torch.from_numpy(counts),
            None if reference is None else torch.tensor(reference, dtype=torch.float64).flatten(),
        ).view(-1, 2)
        margins, each = rewards[:, 0] - rewards[:, 1], np.ones(len(rows))
        scores = Scores(loss[::2], counts[::2])
        scores.metrics = {
            "preference_accuracy": ratio(right(margins).numpy(), each),
            "margin": ratio(margins.numpy(), each),
        }
        scores = causal.with_answers(scores, model, tokenizer, rows, cfg)
        rejected = [json.loads(row["extra"])["rejected"] for row in rows]
        add_lengths(scores, tokenizer, {"chosen": [row["target"] for row in rows], "rejected": rejected})
        return scores


def add_lengths(scores: Scores, tokenizer: "PreTrainedTokenizerBase", texts: Mapping[str, Sequence[str]]) -> None:
    """Add the tokens of the generated answers, as the metric `answer_tokens` too, and those of the records' `texts`.

    Answers may come to be preferred for nothing but their length: these tell.
    """
    given = {"answer": scores.generated, **texts}
    scores.lengths = {
        name: np.array([len(tokenizer(text, add_special_tokens=False).input_ids) for text in own], float)
        for name, own in given.items()
        if own
    }
    if "answer" in scores.lengths:
        scores.metrics["answer_tokens"] = ratio(scores.lengths["answer"], np.ones(len(scores.generated)))


def collate(columns: Mapping[str, Sequence[Any]]) -> dict[str, torch.Tensor]:
    """Rows that hold two texts one after another, as a packed row of these texts, with what they have in common.

    With `reference` too, if it is given.

    Args:
        columns: `input_ids`, `labels` and the `lengths` of the texts, each with a sequence of numbers a row.
    """
    cuts = [np.cumsum(lengths)[:-1] for lengths in columns["lengths"]]
    texts = {
        name: [text for row, cut in zip(columns[name], cuts, strict=True) for text in np.split(np.asarray(row), cut)]
        for name in ("input_ids", "labels")
    }
    batch = packed_row(texts)
    batch[PREFIXES] = torch.tensor([[n for ids, labels in _pairs(texts) for n in (0, _common(ids, labels))]])
    if REFERENCE in columns:
        values = np.concatenate([np.asarray(row, np.float32) for row in columns[REFERENCE]])
        batch[REFERENCE] = torch.from_numpy(values)[None]
    return batch


def _pairs(texts: Mapping[str, Sequence[np.ndarray]]) -> Iterator[tuple[Sequence[np.ndarray], np.ndarray]]:
    """Ids of both texts, and labels of the second, of each pair."""
    ids, labels = texts["input_ids"], texts["labels"]
    yield from (((ids[i], ids[i + 1]), labels[i + 1]) for i in range(0, len(ids), 2))


def _common(ids: Sequence[np.ndarray], labels: np.ndarray) -> int:
    """How many first tokens two texts have in common, of which the second one's bear no loss."""
    shortest = min(map(len, ids))
    differs = (ids[0][:shortest] != ids[1][:shortest]) | (labels[:shortest] != IGNORE)
    return int(differs.argmax()) if differs.any() else shortest


def texts_of(row: Row) -> list[Row]:
    """The texts of a row, each as a row of its own."""
    ends = np.cumsum([0, *row["lengths"]])
    return [{name: row[name][first:last] for name in ("input_ids", "labels")} for first, last in pairwise(ends)]
