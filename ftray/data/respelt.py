"""Records whose keys are known ones in another spelling, as `Prompt`, `chosenResponse` or `KTO-Tag`."""

import re
from collections.abc import Collection, Sequence
from functools import lru_cache

from ftray.data.reading import read
from ftray.data.shapes import Record, Shape, fitting


def respelt(shapes: Sequence[Shape], further: Sequence[str] = ()) -> Shape:
    """The shape of records that have one of `shapes` once their keys are spelt as there; others stay as they are.

    Args:
        further: keys that those shapes read without naming them.
    """
    known = {key for one in shapes for key in (*one.required_keys, *one.honours, *one.beside, *one.refuses)}
    known.update(further)

    def fits(record: Record) -> tuple[str, ...]:
        names = _names(record, known)
        shape = fitting(_renamed(record, names), shapes) if names else None
        if shape is None:
            return ()
        spelt = {name: key for key, name in names.items()}
        read_keys = (*shape.required_keys, *(key for key in shape.honours if spelt.get(key, key) in record))
        return tuple(spelt.get(key, key) for key in read_keys)

    def parse(record: Record, where: object) -> object:
        return read(_renamed(record, _names(record, known)), shapes, where)[0]

    return Shape("other spelling", (), parse, refuses={}, fits=fits, compares=True)


def _names(record: Record, known: Collection[str]) -> dict[str, str]:
    """Keys of a record that are known ones in another spelling, by which no other key is meant -> those."""
    spelt = [(key, _plain(key)) for key in record if key not in known]
    names = [name for _, name in spelt]
    return {key: name for key, name in spelt if name in known and name not in record and names.count(name) == 1}


@lru_cache(maxsize=4096)
def _plain(key: object) -> str:
    return re.sub(r"\W+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(key))).lower()


def _renamed(record: Record, names: dict[str, str]) -> Record:
    return {names.get(key, key): value for key, value in record.items()}
