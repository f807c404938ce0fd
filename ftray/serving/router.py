"""Sends a request to a replica, and to another one if that dies while the request waits; counts all requests.

A request that a step may have held when its replica died, or whose adapter was being loaded, may have ended it, and is
not tried again: it would end the next one too. Which of several did can't be told from the death itself: a process that
is killed from outside looks the same. Those that waited for their turn are tried again; where the node was preempted,
no request is to blame.

Serve's multiplexing picks a replica that has the adapter loaded if there is one. See
https://docs.ray.io/en/latest/serve/model-multiplexing.html.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from ftray.config import ServingConfig
from ftray.serving.errors import APIError, replica_died
from ftray.serving.generation_request import GenerationRequest, OutputDeltas
from ftray.serving.pooling import PoolingRequest, PoolingResponse

ATTEMPTS = 3  # replicas that a request is tried on, if they die
HEALTH_SECONDS = 5.0  # in which a replica that is up says so, however busy it is
REPLACED = {"Retry-After": "10"}  # seconds in which Serve has mostly put another replica in the place of a dead one


class Usage:
    """What is counted for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("ftray_requests", "Requests answered", ["model", "status"], registry=self.registry)
        self.prompt = Counter("ftray_prompt_tokens", "Prompt tokens read", ["model"], registry=self.registry)
        self.output = Counter("ftray_output_tokens", "Tokens generated", ["model"], registry=self.registry)
        self.first = Histogram(
            "ftray_first_part_seconds", "Time to the first part of an answer", ["model"], registry=self.registry
        )
        self.under_way = Gauge("ftray_requests_under_way", "Requests not answered yet", registry=self.registry)


class Router:
    """Passes requests from the endpoint to its replicas.

    Args:
        cfg: limits.
        replicas: of :class:`ftray.serving.replica.Replica` or :class:`ftray.serving.pooling.PoolingReplica`.

    Attributes:
        usage: requests and tokens, counted.
        under_way: requests that are not answered yet.
    """

    def __init__(self, cfg: ServingConfig, replicas: DeploymentHandle):
        self.cfg, self.replicas, self.usage, self.under_way = cfg, replicas, Usage(), 0

    def refuse_when_full(self) -> None:
        """Refuse a request while too many are under way.

        Raises:
            APIError: 429.
        """
        if self.under_way >= self.cfg.max_queue:
            headers = {"Retry-After": "1"}
            raise APIError(429, f"{self.cfg.max_queue} requests are under way", None, "queue_full", headers)

    async def require_replica(self) -> None:
        """Ask a replica whether it can answer.

        Raises:
            APIError: 503: none answers: its model is being loaded, or what has died is not replaced yet.
        """
        answer = self.replicas.ready.remote()
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                await answer
        except Exception as error:  # of Ray, of Serve, or what the replica itself raises
            if isinstance(error, TimeoutError):
                answer.cancel()
            raise APIError(503, "no replica answers yet: try again later", None, "not_ready", REPLACED) from None

    async def pool(self, model: str, request: PoolingRequest) -> PoolingResponse:
        """What a replica makes of texts; of another one if it dies.

        Raises:
            APIError: the replica refuses them, all that were tried have died, or it takes too long.
        """
        deadline = time.monotonic() + self.cfg.request_seconds
        with self._counted(model, "500"):
            for attempt in range(ATTEMPTS):
                begun = False
                try:
                    async for message in self._try("pool", request, deadline):
                        if isinstance(message, bool):
                            begun = message
                            continue
                        response: PoolingResponse = message
                        if response.refused:
                            raise response.refused
                        self.usage.prompt.labels(model).inc(response.tokens)
                        return response
                except RayActorError as error:
                    _refuse_retry(attempt, begun and not error.preempted)
                    await asyncio.sleep(0.1)
            raise APIError(500, "the replica gave no answer", code="replica_died")

    async def generate(self, model: str, request: GenerationRequest) -> AsyncIterator[OutputDeltas]:
        """What a replica answers; another one if it dies before it has begun the request.

        Raises:
            APIError: the replica refuses the request, all that were tried have died, or it takes too long.
        """
        began = time.monotonic()
        deadline = began + self.cfg.request_seconds
        announced = given = False
        with self._counted(model, "499"):
            for attempt in range(ATTEMPTS):
                begun = False
                try:
                    async for message in self._try("generate", request, deadline):
                        if message.refused:
                            raise message.refused
                        begun = begun if message.begun is None else message.begun
                        if message.prompt_tokens is not None:
                            if announced:  # by a replica that was preempted
                                continue
                            announced = True
                            self.usage.prompt.labels(model).inc(message.prompt_tokens)
                        elif not message.deltas:
                            continue
                        elif not given:
                            given = True
                            self.usage.first.labels(model).observe(time.monotonic() - began)
                        self.usage.output.labels(model).inc(sum(delta.count for delta in message.deltas))
                        yield message
                    break
                except RayActorError as error:
                    if given:
                        raise APIError(500, "the replica that gave this answer has died", code="replica_died") from None
                    _refuse_retry(attempt, begun and not error.preempted)
                    await asyncio.sleep(0.1 * 2**attempt)

    async def _try(
        self, what: Literal["generate", "pool"], request: GenerationRequest | PoolingRequest, deadline: float
    ) -> AsyncIterator[Any]:
        """What one replica answers; closing this iterator cancels it."""
        handle = self.replicas.options(stream=True, multiplexed_model_id=request.adapter or "")
        answer = getattr(handle, what).remote(request)
        messages, done = aiter(answer), False
        try:
            while True:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await anext(messages)
                yield message
        except StopAsyncIteration:
            done = True
        finally:
            if not done:
                answer.cancel()

    @contextmanager
    def _counted(self, model: str, otherwise: str) -> Iterator[None]:
        """A request is under way; its end is counted, as status `otherwise` where it was broken off.

        Raises:
            APIError: what was in it took too long.
        """
        self.under_way += 1
        status = otherwise
        try:
            yield
            status = "200"
        except TimeoutError:
            status = "504"
            raise APIError(504, f"took more than {self.cfg.request_seconds:g} s", code="timeout") from None
        except APIError as error:
            status = str(error.status)
            raise
        finally:
            self.under_way -= 1
            self.usage.requests.labels(model, status).inc()


def _refuse_retry(attempt: int, blamed: bool) -> None:
    """After a replica died.

    Raises:
        APIError: the request is not tried again.
    """
    if blamed:
        raise replica_died()
    if attempt == ATTEMPTS - 1:
        raise APIError(503, "replicas keep dying: try again later", None, "replica_died", REPLACED)
