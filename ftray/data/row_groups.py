"""Data order: which rows a step trains on. Imports neither Ray nor torch, so that tasks that read rows start quickly.

The training rows of a run form one endless sequence: epoch after epoch, each with its row groups in an order drawn
from (seed, epoch) and the rows of a group in an order drawn from (seed, epoch, row group). Global batch n of B rows
holds positions [n B, (n + 1) B); of these, rank r of W takes the positions p with p % W == r. So a batch depends on
(seed, n) alone: not on the number of workers, on when a run was resumed, or on the cluster. Any position can be found
without reading what comes before it.

In a mixture, an epoch draws `MixedRows.drawn` rows of each source, d of its n, and the next epoch continues where it
ended: row r of the source, in stored order, comes up ceil((r - e + 1) d / n) - ceil((r - e) d / n) times in epoch e.
So after any number E of epochs, every row has come up E d / n times, rounded down or up.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ftray.data.shards import ROW_GROUP_ROWS, MixedRows, Split, TokenizedData


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
    split = data.splits["train"]
    epoch = first // split.drawn
    position = epoch * split.drawn
    while last is None or position < last:
        sizes = _drawn(split, epoch)
        for row_group in np.random.default_rng([seed, epoch]).permutation(len(sizes)):
            size = int(sizes[row_group])
            start, stop = max(0, first - position), size if last is None else min(size, last - position)
            for at in range(start, stop, ROW_GROUP_ROWS):  # weights may make a row group many times as long
                yield RowGroupSlice(int(row_group), epoch, position, at, min(stop, at + ROW_GROUP_ROWS))
            position += size
        epoch += 1


def _drawn(split: Split, epoch: int) -> np.ndarray:
    """How many rows an epoch draws from each row group."""
    if not split.sources:
        return np.array(split.row_groups)
    starts = [np.cumsum([0, *source.row_groups]) for source in split.sources.values()]
    counts = [np.diff(_times(at, source, epoch)) for at, source in zip(starts, split.sources.values(), strict=True)]
    drawn: np.ndarray = np.sum(counts, axis=0)
    return drawn


def _times(row: np.ndarray, source: MixedRows, epoch: int) -> np.ndarray:
    """How often an epoch draws the rows before each `row` of a source, plus a number that is the same for all."""
    times: np.ndarray = -((epoch - row) * source.drawn // max(1, source.rows))  # rounded up
    return times


def _copies(sources: np.ndarray, split: Split, part: RowGroupSlice) -> np.ndarray:
    """How often an epoch draws each row of a row group, whose rows are of these sources."""
    copies = np.zeros(len(sources), int)
    for name, source in split.sources.items():
        first, count = sum(source.row_groups[: part.row_group]), source.row_groups[part.row_group]
        copies[sources == name] = np.diff(_times(np.arange(first, first + count + 1), source, part.epoch))
    return copies


def row_groups_in_order(data: TokenizedData, split: str, limit: int | None = None) -> Iterator[RowGroupSlice]:
    """Every row group of a split once, rows in stored (random) order; or those that hold the first `limit` rows."""
    position, last = 0, sum(data.splits[split].row_groups) if limit is None else limit
    for row_group, size in enumerate(data.splits[split].row_groups):
        if position >= last:
            return
        yield RowGroupSlice(row_group, -1, position, 0, min(size, last - position))
        position += size


def read_slice(
    data: TokenizedData, split: str, part: RowGroupSlice, seed: int, rank: int, world_size: int, columns: list[str]
) -> pa.Table:
    """Read the rows of a slice that belong to `rank` of `world_size`, in the run's order."""
    mixed = part.epoch >= 0 and bool(data.splits[split].sources)
    table = data.row_group(
        split, part.row_group, [*columns, *(["source"] if mixed and "source" not in columns else [])]
    )
    order = np.arange(table.num_rows)
    if mixed:
        order = np.repeat(order, _copies(table["source"].to_numpy(), data.splits[split], part))
    if part.epoch >= 0:
        order = order[np.random.default_rng([seed, part.epoch, part.row_group]).permutation(len(order))]
    offset = (rank - part.position - part.start) % world_size
    rows = order[part.start : part.stop][offset::world_size]
    return table.select(columns).take(pa.array(rows))
