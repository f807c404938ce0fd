"""Private names of PEFT; seen in PEFT 0.21.2."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from peft import PeftModel
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
