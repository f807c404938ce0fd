"""Linear layers whose weights are also laid out as oneDNN multiplies by them; for inference on a CPU in bfloat16.

By a weight as PyTorch holds it, oneDNN lays out parts anew in each product: with the few rows of a decoding step, that
takes a third of the time. The results are the same to the last bit.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeGuard

import psutil
import torch
from torch import nn

from ftray.compat.torch import can_pack_weights, packed_product, packed_weight

Product = Callable[[torch.Tensor], torch.Tensor]
MOST_BYTES = 2**31  # of a model's weights: a second copy of larger ones is memory that adapters need


class PackedLinear(nn.Linear):
    """Takes the place of `layer`, with the same parameters.

    Args:
        packed: its weight, by :func:`ftray.compat.torch.packed_weight`.
    """

    def __init__(self, layer: nn.Linear, packed: torch.Tensor):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self._packed = packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype is not torch.bfloat16 or torch.is_grad_enabled():
            return super().forward(x)
        return packed_product(x, self._packed, self.bias)


class WeightPacker:
    """Packs the linear layers of a frozen model and of copies that share its weights, each weight once.

    Args:
        base: the model.

    Attributes:
        enabled: whether it packs: where that is faster, and memory allows for a second copy.
    """

    def __init__(self, base: nn.Module):
        weights = {id(m.weight): m.weight for m in base.modules() if _is_plain(m)}
        size = sum(weight.numel() * weight.element_size() for weight in weights.values())
        room = min(MOST_BYTES, psutil.virtual_memory().available // 4)
        self.enabled = bool(weights) and size <= room and can_pack_weights()
        self._packed: dict[int, torch.Tensor] = {}

    def pack(self, model: nn.Module) -> None:
        """Replace the linear layers inside `model`."""
        for path, layer in list(model.named_modules()):
            if path and _is_plain(layer):
                model.set_submodule(path, self.packed(layer))

    def packed(self, layer: nn.Module) -> nn.Module:
        """What takes the place of `layer`; itself, if it can't be packed."""
        if not (self.enabled and _is_plain(layer)):
            return layer
        weight = layer.weight
        if id(weight) not in self._packed:
            self._packed[id(weight)] = packed_weight(weight)
        return PackedLinear(layer, self._packed[id(weight)])


def product_by(weight: torch.Tensor) -> Product:
    """The products `x @ weight.T` by a weight [out, in] that stays as it is; without a gradient."""
    if _is_half(weight) and can_pack_weights():
        return partial(packed_product, packed=packed_weight(weight), bias=None)
    return lambda x: x @ weight.T


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear and _is_half(module.weight)


def _is_half(weight: torch.Tensor) -> bool:
    return weight.dtype is torch.bfloat16 and weight.device.type == "cpu"
