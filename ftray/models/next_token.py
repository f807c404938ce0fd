"""Next-token loss of packed rows, at supervised positions only. Plain PyTorch."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ftray.task_spec import IGNORE

# of a batch whose supervised tokens have several targets: their ids, int64 [S, K], and what each counts, float32 [S, K]
TARGETS, SHARES = "targets", "shares"


def packed_row(columns: Mapping[str, Sequence[Any]]) -> dict[str, torch.Tensor]:
    """Lay records one after another in a single row: nothing is padded.

    Args:
        columns: `input_ids` and `labels`, each with a sequence of token ids per record.

    Returns:
        `input_ids`, `position_ids` and `labels`, int64 of shape [1, tokens]. Positions restart at 0 with every
        record, which is how transformers keeps their attention apart; the first label of a record is -100, since no
        token of the same record comes before it.
    """
    ids = [np.asarray(record, np.int64) for record in columns["input_ids"]]
    labels = [np.asarray(record, np.int64).copy() for record in columns["labels"]]
    for record in labels:
        record[0] = IGNORE
    positions = [np.arange(len(record)) for record in ids]
    row = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return {name: torch.from_numpy(np.concatenate(parts))[None] for name, parts in row.items()}


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


def token_losses(
    model: nn.Module, batch: Mapping[str, torch.Tensor], pad: bool = True, temperature: float = 1.0
) -> torch.Tensor:
    """The cross-entropy of each supervised token, float32 [S], as :func:`supervised_loss` sums them up.

    Of a batch with `TARGETS`, the weighted sum over these.

    Args:
        pad: give each record a row of its own, padded on the right, where nothing causal sees it. If not, the model
            itself has to keep the records of one row apart by their positions: see
            :func:`ftray.models.probe.row_obstacle`.
        temperature: by which logits are divided.
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
    logits = logits[chosen].float() / temperature
    if TARGETS in batch:
        logs: torch.Tensor = logits.log_softmax(-1)
        return -(logs.gather(1, batch[TARGETS]) * batch[SHARES]).sum(1)
    return F.cross_entropy(logits, labels[:, 1:][:, columns][chosen], reduction="none")


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
