"""Handing a request to a replica, and to another one if that dies; and the account of all requests.

Any request that a dead replica had and had not begun to answer may have killed it. Each of those is tried once more,
one at a time: those that only stood by are answered, and of the one that kills no more than two replicas die.

Serve's multiplexing picks a replica that has the adapter loaded if there is one. See
https://docs.ray.io/en/latest/serve/model-multiplexing.html.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager, nullcontext, suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from ftray.config import ServingConfig
from ftray.serving.api.requests import APIError
from ftray.serving.generation_request import GenerationRequest, OutputDeltas
from ftray.serving.pooling import PoolingRequest, PoolingResponse

ATTEMPTS = 3  # replicas that a request is tried on, if they die
DEADLY = 2  # of which so many may have died of it
NOT_AGAIN = {"x-should-retry": "false"}  # OpenAI's clients would send it again by themselves


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
    """What stands between the endpoint and its replicas.

    Args:
        cfg: limits.
        replicas: those of :class:`ftray.serving.replica.Replica`, or of :class:`ftray.serving.pooling.PoolingReplica`.

    Attributes:
        usage: what was asked and answered.
        under_way: requests that are not answered yet.
    """

    def __init__(self, cfg: ServingConfig, replicas: DeploymentHandle):
        self.cfg, self.replicas, self.usage, self.under_way = cfg, replicas, Usage(), 0
        self._suspect = asyncio.Lock()  # for the one that is tried again

    def room(self) -> None:
        """Refuse what is too much."""
        if self.under_way >= self.cfg.max_queue:
            headers = {"Retry-After": "1"}
            raise APIError(429, f"{self.cfg.max_queue} requests are under way", None, "queue_full", headers)

    async def read(self, model: str, job: PoolingRequest) -> PoolingResponse:
        """What a replica makes of texts; on another one, once, if it dies.

        Raises:
            APIError: the replica refuses them, all that were tried have died, or it takes too long.
        """
        handle = self.replicas.options(multiplexed_model_id=job.adapter or "")
        with self._counted(model, "500"):
            async with asyncio.timeout(self.cfg.request_seconds):
                for attempt in range(DEADLY):
                    async with self._suspect if attempt else nullcontext():
                        with suppress(RayActorError):
                            read: PoolingResponse = await handle.read.remote(job)
                            break
                    await asyncio.sleep(0.1)
                else:
                    raise _deadly()
            if read.refused:
                code, message, param = read.refused
                raise APIError(code, message, param, "invalid_value" if code < 500 else "model_error")
            self.usage.prompt.labels(model).inc(read.tokens)
            return read

    async def parts(self, model: str, job: GenerationRequest) -> AsyncIterator[OutputDeltas]:
        """What a replica answers; on another one if it dies, unless something has been given away or it died of this.

        Raises:
            APIError: the replica refuses the request, all that were tried have died, or it takes too long.
        """
        began = time.monotonic()
        deadline, deaths = began + self.cfg.request_seconds, 0
        announced = given = False
        with self._counted(model, "499"):
            for attempt in range(ATTEMPTS):
                taken = answering = False
                try:
                    async with AsyncExitStack() as turn:
                        if deaths:
                            async with asyncio.timeout(deadline - time.monotonic()):
                                await turn.enter_async_context(self._suspect)
                        async for got in self._once(job, deadline):
                            taken = True
                            if got.refused:
                                code, message, param = got.refused
                                raise APIError(code, message, param, "invalid_value")
                            if got.answering or got.parts:
                                answering = True
                                await turn.aclose()  # the next suspect's turn
                            if got.prompt_tokens is not None:
                                if announced:  # by a replica that died
                                    continue
                                announced = True
                                self.usage.prompt.labels(model).inc(got.prompt_tokens)
                            elif not got.parts:
                                continue
                            elif not given:
                                given = True
                                self.usage.first.labels(model).observe(time.monotonic() - began)
                            self.usage.output.labels(model).inc(sum(part.count for part in got.parts))
                            yield got
                    break
                except RayActorError:
                    deaths += taken and not answering
                    if given:
                        raise APIError(500, "the replica that gave this answer has died", code="replica_died") from None
                    if deaths == DEADLY:
                        raise _deadly() from None
                    if attempt == ATTEMPTS - 1:
                        raise APIError(503, "replicas keep dying", code="replica_died") from None
                    await asyncio.sleep(0.1 * 2**attempt)

    async def _once(self, job: GenerationRequest, deadline: float) -> AsyncIterator[OutputDeltas]:
        handle = self.replicas.options(stream=True, multiplexed_model_id=job.adapter or "")
        answer = handle.answer.remote(job)
        parts, done = aiter(answer), False
        try:
            while True:
                async with asyncio.timeout(deadline - time.monotonic()):
                    got = await anext(parts)
                yield got
        except StopAsyncIteration:
            done = True
        finally:
            if not done:
                answer.cancel()

    @contextmanager
    def _counted(self, model: str, otherwise: str) -> Iterator[None]:
        """A request is under way; how it ended is counted, as `otherwise` where nothing was answered.

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


def _deadly() -> APIError:
    return APIError(500, f"{DEADLY} replicas have died of this request", None, "replica_died", NOT_AGAIN)
