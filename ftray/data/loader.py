"""The micro-batches of :mod:`ftray.data.row_groups` in one process, without Ray."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

from ftray.data.row_groups import RowGroupSlice, read_slice, row_group_order, row_groups_in_order
from ftray.data.shards import TokenizedData

if TYPE_CHECKING:
    import torch


def batches(
    data: TokenizedData,
    seed: int,
    first: int,
    rows: int,
    rank: int = 0,
    world_size: int = 1,
    last: int | None = None,
) -> "Iterator[dict[str, torch.Tensor]]":
    """A rank's micro-batches of `rows` rows each, from position `first` to `last` (exclusive; None: endlessly)."""
    return _batched(data, "train", row_group_order(data, seed, first, last), seed, rows, rank, world_size)


def batches_in_order(
    data: TokenizedData, split: str, rows: int, rank: int = 0, world_size: int = 1, limit: int | None = None
) -> "Iterator[dict[str, torch.Tensor]]":
    """A rank's share of a split (or of its first `limit` rows) once, in stored order; the last batch may hold fewer."""
    return _batched(data, split, row_groups_in_order(data, split, limit), 0, rows, rank, world_size)


def _batched(
    data: TokenizedData, split: str, slices: Iterator[RowGroupSlice], seed: int, rows: int, rank: int, world_size: int
) -> "Iterator[dict[str, torch.Tensor]]":
    task = data.task.load()
    collate, columns = task.collate, list(task.columns)
    rest: pa.Table | None = None
    for part in slices:
        table = read_slice(data, split, part, seed, rank, world_size, columns)
        table = pa.concat_tables([rest, table]) if rest else table
        full = table.num_rows // rows * rows
        for at in range(0, full, rows):
            yield collate(table.slice(at, rows).to_pydict())
        rest = table.slice(full)
    if rest:
        yield collate(rest.to_pydict())
