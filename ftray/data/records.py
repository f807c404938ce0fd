"""Records of generating tasks: the table of their shapes, each read as prompt and target, or as a conversation."""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ftray.data.fields import as_typed
from ftray.data.meanings import ANSWERED, ASKED, PAIRED, ROLES, VERDICTS, is_about
from ftray.data.reading import Seen, read
from ftray.data.refusals import refuse_bad_answer
from ftray.data.shapes import ANY, LABELS, OWN, PART, Record, Shape, as_text, fitting, is_empty, listed
from ftray.data.turns import (
    IN_PART,
    IN_TURN,
    RENDERING,
    TEXT_KEYS,
    TOOLS,
    TURNS,
    Turn,
    answer_in,
    are_turns,
    calls_in,
    is_open_transcript,
    read_tools,
    read_turns,
    refuse_no_arguments,
    text_of_content,
)
from ftray.errors import UserError

SYSTEM = ("system", "system_prompt")
CONVERSATION = (*SYSTEM, "history", *TOOLS)  # with one of these a record is a conversation, whatever its other keys

_NO_KTO = "marks answers as good or bad, which --task KTO learns from: or keep the good ones, without this key"
_CALLED = dict.fromkeys(("tool_calls", "function_call"), "a call is part of a turn: put it into one of messages")
REFUSED = ANY | RENDERING | _CALLED
KTO = dict.fromkeys(VERDICTS, _NO_KTO)


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
        taught: whether a teacher's log-probabilities stand beside, which aren't.
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
    taught: bool = field(default=False, compare=False)
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


def text_of(record: Record, key: str, where: object, may_be_empty: bool = False) -> str:
    """The text under a key.

    Raises:
        UserError: it is something else, or blank though it may not be.
    """
    value = record[key]
    if isinstance(value, list | dict) and (inner := _first_text(value)):
        raise UserError(
            f"{where}: {key} must be text, not {type(value).__name__}: say which part is meant, as by "
            f"{_with_path(record, key, inner)}"
        )
    if isinstance(value, list | dict):
        raise UserError(
            f"{where}: {key} must be text, not {type(value).__name__}: say by --data.fields what of it is to be read"
        )
    value = as_text(value, key, where)
    if not value.strip() and not may_be_empty:
        raise UserError(f"{where}: {key} is empty")
    return value


def refuse_written_turns(text: str, key: str, where: object) -> None:
    """Raise the UserError about an answer that is turns, written as text in a way that isn't read here."""
    if _WRITTEN_TURNS.match(text.strip()):
        raise UserError(
            f"{where}: {key} holds turns that are written as a text: give what is asked as turns too, both as JSON has "
            "them, or all of them as messages"
        )


# a list of turns, or one of them, as JSON, Python or numpy write it: no list of other objects that hold roles too
_SAYS = rf"""["'](?:role|from)["']\s*:\s*["'](?:{"|".join(ROLES)})["']"""
_WRITTEN_TURNS = re.compile(
    rf"""\[?\s*\{{\s*(?=["'](?:role|from|content|value)["']\s*:)"""
    rf"""(?=.*["'](?:content|value)["']\s*:)(?=.*{_SAYS}).*[\]}}]$""",
    re.DOTALL,
)


def _first_text(value: Any) -> str:
    """The path to the first text in a list or object, but for a list of texts alone; empty: there is none."""
    items = enumerate(value) if isinstance(value, list) else value.items()
    for key, inner in items:
        if isinstance(inner, str) and isinstance(value, dict) and not is_about(key, inner, True):
            return str(key)
        if isinstance(inner, list | dict) and (path := _first_text(inner)):
            return f"{key}.{path}"
    return ""


def _with_path(record: Record, key: str, path: str) -> str:
    """The mapping to type that takes what stands at a path under a key, and the other texts as they are."""
    compared = (*(own for pair in PAIRED for own in pair), *VERDICTS)
    known = [name for name in record if name in (*ASKED, *ANSWERED, *CONVERSATION, *compared)]
    return as_typed({name: name for name in known} | {key: f"{key}.{path}"})


