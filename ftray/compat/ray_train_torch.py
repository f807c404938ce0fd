"""Private names of Ray Train's `TorchTrainer`, which imports torch; seen in Ray 2.60.0."""

from typing import Any

from ray.train.torch import TorchTrainer

# what hands out `datasets`, of which we give none; and what gives the placement group back if the trainer is stopped
# from outside, and needs the dashboard to notice that it was
UNUSED = ("DatasetsCallback", "PlacementGroupCleanerCallback")


class SoloTrainer(TorchTrainer):
    """A `TorchTrainer` without what is a process more each and has no switch."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [c for c in callbacks if type(c).__name__ not in UNUSED]
