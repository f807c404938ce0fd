"""One copy of the base model with its engine: a Ray Serve deployment that answers what the endpoint sends."""

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ftray.errors import UserError
from ftray.runtime.threads import own_torch_threads
from ftray.serving.admission import Admission
from ftray.serving.base_replica import BaseReplica, LoadedAdapter
from ftray.serving.errors import APIError, invalid
from ftray.serving.generation_request import (
    GenerationRequest,
    OutputDelta,
    OutputDeltas,
    Rendering,
    output_tokens,
    prompt_tokens,
)
from ftray.task_spec import TaskSpec

if TYPE_CHECKING:  # takes seconds, and the driver makes no replica
    from llguidance import LLMatcher

    from ftray.serving.engine import Sequence

TOLD_SECONDS = 0.002  # after which a message has left this process, and a step that ends it can't keep it back
Result = TypeVar("Result")
DeltaCallback = Callable[[list[OutputDelta]], None]


class Replica(BaseReplica):
    """The deployment; see :class:`BaseReplica`. An adapter is known by its name in the engine."""

    def __init__(self, settings: dict[str, Any], model_path: str, threads: int):
        from ftray.serving.engine import Engine
        from ftray.serving.logits import Grammars

        super().__init__(settings, model_path)
        self.engine = Engine(self.base, self.tokenizer, self.cfg.serving.slots)
        self.grammars = Grammars(self.tokenizer, self.base.get_input_embeddings().num_embeddings)
        self.inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.outbox: dict[DeltaCallback, list[OutputDelta]] = {}  # what a step gave, by request
        self._admission = Admission(self.cfg.serving.slots)
        self._keys = itertools.count()
        self._rendering_of_base = Rendering(self.tokenizer, TaskSpec.read(Path(model_path)))
        self._renderings: dict[str, Rendering] = {}  # of loaded adapters, by their name in the engine
        self._warned: set[str | None] = set()  # adapters of which the log has a warning
        self._thread = threading.Thread(target=self._run, args=(threads,), name="engine", daemon=True)
        self._thread.start()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[OutputDeltas]:
        """The answers to `request`; closing this iterator frees their slots."""
        loads = request.adapter is not None and request.adapter not in self._kept
        if loads:
            yield OutputDeltas(begun=True)
        try:
            rendering = await self._rendering(request)
            if loads:
                yield OutputDeltas(begun=False)
            prompts = prompt_tokens(request, rendering, self.base.get_input_embeddings().num_embeddings)
            max_tokens = output_tokens(request, prompts, self.engine.max_length)
            matcher = await self._matcher(request, rendering)
        except APIError as error:
            yield OutputDeltas(refused=error)
            return
        except UserError as error:
            yield OutputDeltas(refused=invalid(str(error), "model"))
            return
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[list[OutputDelta]]()

        def deliver(deltas: list[OutputDelta]) -> None:  # a function of its own for each request: it is a key
            loop.call_soon_threadsafe(inbox.put_nowait, deltas)

        sequences: list[Sequence] = []
        taken = await self._admission.enter(len(prompts) * request.n)
        try:
            yield OutputDeltas(begun=True)
            await asyncio.sleep(TOLD_SECONDS)
            try:
                await self._submit(request, prompts, max_tokens, matcher, deliver, sequences)
            except UserError as error:
                yield OutputDeltas(refused=invalid(str(error), "model"))
                return
            warning, calls = self._warn(request, rendering), rendering.calls(request)
            yield OutputDeltas(prompt_tokens=sum(map(len, prompts)), warning=warning, calls=calls)
            left, kept = len(sequences), list[OutputDelta]()
            while left:
                deltas = await inbox.get()
                while not inbox.empty():
                    deltas = deltas + inbox.get_nowait()
                left -= sum(delta.finish is not None for delta in deltas)
                if left < taken:
                    self._admission.leave(taken - left)
                    taken = left
                if request.stream:
                    yield OutputDeltas(deltas)
                else:
                    kept += deltas
            if kept:
                yield OutputDeltas(kept)
        finally:
            self.inbox.put(lambda: self._cancel(sequences))
            self._admission.leave(taken)

    async def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        import torch

        if not self._thread.is_alive():
            raise RuntimeError("the engine's thread has died")
        torch.zeros(1, device=self.base.device).item()  # raises on a GPU that an error has left unusable

    async def _load(self, source: str) -> LoadedAdapter:
        from ftray.serving.adapters import load_adapter

        loop = asyncio.get_running_loop()
        model, trained_as = await loop.run_in_executor(self._loader, load_adapter, self.base, source)
        key = f"{source} {next(self._keys)}"  # the same source, loaded again, is another adapter
        prepared, rendering = self.engine.prepare(model), Rendering(self.tokenizer, trained_as)
        prepared.ends = rendering.ends
        await self._in_engine(self.engine.add, key, prepared)
        self._renderings[key] = rendering

        def forget(key: str) -> None:
            del self._renderings[key]
            self.inbox.put(lambda: self.engine.remove(key))

        return LoadedAdapter(key, forget)

    async def _matcher(self, request: GenerationRequest, rendering: Rendering) -> "LLMatcher | None":
        """What follows the answers through the grammar that they conform to; None: they have none.

        Raises:
            APIError: an answer can't be held to what is asked for.
        """
        schema, ends = request.sampling.schema, self.engine.ends | rendering.ends
        field = "response_format" if schema else "tools"
        try:
            if schema:
                return await asyncio.to_thread(self.grammars.of_schema, schema, ends)
            if request.must_call:
                functions = [tool["function"] for tool in request.tools]
                functions = [function for function in functions if function["name"] in request.must_call]
                form = rendering.calls(request)
                if form is None:
                    reason = "the model's chat template writes calls in a form that is not known: give 'auto' or 'none'"
                    raise invalid(f"tool_choice: {reason}", "tool_choice")
                return await asyncio.to_thread(self.grammars.of_calls, form, functions, request.one_call, ends)
        except ValueError as error:
            raise invalid(f"{field}: {error}", field) from None
        return None

    async def _rendering(self, request: GenerationRequest) -> Rendering:
        """How a request is rendered: as its adapter was trained.

        Raises:
            UserError: the adapter can't be loaded.
        """
        while request.adapter is not None:
            key = str(await self.loaded(request.adapter, request.source))
            with suppress(KeyError):  # it was evicted again for other adapters
                return self._renderings[key]
        return self._rendering_of_base

    def _warn(self, request: GenerationRequest, rendering: Rendering) -> str | None:
        """The warning for whoever asked; the log has it once for each adapter."""
        warning = rendering.warnings(request)
        if warning and request.adapter not in self._warned:
            self._warned.add(request.adapter)
            logging.getLogger("ray.serve").warning("%s: %s", request.source or self.base.name_or_path, warning)
        return warning

    async def _submit(
        self,
        request: GenerationRequest,
        prompts: list[list[int]],
        max_tokens: int,
        matcher: "LLMatcher | None",
        deliver: DeltaCallback,
        submitted: list["Sequence"],
    ) -> None:
        """Queue the sequences of a request, after loading their adapter unless it is in memory.

        Args:
            submitted: each sequence is appended as soon as it is queued, for a caller that is cancelled in between.

        Raises:
            UserError: the adapter can't be loaded.
        """
        while True:
            key = None if request.adapter is None else await self.loaded(request.adapter, request.source)
            try:
                await self._in_engine(self._enqueue, request, prompts, max_tokens, matcher, key, deliver, submitted)
                return
            except KeyError:  # it was evicted again for other adapters
                continue

    def _enqueue(
        self,
        request: GenerationRequest,
        prompts: list[list[int]],
        max_tokens: int,
        matcher: "LLMatcher | None",
        key: str | None,
        deliver: DeltaCallback,
        submitted: list["Sequence"],
    ) -> None:
        """What :meth:`_submit` does in the engine's thread.

        Raises:
            KeyError: the adapter is no longer here.
        """
        from ftray.serving.engine import Sequence

        if key is not None and key not in self.engine.adapters:
            raise KeyError(key)

        def emit(delta: OutputDelta) -> None:
            self.outbox.setdefault(deliver, []).append(delta)

        for choice, (prompt, i) in enumerate(itertools.product(prompts, range(request.n))):
            sampling = request.sampling
            if sampling.seed is not None:
                sampling = replace(sampling, seed=(sampling.seed + i) % 2**63)
            if sampling.repetition_penalty is None and self.base.generation_config is not None:
                sampling = replace(sampling, repetition_penalty=self.base.generation_config.repetition_penalty)
            own = matcher and matcher.deep_copy()
            sequence = Sequence(prompt, max_tokens, sampling, emit, key, choice, own)
            self.engine.submit(sequence)
            submitted.append(sequence)

    def _cancel(self, sequences: list["Sequence"]) -> None:
        for sequence in sequences:
            self.engine.cancel(sequence)

    def _run(self, threads: int) -> None:
        """The engine's thread: calls that others put in, then a step, for ever. It may use torch's `threads` alone."""
        own_torch_threads(threads)
        while True:
            try:
                _survive(self.inbox.get(block=not self.engine.busy))
                while True:
                    _survive(self.inbox.get_nowait())
            except queue.Empty:
                pass
            if error := _survive(self.engine.step):
                _survive(self.engine.give_up, error)
            for deliver, deltas in self.outbox.items():
                _survive(deliver, deltas)
            self.outbox.clear()

    async def _in_engine(self, function: Callable[..., Result], *args: object) -> Result:
        """Call in the engine's thread."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()

        def settle(result: Result | None, error: Exception | None) -> None:
            if not done.done():
                done.set_exception(error) if error else done.set_result(result)

        def call() -> None:
            try:
                loop.call_soon_threadsafe(settle, function(*args), None)
            except Exception as error:
                loop.call_soon_threadsafe(settle, None, error)

        self.inbox.put(call)
        result: Result = await done
        return result


def _survive(function: Callable[..., None], *args: object) -> BaseException | None:
    """Call `function` where nothing may end the thread; returns what it raised, which is logged."""
    try:
        function(*args)
    except BaseException as error:  # tokenizers raise Rust's panics, which are not an Exception
        logging.getLogger("ray.serve").exception("the engine continues after an error")
        return error
    return None
