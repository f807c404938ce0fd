"""Values of a PEFT configuration, held against the types that PEFT declares: it checks few of them by itself."""

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

NUMBERS = (int, float)
LISTS = (list, set, tuple)


def wrong_field(kind: type, given: Mapping[str, Any]) -> str | None:
    """The first field whose value PEFT can't take, and why; None: all are of their types, or not given.

    A wrong one would be found where it is used: in a layer, or not before an answer is generated.

    Args:
        kind: a class of PEFT's configurations.
        given: what JSON or YAML holds of one; fields that the class has not are left to PEFT.
    """
    fields, hints = {field.name: field for field in dataclasses.fields(kind)}, get_type_hints(kind)
    for name, value in given.items():
        if name in fields and value is not None and not _fits(value, hints[name]):
            return f"{name}: {_short(value)} is no {_named(hints[name])}"
    return None


def _fits(value: object, hint: object) -> bool:
    """Whether a value of JSON can be what `hint` says; of PEFT's enumerations, only whether it is text."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:  # later releases know more words, and some stand for a pattern
        return any(type(value) is type(one) for one in inner)
    if hint in NUMBERS:  # a rank of 8.0 is one
        return type(value) is int or (isinstance(value, float) and math.isfinite(value))
    base = origin or hint
    if base in LISTS:
        kinds = [one for one in inner if one is not ...] or [Any]
        return isinstance(value, LISTS) and all(any(_fits(item, kind) for kind in kinds) for item in value)
    if base is dict:
        return isinstance(value, dict) and (not inner or all(_fits(item, inner[1]) for item in value.values()))
    if base is bool or base is str or base is type(None):
        return type(value) is base
    if isinstance(base, type) and dataclasses.is_dataclass(base):
        return isinstance(value, dict) and wrong_field(base, value) is None
    return hint is Any or isinstance(value, str)


def _named(hint: object) -> str:
    """A type as a user reads it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_named(one) for one in inner if one is not type(None)))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    base = origin or hint
    if base in LISTS:
        return "list" + (f" of {' or '.join(_named(one) for one in inner if one is not ...)}" if inner else "")
    if isinstance(base, type) and dataclasses.is_dataclass(base):
        return f"table that is a {base.__name__}"
    named: dict[object, str] = {int: "number", float: "number", str: "text", bool: "true or false", dict: "table"}
    return named.get(base) or str(getattr(base, "__name__", "value"))


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
