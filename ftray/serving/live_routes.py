"""The page, and what it reads of a run: the same routes for an endpoint and for `ftray ui`."""

import asyncio
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.responses import Response

import ftray.reports
from ftray.errors import UserError
from ftray.reports.live import LiveRun
from ftray.serving.errors import APIError

TEMPLATES = Path(ftray.reports.__file__).parent / "template"
STYLES = ("palette.css", "figures.css", "report.css", "live.css")
SCRIPTS = ("differences.js", "report.js", "compare.js", "board.js", "live.js")  # "use strict" comes first
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self' 'unsafe-inline'; script-src 'self'; "
    "connect-src 'self'; img-src data:; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
pages = APIRouter()


@cache
def _joined(*names: str) -> str:
    return "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names)


@pages.get("/")
async def page() -> Response:
    return Response(_joined("live.html"), media_type="text/html", headers=HEADERS)


@pages.get("/page.css")
async def style() -> Response:
    return Response(_joined(*STYLES), media_type="text/css", headers=HEADERS)


@pages.get("/page.js")
async def script() -> Response:
    return Response(_joined(*SCRIPTS), media_type="text/javascript", headers=HEADERS)


PAGE_ROUTES = (page, style, script)  # they show nothing of a run


def live_routes(shown_run: Callable[..., object], steers: bool) -> APIRouter:
    """Routes that tell of the run that `shown_run`, a dependency, gives; None: there is none to show.

    Args:
        steers: whether the page has buttons that lead a search.
    """
    router = APIRouter(prefix="/v1/live")
    shown = Annotated[LiveRun | None, Depends(shown_run)]

    @router.get("")
    async def state(run: shown) -> dict[str, Any]:
        found = await _told(run.state) if run else {"kind": None}
        return {**found, "steers": steers}

    @router.get("/report")
    async def report(run: shown) -> dict[str, Any]:
        return await _told(run.report) if run else {"headline": "", "sections": {}}

    @router.get("/trials/{number}")
    async def trial(number: int, run: shown) -> dict[str, Any]:
        return await _told(run.trial, number) if run else {"trial": number, "html": ""}

    return router


async def _told(function: Callable[..., dict[str, Any]], *args: object) -> dict[str, Any]:
    """What a function that reads files returns.

    Raises:
        APIError: 503: they can't be read now.
    """
    try:
        return await asyncio.to_thread(function, *args)
    except (UserError, OSError) as error:
        raise APIError(503, str(error), code="unreadable") from None
