"""A linear layer that many adapters share: it multiplies once by its weight, then each adapter changes its own rows."""

from itertools import accumulate
from typing import Any, Self

import torch
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ftray.models.sharding import whole
from ftray.multi_adapter.dropout import Dropout, DropoutRNG
from ftray.multi_adapter.low_rank import AddLowRank, LoraDelta, PaddedSegments, padded_segments


class PackingUnsupported(ValueError):
    """This model or adapter can't share a batch with others; the message says why."""


class AdapterSegments:
    """Which rows of the current batch belong to which adapter; shared by all layers of a pack.

    Attributes:
        spans: (adapter, first row, end) of each, in order, without gaps.
        mask: int64 [records, longest] of a padded batch, 1 at tokens and 0 at padding; None: the rows follow
            one another without padding.
        unpad_index: int64 [T], positions of the rows in the flattened mask; None: nothing is padded.
    """

    def __init__(self) -> None:
        self.spans: list[tuple[str, int, int]] = []
        self.mask: torch.Tensor | None = None
        self.unpad_index: torch.Tensor | None = None
        self._padded: dict[tuple[int, tuple[tuple[int, int], ...]], list[PaddedSegments]] = {}

    def set(self, spans: list[tuple[str, int, int]], mask: torch.Tensor | None = None) -> None:
        """Describe the next batch."""
        self.spans, self.mask = spans, mask
        self.unpad_index = None if mask is None else mask.flatten().nonzero().squeeze(1)
        self._padded.clear()

    @property
    def size(self) -> int:
        """Number of rows of a layer's input, padding included."""
        return self.spans[-1][2] if self.mask is None else self.mask.numel()

    def padded(self, row_ranges: tuple[tuple[int, int], ...], x: torch.Tensor) -> list[PaddedSegments]:
        """The layout of these rows of `x` [1, T, in]; made once for all layers with the same ranges."""
        key = x.shape[1], row_ranges  # rows of an adapter that multiplies separately are not in `x`
        if key not in self._padded:
            self._padded[key] = padded_segments(row_ranges, x.shape[1], x.device)
        return self._padded[key]


