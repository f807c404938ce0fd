"""Turns of a conversation, as OpenAI, ShareGPT, Anthropic, Google and others write them; and the tools beside them."""

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ftray.data.meanings import ROLE_KEYS, ROLES, THOUGHTS, Role, marks_learnt
from ftray.data.refusals import bears_loss, refuse, refuse_bad_answer, refuse_in_turn
from ftray.data.shapes import ANY, Record, is_empty, listed, object_of
from ftray.errors import UserError

CALLS = ("function_call", "tool_call")  # roles of an assistant's turn whose text is a call
TEXT_KEYS = ("content", "value", "text", "message", "parts")
IN_TURN = (*ROLE_KEYS, *TEXT_KEYS, *THOUGHTS, "tool_calls", "function_call", "tool_call_id")
IN_PART = (
    *("type", "text", "thinking", "thought", "signature", "id", "name", "input", "tool_use_id", "content"),
    *("functionCall", "function_call", "functionResponse", "function_response"),
)
TURNS = ("messages", "conversations", "conversation", "dialog", "dialogue", "turns", "chat", "contents")
TOOLS = ("tools", "functions")
# turns that are written as an exchange, a question and its answer in one object, by these keys
EXCHANGES = (("human", "assistant"), ("user", "assistant"), ("input", "output"), ("question", "answer"))
RENDERING = dict.fromkeys(
    ("documents", "chat_template_kwargs"), "ftray gives a chat template turns and tools alone: leave it out"
)
REFUSED_IN_TURN = (
    ANY
    | RENDERING
    | dict.fromkeys(("refusal", "channel", "recipient"), "ftray reads role, text and calls of a turn: leave it out")
)
# a transcript: a text of paragraphs that begin with a speaker's name, as in HH-RLHF; and marks at the end of a turn
_SPEAKER = re.compile(r"(?:^|\n\n)\s*(human|user|assistant|system|function response)\s*:[ \t]*", re.IGNORECASE)
_END_MARK = re.compile(r"\s*(<\|endoftext\|>|</s>)?\s*$")


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        calls: of tools, each as OpenAI's `tool_calls` has them, the arguments as an object where they are one.
        words: a call as the record words it, for a chat template that knows no calls.
        more: further keys for the chat template.
        thoughts: what the assistant thought before it said `text`.
    """

    role: Role
    text: str = ""
    calls: tuple[dict[str, Any], ...] = ()
    words: str = ""
    thoughts: str = ""
    more: dict[str, Any] = field(default_factory=dict)


def are_turns(value: Any) -> bool:
    """Whether a value is a list of turns: objects, texts of two who speak in turn, or a transcript."""
    turns = turn_list(value)
    return isinstance(turns, list) and bool(turns) and (all(isinstance(turn, dict) for turn in turns) or _texts(turns))


def turn_list(value: Any) -> Any:
    """The list of turns in a value, which may be written as JSON or as a transcript; anything else as it is."""
    turns = listed(value)
    return (_transcribed(turns) or turns) if isinstance(turns, str) else turns


def turn_of(value: Any) -> dict[str, Any] | None:
    """The one turn in a value, which may be written as JSON or as Python does; None: it is something else."""
    turn = object_of(value)
    if not isinstance(turn, dict):
        return None
    is_turn = any(key in turn for key in ROLE_KEYS) if turn is value else _is_known(turn)
    return turn if is_turn else None


def answer_in(value: Any, may_be_transcript: bool) -> Any:
    """The turns of an answer as a list, or its text: one that is written as a list of other objects is a text."""
    if turn := turn_of(value):
        return [turn]
    given = turn_list(value) if may_be_transcript else listed(value)
    return value if isinstance(value, str) and isinstance(given, list) and not are_known(given) else given


def are_known(turns: list[Any]) -> bool:
    """Whether all objects of a list are turns of known roles."""
    return all(map(_is_known, turns))


def _is_known(turn: Any) -> bool:
    """Whether an object is a turn of a known role, rather than an object that an answer may be."""
    roles = [str(turn.get(key)).lower() for key in ROLE_KEYS] if isinstance(turn, dict) else []
    return any(role in ROLES for role in roles) and any(key in turn for key in (*TEXT_KEYS, "tool_calls"))


def _texts(turns: list[Any]) -> bool:
    """Whether turns are texts alone, as those of two who speak in turn, the second of them the assistant."""
    return len(turns) > 1 and all(isinstance(turn, str) for turn in turns)


def read_turns(record: Record, key: str, where: object) -> tuple[list[Turn], set[int]]:
    """The turns of a list, and the indices of those that are marked to bear no loss.

    Args:
        key: under which the list stands in the record.

    Raises:
        UserError: it is no such list, or a turn holds what isn't read; says which one.
    """
    given = turn_list(record[key])
    if not isinstance(given, list) or not given:
        raise UserError(f"{where}: {key} must be a list of turns, at least one")
    if _texts(given):
        given = [{"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(given)]
    messages: list[Turn] = []
    context = set[int]()
    for index, turn in enumerate(given):
        at = f"{key}[{index}]"
        said = _read_turn(turn, at, where, record)
        if bears_loss(turn, f"{at}.", where):
            _refuse_unlearnable(turn, said[-1].role, at, where)
        else:
            context.update(range(len(messages), len(messages) + len(said)))
        messages += said
    return messages, context


def _refuse_unlearnable(turn: dict[str, Any], role: Role, at: str, where: object) -> None:
    """Raise the UserError about a turn of another than the assistant that is marked, on purpose, to be learnt.

    A weight may stand, as 1, at any turn.
    """
    for key, value in turn.items():
        if role != "assistant" and value and marks_learnt(key) is True and not key.lower().endswith("weight"):
            raise UserError(
                f"{where}: {at}.{key}: a turn of {role} can't be learnt alone: "
                "leave the key out, or set data.train_on_prompt to learn all turns"
            )


def _transcribed(text: str) -> list[dict[str, str]]:
    """The turns of a transcript in which the assistant speaks; none: it is something else."""
    names = [*_SPEAKER.finditer(text)]
    ends = [*(name.start() for name in names[1:]), len(text)]
    if not names or text[: names[0].start()].strip() or "assistant" not in {name[1].lower() for name in names}:
        return []
    said = [_END_MARK.sub("", text[name.end() : end]) for name, end in zip(names, ends, strict=True)]
    return [
        {"role": name[1].lower().replace("function response", "tool"), "content": words}
        for name, words in zip(names, said, strict=True)
        if words
    ]


def is_open_transcript(value: Any) -> bool:
    """Whether a value is a transcript that the assistant is to go on with."""
    turns = _transcribed(value) if isinstance(value, str) else []
    return bool(turns) and ROLES[turns[-1]["role"]] != "assistant"


def _read_turn(turn: Any, at: str, where: object, record: Record) -> list[Turn]:
    """What a turn says: as a rule one turn; more of an exchange, or of the results of tools within a user's turn."""
    if exchange := _exchange(turn):
        return [Turn("user", exchange[0]), Turn("assistant", exchange[1])]
    role_key = next((key for key in ROLE_KEYS if isinstance(turn, dict) and turn.get(key) is not None), None)
    keys = [key for key in TEXT_KEYS if isinstance(turn, dict) and turn.get(key) is not None]
    if role_key is None or len(keys) > 1:
        raise UserError(f"{where}: {at} must have role and content (or from and value), both text{_hint(record, at)}")
    refuse(turn, REFUSED_IN_TURN, where, f"{at}.")
    refuse_in_turn(turn, IN_TURN, f"{at}.", where)
    name, key = turn[role_key], keys[0] if keys else TEXT_KEYS[ROLE_KEYS.index(role_key) % 2]
    role = ROLES.get(str(name).lower())
    if role is None:
        raise UserError(f"{where}: {at}.{role_key} is {name!r}; known: {', '.join(ROLES)}{_hint(record, at)}")
    content = _content(turn.get(key), f"{at}.{key}", where)
    if role == "assistant":
        refuse_bad_answer(turn, f"{at}.", where)
        _refuse_unlearnt_parts(turn.get(key), f"{at}.{key}", where)
        return [_answer(turn, str(name), content, at, f"{at} must have {role_key} and {key}, both text", where)]
    if content.calls or content.thoughts:
        raise UserError(f"{where}: {at}.{key}: a call or a thought in a turn of {role}: give it to the assistant")
    said = [*content.results]
    if content.text is not None:
        more = {"tool_call_id": turn["tool_call_id"]} if turn.get("tool_call_id") else {}
        more |= {"name": turn["name"]} if role == "tool" and turn.get("name") else {}
        said.append(Turn(role, content.text, more=more))
    if not said:
        raise UserError(f"{where}: {at} must have {role_key} and {key}, both text")
    return said


