"""TOKEN_CLS: a tag for every word of a text."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from ftray.config import DataConfig, EvaluationConfig
from ftray.data.shapes import ANY, Record, Shape, listed
from ftray.data.tokens import Tokens
from ftray.errors import UserError
from ftray.evaluation.metrics import Scores, ratio
from ftray.task_spec import IGNORE
from ftray.tasks import task
from ftray.tasks.sequence_labels import index, label_of
from ftray.tasks.task import Batch, Row, encode, types_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TAGS = ("tags", "ner_tags", "labels", "ner_labels", "ner", "pos_tags")  # the first that is there
OUTSIDE = ("O", "0")  # no entity; as a number, as CoNLL has it on the hub
SCHEME = ("B-", "I-", "E-", "S-", "L-", "U-")  # how tags of entities of several words begin


@dataclass(frozen=True)
class Example:
    """A record: words and as many tags."""

    words: list[str]
    tags: list[str]
    where: object


NEEDS = "tokens and as many tags"


def _tagged(words_key: str, tags_key: str) -> Shape:
    """A shape of a list of words and one of their tags; their keys."""

    def parse(record: Record, where: object) -> Example:
        words, tags = listed(record.get(words_key)), listed(record.get(tags_key))
        for key, value in ((words_key, words), (tags_key, tags)):
            if not isinstance(value, list) or not value:
                raise UserError(f"{where}: {key} must be a list that isn't empty; records of this task hold {NEEDS}")
        if len(words) != len(tags):
            raise UserError(f"{where}: {len(words)} {words_key}, but {len(tags)} {tags_key}: each token has one")
        for i, word in enumerate(words):
            if not isinstance(word, str) or not word.strip():
                raise UserError(f"{where}: {words_key}[{i}] must be text that isn't empty")
        return Example(words, [label_of(tag, f"{tags_key}[{i}]", where) for i, tag in enumerate(tags)], where)

    def fits(record: Record) -> bool:
        return isinstance(listed(record[words_key]), list) and isinstance(listed(record[tags_key]), list)

    return Shape("tagged words", (words_key, tags_key), parse, refuses=REFUSED, fits=fits)


REFUSED = (
    ANY
    | dict.fromkeys(("bbox", "bboxes", "boxes"), "ftray reads text alone, not where it stands: leave it out")
    | dict.fromkeys(("loss_mask", "label_mask"), "ftray learns all tags of a record: leave it out")
)


class Task(task.PaddedTask):
    """Cross-entropy of a linear layer over the first token of each word; one item a word."""

    auto_class = "AutoModelForTokenClassification"
    pipeline_tag = "token-classification"
    metrics: ClassVar[Mapping[str, str]] = {"loss": "min", "accuracy": "max", "entity_f1": "max"}
    metric = "entity_f1"
    has_labels = True
    shapes = (
        *(_tagged(words, tags) for words in ("tokens", "words") for tags in TAGS),
        _tagged("tokens", "tags"),  # takes the rest, and says what they lack
    )
    record_keys = NEEDS
    usage_example = (
        "python -c \"import transformers as t; print(t.pipeline('token-classification', '{path}')('TEXT'))\""
    )

    def labels(self, example: Example) -> list[str]:
        return example.tags

    def tokenize(
        self, examples: list[Any], tokenizer: "PreTrainedTokenizerBase", cfg: DataConfig
    ) -> list[Tokens | None]:
        if not tokenizer.is_fast:
            raise UserError(
                "TOKEN_CLS needs to know which token belongs to which word: take a model with tokenizer.json"
            )
        encoded, cut = encode([e.words for e in examples], None, tokenizer, cfg, is_split_into_words=True)
        result: list[Tokens | None] = []
        for i, (example, too_long) in enumerate(zip(examples, cut, strict=True)):
            classes = [index(tag, self.spec.labels, example.where) for tag in example.tags]
            ids, labels, last = list(encoded["input_ids"][i]), [], None
            for word in encoded.word_ids(i):
                labels.append(classes[word] if word is not None and word != last else IGNORE)
                last = word
            kept = (last_word(encoded.word_ids(i)) + 1) if any(label != IGNORE for label in labels) else 0
            tags = example.tags[:kept]
            tokens = Tokens(
                ids,
                labels,
                " ".join(example.words),
                " ".join(tags),
                len(ids),
                too_long,
                types_of(encoded, i),
                extra=json.dumps(tags),
            )
            result.append(None if not kept or (too_long and cfg.overlong == "drop") else tokens)
        return result

    def logits(self, model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
        """[records, tokens, classes], without the tokens that a method puts before them."""
        logits = self.forward(model, batch)["logits"]
        return logits[:, -batch["input_ids"].shape[1] :].float()

    def loss(self, model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
        logits = self.logits(model, batch)
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")

    def read(self, model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
        """Float32 [texts, tokens, classes]: the probability of each class."""
        return torch.softmax(self.logits(model, batch), -1)

    @torch.inference_mode()
    def score(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: list[Row], cfg: EvaluationConfig
    ) -> Scores:
        count = len(rows)
        loss, words, right = np.zeros(count), np.zeros(count), np.zeros(count)
        tags: list[list[str]] = [[] for _ in rows]
        for part, batch in self.batches(model, rows, cfg.batch_size):
            logits, labels = self.logits(model, batch), batch["labels"]
            each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").double()
            predicted, first = logits.argmax(-1), labels != IGNORE
            loss[part] = each.sum(1).cpu().numpy()
            words[part] = first.sum(1).cpu().numpy()
            right[part] = ((predicted == labels) & first).sum(1).cpu().numpy()
            for i, classes, here in zip(part, predicted, first, strict=True):
                tags[i] = [self.spec.labels[c] for c in classes[here].tolist()]
        found = [entities(own) for own in tags]
        wanted = [entities([self.spec.labels[c] for c in row["labels"] if c != IGNORE]) for row in rows]
        common = np.array([len(a & b) for a, b in zip(found, wanted, strict=True)], float)
        total = np.array([len(a) + len(b) for a, b in zip(found, wanted, strict=True)], float)
        metrics = {"accuracy": ratio(right, words), "entity_f1": ratio(2 * common, total)}
        return Scores(loss, words, generated=[" ".join(own) for own in tags], metrics=metrics, of_text=False)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Kind, first and last word of each entity, by seqeval's rules.

    A tag that isn't `O` (0, where tags are numbers) and has no prefix of a scheme (B-, I-, ...) is an entity of one
    word.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    return set(get_entities(["O" if tag in OUTSIDE else tag if tag.startswith(SCHEME) else f"S-{tag}" for tag in tags]))


def last_word(words: Sequence[int | None]) -> int:
    """The last word of which there is a token."""
    return max(word for word in words if word is not None)
