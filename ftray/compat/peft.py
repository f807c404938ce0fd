"""Private names of PEFT; seen in PEFT 0.21.2."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftModel
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.loftq_utils import _SafetensorLoader
from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
from torch import nn


def stored_tensors(model: PeftModel, directory: str | None) -> Callable[[str], torch.Tensor]:
    """Reads a weight of the base model by name as it is stored, before quantisation; on the CPU.

    `replace_lora_weights_loftq`, the public function around it, is for 4-bit layers on GPUs alone.

    Args:
        directory: of the base model; None: in the hub's cache.
    """
    read: Callable[[str], torch.Tensor] = _SafetensorLoader(model, directory).get_tensor
    return read


def taken_names(model: nn.Module, method: str) -> frozenset[str]:
    """Last parts of module names that PEFT, in `model`, refuses or takes for something else than the modules so named.

    LoRA's of a mixture of experts may be those of an older transformers, where each expert had layers of its own: PEFT
    goes to the fused weights of all experts, and to dense layers of the same name no more.

    Args:
        method: PEFT's name of it, as "LORA".
    """
    kind = getattr(getattr(model, "config", None), "model_type", "")
    mapping = _MOE_TARGET_MODULE_MAPPING.get(_MODEL_TO_CONVERSION_PATTERN.get(kind, ""), {})
    found = set(mapping) if method == "LORA" else set()
    for name in {path.rpartition(".")[2] for path, _ in model.named_modules()}:
        try:
            _check_lora_target_modules_mamba(SimpleNamespace(peft_type=method), model, name)
        except ValueError:
            found.add(name)
    return frozenset(found)


@contextmanager
def around_layers(kind: str, around: Callable[[nn.Module], AbstractContextManager[None]]) -> Iterator[None]:
    """Inside, PEFT adapts each layer of a new model within `around(layer)`: some methods start from its weights.

    PEFT itself gathers weights that DeepSpeed has shared out, and no others.

    Args:
        kind: PEFT's name of the method, as "LORA".
    """
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    if not hasattr(tuner, "_create_and_replace"):  # a prompt method
        yield
        return
    adapt, own = tuner._create_and_replace, "_create_and_replace" in vars(tuner)

    def adapt_whole(self: object, config: object, name: str, target: nn.Module, *rest: object, **more: object) -> None:
        layer: Any = target
        with around(layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer):
            adapt(self, config, name, target, *rest, **more)

    tuner._create_and_replace = adapt_whole
    try:
        yield
    finally:
        if own:
            tuner._create_and_replace = adapt
        else:
            del tuner._create_and_replace
