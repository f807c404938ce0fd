"""From a record for a generating task, of any known shape, to prompt and target or turns of a conversation."""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ftray.data.meanings import ANSWERED, ASKED, THOUGHTS, marks_learnt
from ftray.data.shapes import (
    ANY,
    LABELS,
    OWN,
    PART,
    Record,
    Seen,
    Shape,
    as_text,
    bears_loss,
    is_empty,
    listed,
    read,
    refuse,
    refuse_bad_answer,
    refuse_in_turn,
)
from ftray.errors import UserError

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "prompter": "user",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
CALLS = ("function_call", "tool_call")  # roles of an assistant's turn whose text is a call
ROLE_KEYS, TEXT_KEYS = ("role", "from", "speaker"), ("content", "value", "text", "message", "parts")
IN_TURN = (*ROLE_KEYS, *TEXT_KEYS, *THOUGHTS, "tool_calls", "function_call", "tool_call_id")
TEXT_PARTS = ("text", "input_text", "output_text")
TURNS = ("messages", "conversations", "conversation", "dialog", "dialogue", "turns", "chat", "contents")
SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")
CONVERSATION = (*SYSTEM, "history", *TOOLS)  # with one of these a record is a conversation, whatever its other keys

_NO_KTO = "marks answers as good or bad, and ftray has no KTO yet: keep the good ones, without this key"
_RENDERING = dict.fromkeys(
    ("documents", "chat_template_kwargs"), "ftray gives a chat template turns and tools alone: leave it out"
)
_CALLED = dict.fromkeys(("tool_calls", "function_call"), "a call is part of a turn: put it into one of messages")
REFUSED = ANY | _RENDERING | _CALLED
KTO = dict.fromkeys(("label", "kto_tag"), _NO_KTO)
REFUSED_IN_TURN = (
    ANY
    | _RENDERING
    | dict.fromkeys(("refusal", "channel", "recipient"), "ftray reads role, text and calls of a turn: leave it out")
)


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


@dataclass(frozen=True)
class Example:
    """What a record says, whatever its shape.

    Attributes:
        prompt: text that bears no loss (plain prompt -> target records; empty for `text` records).
        target: text that does.
        messages: turns of a chat, of which the assistant's bear loss; None for plain records.
        context: which of the turns, by index, are marked to bear none.
        tools: that the assistant may call, as OpenAI has them.
        begins, ends: whether the text's beginning and end are those of a document; not so for parts of one.
        labelled: whether a label stands beside the text, which isn't learnt.
        where: where the record stands; its `str` is for error messages.
    """

    prompt: str = ""
    target: str = ""
    messages: tuple[Turn, ...] | None = None
    context: frozenset[int] = frozenset()
    tools: tuple[dict[str, Any], ...] = ()
    begins: bool = True
    ends: bool = True
    labelled: bool = field(default=False, compare=False)
    where: object = field(default="", compare=False)

    @property
    def asks(self) -> bool:
        """Whether something stands before what is learnt."""
        return bool(self.messages or self.prompt)

    @property
    def learnt(self) -> list[int]:
        """Indices of the turns that bear loss."""
        turns = enumerate(self.messages or ())
        return [i for i, turn in turns if turn.role == "assistant" and i not in self.context]


def begun_by(system: str, example: Example) -> Example:
    """A chat with a system turn before all others."""
    messages = (Turn("system", system), *(example.messages or ()))
    return replace(example, messages=messages, context=frozenset(i + 1 for i in example.context))


def as_chat(example: Example) -> Example:
    """A plain record as a conversation of one question and its answer."""
    messages = (Turn("user", example.prompt), Turn("assistant", example.target))
    return replace(example, prompt="", target="", messages=messages)


def _text(record: Record, key: str, where: object, may_be_empty: bool = False) -> str:
    value = as_text(record[key], key, where)
    if not value.strip() and not may_be_empty:
        raise UserError(f"{where}: {key} is empty")
    return value


def _with_one_answer(record: Record, key: str, where: object) -> Record:
    """The record with its answer out of a list that has no other; of several, nobody knows which is meant."""
    answers = listed(record[key])
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        return record
    if len({*answers}) > 1:
        raise UserError(
            f"{where}: {key} holds {len(answers)} answers: say which one is to be learnt, as the first by "
            f"--data.fields '..., completion: {key}.0'"
        )
    return record | {key: answers[0]}


