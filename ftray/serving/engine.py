"""Continuous batching over one base model and many adapters; imports no Ray.

Every step runs one flat row of tokens, as a training pack does (:mod:`ftray.multi_adapter.shared_linear`): the next
token of each sequence that is being answered, and pieces of the prompts of those that have just joined. Sequences lie
sorted by adapter, so that each adapter has one span. transformers' own continuous batching knows no adapters. See Orca
(OSDI 2022), Punica (arXiv 2310.18547) and S-LoRA (2311.03285).
"""

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ftray.models.probe import head_obstacle, probe_records, reason_of, tolerance, wrong_logits
from ftray.models.stops import stop_tokens
from ftray.multi_adapter import kv_cache
from ftray.multi_adapter.dropout import DropoutRNG
from ftray.multi_adapter.served_linear import ServedLinear, ServedSegments
from ftray.multi_adapter.shared_linear import PackingUnsupported
from ftray.multi_adapter.shared_model import shared_model, tuner_layers
from ftray.serving.sampling import Sampling, Text, Token, choose, scored


@dataclass(frozen=True)
class SequenceDelta:
    """What a step adds to an answer.

    Attributes:
        text: that is certain now.
        tokens: chosen in this step; with `echo` those of the prompt come before the first.
        echoed: how many of `tokens` are the prompt's.
        finish: "stop", "length" or, of a sequence that could not go on, "error"; None: it goes on.
        error: why it could not.
    """

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None
    echoed: int = 0


@dataclass(eq=False)
class Sequence:
    """One answer in the making.

    Attributes:
        adapter: its name; None: the base model.
        emit: called with each piece, in the thread that steps.
        ids: prompt and what has been chosen so far.
        cached: tokens of `ids` whose keys and values are kept.
    """

    prompt: list[int]
    sampling: Sampling
    emit: Callable[[SequenceDelta], None]
    adapter: str | None = None
    ids: list[int] = field(init=False)
    cached: int = 0
    text: Text = field(init=False)
    generator: torch.Generator | None = None
    past: Any = None  # cache of a sequence that can't share a batch
    echoed: list[Token] = field(default_factory=list)
    done: bool = False

    def __post_init__(self) -> None:
        self.ids = list(self.prompt)


Part = tuple[Sequence, int, list[int]]  # what a step reads of a sequence, in which slot


@dataclass
class EngineAdapter:
    """One adapter that can be asked.

    Attributes:
        layers: its adapted layers, by their path in the base model.
        isolation_reason: why its sequences run by themselves; None: they share the batch.
        ends: tokens that end its answers, beside those of the base.
        users: sequences that are not done.
    """

    model: PeftModel
    layers: dict[str, Any]
    isolation_reason: str | None
    ends: frozenset[int] = frozenset()
    users: int = 0
    leaving: bool = False


