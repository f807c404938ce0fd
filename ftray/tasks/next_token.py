"""Next-token loss over supervised positions only; the logits of a long batch never lie in memory at once."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

IGNORE = -100


def supervised_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    """Number of positions that bear loss in `batch` (see :func:`supervised_loss`)."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def supervised_loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy *summed* over the supervised tokens of one packed row; a float32 scalar.

    `batch` holds `input_ids`, `position_ids` and `labels`, each int64 of shape [1, tokens]: records one after
    another, positions restarting at 0 with each (transformers separates their attention by that), labels -100
    where no loss is due and at the first token of each record. The language-model head runs only where a label
    is: its rows are chosen with transformers' `logits_to_keep`.
    """
    return token_losses(model, batch).sum()


def token_losses(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The cross-entropy of each supervised token, float32 [S], as :func:`supervised_loss` sums them up."""
    if _puts_tokens_before(model):
        return _padded_losses(model, batch)
    targets = batch["labels"][0, 1:]
    positions = (targets != IGNORE).nonzero().squeeze(1)
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    if _keeps_logits(model):
        logits = model(**inputs, logits_to_keep=positions).logits[0]
    else:
        logits = model(**inputs).logits[0, positions]
    return F.cross_entropy(logits.float(), targets[positions], reduction="none")


def _padded_losses(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Records lie side by side and padded: the method puts its tokens before each."""
    device = batch["labels"].device
    starts = (batch["position_ids"][0] == 0).nonzero().squeeze(1).tolist()
    lengths = [end - first for first, end in zip(starts, [*starts[1:], batch["labels"].shape[1]], strict=True)]
    ids, labels = (
        pad_sequence(batch[name][0].split(lengths), True, value)
        for name, value in (("input_ids", 0), ("labels", IGNORE))
    )
    mask = pad_sequence([torch.ones(n, dtype=torch.int64, device=device) for n in lengths], True)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :]
    supervised = labels[:, 1:] != IGNORE
    return F.cross_entropy(logits[:, :-1][supervised].float(), labels[:, 1:][supervised], reduction="none")


def _puts_tokens_before(model: nn.Module) -> bool:
    adapted: Any = getattr(model, "module", model)  # DeepSpeed engine -> PEFT model
    return hasattr(adapted, "active_peft_config") and adapted.active_peft_config.is_prompt_learning


def _keeps_logits(model: nn.Module) -> bool:
    base: Any = getattr(model, "module", model)  # DeepSpeed engine -> PEFT model
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    return "logits_to_keep" in inspect.signature(base.forward).parameters