def _pair(ask: str, answer: str, further: tuple[str, ...] = (), optional: bool = False, name: str = "") -> Shape:
    """A shape of one text and the answer to it.

    Args:
        ask, answer: their keys.
        further: keys of texts that follow what is asked, each on a line of its own.
        optional: what is asked may be blank.
        name: not given: a shape that gives way to `text`.
    """

    def parse(record: Record, where: object) -> Example:
        texts = [_text(record, ask, where, optional)]
        texts += [_text(record, key, where, True) for key in further if record.get(key) is not None]
        prompt = "\n".join(text for i, text in enumerate(texts) if not i or text.strip())
        return _answered(prompt, _text(_with_one_answer(record, answer, where), answer, where), record, where)

    fits = None if name or ask == "text" else _is_bare
    beside = (*ASKED, *ANSWERED)
    honours = (*further, *CONVERSATION)
    return Shape(name or f"{ask}/{answer}", (ask, answer), parse, honours, _BESIDE_ANSWER, beside, fits, teaches=True)


def _answered(prompt: str, target: str, record: Record, where: object) -> Example:
    """Prompt and target; a conversation if the record has one of its keys, be it empty, that all of a file be alike."""
    refuse_bad_answer(record, "", where)
    tools = _tools(record, where)
    if not tools and all(record.get(key) is None for key in (*SYSTEM, "history")):
        return Example(prompt, target, where=where)
    turns = (*_history(record, where), Turn("user", prompt), Turn("assistant", target))
    example, system = Example(messages=turns, tools=tools, where=where), _system(record, where)
    return begun_by(system, example) if system else example


def _system(record: Record, where: object) -> str:
    """What the record's own keys say of the system turn; empty: nothing."""
    given = [_text(_with_joined(record, key, where), key, where, True) for key in SYSTEM if record.get(key) is not None]
    texts = {text for text in given if text.strip()}
    if len(texts) > 1:
        raise UserError(f"{where}: system and system_prompt differ: leave one of them out")
    return texts.pop() if texts else ""


def _with_joined(record: Record, key: str, where: object) -> Record:
    """The record with a text in place of an object that holds it in parts, as Google's system instruction does."""
    value = record[key]
    inner = next((name for name in TEXT_KEYS if isinstance(value, dict) and value.get(name) is not None), None)
    return record if inner is None else record | {key: _content(value[inner], f"{key}.{inner}", where)}


def _history(record: Record, where: object) -> list[Turn]:
    if is_empty(history := listed(record.get("history"))):
        return []
    turns: list[Turn] = []
    for index, pair in enumerate(history if isinstance(history, list | tuple) else [history]):
        if not isinstance(pair, list | tuple) or [type(text) for text in pair] != [str, str]:
            raise UserError(
                f"{where}: history[{index}] must be a pair of texts, what the user said and the answer: "
                "give other conversations as messages"
            )
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return turns


def _tools(record: Record, where: object) -> tuple[dict[str, Any], ...]:
    """The tools of a record, by either key, as a list or as JSON, each in OpenAI's wrapping or without it."""
    result: list[dict[str, Any]] = []
    for key in TOOLS:
        if is_empty(given := listed(record.get(key))):
            continue
        if not isinstance(given, list):
            raise UserError(f"{where}: {key} must be a list of tools, also as JSON, not {type(given).__name__}")
        for index, tool in enumerate(given):
            tool = _without_nulls(tool)  # a table has each key in every row
            inner = tool.get("function", tool) if isinstance(tool, dict) else None
            if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
                raise UserError(f"{where}: {key}[{index}] must be an object with a name, or with such a function")
            result.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(result)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _one_text(key: str, fits: Callable[[Record], bool] | None = None) -> Shape:
    """A shape of a text without a prompt."""
    beside = (*ASKED, *ANSWERED, *CONVERSATION)
    return Shape(key, (key,), _only_text(key), (), REFUSED, beside, fits, teaches=True, is_alone=True)


def _only_text(key: str) -> Callable[[Record, object], Example]:
    def parse(record: Record, where: object) -> Example:
        if key not in record:
            raise UserError(unknown(record, where))
        refuse_bad_answer(record, "", where)
        part = record.get(PART)
        text = _text(record, key, where)
        labelled = any(not is_empty(record.get(label)) for label in LABELS)
        begins, ends = part in (None, "first"), part in (None, "last")
        return Example("", text, begins=begins, ends=ends, labelled=labelled, where=where)

    return parse


