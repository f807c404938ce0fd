"""Data: sources -> records -> tokens -> shards -> batches, in the order of the files one reads them."""

from ftray.data.check import DataCheck
from ftray.data.pipeline import prepare
from ftray.data.shards import Split, TokenizedData

__all__ = ["DataCheck", "Split", "TokenizedData", "prepare"]
