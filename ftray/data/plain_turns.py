"""The plainest conversations, turns of a role and a text, read without the checks that only other keys need.

Nearly all records of a large file are such, and walking through all that a record may hold takes ten times as long.
"""

from functools import lru_cache
from typing import Any

from ftray.data.meanings import ROLES
from ftray.data.reading import Seen, read
from ftray.data.records import SHAPES, Example
from ftray.data.turns import CALLS, Turn

LISTS = ("messages", "conversations")
_TURN_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {name: role for name, role in ROLES.items() if name not in CALLS}  # the text of the others is no text


def read_plain_turns(record: dict[str, Any], where: object) -> tuple[Example, Seen] | None:
    """What :func:`ftray.data.reading.read` gives of a record; None: it holds something else, or something is wrong."""
    key = next(iter(record), "")
    if len(record) != 1 or key not in LISTS or type(record[key]) is not list:
        return None
    turns = []
    answered = False
    for turn in record[key]:
        if type(turn) is not dict or (*turn,) not in _TURN_KEYS:
            return None
        said, text = turn.values()
        if type(said) is not str or type(text) is not str or said not in _ROLES:
            return None
        role = _ROLES[said]
        answered = answered or role == "assistant"
        turns.append(Turn(role, text))
    return (Example(messages=tuple(turns), where=where), _seen(key)) if answered else None


@lru_cache
def _seen(key: str) -> Seen:
    answer = dict(zip(_TURN_KEYS[0], ("assistant", "!"), strict=True))
    seen: Seen = read({key: [answer]}, SHAPES, "")[1]
    return seen
