"""Continuous batching over one base model and many adapters; imports no Ray.

Each step reads the next token of every sequence that has a slot, and pieces of prompts, in one pass of
:class:`~ftray.multi_adapter.model_runner.ModelRunner`. transformers' own continuous batching supports no adapters. See
Orca (OSDI 2022).
"""

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from llguidance import LLMatcher
from peft import PeftModel
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from ftray.models.stops import answer_text, stop_tokens
from ftray.multi_adapter.model_runner import Chunk, ModelRunner
from ftray.multi_adapter.shared_linear import PackingUnsupported
from ftray.multi_adapter.shared_model import tuner_layers
from ftray.serving.generation_request import OutputDelta, Sampling, TokenLogprob
from ftray.serving.logits import adjusted
from ftray.serving.sampling import Text, choose, token_bytes, token_logprobs


@dataclass(eq=False)
class Sequence:
    """An answer that is being generated.

    Attributes:
        prompt: token ids.
        max_tokens: of the answer.
        emit: is called with each delta, in the thread that steps.
        adapter: its name; None: the base model.
        choice: index of the answer, for its deltas.
        matcher: follows the answer through the grammar that it conforms to; None: there is none.
        ids: prompt and the tokens chosen so far.
        cached: tokens of `ids` whose keys and values are kept.
        past: cache of a sequence that is read in passes of its own.
        echoed: log-probabilities of the prompt that have not been emitted yet.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    emit: Callable[[OutputDelta], None]
    adapter: str | None = None
    choice: int = 0
    matcher: LLMatcher | None = None
    ids: list[int] = field(init=False)
    cached: int = 0
    text: Text = field(init=False)
    generator: torch.Generator | None = None
    past: Cache | None = None
    echoed: list[TokenLogprob] = field(default_factory=list)
    done: bool = False

    def __post_init__(self) -> None:
        self.ids = list(self.prompt)

    @property
    def reads_prompt(self) -> bool:
        """No token of the answer has been chosen yet."""
        return len(self.ids) == len(self.prompt)


@dataclass
class EngineAdapter:
    """An adapter that sequences can name.

    Attributes:
        layers: its adapted layers, by their path in the base model.
        isolation_reason: why its sequences are read in passes of their own; None: they share one.
        can_cache: whether those passes may have a cache.
        ends: tokens that end its answers, in addition to those of the base.
        users: number of its sequences that are not done.
        leaving: whether it is removed when its last user is done.
    """

    model: PeftModel
    layers: dict[str, Any]
    isolation_reason: str | None
    can_cache: bool = False
    ends: frozenset[int] = frozenset()
    users: int = 0
    leaving: bool = False


class Engine:
    """Answers sequences, many at a time. One thread calls it; only :meth:`prepare` may run in others.

    Args:
        base: frozen causal language model; it is not changed.
        tokenizer: a fast one.
        slots: sequences answered at once; further ones wait.
        prompt_tokens: of all prompts, read in one step, so that answers under way don't wait for long prompts.

    Attributes:
        isolation_reason: why no sequences of this base can share a pass; None: they can.
        running: sequences that share a pass, each in the slot of its index here.
        isolated: sequences that are read in passes of their own.
        waiting: sequences without a slot.
    """

    def __init__(
        self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, slots: int = 16, prompt_tokens: int = 256
    ):
        self.base, self.tokenizer, self.slots, self.prompt_tokens = base, tokenizer, slots, prompt_tokens
        self.runner = ModelRunner(base, slots)
        self.isolation_reason, self.max_length = self.runner.isolation_reason, self.runner.max_length
        self.ends = frozenset(stop_tokens(tokenizer, base.config, base.generation_config))
        self.adapters: dict[str, EngineAdapter] = {}
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.isolated: list[Sequence] = []

    def prepare(self, model: PeftModel) -> EngineAdapter:
        """What :meth:`add` takes, made of a PEFT model over a :func:`~ftray.multi_adapter.shared_model.share` of it."""
        layers, reason = dict[str, Any](), self.isolation_reason
        if not reason:
            try:
                layers = tuner_layers(model, self.base)
                reason = self.runner.adapter_obstacle(model, layers)
            except PackingUnsupported as error:
                reason = str(error)
        if reason:
            return EngineAdapter(model, {}, reason, self.runner.can_cache and self.runner.caches(model))
        return EngineAdapter(model, layers, None)

    def add(self, name: str, adapter: EngineAdapter) -> None:
        """Make an adapter available to sequences, as `name`."""
        self.runner.add(name, adapter.model, adapter.layers)
        self.adapters[name] = adapter

    def remove(self, name: str) -> None:
        """Forget an adapter as soon as the last sequence that names it is done."""
        adapter = self.adapters[name]
        adapter.leaving = True
        if adapter.users == 0:
            self.runner.remove(name, adapter.layers)
            del self.adapters[name]

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            KeyError: its adapter is not here.
            ValueError: prompt and answer are too long for the model, or the prompt is empty.
        """
        if not sequence.prompt:
            raise ValueError("the prompt has no tokens")
        if len(sequence.prompt) + sequence.max_tokens > self.max_length:
            raise ValueError(
                f"{len(sequence.prompt)} prompt tokens and {sequence.max_tokens} of the answer are more than "
                f"the model's {self.max_length}"
            )
        adapter = None if sequence.adapter is None else self.adapters[sequence.adapter]
        sequence.text = Text(self.tokenizer, sequence.prompt, sequence.sampling.stop)
        if sequence.sampling.temperature > 0:
            sequence.generator = torch.Generator(self.base.device)
            if sequence.sampling.seed is None:
                sequence.generator.seed()
            else:
                sequence.generator.manual_seed(sequence.sampling.seed)
        if adapter:
            adapter.users += 1
        self.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Stop answering; the slot is free from the next step on."""
        if not sequence.done:
            self._release(sequence)

    @property
    def busy(self) -> bool:
        """Whether any sequence is waiting or being answered."""
        return bool(self.waiting or self.running or self.isolated)

    @torch.no_grad()
    def step(self) -> None:
        """Choose the next token of every sequence that has a slot and whose prompt is read to its end."""
        self._fill_slots()
        if self.running:
            self._step_shared()
        for sequence in list(self.isolated):
            try:
                self._step_isolated(sequence)
            except Exception as error:  # an adapter that fails ends its own sequences alone
                self._fail(sequence, error)

    def give_up(self, error: BaseException) -> None:
        """End all sequences, after a step failed for a reason that is not any one sequence's."""
        for sequence in [*self.running, *self.isolated, *self.waiting]:
            self._fail(sequence, error)

    def _fill_slots(self) -> None:
        while self.waiting and len(self.running) + len(self.isolated) < self.slots:
            sequence = self.waiting.popleft()
            adapter = self.adapters.get(sequence.adapter or "")
            reason = adapter.isolation_reason if adapter else self.isolation_reason
            (self.isolated if reason else self.running).append(sequence)

    def _step_shared(self) -> None:
        budget = self.prompt_tokens
        plan: list[tuple[Sequence, Chunk]] = []
        for sequence in self.running:
            left = len(sequence.ids) - sequence.cached
            count = min(left, max(1, budget))
            budget -= count if left > 1 else 0
            plan.append((sequence, self._chunk(sequence, count)))
        plan.sort(key=lambda part: part[0].adapter or "")
        try:
            rows = self._read(plan)
        except Exception as error:
            if len(plan) == 1:
                self._fail(plan[0][0], error)
            else:
                self._step_one_by_one([(sequence, len(chunk.ids)) for sequence, chunk in plan])
            return
        self._advance(rows)

    def _step_one_by_one(self, counts: list[tuple[Sequence, int]]) -> None:
        """Repeat a step that failed, for one sequence after another, and end those that fail by themselves."""
        for sequence, count in counts:
            try:
                rows = self._read([(sequence, self._chunk(sequence, count))])
            except Exception as error:
                self._fail(sequence, error)
            else:
                self._advance(rows)

    def _step_isolated(self, sequence: Sequence) -> None:
        adapter = self.adapters[sequence.adapter] if sequence.adapter else None
        model, can_cache = (adapter.model, adapter.can_cache) if adapter else (None, self.runner.can_cache)
        logits, sequence.past = self.runner.read_isolated(
            model, sequence.ids, sequence.cached, sequence.past, can_cache
        )
        sequence.cached = len(sequence.ids)
        self._advance([(sequence, logits.float())])

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        """The next `count` tokens of a running sequence."""
        ids = sequence.ids[sequence.cached : sequence.cached + count]
        return Chunk(self.running.index(sequence), sequence.adapter, sequence.cached, ids)

    def _read(self, plan: list[tuple[Sequence, Chunk]]) -> list[tuple[Sequence, torch.Tensor]]:
        """The float32 logits that each sequence needs, [tokens, vocabulary]; those that need none are left out.

        Where this raises, no sequence has changed.
        """
        hidden = self.runner.hidden_states([chunk for _, chunk in plan])
        needed, first = [], 0
        for sequence, chunk in plan:
            end = first + len(chunk.ids)
            if sequence.sampling.echo and sequence.sampling.logprobs is not None and sequence.reads_prompt:
                needed.append(range(first, end))
            elif chunk.cached + len(chunk.ids) == len(sequence.ids):
                needed.append(range(end - 1, end))
            else:
                needed.append(range(0))
            first = end
        chosen = [place for places in needed for place in places]
        rows: Iterable[torch.Tensor] = [hidden[:0]] * len(plan)
        if chosen:
            logits = self.runner.logits(hidden[torch.tensor(chosen, device=hidden.device)]).float()
            rows = logits.split([len(places) for places in needed])
        for sequence, chunk in plan:
            sequence.cached += len(chunk.ids)
        return [(sequence, part) for (sequence, _), part in zip(plan, rows, strict=True) if len(part)]

    def _advance(self, rows: list[tuple[Sequence, torch.Tensor]]) -> None:
        """Choose a token for each sequence that is read to its end; `rows` holds the logits of its newest tokens."""
        ready = []
        for sequence, logits in rows:
            try:
                if sequence.sampling.echo and sequence.reads_prompt:
                    self._echo(sequence, logits)
                if sequence.cached == len(sequence.ids):
                    if not logits[-1].sum().isfinite():
                        raise FloatingPointError("the model's output is not finite")
                    own, count = logits[-1:], len(sequence.prompt)
                    weighed = adjusted(own, sequence.ids, count, sequence.sampling, sequence.matcher)
                    ready.append((sequence, own, weighed))
            except Exception as error:
                self._fail(sequence, error)
        if not ready:
            return
        sequences = [s for s, *_ in ready]
        weighed = torch.cat([row for *_, row in ready])
        chosen = choose(weighed, [s.sampling for s in sequences], [s.generator for s in sequences])
        for (sequence, logits, _), token in zip(ready, chosen, strict=True):
            try:
                if isinstance(token, Exception):
                    raise token
                self._append(sequence, token, logits)
            except Exception as error:
                self._fail(sequence, error)

    def _echo(self, sequence: Sequence, logits: torch.Tensor) -> None:
        """Keep the log-probabilities of the part of the prompt that the rows of `logits` predict."""
        prompt, alternatives = sequence.prompt, sequence.sampling.logprobs
        if alternatives is None:
            return
        if not sequence.echoed:
            sequence.echoed = [TokenLogprob(token_bytes(self.tokenizer, prompt[0]))]
        start = len(sequence.echoed)
        following = prompt[start : start + len(logits)]  # the prompt's last row predicts the answer
        if following:
            sequence.echoed += token_logprobs(logits[: len(following)], following, alternatives, self.tokenizer)

    def _append(self, sequence: Sequence, token: int, logits: torch.Tensor) -> None:
        """Add `token`, chosen by `logits` [1, vocabulary], to the answer, and emit what is certain now."""
        sampling = sequence.sampling
        delta = OutputDelta(sequence.choice, tokens=sequence.echoed)
        sequence.echoed = []
        if sampling.echo and sequence.reads_prompt:
            delta.text = answer_text(self.tokenizer, sequence.prompt, ())
        if sequence.max_tokens == 0:
            self._finish(sequence, delta, "length")
            return
        if sampling.logprobs is not None:
            delta.tokens += token_logprobs(logits, [token], sampling.logprobs, self.tokenizer)
        sequence.ids.append(token)
        delta.count = 1
        if token in self.ends or (sequence.adapter and token in self.adapters[sequence.adapter].ends):
            delta.text += sequence.text.end()
            self._finish(sequence, delta, "stop")
            return
        delta.text += sequence.text.add(token)
        whole = False
        if sequence.matcher is not None:
            sequence.matcher.consume_token(token)
            if sequence.matcher.is_error():
                raise ValueError(f"the grammar of the answer: {sequence.matcher.get_error()}")
            whole = sequence.matcher.is_stopped()  # nothing may follow but an end
        full = len(sequence.ids) - len(sequence.prompt) == sequence.max_tokens
        if full or whole:
            delta.text += sequence.text.end()
        if sequence.text.stopped or whole:
            self._finish(sequence, delta, "stop")
        elif full:
            self._finish(sequence, delta, "length")
        else:
            sequence.emit(delta)

    def _finish(self, sequence: Sequence, delta: OutputDelta, reason: Literal["stop", "length"]) -> None:
        """End a sequence with its last delta."""
        self._release(sequence)
        delta.finish = reason
        sequence.emit(delta)

    def _fail(self, sequence: Sequence, error: BaseException) -> None:
        """End a sequence that can't continue; all others do."""
        if not sequence.done:
            if sequence in self.running:  # its keys and values may not be finite: no other sequence may read them
                slot = self.running.index(sequence)
                self.runner.clear(slice(slot, slot + 1))
            self._release(sequence)
            self.runner.clear(slice(len(self.running), None))
        with suppress(Exception):  # a caller that can't be reached either is gone
            sequence.emit(OutputDelta(sequence.choice, finish="error", error=f"{type(error).__name__}: {error}"))

    def _release(self, sequence: Sequence) -> None:
        """Take a sequence out: its slot and its adapter are free for others."""
        sequence.done, sequence.past = True, None
        if sequence in self.running:
            slot, last = self.running.index(sequence), len(self.running) - 1
            if slot != last:  # slots in use stay adjacent
                mover = self.running[slot] = self.running[last]
                self.runner.move(last, slot, mover.cached)
            self.running.pop()
        elif sequence in self.isolated:
            self.isolated.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence.adapter is not None:
            adapter = self.adapters[sequence.adapter]
            adapter.users -= 1
            if adapter.leaving:
                self.remove(sequence.adapter)
