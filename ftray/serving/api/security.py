"""What every request passes: the API key, which is one dependency of the application, and the limit of bodies."""

import hashlib
import hmac
from collections.abc import Callable, Collection
from typing import Any

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ftray.serving.errors import APIError


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
        given = hashlib.sha256(key.strip().encode()).hexdigest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, self.digest):
            headers = {"WWW-Authenticate": "Bearer"}
            raise APIError(
                401, "a valid API key is needed: Authorization: Bearer KEY", None, "invalid_api_key", headers
            )


class BodyLimit:
    """Middleware that refuses a body once more than `max_bytes` of it have arrived, without trusting its headers."""

    def __init__(self, app: ASGIApp, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise APIError(413, f"the body has more than {self.max_bytes} bytes", code="too_large")
            return message

        await self.app(scope, limited, send)
