"""The HTTP application: routes, the key that all of them need, the limit of bodies, and errors in OpenAI's shape."""

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from ray.exceptions import RayActorError
from starlette.exceptions import HTTPException

from ftray.serving.api import generation, models, pages, pooling
from ftray.serving.api.security import BodyLimit, RequireKey
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
