"""The proof, made again on what was exported: the adapter's answers and losses against those of the file."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ftray.evaluation.answers import Answered, side_by_side
from ftray.evaluation.generation import generate_tokens
from ftray.evaluation.metrics import Scores, compare
from ftray.models.stops import answer_text, before_stop, stop_tokens
from ftray.task_spec import IGNORE
from ftray.tasks.causal import losses

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ftray.config import EvaluationConfig

Row = dict[str, Any]
TIE = 0.02  # nats: what products in float16 may move, and no more; nearer than that, two tokens are equally likely


class ExportFailed(Exception):
    """What was to be written can't be, or does not do what the adapter does: one line that says why."""


@dataclass(frozen=True)
class Question:
    """A test record for a runtime that knows token ids alone.

    Attributes:
        ids: of prompt and target.
        prompt_tokens: of `ids`, how many are the prompt.
        learnt: places in `ids` whose tokens bear loss.
    """

    ids: list[int]
    prompt_tokens: int
    learnt: list[int]


@dataclass(frozen=True)
class Reply:
    """What a model makes of a question.

    Attributes:
        ids: of its likeliest continuation, without the token that ends it.
        ended: whether it ended of itself, not because it was long enough.
        loss: cross-entropy, in nats, summed over `Question.learnt`.
    """

    ids: list[int]
    ended: bool
    loss: float


# runs what was written: questions, the tokens that end an answer, and the most tokens that one may have
Measure = Callable[[Sequence[Question], list[int], int], list[Reply]]


def question(row: Row) -> Question:
    """A row of the shards; of a pair of answers, the preferred one."""
    ids, labels = list(row["input_ids"]), list(row["labels"])
    if lengths := row.get("lengths"):
        ids, labels = ids[: lengths[0]], labels[: lengths[0]]
    learnt = [at for at, label in enumerate(labels) if at and label != IGNORE]
    return Question(ids, row["prompt_tokens"], learnt)


def replies_of(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    cfg: "EvaluationConfig",
    questions: Sequence[Question],
    stops: list[int],
) -> list[Reply]:
    """What a model of transformers makes of `questions`."""
    prompts = [q.ids[: q.prompt_tokens] for q in questions]
    answers = generate_tokens(model.eval(), tokenizer, prompts, cfg, stops)
    learnt = [i for i, asked in enumerate(questions) if asked.learnt]
    scored = [{"input_ids": questions[i].ids, "labels": _labels(questions[i])} for i in learnt]
    loss = dict(zip(learnt, losses(model, scored, cfg.batch_size)[0], strict=True)) if scored else {}
    return [
        Reply(before_stop(ids, stops), any(token in stops for token in ids), float(loss.get(i, 0.0)))
        for i, ids in enumerate(answers)
    ]


class Reference:
    """The adapter itself, in float32, on the records that all exports of it are held against.

    Args:
        model: base and adapter.
        rows: test records.
        cfg: how long answers may be.
    """

    def __init__(
        self,
        model: "PeftModel",
        tokenizer: "PreTrainedTokenizerBase",
        rows: list[Row],
        cfg: "EvaluationConfig",
    ):
        self.model, self.tokenizer, self.rows, self.cfg = model, tokenizer, rows, cfg
        self.stops = stop_tokens(tokenizer, model.config, model.generation_config)
        self.questions = [question(row) for row in rows]
        self.replies = replies_of(model, tokenizer, cfg, self.questions, self.stops)

    @torch.inference_mode()
    def log_probs(self, ids: list[int]) -> torch.Tensor:
        """Of the token after `ids`, float32 [vocabulary]."""
        logits: torch.Tensor = self.model(input_ids=torch.tensor([ids], device=self.model.device)).logits
        return logits[0, -1].float().log_softmax(-1).cpu()

    def preference(self, index: int, other: Reply) -> float:
        """How much likelier, in nats, the adapter's own token is where an answer first departs from it; 0: nowhere.

        Args:
            index: of the record.
        """
        own = self.replies[index]
        if (own.ids, own.ended) == (other.ids, other.ended):
            return 0.0
        pairs = enumerate(zip(own.ids, other.ids, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(own.ids), len(other.ids)))
        asked = self.questions[index]
        found = self.log_probs(asked.ids[: asked.prompt_tokens] + own.ids[:at])
        return self._of(found, own, at) - self._of(found, other, at)

    def _of(self, log_probs: torch.Tensor, reply: Reply, at: int) -> float:
        if at < len(reply.ids):
            return float(log_probs[reply.ids[at]]) if reply.ids[at] < len(log_probs) else -np.inf
        return float(max(log_probs[token] for token in self.stops)) if self.stops else -np.inf

    def scores(self, replies: list[Reply]) -> Scores:
        """`replies` as the evaluation counts them."""
        tokens = np.array([len(q.learnt) for q in self.questions], float)
        found = Scores(np.array([reply.loss for reply in replies]), tokens)
        texts = [answer_text(self.tokenizer, reply.ids, self.stops) for reply in replies]
        found.add_generated(texts, [row["target"] or "" for row in self.rows])
        return found