class SharedLinear(nn.Module):
    """Replaces a frozen `base` layer in the model that runs the rows of all adapters.

    Attributes:
        base: an `nn.Linear`, a `Conv1D` or a quantised layer.
        adapters: by name, its PEFT layer and its dropout.
        multiplies: adapters that change the layer's input, so that their rows are multiplied separately.
        copies: whether what `base` returns must not be added to in place: PEFT does not either, over bitsandbytes.
    """

    def __init__(self, base: nn.Module, segments: AdapterSegments):
        super().__init__()
        self.base, self.segments = base, segments
        self.adapters: dict[str, tuple[BaseTunerLayer, DropoutRNG]] = {}
        self.multiplies: set[str] = set()
        self.copies = type(base).__module__.startswith("bitsandbytes.")

    @classmethod
    def at(cls, model: nn.Module, path: str, segments: AdapterSegments) -> Self:
        """The shared layer at `path` in `model`, which replaces the model's own layer unless it has done so already."""
        layer = model.get_submodule(path)
        if not isinstance(layer, cls):
            layer = cls(layer, segments)
            model.set_submodule(path, layer)
        return layer

    def join(self, name: str, layer: BaseTunerLayer, rng: DropoutRNG) -> None:
        """Add the PEFT `layer` of adapter `name`."""
        self.adapters[name] = layer, rng
        if update_of(layer.eval(), rng, 0):  # adds to the layer's output
            return
        base: Any = layer.get_base_layer()
        weight = base.weight
        inputs = getattr(base, "in_features", weight.shape[0])  # Conv1D: [in, out]
        # quantised weights are integers
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        row = torch.zeros(1, 1, inputs, device=weight.device, dtype=dtype)
        with torch.no_grad(), whole(base):
            answer = _Answer(base, row, self.base(row))
            layer(row)
        if answer.end():
            self.multiplies.add(name)

    def leave(self, name: str) -> None:
        """Remove adapter `name`."""
        del self.adapters[name]
        self.multiplies.discard(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out], each adapter on its rows as given by `segments`; padding becomes zeros.

        Raises:
            PackingUnsupported: the input has other rows than the batch, as that of an expert.
        """
        flat, unpad_index = x.reshape(1, -1, x.shape[-1]), self.segments.unpad_index
        if flat.shape[1] != self.segments.size:
            raise PackingUnsupported(f"a layer that it adapts is given {flat.shape[1]} of {self.segments.size} tokens")
        if unpad_index is None:
            result = self._rows(flat)
        else:
            own = self._rows(flat.index_select(1, unpad_index))
            result = own.new_zeros(1, flat.shape[1], own.shape[2]).index_copy(1, unpad_index, own)
        return result.view(*x.shape[:-1], result.shape[-1])

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """[1, T, in] to [1, T, out]."""
        spans = self.segments.spans
        updates, own = {}, []
        for i, (name, first, end) in enumerate(spans):
            if name in self.adapters:
                if update := self._update(name, end - first):
                    updates[i] = update
                else:
                    own.append(i)
        if not own:
            return self._multiply(x, {i: spans[i][1:] for i in updates}, updates)
        sizes = [end - first for _, first, end in spans]
        inputs = x.split(sizes, dim=1)
        kept = [i for i, (name, *_) in enumerate(spans) if name not in self.multiplies]
        multiplied: dict[int, torch.Tensor] = {}
        if kept:
            together = x if len(kept) == len(spans) else torch.cat([inputs[i] for i in kept], 1)
            ends = list(accumulate(sizes[i] for i in kept))
            ranges = {i: (end - sizes[i], end) for i, end in zip(kept, ends, strict=True) if i in updates}
            results = self._multiply(together, ranges, updates).split([sizes[i] for i in kept], dim=1)
            multiplied = dict(zip(kept, results, strict=True))
        for i in own:
            layer, _ = self.adapters[spans[i][0]]
            # a copy, as some methods add to their input in place
            answer = _Answer(layer.get_base_layer(), inputs[i], multiplied[i].clone() if i in multiplied else None)
            try:
                multiplied[i] = layer(inputs[i])
            finally:  # after running out of memory the pack continues without it
                answer.end()
        return torch.cat([multiplied[i] for i in range(len(spans))], dim=1)

    def _update(self, name: str, rows: int) -> LoraDelta | None:
        """What adapter `name` adds to `rows` rows; None: it changes them in its own way."""
        return update_of(*self.adapters[name], rows)

    def _multiply(
        self, x: torch.Tensor, ranges: dict[int, tuple[int, int]], updates: dict[int, LoraDelta]
    ) -> torch.Tensor:
        """Multiply `x` by the shared weight, and add the low-rank `updates` to the rows in `ranges`."""
        result = self.base(x)
        if updates and self.copies:
            result = result.clone()
        return self._add(result, x, ranges, [updates[i] for i in ranges]) if updates else result

    def _add(
        self, result: torch.Tensor, x: torch.Tensor, ranges: dict[int, tuple[int, int]], updates: list[LoraDelta]
    ) -> torch.Tensor:
        """Add the `updates` to `result`; they belong to the segments that are keys of `ranges`, in that order."""
        factors = [factor for update in updates for factor in (update.a, update.b)]
        added: torch.Tensor = AddLowRank.apply(
            result, x, self.segments.padded(tuple(ranges.values()), x), updates, *factors
        )
        return added


class _Answer:
    """During one call, makes a base layer return a result that is already computed when it gets the same input."""

    def __init__(self, base: nn.Module, given: torch.Tensor, result: torch.Tensor | None):
        self.base, self.given, self.result, self.multiplied = base, given, result, False
        base.__dict__["forward"] = self

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x is self.given and self.result is not None:
            return self.result
        self.multiplied = True
        product: torch.Tensor = type(self.base).forward(self.base, x)
        return product

    def end(self) -> bool:
        """Restore the base layer; returns whether it had to multiply another input."""
        del self.base.__dict__["forward"]
        return self.multiplied


def update_of(layer: BaseTunerLayer, rng: DropoutRNG, rows: int) -> LoraDelta | None:
    """The update of a plain LoRA layer, over a quantised weight too, or AdaLoRA layer; None for other layers.

    Dropout is drawn for `rows` rows.
    """
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name = layer.active_adapters[0]
    if _is_lora(layer) and name not in layer.lora_variant and not layer.lora_bias[name]:
        a, b, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    elif type(layer) is SVDLinear:
        a, b = layer.lora_A[name] * layer.lora_E[name], layer.lora_B[name]
        scaling = layer.scaling[name] / float(layer.ranknum[name] + 1e-5)
    else:
        return None
    dropout, dropped = layer.lora_dropout[name], None
    if isinstance(dropout, Dropout) and layer.training:
        shape, scaling = torch.Size([rows, a.shape[1]]), scaling * dropout.scale
        if a.device.type == "cpu":
            dropped = dropout.draw(shape, a.device, rng.own_generator(layer))
        else:
            rng.begin(layer)
            dropped = dropout.draw(shape, a.device)
    return LoraDelta(a, b, scaling, dropped)


def _is_lora(layer: BaseTunerLayer) -> bool:
    return type(layer) is LoraLinear or type(layer).__module__ == "peft.tuners.lora.bnb"  # which needs bitsandbytes
