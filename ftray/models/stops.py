"""Where an answer ends: the same tokens for whatever generates."""

from collections.abc import Collection
from itertools import takewhile
from typing import TYPE_CHECKING

from ftray.models.chat_template import turn_end

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase


def stop_tokens(
    tokenizer: "PreTrainedTokenizerBase", config: "PreTrainedConfig", generation: "GenerationConfig | None"
) -> list[int]:
    """Ids of all tokens that end an answer, ascending; training ends raw targets with the tokenizer's.

    A turn may end with a token that only one of these knows: Llama 3 and Qwen list theirs in `generation_config.json`;
    of a template that the tokenizer was given, only the template says.

    Args:
        config: of the model, as `model.config`.
        generation: as `model.generation_config`; None: the model has none.
    """
    found: set[int | None] = {turn_end(tokenizer)}
    for source in (tokenizer, generation, config, config.get_text_config(decoder=True)):
        ids = getattr(source, "eos_token_id", None)
        found |= set(ids) if isinstance(ids, (list, tuple)) else {ids}
    return sorted(token for token in found if token is not None and token >= 0)  # -1 is how some say none


def saved_generation_config(directory: str) -> "GenerationConfig | None":
    """The `generation_config.json` of a model in `directory` that is not loaded; None: it has none."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(directory)
    except OSError:
        return None


def before_stop(ids: list[int], stops: Collection[int]) -> list[int]:
    """`ids` up to the first of `stops`, which is left out, as is all that was put after it to fill a batch up."""
    return list(takewhile(lambda token: token not in stops, ids))


def answer_text(tokenizer: "PreTrainedTokenizerBase", ids: list[int], stops: Collection[int]) -> str:
    """The text of an answer: its tokens before the first of `stops`.

    Special tokens are part of it, as they are of training targets: marks of thinking or of a tool's call. Those that
    the tokenizer itself puts around a text are not (:func:`framing`).
    """
    frame = framing(tokenizer)
    text: str = tokenizer.decode([token for token in before_stop(ids, stops) if token not in frame])
    return text


def framing(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Tokens that fill up a batch or that the tokenizer puts around any text: beginnings, languages, padding."""
    return {tokenizer.pad_token_id, tokenizer.bos_token_id, *tokenizer(text_target="")["input_ids"]}