@dataclass(frozen=True)
class Proof:
    """What came of it.

    Attributes:
        records: test records.
        equal: answers that are the adapter's, token for token.
        tied: others, which depart where the adapter held two tokens for equally likely (within `TIE`).
        metrics: see :func:`ftray.evaluation.metrics.compare`, with the adapter in the place of the base.
        loss_increase: of the loss, in nats a token.
        answers: of both, side by side.
    """

    records: int
    equal: int
    tied: int
    metrics: dict[str, Any]
    loss_increase: float
    answers: list[Answered]

    def summary(self) -> dict[str, Any]:
        """For `proof.json`."""
        return {name: value for name, value in asdict(self).items() if name != "answers"}


def prove(reference: Reference, measure: Measure, max_loss_increase: float | None) -> Proof:
    """Ask what was exported the questions of `reference`, and compare.

    Args:
        max_loss_increase: in nats a token, that a coarser precision may cost; None: none, and all answers must be the
            adapter's.

    Raises:
        ExportFailed: it answers in other words than the adapter, or loses more.
    """
    replies = measure(reference.questions, reference.stops, reference.cfg.max_new_tokens)
    preferences = [reference.preference(i, reply) for i, reply in enumerate(replies)]
    equal = sum((a.ids, a.ended) == (b.ids, b.ended) for a, b in zip(reference.replies, replies, strict=True))
    own, found = reference.scores(reference.replies), reference.scores(replies)
    learnt = max(1.0, own.tokens.sum())
    loss_increase = float((found.loss.sum() - own.loss.sum()) / learnt)
    tied = sum(preference <= TIE for preference in preferences) - equal
    worst = int(np.argmax(preferences))
    if max_loss_increase is None and preferences[worst] > TIE:
        raise ExportFailed(
            f"what was written answers record {worst} of the test with {found.generated[worst]!r}, and the adapter "
            f"with {own.generated[worst]!r}: {len(replies) - equal - tied} of {len(replies)} answers differ"
        )
    if max_loss_increase is None and not abs(loss_increase) <= TIE:
        raise ExportFailed(
            f"what was written has a loss that differs by {loss_increase:.4f} nats a token from that of the adapter"
        )
    if max_loss_increase is not None and not loss_increase <= max_loss_increase:
        raise ExportFailed(
            f"what was written loses {loss_increase:.4f} nats a token on {len(replies)} test records, more than "
            f"{max_loss_increase:g}: take a finer --precision, or allow it by --export.max_loss_increase"
        )
    return Proof(
        len(replies),
        equal,
        tied,
        compare(own, found, reference.cfg.bootstrap),
        loss_increase,
        side_by_side(reference.rows, {"adapter": own, "export": found}),
    )


def prove_scores(own: Scores, found: Scores, rows: list[Row], resamples: int) -> Proof:
    """Compare what a task that answers in no words of its own makes of the adapter and of what was exported.

    Raises:
        ExportFailed: a metric differs.
    """
    values, others = own.values(), found.values()
    for name, value in values.items():
        if not abs(value - others[name]) <= TIE:
            raise ExportFailed(
                f"what was written has a {name} of {others[name]:.4f} on {len(rows)} test records, "
                f"the adapter {value:.4f}"
            )
    equal = sum(a == b for a, b in zip(own.generated, found.generated, strict=True)) if own.generated else len(rows)
    loss_increase = others.get("loss", 0.0) - values.get("loss", 0.0)
    answers = side_by_side(rows, {"adapter": own, "export": found})
    return Proof(len(rows), equal, 0, compare(own, found, resamples), loss_increase, answers)


def _labels(asked: Question) -> list[int]:
    learnt = set(asked.learnt)
    return [token if at in learnt else IGNORE for at, token in enumerate(asked.ids)]