class Engine:
    """Answers sequences, many at a time. One thread calls it; only :meth:`prepare` may run in others.

    Args:
        base: frozen causal language model; it is not changed.
        tokenizer: a fast one.
        slots: sequences answered at once; further ones wait.
        prompt_tokens: of all prompts, read in one step; answers that are being given go on between.

    Attributes:
        isolation_reason: why no sequence of this base can share a batch; None: they can.
        caches: whether a sequence by itself may be read with a cache.
    """

    def __init__(self, base: PreTrainedModel, tokenizer: Any, slots: int = 16, prompt_tokens: int = 256):
        self.base, self.tokenizer, self.slots, self.prompt_tokens = base.eval(), tokenizer, slots, prompt_tokens
        self.adapters: dict[str, EngineAdapter] = {}
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # each in the slot of its place here
        self.alone: list[Sequence] = []
        self.ends = set(stop_tokens(tokenizer, base.config, base.generation_config))
        self.max_length = int(getattr(base.config.get_text_config(), "max_position_embeddings", 0) or 2**31)
        self._rows, self._step = ServedSegments(), []  # type: tuple[ServedSegments, list[kv_cache.Step]]
        self.host = shared_model(base, kv_cache.NAME, step=self._step)
        self._cache = kv_cache.slotted_cache(base.config.get_text_config().num_hidden_layers, slots, self._step)
        self.isolation_reason = self._obstacle()
        self.caches = self._caches()

    @torch.no_grad()
    def _obstacle(self) -> str | None:
        """Why sequences that share a batch don't get what the base says of each alone; None: they do.

        A few are read side by side, each in two pieces and a last token: see :mod:`ftray.models.probe`.
        """
        name = type(self.base).__name__
        kinds = set(getattr(self.base.config.get_text_config(), "layer_types", None) or ["full_attention"])
        if kinds - {"full_attention", "sliding_attention"}:
            return f"{name} has layers of {', '.join(sorted(kinds))}"
        records = [record[: self.max_length] for record in probe_records(self.base, self.max_length)[-self.slots :]]
        sequences = [Sequence(record.tolist(), Sampling(), lambda piece: None) for record in records]
        read: list[list[torch.Tensor]] = [[] for _ in sequences]
        try:
            wanted = [self.base(input_ids=r[None].to(self.base.device), use_cache=False).logits[0] for r in records]
            reason = head_obstacle(self.base, records[0])
            for cut in (lambda n: n // 3, lambda n: n - 1, lambda n: n):
                plan = [(s, slot, s.ids[s.cached : cut(len(s.ids))]) for slot, s in enumerate(sequences)]
                parts = self._hidden(plan).split([len(ids) for *_, ids in plan])
                for (sequence, slot, ids), hidden in zip(plan, parts, strict=True):
                    sequence.cached += len(ids)
                    read[slot].append(hidden)
            ours = [self.host.get_output_embeddings()(torch.cat(pieces)) for pieces in read]
            reason = reason or wrong_logits(ours, wanted, tolerance(self.base))
        except Exception as error:
            reason = reason_of(error)
        self._clear(slice(None))
        return f"{name}: {reason}" if reason else None

    @torch.no_grad()
    def _caches(self) -> bool:
        """Whether the base, with a cache, says of a sequence token by token what it says of the whole."""
        record = probe_records(self.base, 1)[1]
        ids = record[None].to(self.base.device)
        try:
            wanted = self.base(input_ids=ids, use_cache=False).logits[0]
            past, ours = None, []
            for first, end in (
                (0, len(record) - 2),
                (len(record) - 2, len(record) - 1),
                (len(record) - 1, len(record)),
            ):
                out = self.base(input_ids=ids[:, first:end], past_key_values=past, use_cache=True)
                past, part = out.past_key_values, out.logits[0]
                ours.append(part)
        except Exception:
            return False
        return not wrong_logits([torch.cat(ours)], [wanted], tolerance(self.base))

    def prepare(self, model: PeftModel) -> EngineAdapter:
        """What :meth:`add` takes, of a PEFT model over a :func:`~ftray.multi_adapter.shared_model.share` of it."""
        if self.isolation_reason:
            return EngineAdapter(model, {}, self.isolation_reason)
        try:
            return EngineAdapter(model, tuner_layers(model, self.base), None)
        except PackingUnsupported as error:
            return EngineAdapter(model, {}, str(error))

    def add(self, name: str, adapter: EngineAdapter) -> None:
        """Let sequences ask for `name` from now on."""
        rng = DropoutRNG(adapter.model, 0)
        for path, layer in adapter.layers.items():
            place = self.host.get_submodule(path)
            if not isinstance(place, ServedLinear):
                place = ServedLinear(place, self._rows)
                self.host.set_submodule(path, place)
            place.join(name, layer, rng)
        self.adapters[name] = adapter

    def remove(self, name: str) -> None:
        """Forget an adapter as soon as the last sequence that asked for it is done."""
        adapter = self.adapters[name]
        adapter.leaving = True
        if adapter.users == 0:
            for path in adapter.layers:
                self.host.get_submodule(path).leave(name)
            del self.adapters[name]

    def submit(self, sequence: Sequence) -> None:
        """Put a sequence in line.

        Raises:
            KeyError: its adapter is not here.
            ValueError: prompt and answer are too long for the model, or the prompt is empty.
        """
        if not sequence.prompt:
            raise ValueError("the prompt has no tokens")
        if len(sequence.prompt) + sequence.sampling.max_tokens > self.max_length:
            raise ValueError(
                f"{len(sequence.prompt)} prompt tokens and {sequence.sampling.max_tokens} of the answer are more than "
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
        """Stop answering; its slot is free from the next step on."""
        if not sequence.done:
            self._finish(sequence)

    @property
    def busy(self) -> bool:
        """Is there anything to do?"""
        return bool(self.waiting or self.running or self.alone)

    @torch.no_grad()
    def step(self) -> None:
        """The next token of every sequence that has a slot and whose prompt is read."""
        while self.waiting and len(self.running) + len(self.alone) < self.slots:
            sequence = self.waiting.popleft()
            adapter = self.adapters.get(sequence.adapter or "")
            (self.alone if (adapter.isolation_reason if adapter else self.isolation_reason) else self.running).append(
                sequence
            )
        if self.running:
            self._shared_step()
        for sequence in list(self.alone):
            try:
                self._step_alone(sequence)
            except Exception as error:  # a method that fails harms its own sequences alone
                self._fail(sequence, error)

    def give_up(self, error: BaseException) -> None:
        """End all sequences: a step failed that was none of theirs."""
        for sequence in [*self.running, *self.alone, *self.waiting]:
            self._fail(sequence, error)

    def _shared_step(self) -> None:
        budget, plan = self.prompt_tokens, []
        for slot, sequence in enumerate(self.running):
            left = len(sequence.ids) - sequence.cached
            count = min(left, max(1, budget))
            budget -= count if left > 1 else 0
            plan.append((sequence, slot, sequence.ids[sequence.cached : sequence.cached + count]))
        plan.sort(key=lambda part: part[0].adapter or "")
        try:
            rows = self._read(plan)
        except Exception as error:
            if len(plan) == 1:
                self._fail(plan[0][0], error)
            else:
                self._find_fault([(sequence, ids) for sequence, _, ids in plan])
            return
        self._advance(rows)

    def _find_fault(self, parts: list[tuple[Sequence, list[int]]]) -> None:
        """A step failed: make it again for one sequence after another, and end those that fail by themselves."""
        for sequence, ids in parts:
            try:
                rows = self._read([(sequence, self.running.index(sequence), ids)])
            except Exception as error:
                self._fail(sequence, error)
            else:
                self._advance(rows)

    def _read(self, plan: list[Part]) -> list[tuple[Sequence, torch.Tensor]]:
        """Logits of each sequence that is read so far as to need them; where this raises, nothing has changed."""
        hidden = self._hidden(plan)
        positions, first = [], 0
        for sequence, _, ids in plan:
            whole = (
                sequence.sampling.echo
                and sequence.sampling.logprobs is not None
                and len(sequence.ids) == len(sequence.prompt)
            )
            end = first + len(ids)
            if whole:
                positions.append(range(first, end))
            elif sequence.cached + len(ids) == len(sequence.ids):
                positions.append(range(end - 1, end))
            else:
                positions.append(range(0))
            first = end
        chosen = [place for places in positions for place in places]
        rows: Iterable[torch.Tensor] = [hidden[:0]] * len(plan)
        if chosen:
            logits = self.host.get_output_embeddings()(hidden[torch.tensor(chosen, device=hidden.device)]).float()
            rows = logits.split([len(places) for places in positions])
        for sequence, _, ids in plan:
            sequence.cached += len(ids)
        return [(sequence, part) for (sequence, *_), part in zip(plan, rows, strict=True) if len(part)]

    def _advance(self, rows: list[tuple[Sequence, torch.Tensor]]) -> None:
        """Choose a token for each sequence that is read to its end; `rows` holds the logits of its newest tokens."""
        ready = []
        for sequence, logits in rows:
            try:
                if sequence.sampling.echo and len(sequence.ids) == len(sequence.prompt):
                    self._echo(sequence, logits)
                if sequence.cached == len(sequence.ids):
                    if not logits[-1].sum().isfinite():
                        raise FloatingPointError("the model's output is not finite")
                    ready.append((sequence, logits[-1:]))
            except Exception as error:
                self._fail(sequence, error)
        if not ready:
            return
        sequences = [s for s, _ in ready]
        last = torch.cat([logits for _, logits in ready])
        chosen = choose(last, [s.sampling for s in sequences], [s.generator for s in sequences])
        for sequence, logits, token in zip(sequences, last.split(1), chosen, strict=True):
            wanted = sequence.sampling.logprobs
            try:
                if isinstance(token, Exception):
                    raise token
                self._take(sequence, Token(token) if wanted is None else scored(logits, [token], wanted)[0])
            except Exception as error:
                self._fail(sequence, error)

    def _echo(self, sequence: Sequence, logits: torch.Tensor) -> None:
        prompt, wanted = sequence.prompt, sequence.sampling.logprobs
        if wanted is None:
            sequence.echoed = [Token(token) for token in prompt]
            return
        if not sequence.echoed:
            sequence.echoed = [Token(prompt[0])]
        following = prompt[
            len(sequence.echoed) : len(sequence.echoed) + len(logits)
        ]  # the last row predicts the answer
        if following:
            sequence.echoed += scored(logits[: len(following)], following, wanted)

    def _take(self, sequence: Sequence, token: Token) -> None:
        before, sequence.echoed = sequence.echoed, []

        def piece(text: str = "", finish: str | None = None, new: tuple[Token, ...] = (token,)) -> SequenceDelta:
            return SequenceDelta(text, [*before, *new], finish, echoed=len(before))

        if sequence.sampling.max_tokens == 0:
            self._finish(sequence, piece(finish="length", new=()))
            return
        sequence.ids.append(token.id)
        if token.id in self.ends or (sequence.adapter and token.id in self.adapters[sequence.adapter].ends):
            self._finish(sequence, piece(sequence.text.end(), "stop"))
            return
        text = sequence.text.add(token.id)
        if not sequence.text.stopped and len(sequence.ids) - len(sequence.prompt) == sequence.sampling.max_tokens:
            text += sequence.text.end()
            self._finish(sequence, piece(text, "stop" if sequence.text.stopped else "length"))
        elif sequence.text.stopped:
            self._finish(sequence, piece(text, "stop"))
        else:
            sequence.emit(piece(text))

    def _finish(self, sequence: Sequence, piece: SequenceDelta | None = None) -> None:
        sequence.done, sequence.past = True, None
        if sequence in self.running:
            slot, last = self.running.index(sequence), len(self.running) - 1
            if slot != last:  # slots in use stay side by side
                mover = self.running[slot] = self.running[last]
                for layer in self._cache.layers:
                    if layer.is_initialized:
                        layer.move(last, slot, mover.cached)
            self.running.pop()
        elif sequence in self.alone:
            self.alone.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence.adapter is not None:
            adapter = self.adapters[sequence.adapter]
            adapter.users -= 1
            if adapter.leaving:
                self.remove(sequence.adapter)
        if piece:
            sequence.emit(piece)

    def _fail(self, sequence: Sequence, error: BaseException) -> None:
        """End a sequence that could not go on; its neighbours do."""
        if not sequence.done:
            if sequence in self.running:  # what it left may not be finite: nobody may read it
                slot = self.running.index(sequence)
                self._clear(slice(slot, slot + 1))
            self._finish(sequence)
            self._clear(slice(len(self.running), None))
        with suppress(Exception):  # who can't be told either is gone
            sequence.emit(SequenceDelta(finish="error", error=f"{type(error).__name__}: {error}"))

    def _clear(self, slots: slice) -> None:
        for layer in self._cache.layers:
            if layer.is_initialized:
                layer.clear(slots)

    def _hidden(self, plan: list[Part]) -> torch.Tensor:
        """What the head is given, [T, hidden size], for the new tokens of each; their slots lie side by side."""
        device, lowest = self.base.device, min(slot for _, slot, _ in plan)
        ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        prompts: list[tuple[int, int, int, int]] = []
        last, lengths = [0] * len(plan), [0] * len(plan)
        segments: list[tuple[str, int, int]] = []
        for sequence, slot, new in plan:
            first, end = len(ids), len(ids) + len(new)
            name = sequence.adapter or ""  # the base model's name: no layer has a member of that
            if segments and segments[-1][0] == name:
                segments[-1] = (name, segments[-1][1], end)
            else:
                segments.append((name, first, end))
            if len(new) > 1:
                prompts.append((slot, first, end, sequence.cached))
            ids += new
            slots += [slot] * len(new)
            positions += range(sequence.cached, sequence.cached + len(new))
            last[slot - lowest], lengths[slot - lowest] = end - 1, sequence.cached + len(new)
        self._rows.set(segments)
        where = torch.tensor(positions, device=device)
        self._step[:] = [
            kv_cache.Step(
                torch.tensor(slots, device=device),
                where,
                prompts,
                torch.tensor(last, device=device),
                torch.tensor(lengths, device=device),
                max(lengths),
                lowest,
            )
        ]
        inputs = {"input_ids": torch.tensor([ids], device=device), "position_ids": where[None]}
        return self.host.base_model(**inputs, past_key_values=self._cache, use_cache=True).last_hidden_state[0]

    def _step_alone(self, sequence: Sequence) -> None:
        """As a shared step, by the adapter's own model and with a cache of its own."""
        model: Any = self.adapters[sequence.adapter].model if sequence.adapter else self.base
        new = torch.tensor([sequence.ids[sequence.cached :]], device=self.base.device)
        if (
            self.caches
            and sequence.cached
            and isinstance(model, PeftModel)
            and model.active_peft_config.is_prompt_learning
        ):
            model = model.get_base_model()  # virtual tokens are in the cache already
        if not self.caches:  # then all of it is read anew for each token
            new = torch.tensor([sequence.ids], device=self.base.device)
            out = model(input_ids=new)
        else:
            out = model(input_ids=new, past_key_values=sequence.past, use_cache=True)
            sequence.past = out.past_key_values
        sequence.cached = len(sequence.ids)
        self._advance([(sequence, out.logits[0, -new.shape[1] :].float())])
