"""Data order: which rows a step trains on. Imports neither Ray nor torch, so that tasks that read rows start quickly.

The training rows of a run form one endless sequence: epoch after epoch, each with its row groups in an order drawn
from (seed, epoch) and the rows of a group in an order drawn from (seed, epoch, row group). Global batch n of B rows
holds positions [n B, (n + 1) B); of these, rank r of W takes the positions p with p % W == r. So a batch depends on
(seed, n) alone: not on the number of workers, on when a run was resumed, or on the cluster. Any position can be found
without reading what comes before it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ftray.data.shards import TokenizedData


@dataclass(frozen=True)
class RowGroupSlice:
    """The rows of one row group that a run reads.

    Attributes:
        row_group: its index in the split.
        epoch: pass over the data, from 0; -1: rows in stored order.
        position: of the group's first row in the run's sequence.
        start, stop: the rows of the (shuffled) group that the run reads.
    """

    row_group: int
    epoch: int
    position: int
    start: int
    stop: int


def row_group_order(data: TokenizedData, seed: int, first: int, last: int | None = None) -> Iterator[RowGroupSlice]:
    """The slices that hold the training rows at positions `first` to `last` (exclusive; None: endless), in order.

    Row groups that hold none of them are skipped, not read.
    """
    sizes = np.array(data.splits["train"].row_groups)
    records = int(sizes.sum())
    epoch = first // records
    position = epoch * records
    while last is None or position < last:
        for row_group in np.random.default_rng([seed, epoch]).permutation(len(sizes)):
            size = int(sizes[row_group])
            start, stop = max(0, first - position), size if last is None else min(size, last - position)
            if start < stop:
                yield RowGroupSlice(int(row_group), epoch, position, start, stop)
            position += size
        epoch += 1


def row_groups_in_order(data: TokenizedData, split: str, records: int | None = None) -> Iterator[RowGroupSlice]:
    """Every row group of a split once, rows in stored (random) order; or only those of the first `records`."""
    position, last = 0, sum(data.splits[split].row_groups) if records is None else records
    for row_group, size in enumerate(data.splits[split].row_groups):
        if position >= last:
            return
        yield RowGroupSlice(row_group, -1, position, 0, min(size, last - position))
        position += size


def read_slice(
    data: TokenizedData, split: str, part: RowGroupSlice, seed: int, rank: int, world_size: int, columns: list[str]
) -> pa.Table:
    """Read the rows of a slice that belong to `rank` of `world_size`, in the run's order."""
    size = data.splits[split].row_groups[part.row_group]
    order = np.arange(size)
    if part.epoch >= 0:
        order = np.random.default_rng([seed, part.epoch, part.row_group]).permutation(size)
    offset = (rank - part.position - part.start) % world_size
    rows = order[part.start : part.stop][offset::world_size]
    return data.row_group(split, part.row_group, columns).take(pa.array(rows))
