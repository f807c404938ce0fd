"""A PEFT model inside a DeepSpeed engine: optimiser, schedule, ZeRO partitioning, gradient reduction.

Of a pack, each trial has an engine of its own, which is handed gradients: :class:`DeepSpeedOptimizer`.
"""

import ctypes
import os
import sys
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from torch.autograd.function import FunctionCtx
from transformers import get_scheduler

from ftray.compat.deepspeed import skip_shared_memory_extension
from ftray.config import TrainingConfig
from ftray.errors import UserError
from ftray.multi_adapter.shared_model import trainable
from ftray.training.adalora import RankAllocation
from ftray.training.run_spec import accumulation_steps, micro_batch_size

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def join_process_group() -> None:
    """Make sure a process group exists: Ray Train's own where there is one, else a group of this process alone."""
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed expects the launcher to set it
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    skip_shared_memory_extension()
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def sum_over_ranks(values: list[float], device: torch.device | str) -> list[float]:
    """Element-wise sum, in float64."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def deepspeed_config(cfg: TrainingConfig, workers: int, parameters: int) -> dict[str, Any]:
    """The DeepSpeed configuration (https://www.deepspeed.ai/docs/config-json) of one run on a base of `parameters`.

    Neither bf16 nor fp16 is switched on: the base keeps the dtype it was loaded in and the adapter stays in
    float32, so there is no second master copy of the weights.
    """
    zero: dict[str, Any] = {"stage": cfg.zero_stage}
    if cfg.zero_stage and cfg.offload in ("optimizer", "all"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if cfg.zero_stage == 3:
        # DeepSpeed's own limits, a billion parameters, would keep most bases whole on every worker
        live = min(10**9, parameters // 32)  # about one block of a 7B model
        zero |= {
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": live,
            "stage3_prefetch_bucket_size": min(5 * 10**7, live),
        }
    if cfg.zero_stage == 3 and cfg.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": cfg.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size(cfg, workers),
        "gradient_accumulation_steps": accumulation_steps(cfg, workers),
        "gradient_clipping": cfg.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def build_engine(
    model: nn.Module, cfg: TrainingConfig, steps: int, rate_ratio: float = 1.0
) -> deepspeed.DeepSpeedEngine:
    """Wrap `model` (float32 trainable parameters, frozen rest) for `steps` optimiser steps.

    Args:
        rate_ratio: learning rate of LoRA's B, in multiples of the run's (LoRA+, https://arxiv.org/abs/2402.12354).

    Returns:
        The engine with its optimiser and learning-rate schedule.
    """
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())  # ds_numel: of a partitioned one
    optimizer = _optimizer(_groups(model, cfg.learning_rate, rate_ratio), cfg)
    schedule = get_scheduler(SCHEDULES[cfg.schedule], optimizer, round(cfg.warmup * steps), steps)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=deepspeed_config(cfg, dist.get_world_size(), parameters),
        dist_init_required=False,
    )
    if cfg.zero_stage == 3:
        _register_dictionaries(model)
    return engine


def return_freed_memory() -> None:
    """Make glibc return the memory of tensors of 1 MiB and more to the system at once, instead of keeping it.

    What gathers and frees parameters of many sizes in turn, as ZeRO 3 and a sharded base do, would keep more than the
    whole base.
    """
    if sys.platform == "linux":
        mmap_threshold = -3  # M_MMAP_THRESHOLD, https://man7.org/linux/man-pages/man3/mallopt.3.html
        ctypes.CDLL(None).mallopt(mmap_threshold, 2**20)


def _register_dictionaries(model: nn.Module) -> None:
    """Register with ZeRO 3 the parameters that layers, as those of AdaLoRA and IA3, read from an `nn.ParameterDict`.

    DeepSpeed registers a partitioned parameter only when it is first used, which may be too late for its trace.
    """
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ParameterDict):
                for parameter in child.values():
                    deepspeed.zero.register_external_parameter(module, parameter)


def _groups(model: nn.Module, learning_rate: float, rate_ratio: float) -> list[dict[str, Any]]:
    """One parameter group a learning rate."""
    ratios: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ratios.setdefault(rate_ratio if "lora_B" in name else 1.0, []).append(parameter)
    return [{"params": own, "lr": learning_rate * ratio} for ratio, own in ratios.items()]


def _optimizer(groups: list[dict[str, Any]], cfg: TrainingConfig) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {
        "lr": cfg.learning_rate,
        "betas": (cfg.beta1, cfg.beta2),
        "weight_decay": cfg.weight_decay,
    }
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **settings)
    if not torch.cuda.is_available():
        raise UserError(f"training.optimizer {cfg.optimizer} needs a GPU: use adamw")
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    return (AdamW8bit if cfg.optimizer == "adamw_8bit" else PagedAdamW8bit)(groups, **settings)


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
        """`rate_ratio` is that of :func:`build_engine`."""
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
