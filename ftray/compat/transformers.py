"""Private names of transformers; seen in transformers 5.23.0."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import build_glob_alternation
from transformers.utils.chat_template_utils import render_jinja_template


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


def with_generation_spans(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, tools: list[dict[str, Any]] | None
) -> tuple[str, list[tuple[int, int]]]:
    """What the tokenizer's chat template renders, and the characters that it puts between {% generation %} tags.

    The public `apply_chat_template` gives a mask of tokens alone, of the whole text tokenized at once.
    """
    said = [{key: value for key, value in message.items() if value is not None} for message in messages]  # as it does
    rendered, spans = render_jinja_template(
        [said],
        chat_template=tokenizer.get_chat_template(tools=tools),
        return_assistant_tokens_mask=True,
        tools=tools,
        **tokenizer.special_tokens_map,
    )
    return rendered[0], [(start, end) for start, end in spans[0]]
