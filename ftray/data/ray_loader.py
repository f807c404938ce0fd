"""The same order through Ray Data: each training worker streams its own rows, read by tasks beside it."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray.data
import ray.train

from ftray.data.row_groups import RowGroupSlice, read_slice, row_group_order, row_groups_in_order
from ftray.data.shards import TokenizedData

READ_CPUS = 0  # the training workers hold the CPUs, and reading a window is next to nothing
READERS = 2  # tasks at once: Ray would start a process for each of as many as there are blocks
WINDOWS_PER_TASK = 64


class RankedShards(ray.train.DataConfig):
    """Gives every worker a streaming dataset of its own rows, instead of whichever blocks are ready first.

    Ray's own split hands blocks to workers as they come, so that a global batch would depend on timing.
    """

    def __init__(self, data: TokenizedData, seed: int):
        super().__init__()
        self.data, self.seed = data, seed
        self.columns = list(data.task.load().columns)  # now: whoever reads need not import the task

    def configure(
        self, datasets: dict[str, Any], world_size: int, *args: Any, **kwargs: Any
    ) -> list[dict[str, ray.data.DataIterator]]:
        """One iterator a worker and split; `datasets` holds the windows to read."""
        return [
            {name: self.stream(name, dataset, rank, world_size).iterator() for name, dataset in datasets.items()}
            for rank in range(world_size)
        ]

    def stream(self, split: str, readings: ray.data.Dataset, rank: int, world_size: int) -> ray.data.Dataset:
        """The rows of `split` that are `rank`'s, window by window as the functions below give them."""
        place = {"split": split, "seed": self.seed, "rank": rank, "world_size": world_size}
        stream = readings.map_batches(
            _read,
            batch_size=1,
            batch_format="pyarrow",
            fn_kwargs={"data": self.data, "columns": self.columns, **place},
            num_cpus=READ_CPUS,
            concurrency=READERS,
            zero_copy_batch=True,
        )
        stream.context.execution_options.preserve_order = True
        return stream


def training_row_groups(data: TokenizedData, seed: int, records: int) -> ray.data.Dataset:
    """The windows to read for so many training rows, as a trainer is given them in its `datasets`."""
    return _dataset(row_group_order(data, seed, 0, records))


def validation_row_groups(data: TokenizedData, records: int) -> ray.data.Dataset:
    """The windows that hold the first so many validation rows."""
    return _dataset(row_groups_in_order(data, "validation", records))


def _dataset(readings: Iterator[RowGroupSlice]) -> ray.data.Dataset:
    rows = [asdict(reading) for reading in readings]
    return ray.data.from_items(rows, override_num_blocks=max(1, -(-len(rows) // WINDOWS_PER_TASK)))


def _read(table: pa.Table, **fixed: Any) -> Iterator[pa.Table]:
    for row in table.to_pylist():
        yield read_slice(reading=RowGroupSlice(**row), **fixed)
