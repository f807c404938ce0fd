"""Tokenized shards: a Ray Data pipeline from source to Parquet files that every later run reuses."""

import hashlib
import heapq
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from ftray.config import DataConfig
from ftray.data.sources import Chunk, Located, SourceLocation, content_stamp, read_chunk
from ftray.data.splits import (
    SPLITS,
    Sources,
    find_sources,
    in_order,
    needed,
    order_key,
    refuse_empty,
    refuse_mixture,
    refuse_unsupervised,
    split_of,
)
from ftray.data.tokens import prompt_template, spread
from ftray.errors import UserError
from ftray.storage.atomic import atomic_dir
from ftray.storage.location import Stored, parse_location
from ftray.task_spec import CAUSAL, IGNORE, TaskSpec

log = logging.getLogger(__name__)

VERSION = 4  # of the rules that make tokens from records: raise it when they change
WINDOW = 1024  # rows of a Parquet row group, the unit that is read and shuffled as a whole
WINDOWS_PER_FILE = 64
SCHEMA = pa.schema(
    {
        "key": pa.uint64(),
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "prompt": pa.string(),
        "target": pa.string(),
        "prompt_tokens": pa.int32(),
        "token_type_ids": pa.list_(pa.int32()),
        "lengths": pa.list_(pa.int32()),
        "score": pa.float32(),
        "extra": pa.string(),
    }
)


@dataclass
class Split:
    """One split's files and counts.

    Attributes:
        files: Parquet files relative to the data directory, in order.
        windows: rows of each row group, over all files in order; all but the last hold `WINDOW`.
        lengths: percentiles (0, 50, 90, 99, 100) of tokens per record.
        dropped, truncated: records left out, and cut to fit.
        digest: of all that is trained on; empty in shards that are older than it.
    """

    files: list[str] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    records: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    lengths: list[int] = field(default_factory=list)
    dropped: int = 0
    truncated: int = 0
    digest: str = ""


@dataclass
class Reading:
    """What was recognised in a source: records of each shape, most first, and the keys that were ignored."""

    shapes: dict[str, int] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)


