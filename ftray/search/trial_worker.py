"""One adapter under Ray Train: a `TorchTrainer` whose workers stream their shards and run the training loop."""

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray import ActorID, PlacementGroupID, train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import PlacementGroup, remove_placement_group

from ftray.compat.ray import is_removed, placement_groups
from ftray.compat.ray_train_torch import SoloTrainer
from ftray.config import AdapterConfig, Config, TrainingConfig
from ftray.data import TokenizedData
from ftray.data.ray_loader import training_batches, validation_batches
from ftray.errors import RunFailed
from ftray.evaluation.user_metric import UserMetric, UserMetricError
from ftray.runtime.preemption import HeedSigterm, listening, preempted
from ftray.search.adapter_costs import LATENCY, SIZES, TIMED_RECORDS, sizes
from ftray.search.rungs import Rung, budget, rungs
from ftray.storage.location import Location
from ftray.storage.manifest import find_corruption, seal
from ftray.task_spec import TaskSpec
from ftray.training.run_spec import RunSpec, micro_batch_size

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ftray.evaluation.metrics import Scores
    from ftray.search.signals import PairedTraining
    from ftray.training.pack_trainer import PackTrainer
    from ftray.training.rollouts import Rollouts
    from ftray.training.single_run_trainer import SingleRunTrainer
    from ftray.training.zero3_trainer import Zero3Trainer

CUT_OFF = "cut_off"  # marks a report without metrics, which only brings a checkpoint from between two rungs
MENDABLE = "mendable"
SETTLED = 1.0  # seconds without any further group, after which none is expected
RELEASE_PATIENCE = 10.0  # seconds
# settings of glibc for workers: memory in huge pages; what a step frees is kept for the next step, not returned to the
# system; one arena, because the arenas of all threads but the first return what is large at once, and Ray Train runs
# the worker's function in another thread
MALLOC = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"
    f":glibc.malloc.mmap_threshold={2**32}:glibc.malloc.trim_threshold={2**40}"
}
MeasureTogether = Callable[["Mapping[str, PeftModel]", int | None], dict[str, dict[str, float]]]


