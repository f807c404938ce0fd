"""Records in JSON: a line, a list that is read piece by piece, or a whole file."""

import io
import json
import re
from collections.abc import Iterator
from typing import Any

from ftray.errors import UserError

HOLDERS = ("data", "records", "examples", "rows")  # keys of a JSON file under which its records may stand
CHARACTERS = 2**20  # of a file that are read at once
_BLANKS = re.compile(r"[ \t\r\n]*")


def undecodable(where: object, error: UnicodeError, encoding: str = "") -> UserError:
    """The error about text that is not in its encoding; some codecs raise a UnicodeError that does not name theirs."""
    encoding = (encoding or getattr(error, "encoding", "utf-8")).removesuffix("-sig")
    return UserError(f"{where}: not {encoding}: name the file's encoding by data.encoding, as cp1252 or utf-16")


def parse_json(line: str | bytes, place: object) -> dict[str, Any]:
    """The record in a line of JSON; `str(place)` is its location, for messages.

    Raises:
        UserError: not valid JSON, no object, a key that stands twice, or text that is no Unicode.
    """
    try:
        text = (line if isinstance(line, str) else line.decode()).removeprefix("\ufeff")
        record = json.loads(text, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise undecodable(f"{place}: not valid JSON", error) from None
    except _KeyTwiceError as error:
        raise UserError(f"{place}: key {error} stands twice: leave one of them out") from None
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        raise UserError(f"{place}: not valid JSON: {getattr(error, 'msg', error)}") from None
    return checked(record, place, "\\u" in text)


class _KeyTwiceError(Exception):
    """A key stands twice in an object; the message is the key."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which Python would keep the last value of a key."""
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _KeyTwiceError(ascii(next(key for key in keys if keys.count(key) > 1)))
    return result


_OBJECT = json.JSONDecoder(object_pairs_hook=_unique)


def checked(record: Any, place: object, escapes: bool) -> dict[str, Any]:
    """A record that was parsed from JSON.

    Args:
        place: `str` of it is the record's location, for messages.
        escapes: whether the JSON has any `\\u....`: only then can its text hold what is no character.

    Raises:
        UserError: it is no object, or holds half a surrogate pair.
    """
    if not isinstance(record, dict):
        raise UserError(f"{place}: a record must be a JSON object, not {type(record).__name__}")
    for key, value in record.items() if escapes else ():
        try:
            json.dumps([key, value], ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise UserError(
                f"{place}: {ascii(key)[1:-1]} holds {half}, half of a surrogate pair, which is no character: "
                "mend what cut the text there"
            ) from None
    return record


class NoListError(Exception):
    """A file holds something else than a list of objects."""


def objects_of_list(file: io.TextIOBase) -> Iterator[tuple[Any, bool]]:
    """The objects of a list that is all there is in a file, and whether each has escapes in its text.

    Raises:
        NoListError: something else stands there.
    """
    text, at = "", 0
    wanted: tuple[str, ...] = ("[",)
    while True:
        at = _BLANKS.match(text, at).end()  # type: ignore[union-attr]
        if at == len(text):
            text, at = file.read(CHARACTERS), 0
            if text:
                continue
            if wanted:
                raise NoListError
            return
        sign = text[at]
        if sign not in wanted:
            raise NoListError
        if sign != "{":
            wanted = {"[": ("{", "]"), ",": ("{",), "]": ()}[sign]
            at += 1
            continue
        try:
            record, end = _OBJECT.raw_decode(text, at)
        except (ValueError, RecursionError, _KeyTwiceError):  # ValueError: not whole, or a number of many digits
            more = file.read(max(CHARACTERS, len(text)))  # it may go on there
            if not more:
                raise NoListError from None
            text, at = text[at:] + more, 0
            continue
        yield record, text.find("\\u", at, end) >= 0
        at, wanted = end, (",", "]")


def more_follows(file: io.TextIOBase) -> bool:
    """Whether more follows the object that a file begins with, as in JSON lines."""
    text = file.read(CHARACTERS)
    while text and not text.strip():
        text = file.read(CHARACTERS)
    while text.lstrip().startswith("{"):
        try:
            _, end = _OBJECT.raw_decode(text, len(text) - len(text.lstrip()))
        except json.JSONDecodeError:
            if not (more := file.read(len(text))):
                return False
            text += more
            continue
        except (ValueError, RecursionError, _KeyTwiceError):
            return False
        rest = text[end:]
        while not rest.strip() and (more := file.read(CHARACTERS)):
            rest = more
        return bool(rest.strip())
    return False


def records_of_json(content: str, path: str) -> list[Any]:
    """The records of a whole file: a list, a list within an object, a table as pandas writes it, or one record.

    Args:
        path: of the file, for messages.

    Raises:
        UserError: not valid JSON, or something else.
    """
    try:
        value = json.loads(content, object_pairs_hook=_unique)
    except _KeyTwiceError as error:
        raise UserError(f"{path}: key {error} stands twice in one object: leave one of them out") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if isinstance(value, dict):
        value = _held(value) or _of_table(value) or [value]
    if not isinstance(value, list):
        raise UserError(f"{path}: must hold a list of records, not {type(value).__name__}")
    return value


def _held(value: dict[str, Any]) -> Any:
    """The list of records in a JSON object that has nothing else, but for such as a version; None: it is a record."""
    key = next((key for key in HOLDERS if isinstance(value.get(key), list)), None)
    if key is None or any(isinstance(other, list | dict) for name, other in value.items() if name != key):
        return None
    return value[key]


def _of_table(value: dict[str, Any]) -> list[Any] | None:
    """The rows of a table as pandas' `to_json` writes it, by columns, rows or parts; None: it is something else."""
    if {"columns", "data"} <= value.keys() <= {"columns", "index", "data"}:
        names, rows = value["columns"], value["data"]
        whole = isinstance(rows, list) and all(isinstance(row, list) and len(row) == len(names) for row in rows)
        return [dict(zip(names, row, strict=True)) for row in rows] if whole else None
    if {"schema", "data"} == value.keys() and isinstance(value["data"], list):
        keys = {*(value["schema"].get("primaryKey") or ())} if isinstance(value["schema"], dict) else set[str]()
        return [
            {k: v for k, v in row.items() if k not in keys} if isinstance(row, dict) else row for row in value["data"]
        ]
    inner = [*value.values()]
    if not inner or not all(isinstance(part, dict) for part in inner):
        return None
    if inner[0] and all(part.keys() == inner[0].keys() for part in inner) and all(map(str.isdecimal, inner[0])):
        return [{name: column[row] for name, column in value.items()} for row in inner[0]]
    return inner if all(map(str.isdecimal, value)) else None