def with_one_answer(record: Record, key: str, where: object) -> Record:
    """The record with its answer out of a list that has no other; of several, nobody knows which is meant.

    A text that is written as a list is what an answer says, but for `answers`, which may be a column of a CSV file.
    """
    answers = listed(record[key]) if key == "answers" else record[key]
    if key == "answers" and isinstance(answers, str) and re.match(r"\s*\[\s*['\"]", answers):
        raise UserError(
            f"{where}: {key} is a list that is written otherwise than as JSON: write it so, with one answer, or say by "
            "--data.fields what is to be learnt"
        )
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        return record
    if len({*answers}) > 1:
        raise UserError(
            f"{where}: {key} holds {len(answers)} answers: say which one is to be learnt, as the first by "
            f"{_with_path(record, key, '0')}"
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
        prompt = asked_text(record, ask, further, where, optional)
        target = text_of(with_one_answer(record, answer, where), answer, where)
        refuse_written_turns(target, answer, where)
        return answered(prompt, target, record, where)

    fits = None if name or ask == "text" else _is_bare
    beside = (*ASKED, *ANSWERED)
    honours = (*further, *CONVERSATION)
    return Shape(name or f"{ask}/{answer}", (ask, answer), parse, honours, _BESIDE_ANSWER, beside, fits, teaches=True)


def asked_text(record: Record, ask: str, further: Sequence[str], where: object, may_be_empty: bool = False) -> str:
    """What is asked under a key, and what belongs to it under `further` ones, each on a line of its own."""
    texts = [text_of(record, ask, where, may_be_empty)]
    texts += [text_of(record, key, where, True) for key in further if record.get(key) is not None]
    return "\n".join(text for i, text in enumerate(texts) if not i or text.strip())


def answered(prompt: str, target: str, record: Record, where: object) -> Example:
    """Prompt and target; a conversation if the record has one of its keys, be it empty, that all of a file be alike."""
    refuse_bad_answer(record, "", where)
    tools = read_tools(record, where)
    if not tools and all(record.get(key) is None for key in (*SYSTEM, "history")):
        return Example(prompt, target, where=where)
    calls = calls_in(target) if tools else ()
    for call in calls:
        refuse_no_arguments(call, "the answer", where)
    answer = Turn("assistant", "", calls, words=target) if calls else Turn("assistant", target)
    turns = (*earlier_turns(record, where), Turn("user", prompt), answer)
    example, system = Example(messages=turns, tools=tools, where=where), _system(record, where)
    return begun_by(system, example) if system else example


def _system(record: Record, where: object) -> str:
    """What the record's own keys say of the system turn; empty: nothing."""
    keys = [key for key in SYSTEM if record.get(key) is not None]
    given = [text_of(_with_joined(record, key, where), key, where, True) for key in keys]
    texts = {text for text in given if text.strip()}
    if len(texts) > 1:
        raise UserError(f"{where}: system and system_prompt differ: leave one of them out")
    return texts.pop() if texts else ""


def _with_joined(record: Record, key: str, where: object) -> Record:
    """The record with a text in place of one in parts: a list, as Anthropic's, or an object, as Google's."""
    value = record[key]
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        return record | {key: text_of_content(value, key, where)}
    inner = next((name for name in TEXT_KEYS if isinstance(value, dict) and value.get(name) is not None), None)
    return record if inner is None else record | {key: text_of_content(value[inner], f"{key}.{inner}", where)}


def earlier_turns(record: Record, where: object) -> list[Turn]:
    """The earlier turns that a record holds as pairs of what the user said and the answer."""
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


def _one_text(key: str, fits: Callable[[Record], bool] | None = None) -> Shape:
    """A shape of a text without a prompt."""
    beside = (*ASKED, *ANSWERED, *CONVERSATION)
    return Shape(key, (key,), _only_text(key), (), REFUSED, beside, fits, teaches=True, is_alone=True)


def _only_text(key: str) -> Callable[[Record, object], Example]:
    """The function that reads a record of one text."""

    def parse(record: Record, where: object) -> Example:
        if key not in record:
            raise UserError(unknown(record, where))
        refuse_bad_answer(record, "", where, is_answer=False)
        part = record.get(PART)
        text = text_of(record, key, where)
        labelled = any(not is_empty(record.get(label)) for label in LABELS)
        begins, ends = part in (None, "first"), part in (None, "last")
        return Example("", text, begins=begins, ends=ends, labelled=labelled, where=where)

    return parse


def unknown(record: Record, where: object, others: str = "", tokens: Collection[str] = ()) -> str:
    """What to say of a record of no known shape.

    Args:
        others: shapes of other tasks, to be named too.
        tokens: special ones of the model, by which it may fill in a gap.
    """
    from ftray.data.preference_shapes import PAIRS  # which imports this module
    from ftray.data.proposal import proposal  # takes longer to import, and few need it
    from ftray.data.unpaired_shapes import UNPAIRED

    guess = proposal(record, tokens)
    hint = f"; or say what is what, as in {guess}" if guess else ""
    if fitting(record, PAIRS):
        hint = "; it holds two answers, of which one is better: --task DPO learns from such pairs"
    elif fitting(record, UNPAIRED[:-1]):
        hint = "; it holds an answer that was judged: --task KTO learns from such"
    keys = ", ".join(key for key in map(str, record) if not key.startswith(OWN)) or "(none)"
    return f"{where}: record with keys {keys}; known shapes: {KNOWN}{others}{hint}"


def _translation(record: Record, where: object) -> Example:
    pair = {key: text for key, text in record["translation"].items() if not is_empty(text)}
    if len(pair) != 2:
        source, target, *_ = *pair, "en", "fr"
        line = as_typed({"prompt": f"translation.{source}", "completion": f"translation.{target}"})
        raise UserError(
            f"{where}: translation holds {', '.join(pair) or 'nothing'}, not two languages: say which, as in {line}"
        )
    source, target = (as_text(text, f"translation.{key}", where) for key, text in pair.items())
    return answered(source, target, record, where)


def _languages(record: Record) -> list[str]:
    """Keys that are codes of languages, where a record has just two such texts, and no other one by a known key."""
    keys = [key for key in record if re.fullmatch(r"[a-z]{2}(_[A-Z]{2})?", str(key)) and key != "id"]
    fit = len(keys) == 2 and all(isinstance(record[key], str) for key in keys) and _is_bare(record)
    return keys if fit else []


def _is_bare(record: Record) -> bool:
    """Whether a record has no `text`, to which many shapes give way."""
    return is_empty(record.get("text"))


def _two_languages(record: Record, where: object) -> Example:
    source, target = _languages(record)
    return answered(text_of(record, source, where), text_of(record, target, where), record, where)


def _turns_in(key: str) -> Shape:
    """A shape of a conversation."""

    def parse(record: Record, where: object) -> Example:
        messages, context = read_turns(record, key, where)
        return as_conversation(messages, context, record, key, where)

    return Shape(
        "ShareGPT" if key.startswith("conv") else key,
        (key,),
        parse,
        (*SYSTEM, *TOOLS),
        _BESIDE_ANSWER,
        (*_BESIDE_TURNS, *ANSWERED, *(other for other in ("messages", "conversations") if other != key)),
        None if key in ("messages", "conversations") else lambda record: _fits_turns(record[key], key),
        (key,),
        IN_TURN,
        IN_PART,
        teaches=True,
    )


def _fits_turns(value: Any, key: str) -> bool:
    """Whether a value is a list of turns; what is called a dialogue may be a text, to be summed up."""
    return are_turns(value) and not (key in ("dialog", "dialogue") and isinstance(listed(value), str))


def conversation(messages: list[dict[str, Any]], tools: list[dict[str, Any]], where: object) -> Example:
    """A conversation in OpenAI's words as a record's `messages` and `tools` give it; nothing in it need be learnt.

    Raises:
        UserError: a turn that no record may hold.
    """
    turns, context = read_turns({"messages": messages}, "messages", where)
    return Example(
        messages=tuple(turns), context=frozenset(context), tools=read_tools({"tools": tools}, where), where=where
    )


def turns_of_both(ask: str, answer: str, transcribed: bool = False) -> Shape:
    """A shape of a conversation in two parts: what the assistant says in the first is context.

    Args:
        transcribed: the first part is a transcript, rather than a list.
    """

    def fits(record: Record) -> bool:
        if transcribed:
            return is_open_transcript(record[ask])
        return are_turns(record[ask]) and not isinstance(listed(record[ask]), str)

    def parse(record: Record, where: object) -> Example:
        before, _ = read_turns(record, ask, where)
        given = answer_in(record[answer], False)
        if isinstance(given, str):
            refuse_written_turns(given, answer, where)
            given = [{"role": "assistant", "content": given.lstrip(" \t") if transcribed else given}]
        after, context = read_turns({answer: given}, answer, where)
        unlearnt = {i for i, turn in enumerate(before) if turn.role == "assistant"} | {len(before) + i for i in context}
        return as_conversation([*before, *after], unlearnt, record, answer, where)

    return Shape(
        f"conversational {ask}/{answer}",
        (ask, answer),
        parse,
        (*SYSTEM, *TOOLS),
        _BESIDE_ANSWER,
        _BESIDE_TURNS,
        fits,
        (ask, answer),
        IN_TURN,
        IN_PART,
        teaches=True,
    )


def as_conversation(messages: list[Turn], context: set[int], record: Record, key: str, where: object) -> Example:
    """A conversation with the system text and the tools that its record has beside it.

    Args:
        context: which of the turns bear no loss.
        key: under which they stand, for messages.

    Raises:
        UserError: no turn of the assistant is left to be learnt, or there are two system texts.
    """
    refuse_bad_answer(record, "", where)
    tools = read_tools(record, where)
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


_BESIDE_ANSWER = REFUSED | KTO  # what can't be read beside an answer
_BESIDE_TURNS = ("instruction", "context", "prompt", "history")
# In the order they are tried; the last one takes the rest. A pair of texts is a line: the keys of what is asked, of the
# answer to it, and of what belongs to the question.
SHAPES: Sequence[Shape] = (
    turns_of_both("prompt", "completion"),
    turns_of_both("prompt", "response"),
    turns_of_both("input", "output"),
    _pair("instruction", "output", ("input", "context"), name="instruction"),
    _pair("input", "output", optional=True, name="input/output"),
    _pair("prompt", "completion", optional=True, name="prompt/completion"),
    *(_turns_in(key) for key in TURNS),
    _pair("instruction", "response", ("input", "context")),
    _pair("instruction", "answer", ("input", "context")),
    _pair("instruction", "completion", ("input", "context")),
    _pair("question", "completion", ("context", "passage")),
    _pair("query", "completion", ("context",)),
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
    _pair("query", "answers", ("context",)),
    _pair("problem", "solution"),
    _pair("problem", "answer"),
    _pair("input", "completion"),
    _pair("input", "answer"),
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
