"""Private names of Ray Train; seen in Ray 2.60.0."""

from typing import Any

from ray.train.torch import TorchTrainer

# what `Result.from_path` raises for a list of checkpoints that was cut off: it has no public class
from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError as BrokenCheckpointList

# the one callback that is given the worker group, to run something in each worker's main thread: the public one,
# `ray.train.UserCallback`, hears of reports and exceptions alone
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.worker_group import WorkerGroup

__all__ = ["BrokenCheckpointList", "SoloTrainer", "WorkerGroup", "WorkerGroupCallback", "preemption_known"]


def preemption_known() -> bool:
    """In a worker: whether Ray Train has told this process that its group loses a node.

    `ray.train.get_preemption_info` is a barrier for all workers, at every call.
    """
    return get_train_context().preemption_context.preemption_info is not None


class SoloTrainer(TorchTrainer):
    """A `TorchTrainer` without Ray's own helper that gives its placement group back if it is stopped from outside.

    That is one more process a trainer, needs the dashboard to notice that a trainer is gone, and has no switch.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [c for c in callbacks if type(c).__name__ != "PlacementGroupCleanerCallback"]
