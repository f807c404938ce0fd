"""Shapes of records: how one is told, and what becomes of keys that it doesn't read.

A key that would change what is learnt is read by a shape or refused; any other is ignored, and named to the user.
Imports nothing that is slow.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ftray.errors import UserError

Record = dict[str, Any]

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_PREFERENCE = ("chosen", "rejected", "rejected_response", "rejected_messages")
# whatever the task: key -> why a record that has it is refused
ANY: dict[str, str] = {
    **dict.fromkeys(_MEDIA, "ftray reads text alone: leave out what needs more"),
    **dict.fromkeys(
        _PREFERENCE,
        "one of a preference pair, and ftray has no preference training yet: keep the good answer, as completion",
    ),
}
# whether a turn, or a record, is learnt: 1 or true means that it is, and for the last two that it isn't
_WANTED, _UNWANTED = ("weight", "loss_weight", "train", "training", "trainable", "loss"), ("mask", "masked")
FLAGS = (*_WANTED, *_UNWANTED)
ASKING = _WANTED[2:]  # those that are set on purpose: `weight` may stand, as 1, at any turn
RENDERED = ("text", "prompt")  # where many files repeat the whole record


@dataclass(frozen=True)
class Shape:
    """One way to write a record; a task has a table of them.

    Attributes:
        name: for whoever reads what was recognised.
        required_keys: keys by which it is told.
        parse: a record and where it stands -> what the task tokenizes.
        honours: keys that may be there, and are read.
        refuses: keys that would change what is learnt, and can't be read -> why.
        beside: the same for further texts, which are refused unless they only repeat those that are read.
        turns: keys of role and text in each turn, where `required_keys` names a list of turns.
        holds_all: its one text may hold what stands beside it.
    """

    name: str
    required_keys: tuple[str, ...]
    parse: Callable[[Record, object], Any]
    honours: tuple[str, ...] = ()
    refuses: Mapping[str, str] = field(default_factory=lambda: ANY)
    beside: tuple[str, ...] = ()
    turns: tuple[str, str] | None = None
    holds_all: bool = False


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
    for shape in shapes[:-1]:
        if all(record.get(key) is not None for key in shape.required_keys):
            return shape
    for shape in shapes[:-1]:
        if all(key in record for key in shape.required_keys) and any(
            record[key] is not None for key in shape.required_keys
        ):
            return shape
    return shapes[-1]


def read(record: Record, shapes: Sequence[Shape], where: object) -> tuple[Any, Seen]:
    """What a record says, and what was recognised in it.

    Raises:
        UserError: it lacks something, or has what would change its meaning and isn't read; says where.
    """
    shape = recognise(record, shapes)
    refuse(record, shape.refuses, where)
    if not bears_loss(record, "", where):
        raise UserError(f"{where}: marked as one that isn't learnt: leave the record out")
    example = shape.parse(record, where)
    own = (*shape.required_keys, *shape.honours)
    for key, value in record.items():
        if key in shape.beside and key not in own and not is_empty(value):
            _refuse_lost(record, key, shape, where)
    return example, Seen(f"{shape.name} ({', '.join(_read_keys(record, shape))})", _ignored(record, shape))


def refuse(holder: Mapping[str, Any], reasons: Mapping[str, str], where: object, path: str = "") -> None:
    """Raise the UserError about the first key of a record or turn that is among `reasons` and says something."""
    for key, value in holder.items():
        if key in reasons and not is_empty(value):
            raise UserError(f"{where}: {path}{key}: {reasons[key]}")


def bears_loss(holder: Mapping[str, Any], path: str, where: object) -> bool:
    """Whether a turn, or a record, is to be learnt, as its `FLAGS` say; so it is where there are none.

    Raises:
        UserError: a flag is neither 1 nor 0.
    """
    result = True
    for key in FLAGS:
        if key not in holder or is_empty(value := holder[key]):
            continue
        if isinstance(value, str) or value not in (0, 1):
            raise UserError(
                f"{where}: {path}{key} is {value!r:.40}: a turn or record is learnt or not, there are no shares yet: "
                "give 1 or 0, or true or false"
            )
        result = result and bool(value) == (key in _WANTED)
    return result


def _refuse_lost(record: Record, key: str, shape: Shape, where: object) -> None:
    own = [text for name in (*shape.required_keys, *shape.honours) for text in _texts(record.get(name))]
    given = _texts(record[key])
    if all(text in own for text in given):
        return
    if shape.holds_all and all(any(text in whole for whole in own) for text in given):
        return
    if key in RENDERED and all(text in "\n".join(given) for text in own):
        return
    raise UserError(
        f"{where}: {key} would be lost: a record with {'/'.join(shape.required_keys)} is read by "
        f"{', '.join((*shape.required_keys, *shape.honours))} alone: put it into one of them, or leave it out"
    )


def _texts(value: Any) -> list[str]:
    """All texts in a value, however deep, without blanks around them."""
    if isinstance(value, list | tuple):
        return [text for part in value for text in _texts(part)]
    if isinstance(value, dict):
        return _texts(list(value.values()))
    return [] if is_empty(value) else [str(value).strip()]


def _turns(record: Record, shape: Shape) -> list[dict[str, Any]]:
    return record[shape.required_keys[0]] if shape.turns else []


def _read_keys(record: Record, shape: Shape) -> list[str]:
    turns = _turns(record, shape)
    marked = {key for turn in turns for key in turn if key in FLAGS and turn[key] is not None}
    flags = [f"{shape.required_keys[0]}[].{key}" for key in FLAGS if key in marked]
    return [*shape.required_keys, *(key for key in shape.honours if record.get(key) is not None), *flags]


def _ignored(record: Record, shape: Shape) -> tuple[str, ...]:
    known, at = {*shape.required_keys, *shape.honours, *FLAGS}, f"{shape.required_keys[0]}[]."
    found = {key for key, value in record.items() if key not in known and not is_empty(value)}
    role, text = shape.turns or ("", "")
    for turn in _turns(record, shape):
        found.update(at + key for key in turn if key not in (role, text, *FLAGS) and not is_empty(turn[key]))
        for part in turn[text] if isinstance(turn[text], list) else []:
            left = [key for key in part if key not in ("type", "text")] if isinstance(part, dict) else []
            found.update(f"{at}{text}[].{key}" for key in left if not is_empty(part[key]))
    return tuple(sorted(found))
