"""Records of preferences."""

from ftray.data.record_task import TextTask


class PairTask(TextTask):
    """Placeholder until the records are there."""


class UnpairedTask(TextTask):
    """Placeholder until the records are there."""
