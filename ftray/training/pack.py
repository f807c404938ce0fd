"""Many adapters over one frozen base model, trained together; each gets what it would get alone.

Plain PyTorch, PEFT and transformers. One model runs the rows of all adapters as one batch; adapters share no weight,
so one backward pass gives every one its own gradient. See PLoRA (arXiv 2508.02932) and mLoRA (2312.02515).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel

from ftray.compat.torch import add
from ftray.compat.transformers import attention_of
from ftray.models import probe
from ftray.models.next_token import padded, padding_mask, supervised_tokens
from ftray.multi_adapter import attention
from ftray.multi_adapter.dropout import DropoutRNG
from ftray.multi_adapter.head_loss import HeadLoss
from ftray.multi_adapter.shared_linear import AdapterSegments, PackingUnsupported, SharedLinear, update_of
from ftray.multi_adapter.shared_model import out_of_memory, shared_model, train_mode, trainable, tuner_layers
from ftray.task_spec import IGNORE, task_of
from ftray.training.adalora import orthogonality

Batch = Mapping[str, torch.Tensor]
Unit = tuple[str, int, Batch]  # adapter, micro-batch of its step, rows


class AdapterOptimizer(Protocol):
    """What makes a step of an adapter out of its gradients."""

    def apply(self, gradients: list[torch.Tensor], step: int) -> None:
        """Take `gradients`, in the order of the adapter's trainable parameters; `step` counts from 0."""


@dataclass
class TorchOptimizer:
    """Clipping, optimiser and schedule in one process, by torch alone.

    Attributes:
        clip_norm: of this adapter's gradient; 0: no clipping.
    """

    model: PeftModel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None
    clip_norm: float = 0.0

    def apply(self, gradients: list[torch.Tensor], step: int) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if self.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        self.optimizer.step()
        if self.schedule:
            self.schedule.step()
        if hasattr(self.model.base_model, "update_and_allocate"):  # AdaLoRA
            self.model.base_model.update_and_allocate(step)
        self.optimizer.zero_grad()


@dataclass
class Member:
    """One adapter of a pack.

    Attributes:
        layers: its adapted layers, by their path in the base model.
        parameters: those that are trained.
        step: optimiser steps made.
        isolation_reason: why its rows go through a model of its own, by themselves; None: they share the batch.
    """

    model: PeftModel
    update: AdapterOptimizer
    rng: DropoutRNG
    layers: dict[str, BaseTunerLayer]
    parameters: list[nn.Parameter]
    step: int
    isolation_reason: str | None


@dataclass(frozen=True)
class StepResult:
    """What a step came to, over all ranks.

    Attributes:
        loss: summed over the supervised tokens, nats.
        failure: why the adapter has left the pack, unharmed its mates; None: it goes on.
    """

    loss: float
    supervised: int
    tokens: int
    failure: str | None


