"""Private names of Ray Train's `TorchTrainer`, which imports torch; seen in Ray 2.60.0."""

from typing import Any

from ray.train.torch import TorchTrainer


class SoloTrainer(TorchTrainer):
    """A `TorchTrainer` without Ray's own helper that gives its placement group back if it is stopped from outside.

    That is one more process a trainer, needs the dashboard to notice that a trainer is gone, and has no switch.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [c for c in callbacks if type(c).__name__ != "PlacementGroupCleanerCallback"]
