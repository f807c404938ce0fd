"""Trials of a pack as Tune knows them: no process of their own, but the broker's answers."""

from collections import Counter
from typing import TYPE_CHECKING, Any

import ray
from ray import tune

from ftray.compat.ray_tune import no_checkpoint

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.tune.experiment import Trial


class PackTrial(tune.Trainable):
    """What Tune is told to run. It never does: see :class:`TrialProxies`."""


class TrialProxies(tune.Callback):
    """Answers Tune in the place of the trials' actors, and tells the broker which trials are over.

    Args:
        broker: the :class:`ftray.search.broker.TrialBroker`.
    """

    def __init__(self, broker: "ActorHandle") -> None:
        self.broker = broker
        self._heard: Counter[int] = Counter()  # by trial, how many of its reports Tune has

    def answer(self, config: dict[str, Any], method: str, *args: object, **kwargs: object) -> ray.ObjectRef:
        """The result of a method that Tune calls on the actor of the trial of this configuration.

        What Tune adds to the configuration stays here, as it would import Tune where it goes.

        A trial that a scheduler pauses waits in its pack: it trains on when its next report is asked for.
        """
        number = config["number"]
        if method == "__ray_ready__":
            return self.broker.enter.remote(number, {key: config[key] for key in config if not key.startswith("__")})
        if method == "train":
            return self.broker.next.remote(number, self._heard[number])
        return ray.put(no_checkpoint() if method == "save" else {})

    def on_trial_result(
        self, iteration: int, trials: "list[Trial]", trial: "Trial", result: dict[str, Any], **info: object
    ) -> None:
        """Called for each report that Tune has taken."""
        self._heard[trial.config["number"]] += 1

    def on_trial_complete(self, iteration: int, trials: "list[Trial]", trial: "Trial", **info: object) -> None:
        """Called for a trial that is finished or was stopped early: only Tune knows for sure."""
        self.broker.leave.remote(trial.config["number"])

    def on_trial_error(self, iteration: int, trials: "list[Trial]", trial: "Trial", **info: object) -> None:
        """Called for a trial that failed."""
        self.broker.leave.remote(trial.config["number"])
