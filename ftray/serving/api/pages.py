"""Routes for people and monitors: the page, health, the search's leaderboard, metrics."""

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from ftray.serving.api.endpoint import CurrentEndpoint
from ftray.serving.catalog import how_to_ask, leaderboard

PAGE = Path(__file__).parents[1] / "page.html"
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
router = APIRouter()


@router.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/")
async def page() -> Response:
    return FileResponse(PAGE, headers={"Content-Security-Policy": PAGE_POLICY})


@router.get("/v1/run")
async def run(endpoint: CurrentEndpoint) -> dict[str, Any]:
    """What the models are for; the search: its metric, its trials, best first; and how prompts were rendered."""
    entries = list(endpoint.registry.entries.values())

    def read() -> dict[str, Any]:
        templates = dict(pair for entry in entries for pair in how_to_ask(entry).items())
        return {**leaderboard(endpoint.cfg.run), "templates": templates}

    return {"task": endpoint.task, **await asyncio.to_thread(read)}


@router.get("/metrics")
async def metrics(endpoint: CurrentEndpoint) -> Response:
    usage = endpoint.router.usage
    usage.under_way.set(endpoint.router.under_way)
    return Response(generate_latest(usage.registry), media_type=CONTENT_TYPE_LATEST)
