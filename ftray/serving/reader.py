"""A replica for tasks that read and don't generate: the class of a text, or its vector."""

import asyncio
import threading
from dataclasses import dataclass
from typing import Any

from ray import serve

from ftray.config import Config, UserError
from ftray.tasks import TaskSpec

READS = {"SEQ_CLS": "/v1/classify", "FEATURE_EXTRACTION": "/v1/embeddings"}


@dataclass(frozen=True)
class Texts:
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
class Read:
    """A row a text in `values`: probabilities of the `labels`, or a vector of length 1. Or what `refused` it."""

    values: list[list[float]]
    labels: tuple[str, ...]
    tokens: int
    refused: tuple[int, str, str | None] | None = None  # status, reason, field


class Reader:
    """The deployment.

    Args:
        settings: the configuration, as plain data.
        model_path: of the base model.
        threads: of torch.
        task: one of those in `READS`.
    """

    def __init__(self, settings: dict[str, Any], model_path: str, threads: int, task: TaskSpec):
        import torch

        from ftray.models.load import load_on_device, load_tokenizer

        self.cfg = Config.model_validate(settings)
        torch.set_num_threads(threads)
        self.task = task.load()
        self.base = load_on_device(self.cfg.model, model_path, task).eval()
        self.tokenizer = load_tokenizer(model_path, self.cfg.model.trust_remote_code)
        self._sources: dict[str, str] = {}
        self._alone = threading.Lock()  # the models share their parameters, and a processor

        async def load(adapter: str) -> Any:
            return await asyncio.to_thread(self._adapted, self._sources[adapter])

        self._loaded = serve.multiplexed(load, max_num_models_per_replica=self.cfg.serving.max_adapters)

    def _adapted(self, source: str) -> Any:
        from ftray.adapters.heads import exact_heads
        from ftray.serving.adapters import load_adapter

        model = load_adapter(self.base, source, self.task.spec)
        exact_heads(model)
        return model.requires_grad_(False)

    async def load(self, adapter: str, source: str) -> str | None:
        """Load an adapter; returns why it can't be."""
        self._sources[adapter] = source
        try:
            await self._loaded(adapter)
        except UserError as error:
            return str(error)
        return None

    async def read(self, job: Texts) -> Read:
        """The class probabilities or the vector of each text."""
        try:
            model = self.base
            if job.adapter is not None:
                self._sources[job.adapter] = job.source or ""
                model = await self._loaded(job.adapter)
            elif self.base.new_modules:
                raise UserError(
                    f"the base model has no {self.base.new_modules[0]} of its own: name an adapter", "model"
                )
            return await asyncio.to_thread(self._read, model, job)
        except UserError as error:
            return Read([], (), 0, (400, *(*error.args, None)[:2]))

    def _read(self, model: Any, job: Texts) -> Read:
        import torch

        ids, types = self._tokens(job)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        values: list[Any] = [None] * len(ids)
        size = self.cfg.evaluation.batch_size
        with self._alone, torch.inference_mode():
            for part in (order[at : at + size] for at in range(0, len(order), size)):
                batch = self.task.below([ids[i] for i in part], [types[i] for i in part])
                read = self.task.read(model, {name: tensor.to(self.base.device) for name, tensor in batch.items()})
                for i, row in zip(part, read.float().cpu().tolist(), strict=True):
                    values[i] = row
        return Read(values, self.task.spec.labels, sum(map(len, ids)))

    def _tokens(self, job: Texts) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids and token types of each text.

        Raises:
            UserError: one has none, too many, or such as the model doesn't know.
        """
        if job.texts and isinstance(job.texts[0], str):
            encoded = self.tokenizer(job.texts, job.pairs)
            ids = encoded["input_ids"]
            types = encoded.get("token_type_ids", [[] for _ in ids])
        else:
            ids, types = list(job.texts), [[] for _ in job.texts]
            if "token_type_ids" in self.tokenizer.model_input_names:
                types = [[0] * len(own) for own in ids]
        words = self.base.get_input_embeddings().num_embeddings
        room = getattr(self.base.config, "max_position_embeddings", None) or job.max_tokens
        allowed = min(job.max_tokens, self.tokenizer.model_max_length, room)
        for own in ids:
            if not own:
                raise UserError("a text has no tokens", "input")
            if len(own) > allowed:
                raise UserError(f"a text has {len(own)} tokens; {allowed} are allowed", "input")
            if any(not 0 <= token < words for token in own):
                raise UserError(f"tokens must be from 0 to {words - 1}", "input")
        return ids, types
