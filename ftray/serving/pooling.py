"""A replica for tasks that don't generate: the class of a text or of each of its words, or the vector of a text."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from ray import serve

from ftray.errors import UserError
from ftray.runtime.threads import own_torch_threads
from ftray.serving.base_replica import BaseReplica, LoadedAdapter
from ftray.serving.errors import APIError, invalid, model_error
from ftray.task_spec import TaskSpec

if TYPE_CHECKING:
    from peft import PeftModel

ROUTES = {"SEQ_CLS": "/v1/classify", "TOKEN_CLS": "/v1/classify", "FEATURE_EXTRACTION": "/v1/embeddings"}
BATCH_WAIT = 0.005  # seconds that a request waits for others to share its batch


@dataclass(frozen=True)
class PoolingRequest:
    """Texts to classify or embed.

    Attributes:
        texts: each as text or as token ids.
        pairs: the second text of each, if any.
        adapter: id of the adapter; None: the base model.
        source: directory or URI of the adapter.
        max_tokens: longer texts are refused.
    """

    texts: list[str] | list[list[int]]
    pairs: list[str] | None
    adapter: str | None
    source: str | None
    max_tokens: int


@dataclass(frozen=True)
class PoolingResponse:
    """What became of texts.

    Attributes:
        values: for each text the probabilities of `labels` (TOKEN_CLS: of each word), or a vector of norm 1.
        tokens: of all texts together.
        refused: why there is nothing else.
    """

    values: list[Any]
    labels: tuple[str, ...]
    tokens: int
    refused: APIError | None = None


@dataclass(frozen=True)
class _Encoded:
    """The texts of a request as a model takes them.

    Attributes:
        ids: token ids of each text.
        types: token types of each text; empty for models that have none.
        words: index of the first token of each word, for each text; empty unless words have classes.
        model: the base, or with its adapter.
        begun: set as the batch that they are in is read.
    """

    ids: list[list[int]]
    types: list[list[int]]
    words: list[list[int]]
    model: Any = None
    begun: asyncio.Event | None = None


class PoolingReplica(BaseReplica):
    """The deployment; see :class:`BaseReplica`. Requests that come almost at once share a batch."""

    def __init__(self, settings: dict[str, Any], model_path: str, threads: int, task: TaskSpec):
        super().__init__(settings, model_path, task)
        self.task: Any = task.load()  # one of those that `read` texts
        size = self.cfg.evaluation.batch_size
        self._batched = serve.batch(self._pool_all, max_batch_size=size, batch_wait_timeout_s=BATCH_WAIT)
        # one at a time: the models share their parameters, and a processor
        self._thread = ThreadPoolExecutor(1, "pooling", own_torch_threads, (threads,))

    async def _load(self, source: str) -> LoadedAdapter:
        model = await asyncio.get_running_loop().run_in_executor(self._loader, self._load_adapter, source)
        return LoadedAdapter(model, lambda model: None)

    def _load_adapter(self, source: str) -> "PeftModel":
        from ftray.adapters.heads import exact_heads
        from ftray.serving.adapters import load_adapter

        model, _ = load_adapter(self.base, source, self.task.spec)
        exact_heads(model)
        return model.requires_grad_(False)

    async def pool(self, request: PoolingRequest) -> AsyncIterator[PoolingResponse | bool]:
        """The class probabilities or the vector of each text.

        Before, True: the batch with the request is read, or its adapter loaded, which the process may not outlive.
        False: from here on it only waits.
        """
        try:
            if request.adapter is None and self.new_modules:
                raise invalid(f"the base model has no {self.new_modules[0]} of its own: name an adapter", "model")
            encoded = self.encode(request)
            loads = request.adapter is not None and request.adapter not in self._kept
            if loads:
                yield True
            model = self.base if request.adapter is None else await self.loaded(request.adapter, request.source)
            if loads:
                yield False
        except APIError as error:
            yield PoolingResponse([], (), 0, error)
            return
        except UserError as error:
            yield PoolingResponse([], (), 0, invalid(str(error), "model"))
            return
        begun = asyncio.Event()
        reading = asyncio.ensure_future(self._batched(replace(encoded, model=model, begun=begun)))
        reading.add_done_callback(lambda _: begun.set())
        try:
            await begun.wait()
            yield True
            values = await reading
        finally:
            reading.cancel()
        if isinstance(values, Exception):
            yield PoolingResponse([], (), 0, model_error(f"{type(values).__name__}: {values}"))
            return
        yield PoolingResponse(values, self.task.spec.labels, sum(map(len, encoded.ids)))

    async def _pool_all(self, requests: list[_Encoded]) -> list[list[Any] | Exception]:
        for one in requests:
            if one.begun:
                one.begun.set()
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.forward, requests)

    def forward(self, requests: list[_Encoded]) -> list[list[Any] | Exception]:
        """The rows of each request, or why it has none; a request whose batch fails is tried again by itself."""
        try:
            return list(self._rows(requests))
        except Exception as error:
            return [error] if len(requests) == 1 else [own for one in requests for own in self.forward([one])]

    def _rows(self, requests: list[_Encoded]) -> list[list[Any]]:
        """The rows of each request, texts of similar length in one batch; Serve gives requests of one adapter."""
        import torch

        model, size = requests[0].model, self.cfg.evaluation.batch_size
        ids = [text for one in requests for text in one.ids]
        types = [text for one in requests for text in one.types]
        words = [text for one in requests for text in one.words]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        values: list[Any] = [None] * len(ids)
        with torch.inference_mode():
            for part in (order[at : at + size] for at in range(0, len(order), size)):
                batch = self.task.below([ids[i] for i in part], [types[i] for i in part])
                read = self.task.read(model, {name: tensor.to(self.base.device) for name, tensor in batch.items()})
                if not read.isfinite().all():
                    raise FloatingPointError("the model's output is not finite")
                for i, row in zip(part, read.float().cpu().tolist(), strict=True):
                    values[i] = [row[first] for first in words[i]] if words else row
        rows = iter(values)
        return [list(islice(rows, len(one.ids))) for one in requests]

    def encode(self, request: PoolingRequest) -> _Encoded:
        """The texts as token ids.

        Raises:
            APIError: one has none, too many, or some that the model doesn't know.
        """
        ids: list[Any]
        types: list[list[int]]
        words: list[list[int]] = []
        if not (request.texts and isinstance(request.texts[0], str)):
            ids, types = list(request.texts), [[] for _ in request.texts]
            if "token_type_ids" in self.tokenizer.model_input_names:
                types = [[0] * len(own) for own in ids]
        else:
            if self.task.spec.name == "TOKEN_CLS":
                if request.pairs is not None:
                    raise invalid("the models here read one text", "pair")
                encoded = self.tokenizer([text.split() for text in request.texts], is_split_into_words=True)
                words = [first_tokens(encoded.word_ids(i)) for i in range(len(request.texts))]
            else:
                encoded = self.tokenizer(request.texts, request.pairs)
            ids = encoded["input_ids"]
            types = encoded.get("token_type_ids", [[] for _ in ids])
        self._check_tokens(ids, request.max_tokens)
        return _Encoded(ids, types, words)

    def _check_tokens(self, texts: list[list[int]], max_tokens: int) -> None:
        from ftray.models.limits import context_length, embedded_tokens

        vocab_size = embedded_tokens(self.base)
        room = context_length(self.base) or max_tokens
        allowed = min(max_tokens, self.tokenizer.model_max_length, room)
        for ids in texts:
            if not ids:
                raise invalid("a text has no tokens", "input")
            if len(ids) > allowed:
                raise invalid(f"a text has {len(ids)} tokens; {allowed} are allowed", "input")
            if any(not 0 <= token < vocab_size for token in ids):
                raise invalid(f"tokens must be from 0 to {vocab_size - 1}", "input")


def first_tokens(words: Sequence[int | None]) -> list[int]:
    """The index of each word's first token, of the word that each token belongs to (None: to none)."""
    return [at for at, word in enumerate(words) if word is not None and (at == 0 or word != words[at - 1])]
