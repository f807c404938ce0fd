"""Shapes of records: how one is recognised, and the kinds of values that its fields have.

A key that would change what is learnt is read by a shape, or refused (:mod:`ftray.data.refusals`); any other is
ignored, and named to the user (:mod:`ftray.data.reading`). Imports nothing that is slow.
"""

import ast
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ftray.data import meanings
from ftray.errors import UserError

Record = dict[str, Any]

# whatever the task: key -> why a record that has it is refused
ANY: dict[str, str] = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), meanings.MEDIA),
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages"), meanings.PREFERENCE),
}
LABELS = ("label", "labels", "sentiment", "intent", "emotion")  # of a text, by which another task is told
RENDERED = ("text", "prompt")  # where many files repeat the whole record
# what reading adds to a record, in keys that no file has
OWN = "ftray:"
PART = "ftray:part"  # which part of a longer text its text is: first, middle or last
LEFT_OUT = "ftray:left out"  # the keys that a mapping did not use
GROUP = "ftray:group"  # the key that `data.group` names, and its value
ADDED = (PART, LEFT_OUT, GROUP)


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
        in_part: keys that are read in each part of a turn's content.
        teaches: what a model is to write, so that a key is refused which means another answer, what was asked before,
            or how the answer was found; see :mod:`ftray.data.meanings`.
        compares: it tells good answers from bad ones, or teaches none, so that other answers may stand beside.
        keeps: all that a record holds beside what is asked, for a reward to go by.
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
    in_part: tuple[str, ...] = ()
    teaches: bool = False
    compares: bool = False
    keeps: bool = False
    is_alone: bool = False


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, blank text, an empty list or mapping (also as JSON, in a CSV field)."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}")
    return value is None or (isinstance(value, list | tuple | dict) and not value)


def has_teacher(record: Record) -> bool:
    """Whether a record holds a teacher's log-probabilities."""
    return any(not is_empty(record.get(key)) for key in ("logprobs", "teacher_logprobs"))


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


def listed(value: Any) -> Any:
    """A list, which may be written as JSON, as in a CSV file, of objects also as in Python; anything else as it is."""
    return _written(value, "[", list)


def object_of(value: Any) -> Any:
    """The same of an object."""
    return _written(value, "{", dict)


_OBJECTS = re.compile(r"\[?\s*\{\s*['\"]")


def _written(value: Any, begin: str, kind: type) -> Any:
    if not isinstance(value, str) or not value.lstrip().startswith(begin):
        return value
    try:
        found = json.loads(value)
    except RecursionError:
        return value
    except ValueError:
        found = _literal(value) if _OBJECTS.match(value.lstrip()) else value
    return found if isinstance(found, kind) else value


def _literal(text: str) -> Any:
    """What `str` made a text of, as pandas writes a list of dicts; the text: something else did."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of backslashes in a text that is no Python
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return text


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
