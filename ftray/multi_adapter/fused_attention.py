"""Attention over a packed row by kernels that are told where its records begin: nothing is padded, no mask is made.

On a GPU alone. Which of them a model and a device can use, a comparison with the model's own results decides: see
:meth:`ftray.training.pack.Pack`. Between them and the model stands :mod:`ftray.multi_adapter.attention`.
"""

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import PreTrainedModel

from ftray.multi_adapter.attention import Layout, attention, refuse_unsupported

BLOCK = 128  # tokens a side of the blocks that FlexAttention computes or leaves out
AMPERE = 8, 0  # compute capability from which there is FlashAttention


def choose_kernels(model: PreTrainedModel, longest: int | None) -> list[Callable[..., Any]]:
    """What may compute the attention of a packed row of `model`, the fastest first.

    FlashAttention wants half precision; FlexAttention, which takes seconds to compile, is of use where records are
    longer than a sliding window: elsewhere PyTorch's causal kernel over records of similar length needs no mask either.

    Args:
        longest: most tokens of a record; None: any number.
    """
    if model.device.type != "cuda":
        return [attention]
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    half = model.dtype in (torch.bfloat16, torch.float16)
    flash = half and torch.cuda.get_device_capability(model.device) >= AMPERE and varlen_function() is not None
    flex = window and (longest is None or longest > window)
    return [*([varlen] if flash else []), *([flex_rows] if flex else []), attention]


@cache
def varlen_function() -> Callable[..., Any] | None:
    """FlashAttention over records of any length: PyTorch's own, else that of the package `flash-attn`; None: neither.

    Takes query, key and value [T, heads, head_dim], the :attr:`Layout.boundaries`, the most tokens of a record, the
    window as (keys before, keys after), and the scale.
    """
    with suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

        if {"window_size", "enable_gqa", "scale"} <= inspect.signature(varlen_attn).parameters.keys():
            return lambda q, k, v, bounds, longest, window, scale: varlen_attn(
                q, k, v, bounds, bounds, longest, longest, window_size=window, scale=scale, enable_gqa=True
            )
    if find_spec("flash_attn") is None:
        return None
    from flash_attn import flash_attn_varlen_func

    return lambda q, k, v, bounds, longest, window, scale: flash_attn_varlen_func(
        q, k, v, bounds, bounds, longest, longest, causal=True, window_size=window, softmax_scale=scale
    )


def varlen(
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
    """As :func:`ftray.multi_adapter.attention.attention`, by FlashAttention."""
    refuse_unsupported(module, kwargs)
    (row,), attend = layouts, cast("Callable[..., Any]", varlen_function())
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    window = (sliding_window - 1 if sliding_window else -1, 0)
    return attend(q, k, v, row.boundaries, int(row.lengths.max()), window, scaling)[None], None


def flex_rows(
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
    """As :func:`ftray.multi_adapter.attention.attention`, by FlexAttention (https://arxiv.org/abs/2412.05496)."""
    refuse_unsupported(module, kwargs)
    (row,) = layouts
    if sliding_window not in row.masks:
        row.masks[sliding_window] = block_mask(row, sliding_window, query.device)
    attend: Any = _compiled() if query.device.type == "cuda" else flex_attention
    gqa = query.shape[1] != key.shape[1]
    rows = attend(query, key, value, block_mask=row.masks[sliding_window], scale=scaling, enable_gqa=gqa)
    return rows.transpose(1, 2), None


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


def block_mask(row: Layout, window: int | None, device: torch.device) -> BlockMask:
    """Which blocks of queries and keys are computed, and which keys a query attends to: of its record, of the last
    `window` tokens, itself included; None: of all before it.

    The first key of each query says it all: it never goes back along a row, so the blocks of a query's keys follow one
    another. PyTorch's `create_block_mask` would compare all pairs of tokens.
    """
    tokens = int(row.lengths.sum())
    first = (row.lengths.cumsum(0) - row.lengths).repeat_interleave(row.lengths)
    if window:
        first = torch.maximum(first, torch.arange(tokens) - window + 1)
    own = torch.arange(-(-tokens // BLOCK))
    from_block = first[own * BLOCK] // BLOCK
    blocks = (from_block[:, None] + own).remainder(len(own)).int().to(device)
    first = first.to(device)

    def seen(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (key >= first[query])

    counts = (own - from_block + 1).int().to(device)
    return BlockMask.from_kv_blocks(
        counts[None, None], blocks[None, None], BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(tokens, tokens)
    )