def unknown(record: Record, where: object, others: str = "") -> str:
    """What to say of a record of no known shape."""
    from ftray.data.proposal import proposal  # which imports this module

    guess = proposal(record)
    hint = f"; or say what is what, as in {guess}" if guess else ""
    keys = ", ".join(key for key in map(str, record) if not key.startswith(OWN)) or "(none)"
    return f"{where}: record with keys {keys}; known shapes: {KNOWN}{others}{hint}"


def _translation(record: Record, where: object) -> Example:
    pair = {key: text for key, text in record["translation"].items() if not is_empty(text)}
    if len(pair) != 2:
        raise UserError(
            f"{where}: translation holds {', '.join(pair) or 'nothing'}, not two languages: say which, as in "
            "--data.fields 'prompt: translation.en, completion: translation.fr'"
        )
    source, target = (as_text(text, f"translation.{key}", where) for key, text in pair.items())
    return _answered(source, target, record, where)


def _languages(record: Record) -> list[str]:
    """Keys that are codes of languages, where a record has just two such texts, and no other one by a known key."""
    keys = [key for key in record if re.fullmatch(r"[a-z]{2}(_[A-Z]{2})?", str(key)) and key != "id"]
    fit = len(keys) == 2 and all(isinstance(record[key], str) for key in keys) and _is_bare(record)
    return keys if fit else []


def _is_bare(record: Record) -> bool:
    return is_empty(record.get("text"))


def _two_languages(record: Record, where: object) -> Example:
    source, target = _languages(record)
    return _answered(_text(record, source, where), _text(record, target, where), record, where)


def _turns_in(key: str) -> Shape:
    """A shape of a conversation."""

    def parse(record: Record, where: object) -> Example:
        messages, context = _turns(record, key, where)
        return _conversation(messages, context, record, key, where)

    return Shape(
        "ShareGPT" if key.startswith("conv") else key,
        (key,),
        parse,
        (*SYSTEM, *TOOLS),
        _BESIDE_ANSWER,
        (*_BESIDE_TURNS, *ANSWERED, *(other for other in ("messages", "conversations") if other != key)),
        None if key in ("messages", "conversations") else lambda record: _are_turns(record[key]),
        (key,),
        IN_TURN,
        teaches=True,
    )


def conversation(messages: list[dict[str, Any]], tools: list[dict[str, Any]], where: object) -> Example:
    """A conversation in OpenAI's words as a record's `messages` and `tools` give it; nothing in it need be learnt.

    Raises:
        UserError: a turn that no record may hold.
    """
    turns, context = _turns({"messages": messages}, "messages", where)
    return Example(
        messages=tuple(turns), context=frozenset(context), tools=_tools({"tools": tools}, where), where=where
    )


def _conversational(record: Record, where: object) -> Example:
    """Prompt and completion as turns: what the assistant says in the prompt is context."""
    before, _ = _turns(record, "prompt", where)
    completion = listed(record["completion"])
    if isinstance(completion, dict | str):
        text = {"role": "assistant", "content": completion}
        completion = [text if isinstance(completion, str) else completion]
    after, context = _turns({"completion": completion}, "completion", where)
    unlearnt = {i for i, turn in enumerate(before) if turn.role == "assistant"} | {len(before) + i for i in context}
    return _conversation([*before, *after], unlearnt, record, "completion", where)


def _are_turns(value: Any) -> bool:
    turns = listed(value)
    return (
        isinstance(turns, list) and bool(turns) and (all(isinstance(turn, dict) for turn in turns) or _in_turn(turns))
    )


def _in_turn(turns: list[Any]) -> bool:
    """Whether turns are texts alone, as those of two who speak in turn, the second of them the assistant."""
    return len(turns) > 1 and all(isinstance(turn, str) for turn in turns)


