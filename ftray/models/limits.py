"""What a model has places for: tokens in its embedding table, positions in a learnt table."""

from typing import TYPE_CHECKING, Any

from torch import nn

from ftray.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def word_table(model: "PreTrainedModel | PeftModel") -> nn.Embedding:
    """The model's table of token embeddings.

    Raises:
        UserError: it has none.
    """
    try:
        words: Any = model.get_input_embeddings()
    except NotImplementedError:  # CANINE hashes characters
        words = None
    if isinstance(getattr(words, "weight", None), nn.Parameter):
        table: nn.Embedding = words
        return table
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == size]
    if tables:  # what Perceiver names are its latents
        return tables[0]
    kind = type(model).__name__
    raise UserError(f"model.name: {kind} has no table of token embeddings: take a model that has")


def embedded_tokens(model: "PreTrainedModel | PeftModel") -> int:
    """The number of token ids that the model has embeddings for."""
    return word_table(model).num_embeddings


def context_length(model: "PreTrainedModel | PeftModel") -> int | None:
    """The most tokens that the model takes at once: of its tables, else as its configuration says; None: any number."""
    named: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions(model) or (named if (named or 0) > 0 else None)  # XLNet has -1


def text_positions(model: "PreTrainedModel | PeftModel") -> int | None:
    """As :func:`positions`, without those that the tokens take which an adapter puts before a text."""
    most, config = positions(model), getattr(model, "active_peft_config", None)
    return None if most is None else most - (getattr(config, "num_virtual_tokens", None) or 0)


def rope_length(model: "PreTrainedModel | PeftModel") -> int | None:
    """The most tokens of a pass whose rotary positions don't depend on its longest record; None: any number.

    Beyond, longrope takes other factors (arXiv 2402.13753), and dynamic NTK scaling a base of that length, for all of
    the pass.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    found: list[Any] = []
    for part in (rope, *(own for own in rope.values() if isinstance(own, dict))):  # layers may differ
        kind = part.get("rope_type") or ""
        if kind == "longrope":
            found.append(part.get("original_max_position_embeddings"))
        if "dynamic" in kind:
            found.append(getattr(config, "max_position_embeddings", None))
    return min((length for length in found if length), default=None)


def record_length(model: "PreTrainedModel | PeftModel") -> int | None:
    """The most tokens of a record that is trained beside others: of :func:`positions` and :func:`rope_length`."""
    return min((most for most in (positions(model), rope_length(model)) if most is not None), default=None)


def positions(model: "PreTrainedModel | PeftModel") -> int | None:
    """The most tokens that the model's tables of positions have a row for; None: it has no such table.

    A table is an embedding, not that of the words, with as many rows as the configuration names positions. Some keep
    rows free at its start: OPT and BART by an `offset`, RoBERTa up to the padding token.
    """
    named = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    words = word_table(model)
    found = []
    for module in model.modules():
        if not isinstance(module, nn.Embedding) or module.weight is words.weight:
            continue
        offset = getattr(module, "offset", 0)
        if named in (module.num_embeddings, module.num_embeddings - offset):
            free = offset or (0 if module.padding_idx is None else module.padding_idx + 1)
            found.append(module.num_embeddings - free)
    return min(found, default=None)
