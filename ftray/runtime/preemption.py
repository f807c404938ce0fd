"""Preemption: SIGTERM, as spot instances and Kubernetes send it before they end a process, or a node that Ray drains.

The driver ends after its workers have written checkpoints. A worker group writes its checkpoints and returns; it is
then started again, on another node if Ray knows its own as draining.
https://docs.ray.io/en/latest/train/api/doc/ray.train.get_preemption_info.html
"""

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ftray.compat.ray_train import WorkerGroup, WorkerGroupCallback, preemption_known
from ftray.errors import Terminated

GRACE = 25.0  # seconds for checkpoints, of the 30 that Kubernetes and Google Cloud give
_preempted = threading.Event()


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """End the block on SIGTERM; after `ray.init`, which sets a handler of its own. Only the main thread can hear of it.

    Inside, SIGTERM raises KeyboardInterrupt, the one exception that Ray's calls let through.

    Raises:
        Terminated: SIGTERM ended the block.
    """
    received = False

    def end(signum: int, frame: FrameType | None) -> None:
        nonlocal received
        received = True
        raise KeyboardInterrupt

    heard = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, end) if heard else None
    try:
        yield
    except KeyboardInterrupt:
        if received:
            raise Terminated from None
        raise
    finally:
        if before is not None:  # None also of a handler that isn't Python's
            signal.signal(signal.SIGTERM, before)


class HeedSigterm(WorkerGroupCallback):
    """Keeps the workers of a group running after SIGTERM, until they learn of it by :func:`preempted`."""

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        """Set the handler in each worker's main thread; the training function runs in another, which can't."""
        worker_group.execute(_heed)


def _heed() -> None:
    signal.signal(signal.SIGTERM, lambda signum, frame: _preempted.set())


def preempted() -> bool:
    """Whether this worker, or the driver, will soon be killed; costs no message."""
    return _preempted.is_set() or preemption_known()


class Notice:
    """Tells workers that have no broker that the driver ends; an asyncio actor, one a Ray job."""

    def __init__(self) -> None:
        self.given = asyncio.Event()
        self.listeners: dict[str, asyncio.Event] = {}

    async def listen(self, worker: str) -> None:
        """Wait until the driver ends."""
        self.listeners[worker] = asyncio.Event()
        await self.given.wait()

    async def leave(self, worker: str) -> None:
        """Stop listening: the worker has nothing left to write."""
        if worker in self.listeners:
            self.listeners.pop(worker).set()

    async def give(self) -> None:
        """Give notice, and wait until all workers that listen now have left."""
        self.given.set()
        await asyncio.gather(*(left.wait() for left in list(self.listeners.values())))


def _name() -> str:
    return f"notice of {ray.get_runtime_context().get_job_id()}"


@contextmanager
def notice() -> Iterator[None]:
    """In the driver: if the block is interrupted, wait until workers that are :func:`listening` wrote checkpoints."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": _name(), "num_cpus": 0, "max_concurrency": 1000, "scheduling_strategy": here}
    actor = ray.remote(Notice).options(**options).remote()
    try:
        yield
    except KeyboardInterrupt:
        with suppress(ray.exceptions.RayError):
            ray.get(actor.give.remote(), timeout=GRACE)
        raise
    finally:
        ray.kill(actor)


@contextmanager
def listening() -> Iterator[None]:
    """In a worker: :func:`preempted` includes the end of the driver, which waits for this block to end."""
    try:
        actor, worker = ray.get_actor(_name()), ray.get_runtime_context().get_worker_id()
    except ValueError:  # the driver gives no notice
        yield
        return

    def wait() -> None:
        with suppress(ray.exceptions.RayError):  # the search is over, and the actor with it
            ray.get(actor.listen.remote(worker))
            _preempted.set()

    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        with suppress(ray.exceptions.RayError):
            ray.get(actor.leave.remote(worker))
