"""Sends a request to a replica, and to another one if that dies; counts all requests.

Any request that a dead replica had and had not begun to answer may have killed it. Each of those is tried once more,
one at a time: the innocent ones are answered, and the one that kills costs no more than two replicas. Which of
them it was can't be seen from the death itself: a process killed from outside looks the same, and its requests must
be answered. Where the node was preempted, no request is to blame.

Serve's multiplexing picks a replica that has the adapter loaded if there is one. See
https://docs.ray.io/en/latest/serve/model-multiplexing.html.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager, nullcontext

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from ftray.config import ServingConfig
from ftray.serving.errors import APIError
from ftray.serving.generation_request import GenerationRequest, OutputDeltas
from ftray.serving.pooling import PoolingRequest, PoolingResponse

ATTEMPTS = 3  # replicas that a request is tried on, if they die
MAX_KILLED = 2  # of which so many may have died of it
NO_RETRY = {"x-should-retry": "false"}  # OpenAI's clients would send it again by themselves


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
        self._suspect = asyncio.Lock()  # held by the request that is tried again

    def refuse_when_full(self) -> None:
        """Refuse a request while too many are under way.

        Raises:
            APIError: 429.
        """
        if self.under_way >= self.cfg.max_queue:
            headers = {"Retry-After": "1"}
            raise APIError(429, f"{self.cfg.max_queue} requests are under way", None, "queue_full", headers)

    async def pool(self, model: str, request: PoolingRequest) -> PoolingResponse:
        """What a replica makes of texts; of another one if it dies.

        Raises:
            APIError: the replica refuses them, all that were tried have died, or it takes too long.
        """
        handle = self.replicas.options(multiplexed_model_id=request.adapter or "")
        with self._counted(model, "500"):
            async with asyncio.timeout(self.cfg.request_seconds):
                killed = 0
                for attempt in range(ATTEMPTS):
                    async with self._suspect if killed else nullcontext():
                        try:
                            response: PoolingResponse = await handle.pool.remote(request)
                            break
                        except RayActorError as error:
                            killed += not error.preempted
                    _refuse_retry(attempt, killed)
                    await asyncio.sleep(0.1)
            if response.refused:
                raise response.refused
            self.usage.prompt.labels(model).inc(response.tokens)
            return response

    async def generate(self, model: str, request: GenerationRequest) -> AsyncIterator[OutputDeltas]:
        """What a replica answers; another one if it dies, unless a part was sent already or the request kills.

        Raises:
            APIError: the replica refuses the request, all that were tried have died, or it takes too long.
        """
        began = time.monotonic()
        deadline, killed = began + self.cfg.request_seconds, 0
        announced = given = False
        with self._counted(model, "499"):
            for attempt in range(ATTEMPTS):
                taken = answering = False
                try:
                    async with AsyncExitStack() as turn:
                        if killed:
                            async with asyncio.timeout(deadline - time.monotonic()):
                                await turn.enter_async_context(self._suspect)
                        async for message in self._try(request, deadline):
                            taken = True
                            if message.refused:
                                raise message.refused
                            if message.answering or message.deltas:
                                answering = True
                                await turn.aclose()  # the next suspect's turn
                            if message.prompt_tokens is not None:
                                if announced:  # by a replica that died
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
                    killed += taken and not answering and not error.preempted
                    if given:
                        raise APIError(500, "the replica that gave this answer has died", code="replica_died") from None
                    _refuse_retry(attempt, killed)
                    await asyncio.sleep(0.1 * 2**attempt)

    async def _try(self, request: GenerationRequest, deadline: float) -> AsyncIterator[OutputDeltas]:
        """What one replica answers; closing this iterator cancels it."""
        handle = self.replicas.options(stream=True, multiplexed_model_id=request.adapter or "")
        answer = handle.generate.remote(request)
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


def _refuse_retry(attempt: int, killed: int) -> None:
    """After a replica died.

    Raises:
        APIError: the request is not tried again.
    """
    if killed == MAX_KILLED:
        raise APIError(500, f"{MAX_KILLED} replicas have died of this request", None, "replica_died", NO_RETRY)
    if attempt == ATTEMPTS - 1:
        raise APIError(503, "replicas keep dying", code="replica_died")
