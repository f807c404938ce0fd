"""From the body of an HTTP request to a model of pydantic, and what is refused."""

import json
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from ftray.errors import first_error, near
from ftray.serving.errors import APIError, invalid

JSON = "application/json"
UNSAID = ("", "application/x-www-form-urlencoded")  # the second is what `curl -d` says unless it is told otherwise

Body = TypeVar("Body", bound=BaseModel)


async def body_of(kind: type[Body], http: Request) -> Body:
    """The request in the body of `http`.

    Raises:
        APIError: as :func:`json_body` and :func:`parse`.
    """
    return parse(kind, await json_body(http))


async def json_body(http: Request) -> bytes:
    """The body of `http`, which may be JSON.

    Raises:
        APIError: 415: it is said to be something else.
    """
    said = http.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if said not in (JSON, *UNSAID):
        raise APIError(415, f"Content-Type {said[:80]!r}: the body must be {JSON}", code="not_json")
    return await http.body()


def parse(kind: type[Body], body: bytes) -> Body:
    """The request in `body`, which is JSON.

    Raises:
        APIError: with status 400 and the field at fault.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise APIError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise APIError(400, f"the body must be a JSON object, not {type(values).__name__}", code="invalid_json")
    _refuse_half_characters(values)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = first_error(error)
        path = ".".join(first.path)
        if first.unknown:
            meant = near(path, kind.model_fields, "") if len(first.path) == 1 else ""
            raise APIError(400, f"unsupported field {path!r}{meant}", path, "unsupported_field") from None
        field = first.path[0] if path else None
        raise invalid(f"{path}: {first.reason}" if path else first.reason, field) from None


def _refuse_half_characters(values: dict[str, Any]) -> None:
    r"""Refuse text such as "\ud83d": JSON lets half a surrogate pair through, and no tokenizer takes it."""
    for name, value in values.items():
        for part, field in ((name, None), (value, name)):
            try:
                json.dumps(part, ensure_ascii=False).encode()
            except (UnicodeEncodeError, RecursionError) as error:
                what = "half a surrogate pair" if isinstance(error, UnicodeEncodeError) else "too deep a nesting"
                raise invalid(f"{field or 'a field name'}: holds {what}", field) from None
