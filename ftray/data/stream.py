"""Data order and batches: which rows a step trains on. Imports no Ray.

A run's rows are one endless sequence: epoch after epoch, each with its windows (row groups) in an order drawn from
(seed, epoch) and the rows of a window in one drawn from (seed, epoch, window). Global batch n of B rows is positions
[n B, (n + 1) B); of these, rank r of W takes the positions p with p % W == r. So a batch depends on (seed, n) alone:
not on the number of workers, on when a run was resumed, or on the cluster.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import pyarrow as pa
import torch

from ftray.data.shards import TokenizedData
from ftray.data.tokens import IGNORE
from ftray.tasks import TaskSpec


@dataclass(frozen=True)
class Reading:
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


def plan(data: TokenizedData, seed: int, first: int, last: int) -> Iterator[Reading]:
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
                yield Reading(int(window), epoch, position, start, stop)
            position += size
        epoch += 1


def plan_in_order(data: TokenizedData, split: str, records: int | None = None) -> Iterator[Reading]:
    """Every window of a split once, rows in stored order, which is a random one; of `records`, the first."""
    position, last = 0, sum(data.splits[split].windows) if records is None else records
    for window, size in enumerate(data.splits[split].windows):
        if position < last:
            yield Reading(window, -1, position, 0, min(size, last - position))
        position += size


def read(data: TokenizedData, split: str, reading: Reading, seed: int, rank: int, world_size: int) -> pa.Table:
    """The rows of one window that are `rank`'s, in the run's order; the columns that its task takes."""
    size = data.splits[split].windows[reading.window]
    order = np.arange(size)
    if reading.epoch >= 0:
        order = np.random.default_rng([seed, reading.epoch, reading.window]).permutation(size)
    offset = (rank - reading.position - reading.start) % world_size
    mine = order[reading.start : reading.stop][offset::world_size]
    return data.window(split, reading.window, list(data.task.load().columns)).take(pa.array(mine))


def batches(
    data: TokenizedData, seed: int, first: int, rows: int, rank: int = 0, world_size: int = 1
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless micro-batches of `rows` records from position `first` on, in one process and without Ray."""
    records = sum(data.splits["train"].windows)
    readings = (r for at in count(first, records) for r in plan(data, seed, at, at + records))
    return _batched((read(data, "train", r, seed, rank, world_size) for r in readings), rows, data.task)


def batches_in_order(
    data: TokenizedData, split: str, rows: int, rank: int = 0, world_size: int = 1, records: int | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """A rank's share of a split (of its first `records`) once, in stored order; the last batch may hold fewer."""
    readings = plan_in_order(data, split, records)
    return _batched((read(data, split, r, 0, rank, world_size) for r in readings), rows, data.task)


def _batched(tables: Iterator[pa.Table], rows: int, task: TaskSpec) -> Iterator[dict[str, torch.Tensor]]:
    collate = task.load().collate
    rest: pa.Table | None = None
    for table in tables:
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
