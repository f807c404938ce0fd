"""The order of :mod:`ftray.data.row_groups` through Ray Data: each training worker streams its own rows."""

from collections.abc import Iterator
from copy import copy
from dataclasses import asdict
from itertools import islice, tee
from typing import Any

import pyarrow as pa
import ray.data
import ray.train

from ftray.data.row_groups import RowGroupSlice, read_slice, row_group_order, row_groups_in_order
from ftray.data.shards import ROW_GROUP_ROWS, TokenizedData

READ_CPUS = 0  # the training workers hold the CPUs, and reading a row group takes hardly any
READERS = 2  # tasks at once; by default Ray would start a process for each block
ROW_GROUPS_PER_TASK = 64


class RankedShards(ray.train.DataConfig):
    """Gives each worker a stream of its own rows, instead of whichever blocks are ready first.

    Ray's own split hands out blocks as they become ready, so that a global batch would depend on timing.
    """

    def __init__(self, data: TokenizedData, seed: int):
        super().__init__()
        self.data, self.seed = data, seed
        self.columns = list(data.task.load().columns)  # looked up here, so that reading tasks need not import the task

    def configure(
        self, datasets: dict[str, Any], world_size: int, *args: object, **kwargs: object
    ) -> list[dict[str, ray.data.DataIterator]]:
        """One iterator per worker and split; `datasets` hold the slices to read."""
        return [
            {name: self.stream(name, dataset, rank, world_size).iterator() for name, dataset in datasets.items()}
            for rank in range(world_size)
        ]

    def stream(self, split: str, row_groups: ray.data.Dataset, rank: int, world_size: int) -> ray.data.Dataset:
        """The rows of `split` that belong to `rank`; `row_groups` lists the slices to read, in order."""
        fixed = {"split": split, "seed": self.seed, "rank": rank, "world_size": world_size}
        stream = row_groups.map_batches(
            _read,
            batch_size=1,
            batch_format="pyarrow",
            fn_kwargs={"data": self.data, "columns": self.columns, **fixed},
            num_cpus=READ_CPUS,
            concurrency=READERS,
            zero_copy_batch=True,
        )
        stream.context.execution_options.preserve_order = True
        return stream


def training_batches(
    data: TokenizedData, seed: int, first: int, last: int, rows: int, rank: int, world_size: int
) -> Iterator[dict[str, Any]]:
    """A rank's micro-batches of `rows` rows each, streamed by Ray Data.

    Args:
        seed: of the data order.
        first, last: positions in that order (`last` exclusive). A resumed run starts at the one where it stands, and
            reads nothing that comes before it.
    """
    if first >= last:
        return iter(())  # a run at its end starts no stream
    stream = RankedShards(data, seed).stream("train", training_row_groups(data, seed, first, last), rank, world_size)
    collate = data.task.load().collate
    return iter(stream.iterator().iter_torch_batches(batch_size=rows, collate_fn=collate, prefetch_batches=2))


class SharedBatches:
    """Micro-batches for several runs with the same data order: each is read once, and kept for runs that join later.

    Attributes:
        first: position of the first one's first row.
        reached: position up to which they have been read.
    """

    def __init__(self, batches: Iterator[dict[str, Any]], first: int, rows: int):
        """`batches` start at position `first`; each takes `rows` positions, those of the other ranks included."""
        self.first = self.reached = first
        self._rows = rows
        (self._from_first,) = tee(self._counted(batches), 1)

    def has(self, position: int) -> bool:
        """Whether a run can start at `position` without reading more than a stream of its own would.

        That reads the whole row group in which the position lies.
        """
        return self.first <= position <= self.reached + ROW_GROUP_ROWS

    def start_at(self, position: int) -> Iterator[dict[str, Any]]:
        """Those from `position` on."""
        return islice(copy(self._from_first), (position - self.first) // self._rows, None)

    def _counted(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for batch in batches:
            self.reached += self._rows
            yield batch


def training_row_groups(data: TokenizedData, seed: int, first: int, last: int) -> ray.data.Dataset:
    """The slices to read for the training rows at positions `first` to `last` (exclusive)."""
    return _dataset(row_group_order(data, seed, first, last))


def validation_row_groups(data: TokenizedData, limit: int) -> ray.data.Dataset:
    """The slices to read for the first `limit` validation rows, for a trainer's `datasets`."""
    return _dataset(row_groups_in_order(data, "validation", limit))


def _dataset(slices: Iterator[RowGroupSlice]) -> ray.data.Dataset:
    rows = [asdict(part) for part in slices]
    return ray.data.from_items(rows, override_num_blocks=max(1, -(-len(rows) // ROW_GROUPS_PER_TASK)))


def _read(
    table: pa.Table, data: TokenizedData, split: str, seed: int, rank: int, world_size: int, columns: list[str]
) -> Iterator[pa.Table]:
    for row in table.to_pylist():
        yield read_slice(data, split, RowGroupSlice(**row), seed, rank, world_size, columns)
