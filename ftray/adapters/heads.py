"""The head that a task puts on a base model: trained beside the adapter, and saved with it."""

from collections.abc import Sequence

import torch
from peft import PeftConfig, PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ftray.errors import UserError
from ftray.models.load import LoadedModel

NAMED_BY_PEFT = {  # layers of heads that PEFT trains, by the end of their name, whatever else it is told to
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def for_task(config: PeftConfig, base: LoadedModel) -> PeftConfig:
    """Set `task_type` and, for PEFT to train and save, the modules that the base model came without.

    Of a head of several layers the whole is named, also where but one of them is new: PEFT names it too, and would wrap
    a layer inside of what is wrapped already. Where PEFT names a layer within the head, its layers are named singly.
    """
    config.task_type = base.task.name
    body, new = base.model.base_model_prefix, list(base.new_modules)
    inner = tuple(f".{name}" for name in NAMED_BY_PEFT.get(config.task_type, ()))
    if not any(name.endswith(inner) for name in new):
        new = [name if name.startswith(f"{body}.") else name.split(".")[0] for name in new]
    if new and hasattr(config, "modules_to_save"):
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *new]))
    return config


def refuse_others(model: PeftModel, asked: Sequence[str] | None) -> None:
    """Compare the heads that a new PEFT model trains with `asked`, those in its configuration.

    Raises:
        UserError: PEFT, which goes by the end of a name, has found others too.
    """
    inner = model.get_base_model()
    found = [name for name, module in inner.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    for name in found:
        head = next((part for part in asked or () if name.endswith(part)), name)
        if head != name and head in found:
            raise UserError(f"{type(inner).__name__}: PEFT takes {name} for the head, named {head} too")


def exact_heads(model: PeftModel) -> None:
    """Hold the trained heads of `model` in float32, whatever the base is in, and give them what they are held in."""
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            wrapper.modules_to_save.float()
            wrapper.register_forward_pre_hook(_to_own_dtype)


def _to_own_dtype(module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    dtype = next(module.get_submodule("modules_to_save").parameters()).dtype
    return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)
