"""The HTTP side: who may ask for what, in OpenAI's words; a Ray Serve deployment in front of the replicas.

It holds no model: it checks a request, has a replica answer it, and words the answer.
"""

import asyncio
import hashlib
import hmac
import uuid
from array import array
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from ftray.config import Config
from ftray.errors import UserError
from ftray.serving.api.requests import (
    AddAdapterRequest,
    APIError,
    ChatCompletionRequest,
    ClassificationRequest,
    CompletionRequest,
    EmbeddingRequest,
    GenerationParameters,
    parsed,
)
from ftray.serving.api.responses import ChatCompletionResponse, CompletionResponse, event, usage
from ftray.serving.catalog import leaderboard
from ftray.serving.generation_request import GenerationRequest, OutputDelta, OutputDeltas
from ftray.serving.pooling import READS, PoolingRequest, PoolingResponse
from ftray.serving.registry import AdapterEntry, Registry, allowed, roots
from ftray.serving.router import Router

MOST_TEXTS = 2048  # of one request, as OpenAI has it
DROP_SECONDS = 30
CLASSIFY = ("SEQ_CLS", "TOKEN_CLS")
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
api = FastAPI(title="ftray", openapi_url=None)


@api.exception_handler(APIError)
async def _refused(request: Request, error: APIError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


@api.exception_handler(OSError)
async def _not_remembered(request: Request, error: OSError) -> JSONResponse:
    refused = APIError(500, f"can't be remembered: {error.filename}: {error.strerror}", code="not_remembered")
    return JSONResponse(refused.body, refused.status)


@api.exception_handler(RayActorError)
async def _replica_died(request: Request, error: RayActorError) -> JSONResponse:
    refused = APIError(503, "the replica that was asked has died", code="replica_died")
    return JSONResponse(refused.body, refused.status)


@api.exception_handler(Exception)
async def _failed(request: Request, error: Exception) -> JSONResponse:
    """Starlette raises the error once more, for the log."""
    refused = APIError(500, f"{request.url.path}: {type(error).__name__}", code="internal_error")
    return JSONResponse(refused.body, refused.status)


@api.exception_handler(HTTPException)
async def _no_route(request: Request, error: HTTPException) -> JSONResponse:
    refused = APIError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(refused.body, error.status_code, error.headers)


def _warned(warning: str | None) -> dict[str, str]:
    """Headers that tell a warning; none where there is none."""
    return {"x-ftray-warning": warning.encode("ascii", "backslashreplace").decode()} if warning else {}


@serve.ingress(api)
class Endpoint:
    """The deployment.

    Args:
        settings: the configuration, as plain data.
        base: name of the base model.
        adapters: directory or URI of each adapter that is on offer from the start.
        key: SHA-256 of the bearer token, hexadecimal; None: anyone may ask.
        replicas: those of :class:`ftray.serving.replica.Replica`, or of :class:`ftray.serving.pooling.PoolingReplica`.
        task: what they do.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        base: str,
        adapters: dict[str, str],
        key: str | None,
        replicas: DeploymentHandle,
        task: str = "CAUSAL_LM",
    ):
        self.cfg = Config.model_validate(settings).serving
        self.base, self.key, self.replicas, self.task = base, key, replicas, task
        self.registry = Registry(self.cfg, adapters)
        self.router = Router(self.cfg, replicas)

    @api.get("/health")
    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/")
    async def page(self) -> Response:
        return FileResponse(Path(__file__).parents[1] / "page.html", headers={"Content-Security-Policy": PAGE_POLICY})

    @api.get("/v1/run")
    async def run(self, request: Request) -> dict[str, Any]:
        """What the models are for; the search's metric, its trials, best first, and how prompts were rendered in it."""
        self._authorize(request)
        return {"task": self.task, **await asyncio.to_thread(leaderboard, self.cfg.run)}

    @api.get("/metrics")
    async def metrics(self, request: Request) -> Response:
        self._authorize(request)
        usage = self.router.usage
        usage.under_way.set(self.router.under_way)
        return Response(generate_latest(usage.registry), media_type=CONTENT_TYPE_LATEST)

    @api.get("/v1/models")
    async def models(self, request: Request) -> dict[str, Any]:
        self._authorize(request)
        return {"object": "list", "data": [self._model(name) for name in (self.base, *self.registry.offers)]}

    @api.get("/v1/models/{name}")
    async def model(self, request: Request, name: str) -> dict[str, Any]:
        self._authorize(request)
        self._offer(name)
        return self._model(name)

    @api.post("/v1/adapters")
    async def add_adapter(self, request: Request) -> dict[str, Any]:
        from ftray.serving.adapters import check_name

        self._authorize(request)
        new = parsed(AddAdapterRequest, await self._body(request))
        try:
            check_name(new.name)
        except UserError as error:
            raise APIError(400, str(error), "name", "invalid_value") from None
        if new.name == self.base or new.name in self.registry.offers:
            raise APIError(409, f"there is a model {new.name!r} already", "name", "exists")
        source = allowed(self.cfg, new.source)
        if source is None:
            where = ", ".join(roots(self.cfg)) or "nowhere, as serving.adapter_sources is empty"
            raise APIError(403, f"adapters may come from: {where}", "source", "forbidden_source")
        offer = self.registry.new(new.name, source)
        handle = self.replicas.options(multiplexed_model_id=offer.id)
        if reason := await handle.load.remote(offer.id, offer.source):
            raise APIError(400, reason, "source", "bad_adapter")
        self.registry.add(new.name, offer)
        return self._model(new.name)

    @api.delete("/v1/adapters/{name}")
    async def remove_adapter(self, request: Request, name: str) -> dict[str, Any]:
        self._authorize(request)
        if name not in self.registry.offers:
            raise APIError(404, f"there is no adapter {name[:80]!r}", code="not_found")
        offer = self.registry.remove(name)
        with suppress(RayServeException, TimeoutError):  # without a replica there is nothing to free
            dropped = self.replicas.broadcast("drop", offer.id)
            await dropped.results_async(timeout_s=DROP_SECONDS, return_exceptions=True)
        return {"id": name, "object": "model", "deleted": True}

    @api.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        self._authorize(request)
        asked = parsed(CompletionRequest, await self._body(request))
        if asked.max_tokens == 0 and not asked.echo:
            raise APIError(400, "max_tokens: 0 makes sense with echo alone", "max_tokens", "invalid_value")
        if not asked.prompt or len(asked.prompts) > 256:
            raise APIError(400, "prompt: from 1 to 256 prompts that are not empty", "prompt", "invalid_value")
        sampling = self._sampling(asked, asked.max_tokens, asked.logprobs, asked.echo)
        return await self._respond(asked, self._job(asked, asked.prompts, None, sampling))

    @api.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        self._authorize(request)
        asked = parsed(ChatCompletionRequest, await self._body(request))
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        most = asked.max_completion_tokens or asked.max_tokens
        job = self._job(asked, [], [m.plain for m in asked.messages], self._sampling(asked, most, logprobs, False))
        return await self._respond(asked, job)

    @api.post("/v1/embeddings")
    async def embeddings(self, request: Request) -> dict[str, Any]:
        self._authorize(request)
        asked = parsed(EmbeddingRequest, await self._body(request))
        read = await self._read("FEATURE_EXTRACTION", asked, None)
        as_asked = (
            (lambda v: b64encode(array("f", v).tobytes()).decode()) if asked.encoding_format == "base64" else list
        )
        data = [{"object": "embedding", "index": i, "embedding": as_asked(v)} for i, v in enumerate(read.values)]
        return {"object": "list", "model": asked.model, "data": data, "usage": usage(read.tokens, 0)}

    @api.post("/v1/classify")
    async def classify(self, request: Request) -> dict[str, Any]:
        self._authorize(request)
        asked = parsed(ClassificationRequest, await self._body(request))
        if asked.pairs is not None and len(asked.pairs) != len(asked.texts):
            raise APIError(400, "pair: as many as there are in input", "pair", "invalid_value")
        read = await self._read(self.task if self.task in CLASSIFY else "SEQ_CLS", asked, asked.pairs)
        data: list[dict[str, Any]] = [{"index": i, "probs": probs} for i, probs in enumerate(read.values)]
        for entry, text in zip(data, asked.texts, strict=True):
            probs = entry["probs"]
            if self.task == "SEQ_CLS":
                entry |= {"label": read.labels[probs.index(max(probs))], "num_classes": len(probs)}
            else:
                entry |= {"words": text.split(), "tags": [read.labels[p.index(max(p))] for p in probs]}
        more = {"labels": read.labels, "usage": usage(read.tokens, 0)}
        return {"id": f"classify-{uuid.uuid4().hex}", "object": "list", "model": asked.model, "data": data} | more

    async def _read(
        self, task: str, asked: EmbeddingRequest | ClassificationRequest, pairs: list[str] | None
    ) -> PoolingResponse:
        """What a replica makes of the texts; on another one if it dies.

        Raises:
            APIError: it refuses them, too many requests are under way, or it takes too long.
        """
        self._answers(task)
        if not asked.texts or not all(asked.texts) or len(asked.texts) > MOST_TEXTS:
            raise APIError(400, f"input: from 1 to {MOST_TEXTS} texts that are not empty", "input", "invalid_value")
        self.router.room()
        offer, most = self._offer(asked.model), self.cfg.max_prompt_tokens
        job = PoolingRequest(asked.texts, pairs, offer.id if offer else None, offer.source if offer else None, most)
        return await self.router.read(asked.model, job)

    def _answers(self, task: str) -> None:
        """Refuse what the models here aren't for."""
        if task != self.task:
            route = READS.get(self.task, "/v1/completions and /v1/chat/completions")
            raise APIError(400, f"the models here are for {self.task}: use {route}", None, "wrong_task")

    def _authorize(self, request: Request) -> None:
        if self.key is None:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(token.strip().encode()).hexdigest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, self.key):
            headers = {"WWW-Authenticate": "Bearer"}
            raise APIError(
                401, "a valid API key is needed: Authorization: Bearer KEY", None, "invalid_api_key", headers
            )

    async def _body(self, request: Request) -> bytes:
        limit, body = self.cfg.max_body_bytes, b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise APIError(413, f"the body has more than {limit} bytes", code="too_large")
        return body

    def _offer(self, name: str) -> AdapterEntry | None:
        """The adapter of that name; None: the base model."""
        if name == self.base:
            return None
        if name not in self.registry.offers:
            raise APIError(404, f"there is no model {name[:80]!r}: see /v1/models", "model", "model_not_found")
        return self.registry.offers[name]

    def _model(self, name: str) -> dict[str, Any]:
        offer = self.registry.offers.get(name)
        created = offer.created if offer else self.registry.started
        return {"id": name, "object": "model", "created": created, "owned_by": "ftray", "parent": offer and self.base}

    def _sampling(
        self, asked: GenerationParameters, max_tokens: int | None, logprobs: int | None, echo: bool
    ) -> dict[str, Any]:
        return {
            "max_tokens": max_tokens,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "seed": asked.seed,
            "stop": asked.stops,
            "logprobs": logprobs,
            "echo": echo,
        }

    def _job(
        self, asked: GenerationParameters, prompts: Any, messages: Any, sampling: dict[str, Any]
    ) -> GenerationRequest:
        offer, cfg = self._offer(asked.model), self.cfg
        return GenerationRequest(
            prompts=prompts,
            messages=messages,
            n=asked.n,
            adapter=offer.id if offer else None,
            source=offer.source if offer else None,
            sampling=sampling,
            stream=asked.stream,
            max_prompt_tokens=cfg.max_prompt_tokens,
            max_output_tokens=cfg.max_output_tokens,
        )

    async def _respond(self, asked: GenerationParameters, job: GenerationRequest) -> Response:
        self._answers("CAUSAL_LM")
        self.router.room()
        response = (
            ChatCompletionResponse(asked) if isinstance(asked, ChatCompletionRequest) else CompletionResponse(asked)
        )
        if asked.stream:
            events = self.router.parts(asked.model, job)
            first = await anext(events)  # so that what is refused gets its status
            streamed = self._streamed(asked, response, first, events)
            return StreamingResponse(streamed, media_type="text/event-stream", headers=_warned(first.warning))
        parts: list[OutputDelta] = []
        prompt_tokens, warning = 0, None
        async for got in self.router.parts(asked.model, job):
            prompt_tokens, warning = got.prompt_tokens or prompt_tokens, got.warning or warning
            parts += got.parts
        count = sum(part.count for part in parts)
        whole = response.whole(parts, len(job.prompts or [0]) * job.n)
        return JSONResponse(whole | {"usage": usage(prompt_tokens, count)}, headers=_warned(warning))

    async def _streamed(
        self, asked: GenerationParameters, response: Any, first: OutputDeltas, events: AsyncIterator[OutputDeltas]
    ) -> AsyncIterator[str]:
        count, with_usage = 0, bool(asked.stream_options and asked.stream_options.include_usage)
        try:
            async for got in events:
                for part in got.parts:
                    count += part.count
                    if (part.finish or "").startswith("error"):
                        raise APIError(500, part.finish or "", code="model_error")
                for chunk in response.chunks(got.parts):
                    yield event(chunk | ({"usage": None} if with_usage else {}))
            if with_usage:
                yield event(response.chunk([]) | {"usage": usage(first.prompt_tokens or 0, count)})
            yield "data: [DONE]\n\n"
        except APIError as error:
            yield f"event: error\n{event(error.body)}"
        finally:
            await events.aclose()  # type: ignore[attr-defined]
