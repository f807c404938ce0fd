"""Shapes of records: how one is recognised, and what becomes of keys that it doesn't read.

A key that would change what is learnt is read by a shape or refused; any other is ignored, and named to the user.
Imports nothing that is slow.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ftray.data import meanings
from ftray.errors import UserError

Record = dict[str, Any]

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_PREFERENCE = ("chosen", "rejected", "rejected_response", "rejected_messages")
_UNCLEAR_MARK = "ftray learns whole turns and records: mark them by weight, 1 or 0"
# whatever the task: key -> why a record that has it is refused
ANY: dict[str, str] = {
    **dict.fromkeys(_MEDIA, "ftray reads text alone: leave out what needs more"),
    **dict.fromkeys(
        _PREFERENCE,
        "one of a preference pair, and ftray has no preference training yet: keep the good answer, as completion",
    ),
}
LABELS = ("label", "labels", "sentiment", "intent", "emotion")  # of a text, by which another task is told
RENDERED = ("text", "prompt")  # where many files repeat the whole record
# what reading adds to a record, in keys that no file has
OWN = "ftray:"
PART = "ftray:part"  # which part of a longer text its text is: first, middle or last
LEFT_OUT = "ftray:left out"  # the keys that a mapping did not use
GROUP = "ftray:group"  # the key that `data.group` names, and its value
_OWN = (PART, LEFT_OUT, GROUP)


@dataclass(frozen=True)
class Shape:
    """One way to write a record; a task has a table of them.

    Attributes:
        name: for whoever reads what was recognised.
        required_keys: keys by which it is recognised.
        parse: a record and where it stands -> what the task tokenizes.
        honours: keys that may be there, and are read.
        refuses: keys that would change what is learnt, and can't be read -> why.
        beside: the same for further texts, which are refused unless they only repeat those that are read.
        fits: whether the values of those keys are of the right kind; None: whatever they are. Where no keys are named,
            it gives them.
        turns: keys that hold lists of turns.
        in_turn: keys that are read in each turn.
        teaches: what a model is to write, so that a key is refused which means another answer, what was asked before,
            or how the answer was found; see :mod:`ftray.data.meanings`.
        is_alone: it reads one text, beside which other texts are refused that aren't about the record.
    """

    name: str
    required_keys: tuple[str, ...]
    parse: Callable[[Record, object], Any]
    honours: tuple[str, ...] = ()
    refuses: Mapping[str, str] = field(default_factory=lambda: ANY)
    beside: tuple[str, ...] = ()
    fits: Callable[[Record], Any] | None = None
    turns: tuple[str, ...] = ()
    in_turn: tuple[str, ...] = ()
    teaches: bool = False
    is_alone: bool = False


@dataclass(frozen=True)
class Seen:
    """What was recognised in a record: its shape with the keys that were read, and those that were ignored."""

    shape: str
    ignored: tuple[str, ...]


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, blank text, an empty list or mapping (also as JSON, in a CSV field)."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}")
    return value is None or (isinstance(value, list | tuple | dict) and not value)


def recognise(record: Record, shapes: Sequence[Shape]) -> Shape:
    """The shape of a record; the last one takes those that fit no other, and its `parse` says what they lack.

    Keys that hold null count for less: a table has each column in every row.
    """
    if shape := fitting(record, shapes[:-1]):
        return shape
    for shape in shapes[:-1]:
        keys = () if shape.turns else shape.required_keys
        absent = [record.get(key) is None for key in keys]
        if all(key in record for key in keys) and any(absent) and not all(absent):
            return shape
    return shapes[-1]


def fitting(record: Record, shapes: Sequence[Shape]) -> Shape | None:
    """The first shape whose keys all hold something of the right kind; None: there is none."""
    for shape in shapes:
        if all(record.get(key) is not None for key in shape.required_keys):
            fit: Any = shape.fits(record) if shape.fits else True
            if fit:
                return shape if shape.required_keys else replace(shape, required_keys=tuple(fit))
    return None


def read(record: Record, shapes: Sequence[Shape], where: object) -> tuple[Any, Seen]:
    """What a record says, and what was recognised in it.

    Raises:
        UserError: it lacks something, or has what would change its meaning and isn't read; says where.
    """
    shape = recognise(record, shapes)
    refuse(record, shape.refuses, where)
    refuse_meanings(record, shape, where)
    if not bears_loss(record, "", where):
        raise UserError(f"{where}: marked as one that isn't learnt: leave the record out")
    example = shape.parse(record, where)
    own = (*shape.required_keys, *shape.honours)
    for key, value in record.items():
        if key in shape.beside and key not in own and not is_empty(value):
            _refuse_lost(record, key, shape, where)
    if shape.is_alone:
        _refuse_beside_text(record, shape, where)
    return example, Seen(f"{shape.name} ({', '.join(_read_keys(record, shape))})", _ignored(record, shape))


def refuse(holder: Mapping[str, Any], reasons: Mapping[str, str], where: object, path: str = "") -> None:
    """Raise the UserError about the first key of a record or turn that is among `reasons` and says something."""
    for key, value in holder.items():
        if key in reasons and not is_empty(value):
            raise UserError(f"{where}: {path}{key}: {reasons[key]}")


def refuse_meanings(record: Record, shape: Shape, where: object) -> None:
    """Raise the UserError about the first key that, by its words, would change what is learnt, and isn't read."""
    own = (*shape.required_keys, *shape.honours)
    is_known = all(key in record for key in shape.required_keys)
    for key, value in record.items():
        if key in own or key in _OWN or is_empty(value) or meanings.marks_learnt(key) is not None:
            continue
        if why := meanings.of_media(key, value) or (meanings.of_answer(key, value) if shape.teaches else ""):
            raise UserError(f"{where}: {key}: {why}, or say by --data.fields what is to be read")
        if shape.teaches and meanings.is_unclear_mark(key):
            raise UserError(f"{where}: {key}: {_UNCLEAR_MARK}")
        if not shape.teaches or not is_known or key in shape.beside or _is_repeated(record, key, shape):
            continue
        if name := meanings.read_as(key, value):
            raise UserError(f"{where}: {key} would be lost: {_renamed(record, key, name, shape)}")
        if meanings.is_reasoning(key, value):
            _refuse_lost(record, key, shape, where)


