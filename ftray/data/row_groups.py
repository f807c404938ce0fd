"""Data order: which rows a step trains on. Imports neither Ray nor torch: the tasks that read windows start in no time.

A run's rows are one endless sequence: epoch after epoch, each with its windows (row groups) in an order drawn from
(seed, epoch) and the rows of a window in one drawn from (seed, epoch, window). Global batch n of B rows is positions
[n B, (n + 1) B); of these, rank r of W takes the positions p with p % W == r. So a batch depends on (seed, n) alone:
not on the number of workers, on when a run was resumed, or on the cluster.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ftray.data.shards import TokenizedData


@dataclass(frozen=True)
class RowGroupSlice:
    """One window's place in a run.

    Attributes:
        window: index of the row group.
        epoch: which pass; -1 means rows in stored order.
        position: of the window's first row in the run.
        start, stop: the rows of the (shuffled) window that the run takes.
    """

    window: int
    epoch: int
    position: int
    start: int
    stop: int


def row_group_order(data: TokenizedData, seed: int, first: int, last: int) -> Iterator[RowGroupSlice]:
    """The training windows that hold positions `first` to `last` (exclusive), in order; others are never read."""
    windows = np.array(data.splits["train"].windows)
    records = int(windows.sum())
    epoch = first // records
    position = epoch * records
    while position < last:
        for window in np.random.default_rng([seed, epoch]).permutation(len(windows)):
            size = int(windows[window])
            start, stop = max(0, first - position), min(size, last - position)
            if start < stop:
                yield RowGroupSlice(int(window), epoch, position, start, stop)
            position += size
        epoch += 1


def row_groups_in_order(data: TokenizedData, split: str, records: int | None = None) -> Iterator[RowGroupSlice]:
    """Every window of a split once, rows in stored order, which is a random one; or those of the first `records`."""
    position, last = 0, sum(data.splits[split].windows) if records is None else records
    for window, size in enumerate(data.splits[split].windows):
        if position >= last:
            return
        yield RowGroupSlice(window, -1, position, 0, min(size, last - position))
        position += size


def read_slice(
    data: TokenizedData, split: str, reading: RowGroupSlice, seed: int, rank: int, world_size: int, columns: list[str]
) -> pa.Table:
    """The rows of one window that are `rank`'s, in the run's order."""
    size = data.splits[split].windows[reading.window]
    order = np.arange(size)
    if reading.epoch >= 0:
        order = np.random.default_rng([seed, reading.epoch, reading.window]).permutation(size)
    offset = (rank - reading.position - reading.start) % world_size
    mine = order[reading.start : reading.stop][offset::world_size]
    return data.window(split, reading.window, columns).take(pa.array(mine))
