"""Starts the packs of a search: the broker, and a long-lived worker group under Ray Train for each pack."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ftray.data.ray_loader import validation_row_groups
from ftray.errors import UserError
from ftray.runtime.cluster import cpus_each, node_resources, workers_that_fit
from ftray.search.broker import TrialBroker
from ftray.search.failures import PROCESS_DIED, SearchBroken, last_line, training_failure
from ftray.search.pack_worker import PackContext, most_trials, pack_worker
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


@contextmanager
def packs(search: SearchContext, experiment: Location, trials: int) -> Iterator[tuple[ActorHandle, Capacity]]:
    """Start a broker for `trials` and as many packs as fit on the cluster; they load while Tune starts.

    Yields the broker and the capacity of the packs.

    Raises:
        UserError: no pack could start; the message says why.
    """
    count = packs_that_fit(search)
    # on the driver's node: then losing another node doesn't end the search
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    broker = ray.remote(TrialBroker).options(num_cpus=0, max_concurrency=1000, scheduling_strategy=here).remote(trials)
    contexts = [PackContext(search, broker, i, experiment) for i in range(count)]
    runners = [threading.Thread(target=_run_pack, args=(context,), daemon=True) for context in contexts]
    capacity = Capacity(min(FIRST_TRIALS, count * most_trials(search)))
    for thread in (*runners, threading.Thread(target=capacity.measure, args=(broker, count), daemon=True)):
        thread.start()
    patience = threading.TIMEOUT_MAX
    try:
        yield broker, capacity
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


def packs_that_fit(search: SearchContext) -> int:
    """Number of packs: as configured, else as many as the GPUs allow, without GPUs one per `workers` nodes."""
    if search.config.scaling.packs:
        return search.config.scaling.packs
    nodes = node_resources()
    gpus = search.gpus_per_worker
    fit = workers_that_fit(0, gpus, nodes) if gpus else sum("CPU" in node for node in nodes)
    return max(1, fit // search.config.scaling.workers)


def cpus_of_pack_worker(search: SearchContext) -> float:
    """The CPUs of each worker of a pack: as configured, else its share of those that are up."""
    workers = packs_that_fit(search) * search.config.scaling.workers
    return search.config.scaling.cpus_per_worker or cpus_each(workers, search.gpus_per_worker)


def pack_trainer(
    search: SearchContext, worker: Callable[[dict[str, Any]], Any], config: dict[str, Any], name: str, storage: Location
) -> TorchTrainer:
    """A `TorchTrainer` whose workers run `worker(config)`, each with its share of the CPUs."""
    cpus = cpus_of_pack_worker(search)
    seed = search.config.training.seed
    held_out = validation_row_groups(search.tokenized, search.config.training.validation_records)
    return group_trainer(search, worker, config, cpus, {"validation": held_out}, seed, name, storage)


def _run_pack(context: PackContext) -> None:
    """Keep one pack running until the search is over; a pack that can't be kept running closes the broker."""
    name, restarts = f"pack-{context.index}", context.search.config.search.max_failures
    while True:
        (context.experiment / name).remove()  # trials keep their own checkpoints
        trainer = pack_trainer(context.search, pack_worker, {"context": context}, name, context.experiment)
        try:
            if trainer.fit().return_value:
                with suppress(*PROCESS_DIED):
                    ray.get(context.broker.lost.remote(context.index))
                return
            print(f"pack {context.index}: its node is about to end; it restarts from checkpoints", flush=True)
        except PROCESS_DIED as error:  # Train's controller has died, which Train itself doesn't restart
            if not restarts:
                _close(context, last_line(error))
                return
            restarts -= 1
        except Exception as error:
            _close(context, training_failure(error))
            return


def _close(context: PackContext, reason: str) -> None:
    with suppress(*PROCESS_DIED):  # the broker has died, and the trials know
        ray.get(context.broker.close.remote(reason))
