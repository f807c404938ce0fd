"""Trains one run on a base model of its own: a pack with a single trial, and as fast as a pack."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ftray.errors import RunFailed
from ftray.training.checkpoint import load_checkpoint
from ftray.training.pack import Batch
from ftray.training.pack_trainer import PackTrainer
from ftray.training.run_spec import RunSpec
from ftray.training.train_state import Report, TrainState

NAME = "run"


class SingleRunTrainer:
    """Same interface and losses as :class:`ftray.training.zero3_trainer.Zero3Trainer`.

    Not for ZeRO 3, where no worker has the whole base.

    Attributes:
        measure, preempted: as those of `Zero3Trainer`.
    """

    measure: Callable[[Any], dict[str, float]] | None = None
    preempted: Callable[[], bool] = staticmethod(lambda: False)

    def __init__(self, run: RunSpec, samples: Callable[[], list[Batch]] | None = None):
        self.pack = PackTrainer(run.model, run.model_path, run.training, run.task, run.longest)
        self.pack.join(NAME, run, samples=samples)
        self.trial = self.pack.trials[NAME]
        self.rank, self.world_size = self.pack.rank, self.pack.world_size

    @property
    def history(self) -> TrainState:
        """The state of the run."""
        return self.trial.history

    def restore(self, directory: str) -> None:
        """Resume from a checkpoint directory that :meth:`save` wrote with the same run and world size."""
        update = self.trial.update
        self.history.restore(load_checkpoint(update.engine, update.allocation, directory))
        self.pack.pack.adapters[NAME].step = self.history.step

    def save(self, directory: str) -> None:
        """Write a checkpoint; every rank calls it with its own view of the same directory."""
        self.pack.save(NAME, directory)

    def fit(
        self,
        batches: Iterator[Batch],
        validation: Callable[[], Iterable[Batch]],
        report: Callable[[Report], None],
    ) -> None:
        """Train to the last step; see :meth:`ftray.training.zero3_trainer.Zero3Trainer.fit`.

        Raises:
            RunFailed: it diverged, or one micro-batch doesn't fit in memory.
        """
        self.pack.measure, self.trial.batches = self.measure, batches
        while not self.history.over and not self.pack.any_rank(self.preempted()):
            failures = self.pack.step([NAME])
            if self.history.due and not failures:
                failures = self.pack.validate([NAME], validation())
                if not failures:
                    report(self.history.reports[-1])
            if failures:
                raise RunFailed(failures[NAME])