def _exchange(turn: Any) -> tuple[str, str] | None:
    """What the user says and the assistant answers, of a turn that is an exchange; None: it is none."""
    keys = {key for key, value in turn.items() if not is_empty(value)} if isinstance(turn, dict) else set[str]()
    for asked, answered in EXCHANGES:
        if keys == {asked, answered} and isinstance(turn[asked], str) and isinstance(turn[answered], str):
            return turn[asked], turn[answered]
    return None


def _hint(record: Record, at: str) -> str:
    """How to say who is who in turns of other words, if it can be guessed."""
    from ftray.data.proposal import proposal_of_turns  # which imports this module

    guess = proposal_of_turns(record, at.partition("[")[0])
    return f"; or say who is who, as in {guess}" if guess else ""


@dataclass
class _Content:
    """What the content of a turn says: None in place of a text that isn't there."""

    text: str | None = None
    thoughts: str = ""
    calls: tuple[dict[str, Any], ...] = ()
    results: tuple[Turn, ...] = ()


def _answer(turn: dict[str, Any], name: str, content: _Content, at: str, lacks: str, where: object) -> Turn:
    """The assistant's turn."""
    thoughts = next((_thoughts(turn[key], f"{at}.{key}", where) for key in THOUGHTS if not is_empty(turn.get(key))), "")
    if thoughts and content.thoughts:
        raise UserError(f"{where}: {at} holds thoughts twice: leave out one of them")
    if content.results:
        raise UserError(
            f"{where}: {at}: the result of a tool in a turn of the assistant: give it to the user or a tool"
        )
    thoughts = thoughts or content.thoughts
    calls = (*content.calls, *_calls(turn, at, where))
    text = content.text
    if name.lower() in CALLS and text is not None and not calls and (calls := calls_in(text)):
        for call in calls:
            refuse_no_arguments(call, at, where)
        return Turn("assistant", "", calls, words=text, thoughts=thoughts)
    if text is None and not calls:
        raise UserError(f"{where}: {lacks}")
    return Turn("assistant", text or "", calls, thoughts=thoughts)


