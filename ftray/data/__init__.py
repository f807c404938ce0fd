"""Data: sources -> records -> tokens -> shards -> batches, in the order of the files one reads them."""

from ftray.data.pipeline import prepare
from ftray.data.shards import Split, TokenizedData
from ftray.data.splits import DataCheck

__all__ = ["DataCheck", "Split", "TokenizedData", "prepare"]