@dataclass
class TokenizedData:
    """A directory of tokenized shards, as its `manifest.json` describes it; `read` is by split that has a source."""

    directory: str
    fingerprint: str
    splits: dict[str, Split]
    task: TaskSpec = CAUSAL
    read: dict[str, Reading] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: str | Path) -> "TokenizedData":
        """Read the manifest."""
        manifest = json.loads((parse_location(str(directory)) / "manifest.json").read_text())
        splits = {name: Split(**split) for name, split in manifest["splits"].items()}
        read = {name: Reading(**reading) for name, reading in manifest["read"].items()}
        return cls(str(directory), manifest["fingerprint"], splits, TaskSpec.of(manifest["task"]), read)

    def window(self, split: str, index: int, columns: list[str]) -> pa.Table:
        """Row group `index` of a split."""
        path = parse_location(self.directory) / self.splits[split].files[index // WINDOWS_PER_FILE]
        source = path.filesystem.open_input_file(path.path) if isinstance(path, Stored) else path
        with pq.ParquetFile(source) as file:
            return file.read_row_group(index % WINDOWS_PER_FILE, columns)

    def rows(self, split: str, limit: int | None = None) -> list[dict[str, Any]]:
        """Rows of a split in stored order, in memory: for scoring test records."""
        names = [f.name for f in SCHEMA]
        rows: list[dict[str, Any]] = []
        for index in range(len(self.splits[split].windows)):
            rows += self.window(split, index, names).to_pylist()
            if limit and len(rows) >= limit:
                break
        return rows[:limit]


def prepare(
    cfg: DataConfig,
    model: str,
    trust_remote_code: bool = False,
    task: str = "CAUSAL_LM",
    labels: tuple[str, ...] = (),
) -> TokenizedData:
    """Tokenize, split and cache, or reuse what an equal earlier call left; Ray must be initialised.

    The order of rows, their split and the row groups depend on the records' content and `seed` alone, never on the
    cluster: rows are sorted by a seeded hash of the record, so any row group is a random sample of the data. On a
    cluster, `cfg.cache` must be a path that all nodes share, or a URI.

    Args:
        cfg: source, lengths, fractions, seed.
        model: directory of the base model, for its tokenizer.
        trust_remote_code: run Python code that comes with the tokenizer.
        task: one of `ftray.task_spec.TASKS`.
        labels: its classes; none: those of the training records.

    Raises:
        UserError: as :func:`ftray.data.splits.check`, for what lies beyond the part that it reads.
    """
    from ftray.models.find import cache_root
    from ftray.models.load import load_tokenizer

    sources = find_sources(cfg)
    tokenizer = load_tokenizer(model, trust_remote_code, cfg.chat_template)
    given = tokenizer.chat_template if cfg.chat_template else None
    fingerprint = fingerprint_of(cfg, sources, tokenizer, task, labels)
    root = parse_location(cfg.cache) if cfg.cache else cache_root() / "data"
    root = root.expanduser() if isinstance(root, Path) else root
    target = root / fingerprint
    if (target / "manifest.json").exists():
        log.info("reusing the tokenized shards in %s", target)
        return TokenizedData.load(str(target))
    log.info("tokenizing %s into %s", cfg.names, target)
    with atomic_dir(target, cached=True, marker="manifest.json") as directory:
        names = labels or _labels(sources["train"][0], task)
        template = prompt_template(tokenizer, cfg) if task == CAUSAL.name else None
        spec = TaskSpec(task, names, tokenizer.pad_token_id or 0, template, given)
        splits, read = _write(cfg, sources, (model, trust_remote_code, given), directory, spec)
        manifest = {
            "fingerprint": fingerprint,
            "task": asdict(spec),
            "splits": {name: asdict(split) for name, split in splits.items()},
            "read": {name: asdict(reading) for name, reading in read.items()},
        }
        (directory / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return TokenizedData.load(str(target))


def fingerprint_of(cfg: DataConfig, sources: Sources, tokenizer: Any, task: str, labels: tuple[str, ...] = ()) -> str:
    """The same for all that makes the same tokens: the name of their directory in the cache."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {
        "version": VERSION,
        "task": [task, *labels],
        "content": {name: content_stamp(chunks) for name, (chunks, _) in sources.items()},
        "settings": cfg.model_dump(exclude={"cache"}),
        "tokenizer": backend.to_str() if backend else sorted(tokenizer.get_vocab().items()),
        "special": [str(tokenizer.special_tokens_map), tokenizer.chat_template],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _labels(chunks: list[Chunk], task: str) -> tuple[str, ...]:
    """All class names in a source, sorted; whole numbers by their size."""
    import ray.data

    if not TaskSpec(task).load().has_labels:
        return ()
    data = ray.data.from_items([asdict(chunk) for chunk in chunks], override_num_blocks=len(chunks))
    with _mistakes():
        return in_order(data.flat_map(_read_labels, fn_kwargs={"task": task}, num_cpus=0.5).unique("label"))


def _read_labels(chunk: dict[str, Any], task: str) -> Iterator[dict[str, str]]:
    of = TaskSpec(task).load()
    for label in {
        label for place, record in read_chunk(Chunk(**chunk)) for label in of.labels(of.parse(record, place))
    }:
        yield {"label": label}


def _write(
    cfg: DataConfig, sources: Sources, tokenizer: tuple[str, bool, str | None], directory: Path, task: TaskSpec
) -> tuple[dict[str, Split], dict[str, Reading]]:
    writers = {name: _SplitWriter(directory, name) for name in SPLITS}
    read = {}
    for name, (chunks, local) in sources.items():
        shapes, ignored = Counter[str](), set[str]()
        for table in _pipeline(chunks, local, name, tokenizer, task):
            shapes.update(table["shape"].drop_null().to_pylist())
            ignored.update(pa.compute.list_flatten(table["ignored"]).to_pylist())
            for split, writer in writers.items():
                writer.add(table.filter(pa.compute.equal(table["split"], split)))
        read[name] = Reading(dict(sorted(shapes.items(), key=lambda shape: (-shape[1], shape[0]))), sorted(ignored))
    splits = {name: writer.close() for name, writer in writers.items()}
    for name in needed(cfg):
        if not splits[name].records:
            if splits[name].dropped:
                refuse_unsupervised(sources.get(name, sources["train"])[1])
            refuse_empty(name, sum(s.records for s in splits.values()), cfg)
    return splits, read


def _pipeline(
    chunks: list[Chunk], cfg: DataConfig, source: str, tokenizer: tuple[str, bool, str | None], task: TaskSpec
) -> Iterator[pa.Table]:
    """Read -> sort by key -> tokenize, as tables in key order."""
    import ray.data

    light = {"num_cpus": 0.5}
    data = ray.data.from_items([asdict(chunk) for chunk in chunks], override_num_blocks=len(chunks))
    data.context.execution_options.preserve_order = True
    data = data.flat_map(_read, fn_kwargs={"cfg": cfg, "source": source}, **light).sort("key")
    if cfg.limit:
        data = data.limit(cfg.limit)
    fixed = {"cfg": cfg, "tokenizer": tokenizer, "task": task}
    data = data.map_batches(_tokenize, batch_size=WINDOW, batch_format="pyarrow", fn_kwargs=fixed, **light)
    with _mistakes():
        yield from data.iter_batches(batch_size=WINDOW, batch_format="pyarrow")


@contextmanager
def _mistakes() -> Iterator[None]:
    """Turn a UserError that a task of Ray Data raised back into one."""
    from ray.exceptions import RayTaskError

    try:
        yield
    except RayTaskError as error:
        # Ray wraps what a task raised more than once, and keeps only the text of the innermost error
        if mistake := re.search(r"ftray\.errors\.UserError: (.*)", str(error)):
            raise UserError(mistake[1]) from None
        raise


def _read(chunk: dict[str, Any], cfg: DataConfig, source: str) -> Iterable[dict[str, Any]]:
    rows = (_row(located, cfg, source) for located in read_chunk(Chunk(**chunk)))
    return heapq.nsmallest(cfg.limit, rows, key=lambda row: row["key"]) if cfg.limit else rows


def _row(located: Located, cfg: DataConfig, source: str) -> dict[str, Any]:
    place, record = located
    return {
        "key": order_key(record, cfg.seed) - 2**63,  # signed, for the sort
        "split": split_of(record, cfg, source),
        "place": asdict(place),
        "record": json.dumps(record, ensure_ascii=False, default=str),
    }


@lru_cache(maxsize=1)
def _tokenizer(model: str, trust_remote_code: bool, chat_template: str | None) -> Any:
    from ftray.models.load import load_tokenizer

    return load_tokenizer(model, trust_remote_code, chat_template)


def _tokenize(table: pa.Table, cfg: DataConfig, tokenizer: tuple[str, bool, str | None], task: TaskSpec) -> pa.Table:
    rows, of = table.to_pylist(), task.load()
    read = [of.parse_and_see(json.loads(row["record"]), SourceLocation(**row["place"])) for row in rows]
    examples = [example for example, _ in read]
    refuse_mixture(examples, of)
    numbered = spread(of.tokenize(examples, _tokenizer(*tokenizer), cfg))
    first = [at == 0 or i != numbered[at - 1][0] for at, (i, _) in enumerate(numbered)]
    tokens, rows, read = [row for _, row in numbered], [rows[i] for i, _ in numbered], [read[i] for i, _ in numbered]
    return pa.table(
        {
            "key": pa.array([row["key"] + 2**63 for row in rows], pa.uint64()),
            "input_ids": pa.array([t.input_ids if t else [] for t in tokens], pa.list_(pa.int32())),
            "labels": pa.array([t.labels if t else [] for t in tokens], pa.list_(pa.int32())),
            "prompt": pa.array([t.prompt if t else "" for t in tokens], pa.string()),
            "target": pa.array([t.target if t else "" for t in tokens], pa.string()),
            "prompt_tokens": pa.array([t.prompt_tokens if t else 0 for t in tokens], pa.int32()),
            "token_type_ids": pa.array([t.token_type_ids if t else [] for t in tokens], pa.list_(pa.int32())),
            "lengths": pa.array([t.lengths if t else [] for t in tokens], pa.list_(pa.int32())),
            "score": pa.array([t.score if t else 0.0 for t in tokens], pa.float32()),
            "extra": pa.array([t.extra if t else "" for t in tokens], pa.string()),
            "split": [row["split"] for row in rows],
            "shape": pa.array(
                [seen.shape if own else None for (_, seen), own in zip(read, first, strict=True)], pa.string()
            ),
            "ignored": pa.array([seen.ignored for _, seen in read], pa.list_(pa.string())),
            "truncated": [bool(t and t.truncated) for t in tokens],
        }
    )


class _SplitWriter:
    """Collects a split's rows and writes them in row groups of exactly `WINDOW`."""

    def __init__(self, directory: Path, name: str):
        self.directory, self.name, self.split = directory, name, Split()
        self.waiting: list[pa.Table] = []
        self.writer: pq.ParquetWriter | None = None
        self.lengths: list[int] = []
        self.digest = hashlib.sha256()

    def add(self, table: pa.Table) -> None:
        """Take the rows of `table`, but for those that tokenization left empty."""
        lengths = pa.compute.list_value_length(table["input_ids"])
        kept = table.filter(pa.compute.greater(lengths, 0))
        self.split.dropped += table.num_rows - kept.num_rows
        self.split.truncated += pa.compute.sum(kept["truncated"]).as_py() or 0
        self.waiting.append(kept.select(SCHEMA.names).cast(SCHEMA))
        while sum(t.num_rows for t in self.waiting) >= WINDOW:
            self._write_window()

    def close(self) -> Split:
        """Write what is left; returns the split's description."""
        if any(t.num_rows for t in self.waiting):
            self._write_window()
        if self.writer:
            self.writer.close()
        self.split.digest = self.digest.hexdigest()[:16]
        if self.lengths:
            ordered, last = sorted(self.lengths), len(self.lengths) - 1
            self.split.lengths = [ordered[round(last * q)] for q in (0, 0.5, 0.9, 0.99, 1)]
        return self.split

    def _write_window(self) -> None:
        rows = pa.concat_tables(self.waiting).combine_chunks()
        window, self.waiting = rows.slice(0, WINDOW), [rows.slice(WINDOW)]
        if len(self.split.windows) % WINDOWS_PER_FILE == 0:
            if self.writer:
                self.writer.close()
            file = f"{self.name}/{len(self.split.files):05d}.parquet"
            self.split.files.append(file)
            (self.directory / self.name).mkdir(exist_ok=True)
            self.writer = pq.ParquetWriter(self.directory / file, SCHEMA, compression="zstd")
        assert self.writer is not None
        self.writer.write_table(window, row_group_size=WINDOW)
        self.digest.update(window["key"].to_numpy().tobytes())  # a hash of all that the record says
        for name in ("input_ids", "labels"):
            self.digest.update(pa.compute.list_flatten(window[name]).to_numpy().tobytes())
        self.split.windows.append(window.num_rows)
        self.split.records += window.num_rows
        lengths = pa.compute.list_value_length(window["input_ids"]).to_pylist()
        self.lengths += lengths
        self.split.tokens += sum(lengths)
        supervised = pa.compute.not_equal(pa.compute.list_flatten(window["labels"]), IGNORE)
        self.split.supervised_tokens += pa.compute.sum(supervised).as_py()
