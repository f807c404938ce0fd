"""Randomness that depends on a run's seed and position alone: not on who trains beside it, nor on recomputation."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

STEPS = 2**16  # of a dropout's share: 16 random bits an element


class Dropout(nn.Module):
    """`nn.Dropout` on fewer random bits: on a CPU, drawing them takes most of its time."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask(x.shape, x.device).to(x.dtype) if self.training else x

    def mask(self, shape: torch.Size, device: torch.device) -> torch.Tensor:
        """Float32 of `shape`: 0 with probability `p` (to within 1/65536), else what keeps the mean at 1."""
        bits = torch.empty(-(-shape.numel() // 4), dtype=torch.int64, device=device).random_(-(2**63), None)
        dropped = round(self.p * STEPS)
        kept = bits.view(torch.int16)[: shape.numel()].view(shape) >= dropped - STEPS // 2
        return kept * (STEPS / (STEPS - dropped))


class Draws:
    """Seeds the generator before each adapted layer from (seed, step, micro-batch, rank, layer).

    Attributes:
        step, micro_batch: where the run is; whoever trains sets them.
    """

    def __init__(self, model: nn.Module, seed: int, rank: int = 0):
        self.seed, self.rank, self.step, self.micro_batch = seed, rank, 0, 0
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        for part in (part for layer in layers for part in layer.modules()):
            for name, child in part.named_children():
                if type(child) is nn.Dropout:
                    setattr(part, name, Dropout(child.p))
        self._index = {layer: i for i, layer in enumerate(layers) if any(_draws(part) for part in layer.modules())}
        self._hooks = [layer.register_forward_pre_hook(lambda layer, _: self.begin(layer)) for layer in self._index]

    def begin(self, layer: nn.Module) -> None:
        """Seed for `layer`, if it draws anything."""
        if layer.training and layer in self._index:
            place = hash((self.seed, self.step, self.micro_batch, self.rank, self._index[layer]))  # of integers: fixed
            # torch.manual_seed would look for every kind of device each time
            torch.default_generator.manual_seed(place & 0xFFFFFFFF)
            if torch.cuda.is_initialized():
                torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(place & 0xFFFFFFFF)

    def end(self) -> None:
        """Take the hooks away again."""
        for hook in self._hooks:
            hook.remove()


def _draws(module: Any) -> bool:
    share = getattr(module, "p", 0.0)  # Dropout, and OFT's MultiplicativeDropoutLayer
    return isinstance(share, float) and share > 0
