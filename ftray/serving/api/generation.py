"""Routes of models that generate: plain and chat completions."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from ftray.serving.api.chat_requests import ChatCompletionRequest
from ftray.serving.api.endpoint import CurrentEndpoint, Endpoint
from ftray.serving.api.requests import CompletionRequest, GenerationParameters
from ftray.serving.api.responses import ChatCompletionWriter, CompletionWriter, ResponseWriter, event, usage
from ftray.serving.errors import APIError, invalid
from ftray.serving.generation_request import GenerationRequest, OutputDelta, OutputDeltas, Sampling
from ftray.serving.request_body import body_of

MAX_PROMPTS = 256
router = APIRouter()


@router.post("/v1/completions")
async def completions(http: Request, endpoint: CurrentEndpoint) -> Response:
    body = await body_of(CompletionRequest, http)
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens: 0 needs echo: true", "max_tokens")
    if not body.prompt or len(body.prompts) > MAX_PROMPTS:
        raise invalid(f"prompt: give from 1 to {MAX_PROMPTS} prompts, none of them empty", "prompt")
    sampling = body.sampling(body.logprobs, body.echo)
    request = generation_request(endpoint, body, body.prompts, None, body.max_tokens, sampling)
    return await respond(endpoint, body, request, CompletionWriter(body))


@router.post("/v1/chat/completions")
async def chat_completions(http: Request, endpoint: CurrentEndpoint) -> Response:
    body = await body_of(ChatCompletionRequest, http)
    sampling = body.sampling((body.top_logprobs or 0) if body.logprobs else None)
    messages = [message.plain for message in body.messages]
    max_tokens = body.max_completion_tokens or body.max_tokens
    request = generation_request(endpoint, body, [], messages, max_tokens, sampling)
    request = replace(request, tools=body.offered, must_call=body.must_call, one_call=body.one_call)
    return await respond(endpoint, body, request, ChatCompletionWriter(body))


def generation_request(
    endpoint: Endpoint,
    body: GenerationParameters,
    prompts: list[str] | list[list[int]],
    messages: list[dict[str, Any]] | None,
    max_tokens: int | None,
    sampling: Sampling,
) -> GenerationRequest:
    """The request in the form that a replica takes.

    Raises:
        APIError: 404: there is no such model.
    """
    adapter = endpoint.adapter(body.model)
    return GenerationRequest(
        prompts=prompts,
        messages=messages,
        n=body.n,
        adapter=adapter.id if adapter else None,
        source=adapter.source if adapter else None,
        max_tokens=max_tokens,
        sampling=sampling,
        stream=body.stream,
        max_prompt_tokens=endpoint.cfg.max_prompt_tokens,
        max_output_tokens=endpoint.cfg.max_output_tokens,
    )


async def respond(
    endpoint: Endpoint, body: GenerationParameters, request: GenerationRequest, writer: ResponseWriter
) -> Response:
    """The answer of a replica, whole or as a stream.

    Raises:
        APIError: there is none.
    """
    endpoint.require_task("CAUSAL_LM")
    endpoint.router.refuse_when_full()
    messages = endpoint.router.generate(body.model, request)
    if body.stream:
        first = await anext(messages)  # before the response begins: a refusal needs a status
        writer.calls = first.calls
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        events = stream_events(writer, messages, first.prompt_tokens or 0, with_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=warning_headers(first.warning))
    deltas: list[OutputDelta] = []
    prompt_tokens, warning = 0, None
    async for message in messages:
        if message.prompt_tokens is not None:
            prompt_tokens, warning, writer.calls = message.prompt_tokens, message.warning, message.calls
        deltas += message.deltas
    whole = writer.whole(deltas, len(request.prompts or [0]) * request.n)
    whole |= {"usage": usage(prompt_tokens, sum(delta.count for delta in deltas))}
    return JSONResponse(whole, headers=warning_headers(warning))


def warning_headers(warning: str | None) -> dict[str, str]:
    """Headers that tell a warning; none where there is none."""
    return {"x-ftray-warning": warning.encode("ascii", "backslashreplace").decode()} if warning else {}


async def stream_events(
    writer: ResponseWriter, messages: AsyncIterator[OutputDeltas], prompt_tokens: int, with_usage: bool
) -> AsyncIterator[str]:
    """The server-sent events of `messages`; an error is the last of them."""
    count = 0
    try:
        async for message in messages:
            count += sum(delta.count for delta in message.deltas)
            for chunk in writer.chunks(message.deltas):
                yield event(chunk | ({"usage": None} if with_usage else {}))
        if with_usage:
            yield event(writer.chunk([]) | {"usage": usage(prompt_tokens, count)})
        yield "data: [DONE]\n\n"
    except APIError as error:
        yield f"event: error\n{event(error.body)}"
    finally:
        await messages.aclose()  # type: ignore[attr-defined]
