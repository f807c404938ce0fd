"""From a record of text that goes on, of any known shape, to prompt and target or turns of a conversation."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ftray.data.shapes import ANY, ASKING, Record, Seen, Shape, bears_loss, is_empty, read, refuse
from ftray.errors import UserError

Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
TOOL_ROLES = ("tool", "function", "observation", "function_call", "tool_call", "tool_response", "ipython")
TEXT_PARTS = ("text", "input_text", "output_text")
SYSTEM = ("system", "system_prompt")
CONVERSATION = (*SYSTEM, "history")  # with one of these a record is a conversation, whatever its other keys

_NO_TOOLS = "ftray renders no tools yet: leave out the records that have them"
_NO_KTO = "marks answers as good or bad, and ftray has no KTO yet: keep the good ones, without this key"
_NO_THOUGHTS = "ftray doesn't render thoughts by themselves yet: put them into the answer, or leave them out"
_TOOLS = dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), _NO_TOOLS)
_LEARNT = dict.fromkeys(
    ("train_detail", "training_detail", "loss_mask"), "ftray learns whole turns: mark them by weight, 1 or 0"
)
_RENDERING = dict.fromkeys(
    ("documents", "chat_template_kwargs"), "ftray gives a chat template the turns alone: leave it out"
)
REFUSED = ANY | _TOOLS | _LEARNT | _RENDERING
KTO = dict.fromkeys(("label", "kto_tag"), _NO_KTO)
REFUSED_IN_TURN = (
    REFUSED
    | dict.fromkeys(("reasoning_content", "reasoning", "thinking", "thoughts"), _NO_THOUGHTS)
    | dict.fromkeys(("refusal", "channel", "recipient"), "ftray reads role and text of a turn alone: leave it out")
)
ASKED = (
    *("text", "prompt", "instruction", "input", "question", "query", "context", "document", "passage", "article"),
    *("suffix", "prefix", "reasoning_content", "reasoning", "thinking"),
)
ANSWERED = ("output", "completion", "response", "answer", "answers", "target", "summary", "highlights", "translation")


@dataclass(frozen=True)
class Example:
    """What a record says, whatever its shape.

    Attributes:
        prompt: text that bears no loss (plain prompt -> target records; empty for `text` records).
        target: text that does.
        messages: turns of a chat, of which the assistant's bear loss; None for plain records.
        context: which of the turns, by index, are marked to bear none.
        where: where the record stands; its `str` is for error messages.
    """

    prompt: str = ""
    target: str = ""
    messages: tuple[tuple[Role, str], ...] | None = None
    context: frozenset[int] = frozenset()
    where: object = field(default="", compare=False)

    @property
    def learnt(self) -> list[int]:
        """Indices of the turns that bear loss."""
        turns = enumerate(self.messages or ())
        return [i for i, (role, _) in turns if role == "assistant" and i not in self.context]


def begun_by(system: str, example: Example) -> Example:
    """A chat with a system turn before all others."""
    messages = (("system", system), *(example.messages or ()))
    return replace(example, messages=messages, context=frozenset(i + 1 for i in example.context))


def _text(record: Record, key: str, where: object, may_be_empty: bool = False) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} must be text, not {type(value).__name__}")
    if not value.strip() and not may_be_empty:
        raise UserError(f"{where}: {key} is empty")
    return value


def _input_output(record: Record, where: object) -> Example:
    return _answered(_text(record, "input", where, True), "output", record, where)


def _instruction(record: Record, where: object) -> Example:
    extra = _text(record, "input", where, True) if record.get("input") is not None else ""
    instruction = _text(record, "instruction", where)
    return _answered(f"{instruction}\n{extra}" if extra.strip() else instruction, "output", record, where)


def _completion(record: Record, where: object) -> Example:
    return _answered(_text(record, "prompt", where, True), "completion", record, where)


def _answered(prompt: str, answer: str, record: Record, where: object) -> Example:
    """Prompt and target; a conversation if the record has one of its keys, be it empty, that all of a file be alike."""
    target = _text(record, answer, where)
    if all(record.get(key) is None for key in CONVERSATION):
        return Example(prompt, target, where=where)
    turns: list[tuple[Role, str]] = [*_history(record, where), ("user", prompt), ("assistant", target)]
    example, system = Example(messages=tuple(turns), where=where), _system(record, where)
    return begun_by(system, example) if system else example


def _system(record: Record, where: object) -> str:
    """What the record's own keys say of the system turn; empty: nothing."""
    given = [_text(record, key, where, True) for key in SYSTEM if record.get(key) is not None]
    texts = {text for text in given if text.strip()}
    if len(texts) > 1:
        raise UserError(f"{where}: system and system_prompt differ: leave one of them out")
    return texts.pop() if texts else ""


