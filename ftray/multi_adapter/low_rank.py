"""Low-rank updates of many adapters at once: LoRA's and AdaLoRA's `dropout(x) Aᵀ Bᵀ`, batched over adapters.

Ranks are padded with zeros to the greatest, and rows to the most among adapters with similar numbers of rows (S-LoRA,
arXiv 2311.03285, describes the problem). One batched product then replaces two small products per adapter.

With a bfloat16 base the products are computed in bfloat16 too, as under torch.autocast: the result that they are added
to is no more exact. Factors and their gradients stay in float32. With any other base all is float32, as in PEFT.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import FunctionCtx

from ftray.compat.torch import copy
from ftray.multi_adapter.dropout import zero


@dataclass(frozen=True)
class LoraDelta:
    """What one adapter adds to a layer's output: `scaling * dropout(x) Aᵀ Bᵀ`.

    Attributes:
        a, b: the factors [rank, in] and [out, rank], float32; for inference also bfloat16.
        scaling: of the update, times the scale of dropout.
        dropped: which elements of the adapter's rows [rows, in] are dropped, see
            :func:`ftray.multi_adapter.dropout.zero`; None: none.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    dropped: torch.Tensor | None


@dataclass(frozen=True)
class PaddedSegments:
    """The rows of K adapters with similar numbers of rows, padded to [K, L].

    Attributes:
        adapters: indices of the adapters.
        lengths: number of rows of each, at most L.
        rows: int64 [R], indices of the rows in the batch; None: all rows of the batch, in order.
        pad_index: int64 [K * L], the row at each padded position, the adapter's last one at padding; None: the batch
            as it is.
        unpad_index, padding_index: int64, padded positions of rows and of padding; None: there is no padding.
    """

    adapters: tuple[int, ...]
    lengths: tuple[int, ...]
    rows: torch.Tensor | None
    pad_index: torch.Tensor | None
    unpad_index: torch.Tensor | None
    padding_index: torch.Tensor | None

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """Pad [T, n] to [K, L, n], in :func:`precision`."""
        padded = x if self.pad_index is None else x.index_select(0, self.pad_index)
        return padded.to(precision(x)).view(len(self.lengths), max(self.lengths), x.shape[1])

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """Remove the padding: [K, L, n] to [R, n]."""
        flat = padded.flatten(0, 1)
        return flat if self.unpad_index is None else flat.index_select(0, self.unpad_index)


def padded_segments(segments: Sequence[tuple[int, int]], rows: int, device: torch.device) -> list[PaddedSegments]:
    """Group adapters by similar numbers of rows; `segments` are (first row, end) of each in a batch of `rows`."""
    alike: dict[int, list[int]] = {}
    for i, (first, end) in enumerate(segments):
        alike.setdefault((end - first).bit_length(), []).append(i)
    found = []
    for adapters in alike.values():
        lengths = tuple(segments[i][1] - segments[i][0] for i in adapters)
        own = [torch.arange(*segments[i]) for i in adapters]
        whole = sum(lengths) == rows  # segments don't overlap and come in order
        even = len(set(lengths)) == 1
        inside = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        padded = torch.stack([torch.cat([o, o[-1:].expand(max(lengths) - len(o))]) for o in own])
        found.append(
            PaddedSegments(
                tuple(adapters),
                lengths,
                None if whole else torch.cat(own).to(device),
                None if whole and even else padded.flatten().to(device),
                None if even else inside.flatten().nonzero().squeeze(1).to(device),
                None if even else (~inside).flatten().nonzero().squeeze(1).to(device),
            )
        )
    return found


def precision(x: torch.Tensor) -> torch.dtype:
    """The dtype in which products with `x` are computed."""
    return x.dtype if x.dtype is torch.bfloat16 else torch.float32


