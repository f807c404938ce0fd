"""Private names of Ray Train, but for its trainers; seen in Ray 2.60.0. Imports no torch."""

# what `Result.from_path` raises for a list of checkpoints that was cut off: it has no public class
from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError as BrokenCheckpointList

# the one callback that is given the worker group, to run something in each worker's main thread: the public one,
# `ray.train.UserCallback`, hears of reports and exceptions alone
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.worker_group import WorkerGroup

__all__ = ["BrokenCheckpointList", "WorkerGroup", "WorkerGroupCallback", "preemption_known"]


def preemption_known() -> bool:
    """In a worker: whether Ray Train has told this process that its group loses a node.

    `ray.train.get_preemption_info` is a barrier for all workers, at every call.
    """
    return get_train_context().preemption_context.preemption_info is not None
