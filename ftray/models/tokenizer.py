"""Loading a model's tokenizer. Imports no torch of its own."""

from typing import TYPE_CHECKING

from ftray.models.chat_template import give_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(
    path: str, trust_remote_code: bool = False, chat_template: str | None = None
) -> "PreTrainedTokenizerBase":
    """The model's tokenizer, with a padding token (its end-of-sequence token if it has none of its own).

    `chat_template` takes the place of its own one: see :func:`ftray.models.chat_template.give_chat_template`.
    """
    from transformers import AutoTokenizer  # takes seconds

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template:
        give_chat_template(tokenizer, chat_template)
    return tokenizer
