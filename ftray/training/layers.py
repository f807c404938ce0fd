"""A linear layer that many adapters share: its weight multiplies once, then each adapter changes its own rows."""

from typing import Any

import torch
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ftray.training.dropout import Draws, Dropout


class Rows:
    """Which rows of the batch at hand are whose; all shared layers of a pack look here.

    Attributes:
        spans: (adapter, first row, end), in order, without gaps.
    """

    def __init__(self) -> None:
        self.spans: list[tuple[str, int, int]] = []


class SharedLinear(nn.Module):
    """Takes the place of a frozen `base` layer in the model that runs the rows of all adapters.

    Attributes:
        base: an `nn.Linear`, a `Conv1D` or a quantised layer.
    """

    def __init__(self, base: nn.Module, rows: Rows):
        super().__init__()
        self.base, self.rows = base, rows
        self.members: dict[str, tuple[BaseTunerLayer, Draws]] = {}
        self.multiplies: set[str] = set()  # adapters that change the layer's input, and so must multiply by themselves

    def join(self, name: str, layer: BaseTunerLayer, draws: Draws) -> None:
        """Let `layer`, PEFT's own, have the rows of adapter `name`."""
        self.members[name] = layer, draws
        if _low_rank(layer):  # adds to the layer's output
            return
        base: Any = layer.get_base_layer()
        weight = base.weight
        inputs = getattr(base, "in_features", weight.shape[0])  # Conv1D: [in, out]
        # quantised weights are integers
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        row = torch.zeros(1, 1, inputs, device=weight.device, dtype=dtype)
        with torch.no_grad():
            answer = _Answer(base, row, self.base(row))
            layer.eval()(row)
        if answer.end():
            self.multiplies.add(name)

    def leave(self, name: str) -> None:
        """Nothing of adapter `name` stays."""
        del self.members[name]
        self.multiplies.discard(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[1, T, in] to [1, T, out], for the spans that `rows` holds now."""
        spans = [(self.members.get(name), name, first, end) for name, first, end in self.rows.spans]
        if all(member is None for member, *_ in spans):
            return self.base(x)
        updates = [_low_rank(member[0]) if member else () for member, *_ in spans]
        if all(update is not None for update in updates):
            return self._add_low_rank(x, spans, updates)
        return self._call_each(x, spans)

    def _call_each(self, x: torch.Tensor, spans: list[tuple[Any, str, int, int]]) -> torch.Tensor:
        sizes = [end - first for *_, first, end in spans]
        inputs = x.split(sizes, dim=1)
        shared = [i for i, (_, name, *_) in enumerate(spans) if name not in self.multiplies]
        multiplied: dict[int, torch.Tensor] = {}
        if shared:
            together = x if len(shared) == len(spans) else torch.cat([inputs[i] for i in shared], 1)
            # copies: some methods add to what they are given in place
            results = self.base(together).split([sizes[i] for i in shared], dim=1)
            multiplied = {i: result.clone() for i, result in zip(shared, results, strict=True)}
        outputs = []
        for i, ((member, *_), part) in enumerate(zip(spans, inputs, strict=True)):
            if member is None:
                outputs.append(multiplied[i])
                continue
            answer = _Answer(member[0].get_base_layer(), part, multiplied.get(i))
            outputs.append(member[0](part))
            answer.end()
        return torch.cat(outputs, dim=1)

    def _add_low_rank(
        self, x: torch.Tensor, spans: list[tuple[Any, str, int, int]], updates: list[Any]
    ) -> torch.Tensor:
        places, factors = [], []
        for (member, _, first, end), update in zip(spans, updates, strict=True):
            if not update:
                continue
            layer, draws = member
            a, b, scaling, dropout = update
            mask = None
            if isinstance(dropout, Dropout) and layer.training:
                draws.begin(layer)
                mask = dropout.mask(torch.Size([end - first, x.shape[-1]]), x.device)
            places.append((first, end, scaling, mask))
            factors += [a, b]
        return AddLowRank.apply(x, self.base(x), places, *factors)


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


def _low_rank(layer: BaseTunerLayer) -> tuple[torch.Tensor, torch.Tensor, float, nn.Module] | None:
    """Factors A [rank, in] and B [out, rank], scaling and dropout of a plain LoRA or AdaLoRA layer; None for others."""
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
    return a, b, scaling, layer.lora_dropout[name]


class AddLowRank(torch.autograd.Function):
    """Adds each adapter's `scaling * dropout(x) Aᵀ Bᵀ`, in float32 as PEFT does, to its rows of `y`.

    One node of the graph for all adapters, which works in place: slices of `x` and `y` would each be filled up again
    in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, places: list[Any], *factors: torch.Tensor) -> torch.Tensor:
        hidden = []
        for (first, end, scaling, mask), a, b in zip(places, factors[::2], factors[1::2], strict=True):
            given = x[0, first:end].float()  # by slices, which stay in the processor's cache
            hidden.append((given if mask is None else given * mask) @ a.T)
            y[0, first:end].add_(hidden[-1] @ b.T, alpha=scaling)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, *hidden, *factors)
        ctx.places = places
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        x, *saved = ctx.saved_tensors
        hidden, factors = saved[: len(ctx.places)], saved[len(ctx.places) :]
        inner = None
        if ctx.needs_input_grad[0]:
            whole = sum(end - first for first, end, *_ in ctx.places) == x.shape[1]
            inner = torch.empty_like(x) if whole else torch.zeros_like(x)
        gradients: list[torch.Tensor] = []
        for (first, end, scaling, mask), h, a, b in zip(ctx.places, hidden, factors[::2], factors[1::2], strict=True):
            given, outer = x[0, first:end].float(), gradient[0, first:end].float()
            dh = (outer @ b).mul_(scaling)
            gradients += [dh.T @ (given if mask is None else given * mask), outer.T @ (h * scaling)]
            if inner is not None:
                part = dh @ a
                inner[0, first:end] = part if mask is None else part.mul_(mask)
        return inner, gradient, None, *gradients
