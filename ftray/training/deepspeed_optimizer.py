"""How one adapter of a pack makes its optimiser steps with DeepSpeed, over all ranks."""

import torch
from peft import PeftModel
from torch import nn
from torch.autograd.function import FunctionCtx

from ftray.config import TrainingConfig
from ftray.multi_adapter.shared_model import trainable
from ftray.training.adalora import RankAllocation
from ftray.training.engine import build_engine


class TrainableParameters(nn.Module):
    """The trained parameters of a PEFT model and nothing else: all that a DeepSpeed engine needs of it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(name.replace(".", "/"), parameter)


class _Context(FunctionCtx):
    """What the forward pass leaves for the backward pass."""

    gradients: list[torch.Tensor]


class InjectGradients(torch.autograd.Function):
    """A scalar whose backward pass gives each parameter a gradient that has already been computed."""

    @staticmethod
    def forward(ctx: _Context, gradients: list[torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: _Context, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.gradients


class DeepSpeedOptimizer:
    """Gradient reduction, ZeRO, clipping, optimiser and schedule of one adapter, all by DeepSpeed.

    Each trial has an engine, not a parameter group in a common one: trials then join, leave, clip, checkpoint and
    diverge without touching each other's optimiser.
    """

    def __init__(self, model: PeftModel, cfg: TrainingConfig, steps: int, rate_ratio: float = 1.0):
        """`rate_ratio` is that of :func:`ftray.training.engine.build_engine`."""
        adapter = TrainableParameters(model)
        self.parameters = trainable(model)
        # the pack has already summed the micro-batches
        self.engine = build_engine(adapter, cfg.model_copy(update={"micro_batch": None}), steps, rate_ratio)
        self.allocation = RankAllocation(self.engine, model)

    def apply(self, gradients: list[torch.Tensor], step: int) -> None:
        """As :meth:`ftray.training.optimizer.AdapterOptimizer.apply`; each rank passes its own gradients."""
        self.engine.backward(InjectGradients.apply(gradients, *self.parameters), scale_wrt_gas=False)
        self.allocation.before_step()
        self.engine.step()
        self.allocation.after_step(step)
