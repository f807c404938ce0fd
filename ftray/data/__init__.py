"""Data: sources -> records -> tokens -> shards -> batches, in the order of the files one reads them."""

from ftray.data.shards import Split, TokenizedData, prepare
from ftray.data.splits import check

__all__ = ["Split", "TokenizedData", "check", "prepare"]
