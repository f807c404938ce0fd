"""The HTTP application: routes, the key that all of them need, the limit of bodies, and errors in OpenAI's shape."""

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from ray.exceptions import RayActorError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ftray.serving.api import generation, models, pages, pooling
from ftray.serving.error_responses import HANDLERS, response
from ftray.serving.errors import APIError, replica_died
from ftray.serving.key import RequireKey
from ftray.serving.live_routes import PAGE_ROUTES, live_routes
from ftray.serving.live_routes import pages as page_routes

OPEN_ROUTES = (*PAGE_ROUTES, pages.health)  # the page asks its user for the key, and shows nothing without it


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
        exception_handlers={**HANDLERS, RayActorError: _replica_died},
    )
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    for router in (page_routes, pages.router, models.router, generation.router, pooling.router):
        app.include_router(router)
    app.include_router(live_routes(pages.shown_run, steers=False))
    return app


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


async def _replica_died(request: Request, error: RayActorError) -> JSONResponse:
    return response(replica_died())
