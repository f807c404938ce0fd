"""Many adapters on one frozen base model, trained together, with the same results as each alone.

Plain PyTorch, PEFT and transformers. One model runs the rows of all adapters as one batch. Adapters share no weight,
so one backward pass gives each its own gradient. See PLoRA (arXiv 2508.02932) and mLoRA (2312.02515).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice, pairwise
from typing import Any, Literal, TypeVar

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel

from ftray.compat.torch import add, out_of_memory
from ftray.models import probe
from ftray.models.next_token import SHARES, TARGETS, packed_row, padded, padding_mask, supervised_tokens, token_losses
from ftray.models.sharding import is_sharded, one_pass, whole
from ftray.multi_adapter import attention, fused_attention
from ftray.multi_adapter.dropout import DropoutRNG
from ftray.multi_adapter.output_head import HeadLoss, OutputHead, output_head
from ftray.multi_adapter.replicas import Replica, replicas_of, share_out, side_by_side, threads_of
from ftray.multi_adapter.shared_linear import AdapterSegments, PackingUnsupported, SharedLinear, update_of
from ftray.multi_adapter.shared_model import shared_model, train_mode, trainable, tuner_layers
from ftray.runtime.threads import one_torch_thread
from ftray.task_spec import IGNORE, TaskSpec
from ftray.tasks.objective import PREFIXES, Objective, text_sums
from ftray.training.adalora import orthogonality
from ftray.training.optimizer import AdapterOptimizer

Batch = Mapping[str, torch.Tensor]
Result = TypeVar("Result")
KERNELS = {fused_attention.varlen: ", by FlashAttention", fused_attention.flex_rows: ", by FlexAttention"}
SUPERVISED = Objective()
Counts = tuple[float, ...]  # of a step: targets, then what the objective counts
Unit = tuple[str, int, Batch]  # adapter, micro-batch of its step, rows


@dataclass
class PackedAdapter:
    """One adapter of a pack.

    Attributes:
        layers: its adapted layers, by their path in the base model.
        parameters: its trained parameters.
        step: optimiser steps made.
        isolation_reason: why its rows can't share a batch and go through its own model; None: they share the batch.
        objective: what it minimises.
        layer_kinds: path and class of each adapted layer, and whether it changes rows in a way of its own.
    """

    model: PeftModel
    update: AdapterOptimizer
    rng: DropoutRNG
    layers: dict[str, BaseTunerLayer]
    parameters: list[nn.Parameter]
    step: int
    isolation_reason: str | None
    objective: Objective
    layer_kinds: tuple[tuple[str, type, bool], ...]

    @cached_property
    def shares_generator(self) -> bool:
        """Whether some of its layers in the batch draw from the generator that all threads share."""
        return bool(self.layers) and any(own for *_, own in self.layer_kinds)


@dataclass(frozen=True)
class StepResult:
    """The result of a step, over all ranks.

    Attributes:
        loss: summed over the targets of its task, as supervised tokens or pairs.
        failure: why the adapter was removed from the pack; None: it was not. The others are unaffected.
    """

    loss: float
    targets: int
    tokens: int
    failure: str | None


class Pack:
    """Adapters that train together on `base`.

    Args:
        base: frozen model; its parameters are shared, and the model itself is not changed. Where ranks share its
            weights out (:mod:`ftray.models.sharding`), they make the same passes of the same adapters.
        task: what it was loaded for.
        tokens: most tokens of one forward and backward pass; an adapter's micro-batch is never split.
        rank, world_size: of data-parallel processes, each with a pack of the same adapters.
        sum_over_ranks: sums lists of numbers element-wise over ranks.
        longest: most tokens of a record; None: any number.

    Attributes:
        padded: whether each record has its own row in the batch, as the model mixes records of one row.
        shares_prefixes: whether the attention lets tokens belong to several records.
        isolation_reason: why no adapter of this model can share a batch; None: they can.
        verdict: how records share a pass, and why; one line for the log.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        task: TaskSpec,
        tokens: int = 2**16,
        rank: int = 0,
        world_size: int = 1,
        sum_over_ranks: Callable[[list[float]], list[float]] = list,
        longest: int | None = None,
    ):
        self.base, self.tokens, self.rank, self.world_size = base, tokens, rank, world_size
        self.task = task.load()
        self.sharded = is_sharded(base)
        self.adapters: dict[str, PackedAdapter] = {}
        self._sum = sum_over_ranks
        self._probed: dict[object, str | None] = {}  # by kind of adapter: the obstacle found, if any
        self.padded = self.shares_prefixes = False
        self._head: Any = None
        if self.task.packed:
            self.isolation_reason = self._settle(longest)
        else:
            self.replicas = [self._replica()]
            self.isolation_reason = f"{self.task.spec.name} pads its records"
            kind, reason = self.task.passes(self.base)
            together = {
                "all": "",
                "equal": "; only those of equal length share a pass",
                "none": "; each has its own pass",
            }
            self.verdict = self.isolation_reason + (f"{together[kind]}: {reason}" if reason else "")
        self._threads = threads_of(len(self.replicas))

    @property
    def shared(self) -> PreTrainedModel:
        """The model that runs the rows of all adapters, or of the first half of them."""
        return self.replicas[0].model

    def _replica(self, kernel: Callable[..., object] | None = None) -> Replica:
        layout: list[attention.Layout] = []
        shared = shared_model(self.base, attention.packed_attention(layout, kernel) if kernel else None)
        for module in shared.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # no dropout in the base: a draw over all rows would make trials depend on each other
        head = OutputHead(self.base) if isinstance(self._head, OutputHead) else self._head  # it keeps what it is given
        return Replica(shared, AdapterSegments(), layout, head)

    def _settle(self, longest: int | None) -> str | None:
        """Decide how records share a pass, in one row or padded; returns why neither gives the results of each alone.

        See :mod:`ftray.models.probe`.
        """
        self._records = probe.probe_records(self.base, longest)
        reasons: list[str] = []
        head = self._agreed(self._head_obstacle)
        kernels = fused_attention.choose_kernels(self.base, longest)
        for kernel in (*kernels, None):
            self.padded, self.shares_prefixes = kernel is None, kernel is attention.attention
            self.replicas = [self._replica(kernel)]
            reason = head or self._agreed(self._obstacle)
            if not reason:
                self.replicas += [self._replica(kernel) for _ in range(1, replicas_of(self.base))]
                how = KERNELS.get(kernel, "") if kernel else ""
                self.verdict = f"records are {'padded: ' + reasons[-1] if self.padded else 'packed in one row' + how}"
                return None
            reasons.append(reason)
        self.verdict = f"each adapter trains by itself: {reasons[-1]}"
        return f"{type(self.base).__name__}: {reasons[-1]}"

    def _head_obstacle(self) -> str | None:
        self._head, reason = output_head(self.base.eval(), self._records[0])
        return reason

    def _agreed(self, find: Callable[[], str | None]) -> str | None:
        """The obstacle that `find` returns, or the exception that it raises, on any rank; None: there is none."""
        try:
            reason = find()
        except Exception as error:
            reason = probe.reason_of(error)
        elsewhere = self._sum([float(reason is not None)])[0] > 0
        return reason or ("another worker's pass differs" if elsewhere else None)

    @torch.enable_grad()
    def _obstacle(self) -> str | None:
        """Why records in a pass of the shared model don't get the results of each alone; None: they do."""
        allowed = probe.tolerance(self.base)
        self._alone, wanted = probe.alone(self.base.eval(), self._records)
        self.shared.eval()
        with torch.no_grad():
            again = self._probe_pass("", probe.other_first(self._records))
        with probe.embedded(self.shared) as embeddings:
            logits = self._probe_pass("", self._records)
        if reason := probe.leak(logits, again, allowed):
            return reason
        (gradient,) = torch.autograd.grad(self._probe_loss(logits), embeddings[0])
        flat = gradient.flatten(0, 1)
        index = self.replicas[0].segments.unpad_index
        flat = flat if index is None else flat[index]
        return probe.wrong_logits(logits, self._alone, allowed) or probe.wrong_gradients(
            flat.split([len(ids) for ids in self._records]), wanted, allowed
        )

    def _probe_pass(self, owner: str, records: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Logits [tokens, vocabulary] of `records` in one shared pass; all but the first are rows of `owner`."""
        lengths = [len(ids) for ids in records]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        segments = [("", 0, lengths[0]), (owner, lengths[0], sum(lengths))]
        replica = self.replicas[0]
        hidden = self._hidden(torch.cat(list(records))[None], positions, segments, replica)
        return list(replica.head(hidden).split(lengths))

    def _probe_loss(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([probe.token_loss(*pair) for pair in zip(logits, self._records, strict=True)]).sum()

    def add(
        self,
        name: str,
        model: PeftModel,
        update: AdapterOptimizer,
        seed: int = 0,
        step: int = 0,
        objective: Objective = SUPERVISED,
    ) -> str | None:
        """Add an adapter.

        Args:
            model: PEFT model over a :func:`share` of the base, adapter in float32.
            update: makes its steps; see :mod:`ftray.training.optimizer`.
            seed: of its dropout.
            step: optimiser steps that it has already made.
            objective: what it minimises.

        Returns:
            None; or why its rows can't share a batch: it then trains on the same base, in passes of its own.

        Raises:
            PackingUnsupported: its records affect each other even in passes of its own.
        """
        rng, isolation_reason, layers = DropoutRNG(model, seed, self.rank), self.isolation_reason, {}
        if not isolation_reason:
            try:
                layers = tuner_layers(model, self.base)
            except PackingUnsupported as error:
                isolation_reason = str(error)
        for path, layer in layers.items():
            for replica in self.replicas:
                SharedLinear.at(replica.model, path, replica.segments).join(name, layer, rng)
        adapted = [(path, m) for path, m in model.eval().named_modules() if isinstance(m, BaseTunerLayer)]
        kinds = tuple((path, type(layer), update_of(layer, rng, 0) is None) for path, layer in adapted)
        parts = model, update, rng, layers, trainable(model), step, isolation_reason, objective, kinds
        self.adapters[name] = PackedAdapter(*parts)
        if not isolation_reason and (reason := self._adapter_obstacle(name)):
            self.remove(name)
            rng = DropoutRNG(model, seed, self.rank)
            isolation_reason = reason
            self.adapters[name] = PackedAdapter(
                model, update, rng, {}, trainable(model), step, reason, objective, kinds
            )
        if isolation_reason and self.task.packed and (reason := self._adapter_obstacle(name)):
            self.remove(name)
            raise PackingUnsupported(f"can't be trained on batches of several records: {reason}")
        return isolation_reason

    def _adapter_obstacle(self, name: str) -> str | None:
        """As :meth:`_obstacle`, for records of an adapter with changed weights, after a record without an adapter.

        Adapters of one kind run the same code: only the first of each kind is tried.
        """
        adapter = self.adapters[name]
        kind = adapter.model.active_peft_config.peft_type, adapter.isolation_reason, adapter.layer_kinds
        if kind not in self._probed:
            with probe.moved(adapter.parameters), torch.enable_grad():
                find = self._differs_isolated if adapter.isolation_reason else self._differs_shared
                self._probed[kind] = self._agreed(lambda: find(adapter, name))
        return self._probed[kind]

    def _differs_shared(self, adapter: PackedAdapter, name: str) -> str | None:
        self.shared.eval()
        own, allowed = range(1, len(self._records)), probe.tolerance(self.base)
        wanted, gradients = probe.alone_adapter(adapter.model, [self._records[i] for i in own], adapter.parameters)
        logits = self._probe_pass(name, self._records)
        expected = [self._alone[0], *wanted]
        loss = torch.stack([probe.token_loss(logits[i], self._records[i]) for i in own]).sum()
        ours = torch.autograd.grad(loss, adapter.parameters, allow_unused=True, materialize_grads=True)
        return probe.wrong_logits(logits, expected, allowed) or probe.wrong_gradients(ours, gradients, allowed)

    def _differs_isolated(self, adapter: PackedAdapter, name: str) -> str | None:
        wanted, gradients = probe.alone_adapter(adapter.model, self._records, adapter.parameters)
        columns = {"input_ids": self._records, "labels": self._records}
        batch = {key: tensor.to(self.base.device) for key, tensor in packed_row(columns).items()}
        loss = self.task.loss(adapter.model, batch)
        ours = torch.autograd.grad(loss, adapter.parameters, allow_unused=True, materialize_grads=True)
        alone = sum(float(probe.token_loss(*pair)) for pair in zip(wanted, self._records, strict=True))
        allowed = max(probe.TOLERANCES.values())  # what is refused has to be off by more than any rounding
        if not abs(loss.item() - alone) <= allowed.logits * abs(alone):
            return f"their loss is {loss.item():.6g}, one by one {alone:.6g}"
        return probe.wrong_gradients(ours, gradients, allowed)

    def remove(self, name: str) -> PeftModel:
        """Remove an adapter; returns its model, which works without the pack."""
        adapter = self.adapters.pop(name)
        adapter.rng.end()
        for path in adapter.layers:
            for replica in self.replicas:
                replica.model.get_submodule(path).leave(name)
        return adapter.model

    def step(self, batches: Mapping[str, Sequence[Batch]]) -> dict[str, StepResult]:
        """Make one optimiser step of every adapter in `batches`.

        When memory runs out, over a sharded base on any rank, passes are halved. An adapter of which a single
        micro-batch is too large fails, and the others step as if it had not been there. In a single process, so does
        one whose update is too large.

        Args:
            batches: this rank's micro-batches of each, as :meth:`ftray.tasks.task.Task.collate` makes them. An
                adapter's loss is the mean over the targets of all its micro-batches on all ranks.

        Returns:
            By adapter. One whose loss or gradient is not finite has a `failure`: it is removed from the pack, with the
            weights that it had before this step.
        """
        names = list(batches)
        tokens, counts = self._counted(batches)
        losses, gradients, exhausted = self._all_gradients(batches, counts)
        with one_torch_thread() if len(self.replicas) > 1 else nullcontext():
            local = []
            for name in names:
                square = get_total_norm(gradients[name]).double().square().item()
                local += [losses[name], square, float(name in exhausted)]
            results = {}
            for name, loss, square, ran_out in zip(names, *_columns(self._sum(local), 3), strict=True):
                failure = _step_failure(self.adapters[name].step + 1, loss, square, bool(ran_out))
                failure = failure or self._update(self.adapters[name], gradients.pop(name))
                if failure:
                    self.remove(name)
                results[name] = StepResult(loss, int(counts[name][0]), tokens[name], failure)
        return results

    def _counted(self, batches: Mapping[str, Sequence[Batch]]) -> tuple[dict[str, int], dict[str, Counts]]:
        """Tokens of each adapter's step, and what its objective needs to know of it; both over all ranks."""
        local = {}
        for name, own in batches.items():
            objective = self.adapters[name].objective
            each = [(self.task.tokens(b), self.task.num_targets(b), *objective.counts(b)) for b in own]
            local[name] = [float(sum(values)) for values in zip(*each, strict=True)]
        for name, estimates in self._estimates(batches).items():
            local[name] += estimates
        total = iter(self._sum([value for values in local.values() for value in values]))
        sums = {name: [*islice(total, len(values))] for name, values in local.items()}
        return {name: int(own[0]) for name, own in sums.items()}, {name: tuple(own[1:]) for name, own in sums.items()}

    def _estimates(self, batches: Mapping[str, Sequence[Batch]]) -> dict[str, list[float]]:
        """The sums of :meth:`Objective.estimates` of those that have some, over this rank's micro-batches."""
        units = [
            (name, i, rows)
            for name, own in batches.items()
            for i, batch in enumerate(own)
            if (rows := self.adapters[name].objective.estimated_on(batch)) is not None
        ]
        found: dict[str, list[float]] = {}
        for (name, *_), sums in self._without_gradients(units, "estimates").items() if units else ():
            found[name] = [a + b for a, b in zip(found[name], sums, strict=True)] if name in found else sums
        return found

    def _all_gradients(
        self, batches: Mapping[str, Sequence[Batch]], counts: Mapping[str, Counts]
    ) -> tuple[dict[str, float], dict[str, list[torch.Tensor]], set[str]]:
        """As :meth:`_gradients`, of mean losses; passes are halved until they fit in memory."""
        before = self.tokens
        losses, gradients, exhausted = self._in_memory(lambda: self._gradients(batches, counts))
        if exhausted and self.tokens < before:  # they were the cause: the others step without them
            self.tokens = before
            others = {name: own for name, own in batches.items() if name not in exhausted}
            again = self._in_memory(lambda: self._gradients(others, counts))
            return losses | again[0], gradients | again[1], exhausted | again[2]
        return losses, gradients, exhausted

    def _update(self, adapter: PackedAdapter, gradients: list[torch.Tensor]) -> str | None:
        """Make the optimiser step of one adapter; returns why it failed."""
        try:
            adapter.update.apply(gradients, adapter.step)
        except RuntimeError as error:
            if not out_of_memory(error) or self.world_size > 1:  # other ranks may wait in a collective
                raise
            return f"out of memory: the update of step {adapter.step + 1}"
        adapter.step += 1
        return None

    def _in_memory(self, attempt: Callable[[], Result]) -> Result:
        """Call `attempt` until it succeeds, halving the tokens of a pass each time memory runs out."""
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
        self, batches: Mapping[str, Sequence[Batch]], counts: Mapping[str, Counts]
    ) -> tuple[dict[str, float], dict[str, list[torch.Tensor]], set[str]]:
        """The loss of each adapter, summed, and the gradient of its mean loss plus the method's penalty.

        The third result names the adapters of which a single micro-batch is too large for the memory.

        Raises:
            RuntimeError: a pass of several adapters ran out of memory; see :func:`out_of_memory`.
        """
        exhausted: set[str] = set()
        for replica in self.replicas:
            if not replica.model.training:
                train_mode(replica.model)
        losses, gradients = dict.fromkeys(batches, 0.0), {}
        for name in batches:
            if not self.adapters[name].model.training:
                train_mode(self.adapters[name].model)
            gradients[name] = _penalty_gradient(self.adapters[name].model)
        for units in self._passes([(n, i, batch) for n, own in batches.items() for i, batch in enumerate(own)]):
            for name, micro_batch, _ in units:
                rng = self.adapters[name].rng
                rng.step, rng.micro_batch = self.adapters[name].step, micro_batch
            try:
                found = self._side_by_side(units, lambda part, replica: self._pass_gradients(part, counts, replica))
            except RuntimeError as error:
                if len(units) > 1 or not out_of_memory(error):
                    raise
                exhausted.add(units[0][0])
                continue
            for (name, *_), (loss, new) in zip(units, found, strict=True):
                losses[name] += loss
                gradients[name] = add(gradients[name], new) if gradients[name] else new
        return losses, gradients, exhausted

    def _pass_gradients(
        self, units: list[Unit], counts: Mapping[str, Counts], replica: Replica
    ) -> list[tuple[float, list[torch.Tensor]]]:
        """The loss of each unit, and the gradient of its part of the adapter's mean loss."""
        parameters = [self.adapters[name].parameters for name, *_ in units]
        with self.one_pass():
            losses = self._losses(units, counts, replica)
            # gradients are averaged over ranks: undo it, so that the mean is over all targets
            means = [
                loss * (self.world_size / max(1, counts[n][0])) for loss, (n, *_) in zip(losses, units, strict=True)
            ]
            every = [p for own in parameters for p in own]
            flat = iter(torch.autograd.grad(torch.stack(means).sum(), every, allow_unused=True))
        new = [[g if g is not None else torch.zeros_like(p) for p in own for g in [next(flat)]] for own in parameters]
        return [(loss.item(), own) for loss, own in zip(losses, new, strict=True)]

    def _side_by_side(
        self, units: list[Unit], function: Callable[[list[Unit], Replica], Sequence[Result]]
    ) -> list[Result]:
        """What `function` gives for each of `units`, of one pass, shared out over the replicas.

        Those that draw from the generator that all threads share go to one of them.
        """
        sizes = [batch["input_ids"].numel() for *_, batch in units]
        drawing = [i for i, (name, *_) in enumerate(units) if self.adapters[name].shares_generator]
        parts = share_out(sizes, drawing, len(self.replicas))

        def of_part(part: Sequence[int], replica: Replica) -> Sequence[Result]:
            return function([units[i] for i in part], replica)

        return side_by_side(self._threads, parts, self.replicas, of_part)

    @torch.no_grad()
    def log_probabilities(self, texts: Sequence[Mapping[str, Sequence[int]]], name: str = "") -> list[float]:
        """The log-probability of each text's supervised tokens, nats, by the base with an adapter, without dropout.

        Args:
            texts: `input_ids` and `labels` of each.
            name: of the adapter; empty: by the base alone.
        """
        batch = packed_row({column: [text[column] for text in texts] for column in ("input_ids", "labels")})
        (losses,) = self.reference_losses([batch], [1.0], name)
        return text_sums(-losses, batch).tolist()

    def validation_sums(self, names: Sequence[str], batch: Batch) -> list[list[float] | None]:
        """What :meth:`Objective.sums` gives of this rank's `batch` for each of the named adapters.

        None where that adapter's batch alone is too large for the memory.
        """
        found = self._without_gradients([(name, 0, batch) for name in names], "sums")
        return [found.get((name, 0)) for name in names]

    @torch.no_grad()
    def _without_gradients(
        self, units: list[Unit], numbers: Literal["sums", "estimates"]
    ) -> dict[tuple[str, int], list[float]]:
        """These numbers of each unit's objective, by adapter and micro-batch, from losses without dropout.

        Those of which a single unit is too large for the memory are missing.
        """
        for replica in self.replicas:
            replica.model.eval()
        for name, *_ in units:
            if self.adapters[name].model.training:
                self.adapters[name].model.eval()

        def attempt() -> dict[tuple[str, int], list[float]]:
            found: dict[tuple[str, int], list[float]] = {}
            for part in self._passes(units):
                try:
                    values = self._side_by_side(part, lambda own, replica: self._numbers(own, numbers, replica))
                except RuntimeError as error:
                    if len(part) > 1 or not out_of_memory(error):
                        raise
                    continue
                found |= {unit[:2]: own for unit, own in zip(part, values, strict=True)}
            return found

        before = self.tokens
        found = self._in_memory(attempt)
        if len(found) < len(units):
            self.tokens = before
        return found

    def one_pass(self) -> AbstractContextManager[None]:
        """Around all that gathers weights of a sharded base, see :func:`ftray.models.sharding.one_pass`."""
        return one_pass(self.base) if self.sharded else nullcontext()

    def _passes(self, units: list[Unit]) -> Iterator[list[Unit]]:
        """Divide `units` into passes by tokens; one unit per adapter a pass, an isolated one by itself.

        Those of one adapter come in order; an isolated one lets those after it go first.
        """
        sizes = self._sizes(units)
        while units:
            now: list[Unit] = []
            later: list[Unit] = []
            size = 0
            for unit in units:
                tokens = sizes[unit[:2]]
                full = now and (size + tokens > self.tokens or self.adapters[unit[0]].isolation_reason)
                if full or any(unit[0] == name for name, *_ in (*now, *later)):
                    later.append(unit)
                else:
                    now.append(unit)
                    size += tokens if not self.adapters[unit[0]].isolation_reason else self.tokens
            yield now
            units = later

    def _sizes(self, units: list[Unit]) -> dict[tuple[str, int], int]:
        """Tokens by adapter and micro-batch; over a sharded base the most of any rank: all make the same passes."""
        sizes = [float(batch["input_ids"].numel()) for *_, batch in units]
        if self.sharded:
            own = [size * (rank == self.rank) for rank in range(self.world_size) for size in sizes]
            by_rank = self._sum(own)
            sizes = [max(by_rank[i :: len(units)]) for i in range(len(units))]
        return {(name, micro_batch): int(size) for (name, micro_batch, _), size in zip(units, sizes, strict=True)}

    def _losses(self, units: list[Unit], counts: Mapping[str, Counts], replica: Replica) -> list[torch.Tensor]:
        """What each unit's objective minimises, summed over its targets."""
        name, _, batch = units[0]
        if self.adapters[name].isolation_reason:  # it has a pass of its own
            adapter, rows = self.adapters[name], self._on_device(batch)
            return [self.task.objective_loss(adapter.model, rows, adapter.objective, counts[name])]
        each = zip(units, self.token_losses_of(units, replica=replica), strict=True)
        return [self.adapters[n].objective.loss(own, batch, counts[n]) for (n, _, batch), own in each]

    def _numbers(self, units: list[Unit], numbers: Literal["sums", "estimates"], replica: Replica) -> list[list[float]]:
        """See :meth:`_without_gradients`; units of one pass."""
        name, _, batch = units[0]
        with self.one_pass():
            if self.adapters[name].isolation_reason:  # it has a pass of its own
                adapter, rows = self.adapters[name], self._on_device(batch)
                return [[*getattr(self.task, numbers)(adapter.model, rows, adapter.objective)]]
            each = zip(units, self.token_losses_of(units, replica=replica), strict=True)
            return [[*getattr(self.adapters[n].objective, numbers)(own, batch)] for (n, _, batch), own in each]

    @torch.no_grad()
    def reference_losses(
        self, batches: Sequence[Batch], temperatures: Sequence[float], name: str = ""
    ) -> list[torch.Tensor]:
        """The cross-entropy of the supervised tokens of each batch, float64 [S], without dropout.

        Args:
            temperatures: by which logits are divided, one a batch.
            name: of the adapter whose losses they are; empty: those of the base alone.
        """
        adapter = self.adapters.get(name)
        model = (adapter.model if adapter else self.base).eval()
        if adapter.isolation_reason if adapter else self.isolation_reason:
            each = zip(batches, temperatures, strict=True)
            return [token_losses(model, self._on_device(batch), temperature=t).double() for batch, t in each]
        self.shared.eval()

        def attempt() -> list[torch.Tensor]:
            found: list[torch.Tensor] = []
            while len(found) < len(batches):
                units: list[Unit] = [(name, 0, batch) for batch in batches[len(found) :]]
                sizes = accumulate(batch["input_ids"].numel() for *_, batch in units)
                fit = 1 if adapter else max(1, sum(size <= self.tokens for size in sizes))
                found += self.token_losses_of(units[:fit], temperatures[len(found) :][:fit])
            return found

        return self._in_memory(attempt)

    def token_losses_of(
        self, units: list[Unit], temperatures: Sequence[float] | None = None, replica: Replica | None = None
    ) -> list[torch.Tensor]:
        """The cross-entropy of each unit's supervised tokens, float64 [S].

        Args:
            temperatures: by which the logits of each are divided; None: as the adapters' objectives say.
            replica: that makes the pass; None: the first.
        """
        replica = replica or self.replicas[0]
        row = {k: torch.cat([batch[k] for *_, batch in units], 1) for k in ("input_ids", "position_ids", "labels")}
        targets = row["labels"][0, 1:]  # a record's first label is -100: no target reaches across records
        positions = (targets != IGNORE).nonzero().squeeze(1)
        own, shares = targets[positions], None
        if TARGETS in units[0][2]:
            own, shares = (_one_below_another([batch[name] for *_, batch in units]) for name in (TARGETS, SHARES))
            shares = shares.to(self.base.device)
        if temperatures is None:
            temperatures = [self.adapters[name].objective.temperature for name, *_ in units]
        counts = [supervised_tokens(batch) for *_, batch in units]
        cooled = None
        if any(temperature != 1 for temperature in temperatures):
            cooled = torch.tensor(temperatures).repeat_interleave(torch.tensor(counts)).to(self.base.device)
        sizes, prefixes = [batch["input_ids"].numel() for *_, batch in units], None
        if self.shares_prefixes and PREFIXES in units[0][2]:
            common = torch.cat([batch[PREFIXES][0] for *_, batch in units])
            prefixes = attention.shared_prefixes(row["position_ids"], common)
            positions = prefixes.source[positions]
            sizes = [int(kept.sum()) for kept in prefixes.kept.split(sizes)]
        segments = [(n, *span) for (n, *_), span in zip(units, pairwise(accumulate(sizes, initial=0)), strict=True)]
        hidden = self._hidden(row["input_ids"], row["position_ids"], segments, replica, prefixes)
        with whole(*(replica.head.parts if isinstance(replica.head, OutputHead) else [replica.head])):
            states = hidden[positions.to(hidden.device)]
            losses = HeadLoss.apply(states, replica.head, own.to(hidden.device), shares, cooled)
        return list(losses.double().split(counts))

    def _on_device(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.base.device) for name, tensor in batch.items()}

    def _hidden(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        segments: list[tuple[str, int, int]],
        replica: Replica,
        prefixes: attention.SharedPrefixes | None = None,
    ) -> torch.Tensor:
        """The inputs of the head [T, hidden size] for a packed row [1, T], with the segment of each adapter.

        With `prefixes`, T are the tokens that stay.
        """
        ids, positions = input_ids.to(self.base.device), position_ids.to(self.base.device)
        if not self.padded:
            replica.segments.set(segments)
            replica.layout[:] = [attention.layout(position_ids, self.base.device, prefixes)]
            if prefixes is not None:
                ids, positions = ids[:, prefixes.kept], positions[:, prefixes.kept]
            out = probe.body(replica.model)(input_ids=ids, position_ids=positions, use_cache=False)
            hidden: torch.Tensor = out.last_hidden_state[0]
            return hidden
        mask = padding_mask(positions)
        replica.segments.set(segments, mask)
        inputs = {"input_ids": padded(ids, mask, 0), "attention_mask": mask}
        states = probe.body(replica.model)(**inputs, use_cache=False).last_hidden_state
        rows: torch.Tensor = states.flatten(0, 1).index_select(0, replica.segments.unpad_index)
        return rows


def _one_below_another(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors [S, K] of several K as one, filled up with 0."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


def _step_failure(step: int, loss: float, squared_norm: float, ran_out: bool) -> str | None:
    """Why an adapter can't make this step (from 1), given its loss and gradient over all ranks; None: it can."""
    if ran_out:
        return f"out of memory: one micro-batch at step {step}"
    if not math.isfinite(loss):
        return f"diverged: loss is {loss} at step {step}"
    if not math.isfinite(squared_norm):
        return f"diverged: gradient is not finite at step {step}"
    return None


def _penalty_gradient(model: PeftModel) -> list[torch.Tensor]:
    """Gradient of a method's own penalty (AdaLoRA); empty if it has none."""
    if not hasattr(model.base_model, "update_and_allocate"):
        return []
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    factors = [p for n, p in named if "lora_A" in n or "lora_B" in n]
    penalty = model.active_peft_config.orth_reg_weight * orthogonality(factors)
    found = torch.autograd.grad(penalty, [p for _, p in named], allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, (_, p) in zip(found, named, strict=True)]


def _columns(values: list[float], width: int) -> list[list[float]]:
    return [values[column::width] for column in range(width)]
