"""Routes for people and monitors: health, how models are asked, metrics, and the run that the page shows."""

import asyncio
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from ftray.reports.live import LiveRun
from ftray.serving.api.endpoint import CurrentEndpoint
from ftray.serving.catalog import how_to_ask, leaderboard

router = APIRouter()


@router.get("/health")
async def health(endpoint: CurrentEndpoint) -> dict[str, str]:
    """Whether requests are answered: the endpoint itself is up before the model is loaded."""
    await endpoint.router.require_replica()
    return {"status": "ok"}


async def shown_run(endpoint: CurrentEndpoint) -> LiveRun | None:
    """What the page shows beside the models; who may ask these may look at it, and not lead it."""
    return endpoint.shown_run


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
