"""The bearer token that an HTTP server of ftray asks for."""

import hashlib
import hmac
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from fastapi import Request

from ftray.errors import UserError
from ftray.serving.errors import APIError

LOOPBACK = ("127.0.0.1", "localhost", "::1")  # where no other machine can connect


def find_key(file: str | None, field: str) -> str:
    """The key that `file`, else the environment gives; empty: neither does.

    Args:
        field: of the configuration that names the file, for messages.

    Raises:
        UserError: the file can't be read or is empty.
    """
    if not file:
        return os.environ.get("FTRAY_API_KEY", "")
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{field} {file}: {reason}") from None
    if not key:
        raise UserError(f"{field} {file}: is empty")
    return key


def digest_of(key: str) -> str:
    """SHA-256 of a key, hexadecimal, so that the key itself is not passed on."""
    return hashlib.sha256(key.encode()).hexdigest()


class RequireKey:
    """A dependency that lets a request pass if it bears the API key.

    Args:
        digest: SHA-256 of the key, hexadecimal; None: every request passes.
        open_routes: the functions of routes that need no key.
    """

    def __init__(self, digest: str | None, open_routes: Collection[Callable[..., Any]]):
        self.digest, self.open_routes = digest, open_routes

    async def __call__(self, request: Request) -> None:
        """Check a request.

        Raises:
            APIError: 401.
        """
        if self.digest is None or request.scope["endpoint"] in self.open_routes:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(digest_of(key.strip()), self.digest):
            headers = {"WWW-Authenticate": "Bearer"}
            raise APIError(
                401, "a valid API key is needed: Authorization: Bearer KEY", None, "invalid_api_key", headers
            )
