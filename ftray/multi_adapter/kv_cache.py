"""Keys and values of the sequences that decode together, and the attention over them.

The caches of transformers grow by copying (`DynamicCache`) or hold sequences of equal length (`StaticCache`), and its
continuous batching needs GPU kernels and supports no adapters. Here sequences of any length have slots of one buffer
per layer, which `transformers.Cache` carries through the model. Registered with transformers' attention interface.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from ftray.multi_adapter.attention import refuse_unknown, register

INITIAL_CAPACITY = 256  # tokens of a slot at first; it doubles as needed


@dataclass
class Step:
    """Where the tokens of a flat row of T belong, in one step.

    Attributes:
        slots, positions: int64 [T], where each token's key and value go.
        prompts: (slot, first token, end, tokens cached before) of each sequence that has several tokens.
        last: int64 [N], the last token of each of the N slots from `first` on; all of them have one.
        lengths: int64 [N], number of tokens that those attend to, themselves included.
        longest: greatest of `lengths`.
        masks: by sliding window, masks that :meth:`mask` has made.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    prompts: list[tuple[int, int, int, int]]
    last: torch.Tensor
    lengths: torch.Tensor
    longest: int
    first: int = 0
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """[N, 1, 1, longest] in the dtype of `like`: 0 where a last token attends, -inf elsewhere."""
        if window not in self.masks:
            place = torch.arange(self.longest, device=like.device)
            seen = place < self.lengths[:, None]
            if window:
                seen &= place >= self.lengths[:, None] - window
            mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
            self.masks[window] = mask.masked_fill_(~seen, float("-inf"))[:, None, None]
        return self.masks[window]


class Slots(CacheLayerMixin):
    """One layer's keys and values, [slots, heads, capacity, head_dim]; `step` holds the current step.

    Values outside of all sequences must be finite too: 0 times NaN is NaN.
    """

    is_sliding = False

    def __init__(self, slots: int, step: list[Step]):
        super().__init__()
        self.slots, self.step = slots, step

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = (
            t.new_zeros(self.slots, t.shape[1], INITIAL_CAPACITY, t.shape[3]) for t in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new tokens' states, [1, heads, T, head_dim]; returns the buffers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = self.step[0]
        while self.keys.shape[2] < step.longest:
            self.keys, self.values = _doubled(self.keys), _doubled(self.values)
        self.keys[step.slots, :, step.positions] = key_states[0].transpose(0, 1)
        self.values[step.slots, :, step.positions] = value_states[0].transpose(0, 1)
        return self.keys, self.values

    def move(self, source: int, target: int | slice, length: int) -> None:
        """Copy the first `length` tokens of one slot to another, or to several."""
        for states in (self.keys, self.values):
            states[target, :, :length] = states[source, :, :length]

    def clear(self, slots: slice) -> None:
        """Zero these slots."""
        self.keys[slots], self.values[slots] = 0, 0

    def get_seq_length(self) -> int:
        return 0  # sequences differ: positions are always given

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1


def _doubled(states: torch.Tensor) -> torch.Tensor:
    """Double the capacity; the new part is not written to, so that on a CPU it takes no memory yet."""
    slots, heads, capacity, size = states.shape
    grown = states.new_zeros(slots, heads, 2 * capacity, size)
    grown[:, :, :capacity] = states
    return grown


def slotted_cache(layers: int, slots: int, step: list[Step]) -> Cache:
    """A cache of `layers` times `slots` sequences."""
    return Cache(layers=[Slots(slots, step) for _ in range(layers)])


def slotted_attention(step: list[Step]) -> str:
    """Register :func:`attention` for one model; returns the name of it.

    Args:
        step: holds the current step alone, set before each pass.
    """
    return register("ftray_serving", partial(attention, step))


def attention(
    current: list[Step],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each token to its own sequence.

    Args:
        current: holds the current step alone.
        query: [1, heads, T, head_dim].
        key, value: the buffers of :class:`Slots`.
        sliding_window: keys that a query sees, itself included; None: all before it.

    Returns:
        [1, T, heads, head_dim] and None.

    Raises:
        NotImplementedError: the model asks for soft capping or attention sinks.
    """
    refuse_unknown(kwargs)
    (step,) = current
    heads, groups, size = query.shape[1], key.shape[1], query.shape[3]
    output = query.new_empty(query.shape[2], heads, value.shape[3])
    for slot, first, end, before in step.prompts:
        length = before + end - first
        k, v = key[slot : slot + 1, :, :length], value[slot : slot + 1, :, :length]
        window = min(sliding_window or length, length)
        mask = None
        if before or window < length:
            distance = torch.arange(before, length, device=k.device)[:, None] - torch.arange(length, device=k.device)
            mask = (distance >= 0) & (distance < window)
        part = F.scaled_dot_product_attention(
            query[:, :, first:end],
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=heads != groups,
        )
        output[first:end] = part[0].transpose(0, 1)
    # the last token of every slot at once; heads that share a key take the place of queries
    slots, longest = len(step.last), step.longest
    q = query[0].index_select(1, step.last).transpose(0, 1).reshape(slots, groups, heads // groups, size)
    used, mask = slice(step.first, step.first + slots), step.mask(sliding_window, query)
    k, v = key[used, :, :longest], value[used, :, :longest]
    if q.device.type == "cpu" and q.dtype != torch.float32:  # where torch's own kernel is slower
        scores = q @ k.transpose(-1, -2) * (scaling or size**-0.5) + mask
        part = torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v
    else:
        part = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(-1, -1, q.shape[2], -1), scale=scaling)
    output[step.last] = part.reshape(slots, heads, -1)
    return output[None], None
