"""How one adapter of a pack makes its optimiser steps; with DeepSpeed: :mod:`ftray.training.engine`."""

from dataclasses import dataclass
from typing import Protocol

import torch
from peft import PeftModel


class AdapterOptimizer(Protocol):
    """Updates an adapter from its gradients."""

    def apply(self, gradients: list[torch.Tensor], step: int) -> None:
        """Make one step with `gradients`, in the order of the adapter's trainable parameters; `step` counts from 0."""


@dataclass
class TorchOptimizer:
    """Clipping, optimiser and schedule in one process, with PyTorch alone.

    Attributes:
        clip_norm: greatest norm of this adapter's gradient; 0: no clipping.
    """

    model: PeftModel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None
    clip_norm: float = 0.0

    def apply(self, gradients: list[torch.Tensor], step: int) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if self.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        self.optimizer.step()
        if self.schedule:
            self.schedule.step()
        if hasattr(self.model.base_model, "update_and_allocate"):  # AdaLoRA
            self.model.base_model.update_and_allocate(step)
        self.optimizer.zero_grad()