def refuse_in_turn(turn: Mapping[str, Any], read_keys: Sequence[str], path: str, where: object) -> None:
    """The same for the keys of a turn."""
    for key, value in turn.items():
        if key in read_keys or is_empty(value) or meanings.marks_learnt(key) is not None:
            continue
        why = meanings.of_media(key, value) or meanings.of_answer(key, value)
        if why := why or (_UNCLEAR_MARK if meanings.is_unclear_mark(key) else ""):
            raise UserError(f"{where}: {path}{key}: {why}")
        if meanings.is_reasoning(key, value) or meanings.read_as(key, value) == "tools":
            raise UserError(
                f"{where}: {path}{key} would be lost: a turn is read by its role, text, calls and thoughts "
                "(reasoning_content) alone: put it into one of them, or leave it out"
            )


def _renamed(record: Record, key: str, name: str, shape: Shape) -> str:
    """What to do about a key that is read by another name."""
    own = [known for known in (*shape.required_keys, *shape.honours) if record.get(known) is not None]
    pairs = name != "history" or all(isinstance(said, list | tuple) for said in listed(record[key]))
    if name not in shape.honours or not pairs:
        return "give what was said before and what is learnt as one list of turns, as messages"
    mapping = ", ".join([*(f"{known}: {known}" for known in own), f"{name}: {key}"])
    return f"it is read by the name of {name}: rename it, as by --data.fields '{mapping}'"


