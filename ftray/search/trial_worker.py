"""One adapter under Ray Train: a `TorchTrainer` whose workers stream their shards and run the training loop."""

import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import ray
from ray import ActorID, PlacementGroupID, train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import PlacementGroup, remove_placement_group

from ftray.compat.ray import is_removed, placement_groups
from ftray.compat.ray_train import SoloTrainer
from ftray.config import AdapterConfig, Config, TrainingConfig
from ftray.data import TokenizedData
from ftray.data.ray_loader import RankedShards, training_row_groups, validation_row_groups
from ftray.runtime.preemption import HeedSigterm, listening, noticed
from ftray.search.rungs import budget, rung_records
from ftray.storage.location import Location, for_ray
from ftray.storage.manifest import find_corruption, seal
from ftray.training.run_spec import RunFailed, RunSpec, micro_batch_size

CUT_OFF = "cut_off"  # marks a report that is none, but brings a checkpoint from between two rungs
# of glibc, for workers: memory in huge pages; what a step frees stays for the next one instead of going back; and one
# arena, as those of other threads than the first, in which Ray Train runs a worker, give all that is large back at once
MALLOC = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"
    f":glibc.malloc.mmap_threshold={2**32}:glibc.malloc.trim_threshold={2**40}"
}
LOSSES = ("validation_loss", "validation_perplexity")  # what validation gives without predicting anything


@dataclass(frozen=True)
class SearchContext:
    """What all trials of a search share: everything but adapter and optimiser settings."""

    config: Config
    model_path: str
    data: str  # directory of the tokenized shards
    gpus_per_worker: float

    def run(self, adapter: dict[str, Any], training: dict[str, Any]) -> RunSpec:
        """The run of one configuration: as many steps as make up the search's budget of records.

        Args:
            adapter: fields of AdapterConfig.
            training: fields of TrainingConfig that differ from the job's own.
        """
        settings = TrainingConfig.model_validate(self.config.training.model_dump() | training)
        steps = max(1, round(self.budget() / settings.batch_size))
        rungs = rung_records(self.budget(), self.config)
        at = sorted({min(steps, max(1, math.ceil(records / settings.batch_size))) for records in rungs})
        task = TokenizedData.load(self.data).task
        longest = self.config.data.max_length
        return RunSpec(
            self.config.model, self.model_path, AdapterConfig(**adapter), settings, steps, tuple(at), task, longest
        )

    def measure(self) -> Callable[[Any], dict[str, float]] | None:
        """Gives the metrics of the task (`validation_<name>`) over validation records; None where the loss is all."""
        from ftray.models.load import load_tokenizer

        cfg, data = self.config, TokenizedData.load(self.data)
        if cfg.search.metric in LOSSES:
            return None
        task, rows = data.task.load(), data.rows("validation", cfg.training.validation_records)
        tokenizer = load_tokenizer(self.model_path, cfg.model.trust_remote_code, cfg.data.chat_template)

        def measure(model: Any) -> dict[str, float]:
            values = task.score(model, tokenizer, rows, cfg.evaluation).values()
            return {f"validation_{k}": v for k, v in values.items() if f"validation_{k}" not in LOSSES}

        return measure

    def budget(self) -> int:
        """Records a trial sees when nothing stops it."""
        return budget(self.config, TokenizedData.load(self.data).splits["train"].records)


def trainer(
    job: SearchContext, run: RunSpec, name: str, storage: Location, callbacks: list[Any] | None = None
) -> TorchTrainer:
    """A `TorchTrainer` for `run`; one of the same name and storage goes on from its last checkpoint."""
    data, seed = TokenizedData.load(job.data), run.training.seed
    datasets = {
        "train": training_row_groups(data, seed, run.steps * run.training.batch_size),
        "validation": validation_row_groups(data, run.training.validation_records),
    }
    cpus = job.config.scaling.cpus_per_worker or 1
    return group_trainer(job, train_worker, {"run": run, "job": job}, cpus, datasets, seed, name, storage, callbacks)


