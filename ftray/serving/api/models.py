"""Routes that list models, and add and remove adapters."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from fastapi import APIRouter, Request
from ray.serve.exceptions import RayServeException

from ftray.errors import UserError
from ftray.serving.api.endpoint import CurrentEndpoint, Endpoint
from ftray.serving.api.requests import AddAdapterRequest
from ftray.serving.errors import APIError, invalid
from ftray.serving.registry import adapter_in, allowed, check_name, roots
from ftray.serving.request_body import body_of

DROP_SECONDS = 30
router = APIRouter()


@router.get("/v1/models")
async def list_models(endpoint: CurrentEndpoint) -> dict[str, Any]:
    names = (endpoint.base, *endpoint.registry.entries)
    return {"object": "list", "data": [describe(endpoint, name) for name in names]}


@router.get("/v1/models/{name}")
async def get_model(name: str, endpoint: CurrentEndpoint) -> dict[str, Any]:
    return describe(endpoint, name)


@router.post("/v1/adapters")
async def add_adapter(http: Request, endpoint: CurrentEndpoint) -> dict[str, Any]:
    body = await body_of(AddAdapterRequest, http)
    source = await asyncio.to_thread(check_addition, endpoint, body)
    entry = endpoint.registry.new(body.name, source)
    handle = endpoint.replicas.options(multiplexed_model_id=entry.id)
    if reason := await handle.load.remote(entry.id, entry.source):
        raise APIError(400, reason, "source", "bad_adapter")
    with remembering():
        endpoint.registry.add(body.name, entry)
    return describe(endpoint, body.name)


@router.delete("/v1/adapters/{name}")
async def remove_adapter(name: str, endpoint: CurrentEndpoint) -> dict[str, Any]:
    if name not in endpoint.registry.entries:
        raise APIError(404, f"there is no adapter {name[:80]!r}", code="not_found")
    with remembering():
        entry = endpoint.registry.remove(name)
    with suppress(RayServeException, TimeoutError):  # without a replica there is nothing to free
        dropped = endpoint.replicas.broadcast("drop", entry.id)
        await dropped.results_async(timeout_s=DROP_SECONDS, return_exceptions=True)
    return {"id": name, "object": "model", "deleted": True}


def describe(endpoint: Endpoint, name: str) -> dict[str, Any]:
    """A model in OpenAI's shape.

    Raises:
        APIError: 404: there is no such model.
    """
    entry = endpoint.adapter(name)
    created = entry.created if entry else endpoint.registry.started
    parent = endpoint.base if entry else None
    return {"id": name, "object": "model", "created": created, "owned_by": "ftray", "parent": parent}


def check_addition(endpoint: Endpoint, body: AddAdapterRequest) -> str:
    """The absolute directory, or the URI, of an adapter that may be added.

    Raises:
        APIError: its name can't be had, or adapters may not come from there.
    """
    try:
        check_name(body.name)
    except UserError as error:
        raise invalid(str(error), "name") from None
    if body.name == endpoint.base or body.name in endpoint.registry.entries:
        raise APIError(409, f"there is a model {body.name!r} already", "name", "exists")
    source = allowed(endpoint.cfg, body.source)
    if source is not None:  # what a run has in it may be a link to elsewhere
        source = allowed(endpoint.cfg, adapter_in(source))
    if source is None:
        where = ", ".join(roots(endpoint.cfg)) or "nowhere, as serving.adapter_sources is empty"
        raise APIError(403, f"adapters may come from: {where}", "source", "forbidden_source")
    return source


@contextmanager
def remembering() -> Iterator[None]:
    """Report to the client that the registry could not write its file.

    Raises:
        APIError: 500.
    """
    try:
        yield
    except OSError as error:
        reason = f"the change can't be saved: {error.filename}: {error.strerror}"
        raise APIError(500, reason, code="not_remembered") from None
