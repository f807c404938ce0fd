"""Notice that a process has not long to live: SIGTERM, as spot instances and Kubernetes send it, or a drained node.

The driver then ends, and all that it has under way writes a checkpoint before. A worker group writes its checkpoints
and returns, to be started again, where Ray knows the node as draining on another one.
https://docs.ray.io/en/latest/train/api/doc/ray.train.get_preemption_info.html
"""

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ftray.compat.ray_train import WorkerGroupCallback, preemption_known
from ftray.errors import Terminated

GRACE = 25.0  # seconds for checkpoints, of the 30 that Kubernetes and Google Cloud give
_told = threading.Event()


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """In the main thread, after `ray.init`, which sets a handler of its own: SIGTERM ends what is inside.

    There it is a KeyboardInterrupt, the one exception that Ray's calls let through.

    Raises:
        Terminated: it came.
    """
    came = False

    def end(signum: int, frame: Any) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt:
        if came:
            raise Terminated from None
        raise


class HeedSigterm(WorkerGroupCallback):
    """Lets the workers of a group go on after SIGTERM, until they have seen by :func:`noticed` that it came."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        """In each worker's main thread: the training function has another one, where signals can't be caught."""
        worker_group.execute(_heed)


def _heed() -> None:
    signal.signal(signal.SIGTERM, lambda signum, frame: _told.set())


def noticed() -> bool:
    """In a worker: whether this process, or the driver, will soon be killed. Costs no message."""
    return _told.is_set() or preemption_known()


class Notice:
    """Tells workers that the driver ends; an asyncio actor of the job, for those without a broker."""

    def __init__(self) -> None:
        self.rung = asyncio.Event()
        self.listeners: dict[str, asyncio.Event] = {}

    async def listen(self, worker: str) -> None:
        """Returns when the driver ends."""
        self.listeners[worker] = asyncio.Event()
        await self.rung.wait()

    async def leave(self, worker: str) -> None:
        """The worker has nothing left to write."""
        if worker in self.listeners:
            self.listeners.pop(worker).set()

    async def ring(self) -> None:
        """Returns when all have left that listen now."""
        self.rung.set()
        await asyncio.gather(*(left.wait() for left in list(self.listeners.values())))


def _name() -> str:
    return f"notice of {ray.get_runtime_context().get_job_id()}"


@contextmanager
def notice() -> Iterator[None]:
    """In the driver: if it is interrupted, workers of this job that are :func:`listening` write checkpoints first."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": _name(), "num_cpus": 0, "max_concurrency": 1000, "scheduling_strategy": here}
    actor = ray.remote(Notice).options(**options).remote()
    try:
        yield
    except KeyboardInterrupt:
        with suppress(ray.exceptions.RayError):
            ray.get(actor.ring.remote(), timeout=GRACE)
        raise
    finally:
        ray.kill(actor)


@contextmanager
def listening() -> Iterator[None]:
    """In a worker: :func:`noticed` hears of the driver's end too, which waits for this to be over."""
    try:
        actor, worker = ray.get_actor(_name()), ray.get_runtime_context().get_worker_id()
    except ValueError:  # the driver gives no notice
        yield
        return

    def wait() -> None:
        with suppress(ray.exceptions.RayError):  # the search is over, and the actor with it
            ray.get(actor.listen.remote(worker))
            _told.set()

    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        with suppress(ray.exceptions.RayError):
            ray.get(actor.leave.remote(worker))
