"""One pass over a base model for many sequences and many adapters; imports no Ray.

Every pass reads one flat row of tokens, as a training pack does (:mod:`ftray.multi_adapter.shared_linear`): the next
token of each sequence that is being answered, and pieces of the prompts of those that have just joined. Sequences are
sorted by adapter, so that each adapter has one span. See Punica (arXiv 2310.18547) and S-LoRA (2311.03285).
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.variants import calculate_alora_offsets
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ftray.models.probe import body, moved, probe_records, reason_of, tolerance, wrong_logits
from ftray.multi_adapter import kv_cache
from ftray.multi_adapter.dropout import DropoutRNG
from ftray.multi_adapter.output_head import output_head
from ftray.multi_adapter.packed_linear import WeightPacker
from ftray.multi_adapter.served_linear import ServedLinear, ServedSegments
from ftray.multi_adapter.shared_linear import update_of
from ftray.multi_adapter.shared_model import shared_model


@dataclass(frozen=True)
class Chunk:
    """The tokens of one sequence that a pass reads.

    Attributes:
        slot: of the cache, with the keys and values of the sequence.
        adapter: its name; None: the base model.
        cached: tokens of the sequence that earlier passes read.
        ids: the tokens that follow them.
    """

    slot: int
    adapter: str | None
    cached: int
    ids: list[int]


class ModelRunner:
    """Reads tokens with a base model and its adapters, and keeps the keys and values of what was read.

    Args:
        base: frozen causal language model; it is not changed.
        slots: sequences that one pass can read.

    Attributes:
        max_length: tokens that a sequence may have.
        isolation_reason: why no sequences of this base can share a pass; None: they can.
        can_cache: whether a sequence of the base in a pass of its own may be read with a cache.
    """

    def __init__(self, base: PreTrainedModel, slots: int):
        text = base.config.get_text_config()
        self.base, self.slots = base.eval(), slots
        most = int(getattr(text, "max_position_embeddings", 0) or 0)
        self.max_length = most if most > 0 else 2**31
        self._packer = WeightPacker(base)
        self._head: Any = base.get_output_embeddings()
        self._by_row: dict[str, bool] = {}  # by layer: whether each pass gives it one row a token
        self._probed: dict[object, str | None] = {}  # by kind of adapter: the obstacle found, if any
        self._probing = Lock()
        self.reset()
        self.isolation_reason = self._find_isolation_reason()
        self.can_cache = self.caches(None)

    def reset(self) -> None:
        """Forget all adapters and sequences."""
        self._segments = ServedSegments()
        self._step: list[kv_cache.Step] = []
        self._model = shared_model(self.base, kv_cache.slotted_attention(self._step))
        self._packer.pack(self._model)
        layers = self.base.config.get_text_config().num_hidden_layers
        self._cache = kv_cache.slotted_cache(layers, self.slots, self._step)

    def add(self, name: str, model: PeftModel, layers: dict[str, Any]) -> None:
        """Adapt the base's layers, by their path in `layers`, for the chunks of adapter `name`."""
        rng = DropoutRNG(model, 0)
        for path, layer in layers.items():
            ServedLinear.at(self._model, path, self._segments).join(name, layer, rng)

    def _layer_obstacle(self, paths: Iterable[str]) -> str | None:
        """Why an adapter of these layers of the base can't share a pass; None: it may."""
        others = [path for path in paths if not self._by_row.get(path)]
        return f"{others[0]} is not given one row for each token, or is not called at all" if others else None

    @torch.no_grad()
    def adapter_obstacle(self, model: PeftModel, layers: dict[str, Any]) -> str | None:
        """Why the answers of an adapter of these `layers` can't share passes; None: beside others they are its own.

        Its own model reads a few records one by one, a shared pass reads them beside one of the base. Adapters of one
        kind run the same code: only the first of each kind is tried. Passes under way, in another thread, go on.
        """
        if reason := self._layer_obstacle(layers):
            return reason
        if not all(p.isfinite().all() for p in _own_weights(layers)):
            return None  # nothing to compare: its answers will end with an error
        model.eval()
        rng = DropoutRNG(model, 0)
        changes = ((path, type(layer), update_of(layer, rng, 0) is None) for path, layer in layers.items())
        kind = model.active_peft_config.peft_type, tuple(changes)
        rng.end()
        with self._probing:
            if kind not in self._probed:
                self._probed[kind] = self._differs(model, layers)
        return self._probed[kind]

    def _differs(self, model: PeftModel, layers: dict[str, Any]) -> str | None:
        records, apart = self._probe_records()[:3], copy.copy(self)
        owners: list[str | None] = [None, *["adapter"] * (len(records) - 1)] if records[1:] else ["adapter"]
        try:
            with moved(_own_weights(layers)):  # a new adapter does nothing yet
                readers = [model if owner else self.base for owner in owners]
                ids = [record[None].to(self.base.device) for record in records]
                wanted = [r(input_ids=i, use_cache=False).logits[0] for r, i in zip(readers, ids, strict=True)]
                apart.reset()
                apart.add("adapter", model, layers)
                ours = apart.read_in_pieces(records, owners)
                return wrong_logits(ours, wanted, tolerance(self.base))
        except Exception as error:
            return reason_of(error)

    def remove(self, name: str, layers: dict[str, Any]) -> None:
        """Undo :meth:`add`."""
        for path in layers:
            self._model.get_submodule(path).leave(name)

    def hidden_states(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Read `chunks`, whose slots are adjacent; returns the head's input for their tokens, [T, hidden size]."""
        device, lowest = self.base.device, min(chunk.slot for chunk in chunks)
        ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        prompts: list[tuple[int, int, int, int]] = []
        last, lengths = [0] * len(chunks), [0] * len(chunks)
        segments: list[tuple[str, int, int]] = []
        for chunk in chunks:
            first, end = len(ids), len(ids) + len(chunk.ids)
            name = chunk.adapter or ""  # no layer has an adapter of that name
            if segments and segments[-1][0] == name:
                segments[-1] = (name, segments[-1][1], end)
            else:
                segments.append((name, first, end))
            if len(chunk.ids) > 1:
                prompts.append((chunk.slot, first, end, chunk.cached))
            ids += chunk.ids
            slots += [chunk.slot] * len(chunk.ids)
            length = chunk.cached + len(chunk.ids)
            positions += range(chunk.cached, length)
            last[chunk.slot - lowest], lengths[chunk.slot - lowest] = end - 1, length
        self._segments.set(segments)
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
        out = body(self._model)(**inputs, past_key_values=self._cache, use_cache=True)
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head makes of `hidden` [N, hidden size]: [N, vocabulary], in the model's dtype."""
        logits: torch.Tensor = self._head(hidden)
        return logits

    def move(self, source: int, target: int | slice, length: int) -> None:
        """Copy the first `length` tokens of one slot to another, or to several."""
        for layer in self._cache.layers:
            if layer.is_initialized:
                layer.move(source, target, length)

    def clear(self, slots: slice) -> None:
        """Zero the keys and values of these slots."""
        for layer in self._cache.layers:
            if layer.is_initialized:
                layer.clear(slots)

    def read_isolated(
        self, model: PeftModel | None, ids: list[int], cached: int, past: Cache | None, can_cache: bool
    ) -> tuple[torch.Tensor, Cache]:
        """Read one sequence in a pass of its own.

        Args:
            model: the adapter's; None: the base.
            ids: all tokens of the sequence.
            cached: how many of them `past` holds.
            past: the cache that the previous pass returned.
            can_cache: see :meth:`caches`.

        Returns:
            Logits in the model's dtype, [tokens read, vocabulary], and the cache.
        """
        reader: Any = model if model is not None else self.base
        offsets = {}
        if model is not None and getattr(model.active_peft_config, "alora_invocation_tokens", None):
            found = calculate_alora_offsets(model.peft_config, model.active_adapter, torch.tensor([ids]))
            offsets = {"alora_offsets": found}  # PEFT itself would look in `new` alone
        if not can_cache:  # all tokens are read again for each new one
            return reader(input_ids=torch.tensor([ids], device=self.base.device)).logits[0, -len(ids) :], None
        if cached and model is not None and model.active_peft_config.is_prompt_learning:
            reader = model.get_base_model()  # the cache holds the virtual tokens already
        new = torch.tensor([ids[cached:]], device=self.base.device)
        out = reader(input_ids=new, past_key_values=past, use_cache=True, **offsets)
        return out.logits[0, -new.shape[1] :], out.past_key_values

    @torch.no_grad()
    def _find_isolation_reason(self) -> str | None:
        """Why sequences that share a pass don't get what the base gives each alone; None: they do.

        A few are read side by side, each in two pieces and a last token: see :mod:`ftray.models.probe`.
        """
        name = type(self.base).__name__
        kinds = set(getattr(self.base.config.get_text_config(), "layer_types", None) or ["full_attention"])
        if kinds - {"full_attention", "sliding_attention"}:
            return f"{name} has layers of {', '.join(sorted(kinds))}"
        records = self._probe_records()
        try:
            wanted = [self.base(input_ids=r[None].to(self.base.device), use_cache=False).logits[0] for r in records]
            head, reason = output_head(self.base, records[0])
            self._head = self._packer.packed(head)
            with self._watched():
                ours = self.read_in_pieces(records, [None] * len(records))
            reason = reason or wrong_logits(ours, wanted, tolerance(self.base))
        except Exception as error:
            reason = reason_of(error)
        self.clear(slice(None))
        return f"{name}: {reason}" if reason else None

    def _probe_records(self) -> list[torch.Tensor]:
        return [record[: self.max_length] for record in probe_records(self.base, self.max_length)[-self.slots :]]

    def read_in_pieces(self, records: list[torch.Tensor], owners: Sequence[str | None]) -> list[torch.Tensor]:
        """The logits of each record, [tokens, vocabulary], by adapter; three passes read a piece of all of them."""
        read: list[list[torch.Tensor]] = [[] for _ in records]
        cached = [0] * len(records)
        for cut in (lambda n: n // 3, lambda n: n - 1, lambda n: n):
            chunks = [
                Chunk(slot, owners[slot], cached[slot], record[cached[slot] : cut(len(record))].tolist())
                for slot, record in enumerate(records)
            ]
            parts = self.hidden_states(chunks).split([len(chunk.ids) for chunk in chunks])
            for chunk, hidden in zip(chunks, parts, strict=True):
                cached[chunk.slot] += len(chunk.ids)
                read[chunk.slot].append(hidden)
        return [self.logits(torch.cat(pieces)) for pieces in read]

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Inside, layers are marked by whether each call gives them one row for each token of the pass."""

        def watch(path: str) -> Callable[..., None]:
            def mark(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                rows = inputs[0].numel() == self._segments.size * inputs[0].shape[-1]
                self._by_row[path] = rows and self._by_row.get(path, True)

            return mark

        linears = [(path, m) for path, m in self._model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
        hooks = [module.register_forward_pre_hook(watch(path)) for path, module in linears]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def caches(self, model: PeftModel | None) -> bool:
        """Whether an adapter's model, or the base, with a cache gives token by token what it gives for a whole text."""
        ids = probe_records(self.base, 1)[1].tolist()
        try:
            wanted, _ = self.read_isolated(model, ids, 0, None, False)
            past, cached, ours = None, 0, []
            for end in (len(ids) - 2, len(ids) - 1, len(ids)):
                logits, past = self.read_isolated(model, ids[:end], cached, past, True)
                cached = end
                ours.append(logits)
        except Exception:
            return False
        return not wrong_logits([torch.cat(ours)], [wanted], tolerance(self.base))


def _own_weights(layers: dict[str, Any]) -> list[nn.Parameter]:
    """The weights that an adapter has in its layers."""
    every = [item for layer in layers.values() for item in layer.named_parameters()]
    return [p for name, p in every if not name.startswith("base_layer.") and p.is_floating_point()]
