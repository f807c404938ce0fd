"""Checkpoints: a PEFT adapter directory, DeepSpeed's optimiser and schedule, and the state of the run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ftray.adapters import lora_init
from ftray.adapters.discovery import CONFIG
from ftray.config import ModelConfig
from ftray.errors import UserError
from ftray.storage.manifest import check, seal
from ftray.task_spec import CAUSAL, TaskSpec
from ftray.training.adalora import RankAllocation

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from peft import PeftModel
    from transformers import PreTrainedModel

TAG = "state"


def save_checkpoint(
    engine: "DeepSpeedEngine", allocation: RankAllocation, task: TaskSpec, directory: str | Path, state: dict[str, Any]
) -> None:
    """Write `directory/adapter` (PEFT, safetensors) and `directory/state` (DeepSpeed); every rank must call it.

    :func:`load_checkpoint` returns `state` (step, reports). There is no random state to keep: each step seeds its
    generator from (seed, step, rank), and the position in the data is a function of the step.
    """
    engine.save_checkpoint(
        str(directory),
        tag=TAG,
        client_state={**state, "allocation": allocation.state()},
        exclude_frozen_parameters=True,
    )
    save_adapter(engine, allocation.model, task, Path(directory) / "adapter")


def load_checkpoint(engine: "DeepSpeedEngine", allocation: RankAllocation, directory: str | Path) -> dict[str, Any]:
    """Restore weights, optimiser, schedule and rank allocation in place; returns the saved state."""
    client_state: dict[str, Any]
    _, client_state = engine.load_checkpoint(str(directory), tag=TAG, load_module_strict=False)
    allocation.restore(client_state["allocation"])
    return client_state


def save_adapter(engine: "DeepSpeedEngine", model: "PeftModel", task: TaskSpec, directory: Path) -> None:
    """Write the adapter as a plain PEFT directory with a manifest; every rank must call it, rank 0 writes."""
    import deepspeed

    trainable = [p for p in model.parameters() if p.requires_grad]
    with deepspeed.zero.GatheredParameters(trainable, enabled=engine.zero_optimization_stage() == 3):
        if dist.get_rank() == 0:
            lora_init.save(model, task, directory)
            seal(directory)


def is_checkpoint(directory: str | Path) -> bool:
    """Whether `directory` holds a checkpoint of DeepSpeed, by this package or any other program."""
    return (Path(directory) / TAG).is_dir() or (Path(directory) / "latest").is_file()


def trained_weights(directory: str | Path) -> dict[str, torch.Tensor]:
    """The trained weights of a checkpoint, in float32, by name: gathered from all ranks' shards, in one process.

    Raises:
        UserError: it is damaged, a shard is missing, or it isn't a checkpoint that DeepSpeed can read.
    """
    check(Path(directory), f"checkpoint {directory}")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    tag = TAG if (Path(directory) / TAG).is_dir() else (Path(directory) / "latest").read_text().strip()
    state = Path(directory) / tag
    try:
        if any(state.glob("*zero_pp_rank_*")):
            # the frozen base is not in it (see save_checkpoint): nothing else can be asked for
            weights = get_fp32_state_dict_from_zero_checkpoint(str(directory), tag, exclude_frozen_parameters=True)
        else:  # stage 0: rank 0 holds all
            weights = torch.load(state / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise UserError(f"checkpoint {directory}: {str(error).splitlines()[0]}") from None
    # a pack's engines know parameters by names without dots
    return {name.replace("/", "."): weight.float() for name, weight in weights.items()}


@torch.no_grad()
def start_from(model: "PeftModel", directory: str | Path) -> None:
    """Give a new adapter the trained weights of a checkpoint, without its optimiser's state, or of a saved adapter.

    Raises:
        UserError: as :func:`trained_weights`, or they are those of another adapter.
    """
    if (Path(directory) / CONFIG).is_file():
        _take_saved(model, Path(directory))
        return
    weights = trained_weights(directory)
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if odd := sorted(n for n in own.keys() | weights.keys() if n not in own or own[n].shape != weights[n].shape):
        raise UserError(f"checkpoint {directory}: not of such an adapter: {odd[0]} differs")
    for name, parameter in own.items():
        parameter.copy_(weights[name])


def _take_saved(model: "PeftModel", directory: Path) -> None:
    from peft import load_peft_weights, set_peft_model_state_dict

    try:
        found = set_peft_model_state_dict(model, load_peft_weights(str(directory), device="cpu"))
    except (RuntimeError, LookupError, ValueError) as error:
        raise UserError(f"adapter {directory}: not of such an adapter: {str(error).splitlines()[-1].strip()}") from None
    own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    odd = [*(name for name in found.missing_keys if name in own), *found.unexpected_keys]
    if odd and not model.active_peft_config.is_prompt_learning:  # of which PEFT has raised if it lacked anything
        raise UserError(f"adapter {directory}: not of such an adapter: {odd[0]} differs")


def adapter_from(cfg: ModelConfig, base: str, checkpoint: str | Path, like: Path, task: TaskSpec, output: Path) -> Path:
    """Write a checkpoint's weights as a PEFT directory with the configuration of the adapter directory `like`.

    Raises:
        UserError: as :func:`trained_weights`, or what was trained is not that adapter.
    """
    from peft import get_peft_model

    from ftray.adapters.discovery import weightless_config
    from ftray.models.load import load_skeleton

    config = weightless_config(like)
    with torch.device("meta"):
        model = get_peft_model(load_skeleton(cfg, base, task).model, config)
    weights = trained_weights(checkpoint)
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if wanted != weights.keys():
        odd = sorted(wanted ^ weights.keys())
        raise UserError(f"checkpoint {checkpoint}: not of the adapter {like}: {odd[0]} is in one of them only")
    config.inference_mode = True
    model.save_pretrained(str(output), state_dict=weights, save_embedding_layers=False)
    task.save(output)
    return output


def model_from(cfg: ModelConfig, base: str, checkpoint: str | Path, task: TaskSpec = CAUSAL) -> "PreTrainedModel":
    """The base model with a checkpoint of full fine-tuning in place of its weights, in float32.

    Raises:
        UserError: as :func:`trained_weights`, or the base has no such weights.
    """
    from ftray.models.load import load_whole

    weights = trained_weights(checkpoint)
    model = load_whole(cfg.model_copy(update={"quantization": "none"}), base, task)
    try:
        unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    except RuntimeError as error:
        raise UserError(f"checkpoint {checkpoint}: not of {base}: {str(error).splitlines()[-1].strip()}") from None
    if unexpected:
        raise UserError(f"checkpoint {checkpoint}: not of {base}, which has no {unexpected[0]}")
    loaded = model.state_dict()
    if odd := [name for name, weight in weights.items() if not torch.equal(loaded[name].cpu(), weight)]:
        raise UserError(f"checkpoint {checkpoint}: not of {base}, where {odd[0]} is one with another weight")
    return model
