"""Checkpoints: a PEFT adapter directory beside DeepSpeed's optimiser, schedule and position."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ftray.adapters import start
from ftray.training.adalora import RankAllocation

TAG = "state"


def save_checkpoint(engine: Any, allocation: RankAllocation, directory: str | Path, state: dict[str, Any]) -> None:
    """Write `directory/adapter` (PEFT, safetensors) and `directory/state` (DeepSpeed); every rank must call it.

    `state` (position, reports) comes back from :func:`load_checkpoint`. There is no random state to keep: each
    step seeds its generator from (seed, step, rank), and the data position is a function of the step.
    """
    engine.save_checkpoint(
        str(directory),
        tag=TAG,
        client_state={**state, "allocation": allocation.state()},
        exclude_frozen_parameters=True,
    )
    save_adapter(engine, allocation.model, Path(directory) / "adapter")


def load_checkpoint(engine: Any, allocation: RankAllocation, directory: str | Path) -> dict[str, Any]:
    """Restore weights, optimiser, schedule and rank allocation in place; returns the saved state."""
    _, client_state = engine.load_checkpoint(str(directory), tag=TAG, load_module_strict=False)
    allocation.restore(client_state["allocation"])
    return client_state


def save_adapter(engine: Any, model: Any, directory: Path) -> None:
    """Write the adapter as a plain PEFT directory; every rank must call it, rank 0 writes, aside and renamed."""
    import deepspeed

    trainable = [p for p in model.parameters() if p.requires_grad]
    with deepspeed.zero.GatheredParameters(trainable, enabled=engine.zero_optimization_stage() == 3):
        if dist.get_rank() == 0:
            aside = directory.with_name(f".{directory.name}.{os.getpid()}")
            start.save(model, aside)
            shutil.rmtree(directory, ignore_errors=True)
            aside.rename(directory)
