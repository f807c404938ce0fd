"""What trials are compared by at a rung: the losses of their training batches, where validation would tell no more."""

from dataclasses import dataclass
from typing import Any

from ftray.adapters.methods import parameters
from ftray.config import AdapterConfig, Config
from ftray.data import TokenizedData
from ftray.data.shards import Split
from ftray.search.space import Space
from ftray.training.run_spec import RunSpec

LOSSES = ("validation_loss", "validation_perplexity")  # of held-out records, by which training batches judge too


@dataclass(frozen=True)
class PairedTraining:
    """When the training losses of trials can be compared.

    That is while no record has been seen twice, among trials that see the same records in the same steps with the same
    dropout: the loss of such a batch is that of held-out records, of the model as it was before the step. Weight decay
    shows in it as in a validation; dropout alone is absent from one.

    Attributes:
        fresh: records that a trial sees before it sees one of them again.
        seed, batch_size: of the data order; they say which records each step sees.
        dropout: see :func:`dropout_of`.
    """

    fresh: int
    seed: int
    batch_size: int
    dropout: tuple[tuple[str, Any], ...]

    def holds_for(self, run: RunSpec) -> bool:
        """Whether a trial is one of those that are compared."""
        order = (run.training.seed, run.training.batch_size)
        alike = order == (self.seed, self.batch_size) and dropout_of(run.adapter) == self.dropout
        return alike and run.start is None  # else it begins with weights that have seen these records


def paired_training(cfg: Config, space: Space, data: TokenizedData) -> PairedTraining | None:
    """How the trials of a search compare by their training losses; None: they don't.

    They do if halving goes by a loss, they train in packs, and the space draws neither the order of the data nor
    dropout.
    """
    from ftray.search.run_manifest import packable  # here: a pack's processes need no Optuna

    search, training = cfg.search, cfg.training
    goal, *others = search.goals
    if search.scheduler != "halving" or others or goal.metric not in LOSSES or goal.direction != "min":
        return None
    if (
        search.pack == "off"
        or not packable(cfg, space)
        or data.task.objective not in ("", "SFT")
        or not data.task.load().packed
    ):
        return None
    fresh = fresh_records(data.splits["train"])
    found = set()
    for corner in space.corners():
        own = training.model_copy(update=corner["training"])
        found.add(PairedTraining(fresh, own.seed, own.batch_size, dropout_of(AdapterConfig(**corner["adapter"]))))
    return found.pop() if len(found) == 1 else None


def dropout_of(adapter: AdapterConfig) -> tuple[tuple[str, Any], ...]:
    """The settings of an adapter that drop something out in training; of those that drop nothing, none."""
    settings = parameters(adapter).model_dump().items()
    return tuple(sorted((name, value) for name, value in settings if "dropout" in name and value))


def fresh_records(split: Split) -> int:
    """Records of an epoch, if it draws none of them twice; else 0."""
    return split.drawn if all(source.drawn <= source.rows for source in split.sources.values()) else 0
