"""Private names of PEFT; seen in PEFT 0.21.2."""

from collections.abc import Callable

import torch
from peft import PeftModel
from peft.utils.loftq_utils import _SafetensorLoader


def stored_tensors(model: PeftModel, directory: str | None) -> Callable[[str], torch.Tensor]:
    """Reads a weight of the base model by name as it is stored, before quantisation; on the CPU.

    `replace_lora_weights_loftq`, the public function around it, is for 4-bit layers on GPUs alone.

    Args:
        directory: of the base model; None: in the hub's cache.
    """
    read: Callable[[str], torch.Tensor] = _SafetensorLoader(model, directory).get_tensor
    return read
