"""From a record of any known shape to turns of a conversation."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ftray.errors import UserError

Role = Literal["system", "user", "assistant"]
SHAREGPT_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Example:
    """What a record says, whatever its shape.

    Attributes:
        prompt: text that bears no loss (plain prompt -> target records; empty for `text` records).
        target: text that does.
        messages: turns of a chat, of which the assistant's bear loss; None for plain records.
        where: where the record stands; its `str` is for error messages.
    """

    prompt: str = ""
    target: str = ""
    messages: tuple[tuple[Role, str], ...] | None = None
    where: object = field(default="", compare=False)


def _text(record: dict[str, Any], key: str, where: object, may_be_empty: bool = False) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} must be text, not {type(value).__name__}")
    if not value.strip() and not may_be_empty:
        raise UserError(f"{where}: {key} is empty")
    return value


def _input_output(record: dict[str, Any], where: object) -> Example:
    return Example(_text(record, "input", where, True), _text(record, "output", where))


def _instruction(record: dict[str, Any], where: object) -> Example:
    extra = _text(record, "input", where, True) if record.get("input") is not None else ""
    instruction = _text(record, "instruction", where)
    return Example(f"{instruction}\n{extra}" if extra else instruction, _text(record, "output", where))


def _completion(record: dict[str, Any], where: object) -> Example:
    return Example(_text(record, "prompt", where, True), _text(record, "completion", where))


def _only_text(record: dict[str, Any], where: object) -> Example:
    return Example("", _text(record, "text", where))


def _messages(record: dict[str, Any], where: object) -> Example:
    return _chat(record["messages"], "messages", "role", "content", where)


def _sharegpt(record: dict[str, Any], where: object) -> Example:
    return _chat(record["conversations"], "conversations", "from", "value", where)


def _chat(turns: Any, key: str, role_key: str, text_key: str, where: object) -> Example:
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: {key} must be a list of turns, at least one")
    messages: list[tuple[Role, str]] = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get(text_key), str):
            raise UserError(f"{where}: {key}[{index}] must have {role_key} and {text_key}, both text")
        role = SHAREGPT_ROLES.get(str(turn.get(role_key)))
        if role is None:
            known = ", ".join(SHAREGPT_ROLES)
            raise UserError(f"{where}: {key}[{index}].{role_key} is {turn.get(role_key)!r}; known: {known}")
        messages.append((role, turn[text_key]))
    if all(role != "assistant" for role, _ in messages):
        raise UserError(f"{where}: {key} has no assistant turn: nothing to learn")
    return Example(messages=tuple(messages))


Parser = Callable[[dict[str, Any], object], Example]
# in the order they are tried: more keys first
SHAPES: list[tuple[tuple[str, ...], Parser]] = [
    (("instruction", "output"), _instruction),
    (("input", "output"), _input_output),
    (("prompt", "completion"), _completion),
    (("messages",), _messages),
    (("conversations",), _sharegpt),
]
KNOWN = "input/output, instruction/input/output, prompt/completion, messages, conversations, text"


def parse(record: dict[str, Any], where: object) -> Example:
    """Read a record of any known shape.

    Raises:
        UserError: a shape that isn't known, a field of the wrong type, or nothing to learn; says where.
    """
    for keys, parser in SHAPES:
        if all(key in record for key in keys):
            return replace(parser(record, where), where=where)
    if "text" in record:
        return replace(_only_text(record, where), where=where)
    raise UserError(f"{where}: record with keys {', '.join(map(str, record)) or '(none)'}; known shapes: {KNOWN}")