def _history(record: Record, where: object) -> list[tuple[Role, str]]:
    if is_empty(history := record.get("history")):
        return []
    turns: list[tuple[Role, str]] = []
    for index, pair in enumerate(history if isinstance(history, list | tuple) else [history]):
        if not isinstance(pair, list | tuple) or [type(text) for text in pair] != [str, str]:
            raise UserError(
                f"{where}: history[{index}] must be a pair of texts, what the user said and the answer: "
                "give other conversations as messages"
            )
        turns += [("user", pair[0]), ("assistant", pair[1])]
    return turns


def _only_text(record: Record, where: object) -> Example:
    if "text" not in record:
        keys = ", ".join(map(str, record)) or "(none)"
        raise UserError(f"{where}: record with keys {keys}; known shapes: {KNOWN}")
    return Example("", _text(record, "text", where), where=where)


def _messages(record: Record, where: object) -> Example:
    return _chat(record, "messages", "role", "content", where)


def _sharegpt(record: Record, where: object) -> Example:
    return _chat(record, "conversations", "from", "value", where)


def _chat(record: Record, key: str, role_key: str, text_key: str, where: object) -> Example:
    turns = record[key]
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: {key} must be a list of turns, at least one")
    messages: list[tuple[Role, str]] = []
    context = set()
    for index, turn in enumerate(turns):
        at = f"{key}[{index}]"
        name = turn.get(role_key) if isinstance(turn, dict) else None
        if isinstance(turn, dict):
            refuse(turn, REFUSED_IN_TURN, where, f"{at}.")
        if name in TOOL_ROLES:
            raise UserError(f"{where}: {at}.{role_key} is {name!r}: {_NO_TOOLS}")
        text = _content(turn.get(text_key), f"{at}.{text_key}", where) if isinstance(turn, dict) else None
        if text is None:
            raise UserError(f"{where}: {at} must have {role_key} and {text_key}, both text")
        role = ROLES.get(str(name))
        if role is None:
            raise UserError(f"{where}: {at}.{role_key} is {name!r}; known: {', '.join(ROLES)}")
        messages.append((role, text))
        if not bears_loss(turn, f"{at}.", where):
            context.add(index)
        elif role != "assistant" and (asking := next((flag for flag in ASKING if turn.get(flag)), None)):
            raise UserError(
                f"{where}: {at}.{asking}: a turn of {name} can't be learnt alone: "
                "leave the key out, or set data.train_on_prompt to learn all turns"
            )
    example = Example(messages=tuple(messages), context=frozenset(context), where=where)
    if not example.learnt:
        which = "assistant turn" if all(role != "assistant" for role, _ in messages) else "assistant turn to be learnt"
        raise UserError(f"{where}: {key} has no {which}: nothing to learn")
    system = _system(record, where)
    if not system or messages[0] == ("system", system):
        return example
    if messages[0][0] == "system":
        raise UserError(f"{where}: has a system text, and {key} begins with another: leave one of them out")
    return begun_by(system, example)


def _content(value: Any, at: str, where: object) -> str | None:
    """The text of a turn, of which parts are joined; None: it has none."""
    if not isinstance(value, list):
        return value if isinstance(value, str) else None
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(part, dict):
            refuse(part, REFUSED_IN_TURN, where, f"{at}[{index}].")
        if kind not in TEXT_PARTS or not isinstance(text, str):
            raise UserError(f"{where}: {at}[{index}] is no text but {kind!r}: ftray reads text alone")
        texts.append(text)
    return "".join(texts) if texts else None


_ANSWER = REFUSED | KTO  # what can't be read beside an answer
_BESIDE_TURNS = ("instruction", "context", "prompt", "history")
# in the order they are tried: more keys first; the last one takes the rest
SHAPES: Sequence[Shape] = (
    Shape("instruction", ("instruction", "output"), _instruction, ("input", *CONVERSATION), _ANSWER, ASKED),
    Shape("input/output", ("input", "output"), _input_output, CONVERSATION, _ANSWER, ASKED),
    Shape("prompt/completion", ("prompt", "completion"), _completion, CONVERSATION, _ANSWER, ASKED),
    Shape("messages", ("messages",), _messages, SYSTEM, _ANSWER, _BESIDE_TURNS, turns=("role", "content")),
    Shape("ShareGPT", ("conversations",), _sharegpt, SYSTEM, _ANSWER, _BESIDE_TURNS, turns=("from", "value")),
    Shape("text", ("text",), _only_text, (), REFUSED, (*ASKED, *ANSWERED, *CONVERSATION), holds_all=True),
)
KNOWN = "input/output, instruction/input/output, prompt/completion, messages, conversations, text"


def parse(record: Record, where: object) -> Example:
    """Read a record of any known shape.

    Raises:
        UserError: a shape that isn't known, a field of the wrong type, or nothing to learn; says where.
    """
    return parse_and_see(record, where)[0]


def parse_and_see(record: Record, where: object) -> tuple[Example, Seen]:
    """As :func:`parse`, with what was recognised."""
    return read(record, SHAPES, where)
