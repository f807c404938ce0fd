"""CAUSAL_LM: text that continues a prompt; records lie packed in one row, the loss is that of the next token."""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ftray.config import EvaluationConfig
from ftray.data.record_task import TextTask
from ftray.evaluation.generation import generate
from ftray.evaluation.metrics import Scores
from ftray.models.probe import padding_obstacle
from ftray.task_spec import IGNORE
from ftray.tasks import task
from ftray.tasks.task import Batch, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_alone: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # of models that were tried: whether padding changes them
SCORED_TOKENS = 2048  # of a batch that is scored: its logits lie in memory at once


class Task(TextTask, task.Task):
    """See :mod:`ftray.data.tokens` for its tokens, and :func:`supervised_loss`."""

    auto_class = "AutoModelForCausalLM"
    pipeline_tag = "text-generation"
    packed = True
    metrics: ClassVar[Mapping[str, str]] = {**task.TEXT, "token_error_rate": "min", "character_error_rate": "min"}
    generated = task.GENERATED
    usage_example = "ftray serve --run {run}"

    def collate(self, columns: Mapping[str, Sequence[Any]]) -> Batch:
        return collate(columns)

    def loss(self, model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
        return supervised_loss(model, batch, self.pad)

    def num_targets(self, batch: Mapping[str, torch.Tensor]) -> int:
        return supervised_tokens(batch)

    def tokens(self, batch: Mapping[str, torch.Tensor]) -> int:
        return batch["labels"].numel()

    def empty(self) -> Batch:
        ids = torch.zeros(1, 2, dtype=torch.int64)
        return {"input_ids": ids, "position_ids": torch.arange(2)[None], "labels": torch.full_like(ids, IGNORE)}

    def score(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: list[Row], cfg: EvaluationConfig
    ) -> Scores:
        return score(model, tokenizer, rows, cfg)


def collate(batch: Mapping[str, Sequence[Sequence[int]]]) -> Batch:
    """Lay records one after another in a single row: nothing is padded.

    Args:
        batch: `input_ids` and `labels`, each with a sequence of token ids per record.

    Returns:
        `input_ids`, `position_ids` and `labels`, int64 of shape [1, tokens]. Positions restart at 0 with every
        record, which is how transformers keeps their attention apart; the first label of a record is -100, since no
        token of the same record comes before it.
    """
    ids = [np.asarray(record, np.int64) for record in batch["input_ids"]]
    labels = [np.asarray(record, np.int64).copy() for record in batch["labels"]]
    for record in labels:
        record[0] = IGNORE
    positions = [np.arange(len(record)) for record in ids]
    columns = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return {name: torch.from_numpy(np.concatenate(parts))[None] for name, parts in columns.items()}


def supervised_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    """Number of positions that bear loss in `batch` (see :func:`supervised_loss`)."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def supervised_loss(model: nn.Module, batch: Mapping[str, torch.Tensor], pad: bool = True) -> torch.Tensor:
    """Cross-entropy *summed* over the supervised tokens of one packed row; a float32 scalar.

    `batch` holds `input_ids`, `position_ids` and `labels`, each int64 of shape [1, tokens]: records one after
    another, positions restarting at 0 with each, labels -100 where no loss is due and at the first token of each
    record. `pad` is that of :func:`token_losses`.
    """
    return token_losses(model, batch, pad).sum()


def token_losses(model: nn.Module, batch: Mapping[str, torch.Tensor], pad: bool = True) -> torch.Tensor:
    """The cross-entropy of each supervised token, float32 [S], as :func:`supervised_loss` sums them up.

    Args:
        pad: give each record a row of its own, padded on the right, where nothing causal sees it. If not, the model
            itself has to keep the records of one row apart by their positions: see
            :func:`ftray.models.probe.row_obstacle`.
    """
    labels, before = batch["labels"], _puts_tokens_before(model)
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    if pad or before:
        mask = padding_mask(batch["position_ids"])
        labels = padded(labels, mask, IGNORE)
        inputs = {"input_ids": padded(batch["input_ids"], mask, 0), "attention_mask": mask}
    if not before:
        inputs["use_cache"] = False
    supervised = labels[:, 1:] != IGNORE
    columns = supervised.any(0).nonzero().squeeze(1)  # the head runs only where some record's next token bears loss
    if _keeps_logits(model) and not before:
        logits = model(**inputs, logits_to_keep=columns).logits
    else:
        logits = model(**inputs).logits[:, -labels.shape[1] :][:, columns]
    chosen = supervised[:, columns]
    return F.cross_entropy(logits[chosen].float(), labels[:, 1:][:, columns][chosen], reduction="none")


def padding_mask(position_ids: torch.Tensor) -> torch.Tensor:
    """int64 [records, longest], 1 at each token of a record, of a packed row with `position_ids` [1, tokens]."""
    starts = (position_ids[0] == 0).nonzero().squeeze(1)
    lengths = torch.diff(starts, append=starts.new_tensor([position_ids.shape[1]]))
    return (torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]).long()


def padded(row: torch.Tensor, mask: torch.Tensor, fill: int) -> torch.Tensor:
    """A packed row [1, tokens] as [records, longest], as its :func:`padding_mask` says."""
    return torch.full_like(mask, fill).masked_scatter_(mask.bool(), row)


def _puts_tokens_before(model: nn.Module) -> bool:
    adapted: Any = getattr(model, "module", model)  # DeepSpeed engine -> PEFT model
    return hasattr(adapted, "active_peft_config") and adapted.active_peft_config.is_prompt_learning


def _keeps_logits(model: nn.Module) -> bool:
    base: Any = getattr(model, "module", model)  # DeepSpeed engine -> PEFT model
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def score(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: list[Row], cfg: EvaluationConfig
) -> Scores:
    """Loss of every record and, if asked, the text that `model` generates greedily from its prompt."""
    model.eval()
    loss, tokens = _losses(model, rows, cfg.batch_size)
    scores = Scores(loss, tokens)
    if cfg.generate:
        scores.add_generated(generate(model, tokenizer, rows, cfg), [row["target"] for row in rows])
    return scores


@torch.inference_mode()
def _losses(model: "PreTrainedModel", rows: list[Row], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss and supervised tokens of each row, of which those of like length share a batch; each has its own
    where the model does not say of a padded record what it says of the record alone."""
    losses, counts = np.zeros(len(rows)), np.zeros(len(rows))
    if len(rows) > 1 and model not in _alone:
        _alone[model] = padding_obstacle(model) is not None
    if _alone.get(model):
        batch_size = 1
    waiting = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    while waiting:
        longest = len(rows[waiting[:batch_size][-1]]["input_ids"])
        fit = max(1, min(batch_size, SCORED_TOKENS // longest))
        part, waiting = waiting[:fit], waiting[fit:]
        columns = {name: [rows[i][name] for i in part] for name in ("input_ids", "labels")}
        batch = {name: tensor.to(model.device) for name, tensor in collate(columns).items()}
        record = (batch["position_ids"][0] == 0).cumsum(0) - 1
        record = record[1:][batch["labels"][0, 1:] != IGNORE].cpu()
        each = token_losses(model, batch).double().cpu()
        losses[part] = torch.zeros(len(part), dtype=torch.float64).index_add(0, record, each).numpy()
        counts[part] = torch.bincount(record, minlength=len(part)).numpy()
    return losses, counts
