"""Attention over a packed row by kernels that know where records begin, as far as a CPU shows it."""

from typing import Any

import pytest
import torch
from conftest import llama
from helpers.packs import Trial, alone, assert_same_weights, together
from torch.nn import functional as F
from transformers import MistralConfig, MistralForCausalLM

from ftray.multi_adapter import fused_attention
from ftray.multi_adapter.attention import attention, layout
from ftray.multi_adapter.fused_attention import block_mask, choose_kernels, flex_rows, varlen
from ftray.task_spec import CAUSAL
from ftray.training.pack import Pack

LENGTHS = (5, 300, 1, 130, 40)
SIZES = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def mistral(window: int) -> MistralForCausalLM:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, **heads, sliding_window=window)).requires_grad_(False)


def attended_alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """Each record by itself, with a mask that compares all pairs of its tokens."""
    parts = []
    for query, key, value in zip(*(t.split(LENGTHS, 2) for t in (q, k, v)), strict=True):
        at = torch.arange(query.shape[2])
        seen = (at[:, None] >= at) & (at[:, None] - at < (window or 10**6))
        parts.append(F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True))
    return torch.cat(parts, 2).transpose(1, 2)


def by_record(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int, window: Any, scale: Any
) -> torch.Tensor:
    """What FlashAttention documents of its arguments, one record after another."""
    assert bounds.dtype == torch.int32
    lengths = bounds.diff().tolist()
    assert longest == max(lengths)
    assert bounds[0] == 0
    parts = []
    for query, key, value in zip(*(t.split(lengths) for t in (q, k, v)), strict=True):
        behind = torch.arange(len(query))[:, None] - torch.arange(len(query))
        seen = (behind <= (window[0] if window[0] >= 0 else len(query))) & (-behind <= window[1])
        heads = (t.transpose(0, 1)[None] for t in (query, key, value))
        out = F.scaled_dot_product_attention(*heads, attn_mask=seen, scale=scale, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 8, 128, 200])
@pytest.mark.parametrize("kernel", [attention, flex_rows, varlen])
def test_a_row_is_attended_to_as_each_record_alone(kernel, window, monkeypatch):
    monkeypatch.setattr(fused_attention, "varlen_function", lambda: by_record)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, sum(LENGTHS), 16, generator=draw) for heads in (4, 2, 2))
    row = layout(positions, torch.device("cpu"))
    got, _ = kernel([row], torch.nn.Module(), q, k, v, None, scaling=None, sliding_window=window)
    torch.testing.assert_close(got, attended_alone(q, k, v, window), atol=2e-6, rtol=0)


@pytest.mark.parametrize("window", [None, 8, 128, 200])
def test_flex_attention_leaves_out_the_blocks_that_nobody_sees(window):
    row = layout(torch.cat([torch.arange(length) for length in LENGTHS])[None], torch.device("cpu"))
    mask = block_mask(row, window, torch.device("cpu"))
    record = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    at = torch.arange(len(record))
    seen = (record[:, None] == record) & (at[:, None] >= at) & (at[:, None] - at < (window or 10**6))
    blocks = F.pad(seen, [0, -len(at) % 128] * 2).unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).any(3).any(1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks)


@pytest.mark.parametrize("make", [llama, lambda: mistral(8)], ids=["llama", "sliding window"])
def test_a_pack_by_flash_attention_equals_its_adapters_alone(make, monkeypatch):
    monkeypatch.setattr(fused_attention, "varlen_function", lambda: by_record)
    monkeypatch.setattr(fused_attention, "choose_kernels", lambda model, longest: [varlen, attention])
    base = make().requires_grad_(False)
    assert Pack(base, CAUSAL).verdict == "records are packed in one row, by FlashAttention"
    chosen = [Trial("lora", rows=3), Trial("dora", seed=1), Trial("oft", seed=2)]
    for got, trial in zip(together(base, chosen), chosen, strict=True):
        assert_same_weights(got, alone(base, trial), 1e-5)


def test_a_kernel_that_is_wrong_or_fails_is_passed_over(monkeypatch):
    def blind(*arguments: Any) -> torch.Tensor:
        *rows, bounds, longest, _, scale = arguments
        return by_record(*rows, bounds, longest, (-1, 0), scale)  # which forgets the window

    monkeypatch.setattr(fused_attention, "varlen_function", lambda: blind)
    # on a CPU FlexAttention has no backward pass
    monkeypatch.setattr(fused_attention, "choose_kernels", lambda model, longest: [varlen, flex_rows, attention])
    assert Pack(mistral(8), CAUSAL).verdict == "records are packed in one row"


def test_kernels_are_those_that_the_device_has(monkeypatch):
    class OnGPU:
        device, config = torch.device("cuda"), mistral(8).config

        def __init__(self, dtype: torch.dtype):
            self.dtype = dtype

    monkeypatch.setattr(fused_attention, "varlen_function", lambda: by_record)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    half, full = OnGPU(torch.bfloat16), OnGPU(torch.float32)
    assert choose_kernels(mistral(8), None) == [attention]
    assert choose_kernels(half, None) == [varlen, flex_rows, attention]
    assert choose_kernels(half, 8) == [varlen, attention]
    assert choose_kernels(full, 9) == [flex_rows, attention]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_kernels(half, 8) == [attention]
