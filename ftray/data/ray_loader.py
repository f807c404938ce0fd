"""The order of :mod:`ftray.data.row_groups` through Ray Data: each training worker streams its own rows."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray.data
import ray.train

from ftray.data.row_groups import RowGroupSlice, read_slice, row_group_order, row_groups_in_order
from ftray.data.shards import TokenizedData

READ_CPUS = 0  # the training workers hold the CPUs, and reading a row group takes hardly any
READERS = 2  # tasks at once: by itself Ray would start a process for each block
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
        self, datasets: dict[str, Any], world_size: int, *args: Any, **kwargs: Any
    ) -> list[dict[str, ray.data.DataIterator]]:
        """One iterator per worker and split; `datasets` hold the row groups to read."""
        return [
            {name: self.stream(name, dataset, rank, world_size).iterator() for name, dataset in datasets.items()}
            for rank in range(world_size)
        ]

    def stream(self, split: str, row_groups: ray.data.Dataset, rank: int, world_size: int) -> ray.data.Dataset:
        """The rows of `split` that belong to `rank`, one row group after another, as the functions below list them."""
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


def training_row_groups(data: TokenizedData, seed: int, records: int) -> ray.data.Dataset:
    """The row groups to read for the first `records` training rows, for a trainer's `datasets`."""
    return _dataset(row_group_order(data, seed, 0, records))


def validation_row_groups(data: TokenizedData, records: int) -> ray.data.Dataset:
    """The row groups that hold the first `records` validation rows."""
    return _dataset(row_groups_in_order(data, "validation", records))


def _dataset(parts: Iterator[RowGroupSlice]) -> ray.data.Dataset:
    rows = [asdict(part) for part in parts]
    return ray.data.from_items(rows, override_num_blocks=max(1, -(-len(rows) // ROW_GROUPS_PER_TASK)))


def _read(table: pa.Table, **fixed: Any) -> Iterator[pa.Table]:
    for row in table.to_pylist():
        yield read_slice(part=RowGroupSlice(**row), **fixed)
