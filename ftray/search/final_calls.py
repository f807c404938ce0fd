"""What follows the last trial (final choice, proof, merge) in the process of the pack, which has all in memory."""

import gc
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

import ray
from ray import cloudpickle

from ftray.errors import UserError
from ftray.evaluation.user_metric import UserMetricError
from ftray.runtime.cluster import hardware, on_hardware
from ftray.runtime.preemption import preempted
from ftray.search.failures import PROCESS_DIED, PacksGone, last_line
from ftray.search.trial_worker import release

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from ftray.models.load import LoadedModel
    from ftray.search.pack_worker import PackContext
    from ftray.search.trial_worker import SearchContext

Returned = TypeVar("Returned")
GRACE = 60.0  # seconds that a pack has to end by itself, if it has to begin anew before


class CallFailed(RuntimeError):
    """A call failed in the process of a pack for a reason that another process may not have; the message is it."""


class Hardware:
    """Runs functions where the models are: in the pack's process while it lives, else each in a process of its own.

    Args:
        broker: of the pack that was kept (:meth:`ftray.search.broker.TrialBroker.keep`); None: there is none.
    """

    def __init__(self, context: "SearchContext", broker: "ActorHandle | None" = None):
        self._config, self._broker = context.config, broker

    def run(
        self, function: Callable[..., Returned], *args: object, reads_base: bool = False, max_retries: int = 3
    ) -> Returned:
        """What `function(*args)` returns.

        Args:
            reads_base: whether it takes the base model as `base`, to leave it as it is, where one is in memory.
            max_retries: as that of :func:`ftray.runtime.cluster.on_hardware`.

        Raises:
            UserError, UserMetricError: raised by the function.
            RayError: the process of its own has died, or raised something else.
        """
        grace = 0.0
        if self._broker is not None:
            try:
                returned = ray.get(self._broker.call.remote(cloudpickle.dumps((function, args, reads_base))))
                result, error = cast("tuple[Returned, Exception | None]", cloudpickle.loads(returned))
            except (PacksGone, *PROCESS_DIED):
                error = CallFailed("its process has ended")
            if not isinstance(error, CallFailed):
                if error is not None:
                    raise error
                return result
            self._end_pack()
            grace = GRACE
        task = on_hardware(self._config, function, *args, max_retries=max_retries)
        since = time.monotonic()
        while not ray.wait([task], timeout=1)[0]:
            release(everything=time.monotonic() - since > grace)  # trials that were stopped a moment ago
        return cast("Returned", ray.get(task))

    def end(self) -> None:
        """Let the pack end, while this process goes on: nothing is to be run any more."""
        if self._broker is not None:
            self._broker.close.remote("the search is over")
            self._broker = None

    def _end_pack(self) -> None:
        """Let the pack give its hardware to processes of their own."""
        broker, self._broker = self._broker, None
        try:
            ray.get(broker.close.remote("the search is over"))  # type: ignore[union-attr]
        except PROCESS_DIED:
            return


def pack_suffices(context: "SearchContext") -> bool:
    """Whether the worker of a pack has what a process of its own would get."""
    from ftray.search.packs import cpus_of_pack_worker, packs_that_fit  # here: packs need this module

    cfg, gpus = context.config, context.gpus_per_worker
    if cfg.scaling.workers > 1 or packs_that_fit(cfg, gpus) > 1:
        return False
    needed = hardware(cfg)
    return gpus >= needed["GPU"] if needed["GPU"] else cpus_of_pack_worker(cfg, gpus) >= needed["CPU"]


class FinalCalls:
    """Runs the calls of :class:`Hardware` in the worker of a pack whose trials are over.

    Args:
        base: the pack's model, which no trial changes; None: it isn't what a process of its own would load.
    """

    def __init__(self, context: "PackContext", base: "LoadedModel | None"):
        self.context, self.base = context, base

    def serve(self) -> None:
        """Run calls until there is none to come, or the node is about to end."""
        self._free()
        returned: bytes | None = None
        while not preempted():
            call = ray.get(self.context.broker.next_call.remote(self.context.index, returned))
            if call is None:
                return
            returned = self._run(call) if call else None

    def _run(self, call: bytes) -> bytes:
        """What a call returns, or raises; pickled, as the broker's process has none of its modules."""
        function, args, reads_base = cloudpickle.loads(call)
        if not reads_base:
            self.base = None
            self._free()
        known = {"base": self.base} if self.base else {}
        result, failure = None, cast("Exception | None", None)
        try:
            result = function(*args, **known)
        except (UserError, UserMetricError) as error:
            failure = error
        except Exception as error:  # as want of memory, which another process has not taken
            failure = CallFailed(last_line(error))
        return cast("bytes", cloudpickle.dumps((result, failure)))

    def _free(self) -> None:
        """Give back the memory of what nobody holds any more."""
        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
