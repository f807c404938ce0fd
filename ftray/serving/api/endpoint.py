"""The Ray Serve deployment behind the routes. It holds no model: replicas do."""

from typing import Annotated, Any

from fastapi import Depends
from ray import serve
from ray.serve.handle import DeploymentHandle

from ftray.config import Config
from ftray.reports.live import LiveRun
from ftray.serving.errors import APIError
from ftray.serving.pooling import ROUTES
from ftray.serving.registry import AdapterEntry, Registry
from ftray.serving.router import Router
from ftray.storage.location import parse_location


class Endpoint:
    """What the routes share.

    Args:
        settings: the configuration, as plain data.
        base: name of the base model.
        adapters: directory or URI of each adapter that is served from the start.
        replicas: of :class:`ftray.serving.replica.Replica` or :class:`ftray.serving.pooling.PoolingReplica`.
        task: what the models are for.
    """

    def __init__(
        self, settings: dict[str, Any], base: str, adapters: dict[str, str], replicas: DeploymentHandle, task: str
    ):
        self.cfg = Config.model_validate(settings).serving
        self.base, self.replicas, self.task = base, replicas, task
        self.registry = Registry(self.cfg, adapters)
        self.router = Router(self.cfg, replicas)
        self.shown_run = LiveRun(parse_location(self.cfg.run)) if self.cfg.run else None

    def adapter(self, name: str) -> AdapterEntry | None:
        """The adapter of that name; None: the base model.

        Raises:
            APIError: 404: there is no such model.
        """
        if name == self.base:
            return None
        if name not in self.registry.entries:
            raise APIError(404, f"there is no model {name[:80]!r}: see /v1/models", "model", "model_not_found")
        return self.registry.entries[name]

    def require_task(self, *tasks: str) -> None:
        """Refuse a request that the models are not for.

        Raises:
            APIError: 400: names the route to use.
        """
        if self.task not in tasks:
            route = ROUTES.get(self.task, "/v1/completions and /v1/chat/completions")
            raise APIError(400, f"the models here are for {self.task}: use {route}", None, "wrong_task")


async def current_endpoint() -> Endpoint:
    """The endpoint of this process."""
    endpoint: Endpoint = serve.get_replica_context().servable_object
    return endpoint


CurrentEndpoint = Annotated[Endpoint, Depends(current_endpoint)]
