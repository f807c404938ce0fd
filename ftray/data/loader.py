"""Batches of the rows that :mod:`ftray.data.row_groups` puts in order. Imports no Ray."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count

import numpy as np
import pyarrow as pa
import torch

from ftray.data.row_groups import RowGroupSlice, read_slice, row_group_order, row_groups_in_order
from ftray.data.shards import TokenizedData
from ftray.task_spec import IGNORE


def batches(
    data: TokenizedData, seed: int, first: int, rows: int, rank: int = 0, world_size: int = 1
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless micro-batches of `rows` records from position `first` on, in one process and without Ray."""
    records = sum(data.splits["train"].windows)
    readings = (r for at in count(first, records) for r in row_group_order(data, seed, at, at + records))
    return _batched(data, "train", readings, seed, rows, rank, world_size)


def batches_in_order(
    data: TokenizedData, split: str, rows: int, rank: int = 0, world_size: int = 1, records: int | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """A rank's share of a split (of its first `records`) once, in stored order; the last batch may hold fewer."""
    return _batched(data, split, row_groups_in_order(data, split, records), 0, rows, rank, world_size)


def _batched(
    data: TokenizedData, split: str, readings: Iterator[RowGroupSlice], seed: int, rows: int, rank: int, world_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    task = data.task.load()
    collate, columns = task.collate, list(task.columns)
    rest: pa.Table | None = None
    for reading in readings:
        table = read_slice(data, split, reading, seed, rank, world_size, columns)
        table = pa.concat_tables([rest, table]) if rest else table
        full = table.num_rows // rows * rows
        for at in range(0, full, rows):
            yield collate(table.slice(at, rows).to_pydict())
        rest = table.slice(full)
    if rest:
        yield collate(rest.to_pydict())


def collate(batch: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, torch.Tensor]:
    """Lay records one after another in a single row: nothing is padded.

    Args:
        batch: `input_ids` and `labels`, a sequence of token ids a record each.

    Returns:
        `input_ids`, `position_ids` and `labels`, int64 of shape [1, tokens]. Positions restart at 0 with every
        record, by which transformers keeps their attention apart; the first label of a record is -100, since no
        token of the same record comes before it.
    """
    ids = [np.asarray(record, np.int64) for record in batch["input_ids"]]
    labels = [np.asarray(record, np.int64).copy() for record in batch["labels"]]
    for record in labels:
        record[0] = IGNORE
    positions = [np.arange(len(record)) for record in ids]
    columns = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return {name: torch.from_numpy(np.concatenate(parts))[None] for name, parts in columns.items()}
