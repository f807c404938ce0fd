"""The order of :mod:`ftray.data.row_groups` in a training worker: read by Ray Data, or itself where there is little."""

from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import asdict
from itertools import islice, tee
from typing import Any

import pyarrow as pa
import ray.data

from ftray.data.loader import batches, batches_in_order
from ftray.data.row_groups import RowGroupSlice, read_slice, row_group_order, row_groups_in_order
from ftray.data.shards import ROW_GROUP_ROWS, TokenizedData

READ_CPUS = 0  # the training workers hold the CPUs, and reading a row group takes hardly any
READERS = 2  # tasks at once; by default Ray would start a process for each block
ROW_GROUPS_PER_TASK = 64
FEW_ROW_GROUPS = 4  # of a split that the worker reads itself: tasks take seconds to start, these a fraction of one


def training_batches(
    data: TokenizedData, seed: int, first: int, last: int, rows: int, rank: int, world_size: int
) -> Iterator[dict[str, Any]]:
    """A rank's micro-batches of `rows` rows each.

    Args:
        seed: of the data order.
        first, last: positions in that order (`last` exclusive). A resumed run starts at the one where it stands, and
            reads nothing that comes before it.
    """
    if first >= last:
        return iter(())  # a run at its end starts no stream
    if _few(data, "train"):
        return batches(data, seed, first, rows, rank, world_size, last)
    return iter(_streamed(data, "train", row_group_order(data, seed, first, last), seed, rows, rank, world_size))


def validation_batches(data: TokenizedData, limit: int, rows: int, rank: int, world_size: int) -> Iterable[Any]:
    """A rank's micro-batches of the first `limit` validation rows, `rows` rows each; to be gone through once."""
    if _few(data, "validation"):
        return batches_in_order(data, "validation", rows, rank, world_size, limit)
    return _streamed(data, "validation", row_groups_in_order(data, "validation", limit), 0, rows, rank, world_size)


def _few(data: TokenizedData, split: str) -> bool:
    return len(data.splits[split].row_groups) <= FEW_ROW_GROUPS


def _streamed(
    data: TokenizedData,
    split: str,
    slices: Iterator[RowGroupSlice],
    seed: int,
    rows: int,
    rank: int,
    world_size: int,
) -> Iterable[Any]:
    """The batches of a rank from these slices, which tasks of Ray Data read beside the worker.

    Each worker has a stream of its own: Ray's own split hands out blocks as they become ready, so that a global batch
    would depend on timing.
    """
    task, listed = data.task.load(), [asdict(part) for part in slices]
    row_groups = ray.data.from_items(listed, override_num_blocks=max(1, -(-len(listed) // ROW_GROUPS_PER_TASK)))
    fixed = {"data": data, "split": split, "seed": seed, "rank": rank, "world_size": world_size}
    stream = row_groups.map_batches(
        _read,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={**fixed, "columns": list(task.columns)},  # looked up here: reading tasks need not import the task
        num_cpus=READ_CPUS,
        concurrency=READERS,
        zero_copy_batch=True,
    )
    stream.context.execution_options.preserve_order = True
    found: Iterable[Any] = stream.iterator().iter_torch_batches(
        batch_size=rows, collate_fn=task.collate, prefetch_batches=2
    )
    return found


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


def _read(
    table: pa.Table, data: TokenizedData, split: str, seed: int, rank: int, world_size: int, columns: list[str]
) -> Iterator[pa.Table]:
    for row in table.to_pylist():
        yield read_slice(data, split, RowGroupSlice(**row), seed, rank, world_size, columns)
