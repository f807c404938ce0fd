"""The HTTP application: routes, the key that all of them need, the limit of bodies, and errors in OpenAI's shape."""

import hashlib
import hmac
from collections.abc import Callable, Collection
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from ray.exceptions import RayActorError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ftray.serving.api import generation, models, pages, pooling
from ftray.serving.errors import APIError, replica_died

OPEN_ROUTES = (pages.page, pages.health)  # the page asks its user for the key, and shows nothing without it


def create_app(key: str | None, max_body_bytes: int) -> FastAPI:
    """The application, which answers where :func:`ftray.serving.api.endpoint.current_endpoint` gives an endpoint.

    Args:
        key: SHA-256 of the API key, hexadecimal; None: no key is needed.
        max_body_bytes: larger bodies are refused.
    """
    app = FastAPI(
        title="ftray",
        openapi_url=None,
        dependencies=[Depends(RequireKey(key, OPEN_ROUTES))],
        exception_handlers={
            APIError: _api_error,
            HTTPException: _http_error,
            RayActorError: _replica_died,
            Exception: _internal_error,
        },
    )
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    for routes in (pages, models, generation, pooling):
        app.include_router(routes.router)
    return app


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


def _response(error: APIError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


async def _api_error(request: Request, error: APIError) -> JSONResponse:
    return _response(error)


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _response(APIError(error.status_code, message, headers=dict(error.headers or {})))


async def _replica_died(request: Request, error: RayActorError) -> JSONResponse:
    return _response(replica_died())


async def _internal_error(request: Request, error: Exception) -> JSONResponse:
    """Starlette raises the error again, for the log."""
    return _response(APIError(500, f"{request.url.path}: {type(error).__name__}", code="internal_error"))
