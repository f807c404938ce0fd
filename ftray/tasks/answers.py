"""QUESTION_ANS: the part of a text that answers a question."""

import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from ftray.config import DataConfig, EvaluationConfig
from ftray.data.shapes import ANY, Record, Shape, is_empty, number
from ftray.data.tokens import Tokens
from ftray.errors import UserError
from ftray.evaluation.metrics import Scores, ratio
from ftray.tasks import task
from ftray.tasks.sequence_labels import text_of
from ftray.tasks.task import Batch, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STRIDE = 0.25  # share of a window that overlaps with the next one
LONGEST = 30  # tokens of an answer, as in the SQuAD baselines
BEST = 20  # starts and ends that are tried


@dataclass(frozen=True)
class Example:
    """A record; `answers` are texts and where they start in `context`, none if it holds no answer."""

    question: str
    context: str
    answers: list[tuple[str, int]]
    where: object


@dataclass(frozen=True)
class Window:
    """What the model reads at once of a long context.

    Attributes:
        offsets: first and last character (exclusive) in the context of each token; None for other tokens.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    offsets: list[tuple[int, int] | None]


NEEDS = 'question, context and answers (a text, a list of texts or {"text": [...], "answer_start": [...]})'


def _parse(record: Record, where: object) -> Example:
    question, context = (text_of(record, key, where, NEEDS) for key in ("question", "context"))
    given = record.get("answers")
    if given is None and not is_empty(record.get("answer")):
        given = record["answer"]
        if isinstance(given, str) and not is_empty(start := record.get("answer_start")):
            given = {"text": [given], "answer_start": start if isinstance(start, list) else [number(start)]}
    if isinstance(given, list) and given and all(isinstance(answer, dict) for answer in given):
        given = {key: [answer.get(key) for answer in given] for key in ("text", "answer_start")}
    answers = list(_answers(given, context, where))
    impossible = number(record.get("is_impossible"))
    if not is_empty(impossible) and bool(impossible) == bool(answers):
        raise UserError(f"{where}: is_impossible is {impossible!r}, but there are {len(answers)} answers")
    return Example(question, context, answers, where)


def _answers(answers: object, context: str, where: object) -> Iterator[tuple[str, int]]:
    if isinstance(answers, str):
        answers = [answers]
    starts: Any
    if isinstance(answers, dict):
        texts, starts = answers.get("text"), answers.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise UserError(f"{where}: answers must hold text and answer_start, two lists of equal length")
    elif isinstance(answers, list):
        texts, starts = answers, [None] * len(answers)
    else:
        raise UserError(f"{where}: answers is missing; records of this task hold {NEEDS}")
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: an answer must be text that isn't empty; no answer is an empty list")
        found = context.find(text) if start is None else start
        if not isinstance(found, int) or found < 0 or context[found : found + len(text)] != text:
            place = "" if start is None else f" at character {start}"
            raise UserError(f"{where}: the answer {text[:40]!r} is not in the context{place}")
        yield text, found


LOST = (
    ANY
    | dict.fromkeys(("choices", "options"), "ftray learns answers that stand in the context: leave it out")
    | dict.fromkeys(("history", "questions"), "ftray reads one question a record: put the others into context")
)
REFUSED = LOST | {"answer_start": 'give it in answers, as {"text": [...], "answer_start": [...]}'}


class Task(task.PaddedTask):
    """Cross-entropy of the answer's first and last token; two items a record.

    A context that is too long is read in overlapping windows: training takes the first one that holds the whole
    answer, prediction the best span of all. No answer is a span of the first token alone, as in SQuAD 2
    (https://arxiv.org/abs/1806.03822).
    """

    auto_class = "AutoModelForQuestionAnswering"
    pipeline_tag = "question-answering"
    metrics: ClassVar[Mapping[str, str]] = {"loss": "min", "squad_em": "max", "squad_f1": "max"}
    metric = "squad_f1"
    shapes = (
        Shape(
            "question", ("question", "context", "answer"), _parse, ("is_impossible", "answer_start"), LOST, ("answers",)
        ),
        Shape("question", ("question", "context", "answers"), _parse, ("is_impossible",), REFUSED),
    )
    record_keys = NEEDS
    nothing: ClassVar[list[int]] = [-100, -100]
    usage_example = (
        "python -c \"import transformers as t; k = t.AutoTokenizer.from_pretrained('{path}'); "
        "m = t.AutoModelForQuestionAnswering.from_pretrained('{path}'); "
        "print(m(**k('QUESTION', 'CONTEXT', return_tensors='pt')))\""
    )

    def tokenize(
        self, examples: list[Any], tokenizer: "PreTrainedTokenizerBase", cfg: DataConfig
    ) -> list[Tokens | None]:
        if not tokenizer.is_fast:
            raise UserError("QUESTION_ANS needs to know where a token stands: take a model with tokenizer.json")
        return [self._tokens(example, tokenizer, cfg) for example in examples]

    def _tokens(self, example: Example, tokenizer: "PreTrainedTokenizerBase", cfg: DataConfig) -> Tokens | None:
        found = windows(example.question, example.context, tokenizer, cfg.longest)
        if len(found) > 1 and cfg.overlong == "drop":
            return None
        whole = len(tokenizer(example.question, example.context)["input_ids"]) if len(found) > 1 else 0
        text, start = example.answers[0] if example.answers else ("", 0)
        for window in found:
            span = span_of(window, start, start + len(text)) if text else (0, 0)
            if span:
                extra = {"question": example.question, "context": example.context, "max_length": cfg.longest}
                return Tokens(
                    window.input_ids,
                    list(span),
                    f"{example.context}\n{example.question}",
                    text,
                    len(window.input_ids),
                    whole,
                    window.token_type_ids,
                    extra=json.dumps(extra | {"answers": [text for text, _ in example.answers]}),
                )
        return None  # no window holds the whole answer

    def logits(self, model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
        """[records, 2, tokens]: start and end, -inf at padding; without the tokens that a method puts before them."""
        output = self.forward(model, batch)
        logits = torch.stack([output["start_logits"], output["end_logits"]], 1).float()
        logits = logits[..., -batch["input_ids"].shape[1] :]
        return logits.masked_fill(batch["attention_mask"][:, None] == 0, -torch.inf)

    def loss(self, model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
        logits = self.logits(model, batch)
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")

    @torch.inference_mode()
    def score(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: list[Row], cfg: EvaluationConfig
    ) -> Scores:
        loss = np.zeros(len(rows))
        for part, batch in self.batches(model, rows, cfg.batch_size):
            each = F.cross_entropy(self.logits(model, batch).transpose(1, 2), batch["labels"], reduction="none")
            loss[part] = each.double().sum(1).cpu().numpy()
        extras = [json.loads(row["extra"]) for row in rows]
        answers = self._predict(model, tokenizer, extras, cfg)
        golds = [extra["answers"] or [""] for extra in extras]
        pairs = list(zip(answers, golds, strict=True))
        exact = np.array([max(float(normalised(a) == normalised(g)) for g in gold) for a, gold in pairs])
        f1 = np.array([max(word_f1(a, g) for g in gold) for a, gold in pairs])
        ones = np.ones(len(rows))
        metrics = {"squad_em": ratio(exact, ones), "squad_f1": ratio(f1, ones)}
        return Scores(loss, 2 * ones, generated=answers, metrics=metrics, of_text=False)

    def _predict(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", extras: list[Any], cfg: EvaluationConfig
    ) -> list[str]:
        owned = [
            (i, w)
            for i, e in enumerate(extras)
            for w in windows(e["question"], e["context"], tokenizer, e["max_length"])
        ]
        rows = [
            {"input_ids": w.input_ids, "token_type_ids": w.token_type_ids, "labels": self.nothing} for _, w in owned
        ]
        best = [(-np.inf, "")] * len(extras)
        nothing = [np.inf] * len(extras)  # the least that any window gives to no answer
        for part, batch in self.batches(model, rows, cfg.batch_size):
            for place, logits in zip(part, self.logits(model, batch).cpu().numpy(), strict=True):
                i, window = owned[place]
                nothing[i] = min(nothing[i], float(logits[:, 0].sum()))
                value, (first, end) = best_span(window, logits)
                if value > best[i][0]:
                    best[i] = value, extras[i]["context"][first:end]
        unanswerable = any(not extra["answers"] for extra in extras)
        return [
            "" if unanswerable and none > value else text for (value, text), none in zip(best, nothing, strict=True)
        ]


def windows(question: str, context: str, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[Window]:
    """The context, cut into overlapping parts that fit beside the question."""
    longest = min(max_length, tokenizer.model_max_length)
    room = longest - len(tokenizer(question, "")["input_ids"])
    if room < 2:
        raise UserError(f"data.max_length {max_length}: the question {question[:40]!r} alone is as long: raise it")
    encoded = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=longest,
        stride=int(room * STRIDE),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids="token_type_ids" in tokenizer.model_input_names,
    )
    result = []
    for i, ids in enumerate(encoded["input_ids"]):
        of = zip(encoded["offset_mapping"][i], encoded.sequence_ids(i), strict=True)
        offsets = [tuple(offset) if sequence == 1 else None for offset, sequence in of]
        result.append(Window(list(ids), task.types_of(encoded, i), offsets))
    return result


def span_of(window: Window, start: int, end: int) -> tuple[int, int] | None:
    """First and last token of characters `start` to `end` of the context; None if the window lacks a part of them."""
    inside = [(i, o) for i, o in enumerate(window.offsets) if o and o[0] < end and o[1] > start]
    if not inside or inside[0][1][0] > start or inside[-1][1][1] < end:
        return None
    return inside[0][0], inside[-1][0]


def best_span(window: Window, logits: np.ndarray) -> tuple[float, tuple[int, int]]:
    """The greatest sum of a start and an end logit, and the characters of the context between them."""
    inside = np.array([i for i, offset in enumerate(window.offsets) if offset])
    starts, ends = (inside[np.argsort(-row[inside])[:BEST]] for row in logits)
    spans = [(float(logits[0, s] + logits[1, e]), s, e) for s in starts for e in ends if s <= e < s + LONGEST]
    value, s, e = max(spans, default=(-np.inf, inside[0], inside[0]))
    first, last = window.offsets[s], window.offsets[e]
    assert first
    assert last
    return value, (first[0], last[1])


def normalised(text: str) -> str:
    """Lower case without punctuation, articles and extra white space, as SQuAD compares (arXiv 1606.05250)."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def word_f1(answer: str, wanted: str) -> float:
    """F1 of the words that two texts share; SQuAD's definition."""
    a, b = normalised(answer).split(), normalised(wanted).split()
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))
