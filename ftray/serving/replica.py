"""One copy of the base model with its engine: a Ray Serve deployment that answers what the endpoint hands on."""

import asyncio
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from ftray.config import UserError
from ftray.serving.host import Host, Loaded


@dataclass(frozen=True)
class Job:
    """A request as a replica takes it.

    Attributes:
        prompts: text or tokens of each prompt; or one conversation.
        n: answers to each prompt; answer i of prompt p is choice p * n + i.
        adapter, source: id and place of the adapter; None: the base model.
        sampling: as :class:`ftray.serving.sampling.Sampling`; `max_tokens` None: as many as may be.
        stream: give parts as they come, not all at the end.
        max_prompt_tokens, max_output_tokens: what is more is refused.
    """

    prompts: list[str] | list[list[int]]
    messages: list[dict[str, str]] | None
    n: int
    adapter: str | None
    source: str | None
    sampling: dict[str, Any]
    stream: bool
    max_prompt_tokens: int
    max_output_tokens: int


@dataclass
class Part:
    """What is new of one choice. Tokens are (text, log-probability, likeliest (text, log-probability))."""

    choice: int
    text: str = ""
    tokens: list[tuple[str, float | None, list[tuple[str, float]]]] = field(default_factory=list)
    count: int = 0  # tokens of the answer
    finish: str | None = None


@dataclass
class Parts:
    """What a replica sends: first the prompts' tokens, then parts; or why there is nothing to expect."""

    parts: list[Part] = field(default_factory=list)
    prompt_tokens: int | None = None
    refused: tuple[int, str, str | None] | None = None  # status, reason, field


class Replica(Host):
    """The deployment; see :class:`Host`. What answers for an adapter is its name in the engine."""

    def __init__(self, settings: dict[str, Any], model_path: str, threads: int):
        from ftray.serving.engine import Engine

        super().__init__(settings, model_path, threads)
        self.engine = Engine(self.base, self.tokenizer, self.cfg.serving.slots)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outbox: dict[Callable[[list[Part]], None], list[Part]] = {}
        self._keys = itertools.count()
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def _run(self) -> None:
        """The engine's thread: what others want of it, then a step, for ever."""
        while True:
            try:
                self._inbox.get(block=not self.engine.busy)()
                while True:
                    self._inbox.get_nowait()()
            except queue.Empty:
                pass
            self.engine.step()
            for deliver, parts in self._outbox.items():
                deliver(parts)
            self._outbox.clear()

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

        self._inbox.put(call)
        return await done

    async def _load(self, source: str) -> Loaded:
        from ftray.serving.adapters import load_adapter

        model = await asyncio.to_thread(load_adapter, self.base, source)
        key = f"{source} {next(self._keys)}"  # one that comes again is another
        await self._in_engine(self.engine.add, key, self.engine.prepare(model))
        return Loaded(key, lambda key: self._inbox.put(lambda: self.engine.remove(key)))

    async def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if not any(thread.name == "engine" and thread.is_alive() for thread in threading.enumerate()):
            raise RuntimeError("the engine's thread has died")

    async def answer(self, job: Job) -> AsyncIterator[Parts]:
        """The answers to `job`; whoever closes this iterator frees their slots."""
        try:
            prompts = self._tokens(job)
            most = self._limit(job, prompts)
        except UserError as error:
            yield Parts(refused=(400, *error.args))
            return
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[list[Part]]()

        def deliver(parts: list[Part]) -> None:  # one object a job: its identity is the job's
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
                    yield Parts(refused=(400, str(error), "model"))
                    return
            yield Parts(prompt_tokens=sum(map(len, prompts)))
            left, kept = len(sequences), []
            while left:
                parts = await inbox.get()
                while not inbox.empty():
                    parts = parts + inbox.get_nowait()
                left -= sum(part.finish is not None for part in parts)
                if job.stream:
                    yield Parts(parts)
                else:
                    kept += parts
            if kept:
                yield Parts(kept)
        finally:
            self._inbox.put(lambda: self._cancel(sequences))

    def _cancel(self, sequences: list[Any]) -> None:
        for sequence in sequences:
            self.engine.cancel(sequence)

    def _tokens(self, job: Job) -> list[list[int]]:
        from jinja2 import TemplateError

        if job.messages is not None:
            if not self.tokenizer.chat_template:
                raise UserError("the model has no chat template: use /v1/completions", "messages")
            try:
                rendered = self.tokenizer.apply_chat_template(job.messages, add_generation_prompt=True, tokenize=False)
            except TemplateError as error:
                raise UserError(f"the model's chat template refuses these messages: {error}", "messages") from None
            return [self.tokenizer(rendered, add_special_tokens=False)["input_ids"]]
        words = self.base.get_input_embeddings().num_embeddings
        result = []
        for prompt in job.prompts:
            ids = list(self.tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else prompt
            if not ids:
                raise UserError("a prompt has no tokens", "prompt")
            if any(not 0 <= token < words for token in ids):
                raise UserError(f"prompt tokens must be from 0 to {words - 1}", "prompt")
            result.append(ids)
        return result

    def _limit(self, job: Job, prompts: list[list[int]]) -> int:
        """How many tokens each answer may have.

        Raises:
            UserError: more than there may be.
        """
        where = "prompt" if job.messages is None else "messages"
        longest, answers = max(map(len, prompts)), len(prompts) * job.n
        allowed = min(job.max_prompt_tokens, self.engine.max_length)
        if longest > allowed:
            raise UserError(f"the prompt has {longest} tokens; {allowed} are allowed", where)
        room, share = self.engine.max_length - longest, job.max_output_tokens // answers
        most = job.sampling["max_tokens"]
        if most is None:
            most = min(room, share)
        if most > share:
            raise UserError(
                f"max_tokens {most} for each of {answers} answers: {job.max_output_tokens} are allowed in all",
                "max_tokens",
            )
        if most > room:
            raise UserError(
                f"{longest} prompt tokens and {most} of the answer are more than the model's {self.engine.max_length}",
                "max_tokens",
            )
        return most

    def _submit(
        self, job: Job, prompts: list[list[int]], most: int, key: str | None, deliver: Callable[[list[Part]], None]
    ) -> list[Any]:
        from ftray.serving.engine import Piece, Sequence
        from ftray.serving.sampling import Sampling

        if key is not None and key not in self.engine.adapters:
            raise KeyError(key)
        sequences = []
        for choice, (prompt, i) in enumerate(itertools.product(prompts, range(job.n))):
            seed = job.sampling["seed"]
            own = {**job.sampling, "max_tokens": most, "seed": None if seed is None else (seed + i) % 2**63}

            def emit(piece: Piece, choice: int = choice, prompt: list[int] = prompt) -> None:
                self._outbox.setdefault(deliver, []).append(self._part(choice, piece, prompt, job))

            sequences.append(Sequence(prompt, Sampling(**own), emit, key))
        for sequence in sequences:
            self.engine.submit(sequence)
        return sequences

    def _part(self, choice: int, piece: Any, prompt: list[int], job: Job) -> Part:
        part = Part(choice, piece.text, count=len(piece.tokens) - piece.echoed, finish=piece.finish)
        if piece.echoed:
            part.text = self.tokenizer.decode(prompt, skip_special_tokens=True) + part.text
        if job.sampling["logprobs"] is not None:
            part.tokens = [(self._word(t.id), t.logprob, [(self._word(i), p) for i, p in t.top]) for t in piece.tokens]
        if piece.error:
            part.finish = f"error: {piece.error}"
        return part

    def _word(self, token: int) -> str:
        return self.tokenizer.decode([token])
