"""Reading a record: its shape is recognised, what would be lost is refused, and what is ignored is named."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftray.data import meanings
from ftray.data.refusals import bears_loss, refuse_beside, refuse_beside_text, refuse_keys
from ftray.data.shapes import ADDED, GROUP, LEFT_OUT, Record, Shape, is_empty, listed, recognise
from ftray.errors import UserError


@dataclass(frozen=True)
class Seen:
    """What was recognised in a record: its shape with the keys that were read, and those that were ignored."""

    shape: str
    ignored: tuple[str, ...]


def read(record: Record, shapes: Sequence[Shape], where: object) -> tuple[Any, Seen]:
    """What a record says, and what was recognised in it.

    Args:
        shapes: of the task, in the order they are tried.
        where: the record stands, for messages.

    Raises:
        UserError: it lacks something, or has what would change its meaning and isn't read; says where.
    """
    shape = recognise(record, shapes)
    refuse_keys(record, shape, where)
    if not bears_loss(record, "", where):
        raise UserError(f"{where}: marked as one that isn't learnt: leave the record out")
    if shape.is_alone and shape.required_keys[0] in record:
        refuse_beside(record, shape, shapes, where)
        refuse_beside_text(record, shape, where)
    example = shape.parse(record, where)
    refuse_beside(record, shape, shapes, where)
    return example, Seen(f"{shape.name} ({', '.join(_read_keys(record, shape))})", _ignored(record, shape))


def _turns(record: Record, shape: Shape) -> list[tuple[str, dict[str, Any]]]:
    """Each turn with the name of the list that it stands in."""
    return [
        (f"{key}[]", turn)
        for key in shape.turns
        for turn in _objects(listed(record.get(key)))
        if isinstance(turn, dict)
    ]


def _objects(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _read_keys(record: Record, shape: Shape) -> list[str]:
    turns = [(f"{at}.{key}", key) for at, turn in _turns(record, shape) for key in turn if turn[key] is not None]
    flags = dict.fromkeys(path for path, key in turns if meanings.marks_learnt(key) is not None)
    return [*shape.required_keys, *(key for key in shape.honours if record.get(key) is not None), *flags]


def _ignored(record: Record, shape: Shape) -> tuple[str, ...]:
    known = {*shape.required_keys, *shape.honours, *ADDED}
    known |= {key for key in record if meanings.marks_learnt(key) is not None}
    found = {key for key, value in record.items() if key not in known and not is_empty(value)}
    found.update(record.get(LEFT_OUT, ()))
    for at, turn in _turns(record, shape):
        unread = [key for key in turn if key not in shape.in_turn and meanings.marks_learnt(key) is None]
        found.update(f"{at}.{key}" for key in unread if not is_empty(turn[key]))
        for key, parts in turn.items():
            for part in parts if key in shape.in_turn and key != "tool_calls" and isinstance(parts, list) else []:
                left = [name for name in part if name not in shape.in_part] if isinstance(part, dict) else []
                found.update(f"{at}.{key}[].{name}" for name in left if not is_empty(part[name]))
    return tuple(sorted(found.difference(record.get(GROUP, ())[:1])))
