"""Shapes of preference pairs: two answers to one prompt, of which one is preferred."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ftray.data import meanings
from ftray.data.fields import as_typed
from ftray.data.meanings import ANSWERED, ASKED, PAIRED, VERDICTS
from ftray.data.pair_verdicts import in_columns, refuse_names, refuse_other_verdict, refuse_tie
from ftray.data.records import (
    CONVERSATION,
    REFUSED,
    SYSTEM,
    Example,
    answered,
    as_conversation,
    asked_text,
    earlier_turns,
    refuse_written_turns,
    text_of,
    with_one_answer,
)
from ftray.data.respelt import respelt
from ftray.data.shapes import Record, Shape, is_empty, listed, number
from ftray.data.turns import IN_PART, IN_TURN, TURNS, Turn, answer_in, is_open_transcript, read_turns, turn_of
from ftray.errors import UserError

# keys of what is asked, each with those of what belongs to it
ASKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("instruction", ("input", "context")),
    ("prompt", ("context",)),
    ("question", ("context", "passage")),
    ("query", ("context",)),
    ("problem", ()),
    ("input", ()),
    *((key, ()) for key in TURNS),
)
NEEDS = (
    "prompt/chosen/rejected (texts or turns), chosen/rejected alone (whole texts or conversations that begin alike), "
    "question or instruction/input in place of prompt, messages/rejected_response, "
    "input/preferred_output/non_preferred_output, prompt/y_w/y_l, prompt/response_a/response_b/winner"
)


@dataclass(frozen=True)
class Pair:
    """A prompt and two answers to it; only they bear loss.

    Attributes:
        chosen, rejected: the prompt with either answer; in conversations, the prompt's turns are context.
        where: the record stands.
        is_text: the answers end one text, which is no question to a chat template.
    """

    chosen: Example
    rejected: Example
    where: object = field(default="", compare=False)
    is_text: bool = False


def pair_shape(good: str, bad: str, ask: str = "", further: tuple[str, ...] = ()) -> Shape:
    """A shape of two answers.

    Args:
        good, bad: keys of the answers.
        ask: key of what they answer; empty: they are whole texts or conversations, which begin alike.
        further: keys of what belongs to what is asked.
    """

    def parse(record: Record, where: object) -> Pair:
        _refuse_incomplete(record, good, bad, where)
        refuse_tie(record, (good, bad), where)
        kept = {key: key for key in (*keys, *further, *CONVERSATION) if key in record}
        refuse_names(record, good, bad, kept, where)
        refuse_other_verdict(record, good, bad, kept, where)
        answers = [_answer(record, key, where) for key in (good, bad)]
        asked = ask if ask and not is_empty(record.get(ask)) else ""
        if all(isinstance(answer, str) for answer in answers):
            if not asked:
                _refuse_blank(record, (good, bad), where)
            pair = _pair_of_texts(record, asked, further, answers, (good, bad), where)
        elif all(isinstance(answer, list) for answer in answers):
            pair = _pair_of_turns(record, asked, further, (good, bad), where)
        else:
            raise UserError(f"{where}: one of {good} and {bad} is a text, the other holds turns: give both alike")
        if pair.chosen == pair.rejected:
            raise UserError(f"{where}: {good} and {bad} are equal, so that neither is better: leave the record out")
        return pair

    asks = (ask,) if ask else ()
    keys = (*asks, good, bad)
    return Shape(
        f"{ask}/{good}/{bad}".lstrip("/"),
        keys,
        parse,
        (*further, *CONVERSATION),
        _refused((good, bad)),
        tuple(key for key in (*ASKED, *ANSWERED, *TURNS) if key not in keys),
        _are_no_numbers(good, bad) if good == "win" else _are_no_numbers(ask) if ask in TURNS else None,
        turns=keys,
        in_turn=IN_TURN,
        in_part=IN_PART,
        teaches=True,
        compares=True,
    )


def _are_no_numbers(*keys: str) -> Callable[[Record], bool]:
    """What tells answers and turns from their counts: of those that won and lost, of turns."""
    return lambda record: all(isinstance(number(record[key]), str | list | dict) for key in keys)


def _refused(own: tuple[str, str]) -> dict[str, str]:
    """What can't be read beside a pair."""
    others = {key for keys in PAIRED for key in keys} | {"rejected_response", "rejected_messages"}
    further = dict.fromkeys(
        others.difference(own), f"a further answer: a record is read by {own[0]} and {own[1]} alone"
    )
    kept = {key: why for key, why in REFUSED.items() if why != meanings.PREFERENCE}
    label = dict.fromkeys(VERDICTS, "may say which answer is the better one, beside a pair that says it")
    return kept | further | label


