"""The head that a task puts on a base model: trained beside the adapter, and saved with it."""

import torch
from peft import PeftConfig, PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from ftray.task_spec import task_of


def for_task(config: PeftConfig, model: PreTrainedModel) -> PeftConfig:
    """Set `task_type` and, for PEFT to train and save, the modules that the base model came without.

    Of a head of several layers the whole is named, also where but one of them is new: PEFT names it too, and would wrap
    a layer inside of what is wrapped already.
    """
    config.task_type = task_of(model).name
    base = model.base_model_prefix
    new = [name if name.startswith(f"{base}.") else name.split(".")[0] for name in getattr(model, "new_modules", [])]
    if new and hasattr(config, "modules_to_save"):
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *new]))
    return config


def exact_heads(model: PeftModel) -> None:
    """Hold the trained heads of `model` in float32, whatever the base is in, and give them float32."""
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            wrapper.modules_to_save.float()
            wrapper.register_forward_pre_hook(_to_float32)


def _to_float32(module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)