class Pack:
    """The adapters that train together on `base`.

    Args:
        base: frozen model, its parameters are shared, it is not changed itself.
        tokens: rows of one forward and backward pass; an adapter's micro-batch is never cut in two.
        rank, world_size: of data-parallel processes, each with a pack of the same adapters.
        sum_over_ranks: element-wise.
        longest: tokens that a record may have; None: any number.

    Attributes:
        padded: each record has a row of its own in the batch, as the model does not keep records of one row apart.
        isolation_reason: why no adapter of this model can share a batch; None: they can.
        verdict: how records share a pass, and why not otherwise; one line for the log.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokens: int = 2**16,
        rank: int = 0,
        world_size: int = 1,
        sum_over_ranks: Callable[[list[float]], list[float]] = list,
        longest: int | None = None,
    ):
        self.base, self.tokens, self.rank, self.world_size = base, tokens, rank, world_size
        self.task = task_of(base).load()
        self.members: dict[str, Member] = {}
        self._sum = sum_over_ranks
        self._rows = AdapterSegments()
        self._layout: list[attention.Layout] = []  # one, of the row at hand
        self._probed: dict[Any, str | None] = {}  # what was found of adapters that change the model alike
        self.padded = False
        self.host = self._host()
        if self.task.packed:
            self.isolation_reason = self._settle(longest)
        else:
            self.isolation_reason = self.verdict = f"{self.task.spec.name} pads its records"

    def _host(self) -> Any:
        implementation = attention_of(self.base.config) if self.padded else attention.NAME
        shared = shared_model(self.base, implementation, layout=self._layout)
        for module in shared.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # the base draws nothing: a draw over all rows would tie trials to their mates
        return shared

    def _settle(self, longest: int | None) -> str | None:
        """Find out how records share a pass: in one row, else padded; returns why neither gives what each gets alone.

        See :mod:`ftray.models.probe`.
        """
        self._records = probe.probe_records(self.base, longest)
        reasons: list[str] = []
        head = self._agreed(lambda: probe.head_obstacle(self.base.eval(), self._records[0]))
        for self.padded in (False, True):
            self.host = self._host()
            reason = head or self._agreed(self._obstacle)
            if not reason:
                self.verdict = f"records are padded: {reasons[0]}" if self.padded else "records lie packed in one row"
                return None
            reasons.append(reason)
        self.verdict = f"each adapter trains by itself: {reasons[1]}"
        return f"{type(self.base).__name__}: {reasons[1]}"

    def _agreed(self, find: Callable[[], str | None]) -> str | None:
        """What `find` finds in the way; it counts if it does on any rank, an exception counts too."""
        try:
            reason = find()
        except Exception as error:
            reason = probe.reason_of(error)
        elsewhere = self._sum([float(reason is not None)])[0] > 0
        return reason or ("another worker's pass differs" if elsewhere else None)

    @torch.enable_grad()
    def _obstacle(self) -> str | None:
        """Why the base's records don't get in a pass of the host what each gets alone; None: they do."""
        dtype = self.base.dtype
        self._alone, wanted = probe.alone(self.base.eval(), self._records)
        self.host.eval()
        with torch.no_grad():
            again = self._probe_pass("", probe.other_first(self._records))
        with probe.embedded(self.host) as embeddings:
            logits = self._probe_pass("", self._records)
        if reason := probe.leak(logits, again, dtype):
            return reason
        (gradient,) = torch.autograd.grad(self._probe_loss(logits), embeddings[0])
        flat = gradient.flatten(0, 1)
        flat = flat if self._rows.places is None else flat[self._rows.places]
        return probe.wrong_logits(logits, self._alone, dtype) or probe.wrong_gradients(
            flat.split([len(ids) for ids in self._records]), wanted, dtype
        )

    def _probe_pass(self, owner: str, records: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Logits of `records` [tokens, vocabulary], in a pass of the host: all but the first are rows of `owner`."""
        lengths = [len(ids) for ids in records]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        segments = [("", 0, lengths[0]), (owner, lengths[0], sum(lengths))]
        hidden = self._hidden(torch.cat(list(records))[None], positions, segments)
        return list(self.host.get_output_embeddings()(hidden).split(lengths))

    def _probe_loss(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([probe.token_loss(*pair) for pair in zip(logits, self._records, strict=True)]).sum()

    def add(self, name: str, model: PeftModel, update: AdapterOptimizer, seed: int = 0, step: int = 0) -> str | None:
        """Let an adapter join.

        Args:
            model: PEFT model over a :func:`share` of the base, adapter in float32.
            update: makes its steps; see :class:`TorchOptimizer`.
            seed: of its dropout.
            step: optimiser steps that it has made before.

        Returns:
            None; or why its rows can't share a batch: it then trains on the same base by itself, between the others.

        Raises:
            PackingUnsupported: not even by itself do its records get what each of them gets alone.
        """
        rng, apart, layers = DropoutRNG(model, seed, self.rank), self.isolation_reason, {}
        if not apart:
            try:
                layers = tuner_layers(model, self.base)
            except PackingUnsupported as error:
                apart = str(error)
        for path, layer in layers.items():
            place = self.host.get_submodule(path)
            if not isinstance(place, SharedLinear):
                place = SharedLinear(place, self._rows)
                self.host.set_submodule(path, place)
            place.join(name, layer, rng)
        self.members[name] = Member(model.eval(), update, rng, layers, trainable(model), step, apart)
        if not apart and (reason := self._adapter_obstacle(name)):
            self.remove(name)
            rng = DropoutRNG(model, seed, self.rank)
            apart = reason
            self.members[name] = Member(model.eval(), update, rng, {}, trainable(model), step, apart)
        if apart and self.task.packed and (reason := self._adapter_obstacle(name)):
            self.remove(name)
            raise PackingUnsupported(f"can't be trained on batches of several records: {reason}")
        return apart

    def _adapter_obstacle(self, name: str) -> str | None:
        """As :meth:`_obstacle`, for records of an adapter that is moved off its start, after one of nobody.

        Adapters of one kind run the same code: the first of each is tried.
        """
        member = self.members[name]
        layers = ((path, type(layer), update_of(layer, member.rng, 0) is None) for path, layer in member.layers.items())
        kind = member.model.active_peft_config.peft_type, member.isolation_reason, tuple(layers)
        if kind not in self._probed:
            with probe.moved(member.parameters), torch.enable_grad():
                find = self._differs_apart if member.isolation_reason else self._differs_shared
                self._probed[kind] = self._agreed(lambda: find(member, name))
        return self._probed[kind]

    def _differs_shared(self, member: Member, name: str) -> str | None:
        self.host.eval()
        own = range(1, len(self._records))
        wanted, gradients = probe.alone_adapter(member.model, [self._records[i] for i in own], member.parameters)
        logits = self._probe_pass(name, self._records)
        expected = [self._alone[0], *wanted]
        loss = torch.stack([probe.token_loss(logits[i], self._records[i]) for i in own]).sum()
        ours = torch.autograd.grad(loss, member.parameters, allow_unused=True, materialize_grads=True)
        return probe.wrong_logits(logits, expected, self.base.dtype) or probe.wrong_gradients(
            ours, gradients, self.base.dtype
        )

    def _differs_apart(self, member: Member, name: str) -> str | None:
        wanted, gradients = probe.alone_adapter(member.model, self._records, member.parameters)
        columns = {"input_ids": self._records, "labels": self._records}
        batch = {key: tensor.to(self.base.device) for key, tensor in self.task.collate(columns).items()}
        loss = self.task.loss(member.model, batch)
        ours = torch.autograd.grad(loss, member.parameters, allow_unused=True, materialize_grads=True)
        alone = sum(float(probe.token_loss(*pair)) for pair in zip(wanted, self._records, strict=True))
        if not abs(loss.item() - alone) <= probe.TOLERANCE[self.base.dtype][0] * abs(alone):
            return f"their loss is {loss.item():.6g}, one by one {alone:.6g}"
        return probe.wrong_gradients(ours, gradients, self.base.dtype)

    def remove(self, name: str) -> PeftModel:
        """Let an adapter go; its model works by itself."""
        member = self.members.pop(name)
        member.rng.end()
        for path in member.layers:
            self.host.get_submodule(path).leave(name)
        return member.model

    def step(self, batches: Mapping[str, Sequence[Batch]]) -> dict[str, StepResult]:
        """One optimiser step of every adapter in `batches`.

        Args:
            batches: this rank's micro-batches of each, as :meth:`ftray.tasks.task.Task.collate` makes them. An
                adapter's loss is the mean over the supervised tokens of all its micro-batches on all ranks.

        Returns:
            An adapter whose loss or gradient is no longer finite has a `failure`, keeps the weights that it had
            before this step and is no member any more.

        Out of memory, passes are made smaller by halves; an adapter of which one micro-batch alone is too much fails,
        and the others step as if it had not been there. So does one whose update is too much, in a single process.
        """
        names = list(batches)
        local = [float(n) for name in names for n in _count(self.task, batches[name])]
        counts = {n: (int(s), int(t)) for n, s, t in zip(names, *_columns(self._sum(local), 2), strict=True)}
        # gradients are averaged over ranks: undo it, so that the mean is over all supervised tokens
        weights = {n: self.world_size / max(1, counts[n][0]) for n in names}
        before = self.tokens
        losses, gradients, exhausted = self._in_memory(lambda: self._gradients(batches, weights))
        if exhausted and self.tokens < before:  # they were the reason: the others step as if those were not there
            self.tokens = before
            others = {name: own for name, own in batches.items() if name not in exhausted}
            again = self._in_memory(lambda: self._gradients(others, weights))
            losses, gradients, exhausted = losses | again[0], gradients | again[1], exhausted | again[2]
        local = []
        for name in names:
            square = get_total_norm(gradients[name]).double().square().item()
            local += [losses[name], square, float(name in exhausted)]
        stepped = {}
        for name, loss, square, ran_out in zip(names, *_columns(self._sum(local), 3), strict=True):
            member, failure = self.members[name], None
            if ran_out:
                failure = f"out of memory: one micro-batch at step {member.step + 1}"
            elif not math.isfinite(loss):
                failure = f"diverged: loss is {loss} at step {member.step + 1}"
            elif not math.isfinite(square):
                failure = f"diverged: gradient is not finite at step {member.step + 1}"
            if not failure:
                try:
                    member.update.apply(gradients.pop(name), member.step)
                    member.step += 1
                except RuntimeError as error:
                    if not out_of_memory(error) or self.world_size > 1:  # other ranks may wait in a collective
                        raise
                    failure = f"out of memory: the update of step {member.step + 1}"
            if failure:
                self.remove(name)
            stepped[name] = StepResult(loss, *counts[name], failure)
        return stepped

    def _in_memory(self, attempt: Callable[[], Any]) -> Any:
        """What `attempt` makes, in passes of as many tokens as the memory has room for."""
        while True:
            try:
                return attempt()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            self.tokens //= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _gradients(
        self, batches: Mapping[str, Sequence[Batch]], weights: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[str, list[torch.Tensor]], set[str]]:
        """Summed loss, and gradient of `weights` times it (and of the method's own penalty), of each adapter.

        The third result names those of which a micro-batch alone is too much for the memory.

        Raises:
            RuntimeError: a pass of several adapters is; see :func:`out_of_memory`.
        """
        exhausted: set[str] = set()
        if not self.host.training:
            train_mode(self.host)
        losses, gradients = dict.fromkeys(batches, 0.0), {}
        for name in batches:
            if not self.members[name].model.training:
                train_mode(self.members[name].model)
            gradients[name] = _penalty_gradient(self.members[name].model)
        for units in self._passes([(n, i, batch) for n, own in batches.items() for i, batch in enumerate(own)]):
            for name, micro_batch, _ in units:
                rng = self.members[name].rng
                rng.step, rng.micro_batch = self.members[name].step, micro_batch
            parameters = {name: self.members[name].parameters for name, *_ in units}
            every = [p for own in parameters.values() for p in own]
            try:
                total, parts = self._loss(units, [weights[name] for name, *_ in units])
                flat = iter(torch.autograd.grad(total, every, allow_unused=True))
            except RuntimeError as error:
                if len(units) > 1 or not out_of_memory(error):
                    raise
                exhausted.add(units[0][0])
                continue
            for (name, own), part in zip(parameters.items(), parts, strict=True):
                losses[name] += part
                new = [g if g is not None else torch.zeros_like(p) for p in own for g in [next(flat)]]
                gradients[name] = add(gradients[name], new) if gradients[name] else new
        return losses, gradients, exhausted

    @torch.no_grad()
    def losses(self, names: Sequence[str], batch: Batch) -> list[float | None]:
        """The loss of each of the named adapters on this rank's `batch`, summed over its supervised tokens.

        None where the batch of that adapter alone is too much for the memory.
        """
        self.host.eval()
        for name in names:
            if self.members[name].model.training:
                self.members[name].model.eval()

        def attempt() -> list[float | None]:
            found: list[float | None] = []
            for units in self._passes([(name, 0, batch) for name in names]):
                try:
                    found += self._loss(units, [1.0] * len(units))[1]
                except RuntimeError as error:
                    if len(units) > 1 or not out_of_memory(error):
                        raise
                    found.append(None)
            return found

        before = self.tokens
        found = self._in_memory(attempt)
        if None in found:
            self.tokens = before
        return found

    def _passes(self, units: list[Unit]) -> Iterator[list[Unit]]:
        """All units, in order, as many to a pass as its tokens allow; never two of one adapter, none with one apart."""
        while units:
            now: list[Unit] = []
            later: list[Unit] = []
            size = 0
            for unit in units:
                tokens = unit[2]["input_ids"].numel()
                full = now and (size + tokens > self.tokens or self.members[unit[0]].isolation_reason)
                if full or any(unit[0] == name for name, *_ in (*now, *later)):
                    later.append(unit)
                else:
                    now.append(unit)
                    size += tokens if not self.members[unit[0]].isolation_reason else self.tokens
            yield now
            units = later

    def _loss(self, units: list[Unit], weights: list[float]) -> tuple[torch.Tensor, list[float]]:
        """The weighted sum of the units' losses, and each one's loss summed over its supervised tokens."""
        if self.members[units[0][0]].isolation_reason:
            rows = {name: tensor.to(self.base.device) for name, tensor in units[0][2].items()}
            loss = self.task.loss(self.members[units[0][0]].model, rows)
            return loss * weights[0], [loss.item()]
        row = {k: torch.cat([batch[k] for *_, batch in units], 1) for k in ("input_ids", "position_ids", "labels")}
        ends = [0, *accumulate(batch["input_ids"].numel() for *_, batch in units)]
        segments = [(name, *place) for (name, *_), place in zip(units, pairwise(ends), strict=True)]
        targets = row["labels"][0, 1:]  # a record's first label is -100: no target reaches across records
        positions = (targets != IGNORE).nonzero().squeeze(1)
        counts = [supervised_tokens(batch) for *_, batch in units]
        hidden = self._hidden(row["input_ids"], row["position_ids"], segments)
        total, losses = HeadLoss.apply(
            hidden[positions.to(hidden.device)],
            self.host.get_output_embeddings(),
            targets[positions].to(hidden.device),
            torch.tensor(weights).repeat_interleave(torch.tensor(counts)).to(hidden.device),
        )
        return total, [part.double().sum().item() for part in losses.split(counts)]

    def _hidden(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, segments: list[tuple[str, int, int]]
    ) -> torch.Tensor:
        """What the head is given, [T, hidden size], for a packed row [1, T] of which each adapter has its span."""
        ids, positions = input_ids.to(self.base.device), position_ids.to(self.base.device)
        if not self.padded:
            self._rows.set(segments)
            self._layout[:] = [attention.layout(position_ids, self.base.device)]
            return self.host.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0]
        mask = padding_mask(positions)
        self._rows.set(segments, mask)
        inputs = {"input_ids": padded(ids, mask, 0), "attention_mask": mask}
        hidden = self.host.base_model(**inputs, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, self._rows.places)


def _penalty_gradient(model: PeftModel) -> list[torch.Tensor]:
    """Gradient of what a method adds to the loss by itself (AdaLoRA); empty if it adds nothing."""
    if not hasattr(model.base_model, "update_and_allocate"):
        return []
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    factors = [p for n, p in named if "lora_A" in n or "lora_B" in n]
    penalty = model.active_peft_config.orth_reg_weight * orthogonality(factors)
    found = torch.autograd.grad(penalty, [p for _, p in named], allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, (_, p) in zip(found, named, strict=True)]


def _count(task: Any, micro_batches: Sequence[Batch]) -> tuple[int, int]:
    return sum(task.num_targets(b) for b in micro_batches), sum(task.tokens(b) for b in micro_batches)


def _columns(values: list[float], width: int) -> list[list[float]]:
    return [values[column::width] for column in range(width)]
