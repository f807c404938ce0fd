"""What a task has to say, in the order in which a record goes through it."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ftray.config import DataConfig, EvaluationConfig
from ftray.data.record_task import RecordTask
from ftray.evaluation.metrics import Scores
from ftray.models.probe import shared_passes
from ftray.task_spec import IGNORE
from ftray.tasks.objective import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Batch = dict[str, torch.Tensor]
Row = dict[str, Any]  # a row of the shards
Passes = tuple[Literal["all", "equal", "none"], str | None]
GENERATED = ("exact_match", "rouge_l", "chrf", "token_error_rate", "character_error_rate")
TEXT = {"loss": "min", "perplexity": "min", "exact_match": "max", "rouge_l": "max", "chrf": "max"}


_passes: WeakKeyDictionary[Any, Passes] = WeakKeyDictionary()  # by model: tried once


class Task(RecordTask):
    """One task, with the model that learns it.

    Attributes:
        auto_class: of transformers, that loads the model with the right head.
        pipeline_tag: how the hub names the task.
        columns: of the shards, that :meth:`collate` takes.
        packed: whether records lie one after another in a single row, without padding.
        pad: of a packed task, whether :meth:`loss` gives each record a row of its own; who has tried a model may find
            that it keeps the records of one row apart.
        metrics: what may be searched for (as `validation_<name>`), and which way is better.
        metric: that is searched for unless the user says otherwise.
        objective: what a run minimises.
        space: of `search_spaces/`, that is searched unless the user names one.
        generated: those of `metrics` that `evaluation.generate` gives.
        usage_example: a line of shell that uses the result; {path} is the merged model's directory, {run} the search's.
    """

    auto_class: ClassVar[str]
    pipeline_tag: ClassVar[str]
    columns: ClassVar[tuple[str, ...]] = ("input_ids", "labels")
    packed: ClassVar[bool] = False
    pad: bool = True
    metrics: ClassVar[Mapping[str, str]]
    metric: ClassVar[str] = "loss"
    generated: ClassVar[tuple[str, ...]] = ()
    usage_example: ClassVar[str]
    objective: ClassVar[type[Objective]] = Objective
    space: ClassVar[str] = "quick"

    def choices(self, record: Mapping[str, Any]) -> tuple[Mapping[str, str], str]:
        """`metrics` and `metric` for records like this first one."""
        return self.metrics, self.metric

    @abstractmethod
    def collate(self, columns: Mapping[str, Sequence[Any]]) -> Batch:
        """A micro-batch of the records whose `columns` are given, a sequence of lists or numbers each."""

    @abstractmethod
    def loss(self, model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
        """Loss *summed* over the supervised items of `batch`; a float32 scalar. That of supervised fine-tuning."""

    def objective_loss(
        self, model: "PreTrainedModel", batch: Batch, objective: Objective, counts: Sequence[float]
    ) -> torch.Tensor:
        """What a run minimises, summed over the targets of `batch`; see :meth:`Objective.loss`."""
        return self.loss(model, batch)

    def sums(self, model: "PreTrainedModel", batch: Batch, objective: Objective) -> list[float]:
        """See :meth:`Objective.sums`."""
        return [self.loss(model, batch).item()]

    def estimates(self, model: "PreTrainedModel", batch: Batch, objective: Objective) -> Sequence[float]:
        """See :meth:`Objective.estimates`."""
        return ()

    def passes(self, model: "PreTrainedModel") -> Passes:
        """Which records that are padded may share a pass of `model`, and why not all."""
        return "all", None

    def num_targets(self, batch: Mapping[str, torch.Tensor]) -> int:
        """Supervised items (tokens, words, records) in `batch`: the loss of a step is the mean over all of them."""
        return int((batch["labels"] != IGNORE).sum())

    def tokens(self, batch: Mapping[str, torch.Tensor]) -> int:
        """Tokens in `batch`, but for padding."""
        return int(batch["attention_mask"].sum())

    @abstractmethod
    def empty(self) -> Batch:
        """A batch without a supervised item, for a worker that only goes along."""

    def compared_with(self, base: "PreTrainedModel", rows: list[Row], cfg: EvaluationConfig) -> list[Row]:
        """`rows` for :meth:`score`, of models that are to be compared with `base`."""
        return rows

    def as_shown(self, row: Row) -> Row:
        """`row` as a person is to see it: an answer that was judged bad is no `target`, and stands as `undesirable`."""
        return row

    @abstractmethod
    def score(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: list[Row], cfg: EvaluationConfig
    ) -> Scores:
        """Losses, predictions and metrics of `rows`."""


class PaddedTask(Task):
    """A task whose records lie below one another, the shorter ones filled up on the right.

    Some models let records see their padding (FNet, YOSO), or take the last position for the end (XLNet): then only
    records of equal length share a pass, or none do; see :meth:`passes`.

    A batch holds `input_ids`, `attention_mask` and, if the tokenizer makes them, `token_type_ids`, int64 of shape
    [records, longest], and `labels`, int64 of shape [records, most labels], filled up with -100.
    """

    columns: ClassVar[tuple[str, ...]] = ("input_ids", "token_type_ids", "labels")
    # labels of :meth:`empty`
    nothing: ClassVar[list[int]] = [IGNORE]
    # whether the model has an output for each token, not one for the whole text
    by_token: ClassVar[bool] = True

    def collate(self, columns: Mapping[str, Sequence[Any]]) -> Batch:
        batch = {
            "input_ids": _padded(columns["input_ids"], self.spec.pad),
            "attention_mask": _padded([np.ones(len(record)) for record in columns["input_ids"]], 0),
            "labels": _padded(columns["labels"], IGNORE),
        }
        if len(columns["token_type_ids"][0]):
            batch["token_type_ids"] = _padded(columns["token_type_ids"], 0)
        return batch

    def empty(self) -> Batch:
        return self.collate({"input_ids": [[0, 0]], "token_type_ids": [[]], "labels": [self.nothing]})

    def below(self, input_ids: Sequence[Any], token_type_ids: Sequence[Any]) -> Batch:
        """A batch of texts alone, one below the other, without labels."""
        columns = {"input_ids": input_ids, "token_type_ids": token_type_ids, "labels": [self.nothing] * len(input_ids)}
        return PaddedTask.collate(self, columns)

    def inputs(self, batch: Mapping[str, torch.Tensor]) -> Batch:
        """What the model is given."""
        names = ("input_ids", "attention_mask", "token_type_ids")
        return {name: batch[name] for name in names if name in batch}

    @abstractmethod
    def logits(self, model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
        """What the loss of `batch` is computed from, float32 [records, ...]; what padding gets there means nothing."""

    def passes(self, model: "PreTrainedModel") -> Passes:
        """See :func:`ftray.models.probe.shared_passes`."""
        model = getattr(model, "module", model)  # DeepSpeed engine -> PEFT model
        if model not in _passes:
            modes = [(module, module.training) for module in model.modules()]
            model.eval()
            _passes[model] = "all", None  # while it is tried
            try:
                _passes[model] = shared_passes(
                    model, lambda records: self.logits(model, self._below(records, model.device))
                )
            finally:
                for module, training in modes:
                    module.training = training
        return _passes[model]

    def _below(self, records: list[torch.Tensor], device: torch.device) -> Batch:
        """A batch of token ids alone."""
        return {name: tensor.to(device) for name, tensor in self.below(records, [[]] * len(records)).items()}

    def forward(
        self, model: "PreTrainedModel", batch: Mapping[str, torch.Tensor], **further: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The model's outputs [records, ...] by name, each record's as it gets them alone.

        Args:
            further: inputs [records, ...] beside :meth:`inputs`.
        """
        inputs = self.inputs(batch) | further
        kind, _ = self.passes(model)
        if kind == "all" or len(batch["attention_mask"]) == 1:
            return _outputs(model(**inputs))
        lengths = batch["attention_mask"].sum(1)
        ends = (batch["labels"] != IGNORE).sum(1).clamp_min(1) if further else lengths  # of the outputs
        sizes = torch.stack([lengths, ends], 1)
        _, group = sizes.unique(dim=0, return_inverse=True) if kind == "equal" else (None, torch.arange(len(sizes)))
        rows = [(group == n).nonzero()[:, 0] for n in range(int(group.max()) + 1)]
        width, parts = next(iter(further.values()), batch["input_ids"]).shape[1], []
        for own in rows:
            length, end = sizes[own[0]].tolist()
            cut = {name: t[own, : end if name in further else length] for name, t in inputs.items()}
            part = _outputs(model(**cut))
            parts.append({n: _filled(t[:, -end:], width) for n, t in part.items()} if self.by_token else part)
        order = torch.cat(rows).argsort()
        return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}

    def batches(self, model: "PreTrainedModel", rows: list[Row], size: int) -> Iterator[tuple[list[int], Batch]]:
        """`rows` in batches of like length on the model's device, each with the indices of its rows."""
        model.eval()
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        for at in range(0, len(order), size):
            part = order[at : at + size]
            batch = self.collate({name: [rows[i][name] for i in part] for name in self.columns})
            yield part, {name: tensor.to(model.device) for name, tensor in batch.items()}


OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")


def _outputs(output: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: output[name] for name in OUTPUTS if name in output}


def _filled(output: torch.Tensor, width: int) -> torch.Tensor:
    """[records, tokens, ...] to [records, width, ...]."""
    filled = output.new_zeros(len(output), width, *output.shape[2:])
    filled[:, : output.shape[1]] = output
    return filled


def encode(
    texts: list[Any] | None,
    pairs: list[Any] | None,
    tokenizer: "PreTrainedTokenizerBase",
    cfg: DataConfig,
    **settings: object,
) -> tuple[Any, list[int]]:
    """Texts as the tokenizer encodes them with its special tokens, cut to `max_length`; and how long the cut ones were.

    Those that are whole have 0 in place of a length.
    """
    longest = min(cfg.longest, tokenizer.model_max_length)
    types = "token_type_ids" in tokenizer.model_input_names
    common = {"return_attention_mask": False, "return_token_type_ids": types, **settings}
    whole = tokenizer(texts, pairs, **common)
    cut = [len(ids) if len(ids) > longest else 0 for ids in whole["input_ids"]]
    return (tokenizer(texts, pairs, truncation=True, max_length=longest, **common) if any(cut) else whole), cut


def types_of(encoded: Mapping[str, Any], i: int) -> list[int]:
    """`token_type_ids` of text i; empty if the tokenizer makes none."""
    return list(encoded["token_type_ids"][i]) if "token_type_ids" in encoded else []


def _padded(lists: Sequence[Any], fill: int) -> torch.Tensor:
    return pad_sequence([torch.from_numpy(np.array(part, np.int64)) for part in lists], True, fill)
