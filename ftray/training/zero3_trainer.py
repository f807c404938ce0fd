"""Trains one adapter with DeepSpeed's ZeRO 3, which partitions the base model over the workers of the run."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from ftray.adapters.compatibility import refuse
from ftray.adapters.methods import attach, rate_ratio
from ftray.errors import RunFailed, UserError
from ftray.models.load import load_base, load_skeleton
from ftray.models.probe import probe_records, row_obstacle
from ftray.multi_adapter.dropout import DropoutRNG
from ftray.multi_adapter.shared_model import train_mode
from ftray.training.adalora import RankAllocation
from ftray.training.checkpoint import load_checkpoint, save_checkpoint
from ftray.training.engine import (
    build_engine,
    deepspeed_config,
    join_process_group,
    return_freed_memory,
    sum_over_ranks,
)
from ftray.training.run_spec import RunSpec, accumulation_steps
from ftray.training.train_state import Report, TrainState

Batch = dict[str, torch.Tensor]


class Zero3Trainer:
    """Base model, adapter and DeepSpeed engine of one run, in one process of `world_size`.

    Attributes:
        measure: returns further metrics of the model at each validation, the same on all ranks; None: only the loss.
        preempted: whether this rank must end soon; called before each step, and true for all if it is for one.
    """

    measure: Callable[[Any], dict[str, float]] | None = None
    preempted: Callable[[], bool] = staticmethod(lambda: False)

    def __init__(self, run: RunSpec, samples: Callable[[], list[Batch]] | None = None):
        """`samples` are for :func:`ftray.adapters.methods.attach`."""
        refuse(run.adapter, run.model, run.training)
        join_process_group()
        self.run, self.task = run, run.task.load()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.accumulation = accumulation_steps(run.training, self.world_size)
        if run.training.zero_stage == 3:
            from transformers.integrations import HfDeepSpeedConfig

            return_freed_memory()
            parameters = load_skeleton(run.model, run.model_path, run.task).model.num_parameters()
            # while this object lives, from_pretrained loads the base already partitioned over the workers
            self._sharded_loading = HfDeepSpeedConfig(deepspeed_config(run.training, self.world_size, parameters))
        base = load_base(run.model, run.model_path, run.task)
        model = attach(base, run.adapter, run.steps, run.training.seed, samples)
        if run.training.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        self.dropout_rng = DropoutRNG(model, run.training.seed, self.rank)
        self.engine = build_engine(model, run.training, run.steps, rate_ratio(run.adapter))
        self.allocation = RankAllocation(self.engine, model)
        self.device = self.engine.device
        self.history, self.objective = TrainState(run), self.task.objective(run.training)
        if self.task.packed:
            self.task.pad = self._sum([float(self._mixes_records())])[0] > 0
        elif run.training.zero_stage == 3 and self.world_size > 1:
            kind, reason = self.task.passes(self.engine.module)
            if kind != "all":  # workers would make different numbers of passes, each of which is a collective
                raise UserError(
                    f"training.zero_stage 3: records can't be padded: {reason}: take stage 2, or one worker"
                )

    def _mixes_records(self) -> bool:
        """Whether records must be padded; every rank tries it, because under ZeRO 3 a forward pass is a collective."""
        self.engine.eval()
        return bool(row_obstacle(self.engine.module, probe_records(self.engine.module, self.run.longest)))

    def restore(self, directory: str) -> None:
        """Resume from a checkpoint directory that :meth:`save` wrote with the same run and world size."""
        self.history.restore(load_checkpoint(self.engine, self.allocation, directory))

    def save(self, directory: str) -> None:
        """Write a checkpoint; every rank calls it with its own view of the same directory."""
        save_checkpoint(self.engine, self.allocation, self.run.task, directory, self.history.state())

    def fit(
        self,
        batches: Iterator[Batch],
        validation: Callable[[], Iterable[Batch]],
        report: Callable[[Report], None],
    ) -> None:
        """Train to the last step, calling `report` with the metrics after each step in `run.evaluate_at`.

        Once a rank is `preempted`, all return after the same step, before the last one.

        Args:
            batches: this rank's micro-batches from `history.step` on, as the task collates them.
            validation: returns this rank's share of the validation batches, from the first, at each call.
            report: called on every rank with the same metrics, in natural units (loss in nats per token).

        Raises:
            RunFailed: the loss became NaN or infinite.
        """
        history = self.history
        while not history.over and not self._sum([float(self.preempted())])[0]:
            started = time.monotonic()
            counted = self._step([next(batches) for _ in range(self.accumulation)])
            history.add(*counted, time.monotonic() - started)
            if history.due:
                started = time.monotonic()
                metrics = self.evaluate(validation())
                rate = self.engine.lr_scheduler.get_last_lr()[0]
                report(history.report(rate, metrics, time.monotonic() - started))

    def _step(self, micro_batches: list[Batch]) -> tuple[float, int, int]:
        """One optimiser step; returns the summed loss, the targets and all tokens of the global batch."""
        step = self.history.step
        self.engine.train()
        train_mode(self.engine.module)
        tokens, *counts = self._counted(micro_batches)
        total = torch.zeros((), device=self.device)
        for micro_batch, batch in enumerate(micro_batches):
            self.dropout_rng.step, self.dropout_rng.micro_batch = step, micro_batch
            loss = self.task.objective_loss(self.engine, self._to_device(batch), self.objective, counts)
            total += loss.detach()
            # DeepSpeed averages gradients over workers: undo it, so that the mean is over all targets
            loss = loss * (self.world_size / counts[0]) + self.allocation.penalty() / self.accumulation
            self.engine.backward(loss, scale_wrt_gas=False)
            if batch is micro_batches[-1]:
                self.allocation.before_step()
            self.engine.step()
        self.allocation.after_step(step)
        loss_sum = self._sum([float(total)])[0]
        if not math.isfinite(loss_sum):
            raise RunFailed(f"diverged: loss is {loss_sum} at step {step + 1}")
        return loss_sum, int(counts[0]), int(tokens)

    def _counted(self, micro_batches: list[Batch]) -> list[float]:
        """Tokens of a step, its targets, and what the objective needs to know of it; all over all ranks."""
        each = [(self.task.tokens(b), self.task.num_targets(b), *self.objective.counts(b)) for b in micro_batches]
        local = [float(sum(values)) for values in zip(*each, strict=True)]
        estimated = [rows for b in micro_batches if (rows := self.objective.estimated_on(b)) is not None]
        if estimated:
            self.engine.eval()
            with torch.no_grad():
                found = [self.task.estimates(self.engine, self._to_device(rows), self.objective) for rows in estimated]
            self.engine.train()
            local += [sum(values) for values in zip(*found, strict=True)]
        return self._sum(local)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The objective's metrics over all ranks' `batches`, and what `measure` returns.

        Raises:
            RunFailed: the loss is not finite.
        """
        self.engine.eval()
        sums, targets, remaining = [0.0] * self.objective.totals, 0.0, iter(batches)
        while True:
            batch = next(remaining, None)
            # under ZeRO 3 a forward pass is a collective: ranks that have no more pass an empty batch
            if not self._sum([float(batch is not None)])[0]:
                break
            own = batch or self.task.empty()
            found = self.task.sums(self.engine, self._to_device(own), self.objective)
            if batch is not None:
                sums = [a + b for a, b in zip(sums, found, strict=True)]
                targets += self.task.num_targets(batch)
        *sums, targets = self._sum([*sums, targets])
        if not math.isfinite(sums[0]):
            raise RunFailed(f"diverged: validation loss is {sums[0]} after step {self.history.step}")
        metrics = self.objective.metrics(sums, targets)
        return metrics | (self.measure(self.engine.module) if self.measure else {})

    def _to_device(self, batch: Mapping[str, torch.Tensor]) -> Batch:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def _sum(self, values: list[float]) -> list[float]:
        return sum_over_ranks(values, self.device)
