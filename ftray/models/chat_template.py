"""Chat templates that a tokenizer is given, and the token with which a template ends a turn."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ftray.errors import UserError, near

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUNDLED = Path(__file__).parent / "chat_templates"
_ANSWER = "ZQXJ"  # a text that stands in no template

log = logging.getLogger(__name__)


def names() -> list[str]:
    """The bundled templates."""
    return sorted(path.stem for path in BUNDLED.glob("*.jinja"))


def read_chat_template(given: str) -> str:
    """The jinja text of a chat template: a bundled one's name, a file, or the text itself.

    Raises:
        UserError: none of these.
    """
    if "{%" in given or "{{" in given:
        return given
    bundled = given in names()
    file = BUNDLED / f"{given}.jinja" if bundled else Path(given)
    if not bundled and file.suffix not in (".jinja", ".jinja2", ".j2"):
        raise UserError(f"data.chat_template {given}: no such template, and no .jinja file{near(given, names())}")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template {given}: can't be read: {getattr(error, 'strerror', error)}") from None


def give_chat_template(tokenizer: "PreTrainedTokenizerBase", given: str) -> None:
    """Let `tokenizer` render by the template that :func:`read_chat_template` finds.

    Where the vocabulary lacks the token that ends a turn, the end-of-sequence token takes its place: answers end with
    one token, which ends generation too.

    Raises:
        UserError: no such template, or jinja can't read it.
    """
    from jinja2 import TemplateError

    tokenizer.chat_template = read_chat_template(given)
    try:
        end = _after_answer(tokenizer).strip()
    except TemplateError as error:
        raise UserError(f"data.chat_template: refuses a question and its answer: {error}") from None
    if end and turn_end(tokenizer) is None and tokenizer.eos_token and end in tokenizer.chat_template:
        log.info("chat template: turns end with %s, as the vocabulary has no %s", tokenizer.eos_token, end)
        tokenizer.chat_template = tokenizer.chat_template.replace(end, tokenizer.eos_token)


def turn_end(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token with which the tokenizer's chat template ends an answer; None: no template, or no token of its own."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        after = _after_answer(tokenizer)
    except Exception:  # a template is a program, and raises whatever it likes
        return None
    added = tokenizer.added_tokens_decoder
    return next((t for t in tokenizer(after, add_special_tokens=False)["input_ids"] if t in added), None)


def _after_answer(tokenizer: "PreTrainedTokenizerBase") -> str:
    """What the template puts after the last answer."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    rendered: str = tokenizer.apply_chat_template(messages, tokenize=False)
    return rendered.rpartition(_ANSWER)[2] if _ANSWER in rendered else ""