def _content(value: Any, at: str, where: object) -> _Content:
    """The content of a turn; of one in parts, the texts are joined.

    Raises:
        UserError: a part is no text, thought, call or result, or would be put before another that it comes after.
    """
    if not isinstance(value, list):
        return _Content(value if isinstance(value, str) else None)
    texts, thoughts, calls, results = list[str](), list[str](), list[dict[str, Any]](), list[Turn]()
    for index, part in enumerate(value):
        here = f"{at}[{index}]"
        if isinstance(part, dict):
            refuse(part, REFUSED_IN_TURN, where, f"{here}.")
        if call := _call_part(part):
            refuse_no_arguments(call, here, where)
            calls.append(call)
        elif result := _result_part(part, here, where):
            _refuse_late(texts, here, "the result of a tool after text", where)
            results.append(result)
        elif (thought := _thought_part(part)) is not None:
            _refuse_late([*texts, *calls], here, "a thought after what it led to", where)
            thoughts.append(thought)
        else:
            _refuse_late(calls, here, "text after a call", where)
            texts.append(_text_part(part, here, where))
    return _Content("".join(texts) if texts else None, "".join(thoughts), tuple(calls), tuple(results))


def _thoughts(value: Any, at: str, where: object) -> str:
    """What the assistant thought, under a key of its own: a text, or one in parts.

    Raises:
        UserError: it is something else, or a part of it is to be left unlearnt.
    """
    _refuse_unlearnt_parts(value, at, where)
    thoughts = text_of_content(value, at, where)
    if thoughts is None:
        raise UserError(f"{where}: {at} must be text, not {type(value).__name__}")
    return thoughts


