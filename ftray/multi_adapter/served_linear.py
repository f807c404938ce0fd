"""The shared linear layer where nothing is trained: low-rank factors don't change, so they are put together once."""

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer

from ftray.multi_adapter.dropout import DropoutRNG
from ftray.multi_adapter.low_rank import LoraDelta, precision
from ftray.multi_adapter.shared_linear import AdapterSegments, SharedLinear, update_of

Places = tuple[tuple[int, int], ...]


class ServedSegments(AdapterSegments):
    """AdapterSegments that also know which of the ranks side by side are a row's own."""

    def __init__(self) -> None:
        super().__init__()
        self._own: dict[tuple[int, Places, tuple[int, ...]], torch.Tensor] = {}

    def set(self, spans: list[tuple[str, int, int]]) -> None:
        super().set(spans)
        self._own.clear()

    def own(self, places: Places, ranks: tuple[int, ...], x: torch.Tensor) -> torch.Tensor:
        """[T, sum of `ranks`] for `x` [1, T, in]: 1 at the ranks of the adapter at that place, else 0."""
        key = x.shape[1], places, ranks
        if key not in self._own:
            own = torch.zeros(x.shape[1], sum(ranks), device=x.device, dtype=precision(x))
            at = 0
            for (first, end), rank in zip(places, ranks, strict=True):
                own[first:end, at : at + rank] = 1
                at += rank
            self._own[key] = own
        return self._own[key]


class ServedLinear(SharedLinear):
    """Two products for the low-rank updates of all adapters, whatever their ranks (see S-LoRA, arXiv 2311.03285)."""

    rows: ServedSegments

    def __init__(self, base: torch.nn.Module, rows: ServedSegments):
        super().__init__(base, rows)
        self._together: tuple[tuple[str, ...], torch.Tensor, torch.Tensor] | None = None

    def join(self, name: str, layer: BaseTunerLayer, draws: DropoutRNG) -> None:
        super().join(name, layer, draws)
        if type(layer) is LoraLinear and update_of(layer, draws, 0):
            layer.to(precision(layer.get_base_layer().weight))  # its factors are multiplied in no other

    def leave(self, name: str) -> None:
        super().leave(name)
        self._together = None

    def _add(
        self, result: torch.Tensor, x: torch.Tensor, places: dict[int, tuple[int, int]], updates: list[LoraDelta]
    ) -> torch.Tensor:
        names = tuple(self.rows.spans[i][0] for i in places)
        if self._together is None or self._together[0] != names:
            a, b = (torch.cat(part) for part in ([u.a for u in updates], [u.b.T * u.scaling for u in updates]))
            a, b = a.to(precision(x)), b.to(precision(x))
            if not (a.isfinite().all() and b.isfinite().all()):  # NaN times 0 is NaN in the others' rows too
                raise FloatingPointError("an adapter's weights are not finite")
            self._together = names, a, b
        _, a, b = self._together
        own = self.rows.own(tuple(places.values()), tuple(len(update.a) for update in updates), x)
        result[0].add_((x[0].to(a.dtype) @ a.T).mul_(own) @ b)
        return result
