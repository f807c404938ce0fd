"""Attention over records that are concatenated in a single row. Only here are they padded, grouped by length.

Registered with transformers' attention interface (https://huggingface.co/docs/transformers/attention_interface).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

SHORTEST = 16  # records of up to this many tokens are padded to one length
_numbers = count()


@dataclass
class Layout:
    """Positions of the records in a packed row of T tokens, and of each token after padding to P tokens.

    Attributes:
        blocks: number of records and padded length of each group of records of similar length.
        pad_index: int64 [P], the token at each padded position; at padding the record's last token.
        unpad_index: int64 [T], the padded position of each token.
        lengths: int64 [N], tokens of each record, on the CPU.
        masks: by sliding window, what :func:`ftray.multi_adapter.fused_attention.block_mask` has made.
        shared: whether tokens belong to several records.
    """

    blocks: list[tuple[int, int]]
    pad_index: torch.Tensor
    unpad_index: torch.Tensor
    lengths: torch.Tensor
    masks: dict[int | None, Any] = field(default_factory=dict)
    shared: bool = False

    @cached_property
    def boundaries(self) -> torch.Tensor:
        """int32 [N + 1], where each record begins, and the row ends."""
        return F.pad(self.lengths.cumsum(0), (1, 0)).int().to(self.pad_index.device)


@dataclass
class SharedPrefixes:
    """A packed row of T tokens in which records that begin alike have their common tokens once.

    Attributes:
        kept: bool [T], the tokens of the row with all records whole that stay.
        source: int64 [T], for each token of that row its place among those that stay.
    """

    kept: torch.Tensor
    source: torch.Tensor


def shared_prefixes(position_ids: torch.Tensor, prefixes: torch.Tensor) -> SharedPrefixes:
    """Leave out what records have in common with the one before.

    Args:
        position_ids: int64 [1, T], 0 at the start of each record, all of them whole.
        prefixes: int64 [N], how many first tokens each record shares with the one before.
    """
    starts = (position_ids[0] == 0).nonzero().squeeze(1).tolist()
    kept = position_ids[0] >= prefixes[(position_ids[0] == 0).cumsum(0) - 1]
    source = kept.cumsum(0) - 1
    for before, start, length in zip(starts, starts[1:], prefixes.tolist()[1:], strict=False):
        source[start : start + length] = source[before : before + length]
    return SharedPrefixes(kept, source)


def layout(position_ids: torch.Tensor, device: torch.device, prefixes: SharedPrefixes | None = None) -> Layout:
    """The layout, on `device`, of a packed row; `position_ids` are int64 [1, T], 0 at the start of each record.

    Args:
        prefixes: what is left out of the row that `position_ids` describe; None: nothing.
    """
    positions = position_ids[0].cpu()
    starts = (positions == 0).nonzero().squeeze(1)
    lengths = torch.diff(starts, append=torch.tensor([len(positions)]))
    groups: dict[int, list[int]] = {}
    for record, length in enumerate(lengths.tolist()):
        groups.setdefault(max(SHORTEST, 1 << (length - 1).bit_length()), []).append(record)
    blocks, pad_index, unpad_index, offset = [], [], torch.empty_like(positions), 0
    for records in groups.values():
        longest = int(lengths[records].max())
        inside = torch.arange(longest)
        tokens = starts[records, None] + torch.minimum(inside, lengths[records, None] - 1)
        real = inside < lengths[records, None]
        unpad_index[tokens[real]] = offset + real.flatten().nonzero().squeeze(1)
        blocks.append((len(records), longest))
        pad_index.append(tokens.flatten())
        offset += tokens.numel()
    padded = torch.cat(pad_index)
    if prefixes is None:
        return Layout(blocks, padded.to(device), unpad_index.to(device), lengths)
    padded, unpad_index = prefixes.source[padded], unpad_index[prefixes.kept]
    return Layout(blocks, padded.to(device), unpad_index.to(device), lengths, shared=True)


class _Context(FunctionCtx):
    """What the forward pass leaves for the backward pass."""

    saved_tensors: tuple[torch.Tensor, ...]
    rows: int
    shared: bool


class _Pad(torch.autograd.Function):
    """Rows to padded positions; padding has no gradient."""

    @staticmethod
    def forward(ctx: _Context, rows: torch.Tensor, layout: Layout) -> torch.Tensor:
        ctx.rows, ctx.shared = len(rows), layout.shared
        ctx.save_for_backward(layout.pad_index if layout.shared else layout.unpad_index)
        return rows.index_select(0, layout.pad_index)

    @staticmethod
    def backward(ctx: _Context, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (index,) = ctx.saved_tensors
        if ctx.shared:  # of all records that a token belongs to; what stands at padding is 0
            return gradient.new_zeros(ctx.rows, *gradient.shape[1:]).index_add_(0, index, gradient), None
        return gradient.index_select(0, index), None


class _Unpad(torch.autograd.Function):
    """Padded positions back to rows."""

    @staticmethod
    def forward(ctx: _Context, rows: torch.Tensor, unpad_index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(unpad_index)
        ctx.rows = len(rows)
        return rows.index_select(0, unpad_index)

    @staticmethod
    def backward(ctx: _Context, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        padded = gradient.new_zeros(ctx.rows, *gradient.shape[1:])
        return padded.index_copy_(0, ctx.saved_tensors[0], gradient), None


def register(name: str, function: Callable[..., Any]) -> str:
    """Register an attention with transformers, without a mask, under a new name that begins with `name`."""
    name = f"{name}_{next(_numbers)}"
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    return name


def packed_attention(layouts: list[Layout], kernel: Callable[..., Any] | None = None) -> str:
    """Register an attention over packed rows for one model; returns the name of it.

    Args:
        layouts: holds the layout of the current row alone, set before each pass.
        kernel: one of :func:`ftray.multi_adapter.fused_attention.choose_kernels`; None: :func:`attention`.
    """
    return register("ftray_packed", partial(kernel or attention, layouts))


def attention(
    layouts: list[Layout],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each record, [1, heads, T, head_dim] to [1, T, heads, head_dim of the values].

    Args:
        layouts: holds the layout of the current row alone.
        sliding_window: number of keys that a query attends to, itself included; None: all before it.

    Raises:
        NotImplementedError: the model asks for soft capping, sinks or attention in both directions.
    """
    refuse_unsupported(module, kwargs)
    (row,) = layouts
    q, k, v = (_Pad.apply(t[0].transpose(0, 1), row) for t in (query, key, value))
    attended, offset = [], 0
    for records, length in row.blocks:
        block = slice(offset, offset + records * length)
        offset = block.stop
        qb, kb, vb = (t[block].view(records, length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
        mask = _band(length, sliding_window, q.device) if sliding_window and sliding_window < length else None
        if q.device.type == "cpu" and q.dtype != torch.float32:  # for these PyTorch's kernel is several times slower
            out = _attend(qb, kb, vb, _band(length, sliding_window or length, q.device), scaling)
        else:
            out = F.scaled_dot_product_attention(
                qb, kb, vb, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=qb.shape[1] != kb.shape[1]
            )
        attended.append(out.transpose(1, 2).reshape(records * length, out.shape[1], out.shape[3]))
    rows: torch.Tensor = _Unpad.apply(torch.cat(attended) if len(attended) > 1 else attended[0], row.unpad_index)
    return rows[None], None


def refuse_unsupported(module: nn.Module, arguments: Mapping[str, Any]) -> None:
    """As :func:`refuse_unknown`, and if it asks for attention in both directions."""
    refuse_unknown(arguments)
    if not (getattr(module, "is_causal", True) if arguments.get("is_causal") is None else arguments["is_causal"]):
        raise NotImplementedError("attention in both directions")


def refuse_unknown(arguments: Mapping[str, Any]) -> None:
    """Raise NotImplementedError if the model asks for soft capping or attention sinks."""
    if unknown := [name for name in ("softcap", "s_aux") if arguments.get(name) is not None]:
        raise NotImplementedError(f"attention with {', '.join(unknown)}")


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Attention by matrix products: query [N, heads, L, d], key and value [N, groups, L, ...], mask bool [L, L]."""
    n, heads, length, size = query.shape
    groups = key.shape[1]
    folded = (query * (scaling or size**-0.5)).reshape(n, groups, heads // groups * length, size)
    scores = (folded @ key.transpose(-1, -2)).view(n, groups, heads // groups, length, length)
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    return (weights.view(n, groups, -1, length) @ value).view(n, heads, length, value.shape[3])


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)
