"""Records that a Python program holds: written once, exactly as they are, to a file that all other rooms can read."""

import datetime
import decimal
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ftray.config import DataConfig
from ftray.data.sources import SPLIT_NAMES
from ftray.errors import UserError
from ftray.storage.location import Location, reason

if TYPE_CHECKING:
    import datasets
    import pandas

Records: TypeAlias = (
    "Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]] | pandas.DataFrame | datasets.Dataset | "
    "datasets.DatasetDict"
)
BY_PARQUET = (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, bytes)  # what JSON has no form for
DIGITS = 16  # of the digest in a file's name


def kind_of(value: object) -> str:
    """`rows`, `columns`, `frame`, `dataset`, `splits` or `stream`; empty: none in memory, as a path or a section."""
    known = {
        "pandas.DataFrame": "frame",
        "datasets.Dataset": "dataset",
        "datasets.DatasetDict": "splits",
        "datasets.IterableDataset": "stream",
        "datasets.IterableDatasetDict": "stream",
    }
    for kind in type(value).__mro__:  # by name: neither library is imported for a path
        if found := known.get(f"{kind.__module__.partition('.')[0]}.{kind.__name__}"):
            return found
    if isinstance(value, Mapping) and value and not {*map(str, value)} & {*DataConfig.model_fields}:
        return "columns" if all(isinstance(column, list | tuple) for column in value.values()) else ""
    names = isinstance(value, str | bytes | os.PathLike | Mapping)
    if names or not isinstance(value, Iterable):
        return ""
    if isinstance(value, Sequence) and all(isinstance(part, str | os.PathLike) for part in value) and len(value):
        return ""  # several sources
    return "rows"


def write_records(value: Any, field: str, directory: Location) -> dict[str, str]:
    """Write records of any kind that is in memory; returns the files by their split, `train` where there are none.

    A file's name holds a digest of its content: records that are equal are written to the same file.

    Args:
        value: of which :func:`kind_of` knows the kind.
        field: that it was given for; the file is called by its last part.
        directory: where files go.

    Raises:
        UserError: it holds no records, or a value that no file can hold as it is; names the record and the key.
    """
    kind, name = kind_of(value), field.rpartition(".")[2]
    if mixed := re.fullmatch(r"data\.(sources)\[(\d+)\]\.source", field):
        name = "-".join(mixed.groups())
    if kind == "splits":
        found = {
            split: next((value[word] for word in words if word in value), None) for split, words in SPLIT_NAMES.items()
        }
        if found["train"] is None:
            raise UserError(f"{field}: has no split train, but {', '.join(value)}: give one of them")
        return {
            split: write_records(own, f"{name}.{split}", directory)["train"]
            for split, own in found.items()
            if own is not None
        }
    if kind == "stream":
        raise UserError(f"{field}: a stream of records is read once, and training reads them often: save it first")
    if kind == "dataset":
        return {"train": _written_dataset(value, field, name, directory)}
    rows = _rows_of_frame(value, field) if kind == "frame" else _rows_of(value, field)
    if not rows:
        raise UserError(f"{field}: holds no records")
    rows = [_plain_record(row, f"{field}[{number}]") for number, row in enumerate(rows)]
    if any(map(_needs_parquet, rows)):
        return {"train": _written_table(rows, field, name, directory)}
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return {"train": _written(content.encode(), content.encode(), f"{name}-{{}}.jsonl", directory)}


def _written(content: bytes, digested: bytes, name: str, directory: Location) -> str:
    place = directory / name.format(hashlib.sha256(digested).hexdigest()[:DIGITS])
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return str(place.absolute())


def _written_dataset(data: Any, field: str, name: str, directory: Location) -> str:
    """By the library itself, which keeps types and the names of classes."""
    if data.format["type"] == "custom":
        raise UserError(f"{field}: makes its records as they are read (set_transform): give data.map(...) instead")
    if not len(data):
        raise UserError(f"{field}: holds no records")
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "data.parquet")
        data.with_format(None).to_parquet(path)
        content = path.read_bytes()
    if shown:
        datasets.enable_progress_bars()
    return _written(content, content, f"{name}-{{}}.parquet", directory)


