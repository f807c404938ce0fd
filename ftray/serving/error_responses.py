"""What goes wrong with a request, as an HTTP response in OpenAI's shape: for the endpoint and for the live page."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from ftray.serving.errors import APIError


def response(error: APIError) -> JSONResponse:
    """An error as a response."""
    return JSONResponse(error.body, error.status, error.headers)


async def _api_error(request: Request, error: APIError) -> JSONResponse:
    return response(error)


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return response(APIError(error.status_code, message, headers=dict(error.headers or {})))


async def _no_such_path(request: Request, error: RequestValidationError) -> JSONResponse:
    """A part of the path is not what the route takes; bodies are read by :mod:`ftray.serving.request_body`."""
    return response(APIError(404, f"{request.method} {request.url.path}: Not Found"))


async def _internal_error(request: Request, error: Exception) -> JSONResponse:
    """Starlette raises the error again, for the log."""
    return response(APIError(500, f"{request.url.path}: {type(error).__name__}", code="internal_error"))


HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    APIError: _api_error,
    HTTPException: _http_error,
    RequestValidationError: _no_such_path,
    Exception: _internal_error,
}
