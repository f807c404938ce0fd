"""FEATURE_EXTRACTION: vectors of texts, of which those that belong together lie close together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from ftray.config import DataConfig, EvaluationConfig
from ftray.data.shapes import ANY, Record, Shape, is_empty, number
from ftray.data.tokens import Tokens
from ftray.errors import UserError
from ftray.evaluation.metrics import Metric, Scores, ratio, spearman
from ftray.tasks import task
from ftray.tasks.sequence_labels import text_of
from ftray.tasks.task import Batch, Row, encode, types_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCALE = 20.0  # of a cosine, as sentence-transformers has it
PAIRS = {"loss": "min", "recall@1": "max", "recall@5": "max", "mrr": "max"}
SCORED = {"loss": "min", "spearman": "max"}


@dataclass(frozen=True)
class Example:
    """A record: an anchor, a text that belongs to it and perhaps one that doesn't; or two texts and their score."""

    texts: list[str]
    score: float | None
    where: object


NEEDS = "anchor and positive (and negative), or sentence1, sentence2 and score"


def _scored(record: Record, where: object) -> Example:
    texts = [text_of(record, key, where, NEEDS) for key in ("sentence1", "sentence2")]
    score = number(record.get("score"))
    if isinstance(score, bool) or not isinstance(score, int | float) or not -1 <= score <= 1:
        raise UserError(
            f"{where}: score must be a number from -1 to 1, like a cosine, not {score!r}: if 5 is the highest, give "
            "--data.fields 'sentence1: sentence1, sentence2: sentence2, score: \"{{ score | float / 5 }}\"'"
        )
    return Example(texts, float(score), where)


def _pair(record: Record, where: object) -> Example:
    for key, value in record.items():
        if key != "negative" and key.startswith(("negative", "hard_negative")) and not is_empty(value):
            raise UserError(f"{where}: {key}: ftray reads one negative a record: give it as negative")
    keys = ["anchor", "positive", *(["negative"] if record.get("negative") is not None else [])]
    return Example([text_of(record, key, where, NEEDS) for key in keys], None, where)


INSTRUCTED = ("instruction", "prompt")
REFUSED = ANY | dict.fromkeys(
    ("label", "score", "scores"),
    "ftray learns these pairs as all alike: give scored ones as sentence1, sentence2, score",
)