def _rows_of_frame(frame: Any, field: str) -> list[dict[str, Any]]:
    """The rows of a frame; a value that is missing, which pandas writes as NaN, NaT or NA, is None."""
    import pandas

    names = [str(column) for column in frame.columns]
    if odd := [column for column in frame.columns if not isinstance(column, str)]:
        raise UserError(f"{field}: column {odd[0]!r} is called by no text: rename it")
    if twice := [column for column in names if names.count(column) > 1]:
        raise UserError(f"{field}: column {twice[0]!r} stands twice: leave one of them out")

    def value(cell: object) -> object:
        missing = (
            cell is None or cell is pandas.NA or cell is pandas.NaT or (isinstance(cell, float) and math.isnan(cell))
        )
        return None if missing else cell

    columns = [[value(cell) for cell in frame[column].astype(object)] for column in names]
    return [dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _rows_of(value: Any, field: str) -> list[Any]:
    """The rows of a sequence of them, or of columns by their names."""
    if not isinstance(value, Mapping):
        return list(value)
    lengths = {len(column) for column in value.values()}
    if len(lengths) > 1:
        said = ", ".join(f"{key} has {len(column)}" for key, column in value.items())
        raise UserError(f"{field}: columns of different lengths: {said}: give as many values in each")
    return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]


def _plain_record(record: object, where: str) -> dict[str, Any]:
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: a record is a mapping of names to values, not {type(record).__name__}")
    plain: dict[str, Any] = _plain(record, where)
    return plain


def _plain(value: Any, where: str) -> Any:
    """The same in Python's own types; numbers and arrays of numpy have equal ones.

    Raises:
        UserError: there is none that is equal.
    """
    if value is None or isinstance(value, bool | int):
        return value if not isinstance(value, int) or type(value) in (bool, int) else int(value)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: {value!r} holds half of a surrogate pair: no file can hold it") from None
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UserError(f"{where}: is {value}: put a number, or None where it is missing")
        return float(value)
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise UserError(f"{where}: key {odd[0]!r} is no text")
        return {str(key): _plain(inner, f"{where}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, f"{where}[{number}]") for number, inner in enumerate(value)]
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return _plain(value.tolist(), where)
    if isinstance(value, BY_PARQUET):
        return value
    raise UserError(f"{where}: no file holds a {type(value).__name__} as it is: give text, numbers, lists or mappings")


def _needs_parquet(value: object) -> bool:
    if isinstance(value, dict | list):
        return any(map(_needs_parquet, value.values() if isinstance(value, dict) else value))
    return isinstance(value, BY_PARQUET)


def _same(kept: object, given: object) -> bool:
    if isinstance(kept, dict) and isinstance(given, dict):
        return kept.keys() == given.keys() and all(_same(kept[key], given[key]) for key in kept)
    if isinstance(kept, list) and isinstance(given, list):
        return len(kept) == len(given) and all(map(_same, kept, given))
    return kept == given and (type(kept) is type(given) or isinstance(given, BY_PARQUET))


def _written_table(rows: list[dict[str, Any]], field: str, name: str, directory: Location) -> str:
    """As Parquet, which has dates, decimals and bytes; whatever it would change is refused."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(dict.fromkeys(key for row in rows for key in row))
    try:
        table = pa.table({key: [row.get(key) for row in rows] for key in names})
    except (pa.ArrowException, OverflowError) as error:
        raise UserError(f"{field}: dates, decimals or bytes among values that fit no table: {reason(error)}") from None
    for number, (row, kept) in enumerate(zip(rows, table.to_pylist(), strict=True)):
        for key in names:
            if not _same(kept[key], row.get(key)):
                raise UserError(
                    f"{field}[{number}].{key}: beside dates, decimals or bytes it would be stored as something else: "
                    "give those as text"
                )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    digested = repr([sorted(row.items()) for row in rows]).encode()
    return _written(sink.getvalue().to_pybytes(), digested, f"{name}-{{}}.parquet", directory)
