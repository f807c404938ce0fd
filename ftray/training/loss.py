"""Next-token loss over supervised positions only; the logits of a long batch never lie in memory at once."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

IGNORE = -100
LOGITS = 2**24  # elements of logits that are computed at once
BLOCK = 16  # positions, on a CPU: their logits stay in its cache from the softmax to the gradient


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
            :func:`ftray.training.probe.row_obstacle`.
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


class HeadLoss(torch.autograd.Function):
    """A frozen head and its cross-entropy, a slice of positions at a time.

    The gradient is made in the forward pass, from the same logits: they are never kept, nor computed twice
    (Liger Kernel, arXiv 2410.10989, section 3.2).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted sum of the losses (float32 scalar) and, bearing no gradient, the loss of each position.

        Args:
            hidden: [S, hidden size], the head's input at the supervised positions.
            head: the model's frozen output layer.
            targets: int64 [S].
            weights: float32 [S], the gradient of each position's loss.
        """
        losses = torch.empty_like(weights)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = max(1, LOGITS // head.weight.shape[0])
        for at in range(0, len(hidden), rows):
            part = slice(at, at + rows)
            logits = head(hidden[part])
            blocks = (
                t.split(BLOCK if logits.device.type == "cpu" else rows)
                for t in (logits, targets[part, None], losses[part])
            )
            for block, target, loss in zip(*blocks, strict=True):
                logs = F.log_softmax(block, -1, dtype=torch.float32)
                found = logs.gather(1, target)
                loss.copy_(-found.squeeze(1))
                if gradient is not None:
                    block.copy_(logs.exp_().scatter_add_(1, target, torch.full_like(found, -1.0)))
            if gradient is not None:
                gradient[part] = (logits.to(hidden.dtype) @ head.weight) * weights[part, None].to(hidden.dtype)
        ctx.gradient = gradient
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None, None]:
        return ctx.gradient * gradient, None, None, None


def _puts_tokens_before(model: nn.Module) -> bool:
    adapted: Any = getattr(model, "module", model)  # DeepSpeed engine -> PEFT model
    return hasattr(adapted, "active_peft_config") and adapted.active_peft_config.is_prompt_learning


def _keeps_logits(model: nn.Module) -> bool:
    base: Any = getattr(model, "module", model)  # DeepSpeed engine -> PEFT model
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    return "logits_to_keep" in inspect.signature(base.forward).parameters
