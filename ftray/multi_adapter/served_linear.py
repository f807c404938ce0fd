"""The shared linear layer for inference: low-rank factors don't change, so they are looked up and concatenated once."""

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer

from ftray.multi_adapter.dropout import DropoutRNG
from ftray.multi_adapter.low_rank import LoraDelta, precision
from ftray.multi_adapter.packed_linear import Product, product_by
from ftray.multi_adapter.shared_linear import AdapterSegments, SharedLinear, update_of

RowRanges = tuple[tuple[int, int], ...]


class ServedSegments(AdapterSegments):
    """Adapter segments that also say which of the concatenated ranks belong to a row's adapter."""

    def __init__(self) -> None:
        super().__init__()
        self._own: dict[tuple[int, RowRanges, tuple[int, ...]], torch.Tensor] = {}

    def set(self, spans: list[tuple[str, int, int]], mask: torch.Tensor | None = None) -> None:
        super().set(spans, mask)
        self._own.clear()

    def own(self, row_ranges: RowRanges, ranks: tuple[int, ...], x: torch.Tensor) -> torch.Tensor:
        """A mask [T, sum of `ranks`] for `x` [1, T, in]: 1 at the ranks of the row's own adapter, else 0."""
        key = x.shape[1], row_ranges, ranks
        if key not in self._own:
            own = torch.zeros(x.shape[1], sum(ranks), device=x.device, dtype=precision(x))
            at = 0
            for (first, end), rank in zip(row_ranges, ranks, strict=True):
                own[first:end, at : at + rank] = 1
                at += rank
            self._own[key] = own
        return self._own[key]


class ServedLinear(SharedLinear):
    """Applies the low-rank updates of all adapters in two products, whatever their ranks (S-LoRA, arXiv 2311.03285)."""

    segments: ServedSegments

    def __init__(self, base: torch.nn.Module, segments: ServedSegments):
        super().__init__(base, segments)
        self._updates: dict[str, LoraDelta | None] = {}
        self._concatenated: tuple[tuple[str, ...], tuple[int, ...], Product, Product] | None = None

    def join(self, name: str, layer: BaseTunerLayer, rng: DropoutRNG) -> None:
        super().join(name, layer, rng)
        if type(layer) is LoraLinear and update_of(layer, rng, 0):
            layer.to(precision(layer.get_base_layer().weight))  # the only precision in which its factors are multiplied
        self._updates[name] = update_of(layer, rng, 0)

    def leave(self, name: str) -> None:
        super().leave(name)
        del self._updates[name]
        self._concatenated = None

    def _update(self, name: str, rows: int) -> LoraDelta | None:
        return self._updates[name]

    def _add(
        self, result: torch.Tensor, x: torch.Tensor, ranges: dict[int, tuple[int, int]], updates: list[LoraDelta]
    ) -> torch.Tensor:
        names = tuple(self.segments.spans[i][0] for i in ranges)
        if self._concatenated is None or self._concatenated[0] != names:
            a, b = (torch.cat(part) for part in ([u.a for u in updates], [u.b.T * u.scaling for u in updates]))
            a, b = a.to(precision(x)), b.to(precision(x))
            if not (a.isfinite().all() and b.isfinite().all()):  # NaN times 0 is NaN in the others' rows too
                raise FloatingPointError("an adapter's weights are not finite")
            ranks = tuple(len(update.a) for update in updates)
            self._concatenated = names, ranks, product_by(a), product_by(b.T)
        _, ranks, times_a, times_b = self._concatenated
        own = self.segments.own(tuple(ranges.values()), ranks, x)
        result[0].add_(times_b(times_a(x[0].to(own.dtype)).mul_(own)))
        return result
