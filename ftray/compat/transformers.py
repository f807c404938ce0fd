"""Private names of transformers; seen in transformers 5.23.0."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation


def set_attention(config: PretrainedConfig, name: str) -> None:
    """Let the modules that have this configuration run that attention.

    `PreTrainedModel.set_attn_implementation` leaves models as they are that it takes for unable to, by their source
    text; here a comparison with the base's own results decides.
    """
    config._attn_implementation = name


def drop_weight_conversions(model: PreTrainedModel, unwanted: Callable[[Any], bool]) -> None:
    """Forget conversions made at loading of which `unwanted` holds for an operation: saving would undo them.

    There is no public way to save a model that was dequantised.
    """
    model._weight_conversions = [
        conversion
        for conversion in model._weight_conversions
        if not any(map(unwanted, getattr(conversion, "operations", [])))
    ]


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], bool]:
    """Whether the parameter of a name stays in float32 where `from_pretrained` is asked for `dtype`."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return lambda name: False
    found, *_ = build_glob_alternation(list(plan))
    return lambda name: bool(found.search(name))
