"""Starts the packs of a search: the broker, and a long-lived worker group under Ray Train for each pack."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray import cloudpickle
from ray.actor import ActorHandle
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ftray.config import Config
from ftray.errors import UserError
from ftray.runtime.cluster import cpus_each, node_resources, workers_that_fit
from ftray.search.broker import TrialBroker
from ftray.search.failures import PROCESS_DIED, SearchBroken, last_line, training_failure
from ftray.search.pack_worker import PackPlace, most_trials, pack_worker
from ftray.search.trial_worker import SearchContext, group_trainer
from ftray.storage.location import Location

FIRST_TRIALS = 8  # trials that begin while the packs load their models


@dataclass
class Capacity:
    """How many trials can train at once.

    Attributes:
        trials: an estimate until the first pack is ready.
        since: when the first pack became ready, by `time.monotonic`; None: none is ready yet.
    """

    trials: int
    since: float | None = None

    def measure(self, broker: ActorHandle, packs: int) -> None:
        """Wait for the first pack, and take its number of trials."""
        with suppress(ray.exceptions.RayError):  # no pack can start: the broker tells the trials
            self.trials = ray.get(broker.capacity.remote(packs))
            self.since = time.monotonic()
            print(f"packed: {packs} worker group(s), {self.trials} trials at once", flush=True)


@dataclass
class Packs:
    """The packs of a search, as its driver knows them.

    Attributes:
        count: how many there are.
        broker: handle of their :class:`ftray.search.broker.TrialBroker`.
        capacity: how many trials they take.
    """

    count: int
    broker: ActorHandle
    capacity: Capacity

    def begin(self, search: SearchContext) -> None:
        """Let them load what they train; until then they import, and wait."""
        if self.capacity.since is None:
            self.capacity.trials = min(FIRST_TRIALS, self.count * most_trials(search))
        self.broker.begin.remote(cloudpickle.dumps(search))


@contextmanager
def packs(cfg: Config, gpus_per_worker: float, experiment: Location, trials: int) -> Iterator[Packs]:
    """Start a broker for `trials` and as many packs as fit on the cluster, whose workers wait for :meth:`Packs.begin`.

    Raises:
        UserError: no pack could start; the message says why.
    """
    count = packs_that_fit(cfg, gpus_per_worker)
    # on the driver's node: then losing another node doesn't end the search
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    broker = ray.remote(TrialBroker).options(num_cpus=0, max_concurrency=1000, scheduling_strategy=here).remote(trials)
    places = [PackPlace(broker, i, experiment) for i in range(count)]
    runners = [threading.Thread(target=_run_pack, args=(cfg, gpus_per_worker, p), daemon=True) for p in places]
    capacity = Capacity(FIRST_TRIALS)
    for thread in (*runners, threading.Thread(target=capacity.measure, args=(broker, count), daemon=True)):
        thread.start()
    patience = threading.TIMEOUT_MAX
    try:
        yield Packs(count, broker, capacity)
    except SearchBroken as error:
        patience = 5.0  # seconds: an object store that doesn't answer delays each last write of a pack by a minute
        with suppress(*PROCESS_DIED):
            if not ray.get(broker.ready_packs.remote()):
                raise UserError(f"no pack could start: {error}") from None
        raise
    finally:
        with suppress(*PROCESS_DIED):  # the broker has died, and the packs with it
            if ray.get(broker.in_call.remote()):  # a final call that nobody waits for any more
                patience = 0.0
            ray.get(broker.close.remote("the search is over"))
            deadline = time.monotonic() + patience
            for index in ray.get(broker.ready_packs.remote()):  # Ray ends the others, which still wait for a node
                runners[index].join(max(0.0, deadline - time.monotonic()))
        threading.Thread(target=_end, args=(broker, runners), daemon=True).start()


def _end(broker: ActorHandle, runners: list[threading.Thread]) -> None:
    """End the broker once no pack asks it any more; Ray itself keeps an actor whose handle Tune has pickled."""
    for thread in runners:
        thread.join()
    if ray.is_initialized():
        ray.kill(broker)


def packs_that_fit(cfg: Config, gpus_per_worker: float) -> int:
    """Number of packs: as configured, else as many as the GPUs allow, without GPUs one per `workers` nodes."""
    if cfg.scaling.packs:
        return cfg.scaling.packs
    nodes = node_resources()
    fit = workers_that_fit(0, gpus_per_worker, nodes) if gpus_per_worker else sum("CPU" in node for node in nodes)
    return max(1, fit // cfg.scaling.workers)


def cpus_of_pack_worker(cfg: Config, gpus_per_worker: float) -> float:
    """The CPUs of each worker of a pack: as configured, else its share of those that are up."""
    workers = packs_that_fit(cfg, gpus_per_worker) * cfg.scaling.workers
    return cfg.scaling.cpus_per_worker or cpus_each(workers, gpus_per_worker)


def pack_trainer(
    cfg: Config,
    gpus_per_worker: float,
    worker: Callable[[dict[str, Any]], Any],
    config: dict[str, Any],
    name: str,
    storage: Location,
) -> TorchTrainer:
    """A `TorchTrainer` whose workers run `worker(config)`, each with its share of the CPUs."""
    cpus = cpus_of_pack_worker(cfg, gpus_per_worker)
    return group_trainer(cfg, gpus_per_worker, worker, config, cpus, name, storage)


def _run_pack(cfg: Config, gpus_per_worker: float, place: PackPlace) -> None:
    """Keep one pack running until the search is over; a pack that can't be kept running closes the broker."""
    name, restarts = f"pack-{place.index}", cfg.search.max_failures
    while True:
        (place.experiment / name).remove()  # trials keep their own checkpoints
        trainer = pack_trainer(cfg, gpus_per_worker, pack_worker, {"place": place}, name, place.experiment)
        try:
            if trainer.fit().return_value:
                with suppress(*PROCESS_DIED):
                    ray.get(place.broker.lost.remote(place.index))
                return
            print(f"pack {place.index}: its node is about to end; it restarts from checkpoints", flush=True)
        except PROCESS_DIED as error:  # Train's controller has died, which Train itself doesn't restart
            if not restarts:
                _close(place, last_line(error))
                return
            restarts -= 1
        except Exception as error:
            _close(place, training_failure(error))
            return


def _close(place: PackPlace, reason: str) -> None:
    with suppress(*PROCESS_DIED):  # the broker has died, and the trials know
        ray.get(place.broker.close.remote(reason))
