"""Few records, in this process: the processes of Ray Data would take longer to start than all their work."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa


@dataclass(frozen=True)
class LocalRecords:
    """What :mod:`ftray.data.pipeline` asks of a `ray.data.Dataset`, under the same names, done at once.

    Attributes:
        table: all records, in order.
    """

    table: pa.Table

    def map_batches(
        self,
        function: Callable[..., pa.Table | Iterable[pa.Table]],
        *,
        batch_size: int | None,
        fn_kwargs: dict[str, Any],
        **for_ray: object,
    ) -> "LocalRecords":
        """`function` of each `batch_size` records, or of all, which gives one table or several."""
        made: list[pa.Table] = []
        for batch in self._batches(batch_size):
            result = function(batch, **fn_kwargs)
            made.extend([result] if isinstance(result, pa.Table) else result)
        return LocalRecords(pa.concat_tables(made) if made else pa.table({}))

    def materialize(self) -> "LocalRecords":
        return self

    def select_columns(self, names: list[str]) -> "LocalRecords":
        return LocalRecords(self.table.select(names)) if self.table.num_rows else self

    def sort(self, key: str) -> "LocalRecords":
        return LocalRecords(self.table.sort_by(key)) if self.table.num_rows else self

    def limit(self, count: int) -> "LocalRecords":
        return LocalRecords(self.table[:count])

    def iter_batches(self, *, batch_size: int | None, **for_ray: object) -> Iterator[pa.Table]:
        return self._batches(batch_size)

    def _batches(self, size: int | None) -> Iterator[pa.Table]:
        step = size or max(1, self.table.num_rows)
        return (self.table[first : first + step] for first in range(0, self.table.num_rows, step))
