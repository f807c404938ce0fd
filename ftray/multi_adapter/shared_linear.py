"""A linear layer that many adapters share: its weight multiplies once, then each adapter changes its own rows."""

from itertools import accumulate
from typing import Any

import torch
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ftray.multi_adapter.dropout import Dropout, DropoutRNG
from ftray.multi_adapter.low_rank import AddLowRank, LoraDelta, PaddedSegments, padded_segments


class AdapterSegments:
    """Which rows of the batch at hand are whose; all shared layers of a pack look here.

    Attributes:
        spans: (adapter, first row, end), in order, without gaps.
    """

    def __init__(self) -> None:
        self.spans: list[tuple[str, int, int]] = []
        self._grids: dict[tuple[int, tuple[tuple[int, int], ...]], list[PaddedSegments]] = {}

    def set(self, spans: list[tuple[str, int, int]]) -> None:
        """The batch at hand is another one."""
        self.spans = spans
        self._grids.clear()

    def padded_segments(self, places: tuple[tuple[int, int], ...], x: torch.Tensor) -> list[PaddedSegments]:
        """How the rows at `places` of `x` [1, T, in] are laid out; made once for all layers with that T and places."""
        key = x.shape[1], places  # where an adapter multiplies by itself, its rows are not among those of `x`
        if key not in self._grids:
            self._grids[key] = padded_segments(places, x.shape[1], x.device)
        return self._grids[key]


class SharedLinear(nn.Module):
    """Takes the place of a frozen `base` layer in the model that runs the rows of all adapters.

    Attributes:
        base: an `nn.Linear`, a `Conv1D` or a quantised layer.
    """

    def __init__(self, base: nn.Module, rows: AdapterSegments):
        super().__init__()
        self.base, self.rows = base, rows
        self.members: dict[str, tuple[BaseTunerLayer, DropoutRNG]] = {}
        self.multiplies: set[str] = set()  # adapters that change the layer's input, and so must multiply by themselves

    def join(self, name: str, layer: BaseTunerLayer, draws: DropoutRNG) -> None:
        """Let `layer`, PEFT's own, have the rows of adapter `name`."""
        self.members[name] = layer, draws
        if update_of(layer.eval(), draws, 0):  # adds to the layer's output
            return
        base: Any = layer.get_base_layer()
        weight = base.weight
        inputs = getattr(base, "in_features", weight.shape[0])  # Conv1D: [in, out]
        # quantised weights are integers
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        row = torch.zeros(1, 1, inputs, device=weight.device, dtype=dtype)
        with torch.no_grad():
            answer = _Answer(base, row, self.base(row))
            layer(row)
        if answer.end():
            self.multiplies.add(name)

    def leave(self, name: str) -> None:
        """Nothing of adapter `name` stays."""
        del self.members[name]
        self.multiplies.discard(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[1, T, in] to [1, T, out], for the spans that `rows` holds now."""
        spans = self.rows.spans
        updates, own = {}, []
        for i, (name, first, end) in enumerate(spans):
            if member := self.members.get(name):
                if update := update_of(*member, end - first):
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
            places = {i: (end - sizes[i], end) for i, end in zip(kept, ends, strict=True) if i in updates}
            results = self._multiply(together, places, updates).split([sizes[i] for i in kept], dim=1)
            multiplied = dict(zip(kept, results, strict=True))
        for i in own:
            layer, _ = self.members[spans[i][0]]
            # a copy: some methods add to what they are given in place
            answer = _Answer(layer.get_base_layer(), inputs[i], multiplied[i].clone() if i in multiplied else None)
            try:
                multiplied[i] = layer(inputs[i])
            finally:  # out of memory, the pack goes on without it
                answer.end()
        return torch.cat([multiplied[i] for i in range(len(spans))], dim=1)

    def _multiply(
        self, x: torch.Tensor, places: dict[int, tuple[int, int]], updates: dict[int, LoraDelta]
    ) -> torch.Tensor:
        """The shared weight times `x`, and to the rows at `places` what the low-rank `updates` add."""
        result = self.base(x)
        return self._add(result, x, places, [updates[i] for i in places]) if updates else result

    def _add(
        self, result: torch.Tensor, x: torch.Tensor, places: dict[int, tuple[int, int]], updates: list[LoraDelta]
    ) -> torch.Tensor:
        """`result` with the `updates` of the spans that are the keys of `places`, in that order."""
        factors = [factor for update in updates for factor in (update.a, update.b)]
        return AddLowRank.apply(result, x, self.rows.grids(tuple(places.values()), x), updates, *factors)


class _Answer:
    """For the length of one call, a base layer that has been multiplied already gives that result for that input."""

    def __init__(self, base: nn.Module, given: torch.Tensor, result: torch.Tensor | None):
        self.base, self.given, self.result, self.multiplied = base, given, result, False
        base.__dict__["forward"] = self

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x is self.given and self.result is not None:
            return self.result
        self.multiplied = True
        return type(self.base).forward(self.base, x)

    def end(self) -> bool:
        """Leave the base layer as it was; whether it was asked for another product than the one at hand."""
        del self.base.__dict__["forward"]
        return self.multiplied


def update_of(layer: BaseTunerLayer, draws: DropoutRNG, rows: int) -> LoraDelta | None:
    """What a plain LoRA or AdaLoRA layer adds, with its dropout drawn for `rows`; None for other layers."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name = layer.active_adapters[0]
    if type(layer) is LoraLinear and name not in layer.lora_variant and not layer.lora_bias[name]:
        a, b, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    elif type(layer) is SVDLinear:
        a, b = layer.lora_A[name] * layer.lora_E[name], layer.lora_B[name]
        scaling = layer.scaling[name] / float(layer.ranknum[name] + 1e-5)
    else:
        return None
    dropout, dropped = layer.lora_dropout[name], None
    if isinstance(dropout, Dropout) and layer.training:
        draws.begin(layer)
        dropped, scaling = dropout.draw(torch.Size([rows, a.shape[1]]), a.device), scaling * dropout.scale
    return LoraDelta(a, b, scaling, dropped)
