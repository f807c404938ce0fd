"""What a model has places for: tokens in its embedding table, positions in a learnt table."""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def embedded_tokens(model: "PreTrainedModel | PeftModel") -> int:
    """The number of token ids that the model has embeddings for."""
    return int(model.get_input_embeddings().num_embeddings)


def context_length(model: "PreTrainedModel | PeftModel") -> int | None:
    """The most tokens that the model takes at once: of its tables, else as its configuration says; None: any number."""
    named: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions(model) or (named if (named or 0) > 0 else None)  # XLNet has -1


def text_positions(model: "PreTrainedModel | PeftModel") -> int | None:
    """As :func:`positions`, without those that the tokens take which an adapter puts before a text."""
    most, config = positions(model), getattr(model, "active_peft_config", None)
    return None if most is None else most - (getattr(config, "num_virtual_tokens", None) or 0)


def positions(model: "PreTrainedModel | PeftModel") -> int | None:
    """The most tokens that the model's tables of positions have a row for; None: it has no such table.

    A table is an embedding, not that of the words, with as many rows as the configuration names positions. Some keep
    rows free at its start: OPT and BART by an `offset`, RoBERTa up to the padding token.
    """
    named = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    words = model.get_input_embeddings()
    found = []
    for module in model.modules():
        if not isinstance(module, nn.Embedding) or module.weight is words.weight:
            continue
        offset = getattr(module, "offset", 0)
        if named in (module.num_embeddings, module.num_embeddings - offset):
            free = offset or (0 if module.padding_idx is None else module.padding_idx + 1)
            found.append(module.num_embeddings - free)
    return min(found, default=None)
