"""SEQ_CLS: a label for a text, or for a pair of texts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from ftray.config import DataConfig, EvaluationConfig
from ftray.data.shapes import ANY, Record, Shape, as_text, number
from ftray.data.tokens import Tokens
from ftray.errors import UserError, near
from ftray.evaluation.metrics import Scores, macro_f1, ratio
from ftray.tasks import task
from ftray.tasks.task import Batch, Row, encode, types_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """A record: its text, the second one of a pair, and its label."""

    text: str
    pair: str | None
    label: str
    where: object


NEEDS = "text and label (and text_pair for pairs)"


def _labelled(first: str, label: str, second: str = "", may_be_single: bool = False) -> Shape:
    """A shape of a text, or a pair of texts, and its label; their keys."""

    def parse(record: Record, where: object) -> Example:
        pair = text_of(record, second, where, NEEDS) if second and record.get(second) is not None else None
        if pair is not None:
            _refuse_score(record.get(label), (first, second, label), where)
        return Example(
            text_of(record, first, where, NEEDS), pair, _one_label(record.get(label), label, first, where), where
        )

    pair, single = (first, second, label), (first, label)
    keys, optional = (single, (second,)) if may_be_single or not second else (pair, ())
    fits = None if label == "label" else lambda record: _is_label(record[label])
    name = "labelled pair" if second and not may_be_single else "labelled text"
    refused = ANY | {other: "ftray learns one label a text: give it as label" for other in LABELS if other != label}
    return Shape(name, keys, parse, optional, refused, SECOND, fits)


def _refuse_score(value: object, keys: tuple[str, str, str], where: object) -> None:
    """Raise the UserError about a label that says how like two texts are, as those of STS-B from 0 to 5."""
    if isinstance(score := number(value), float) and not score.is_integer():
        first, second, label = keys
        raise UserError(
            f"{where}: {label} is {score:g}, a score and no class: to learn how like the texts are, give "
            f"--data.fields 'sentence1: {first}, sentence2: {second}, score: \"{{{{ {label} | float / 5 }}}}\"', "
            "with the highest score in place of 5"
        )


def _is_label(value: object) -> bool:
    return isinstance(value, str | int) or (isinstance(value, list) and bool(value) and isinstance(value[0], str | int))


def _one_label(value: object, key: str, text: str, where: object) -> str:
    if isinstance(value, list) and len(value) > 1:
        raise UserError(
            f"{where}: {key} holds {len(value)} labels: ftray learns one label a text: say which one, as the first by "
            f"--data.fields '{text}: {text}, label: {key}.0'"
        )
    return label_of(value[0] if isinstance(value, list) and value else value, key, where)


LABELS = ("label", "labels")
TEXTS = ("text", "sentence", "content", "review", "comment", "tweet", "headline", "utterance", "title")
PAIRS = (
    *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence")),
    *(("text1", "text2"), ("text_a", "text_b"), ("query", "passage"), ("query", "document"), ("claim", "evidence")),
    *(("question", "passage"), ("sentence_A", "sentence_B"), ("sentence", "question")),
)
# a second text, as others name it
SECOND = (
    *(
        "text",
        "text2",
        "text_2",
        "text_b",
        "sentence",
        "sentence1",
        "sentence2",
        "premise",
        "hypothesis",
        "question",
        "query",
    ),
    *("context", "document", "passage", "prompt", "instruction", "input", "output", "completion", "response", "answer"),
    *("aspect", "messages", "conversations"),
)


class Task(task.PaddedTask):
    """Cross-entropy of a linear layer over the model's summary of the text; one item a record."""

    auto_class = "AutoModelForSequenceClassification"
    pipeline_tag = "text-classification"
    metrics: ClassVar[Mapping[str, str]] = {"loss": "min", "accuracy": "max", "macro_f1": "max"}
    metric = "macro_f1"
    has_labels = True
    min_label_count = 2
    by_token = False
    shapes = (
        *(_labelled(first, label, second) for first, second in PAIRS for label in LABELS),
        *(_labelled("text", label, "text_pair", may_be_single=True) for label in LABELS),
        *(_labelled("text", label) for label in ("sentiment", "intent", "emotion")),
        *(_labelled(text, label) for text in TEXTS[1:] for label in LABELS),
        _labelled("text", "label", "text_pair", may_be_single=True),  # takes the rest, and says what they lack
    )
    record_keys = NEEDS
    usage_example = "python -c \"import transformers as t; print(t.pipeline('text-classification', '{path}')('TEXT'))\""

    def labels(self, example: Example) -> list[str]:
        return [example.label]

    def shape(self, example: Example) -> str:
        return "no text_pair" if example.pair is None else "a text_pair"

    def tokenize(
        self, examples: list[Any], tokenizer: "PreTrainedTokenizerBase", cfg: DataConfig
    ) -> list[Tokens | None]:
        pairs = [e.pair for e in examples] if examples[0].pair is not None else None
        encoded, cut = encode([e.text for e in examples], pairs, tokenizer, cfg)
        result: list[Tokens | None] = []
        for i, (example, too_long) in enumerate(zip(examples, cut, strict=True)):
            label = index(example.label, self.spec.labels, example.where)
            ids, shown = list(encoded["input_ids"][i]), f"{example.text}\n{example.pair or ''}".strip()
            tokens = Tokens(ids, [label], shown, example.label, len(ids), too_long, types_of(encoded, i))
            result.append(None if too_long and cfg.overlong == "drop" else tokens)
        return result

    def logits(self, model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
        return self.forward(model, batch)["logits"].float()

    def loss(self, model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
        return F.cross_entropy(self.logits(model, batch), batch["labels"][:, 0], reduction="sum")

    def read(self, model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
        """Float32 [texts, classes]: the probability of each class."""
        return torch.softmax(self.logits(model, batch), -1)

    @torch.inference_mode()
    def score(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: list[Row], cfg: EvaluationConfig
    ) -> Scores:
        loss, predicted = np.zeros(len(rows)), np.zeros(len(rows), int)
        for part, batch in self.batches(model, rows, cfg.batch_size):
            logits = self.logits(model, batch)
            loss[part] = F.cross_entropy(logits, batch["labels"][:, 0], reduction="none").double().cpu().numpy()
            predicted[part] = logits.argmax(-1).cpu().numpy()
        wanted = np.array([row["labels"][0] for row in rows])
        each = np.ones(len(rows))
        metrics = {
            "accuracy": ratio((predicted == wanted).astype(float), each),
            "macro_f1": macro_f1(wanted, predicted),
        }
        return Scores(loss, each, generated=[self.spec.labels[i] for i in predicted], metrics=metrics, of_text=False)


def text_of(record: Record, key: str, where: object, needs: str) -> str:
    """A field that must hold text.

    Raises:
        UserError: it is missing, of another type, or empty.
    """
    if record.get(key) is None:
        raise UserError(f"{where}: {key} is missing; records of this task hold {needs}")
    text = as_text(record[key], key, where)
    if not text.strip():
        raise UserError(f"{where}: {key} is empty")
    return text


def label_of(value: object, key: str, where: object) -> str:
    """A class name: text or a whole number.

    Raises:
        UserError: it is missing or something else.
    """
    if value is None or value == "":
        raise UserError(f"{where}: {key} is missing")
    if isinstance(value, float) and value.is_integer():  # as CSV and JSON readers may give it
        value = int(value)
    if isinstance(value, float):
        raise UserError(
            f"{where}: {key} is {value}, and ftray learns classes, not numbers (regression): give texts or whole "
            "numbers; or give a score of two texts, as by --data.fields 'sentence1: sentence1, sentence2: sentence2, "
            "score: "
            f'"{{{{ {key} / 5 }}}}"\''
        )
    if not isinstance(value, str | int):
        raise UserError(f"{where}: {key} must be text or a whole number, not {type(value).__name__}")
    return str(value)


def index(label: str, labels: tuple[str, ...], where: object) -> int:
    """The class of a label.

    Raises:
        UserError: it is none of the training records'.
    """
    try:
        return labels.index(label)
    except ValueError:
        raise UserError(f"{where}: label {label!r} is in no training record{near(label, labels)}") from None
