"""Private names of transformers; seen in transformers 5.23.0."""

from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel


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