@dataclass(frozen=True)
class SearchContext:
    """What all trials of a search share: everything but adapter and optimiser settings.

    Attributes:
        data: directory of the tokenized shards.
        paired: how trials compare by their training losses; None: they don't.
        functions: metrics of the user's own, among the search's goals.
        reference: see :class:`ftray.data.shards.TokenizedData`.
        reward: of the user's own, that trials learn from; None: there is none.
        start: adapter, a directory or URI, that all trials begin with; empty: with new ones.
    """

    config: Config
    model_path: str
    data: str
    gpus_per_worker: float
    paired: "PairedTraining | None" = None
    functions: tuple[UserMetric, ...] = ()
    reference: str = ""
    reward: UserMetric | None = None
    start: str = ""

    @cached_property
    def tokenized(self) -> TokenizedData:
        """The data, its manifest read once a process."""
        return TokenizedData.load(self.data, self.reference)

    def run(self, adapter: dict[str, Any], training: dict[str, Any], start: str | None = None) -> RunSpec:
        """The run of one configuration: as many steps as make up the search's budget of records.

        Args:
            adapter: fields of AdapterConfig.
            training: fields of TrainingConfig that differ from the search's own.
            start: as that of :class:`~ftray.training.run_spec.RunSpec`.
        """
        settings = TrainingConfig.model_validate(self.config.training.model_dump() | training)
        steps = max(1, round(self.budget() / settings.batch_size))
        at = sorted({min(steps, max(1, math.ceil(rung.records / settings.batch_size))) for rung in self.rungs()})
        task = self.tokenized.task
        longest = self.config.data.longest
        return RunSpec(
            self.config.model,
            self.model_path,
            AdapterConfig(**adapter),
            settings,
            steps,
            tuple(at),
            task,
            longest,
            start,
        )

    def measure(self) -> Callable[[Any], dict[str, float]] | None:
        """A function that measures the metrics of the task (`validation_<name>`) on the validation records.

        None if the search's goals are losses, which every validation gives.
        """
        from ftray.models.load import load_tokenizer

        cfg, data, wanted = self.config, self.tokenized, self._wanted()
        if not wanted:
            return None
        rows = data.rows("validation", cfg.training.validation_records)
        tokenizer = load_tokenizer(self.model_path, cfg.model.trust_remote_code, cfg.data.chat_template)

        def measure(model: "PeftModel") -> dict[str, float]:
            found = {}
            if wanted - {*SIZES, LATENCY}:
                found = self._measured(self.score(model, tokenizer, rows))
            if LATENCY in wanted:
                from ftray.evaluation.generation import generate, seconds_an_answer

                def answer(row: dict[str, Any]) -> object:
                    return generate(model, tokenizer, [row], cfg.evaluation)

                found[LATENCY] = seconds_an_answer(answer, rows[:TIMED_RECORDS])
            return found | (sizes(model, data.task) if wanted & {*SIZES} else {})

        return measure

    def measure_together(self, base: "PreTrainedModel") -> "MeasureTogether | None":
        """A function that measures models over shares of `base` at once, so that their answers are decoded together.

        It takes them by name, and the number of validation records that count, from the first on; None: all. None where
        no answers are asked for, or the base or its task has them decoded by one model after another.
        """
        from ftray.models.load import load_tokenizer
        from ftray.models.sharding import is_sharded
        from ftray.multi_adapter.decoding import PackDecoder

        cfg, data, wanted = self.config, self.tokenized, self._wanted()
        task = data.task.load()
        if not wanted - {*SIZES} or not task.packed or is_sharded(base):
            return None
        rows = data.rows("validation", cfg.training.validation_records)
        tokenizer = load_tokenizer(self.model_path, cfg.model.trust_remote_code, cfg.data.chat_template)
        decoder = PackDecoder(base, tokenizer, cfg.evaluation)

        def measure(models: "Mapping[str, PeftModel]", records: int | None) -> dict[str, dict[str, float]]:
            found: dict[str, dict[str, float]] = {name: {} for name in models}
            if wanted - {*SIZES, LATENCY}:
                for name, answers in decoder.answers(models, rows[:records]).items():
                    found[name] = self._measured(self._judged(answers, rows[:records]))
            for name, model in models.items():
                if LATENCY in wanted:
                    found[name][LATENCY] = decoder.seconds(model, rows[:TIMED_RECORDS])
                if wanted & {*SIZES}:
                    found[name] |= sizes(model, data.task)
            return found

        return measure

    def rollouts(self, trainer: "PackTrainer") -> "Rollouts | None":
        """What draws answers for the trials of `trainer`; None where they learn from records as they are."""
        from ftray.adapters.discovery import START
        from ftray.models.load import load_tokenizer
        from ftray.search.reference import add_start
        from ftray.training.rollouts import Rollouts

        if self.reward is None:
            return None
        cfg, start = self.config, START if self.start else ""
        if start:
            add_start(trainer.pack, trainer.base, self.start)
        tokenizer = load_tokenizer(self.model_path, cfg.model.trust_remote_code, cfg.data.chat_template)
        return Rollouts(trainer.pack, tokenizer, cfg.evaluation, self.reward, start)

    @property
    def judges(self) -> tuple[UserMetric, ...]:
        """All functions of the user's that judge answers."""
        return (*self.functions, self.reward) if self.reward else self.functions

    def _wanted(self) -> set[str]:
        """What the search goes by, beside what every validation gives."""
        return {*self.config.search.measured} - {*reported(self.tokenized.task)}

    def _measured(self, scores: "Scores") -> dict[str, float]:
        """Metrics by their keys in a report, but for those that every validation gives."""
        found = {f"validation_{name}": value for name, value in scores.values().items()}
        return {key: value for key, value in found.items() if key not in reported(self.tokenized.task)}

    def _judged(self, answers: list[str], rows: list[dict[str, Any]]) -> "Scores":
        """Metrics of answers alone, whose losses are known from elsewhere."""
        from ftray.evaluation.metrics import Scores

        scores = Scores(np.zeros(len(rows)), np.zeros(len(rows)))
        scores.add_generated(answers, [row["target"] for row in rows])
        for function in self.judges:
            function.add_to(scores, rows)
        return scores

    def score(
        self, model: "PreTrainedModel | PeftModel", tokenizer: "PreTrainedTokenizerBase", rows: list[dict[str, Any]]
    ) -> "Scores":
        """Losses, predictions and metrics of `rows`, those of the user's functions among them.

        Raises:
            UserMetricError: a function of the user's failed.
        """
        scores = self.tokenized.task.load().score(model, tokenizer, rows, self.config.evaluation)
        for function in self.judges:
            function.add_to(scores, rows)
        return scores

    def budget(self) -> int:
        """Records a trial sees when nothing stops it."""
        return budget(self.config, self.tokenized.splits["train"].drawn)

    def rungs(self) -> list[Rung]:
        """Where trials are compared; the last one ends the budget."""
        return rungs(self.budget(), self.config, self.paired.fresh if self.paired else 0)


def reported(task: TaskSpec) -> tuple[str, ...]:
    """The metrics that every validation of a task gives, by their keys in a report."""
    return tuple(f"validation_{name}" for name in task.load().objective.reported)


def trainer(
    context: SearchContext, run: RunSpec, name: str, storage: Location, callbacks: list[Any] | None = None
) -> TorchTrainer:
    """A `TorchTrainer` for `run`; one of the same name and storage resumes from its last checkpoint."""
    cpus = context.config.scaling.cpus_per_worker or 1
    config = {"run": run, "context": context}
    return group_trainer(context.config, context.gpus_per_worker, train_worker, config, cpus, name, storage, callbacks)