class Task(task.PaddedTask):
    """Cosines of mean-pooled last hidden states; one item a record.

    Pairs and triplets: cross-entropy of the right text among all positives and negatives of the *micro-batch*
    (multiple negatives ranking, arXiv 1705.00652; InfoNCE, arXiv 1807.03748); so `training.micro_batch` and the
    number of workers matter, as they do for no other task. Scored pairs: squared difference of cosine and score.

    A batch holds all texts below one another: the first of each record, then the second, then the third. Its `labels`
    (0 a record) count the records, `score` [records] is NaN where a record has none.
    """

    auto_class = "AutoModel"
    pipeline_tag = "sentence-similarity"
    columns = ("input_ids", "token_type_ids", "labels", "lengths", "score")
    metrics: ClassVar[Mapping[str, str]] = PAIRS | SCORED
    shapes = (
        Shape("scored pair", ("sentence1",), _scored, ("sentence2", "score"), beside=INSTRUCTED),
        Shape("pair", ("anchor", "positive"), _pair, ("negative",), REFUSED, INSTRUCTED),
    )
    record_keys = NEEDS
    usage_example = (
        "python -c \"import transformers as t; k = t.AutoTokenizer.from_pretrained('{path}'); m = t.AutoModel."
        "from_pretrained('{path}'); print(m(**k('TEXT', return_tensors='pt')).last_hidden_state.mean(1))\""
    )

    def choices(self, record: Mapping[str, Any]) -> tuple[Mapping[str, str], str]:
        return (SCORED, "spearman") if record.get("sentence1") is not None else (PAIRS, "mrr")

    def shape(self, example: Example) -> str:
        return "no score" if example.score is None else "a score"

    def tokenize(
        self, examples: list[Any], tokenizer: "PreTrainedTokenizerBase", cfg: DataConfig
    ) -> list[Tokens | None]:
        encoded, cut = encode([text for e in examples for text in e.texts], None, tokenizer, cfg)
        result: list[Tokens | None] = []
        at = 0
        for example in examples:
            own = range(at, at + len(example.texts))
            at = own.stop
            parts = [list(encoded["input_ids"][i]) for i in own]
            too_long = max(cut[i] for i in own)
            tokens = Tokens(
                [token for part in parts for token in part],
                [0],
                example.texts[0],
                example.texts[1],
                len(parts[0]),
                too_long,
                [kind for i in own for kind in types_of(encoded, i)],
                [len(part) for part in parts],
                float("nan") if example.score is None else example.score,
            )
            result.append(None if too_long and cfg.overlong == "drop" else tokens)
        return result

    def collate(self, columns: Mapping[str, Sequence[Any]]) -> Batch:
        cuts = [np.cumsum(lengths)[:-1] for lengths in columns["lengths"]]
        texts = {}
        for name in ("input_ids", "token_type_ids"):
            parts = [np.split(np.asarray(ids, np.int64), cut) for ids, cut in zip(columns[name], cuts, strict=True)]
            texts[name] = [own[k] for k in range(3) for own in parts if k < len(own)]
        batch = super().collate({**texts, "labels": columns["labels"]})
        return batch | {"score": torch.tensor(columns["score"], dtype=torch.float32)}

    def empty(self) -> Batch:
        none: dict[str, Any] = {"labels": [self.nothing], "lengths": [[2, 2]], "score": [float("nan")]}
        return self.collate({"input_ids": [[0] * 4], "token_type_ids": [[]], **none})

    def logits(self, model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
        """Last hidden states [texts, tokens, hidden size], without the tokens that a method puts before them."""
        hidden = self.forward(model, batch)["last_hidden_state"]
        return hidden[:, -batch["input_ids"].shape[1] :].float()

    def read(self, model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
        """Float32 [texts, hidden size], each of length 1: the mean of the last hidden states over the text's tokens."""
        hidden = self.logits(model, batch)
        mask = batch["attention_mask"][..., None].float()
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def loss(self, model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
        return (_losses(self.read(model, batch), batch["score"]) * (batch["labels"][:, 0] == 0)).sum()

    @torch.inference_mode()
    def score(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: list[Row], cfg: EvaluationConfig
    ) -> Scores:
        count, loss = len(rows), np.zeros(len(rows))
        vectors: list[list[np.ndarray]] = [[] for _ in rows]
        for part, batch in self.batches(model, rows, cfg.batch_size):
            embedded = self.read(model, batch)
            loss[part] = _losses(embedded, batch["score"]).double().cpu().numpy()
            texts = iter(embedded.cpu().numpy())
            for k in range(3):
                for i in part:
                    if k < len(rows[i]["lengths"]):
                        vectors[i].append(next(texts))
        first, second = (np.stack([own[k] for own in vectors]) for k in (0, 1))
        cosines, each = (first * second).sum(1), np.ones(count)
        if not np.isnan(rows[0]["score"]):
            metrics: dict[str, Metric] = {"spearman": spearman(np.array([row["score"] for row in rows]), cosines)}
            return Scores(loss, each, generated=[f"{c:.3f}" for c in cosines], metrics=metrics, of_text=False)
        others = np.stack([vector for own in vectors for vector in own[1:]])
        alike = first @ others.T
        place = (alike > cosines[:, None] + 1e-6).sum(1)  # equal texts are equally right
        metrics = {f"recall@{k}": ratio((place < k).astype(float), each) for k in (1, 5)}
        metrics["mrr"] = ratio(1 / (1 + place), each)
        texts_of = [row["target"] for row in rows]
        nearest = (first @ second.T).argmax(1)
        return Scores(loss, each, generated=[texts_of[i] for i in nearest], metrics=metrics, of_text=False)


def _losses(vectors: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """The loss of each record of a batch."""
    count = len(score)
    anchors, candidates = vectors[:count], vectors[count:]
    if not torch.isnan(score[0]):
        return ((anchors * candidates).sum(1) - score).square()
    wanted = torch.arange(count, device=vectors.device)
    return F.cross_entropy(SCALE * anchors @ candidates.T, wanted, reduction="none")
