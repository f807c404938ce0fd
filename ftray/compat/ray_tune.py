"""Private names of Ray Tune; seen in Ray 2.60.0."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import ray

Answer = Callable[..., ray.ObjectRef]


class _Actor:
    """Stands where Tune keeps the actor of a trial: what is called on it is given to `answer`, by name."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def __getattr__(self, method: str) -> SimpleNamespace:
        return SimpleNamespace(remote=partial(self._answer, method))


@contextmanager
def trials_without_actors(answer: Answer) -> Iterator[None]:
    """Within it, Tune starts no process for a trial: `answer(config, method, *args)` gives the result of each call.

    A process that only waits for reports would cost 180 MB and two seconds, as what Tune sends it imports Tune. Tune
    has no public way to have a trial in a process that is already there.
    """
    from ray.tune.execution.class_cache import _ActorClassCache

    get = _ActorClassCache.get

    def without_actor(cache: _ActorClassCache, trainable: type) -> ray.actor.ActorClass:
        actor_class = get(cache, trainable)
        actor_class.options = lambda **options: SimpleNamespace(
            remote=lambda config, **kwargs: _Actor(partial(answer, config))
        )
        return actor_class

    _ActorClassCache.get = without_actor
    try:
        yield
    finally:
        _ActorClassCache.get = get


def no_checkpoint() -> object:
    """What a trial gives that is asked to save, and has nothing to: Tune pauses it all the same."""
    from ray.train._internal.session import _TrainingResult

    return _TrainingResult(checkpoint=None, metrics={})