def _refuse_blank(record: Record, answers: tuple[str, str], where: object) -> None:
    """Raise the UserError about a prompt that says nothing: two texts without one are read as what begins alike."""
    ask = next((key for key, _ in ASKS if key in record and key not in answers), "")
    if ask:
        raise UserError(
            f"{where}: {ask} is empty: leave the record out; where all records are whole texts that begin alike, "
            f"{as_typed({key: key for key in answers})} reads them as such"
        )


def _refuse_incomplete(record: Record, good: str, bad: str, where: object) -> None:
    """Raise the UserError about a record that lacks one of its answers, or both, if it does."""
    absent = [key for key in (good, bad) if is_empty(record.get(key))]
    if len(absent) == 2:  # as in the last shape, which takes those that fit no other
        for keys in PAIRED:
            if any(not is_empty(record.get(key)) for key in keys):
                _refuse_incomplete(record, *keys, where)
        raise UserError(
            f"{where}: record with keys {', '.join(map(str, record)) or '(none)'}; known shapes of preference pairs: "
            f"{NEEDS}; answers alone are learnt by --task CAUSAL_LM, those with a label, true or false, by --task KTO"
        )
    if absent:
        raise UserError(
            f"{where}: {absent[0]} is missing or empty: a preference pair needs {good} and {bad}: leave the record "
            "out, or give single answers a label, true or false, for --task KTO"
        )


def _answer(record: Record, key: str, where: object) -> str | list[Any]:
    """What stands under the key of an answer: a text, or turns as they are written."""
    value = answer_in(record[key], True)
    if isinstance(value, list) and isinstance(value[0], dict):
        return value
    text = text_of(with_one_answer(record, key, where), key, where)
    refuse_written_turns(text, key, where)
    return text


def _pair_of_texts(
    record: Record, ask: str, further: Sequence[str], texts: list[Any], answers: tuple[str, str], where: object
) -> Pair:
    if not ask:
        return _text_that_parts(record, texts, answers, where)
    prompt = read_prompt(record, ask, further, where)
    if isinstance(prompt, str):
        beside = beside_prompt(record)
        chosen, rejected = (_last_alone(answered(prompt, text, beside, where)) for text in texts)
        return Pair(chosen, rejected, where)
    if isinstance(record[ask], str):  # a transcript, in which a blank stands before what is said
        texts = [text.lstrip(" \t") for text in texts]
    return _conversations(record, prompt, [[Turn("assistant", text)] for text in texts], answers, where)


