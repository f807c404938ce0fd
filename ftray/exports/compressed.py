"""A merged model with weights of 8 or 4 bits, as vLLM and transformers read it: the format of llm-compressor.

Weights are rounded to the nearest value, by channel or group; nothing is calibrated, and activations stay as they are.
"""

import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

BITS = {"int8": 8, "int4": 4}
NEEDED = ("compressed_tensors",)
FORMAT = "pack-quantized"
GROUPS = (128, 64, 32)  # weights that share a scale; of 8 bits, a row does
IGNORED = "lm_head"
KEPT = ("generation_config.json", "task.json")  # of the merged model; the first says where answers end


def write(merged: Path, precision: str, target: Path) -> None:
    """Write the merged model in `merged`, with its linear layers as integers and all else in bfloat16, to `target`.

    Args:
        precision: one of `BITS`.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16)
    size = group_size(model) if precision == "int4" else None
    weights = QuantizationArgs(
        num_bits=BITS[precision], strategy="group" if size else "channel", group_size=size, symmetric=True
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=[IGNORED], format=FORMAT)
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            weight = module.weight.detach().float()
            grouped = weight.unflatten(1, (-1, size or weight.shape[1]))  # [out, groups, in a group]
            scale, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), weights)
            module.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model, FORMAT)
    compressor.compress_model(model)
    model.save_pretrained(target)
    compressor.update_config(str(target))
    for name in KEPT:
        if (merged / name).is_file():
            shutil.copy(merged / name, target / name)


def read(directory: Path) -> PreTrainedModel:
    """What :func:`write` left, in float32."""
    from transformers import CompressedTensorsConfig

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    return model


def group_size(model: PreTrainedModel) -> int | None:
    """The largest of `GROUPS` that parts all rows evenly; None: none does."""
    rows = [m.in_features for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != IGNORED]
    return next((size for size in GROUPS if not any(row % size for row in rows)), None)