def group_trainer(
    job: SearchContext,
    worker: Callable[[dict[str, Any]], Any],
    config: dict[str, Any],
    cpus: float,
    datasets: dict[str, Any],
    seed: int,
    name: str,
    storage: Location,
    callbacks: list[Any] | None = None,
) -> TorchTrainer:
    """A `TorchTrainer` whose `scaling.workers` workers run `worker(config)`, each with its rows of `datasets`.

    If it is stopped from outside, :func:`release` gives its placement group back.
    """
    return SoloTrainer(
        worker,
        train_loop_config=config,
        datasets=datasets,
        dataset_config=RankedShards(TokenizedData.load(job.data), seed),
        torch_config=TorchConfig(backend="nccl" if job.gpus_per_worker else "gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=job.config.scaling.workers,
            use_gpu=job.gpus_per_worker > 0,
            resources_per_worker={"CPU": cpus} | ({"GPU": job.gpus_per_worker} if job.gpus_per_worker else {}),
        ),
        run_config=train.RunConfig(
            name=name,
            **for_ray(storage),
            failure_config=train.FailureConfig(max_failures=job.config.search.max_failures),
            checkpoint_config=train.CheckpointConfig(
                num_to_keep=1,
                checkpoint_score_attribute=job.config.search.metric,
                checkpoint_score_order=job.config.search.direction,
            ),
            callbacks=[*(callbacks or []), HeedSigterm()],
            # ZeRO 3 has its own way with memory: see ftray.training.engine.return_freed_memory
            worker_runtime_env={"env_vars": MALLOC} if job.config.training.zero_stage < 3 else None,
        ),
    )


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """What each worker runs; returns all `reports`, and the `failure` that no restart would mend (None: finished).

    Or `cut_off`: it had to end before its last step, and its trainer will go on from there.
    """
    from ftray.adapters.lora_init import SAMPLES
    from ftray.multi_adapter.shared_model import out_of_memory
    from ftray.training.single_run_trainer import (
        SingleRunTrainer,  # here: the trial that starts the trainer needs none of it
    )
    from ftray.training.zero3_trainer import Batch, Zero3Trainer

    run: RunSpec = config["run"]
    micro_batch = micro_batch_size(run.training, train.get_context().get_world_size())
    collate = run.task.load().collate

    def batches(name: str) -> Iterable[Batch]:
        shard = train.get_dataset_shard(name)
        return shard.iter_torch_batches(batch_size=micro_batch, collate_fn=collate, prefetch_batches=2)

    make = Zero3Trainer if run.training.zero_stage == 3 else SingleRunTrainer
    trainer = make(run, lambda: list(islice(batches("train"), SAMPLES)))
    trainer.measure, trainer.noticed = config["job"].measure(), noticed
    if _restore(trainer):
        for past in trainer.history.reports:  # whoever listens now may have heard none of them
            train.report(past)

    def report(metrics: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as directory:
            trainer.save(directory)
            seal(Path(directory), trainer.rank, trainer.world_size)
            train.report(metrics, checkpoint=train.Checkpoint.from_directory(directory))

    seen = trainer.history.step * trainer.accumulation
    failure = None
    try:
        with listening():
            trainer.fit(islice(batches("train"), seen, None), lambda: batches("validation"), report)
            if not trainer.history.over:
                report({CUT_OFF: trainer.history.step})
    except RunFailed as error:
        failure = str(error)
    except RuntimeError as error:
        if not out_of_memory(error) or trainer.world_size > 1:
            raise  # the other ranks wait in a collective: only the end of the whole group frees them
        failure = f"out of memory: {str(error).splitlines()[0]}"
    cut_off = not failure and not trainer.history.over
    return {"failure": failure, "reports": trainer.history.reports, CUT_OFF: cut_off}


def _restore(trainer: Any) -> bool:
    """Go on from the newest checkpoint that is whole; whether there is one."""
    newest = train.get_checkpoint()
    if newest is None:
        return False
    for checkpoint in (newest, *(known.checkpoint for known in reversed(train.get_all_reported_checkpoints()))):
        with checkpoint.as_directory() as directory:
            if find_corruption(Path(directory)) is None:
                trainer.restore(directory)
                return True
    return False


def release(everything: bool = False) -> None:
    """Give back what trainers of this job still hold that were stopped, and so couldn't tidy up after themselves.

    Args:
        everything: also what those hold that are about to stop.
    """
    job = ray.get_runtime_context().get_job_id()
    for group in placement_groups():
        # Tune's own groups are made by the driver, which is no actor
        ours = group.creator_job_id.hex() == job and not ActorID(group.creator_actor_id).is_nil()
        if ours and not is_removed(group) and (everything or group.creator_actor_dead):
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
