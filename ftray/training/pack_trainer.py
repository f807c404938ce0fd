"""Trains a pack of trials from first step to last: one base model, and a DeepSpeed engine for each trial."""

import math
import os
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, TypeVar, cast

import psutil
import torch
import torch.distributed as dist

from ftray.adapters.compatibility import refuse
from ftray.adapters.methods import attach, layers_left_out, rate_ratio
from ftray.adapters.targets import described
from ftray.compat.torch import out_of_memory, storage_key
from ftray.config import ModelConfig, TrainingConfig
from ftray.evaluation.user_metric import UserMetricError
from ftray.models.liger import use_liger
from ftray.models.load import load_base, load_sharded
from ftray.models.sharding import gathered_storages
from ftray.multi_adapter.shared_model import share
from ftray.storage.location import parse_location
from ftray.task_spec import CAUSAL, TaskSpec
from ftray.training.checkpoint import load_checkpoint, save_checkpoint, start_from
from ftray.training.engine import DeepSpeedOptimizer, join_process_group, return_freed_memory, sum_over_ranks
from ftray.training.pack import Batch, Pack
from ftray.training.rollouts import Drawn, Rollouts
from ftray.training.run_spec import RunSpec, accumulation_steps
from ftray.training.train_state import TrainState

Sent = TypeVar("Sent")

MOST_TOKENS = 16384  # of a pass: more rows don't make the matrix products more efficient
STATE_BYTES = 16  # of each trained parameter: float32 weight, gradient and two moments


@dataclass
class PackedTrial:
    """One trial of a pack.

    Attributes:
        batches: this rank's micro-batches from `history.step` on.
    """

    run: RunSpec
    history: TrainState
    update: DeepSpeedOptimizer
    accumulation: int
    batches: Iterator[Batch]


