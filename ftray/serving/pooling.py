"""A replica for tasks that read and don't generate: the class of a text or of its words, or its vector."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from ray import serve

from ftray.errors import UserError
from ftray.serving.base_replica import BaseReplica, LoadedAdapter, own_torch_threads
from ftray.task_spec import TaskSpec

READS = {"SEQ_CLS": "/v1/classify", "TOKEN_CLS": "/v1/classify", "FEATURE_EXTRACTION": "/v1/embeddings"}
WAIT = 0.005  # seconds that a request waits for others to be read with it


@dataclass(frozen=True)
class PoolingRequest:
    """What is to be read.

    Attributes:
        texts: each as text or as tokens; `pairs` are the second texts of each, if any.
        adapter, source: id and place of the adapter; None: the base model.
        max_tokens: of a text; what is more is refused.
    """

    texts: list[str] | list[list[int]]
    pairs: list[str] | None
    adapter: str | None
    source: str | None
    max_tokens: int


@dataclass(frozen=True)
class PoolingResponse:
    """A row a text in `values`: probabilities of the `labels` (TOKEN_CLS: for each word), or a vector of length 1.

    Or what `refused` it.
    """

    values: list[Any]
    labels: tuple[str, ...]
    tokens: int
    refused: tuple[int, str, str | None] | None = None  # status, reason, field


@dataclass(frozen=True)
class _Encoded:
    """Token ids and token types of each text, and the model that is to read them.

    Attributes:
        words: the first token of each word, where that has a class.
    """

    ids: list[list[int]]
    types: list[list[int]]
    words: list[list[int]]
    model: Any = None


class PoolingReplica(BaseReplica):
    """The deployment; see :class:`BaseReplica`. Requests that come at almost the same time are read together."""

    def __init__(self, settings: dict[str, Any], model_path: str, threads: int, task: TaskSpec):
        super().__init__(settings, model_path, task)
        self.task: Any = task.load()  # one of those that `read` texts
        size = self.cfg.evaluation.batch_size
        self._batched = serve.batch(self._read_all, max_batch_size=size, batch_wait_timeout_s=WAIT)
        # one at a time: the models share their parameters, and a processor
        self._thread = ThreadPoolExecutor(1, "reader", own_torch_threads, (threads,))

    async def _load(self, source: str) -> LoadedAdapter:
        model = await asyncio.get_running_loop().run_in_executor(self._loader, self._adapter, source)
        return LoadedAdapter(model, lambda model: None)

    def _adapter(self, source: str) -> Any:
        from ftray.adapters.heads import exact_heads
        from ftray.serving.adapters import load_adapter

        model = load_adapter(self.base, source, self.task.spec)
        exact_heads(model)
        return model.requires_grad_(False)

    async def read(self, job: PoolingRequest) -> PoolingResponse:
        """The class probabilities or the vector of each text."""
        try:
            if job.adapter is None and self.base.new_modules:
                reason = f"the base model has no {self.base.new_modules[0]} of its own: name an adapter"
                raise UserError(reason, "model")
            encoded = self.encode(job)
            model = self.base if job.adapter is None else await self.adapted(job.adapter, job.source)
        except UserError as error:
            return PoolingResponse([], (), 0, (400, *(*error.args, None)[:2]))
        values = await self._batched(replace(encoded, model=model))
        if isinstance(values, Exception):
            return PoolingResponse([], (), 0, (500, f"{type(values).__name__}: {values}", None))
        return PoolingResponse(values, self.task.spec.labels, sum(map(len, encoded.ids)))

    async def _read_all(self, asked: list[_Encoded]) -> list[list[Any] | Exception]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.forward, asked)

    def forward(self, asked: list[_Encoded]) -> list[list[Any] | Exception]:
        """The rows of each request, or why it has none; what fails with others is read again by itself."""
        try:
            return list(self._rows(asked))
        except Exception as error:
            return [error] if len(asked) == 1 else [own for one in asked for own in self.forward([one])]

    def _rows(self, asked: list[_Encoded]) -> list[list[Any]]:
        """The rows of each request, texts of like length side by side; Serve gives requests of one adapter."""
        import torch

        model, size = asked[0].model, self.cfg.evaluation.batch_size
        ids = [text for one in asked for text in one.ids]
        types = [text for one in asked for text in one.types]
        words = [text for one in asked for text in one.words]
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
        return [list(islice(rows, len(one.ids))) for one in asked]

    def encode(self, job: PoolingRequest) -> _Encoded:
        """The texts as tokens.

        Raises:
            UserError: one has none, too many, or such as the model doesn't know.
        """
        ids: list[Any]
        types: list[list[int]]
        words: list[list[int]] = []
        if not (job.texts and isinstance(job.texts[0], str)):
            ids, types = list(job.texts), [[] for _ in job.texts]
            if "token_type_ids" in self.tokenizer.model_input_names:
                types = [[0] * len(own) for own in ids]
        else:
            if self.task.spec.name == "TOKEN_CLS":
                if job.pairs is not None:
                    raise UserError("the models here read one text", "pair")
                encoded = self.tokenizer([text.split() for text in job.texts], is_split_into_words=True)
                words = [first_tokens(encoded.word_ids(i)) for i in range(len(job.texts))]
            else:
                encoded = self.tokenizer(job.texts, job.pairs)
            ids = encoded["input_ids"]
            types = encoded.get("token_type_ids", [[] for _ in ids])
        known = self.base.get_input_embeddings().num_embeddings
        room = getattr(self.base.config, "max_position_embeddings", None) or job.max_tokens
        allowed = min(job.max_tokens, self.tokenizer.model_max_length, room)
        for own in ids:
            if not own:
                raise UserError("a text has no tokens", "input")
            if len(own) > allowed:
                raise UserError(f"a text has {len(own)} tokens; {allowed} are allowed", "input")
            if any(not 0 <= token < known for token in own):
                raise UserError(f"tokens must be from 0 to {known - 1}", "input")
        return _Encoded(ids, types, words)


def first_tokens(words: Sequence[int | None]) -> list[int]:
    """Where each word begins, by the word that each token belongs to."""
    return [at for at, word in enumerate(words) if word is not None and (at == 0 or word != words[at - 1])]