def group_trainer(
    cfg: Config,
    gpus_per_worker: float,
    worker: Callable[[dict[str, Any]], Any],
    config: dict[str, Any],
    cpus: float,
    name: str,
    storage: Location,
    callbacks: list[Any] | None = None,
) -> TorchTrainer:
    """A `TorchTrainer` whose `scaling.workers` workers run `worker(config)`.

    If it is stopped from outside, :func:`release` gives its placement group back.
    """
    gathers = cfg.training.zero_stage == 3 or cfg.training.shard_base
    return SoloTrainer(
        worker,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if gpus_per_worker else "gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=cfg.scaling.workers,
            use_gpu=gpus_per_worker > 0,
            resources_per_worker={"CPU": cpus} | ({"GPU": gpus_per_worker} if gpus_per_worker else {}),
        ),
        run_config=train.RunConfig(
            name=name,
            **storage.ray_storage(),
            failure_config=train.FailureConfig(max_failures=cfg.search.max_failures),
            checkpoint_config=train.CheckpointConfig(
                num_to_keep=1,
                checkpoint_score_attribute=cfg.search.goal.metric,
                checkpoint_score_order=cfg.search.goal.direction,
            ),
            callbacks=[*(callbacks or []), HeedSigterm()],
            # over a sharded base freed memory goes back to the system: see ftray.training.engine.return_freed_memory
            worker_runtime_env=None if gathers else {"env_vars": MALLOC},
        ),
    )


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Run one worker of a trainer.

    Returns:
        `reports`: all so far; `failure`: the reason why the run gives no result, however often it is restarted, else
        None; `cut_off`: whether it had to end before its last step, so that its trainer must be started again;
        `mendable`: whether it can resume once the user has mended what the failure names.
    """
    from ftray.adapters.lora_init import SAMPLES
    from ftray.compat.torch import out_of_memory
    from ftray.training.single_run_trainer import (
        SingleRunTrainer,  # here: the trial that starts the trainer needs none of it
    )
    from ftray.training.zero3_trainer import Batch, Zero3Trainer

    run: RunSpec = config["run"]
    data, seed, batch_size = config["context"].tokenized, run.training.seed, run.training.batch_size
    rank, world_size = train.get_context().get_world_rank(), train.get_context().get_world_size()
    micro_batch = micro_batch_size(run.training, world_size)

    def batches(step: int) -> Iterator[Batch]:
        """Micro-batches from a step on, to the run's last."""
        last = run.steps * batch_size
        return training_batches(data, seed, step * batch_size, last, micro_batch, rank, world_size)

    def validation() -> Iterable[Batch]:
        return validation_batches(data, run.training.validation_records, micro_batch, rank, world_size)

    make = Zero3Trainer if run.training.zero_stage == 3 else SingleRunTrainer
    trainer = make(run, lambda: list(islice(batches(0), SAMPLES)))
    trainer.measure, trainer.preempted = config["context"].measure(), preempted
    if isinstance(trainer, SingleRunTrainer):
        trainer.pack.rollouts = config["context"].rollouts(trainer.pack)
    if _restore(trainer):
        for past in trainer.history.reports:  # this driver may not have received them
            train.report(dict(past))

    def report(metrics: Mapping[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as directory:
            trainer.save(directory)
            seal(Path(directory), trainer.rank, trainer.world_size)
            train.report(dict(metrics), checkpoint=train.Checkpoint.from_directory(directory))

    failure, mendable = None, False
    try:
        with listening():
            trainer.fit(batches(trainer.history.step), validation, report)
            if not trainer.history.over:
                report({CUT_OFF: trainer.history.step})
    except RunFailed as error:
        failure = str(error)
    except UserMetricError as error:
        failure, mendable = str(error), True
    except RuntimeError as error:
        if not out_of_memory(error) or trainer.world_size > 1:
            raise  # the other ranks wait in a collective: only the end of the whole group frees them
        failure = f"out of memory: {str(error).splitlines()[0]}"
    cut_off = not failure and not trainer.history.over
    return {"failure": failure, "reports": trainer.history.reports, CUT_OFF: cut_off, MENDABLE: mendable}


def _restore(trainer: "SingleRunTrainer | Zero3Trainer") -> bool:
    """Resume from the newest checkpoint that is whole; returns whether there is one."""
    newest = train.get_checkpoint()
    if newest is None:
        return False
    for checkpoint in (newest, *(known.checkpoint for known in reversed(train.get_all_reported_checkpoints()))):
        with checkpoint.as_directory() as directory:
            if find_corruption(Path(directory)) is None:
                trainer.restore(directory)
                return True
    return False


def release(everything: bool = False) -> bool:
    """Release the resources of stopped trainers of this Ray job, which couldn't do so themselves.

    Args:
        everything: also release those of trainers that are about to stop.

    Returns:
        Whether there were any.
    """
    job, any_left = ray.get_runtime_context().get_job_id(), False
    for group in placement_groups():
        # Tune's own groups are made by the driver, which is no actor
        ours = group.creator_job_id.hex() == job and not ActorID(group.creator_actor_id).is_nil()
        if ours and not is_removed(group) and (everything or group.creator_actor_dead):
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
            any_left = True
    return any_left


def release_until_none_is_left() -> None:
    """Release those of trainers that stop right now: until its process is gone, one may start its workers once more.

    Ray, which is told of that trainer's end before, would keep the group for as long as the cluster lives.
    """
    begun = released = time.monotonic()
    while time.monotonic() < min(released + SETTLED, begun + RELEASE_PATIENCE):
        if release(everything=True):
            released = time.monotonic()
        time.sleep(0.1)