def _refuse_beside_text(record: Record, shape: Shape, where: object) -> None:
    """Raise the UserError about what stands beside a lone text, and is probably what is to be learnt."""
    (own,) = shape.required_keys
    is_collected = meanings.is_collected(record)
    for key, value in record.items():
        known = key in _OWN or key in shape.beside or key in LABELS or meanings.marks_learnt(key) is not None
        if key == own or known or is_empty(value) or meanings.is_about(key, value, is_collected):
            continue
        if isinstance(value, list | dict):
            learn = "--data.fields"
        elif meanings.is_label(key) or not isinstance(number(value), str):
            fraction = isinstance(number(value), float)
            label = f'"{{{{ {key} | float | round | int }}}}"' if fraction and str(key).isidentifier() else key
            learn = f"--data.fields 'text: {own}, label: {label}' to learn it"
        else:
            learn = f"--data.fields 'prompt: {own}, completion: {key}' to learn it"
        raise UserError(
            f"{where}: {key} would be lost: a record with {own} is read by {own} alone: say what is to be read, as by "
            f"{learn}, or --data.fields 'text: {own}' to learn the text alone"
        )


def number(value: Any) -> Any:
    """A number or boolean, which may be written as text, as in a CSV file; anything else as it is."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    if text in ("true", "false"):
        return text == "true"
    try:
        found = float(text)
    except ValueError:
        return value
    return int(found) if found.is_integer() else found


def bears_loss(holder: Mapping[str, Any], path: str, where: object) -> bool:
    """Whether a turn, or a record, is to be learnt, as its `FLAGS` say; so it is where there are none.

    Raises:
        UserError: a flag is neither 1 nor 0.
    """
    result = True
    for key, value in holder.items():
        marked = meanings.marks_learnt(key)
        if marked is None or is_empty(value):
            continue
        value = number(value)
        if isinstance(value, str) or value not in (0, 1):
            raise UserError(
                f"{where}: {path}{key} is {value!r:.40}: a turn or record is learnt or not, there are no shares yet: "
                "give 1 or 0, or true or false"
            )
        result = result and bool(value) == marked
    return result


def refuse_bad_answer(holder: Mapping[str, Any], path: str, where: object) -> None:
    """Raise the UserError about an answer that its record or turn marks as a bad one: it would be learnt.

    A share (`reward: 0.3`) marks none as bad; nor does what can't be told to be a verdict, as a comment.
    """
    for key, value in holder.items():
        value = number(value)
        if meanings.says_bad(key, value):
            raise UserError(
                f"{where}: {path}{key} is {value!r}, and what is learnt are good answers: leave the record out, or say "
                "by --data.fields what is to be read"
            )


def _is_repeated(record: Record, key: str, shape: Shape) -> bool:
    """Whether what stands under a key only repeats what is read, and that not by chance."""
    own = [text for name in (*shape.required_keys, *shape.honours) for text in _texts(record.get(name))]
    given = _texts(record[key])
    if all(text in own for text in given):
        return True
    if key in RENDERED and len(given) == 1 and (_is_filled(given[0], own) or _is_ended(given[0], own)):
        return True
    if shape.is_alone:
        names = [name for name in record if name in shape.beside and name not in (*shape.required_keys, *RENDERED)]
        return _is_ended(own[0], [text for name in {key, *names} for text in _texts(record[name])])
    if key in meanings.ANSWERED and shape.required_keys:  # by what is learnt, not by what is asked
        last = listed(record[shape.required_keys[-1]])
        own = _texts(last[-1:] if isinstance(last, list) else last)
    return all(any(_is_part(text, whole) for whole in own) for text in given)


# what stands before and after a part of a filled template: a line's end, or a mark such as `A:`, `</s>` or `[INST]`
_BEFORE = re.compile(r"(^|[\n:>\]|}{$#)])[ \t]*$")
_AFTER = re.compile(r"\s*\.?[ \t]*($|[\n<\[|}{$#])")
_MARKED = re.compile(r"[:>\]|}#]\s*$")
_ENDED = re.compile(r"\s*(<[^<>]*>\s*|\[[^][]*\]\s*)*$")


def _is_part(text: str, whole: str) -> bool:
    """Whether a text fills a place in a template that `whole` was made from, rather than stands in it by chance."""
    places = [(place.start(), place.end()) for place in re.finditer(re.escape(text), whole)]
    return any(_BEFORE.search(whole[max(0, start - 40) : start]) and _AFTER.match(whole, end) for start, end in places)


def _is_filled(whole: str, parts: list[str]) -> bool:
    return all(_is_part(part, whole) for part in parts)


def _is_ended(whole: str, parts: list[str]) -> bool:
    """Whether a text holds all parts as words, and one of them is its end, after a mark or after another part."""
    if not all(re.search(rf"(?<!\w){re.escape(part)}(?!\w)", whole) for part in parts):
        return False
    for part in parts:
        at = whole.rfind(part)
        before = whole[:at].rstrip()
        if _ENDED.match(whole, at + len(part)) and (
            _MARKED.search(before) or before.endswith(tuple({*parts} - {part}))
        ):
            return True
    return False


def _refuse_lost(record: Record, key: str, shape: Shape, where: object) -> None:
    if _is_repeated(record, key, shape):
        return
    raise UserError(
        f"{where}: {key} would be lost: a record with {'/'.join(shape.required_keys)} is read by "
        f"{', '.join((*shape.required_keys, *shape.honours))} alone: put it into one of them, leave it out, or say by "
        "--data.fields what is to be read"
    )


def _texts(value: Any) -> list[str]:
    """All texts in a value, however deep, without blanks around them; of turns, what they say and not who."""
    if isinstance(value, list | tuple):
        return [text for part in value for text in _texts(part)]
    if isinstance(value, dict):
        return _texts([text for key, text in value.items() if key not in ("role", "from")])
    return [] if is_empty(value) else [str(value).strip()]


def _turns(record: Record, shape: Shape) -> list[tuple[str, dict[str, Any]]]:
    """Each turn with the name of the list that it stands in."""
    return [
        (f"{key}[]", turn) for key in shape.turns for turn in listed(record.get(key)) or [] if isinstance(turn, dict)
    ]


def listed(value: Any) -> Any:
    """A list, which may be written as JSON, as in a CSV file; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _read_keys(record: Record, shape: Shape) -> list[str]:
    turns = [(f"{at}.{key}", key) for at, turn in _turns(record, shape) for key in turn if turn[key] is not None]
    flags = dict.fromkeys(path for path, key in turns if meanings.marks_learnt(key) is not None)
    return [*shape.required_keys, *(key for key in shape.honours if record.get(key) is not None), *flags]


def _ignored(record: Record, shape: Shape) -> tuple[str, ...]:
    known = {*shape.required_keys, *shape.honours, *_OWN}
    known |= {key for key in record if meanings.marks_learnt(key) is not None}
    found = {key for key, value in record.items() if key not in known and not is_empty(value)}
    found.update(record.get(LEFT_OUT, ()))
    for at, turn in _turns(record, shape):
        unread = [key for key in turn if key not in shape.in_turn and meanings.marks_learnt(key) is None]
        found.update(f"{at}.{key}" for key in unread if not is_empty(turn[key]))
        for key, parts in turn.items():
            for part in parts if key in shape.in_turn and isinstance(parts, list) else []:
                left = [name for name in part if name not in ("type", "text")] if isinstance(part, dict) else []
                found.update(f"{at}.{key}[].{name}" for name in left if "text" in part and not is_empty(part[name]))
    return tuple(sorted(found.difference(record.get(GROUP, ())[:1])))


def as_text(value: Any, key: str, where: object) -> str:
    """A field as text; numbers and booleans are spelt as in JSON.

    Raises:
        UserError: it is something else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: {key} is {value}, which is no text: give null where there is none")
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise UserError(f"{where}: {key} must be text, not {type(value).__name__}")
