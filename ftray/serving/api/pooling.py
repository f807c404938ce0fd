"""Routes of models that don't generate: embeddings and classification."""

import uuid
from array import array
from base64 import b64encode
from typing import Any

from fastapi import APIRouter, Request

from ftray.serving.api.endpoint import CurrentEndpoint, Endpoint
from ftray.serving.api.requests import ClassificationRequest, EmbeddingRequest
from ftray.serving.api.responses import usage
from ftray.serving.errors import invalid
from ftray.serving.pooling import PoolingRequest, PoolingResponse
from ftray.serving.request_body import body_of

MAX_TEXTS = 2048  # of one request, as in OpenAI's API
router = APIRouter()


@router.post("/v1/embeddings")
async def embeddings(http: Request, endpoint: CurrentEndpoint) -> dict[str, Any]:
    body = await body_of(EmbeddingRequest, http)
    endpoint.require_task("FEATURE_EXTRACTION")
    response = await pool(endpoint, body, None)
    encode = base64_floats if body.encoding_format == "base64" else list
    data = [{"object": "embedding", "index": i, "embedding": encode(v)} for i, v in enumerate(response.values)]
    return {"object": "list", "model": body.model, "data": data, "usage": usage(response.tokens, 0)}


@router.post("/v1/classify")
async def classify(http: Request, endpoint: CurrentEndpoint) -> dict[str, Any]:
    body = await body_of(ClassificationRequest, http)
    if body.pairs is not None and len(body.pairs) != len(body.texts):
        raise invalid("pair: must hold as many texts as input", "pair")
    endpoint.require_task("SEQ_CLS", "TOKEN_CLS")
    response = await pool(endpoint, body, body.pairs)
    labels = response.labels
    data: list[dict[str, Any]] = []
    for i, (probs, text) in enumerate(zip(response.values, body.texts, strict=True)):
        if endpoint.task == "SEQ_CLS":
            data.append({"index": i, "probs": probs, "label": labels[argmax(probs)], "num_classes": len(probs)})
        else:
            tags = [labels[argmax(of_word)] for of_word in probs]
            data.append({"index": i, "probs": probs, "words": text.split(), "tags": tags})
    head = {"id": f"classify-{uuid.uuid4().hex}", "object": "list", "model": body.model}
    return {**head, "data": data, "labels": labels, "usage": usage(response.tokens, 0)}


async def pool(
    endpoint: Endpoint, body: EmbeddingRequest | ClassificationRequest, pairs: list[str] | None
) -> PoolingResponse:
    """The answer of a replica about the texts.

    Raises:
        APIError: it refuses them, too many requests are under way, or it takes too long.
    """
    if not body.texts or not all(body.texts) or len(body.texts) > MAX_TEXTS:
        raise invalid(f"input: give from 1 to {MAX_TEXTS} texts, none of them empty", "input")
    endpoint.router.refuse_when_full()
    adapter = endpoint.adapter(body.model)
    request = PoolingRequest(
        texts=body.texts,
        pairs=pairs,
        adapter=adapter.id if adapter else None,
        source=adapter.source if adapter else None,
        max_tokens=endpoint.cfg.max_prompt_tokens,
    )
    return await endpoint.router.pool(body.model, request)


def base64_floats(values: list[float]) -> str:
    """As OpenAI's clients decode them: float32, little-endian."""
    return b64encode(array("f", values).tobytes()).decode()


def argmax(values: list[float]) -> int:
    return values.index(max(values))
