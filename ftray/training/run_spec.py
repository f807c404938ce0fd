"""What defines a training run, in plain data; imports nothing slow, such as torch."""

from dataclasses import dataclass

from ftray.config import AdapterConfig, ModelConfig, TrainingConfig
from ftray.errors import UserError
from ftray.task_spec import CAUSAL, TaskSpec


@dataclass(frozen=True)
class RunSpec:
    """All that defines one training run, except its data."""

    model: ModelConfig
    model_path: str
    adapter: AdapterConfig
    training: TrainingConfig
    steps: int
    evaluate_at: tuple[int, ...] = ()  # steps after which validation runs; the last step always does
    task: TaskSpec = CAUSAL
    longest: int | None = None  # tokens that a record may have; None: any number
    start: str | None = None  # checkpoint or adapter, a directory or URI, whose weights it begins with; None: new ones


def accumulation_steps(cfg: TrainingConfig, workers: int) -> int:
    """Forward passes each worker makes per optimiser step.

    Raises:
        UserError: batch_size is not divisible by workers x micro_batch.
    """
    micro_batch = micro_batch_size(cfg, workers)
    if cfg.batch_size % (workers * micro_batch):
        raise UserError(
            f"training.batch_size {cfg.batch_size} can't be divided among {workers} worker(s) in micro-batches of "
            f"{micro_batch}: make it a multiple of {workers * micro_batch}"
        )
    return cfg.batch_size // (workers * micro_batch)


def check_workers(cfg: TrainingConfig, workers: int, gpus: float | None = None) -> None:
    """Check that there is somebody to share the base out with, a GPU to keep it from, and one that Liger runs on.

    Args:
        workers: of a trial or pack.
        gpus: of a worker; None: not known yet.

    Raises:
        UserError: there is not.
    """
    if cfg.shard_base and workers == 1 and cfg.offload != "all":
        raise UserError("training.shard_base needs scaling.workers 2 or more: one worker has nobody to share with")
    if cfg.shard_base and cfg.offload == "all" and gpus == 0:
        raise UserError("training.offload all with shard_base needs GPUs: without, layers lie in CPU memory anyway")
    if cfg.liger and gpus == 0:
        raise UserError("training.liger needs GPUs: its kernels run nowhere else")


def micro_batch_size(cfg: TrainingConfig, workers: int) -> int:
    """Records per forward pass and worker."""
    return cfg.micro_batch or max(1, cfg.batch_size // workers)