def _turns(record: Record, key: str, where: object) -> tuple[list[Turn], set[int]]:
    """The turns of a list, and which of them are marked to bear no loss."""
    given = listed(record[key])
    if not isinstance(given, list) or not given:
        raise UserError(f"{where}: {key} must be a list of turns, at least one")
    if _in_turn(given):
        given = [{"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(given)]
    messages: list[Turn] = []
    context = set()
    for index, turn in enumerate(given):
        at = f"{key}[{index}]"
        said = _turn(turn, at, where)
        messages.append(said)
        if not bears_loss(turn, f"{at}.", where):
            context.add(index)
        elif said.role != "assistant" and (asking := next((key for key in turn if _asks_to_learn(turn, key)), None)):
            raise UserError(
                f"{where}: {at}.{asking}: a turn of {said.role} can't be learnt alone: "
                "leave the key out, or set data.train_on_prompt to learn all turns"
            )
    return messages, context


def _asks_to_learn(turn: dict[str, Any], key: str) -> bool:
    """Whether a mark is set on purpose: a weight may stand, as 1, at any turn."""
    return bool(turn[key]) and marks_learnt(key) is True and not key.lower().endswith("weight")


def _turn(turn: Any, at: str, where: object) -> Turn:
    name_key = next((key for key in ROLE_KEYS if isinstance(turn, dict) and turn.get(key) is not None), None)
    keys = [key for key in TEXT_KEYS if isinstance(turn, dict) and turn.get(key) is not None]
    if name_key is None or len(keys) > 1:
        raise UserError(f"{where}: {at} must have role and content (or from and value), both text")
    refuse(turn, REFUSED_IN_TURN, where, f"{at}.")
    refuse_in_turn(turn, IN_TURN, f"{at}.", where)
    name, key = turn[name_key], keys[0] if keys else TEXT_KEYS[ROLE_KEYS.index(name_key) % 2]
    role = ROLES.get(str(name).lower())
    if role is None:
        raise UserError(f"{where}: {at}.{name_key} is {name!r}; known: {', '.join(ROLES)}")
    text = _content(turn.get(key), f"{at}.{key}", where)
    thoughts = next((str(turn[key]) for key in THOUGHTS if not is_empty(turn.get(key))), "")
    if role == "assistant":
        refuse_bad_answer(turn, f"{at}.", where)
        calls = _calls(turn, at, where)
        if str(name).lower() in CALLS and text is not None and not calls and (calls := _calls_in(text)):
            for call in calls:
                _refuse_no_arguments(call, at, where)
            return Turn(role, "", calls, words=text, thoughts=thoughts)
        if text is not None or calls:
            return Turn(role, text or "", calls, thoughts=thoughts)
    elif text is not None:
        more = {"tool_call_id": turn["tool_call_id"]} if turn.get("tool_call_id") else {}
        more |= {"name": turn["name"]} if role == "tool" and turn.get("name") else {}
        return Turn(role, text, more=more)
    raise UserError(f"{where}: {at} must have {name_key} and {key}, both text")


def _calls(turn: dict[str, Any], at: str, where: object) -> tuple[dict[str, Any], ...]:
    """The calls of an assistant's turn; `function_call` is how OpenAI named a single one before."""
    given = [] if is_empty(turn.get("tool_calls")) else listed(turn["tool_calls"])
    if not is_empty(turn.get("function_call")):
        given = [*given, turn["function_call"]]
    calls = [_call(call) for call in given] if isinstance(given, list) else [None]
    for index, call in enumerate(calls):
        if call is None:
            raise UserError(
                f"{where}: {at}.tool_calls[{index}] must be an object with a function of name and arguments"
            )
        _refuse_no_arguments(call, f"{at}.tool_calls[{index}]", where)
    return tuple(call for call in calls if call)


def _refuse_no_arguments(call: dict[str, Any], at: str, where: object) -> None:
    """Raise the UserError about a call by whose example a model would learn to write arguments that nobody can read."""
    arguments = call["function"]["arguments"]
    if not isinstance(arguments, dict):
        raise UserError(
            f"{where}: {at}: the arguments of {call['function']['name']} are no JSON object but {arguments!r:.40}: "
            "mend them or leave out the record"
        )


def _calls_in(text: str) -> tuple[dict[str, Any], ...]:
    """The calls that a turn words as JSON; none: it is something else."""
    try:
        given = json.loads(text)
    except ValueError:
        return ()
    calls = [_call(call) for call in (given if isinstance(given, list) else [given])]
    return tuple(call for call in calls if call) if all(calls) else ()


def _call(given: Any) -> dict[str, Any] | None:
    """A call as OpenAI wraps it, its arguments as an object; None: it is none."""
    inner = given.get("function", given) if isinstance(given, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        return None
    arguments = _without_nulls(inner.get("arguments", inner.get("parameters", {})))
    if isinstance(arguments, str):
        with suppress(ValueError):  # which is refused
            arguments = json.loads(arguments or "{}")
    call = {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}
    return {"id": given["id"]} | call if given.get("id") else call


def _conversation(messages: list[Turn], context: set[int], record: Record, key: str, where: object) -> Example:
    refuse_bad_answer(record, "", where)
    tools = _tools(record, where)
    example = Example(messages=tuple(messages), context=frozenset(context), tools=tools, where=where)
    if not example.learnt:
        none = all(turn.role != "assistant" for turn in messages)
        which = "assistant turn" if none else "assistant turn to be learnt"
        raise UserError(f"{where}: {key} has no {which}: nothing to learn")
    system = _system(record, where)
    first = messages[0]
    if not system or (first.role in ("system", "developer") and first.text == system):
        return example
    if first.role in ("system", "developer"):
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
        if isinstance(part, dict) and "type" not in part and "text" not in part:
            kind = ", ".join(map(str, part))  # as Google's parts, which are named by their keys
        if kind not in TEXT_PARTS or not isinstance(text, str):
            raise UserError(f"{where}: {at}[{index}] is no text but {kind!r}: ftray reads text alone")
        texts.append(text)
    return "".join(texts) if texts else None


_BESIDE_ANSWER = REFUSED | KTO  # what can't be read beside an answer
_BESIDE_TURNS = ("instruction", "context", "prompt", "history")
# In the order they are tried; the last one takes the rest. A pair of texts is a line: the keys of what is asked, of the
# answer to it, and of what belongs to the question.
SHAPES: Sequence[Shape] = (
    Shape(
        "conversational prompt/completion",
        ("prompt", "completion"),
        _conversational,
        (*SYSTEM, *TOOLS),
        _BESIDE_ANSWER,
        _BESIDE_TURNS,
        lambda record: _are_turns(record["prompt"]),
        ("prompt", "completion"),
        IN_TURN,
        teaches=True,
    ),
    _pair("instruction", "output", ("input", "context"), name="instruction"),
    _pair("input", "output", optional=True, name="input/output"),
    _pair("prompt", "completion", optional=True, name="prompt/completion"),
    *(_turns_in(key) for key in TURNS),
    _pair("instruction", "response", ("input", "context")),
    _pair("instruction", "answer", ("input", "context")),
    _pair("instruction", "completion", ("input", "context")),
    _pair("prompt", "response", ("context",)),
    _pair("prompt", "answer", ("context",)),
    _pair("prompt", "output", ("context",)),
    _pair("question", "answer", ("context", "passage")),
    _pair("question", "response", ("context", "passage")),
    _pair("question", "output", ("context", "passage")),
    _pair("question", "answers"),
    _pair("query", "response", ("context",)),
    _pair("query", "answer", ("context",)),
    _pair("query", "output", ("context",)),
    _pair("problem", "solution"),
    _pair("problem", "answer"),
    _pair("input", "response"),
    _pair("input", "target"),
    _pair("inputs", "targets"),
    _pair("source", "target"),
    _pair("src", "tgt"),
    _pair("user", "assistant"),
    _pair("human", "assistant"),
    _pair("document", "summary"),
    _pair("article", "summary"),
    _pair("article", "highlights"),
    _pair("dialogue", "summary"),
    _pair("text", "summary"),
    Shape(
        "translation",
        ("translation",),
        _translation,
        CONVERSATION,
        _BESIDE_ANSWER,
        ASKED,
        lambda record: isinstance(record["translation"], dict),
        teaches=True,
    ),
    Shape(
        "two languages",
        (),
        _two_languages,
        CONVERSATION,
        _BESIDE_ANSWER,
        (*ASKED, *ANSWERED),
        _languages,
        teaches=True,
    ),
    _one_text("content", _is_bare),
    _one_text("text"),
)
KNOWN = "input/output, instruction/input/output, prompt/completion, question/answer, messages, conversations, text"


def parse(record: Record, where: object) -> Example:
    """Read a record of any known shape.

    Raises:
        UserError: a shape that isn't known, a field of the wrong type, or nothing to learn; says where.
    """
    return parse_and_see(record, where)[0]


def parse_and_see(record: Record, where: object) -> tuple[Example, Seen]:
    """As :func:`parse`, with what was recognised."""
    return read(record, SHAPES, where)