def _refuse_unlearnt_parts(content: Any, at: str, where: object) -> None:
    """Raise the UserError about a part of an answer that is marked to bear no loss: a turn is learnt as a whole."""
    for index, part in enumerate(content if isinstance(content, list) else []):
        if isinstance(part, dict) and not bears_loss(part, f"{at}[{index}].", where):
            raise UserError(
                f"{where}: {at}[{index}] is marked as not learnt: ftray learns whole turns: give it a turn of its own, "
                "marked by weight 0, or leave it out"
            )


def _refuse_late(before: list[Any], here: str, what: str, where: object) -> None:
    """Raise the UserError about a part that a chat template would put before those that it comes after."""
    if before:
        raise UserError(f"{where}: {here} is {what}: put it into a turn of its own")


def _text_part(part: Any, here: str, where: object) -> str:
    """The text of a part that is nothing else."""
    kind = part.get("type", "text") if isinstance(part, dict) else "text"
    text = part.get("text") if isinstance(part, dict) else part
    if isinstance(part, dict) and "type" not in part and "text" not in part:
        kind = ", ".join(map(str, part))  # as Google's parts, which are named by their keys
    if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
        raise UserError(f"{where}: {here} is no text but {kind!r}: ftray reads text alone: leave the part out")
    return text


def _thought_part(part: Any) -> str | None:
    """A thought, as Anthropic (`type: thinking`) or Google (`thought: true`) has it; None: it is none."""
    if not isinstance(part, dict):
        return None
    key = "thinking" if part.get("type") == "thinking" else "text" if part.get("thought") else ""
    thought = part.get(key)
    return thought if isinstance(thought, str) else None


def _call_part(part: Any) -> dict[str, Any] | None:
    """A call as a part of a turn, as Anthropic (`tool_use`) or Google (`functionCall`) has it; None: it is none."""
    if not isinstance(part, dict):
        return None
    given = part if part.get("type") == "tool_use" else part.get("functionCall", part.get("function_call"))
    return read_call(given) if isinstance(given, dict) else None


def _result_part(part: Any, here: str, where: object) -> Turn | None:
    """What a tool answered, as Anthropic (`tool_result`) or Google (`functionResponse`) has it; None: it is none."""
    if not isinstance(part, dict):
        return None
    if part.get("type") == "tool_result":
        text = text_of_content(part.get("content") or "", f"{here}.content", where)
        more = {"tool_call_id": part["tool_use_id"]} if part.get("tool_use_id") else {}
        return Turn("tool", text or "", more=more)
    given = part.get("functionResponse", part.get("function_response"))
    if not isinstance(given, dict):
        return None
    more = {name: given[key] for name, key in (("tool_call_id", "id"), ("name", "name")) if given.get(key)}
    return Turn("tool", json.dumps(_without_nulls(given.get("response", {})), ensure_ascii=False), more=more)


