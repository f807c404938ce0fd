"""The routes of the endpoint's application."""

from collections.abc import Iterator

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute

from ftray.serving.api.app import create_app


def routes_of(router: FastAPI | APIRouter) -> Iterator[tuple[str, str]]:
    """Method and path of every route, whatever it is; FastAPI keeps included routers as nodes of their own."""
    for route in router.routes:
        if included := getattr(route, "original_router", None):
            yield from routes_of(included)
        else:
            assert isinstance(route, APIRoute), f"{route}: dependencies of the application don't reach it"
            yield from ((method, route.path) for method in route.methods)


ROUTES = sorted(routes_of(create_app(None, 1000)))
