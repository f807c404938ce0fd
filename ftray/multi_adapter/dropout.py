"""Dropout that depends on a run's seed and position alone, not on other trials or on recomputation."""

import math

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


class Dropout(nn.Module):
    """`nn.Dropout` that, on a CPU, draws one number per dropped element instead of one per element.

    Attributes:
        p: probability that an element is dropped.
        scale: factor of the kept elements, 1 / (1 - p), which keeps the mean.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p, self.scale = p, 1 / (1 - p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        mask = torch.full(x.shape, self.scale, dtype=x.dtype, device=x.device)
        return x * zero(mask, self.draw(x.shape, x.device))

    def draw(self, shape: torch.Size, device: torch.device, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw which elements of a tensor of `shape` are dropped, each with probability `p`; for :func:`zero`.

        The number of kept elements between two dropped ones has a geometric distribution. On a GPU this would have to
        wait for the count, so there one number is drawn per element.

        Args:
            generator: of a CPU; None: the one that all threads share.
        """
        if device.type != "cpu":
            return torch.rand(shape, device=device) < self.p
        mean = shape.numel() * self.p
        enough = int(mean + 10 * math.sqrt(mean) + 30)  # ten standard deviations
        gaps = torch.empty(enough).exponential_(-math.log1p(-self.p), generator=generator).long()
        indices = (gaps + 1).cumsum(0) - 1
        return indices[: torch.searchsorted(indices, shape.numel())]


def zero(x: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """Set the `dropped` elements of `x` to 0 in place: flat int64 indices, or a bool mask of its first rows."""
    if dropped.dtype is torch.bool:
        x[: len(dropped)].masked_fill_(dropped, 0.0)
    else:
        x.view(-1).index_fill_(0, dropped, 0.0)
    return x


class DropoutRNG:
    """Seeds the generator before each adapted layer from (seed, step, micro-batch, rank, layer).

    Attributes:
        step, micro_batch: position of the run; the trainer sets them.
    """

    def __init__(self, model: nn.Module, seed: int, rank: int = 0):
        self.seed, self.rank, self.step, self.micro_batch = seed, rank, 0, 0
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        for part in (part for layer in layers for part in layer.modules()):
            for name, child in part.named_children():
                if type(child) is nn.Dropout:
                    setattr(part, name, Dropout(child.p).train(child.training))
        self._index = {layer: i for i, layer in enumerate(layers) if any(_draws(part) for part in layer.modules())}
        self._own = torch.Generator()
        self._hooks = [layer.register_forward_pre_hook(lambda layer, _: self.begin(layer)) for layer in self._index]

    def begin(self, layer: nn.Module) -> None:
        """Seed the generator for `layer`, if it draws random numbers."""
        if layer.training and layer in self._index:
            # torch.manual_seed would query every kind of device each time
            torch.default_generator.manual_seed(self._seed(layer))
            if torch.cuda.is_initialized():
                torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(self._seed(layer))

    def own_generator(self, layer: nn.Module) -> torch.Generator:
        """What draws on a CPU the numbers that :meth:`begin` has drawn there, and is no other thread's; until the next
        call."""
        return self._own.manual_seed(self._seed(layer))

    def _seed(self, layer: nn.Module) -> int:
        # a hash of integers is the same in every process
        return hash((self.seed, self.step, self.micro_batch, self.rank, self._index[layer])) & 0xFFFFFFFF

    def end(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()


def _draws(module: nn.Module) -> bool:
    share = getattr(module, "p", 0.0)  # Dropout, and OFT's MultiplicativeDropoutLayer
    return isinstance(share, float) and share > 0
