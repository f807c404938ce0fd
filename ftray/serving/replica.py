"""One copy of the base model with its engine: a Ray Serve deployment that answers what the endpoint hands on."""

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ftray.errors import UserError
from ftray.serving.base_replica import BaseReplica, LoadedAdapter, own_torch_threads
from ftray.serving.generation_request import (
    GenerationRequest,
    OutputDelta,
    OutputDeltas,
    Rendering,
    output_tokens,
    prompt_tokens,
)
from ftray.task_spec import TaskSpec


class Replica(BaseReplica):
    """The deployment; see :class:`BaseReplica`. What answers for an adapter is its name in the engine."""

    def __init__(self, settings: dict[str, Any], model_path: str, threads: int):
        from ftray.serving.engine import Engine

        super().__init__(settings, model_path)
        self.engine = Engine(self.base, self.tokenizer, self.cfg.serving.slots)
        self.inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.outbox: dict[Callable[[list[OutputDelta]], None], list[OutputDelta]] = {}
        self._keys = itertools.count()
        self._own, self._renderings = Rendering(self.tokenizer, TaskSpec.read(Path(model_path))), dict[str, Rendering]()
        self._warned = set[str | None]()
        threading.Thread(target=self._run, args=(threads,), name="engine", daemon=True).start()

    def _run(self, threads: int) -> None:
        """The engine's thread: what others want of it, then a step, for ever; torch's `threads` are all for it."""
        own_torch_threads(threads)
        while True:
            try:
                _survived(self.inbox.get(block=not self.engine.busy))
                while True:
                    _survived(self.inbox.get_nowait())
            except queue.Empty:
                pass
            if error := _survived(self.engine.step):
                _survived(self.engine.give_up, error)
            for deliver, parts in self.outbox.items():
                _survived(deliver, parts)
            self.outbox.clear()

    async def _in_engine(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call in the engine's thread."""
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def settle(result: Any, error: Exception | None) -> None:
            if not done.done():
                done.set_exception(error) if error else done.set_result(result)

        def call() -> None:
            try:
                loop.call_soon_threadsafe(settle, function(*args), None)
            except Exception as error:
                loop.call_soon_threadsafe(settle, None, error)

        self.inbox.put(call)
        return await done

    async def _load(self, source: str) -> LoadedAdapter:
        from ftray.serving.adapters import load_adapter

        model = await asyncio.get_running_loop().run_in_executor(self._loader, load_adapter, self.base, source)
        key = f"{source} {next(self._keys)}"  # one that comes again is another
        prepared, rendering = self.engine.prepare(model), Rendering(self.tokenizer, model.trained_as)
        prepared.ends = rendering.ends
        await self._in_engine(self.engine.add, key, prepared)
        self._renderings[key] = rendering

        def forget(key: str) -> None:
            del self._renderings[key]
            self.inbox.put(lambda: self.engine.remove(key))

        return LoadedAdapter(key, forget)

    async def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        import torch

        if not any(thread.name == "engine" and thread.is_alive() for thread in threading.enumerate()):
            raise RuntimeError("the engine's thread has died")
        torch.zeros(1, device=self.base.device).item()  # raises on a GPU that an error has left unusable

    async def answer(self, job: GenerationRequest) -> AsyncIterator[OutputDeltas]:
        """The answers to `job`; whoever closes this iterator frees their slots."""
        yield OutputDeltas()
        try:
            rendering = await self._rendering(job)
        except UserError as error:
            yield OutputDeltas(refused=(400, str(error), "model"))
            return
        try:
            prompts = prompt_tokens(job, rendering.tokenizer, self.base.get_input_embeddings().num_embeddings)
            most = output_tokens(job, prompts, self.engine.max_length)
        except UserError as error:
            yield OutputDeltas(refused=(400, *error.args))
            return
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[list[OutputDelta]]()

        def deliver(parts: list[OutputDelta]) -> None:  # one object a job: its identity is the job's
            loop.call_soon_threadsafe(inbox.put_nowait, parts)

        sequences: list[Any] = []
        try:
            while True:
                try:
                    key = None
                    if job.adapter is not None:
                        key = await self.adapted(job.adapter, job.source)
                    sequences += await self._in_engine(self._submit, job, prompts, most, key, deliver)
                    break
                except KeyError:  # others have pushed it out again
                    continue
                except UserError as error:
                    yield OutputDeltas(refused=(400, str(error), "model"))
                    return
            warning = rendering.warning if job.messages is not None else None
            if warning and job.adapter not in self._warned:
                self._warned.add(job.adapter)
                logging.getLogger("ray.serve").warning("%s: %s", job.source or self.base.name_or_path, warning)
            yield OutputDeltas(prompt_tokens=sum(map(len, prompts)), warning=warning)
            left, kept = len(sequences), list[OutputDelta]()
            while left:
                parts = await inbox.get()
                while not inbox.empty():
                    parts = parts + inbox.get_nowait()
                left -= sum(part.finish is not None for part in parts)
                if job.stream:
                    yield OutputDeltas(parts)
                    continue
                if not kept:
                    yield OutputDeltas(answering=True)
                kept += parts
            if kept:
                yield OutputDeltas(kept)
        finally:
            self.inbox.put(lambda: self._cancel(sequences))

    async def _rendering(self, job: GenerationRequest) -> Rendering:
        """How the conversation of `job` is rendered: as its adapter was trained.

        Raises:
            UserError: the adapter can't be loaded.
        """
        while job.adapter is not None and job.messages is not None:
            with suppress(KeyError):  # others have pushed it out again
                return self._renderings[await self.adapted(job.adapter, job.source)]
        return self._own

    def _cancel(self, sequences: list[Any]) -> None:
        for sequence in sequences:
            self.engine.cancel(sequence)

    def _submit(
        self,
        job: GenerationRequest,
        prompts: list[list[int]],
        most: int,
        key: str | None,
        deliver: Callable[[list[OutputDelta]], None],
    ) -> list[Any]:
        from ftray.serving.engine import Sequence, SequenceDelta
        from ftray.serving.sampling import Sampling

        if key is not None and key not in self.engine.adapters:
            raise KeyError(key)
        sequences = []
        for choice, (prompt, i) in enumerate(itertools.product(prompts, range(job.n))):
            seed = job.sampling["seed"]
            own = {**job.sampling, "max_tokens": most, "seed": None if seed is None else (seed + i) % 2**63}

            def emit(piece: SequenceDelta, choice: int = choice, prompt: list[int] = prompt) -> None:
                self.outbox.setdefault(deliver, []).append(self._part(choice, piece, prompt, job))

            sequences.append(Sequence(prompt, Sampling(**own), emit, key))
        try:
            for sequence in sequences:
                self.engine.submit(sequence)
        except Exception:
            self._cancel(sequences)
            raise
        return sequences

    def _part(self, choice: int, piece: Any, prompt: list[int], job: GenerationRequest) -> OutputDelta:
        part = OutputDelta(choice, piece.text, count=len(piece.tokens) - piece.echoed, finish=piece.finish)
        if piece.echoed:
            part.text = self.tokenizer.decode(prompt, skip_special_tokens=True) + part.text
        if job.sampling["logprobs"] is not None:
            part.tokens = [(self._word(t.id), t.logprob, [(self._word(i), p) for i, p in t.top]) for t in piece.tokens]
        if piece.error:
            part.finish = f"error: {piece.error}"
        return part

    def _word(self, token: int) -> str:
        return self.tokenizer.decode([token])


def _survived(function: Callable[..., None], *args: Any) -> BaseException | None:
    """Call `function` where nothing may end the thread; returns what it raised, which is logged."""
    try:
        function(*args)
    except BaseException as error:  # tokenizers raise Rust's panics, which are no Exception
        logging.getLogger("ray.serve").exception("the engine goes on after an error")
        return error
    return None