def _pair_of_turns(record: Record, ask: str, further: Sequence[str], answers: tuple[str, str], where: object) -> Pair:
    both = [_read_answer(record, key, where) for key in answers]
    whole = [turns[0].role != "assistant" for turns in both]
    prompt = read_prompt(record, ask, further, where) if ask else []
    if whole[0] != whole[1]:
        raise UserError(
            f"{where}: one of {answers[0]} and {answers[1]} is a whole conversation, the other an answer: give both "
            "alike"
        )
    if not whole[0]:
        if not ask:
            raise UserError(f"{where}: {answers[0]} begins with the assistant: give what is answered as prompt")
        asked = [Turn("user", prompt)] if isinstance(prompt, str) else prompt
        earlier = earlier_turns(record, where) if isinstance(prompt, str) else []
        return _conversations(record, [*earlier, *asked], both, answers, where)
    if not is_empty(record.get("history")):
        raise UserError(f"{where}: history: {answers[0]} and {answers[1]} are whole conversations: leave it out")
    shared = _shared(both[0], both[1], answers, where)
    if ask and not _is_repeated(prompt, both, shared):
        raise UserError(
            f"{where}: {ask} is not what {answers[0]} and {answers[1]} begin with, which are whole conversations: "
            f"{as_typed({key: key for key in answers})} leaves it out"
        )
    return _conversations(record, both[0][:shared], [turns[shared:] for turns in both], answers, where)


def _is_repeated(prompt: str | list[Turn], both: list[list[Turn]], shared: int) -> bool:
    """Whether a prompt only repeats what two conversations begin with, or one of them."""
    if isinstance(prompt, str):
        return any(turn.text.strip() == prompt.strip() for turn in both[0][:shared])
    return prompt in (both[0][: len(prompt)], both[1][: len(prompt)])


def _read_answer(record: Record, key: str, where: object) -> list[Turn]:
    """The turns under the key of an answer, without those after the assistant's last one, which nobody answers."""
    turn = turn_of(record[key])
    turns, context = read_turns({key: [turn] if turn else record[key]}, key, where)
    spoken = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    if not spoken:
        raise UserError(f"{where}: {key} has no turn of the assistant")
    if spoken[-1] in context:
        raise UserError(
            f"{where}: {key}[{spoken[-1]}] is marked as one that isn't learnt: an answer of a pair is compared as a "
            "whole: leave the mark out"
        )
    return turns[: spoken[-1] + 1]


def read_prompt(record: Record, ask: str, further: Sequence[str], where: object) -> str | list[Turn]:
    """What is asked: a text, or turns; these may stand in an object beside their tools, as OpenAI has them."""
    value = record[ask]
    if isinstance(value, dict) and "messages" in value:
        return read_turns({f"{ask}.messages": value["messages"]}, f"{ask}.messages", where)[0]
    is_listed = isinstance(listed(value), list) or (ask not in TURNS and is_open_transcript(value))
    if is_listed or ask in TURNS:
        return read_turns(record, ask, where)[0]
    text = asked_text(record, ask, further, where)
    refuse_written_turns(text, ask, where)
    return text


def prompt_of(example: Example) -> object:
    """What is asked, in plain data; equal for a text and for a conversation of that text alone."""
    if example.messages is None:
        return [["user", example.prompt]]
    end = example.learnt[0] if example.learnt else len(example.messages)
    return [[turn.role, turn.text, *turn.calls] for turn in example.messages[:end]]


def beside_prompt(record: Record) -> Record:
    """What a record has beside its prompt that makes it a conversation."""
    inner = record.get("input")
    tools = inner.get("tools") if isinstance(inner, dict) else None
    found = {key: record[key] for key in CONVERSATION if record.get(key) is not None}
    return {"tools": tools, **found} if tools else found


def _shared(chosen: list[Turn], rejected: list[Turn], answers: tuple[str, str], where: object) -> int:
    """With how many equal turns two conversations begin.

    Raises:
        UserError: what comes next is not an answer to the same turns.
    """
    least = min(len(chosen), len(rejected))
    shared = next((at for at in range(least) if chosen[at] != rejected[at]), least)
    if shared == len(chosen) == len(rejected):
        raise UserError(f"{where}: {answers[0]} and {answers[1]} are equal, so that neither is better: leave it out")
    if shared == least:
        shorter = answers[0] if len(chosen) == least else answers[1]
        raise UserError(f"{where}: {shorter} ends before the two differ: give two answers to the same turns")
    if chosen[shared].role != "assistant" or rejected[shared].role != "assistant":
        raise UserError(
            f"{where}: {answers[0]} and {answers[1]} differ in turn {shared}, before an answer: give two answers to "
            "the same turns"
        )
    return shared


