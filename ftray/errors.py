"""What ends a command: a mistake that the user can mend, a signal."""

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

# pydantic's kinds of errors -> what is said of the value; in braces what pydantic knows of the limit
REASONS = {
    "missing": "is missing",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be a text",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping of names to values",
    "model_type": "must be a mapping of names to values",
    "model_attributes_type": "must be a mapping of names to values",
    "none_required": "must be null",
    "literal_error": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must be a list of at least {min_length}, not of {actual_length}",
    "too_long": "must be a list of at most {max_length}, not of {actual_length}",
    "string_too_short": "must have a length of at least {min_length}",
    "string_too_long": "must have a length of at most {max_length}",
    "string_pattern_mismatch": "must match {pattern}",
}
TYPE_NAMES = ("str", "int", "float", "bool", "dict", "list", "tuple")  # in a path, of a choice of types
SHOWN = 80  # characters of a wrong value


TERMINATED = 143  # exit code after SIGTERM, where something was cut off


class Terminated(BaseException):
    """SIGTERM has come: the process ends, and what it has under way can continue later."""


class RunFailed(RuntimeError):
    """A run gives no result, however often it is restarted; the message is the reason."""


class UserError(Exception):
    """A mistake the user can mend: printed as one line, exit code 2, never with a traceback."""

    def __str__(self) -> str:
        """The message, in which line breaks, halves of characters and what else can't be printed are escaped."""
        text = super().__str__()
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def near(
    name: str,
    known: Iterable[str],
    otherwise: str | None = None,
    most: int = 2,
    likeness: float = 0.5,
    shown: Callable[[str], object] = str,
) -> str:
    """The end of an error message about an unknown name: what was probably meant, or all that is known.

    Args:
        otherwise: what to say if nothing is near; empty: nothing; None: all that is known.
        most: so many that are near are named.
        likeness: from 0 to 1, which makes a name near.
        shown: how one that is near is written.
    """
    known = list(known)
    if matches := difflib.get_close_matches(name, known, most, likeness):
        return f"; did you mean {' or '.join(str(shown(match)) for match in matches)}?"
    if otherwise is None:
        otherwise = f"known: {', '.join(known)}"
    return f"; {otherwise}" if otherwise else ""


@dataclass(frozen=True)
class FieldError:
    """The first thing that pydantic finds wrong, in plain words.

    Attributes:
        path: names of sections and of the field, indices of lists; empty: the whole.
        unknown: whether there is no such field at all.
        reason: what is wrong with its value, with the value and what was probably meant.
    """

    path: tuple[str, ...]
    unknown: bool
    reason: str


def first_error(error: "ValidationError") -> FieldError:
    """What a user is told of a failed validation."""
    found = error.errors()
    first = found[0]
    path = _path(first)
    # of a choice of types, pydantic says of each why the value is none of it
    same = [one for one in found if one["input"] is first["input"] and _path(one) == path]
    of_its_type = [one for one in same if not one["type"].endswith("_type")] or same
    reasons = list(dict.fromkeys(map(_reason, of_its_type)))
    reason = ", or ".join([reasons[0], *(other.removeprefix("must be ") for other in reasons[1:])])
    known = [name for one in same for name in _choices(one)]
    return FieldError(path, first["type"] == "extra_forbidden", reason + _got(first, known))


def _path(error: "ErrorDetails") -> tuple[str, ...]:
    """Without the types that pydantic names where there is a choice of them."""
    inner = [str(part) for part in error["loc"][1:]]
    own = [p for p in inner if p not in TYPE_NAMES and "[" not in p and not p.startswith("constrained-")]
    return (*map(str, error["loc"][:1]), *own)


def _reason(error: "ErrorDetails") -> str:
    limits: dict[str, Any] = error.get("ctx", {})
    if error["type"] == "value_error":  # by a validator of ours
        return str(limits["error"])
    if error["type"] == "string_pattern_mismatch" and (known := _choices(error)):
        return f"must be {', '.join(known[:-1])} or {known[-1]}"
    if error["type"] not in REASONS:
        return error["msg"]
    limits = {name: int(v) if isinstance(v, float) and v.is_integer() else v for name, v in limits.items()}
    return REASONS[error["type"]].format(**limits)


def _choices(error: "ErrorDetails") -> list[str]:
    """The texts that a value may be; none where others may be too."""
    limits: dict[str, Any] = error.get("ctx", {})
    pattern = re.fullmatch(r"\^\(([^()]*)\)\$", limits.get("pattern", ""))  # ^(one|other)$
    return pattern[1].split("|") if pattern else re.findall("'(.*?)'", limits.get("expected", ""))


def _got(error: "ErrorDetails", known: list[str]) -> str:
    value = error["input"]
    if error["type"] == "missing" or not isinstance(value, str | int | float | list | None):
        return ""
    shown = repr(value)
    if isinstance(value, list) and ("{" in shown or len(shown) > SHOWN):
        return ""
    hint = near(value, known, "") if isinstance(value, str) else ""
    return f" (got {shown if len(shown) <= SHOWN else shown[:SHOWN] + '...'}){hint}"