class PackTrainer:
    """The base model and its trials, in one of `world_size` processes; all processes make the same calls.

    Attributes:
        trials: by name.
        measure: see :class:`ftray.training.zero3_trainer.Zero3Trainer`.
        measure_together: takes its place where there is one: returns the further metrics of models by name, given the
            number of validation records that count; None: all.
        rollouts: draws what trials learn from to the prompts that their batches hold; None: they learn from batches as
            they are.
    """

    measure: Callable[[Any], dict[str, float]] | None = None
    measure_together: Callable[[dict[str, Any], int | None], dict[str, dict[str, float]]] | None = None
    rollouts: Rollouts | None = None

    def __init__(
        self,
        model: ModelConfig,
        model_path: str,
        training: TrainingConfig | None = None,
        task: TaskSpec = CAUSAL,
        longest: int | None = None,
    ):
        """Load the base model.

        Args:
            training: the settings that all trials have in common; None: the defaults.
            longest: most tokens of a record; None: any number.

        Raises:
            UserError: the base can't be shared out, or not run by Liger's kernels.
        """
        training = training or TrainingConfig()
        join_process_group()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.local_workers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        if training.shard_base:
            return_freed_memory()
            self.base = load_sharded(model, model_path, task, self.device, training.offload == "all")
        else:
            self.base = load_base(model, model_path, task)
            if model.quantization == "none":
                self.base.model.to(self.device)
        if training.liger:
            use_liger(self.base.model)
        if training.gradient_checkpointing:
            self.base.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.pack = Pack(
            self.base.model,
            task,
            rank=self.rank,
            world_size=self.world_size,
            sum_over_ranks=self._sum,
            longest=longest,
        )
        self.trials: dict[str, PackedTrial] = {}
        self._printed: set[str] = set()  # lines of the log

    def join(
        self,
        name: str,
        run: RunSpec,
        checkpoint: str | None = None,
        samples: Callable[[], list[Batch]] | None = None,
    ) -> str | None:
        """Add a trial, from its first step or from a checkpoint.

        Set its `batches` before the first :meth:`step`.

        Args:
            name: of the trial.
            run: what to train.
            checkpoint: directory written by :meth:`save`; None: start from the first step.
            samples: returns batches for initialisation by data, see :func:`ftray.adapters.methods.attach`.

        Returns:
            Why it can't share a batch with others; None: it can. See :meth:`ftray.training.pack.Pack.add`.

        Raises:
            UserError: the run's settings can't be combined.
            PackingUnsupported: it can't be trained on batches of several records.
        """
        refuse(run.adapter, run.model, run.training)
        own = replace(self.base, model=share(self.base.model))
        model = attach(own, run.adapter, run.steps, run.training.seed, samples)
        if run.start:
            with parse_location(run.start).as_local_dir() as start:
                start_from(model, start)
        update = DeepSpeedOptimizer(model, run.training, run.steps, rate_ratio(run.adapter))
        history = TrainState(run)
        if checkpoint:
            history.restore(load_checkpoint(update.engine, update.allocation, checkpoint))
        adapts = described(model, layers_left_out(run.adapter, own))
        if self.rank == 0 and adapts not in self._printed:
            self._printed.add(adapts)
            print(f"adapted: {adapts or 'no layers of the model'}", flush=True)
        objective = self.pack.task.objective(run.training)
        isolation_reason = self.pack.add(name, model, update, run.training.seed, history.step, objective)
        accumulation = accumulation_steps(run.training, self.world_size)
        self.trials[name] = PackedTrial(run, history, update, accumulation, iter(()))
        return isolation_reason

    def leave(self, name: str) -> None:
        """Remove a trial, whether or not the pack has already dropped it."""
        if name in self.pack.adapters:
            self.pack.remove(name)
        self.trials.pop(name).update.engine.destroy()

    def step(self, names: Sequence[str]) -> dict[str, str]:
        """Make one optimiser step of each of the named trials; returns the reason for each that failed.

        Raises:
            UserMetricError: a reward of the user's failed.
        """
        started = time.monotonic()
        trials = {name: self.trials[name] for name in names}
        batches = {name: [next(trial.batches) for _ in range(trial.accumulation)] for name, trial in trials.items()}
        failures: dict[str, str] = {}
        if self.rollouts:
            batches, failures = self._with_answers(batches)
        stepped = self.pack.step(batches) if batches else {}
        seconds = time.monotonic() - started
        for name, result in stepped.items():
            if not result.failure:
                self.trials[name].history.add(result.loss, result.targets, result.tokens, seconds)
        return failures | {name: result.failure for name, result in stepped.items() if result.failure}

    def _with_answers(self, prompts: dict[str, list[Batch]]) -> tuple[dict[str, list[Batch]], dict[str, str]]:
        """Batches of answers that trials have drawn to their prompts, and why it failed for others; alike on all ranks.

        Raises:
            UserMetricError: a reward of the user's failed.
        """
        assert self.rollouts
        found: dict[str, Drawn] = {}
        broken = None
        try:
            seeds = {name: self.trials[name].run.training.seed for name in prompts}
            found = self.rollouts.draw(prompts, seeds)
        except UserMetricError as error:
            broken = str(error)
        if broken := self.first_of_ranks(broken):
            raise UserMetricError(broken)
        missing = self._sum([float(name not in found) for name in prompts])
        sound = [name for name, ranks in zip(prompts, missing, strict=True) if not ranks]
        for name in sound:
            sums, answers = found[name].sums, float(found[name].answers)
            *values, answers = self._sum([*sums.values(), answers])
            self.trials[name].history.add_drawn(dict(zip(sums, values, strict=True)), answers)
        steps = {name: self.trials[name].history.step + 1 for name in prompts.keys() - set(sound)}
        failures = {name: f"diverged: its output is not finite at step {step}" for name, step in steps.items()}
        return {name: found[name].batches for name in sound}, failures

    def validate(self, names: Sequence[str], batches: Iterable[Batch], validated: int | None = None) -> dict[str, str]:
        """Validate the named trials and add a report to their histories; returns the reason for each that failed.

        Args:
            batches: this rank's share of the validation records.
            validated: number of these, over all ranks, if they are but a part of what the settings allow.
        """
        started, targets, width = time.monotonic(), 0.0, self.pack.task.objective.totals
        local = {name: [0.0] * (1 + width) for name in names}  # whether it ran out of memory, and its sums
        for batch, counts in self._in_step(() if self.rollouts else batches):
            fit = [name for name in names if not local[name][0]]
            for name, sums in zip(fit, self.pack.validation_sums(fit, batch), strict=True):
                found = [1.0] if sums is None else [0.0, *(value * counts for value in sums)]
                local[name] = [a + b for a, b in zip_longest(local[name], found, fillvalue=0.0)]
            targets += self.pack.task.num_targets(batch) * counts
        *flat, targets = self._sum([value for own in local.values() for value in own] + [targets])
        totals = {name: flat[i * (1 + width) :][: 1 + width] for i, name in enumerate(names)}
        sound = [n for n, (ran_out, loss, *_) in totals.items() if math.isfinite(loss) and not ran_out]
        measured = self._measured_together(sound, validated)
        seconds, failures = time.monotonic() - started, {}
        for name, (ran_out, *sums) in totals.items():
            history, engine, loss = self.trials[name].history, self.trials[name].update.engine, sums[0]
            started, metrics = time.monotonic(), self.pack.adapters[name].objective.metrics(sums, targets)
            if ran_out:
                failures[name] = f"out of memory: validation after step {history.step}"
            elif not math.isfinite(loss):
                failures[name] = f"diverged: validation loss is {loss} after step {history.step}"
            elif reason := None if name in measured else self._measure(name, metrics):
                failures[name] = reason
            else:
                metrics |= measured.get(name, {})
                took = seconds + time.monotonic() - started
                history.report(engine.lr_scheduler.get_last_lr()[0], metrics, took, validated)
        return failures

    def report_training(self, names: Iterable[str], paired: Container[str]) -> None:
        """Add a report without a validation to the histories of the named trials.

        Args:
            paired: those of them that are compared by their training loss, which they then report.
        """
        for name in names:
            history, engine = self.trials[name].history, self.trials[name].update.engine
            loss = history.last_third() if name in paired else None
            known = {} if loss is None else {"paired_loss": loss}
            history.report(engine.lr_scheduler.get_last_lr()[0], known, 0.0, validated=0)

    def _in_step(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
        """This rank's batches, and whether they count. Over a sharded base, where each pass needs all ranks, those that
        have fewer go on with a batch of another that doesn't."""
        if not self.pack.sharded:
            yield from ((batch, True) for batch in batches)
            return
        rest = iter(batches)
        while True:
            own = next(rest, None)
            given = self._sum([float(own is not None)])[0]
            if not given:
                return
            shown = own if given == self.world_size else self.first_of_ranks(own)
            yield cast("Batch", shown), own is not None

    def _measured_together(self, names: Sequence[str], validated: int | None) -> dict[str, dict[str, float]]:
        """What `measure_together` returns; nothing where there is none, or it fails for want of memory.

        Raises:
            UserMetricError: a function of the user's failed.
        """
        if self.measure_together is None or not names:
            return {}
        found, broken, failed = {}, None, 0.0
        try:
            found = self.measure_together({name: self.pack.adapters[name].model for name in names}, validated)
        except UserMetricError as error:
            broken = str(error)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            failed = 1.0
        if broken := self.first_of_ranks(broken):
            raise UserMetricError(broken)
        return {} if self.any_rank(failed > 0) else self.from_first_rank(found)  # times differ between ranks

    def _measure(self, name: str, metrics: dict[str, float]) -> str | None:
        """Add the results of `measure` to `metrics`; returns the reason if that fails on any rank.

        Raises:
            UserMetricError: a function of the user's failed.
        """
        if self.measure is None:
            return None
        found, reason, broken = {}, None, None
        try:
            with self.pack.one_pass():
                found = self.measure(self.pack.adapters[name].model)
        except UserMetricError as error:
            broken = str(error)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            reason = f"out of memory: predictions after step {self.trials[name].history.step}"
        if broken := self.first_of_ranks(broken):
            raise UserMetricError(broken)
        reason = self.first_of_ranks(reason)
        metrics |= self.from_first_rank(found)
        return reason

    def save(self, name: str, directory: str) -> None:
        """Write a trial's checkpoint; every rank passes its own view of the same directory."""
        trial = self.trials[name]
        save_checkpoint(trial.update.engine, trial.update.allocation, self.base.task, directory, trial.history.state())

    def fit_memory(self, run: RunSpec, batch: Batch) -> int:
        """Set the tokens of a pass from the memory of a probe step of `run` on `batch`; returns how many trials fit.

        Half of the free memory is for activations kept for the backward pass, a quarter for the trials' weights,
        gradients and optimiser states.
        """
        self.join("probe", run)
        if self.rollouts:
            batch = self.rollouts.stand_in("probe", batch)
        base = self.base.model
        own = {storage_key(p) for p in base.parameters()} | gathered_storages(base)
        kept: dict[int, int] = {}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            if (key := storage_key(tensor)) not in own:
                kept[key] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            self.pack.step({"probe": [batch]})
        weights = sum(p.numel() for p in self.trials["probe"].update.parameters)
        state = STATE_BYTES * weights
        self.leave("probe")
        free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
        share = free / (1 if torch.cuda.is_available() else self.local_workers)
        tokens = int(share / 2 / (sum(kept.values()) / batch["input_ids"].numel()))
        fit = torch.tensor([tokens, int(share / 4 / state)], device=self.device)
        dist.all_reduce(fit, dist.ReduceOp.MIN)
        self.pack.tokens = min(MOST_TOKENS, int(fit[0]))
        if self.rollouts:  # what takes longest, drawing, is done for all together, however many train in a pass
            return max(1, int(fit[1]))
        a_trial = batch["input_ids"].numel() * accumulation_steps(run.training, self.world_size)
        return max(1, min(self.pack.tokens // a_trial, int(fit[1])))

    def from_first_rank(self, value: Sent) -> Sent:
        """The `value` that rank 0 passes."""
        values: list[Any] = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, 0, device=torch.device(self.device))
        first: Sent = values[0]
        return first

    def first_of_ranks(self, value: Sent | None) -> Sent | None:
        """The first `value` over ranks that is not None; None if all are."""
        values: list[Sent | None] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return next((v for v in values if v is not None), None)

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return self._sum([float(flag)])[0] > 0

    def wait_for_all(self) -> None:
        """Wait until every rank has made this call."""
        dist.barrier()

    def _sum(self, values: list[float]) -> list[float]:
        return sum_over_ranks(values, self.device)