def _conversations(
    record: Record, prompt: list[Turn], both: list[list[Turn]], answers: tuple[str, str], where: object
) -> Pair:
    """A pair of conversations that begin with the same turns."""
    if prompt and prompt[-1].role == "assistant":
        raise UserError(
            f"{where}: what is asked ends with an answer, beside {answers[0]} and {answers[1]}: leave it out"
        )
    context = {index for index, turn in enumerate(prompt) if turn.role == "assistant"}
    beside = beside_prompt(record)
    chosen, rejected = (
        as_conversation([*prompt, *turns], context, beside, key, where)
        for turns, key in zip(both, answers, strict=True)
    )
    return Pair(chosen, rejected, where)


def _last_alone(example: Example) -> Example:
    """An example whose last answer alone bears loss."""
    return replace(example, context=frozenset(example.learnt[:-1])) if example.messages else example


def _text_that_parts(record: Record, texts: list[str], answers: tuple[str, str], where: object) -> Pair:
    """A pair of two texts that begin alike: the answers begin with the first word that differs."""
    for key in (*SYSTEM, "history", "tools", "functions"):
        if not is_empty(record.get(key)):
            raise UserError(f"{where}: {key} without a prompt: give what {answers[0]} answers as prompt")
    at = _first_difference(*texts)
    if not texts[0][:at].strip():
        raise UserError(
            f"{where}: {answers[0]} and {answers[1]} don't begin with the same words: give what they answer as prompt"
        )
    chosen, rejected = (Example(text[:at], text[at:], where=where) for text in texts)
    return Pair(chosen, rejected, where, is_text=True)


def _first_difference(first: str, second: str) -> int:
    """Where two texts part, at the beginning of a word, or at the blank before it; both have words after it."""
    least = min(len(first.rstrip()), len(second.rstrip()))
    at = next((i for i in range(least) if first[i] != second[i]), least)
    while at and (at == least or _is_inside_word(first, at) or _is_inside_word(second, at)):
        at -= 1
    return at - 1 if at and first[at - 1] == " " else at


def _is_inside_word(text: str, at: int) -> bool:
    """Whether letters that belong together stand on both sides; those without a case are words of their own."""
    return all(
        letter.isdecimal() or letter in "_'" or letter.lower() != letter.upper() for letter in text[at - 1 : at + 1]
    )


def _beside_an_answer(good: str, bad: str) -> Shape:
    """A shape of a conversation whose last answer is preferred to another one, as ms-swift has it."""

    def parse(record: Record, where: object) -> Pair:
        _refuse_incomplete(record, good, bad, where)
        turns = _read_answer(record, good, where)
        other = text_of(with_one_answer(record, bad, where), bad, where)
        pair = _conversations(record, turns[:-1], [turns[-1:], [Turn("assistant", other)]], (good, bad), where)
        if pair.chosen == pair.rejected:
            raise UserError(f"{where}: {good} and {bad} are equal, so that neither is better: leave the record out")
        return pair

    return replace(pair_shape(good, bad), parse=parse)


# In the order they are tried; the last one takes the rest.
_NAMED = (
    *(pair_shape(*answers, ask, further) for answers in PAIRED for ask, further in ASKS),
    *(pair_shape(*answers) for answers in PAIRED[1:]),
    _beside_an_answer("messages", "rejected_response"),
    pair_shape("messages", "rejected_messages"),
)
_ALONE = pair_shape(*PAIRED[0])
_COLUMNS = in_columns((*_NAMED, _ALONE), PAIRED[0])
PAIRS: Sequence[Shape] = (*_NAMED, _COLUMNS, respelt((*_NAMED, _COLUMNS, _ALONE)), _ALONE)