def text_of_content(value: Any, at: str, where: object) -> str | None:
    """The text of a content that may come in parts; None: it has none.

    Raises:
        UserError: a part is no text.
    """
    if not isinstance(value, list):
        return value if isinstance(value, str) else None
    return "".join(_text_part(part, f"{at}[{index}]", where) for index, part in enumerate(value)) if value else None


def _calls(turn: dict[str, Any], at: str, where: object) -> tuple[dict[str, Any], ...]:
    """The calls under an assistant's keys; `function_call` is how OpenAI named a single one before."""
    given = [] if is_empty(turn.get("tool_calls")) else listed(turn["tool_calls"])
    if not is_empty(turn.get("function_call")):
        given = [*given, turn["function_call"]]
    calls = [read_call(call) for call in given] if isinstance(given, list) else [None]
    for index, call in enumerate(calls):
        if call is None:
            raise UserError(
                f"{where}: {at}.tool_calls[{index}] must be an object with a function of name and arguments"
            )
        refuse_no_arguments(call, f"{at}.tool_calls[{index}]", where)
    return tuple(call for call in calls if call)


def refuse_no_arguments(call: dict[str, Any], at: str, where: object) -> None:
    """Refuse a call by whose example a model would learn to write arguments that nobody can read.

    Raises:
        UserError: its arguments are no JSON object.
    """
    arguments = call["function"]["arguments"]
    if not isinstance(arguments, dict):
        raise UserError(
            f"{where}: {at}: the arguments of {call['function']['name']} are no JSON object but {arguments!r:.40}: "
            "mend them or leave out the record"
        )


def calls_in(text: str) -> tuple[dict[str, Any], ...]:
    """The calls that a text words as JSON; none: it is something else."""
    try:
        given = json.loads(text)
    except ValueError:
        return ()
    calls = [read_call(call) for call in (given if isinstance(given, list) else [given])]
    return tuple(call for call in calls if call) if all(calls) else ()


def read_call(given: Any) -> dict[str, Any] | None:
    """A call as OpenAI wraps it, its arguments as an object; None: it is none.

    The arguments may also be called `parameters`, `input` as Anthropic calls them, or `args` as Google does.
    """
    inner = given.get("function", given) if isinstance(given, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        return None
    key = next((key for key in ("arguments", "parameters", "input", "args") if key in inner), "arguments")
    arguments = _without_nulls(inner.get(key, {}))
    if isinstance(arguments, str):
        with suppress(ValueError):  # which is refused
            arguments = json.loads(arguments or "{}")
    call = {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}
    return {"id": given["id"]} | call if given.get("id") else call


def read_tools(record: Record, where: object) -> tuple[dict[str, Any], ...]:
    """The tools of a record, by either key, as a list or as JSON, each as OpenAI wraps it.

    They may also stand bare, as Anthropic has them (`input_schema`), or as Google does (`functionDeclarations`).

    Raises:
        UserError: they are something else.
    """
    result: list[dict[str, Any]] = []
    for key in TOOLS:
        if is_empty(given := listed(record.get(key))):
            continue
        if not isinstance(given, list):
            raise UserError(f"{where}: {key} must be a list of tools, also as JSON, not {type(given).__name__}")
        for index, tool in enumerate(given):
            tool = _without_nulls(tool)  # a table has each key in every row
            declared = (
                tool.get("functionDeclarations", tool.get("function_declarations")) if isinstance(tool, dict) else None
            )
            for one in declared if isinstance(declared, list) and len(tool) == 1 else [tool]:
                inner = one.get("function", one) if isinstance(one, dict) else None
                if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
                    raise UserError(f"{where}: {key}[{index}] must be an object with a name, or with such a function")
                result.append(one if "function" in one else {"type": "function", "function": _as_openai(one)})
    return tuple(result)


def _as_openai(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool whose parameters are called so, which Anthropic calls its input schema."""
    if "input_schema" not in tool:
        return tool
    return {"name": tool["name"], "description": tool.get("description", ""), "parameters": tool["input_schema"]}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
