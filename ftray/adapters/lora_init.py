"""Initialisation of LoRA from the base's weights, its quantisation errors or the data.

PiSSA and OLoRA move a part of the base's weights into the adapter. The adapted layers get their own copy of these
weights, and the adapter is saved as the difference to its start: as a plain LoRA for the unchanged base.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from ftray.errors import UserError
from ftray.task_spec import TaskSpec

SAMPLES = 16  # batches that EVA repeats until the components converge
# by model, the initial weights of an adapter that took a part of the base
_starts: WeakKeyDictionary[nn.Module, dict[str, torch.Tensor]] = WeakKeyDictionary()


def takes_from_base(config: PeftConfig) -> bool:
    """Whether PEFT changes the base's weights when it initialises an adapter of this configuration."""
    return str(getattr(config, "init_lora_weights", "")).startswith(("pissa", "olora"))


def before(model: nn.Module, config: PeftConfig) -> None:
    """Copy the weights of the layers that the initialisation will change, which trials may share."""
    if not takes_from_base(config):
        return
    for name, module in model.named_modules():
        if any(name == target or name.endswith(f".{target}") for target in config.target_modules):
            weight: Any = module.weight
            module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)


def after(model: PeftModel, init: str, samples: Callable[[], list[Any]] | None) -> None:
    """Finish the initialisation of a new PEFT model.

    Args:
        model: just made by PEFT.
        init: the adapter's `init`.
        samples: gives the batches for EVA; None: there are none.

    Raises:
        UserError: EVA has no batches, or none with enough tokens.
    """
    if takes_from_base(model.active_peft_config):
        tensors = get_peft_model_state_dict(model).items()
        _starts[model] = {name: tensor.detach().cpu().float().clone() for name, tensor in tensors if "lora_" in name}
    elif init == "eva":
        _eva(model, samples)
    elif init == "loftq":
        _loftq(model)


def save(model: PeftModel, task: TaskSpec, directory: Path) -> None:
    """Write the adapter as a PEFT directory for the unchanged base, and the `task` that it is for."""
    model.save_pretrained(str(directory), save_embedding_layers=False)
    if start := _starts.get(model):
        _subtract_start(directory, start)
    task.save(directory)


def _subtract_start(directory: Path, start: dict[str, torch.Tensor]) -> None:
    """Rewrite a saved LoRA B A as B A - B0 A0, of twice the rank, which fits the unchanged base.

    PEFT's own conversion drops other trained modules (`modules_to_save`).
    """
    file = directory / SAFETENSORS_WEIGHTS_NAME
    tensors = load_file(file)
    for name, begun in start.items():
        side, sign = (0, 1) if "lora_A" in name else (1, -1)
        tensors[name] = torch.cat([tensors[name], sign * begun], side)
    save_file(tensors, file, {"format": "pt"})
    config = PeftConfig.from_pretrained(str(directory))
    factor = math.sqrt(2) if config.use_rslora else 2  # alpha is divided by the rank, or by its root
    config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, factor * config.lora_alpha, True
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: factor * alpha for name, alpha in config.alpha_pattern.items()}
    config.save_pretrained(str(directory))


def _eva(model: PeftModel, samples: Callable[[], list[Any]] | None) -> None:
    """Initialise by EVA (https://arxiv.org/abs/2410.07170): rank 0 computes the components and broadcasts them."""
    from peft import initialize_lora_eva_weights

    config = model.active_peft_config
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        if samples is None:
            raise UserError("init eva needs training data to look at")
        names = ("input_ids", "position_ids", "attention_mask", "token_type_ids")
        batches = [{k: v for k, v in b.items() if k in names} for b in samples()]
        ranks = max([config.r, *config.rank_pattern.values()])
        batches = [b for b in batches if b["input_ids"].numel() >= ranks]  # fewer tokens have fewer components
        if not batches:
            raise UserError(f"init eva: no batch holds {ranks} tokens, as many as the rank: take a smaller rank")
        initialize_lora_eva_weights(model, batches, gather_distributed_inputs=False, show_progress_bar=False)
    if dist.is_initialized() and dist.get_world_size() > 1:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                dist.broadcast(parameter.data, 0)


def _loftq(model: PeftModel) -> None:
    """Initialise by LoftQ (https://arxiv.org/abs/2310.08659), one iteration, on any device and with any alpha.

    PEFT's own function needs a GPU, and alpha equal to the rank.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_bnb_weight

    from ftray.compat.peft import stored_tensors

    base = model.get_base_model()
    path = base.config.name_or_path
    stored = stored_tensors(model, path if Path(path).is_dir() else None)
    for name, layer in base.named_modules():
        if isinstance(layer, LoraLayer):
            linear: Any = layer.get_base_layer()
            a, b, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
            whole = stored(f"{name}.weight").to(a.device, torch.float32)
            if getattr(linear, "source_cls", None) is Conv1D:
                whole = whole.T
            # not `dequantize_module_weight`: it replaces the weight, and drops the scales of one that has been used
            error = whole - dequantize_bnb_weight(linear.weight, getattr(linear, "state", None)).float()
            left, values, right = torch.linalg.svd(error / scaling, full_matrices=False)
            root = values[: len(a)].sqrt()
            a.data = (root[:, None] * right[: len(a)]).contiguous()
            b.data = (left[:, : len(a)] * root).contiguous()
