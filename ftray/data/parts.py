"""Tables on disk on their way to the shards: records sorted by key, then their tokens, in files that are whole.

Memory is bounded by the size of a part, not by that of the source: the records of a chunk are sorted in parts, each of
which is cut at the same keys into bins; a bin of all parts together is small enough to be sorted again and tokenized.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute

from ftray.data.formats import Chunk
from ftray.storage.location import Location

PART_BYTES = 2**24  # of records in memory, above which they are sorted and written
BIN_BYTES = 2**25  # of a source that one bin holds, about
UNKNOWN_BYTES = 2**29  # taken for the size of a chunk that doesn't say its own
MOST_BINS = 2**11
_LZ4 = pa.ipc.IpcWriteOptions(compression="lz4")


@dataclass(frozen=True)
class Sorted:
    """What :func:`write_sorted` left.

    Attributes:
        parts: names of the files.
        counts: records of each bin.
        classes: that the records name.
    """

    parts: list[str]
    counts: list[int]
    classes: list[str]


def bins_of(chunks: list[Chunk]) -> int:
    """How many bins a source is cut into."""
    size = sum(UNKNOWN_BYTES if chunk.bytes is None else chunk.bytes for chunk in chunks)
    return min(MOST_BINS, max(1, size // BIN_BYTES))


def write_sorted(tables: Iterable[pa.Table], place: Location, name: str, bins: int, limit: int | None) -> Sorted:
    """Write tables with columns `key`, int64, and `classes` in sorted parts, unless an earlier run has done so.

    Args:
        place: directory.
        limit: of each part, the records with the lowest keys that are kept.
    """
    done = place / f"{name}.json"
    if done.exists():
        return Sorted(**json.loads(done.read_text()))
    counts, classes, parts = np.zeros(bins, np.int64), set[str](), list[str]()
    for whole in _gathered(tables):
        classes.update(pa.compute.list_flatten(whole["classes"]).unique().to_pylist())
        part = whole.take(pa.compute.sort_indices(whole["key"])[:limit]).combine_chunks()
        edges = [*np.searchsorted(part["key"].to_numpy(), _lowest(bins)), part.num_rows]
        counts += np.diff(edges)
        parts.append(f"{name}-{len(parts):03d}.arrow")
        cut = (part.slice(start, stop - start) for start, stop in pairwise(edges))
        write_tables(place / parts[-1], cut, part.schema)
    result = Sorted(parts, counts.tolist(), sorted(classes))
    done.write_text(json.dumps(asdict(result)))
    return result


def _gathered(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Tables of about `PART_BYTES` each."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(held.nbytes for held in waiting) >= PART_BYTES:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _lowest(bins: int) -> np.ndarray:
    """The lowest key that may be in each bin, int64."""
    return np.array([(number << 64) // bins - 2**63 for number in range(bins)], np.int64)


def read_bin(place: Location, parts: list[str], number: int) -> pa.Table:
    """The records of a bin, sorted."""
    batches = []
    for name in parts:
        file = place / name
        with file.filesystem.open_input_file(file.path) as stream, pa.ipc.open_file(stream) as reader:
            batches.append(reader.get_batch(number))
    whole = pa.Table.from_batches(batches)
    return whole.take(pa.compute.sort_indices(whole["key"]))


def write_tables(file: Location, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Write tables into one file, a batch each; the file appears when it is whole."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=_LZ4) as writer:
        for table in tables:
            batches = table.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], schema)]
            writer.write_batch(batches[0])
    file.write_bytes(sink.getvalue())


def read_tables(file: Location) -> Iterator[pa.Table]:
    """What :func:`write_tables` wrote, one after another."""
    with file.filesystem.open_input_file(file.path) as stream, pa.ipc.open_file(stream) as reader:
        for number in range(reader.num_record_batches):
            yield pa.Table.from_batches([reader.get_batch(number)])
