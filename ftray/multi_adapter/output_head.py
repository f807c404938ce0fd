"""From last hidden states to logits, by one linear layer where a model has no more than that, else by its own code; and
their loss, computed without holding all logits of a long batch in memory.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from transformers import PreTrainedModel

from ftray.models.probe import body, head_obstacle

LOGITS = 2**24  # elements of logits that are computed at once
BLOCK = 16  # positions, on a CPU: their logits stay in its cache from the softmax to the gradient


def output_head(base: PreTrainedModel, ids: torch.Tensor) -> tuple[Any, str | None]:
    """What makes logits [tokens, vocabulary] of last hidden states [tokens, hidden size], as the frozen `base` does.

    Args:
        ids: int64 [tokens], to try it on.

    Returns:
        The base's output layer or an :class:`OutputHead`; and why that differs from the base, None: it does not.
    """
    plain = base.get_output_embeddings()
    reason = head_obstacle(base, ids, plain)
    if reason is None:
        return plain, None
    try:
        own = OutputHead(base)
        return (plain, reason) if head_obstacle(base, ids, own) else (own, None)
    except Exception:  # its forward uses more of the decoder than the last hidden states
        return plain, reason


class OutputHead(nn.Module):
    """All that a model's own forward does after its decoder: soft caps, scales, further layers.

    It runs the forward of a copy of the model, whose decoder is replaced by one that returns the given states.

    Attributes:
        weight: of the output layer, [vocabulary, hidden size].
    """

    def __init__(self, base: PreTrainedModel):
        super().__init__()
        self._given = _Given()
        model = copy.copy(base)
        inside = next(name for name, child in base.named_children() if child is body(base))
        model.__dict__["_modules"] = {**dict(base.named_children()), inside: self._given}
        self.__dict__["_model"] = model  # not a part: its parameters are the base's
        self.weight = base.get_output_embeddings().weight

    @property
    def parts(self) -> list[nn.Module]:
        """The modules of the model that it may run."""
        return list(self.__dict__["_model"].modules())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden size] to [tokens, vocabulary]."""
        self._given.hidden = hidden[None]
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        logits: torch.Tensor = self.__dict__["_model"](input_ids=ids, use_cache=False).logits[0]
        return logits


class _Given(nn.Module):
    """Replaces a decoder: returns `hidden` as its last hidden states, and None for every other output."""

    hidden: torch.Tensor

    @property
    def decoder(self) -> nn.Module:
        return self

    def forward(self, *args: object, **kwargs: object) -> "_Output":
        return _Output(self.hidden)


class _Output:
    def __init__(self, hidden: torch.Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, place: int) -> torch.Tensor:
        return (self.last_hidden_state,)[place]


class _Context(FunctionCtx):
    """What the forward pass leaves for the backward pass."""

    needs_input_grad: tuple[bool, ...]
    gradient: torch.Tensor  # of the hidden states, where they need one


class HeadLoss(torch.autograd.Function):
    """A frozen head and its cross-entropy, a slice of positions at a time.

    The gradient of each position's loss is made in the forward pass, from the same logits: they are never kept, nor
    computed twice (Liger Kernel, arXiv 2410.10989, section 3.2). It depends on that position alone, so what is made of
    the losses later only scales it.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        hidden: torch.Tensor,
        head: nn.Linear | OutputHead,
        targets: torch.Tensor,
        shares: torch.Tensor | None = None,
        temperatures: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of each position, float32 [S]: the cross-entropy of its target, or of several.

        Args:
            hidden: [S, hidden size], the head's input at the supervised positions.
            head: frozen; see :func:`output_head`.
            targets: int64 [S], or [S, K].
            shares: float32 [S, K], what the cross-entropy of each target counts; None: 1.
            temperatures: float32 [S], by which the logits are divided; None: 1.
        """
        losses = torch.empty(len(hidden), device=hidden.device)
        targets = targets.view(len(targets), -1)
        shares = torch.ones_like(targets, dtype=torch.float32) if shares is None else shares
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = slice_rows(head.weight.shape[0])
        for at in range(0, len(hidden), rows):
            part = slice(at, at + rows)
            own = None if gradient is None else gradient[part]
            cooled = None if temperatures is None else temperatures[part, None]
            _fill(head, hidden[part], targets[part], shares[part], cooled, losses[part], own)
        if gradient is not None:
            ctx.gradient = gradient
        return losses

    @staticmethod
    def backward(ctx: _Context, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        return ctx.gradient * gradient[:, None].to(ctx.gradient.dtype), None, None, None, None


def slice_rows(vocabulary: int) -> int:
    """Positions whose logits are in memory at once."""
    return max(1, LOGITS // vocabulary)


def _fill(
    head: nn.Linear | OutputHead,
    states: torch.Tensor,
    targets: torch.Tensor,
    shares: torch.Tensor,
    temperatures: torch.Tensor | None,
    losses: torch.Tensor,
    gradient: torch.Tensor | None,
) -> None:
    """Write the losses of one slice, and the gradient of each; its logits are gone afterwards."""
    logits, to_states = _logits(head, states)
    if temperatures is not None:
        logits = (logits / temperatures).to(logits.dtype)
    rows = BLOCK if logits.device.type == "cpu" else len(logits)
    for block, target, share, loss in zip(*(t.split(rows) for t in (logits, targets, shares, losses)), strict=True):
        logs = F.log_softmax(block, -1, dtype=torch.float32)
        loss.copy_(-(logs.gather(1, target) * share).sum(1))
        if gradient is not None:
            block.copy_(logs.exp_().mul_(share.sum(1, keepdim=True)).scatter_add_(1, target, -share))
    if gradient is not None:
        if temperatures is not None:
            logits = logits / temperatures
        gradient.copy_(to_states(logits.to(states.dtype)))


def _logits(
    head: nn.Linear | OutputHead, states: torch.Tensor
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Logits that may be written to, and what makes the gradient of `states` from theirs."""
    if not isinstance(head, OutputHead):
        return head(states), lambda gradient: gradient @ head.weight
    with torch.enable_grad():
        given = states.detach().requires_grad_()
        logits = head(given)
    return logits.detach().clone(), lambda gradient: torch.autograd.grad(logits, given, gradient.to(logits))[0]
