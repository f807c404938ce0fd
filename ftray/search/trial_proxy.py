"""A trial of a pack as Tune knows it. Imports no torch: a trial's process is light."""

from typing import TYPE_CHECKING, Any, cast

import ray
from ray import tune

from ftray.search.failures import PacksGone

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.tune.experiment import Trial


class TrialEndCallback(tune.Callback):
    """Tells the broker which trials are over: only Tune's driver knows for sure."""

    def __init__(self, broker: "ActorHandle"):
        self.broker = broker

    def on_trial_complete(self, iteration: int, trials: "list[Trial]", trial: "Trial", **info: object) -> None:
        """Called for a trial that is finished or was stopped early."""
        self.broker.leave.remote(trial.config["number"])

    def on_trial_error(self, iteration: int, trials: "list[Trial]", trial: "Trial", **info: object) -> None:
        """Called for a trial that failed and won't be restarted."""
        self.broker.leave.remote(trial.config["number"])


class TrialProxy(tune.Trainable):
    """The `Trainable` of a trial in a pack: hands its configuration to the broker and relays its reports to Tune."""

    def setup(self, config: dict[str, Any], broker: "ActorHandle") -> None:
        """Enter the trial; Tune calls this when it starts one in this process."""
        self.broker = broker
        self._enter(config)

    def _enter(self, config: dict[str, Any]) -> None:
        self.number, self.heard = config["number"], 0
        self._call(self.broker.enter.remote(self.number, config))

    def step(self) -> dict[str, Any]:
        """Wait for the trial's next report.

        Raises:
            TrialFailed: the trial failed; the message is the reason.
            PacksGone: no pack trains any more.
        """
        report = cast("dict[str, Any]", self._call(self.broker.next.remote(self.number, self.heard)))
        self.heard += 1
        return report

    @staticmethod
    def _call(result: ray.ObjectRef) -> object:
        """The result of a call of the broker; raises what the broker raised."""
        try:
            return ray.get(result)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayActorError:
            raise PacksGone("the process between the trials and the packs has died") from None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Enter the next trial, which reuses this process."""
        self._enter(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Pause the trial, as a scheduler asks: it waits in its pack until its next report is asked for."""
        return {"heard": self.heard}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Continue after the reports that Tune already has."""
        self.heard = (checkpoint or {"heard": 0})["heard"]