class _Context(FunctionCtx):
    """What the forward pass leaves for the backward pass."""

    saved_tensors: tuple[torch.Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    layout: list[PaddedSegments]
    updates: list[LoraDelta]


class AddLowRank(torch.autograd.Function):
    """Adds each adapter's update to its rows of `y`, in place.

    It is one autograd node for all adapters: with slices of `x` and `y`, the backward pass would fill a whole tensor
    for each slice.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        y: torch.Tensor,
        x: torch.Tensor,
        layout: list[PaddedSegments],
        updates: list[LoraDelta],
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        """Add to `y` [1, T, out] the updates for `x` [1, T, in]; `factors` are A and B of each update, in turn.

        The tensor that is changed in place must come first, as it may be a view (PyTorch's CopySlices).
        """
        saved: list[torch.Tensor] = []
        for segments in layout:
            mine = [updates[i] for i in segments.adapters]
            a, b = _stacked_factors(mine, precision(x))
            scaling = torch.tensor([u.scaling for u in mine], dtype=a.dtype).to(x.device)[:, None, None]
            hidden = (_padded_input(x[0], segments, mine) @ a.transpose(1, 2)).mul_(scaling)
            if segments.rows is None and segments.unpad_index is None and y.dtype is torch.bfloat16:
                y[0].view(*hidden.shape[:2], -1).baddbmm_(hidden, b.transpose(1, 2))
            elif segments.rows is None:
                y[0].add_(segments.unpad(hidden @ b.transpose(1, 2)))
            else:
                added = y[0].index_select(0, segments.rows) + segments.unpad(hidden @ b.transpose(1, 2))
                y[0].index_copy_(0, segments.rows, added.to(y.dtype))
            saved += [a, b, scaling, hidden]
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, *saved)
        ctx.layout, ctx.updates = layout, updates
        return y

    @staticmethod
    def backward(ctx: _Context, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        inner: torch.Tensor | None = None
        gradients: list[Any] = [None] * (2 * len(ctx.updates))
        for segments, a, b, scaling, hidden in zip(ctx.layout, *(saved[i::4] for i in range(4)), strict=True):
            mine = [ctx.updates[i] for i in segments.adapters]
            outer = segments.pad(gradient[0])
            if segments.padding_index is not None:
                outer.flatten(0, 1).index_fill_(0, segments.padding_index, 0.0)
            dh = (outer @ b).mul_(scaling)
            da = (dh.transpose(1, 2) @ _padded_input(x[0], segments, mine)).float()
            db = (outer.transpose(1, 2) @ hidden).float()
            for k, (i, update) in enumerate(zip(segments.adapters, mine, strict=True)):
                rank = len(update.a)
                gradients[2 * i], gradients[2 * i + 1] = da[k, :rank], db[k, :, :rank].contiguous()
            if ctx.needs_input_grad[0]:
                part = dh @ a
                _drop(part, mine)
                if segments.rows is None:
                    inner = segments.unpad(part).to(x.dtype)
                else:
                    inner = torch.zeros_like(x[0]) if inner is None else inner
                    inner.index_copy_(0, segments.rows, segments.unpad(part).to(x.dtype))
        return gradient, inner if inner is None else inner[None], None, None, *gradients


def _stacked_factors(updates: list[LoraDelta], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """All A as [K, R, in] and all B as [K, out, R], in a few calls however many adapters there are."""
    ranks = [len(u.a) for u in updates]
    make = torch.empty if len(set(ranks)) == 1 else torch.zeros
    first = updates[0]
    a = make(len(ranks), max(ranks), first.a.shape[1], dtype=dtype, device=first.a.device)
    b = make(len(ranks), first.b.shape[0], max(ranks), dtype=dtype, device=first.a.device)
    targets = [a[k, :rank] for k, rank in enumerate(ranks)] + [b[k, :, :rank] for k, rank in enumerate(ranks)]
    copy(targets, [u.a.detach() for u in updates] + [u.b.detach() for u in updates])
    return a, b


def _padded_input(x: torch.Tensor, segments: PaddedSegments, updates: list[LoraDelta]) -> torch.Tensor:
    """The rows of the adapters [K, L, in], with dropout."""
    padded = segments.pad(x)
    if any(update.dropped is not None for update in updates) and padded.data_ptr() == x.data_ptr():
        padded = padded.clone()
    _drop(padded, updates)
    return padded


def _drop(padded: torch.Tensor, updates: list[LoraDelta]) -> None:
    for rows, update in zip(padded, updates, strict=True):
        if update.dropped is not None:
            zero(rows, update.dropped)
