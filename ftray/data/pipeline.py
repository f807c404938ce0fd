"""From sources to tokenized shards: a Ray Data pipeline, which reads each source once."""

import hashlib
import json
import logging
import pickle
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute

from ftray.config import DataConfig
from ftray.data.formats import Chunk, Located, read_chunk
from ftray.data.shards import MANIFEST, SourceSummary, SplitWriter, TokenizedData
from ftray.data.sources import content_stamp
from ftray.data.splits import (
    SPLITS,
    Source,
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
from ftray.data.tokens import prompt_template, rendering, spread
from ftray.errors import UserError
from ftray.storage.atomic import atomic_dir
from ftray.storage.location import Location, parse_location
from ftray.task_spec import AS_IT_IS, CAUSAL, TaskSpec

if TYPE_CHECKING:
    import ray.data

    from ftray.tasks.task import Task

log = logging.getLogger(__name__)

TokenizerArguments = tuple[str, bool, str | None]  # of `load_tokenizer`, in other processes

VERSION = 4  # of the rules that make tokens from records: raise it when they change
BATCH = 1024  # records that a task reads or tokenizes at once
TASK_CPUS = 0.5  # of a Ray task
# a record that was read and checked
RECORD = pa.schema(
    {
        "key": pa.int64(),  # place in the order; signed, for the sort
        "split": pa.string(),
        "shape": pa.string(),
        "ignored": pa.list_(pa.string()),
        "classes": pa.list_(pa.string()),
        "example": pa.binary(),  # what the task's `parse` gave, pickled
    }
)


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
        labels: its classes; empty: those of the training records.

    Raises:
        UserError: as :meth:`ftray.data.splits.DataCheck.run`, also about records beyond the part that it reads.
    """
    from ftray.models.load import load_tokenizer

    sources = find_sources(cfg)
    tokenizer = load_tokenizer(model, trust_remote_code, cfg.chat_template)
    chat_template = tokenizer.chat_template if cfg.chat_template else None
    fingerprint = fingerprint_of(cfg, sources, tokenizer, task, labels)
    target = _cache(cfg) / fingerprint
    if (target / MANIFEST).exists():
        log.info("reusing the tokenized shards in %s", target)
        return TokenizedData.load(str(target))
    log.info("tokenizing %s into %s", cfg.names, target)
    template = prompt_template(tokenizer, cfg) if task == CAUSAL.name else None
    spec = TaskSpec(task, labels, tokenizer.pad_token_id or 0, template, chat_template)
    with atomic_dir(target, cached=True, marker=MANIFEST) as directory:
        data = TokenizedData(str(directory), fingerprint, {}, spec)
        with _user_errors():
            _write(data, cfg, sources, (model, trust_remote_code, chat_template))
        data.save()
    return TokenizedData.load(str(target))


def fingerprint_of(cfg: DataConfig, sources: Sources, tokenizer: Any, task: str, labels: tuple[str, ...] = ()) -> str:
    """The same for all that makes the same tokens: the name of their directory in the cache."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {
        "version": VERSION,
        "task": [task, *labels],
        "content": {name: content_stamp(source.chunks) for name, source in sources.items()},
        "settings": cfg.model_dump(exclude={"cache"} if cfg.group else {"cache", "group"}),
        "tokenizer": backend.to_str() if backend else sorted(tokenizer.get_vocab().items()),
        "special": [str(tokenizer.special_tokens_map), tokenizer.chat_template],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _cache(cfg: DataConfig) -> Location:
    from ftray.models.find import cache_root

    return parse_location(cfg.cache or cache_root() / "data")


def check_cache(cfg: DataConfig, sources: Sources, tokenizer: Any, task: str, labels: tuple[str, ...]) -> None:
    """Check that :func:`prepare` can write, unless all that it would write is there.

    Raises:
        UserError: it can't.
    """
    if not (_cache(cfg) / fingerprint_of(cfg, sources, tokenizer, task, labels) / MANIFEST).exists():
        _cache(cfg).check_writable("data.cache")


@contextmanager
def _user_errors() -> Iterator[None]:
    """Raise a UserError that a task of Ray Data raised as such."""
    from ray.exceptions import RayTaskError

    try:
        yield
    except RayTaskError as error:
        # Ray wraps what a task raised more than once, and keeps only the text of the innermost error
        if mistake := re.search(r"ftray\.errors\.UserError: (.*)", str(error)):
            raise UserError(mistake[1]) from None
        raise


def _write(data: TokenizedData, cfg: DataConfig, sources: Sources, tokenizer: TokenizerArguments) -> None:
    """Write the Parquet files, and complete the description in `data`."""
    writers = {split: SplitWriter(Path(data.directory), split) for split in SPLITS}
    renderings: set[str] = set()
    for name, source in sources.items():  # train comes first
        records = _read(source, name, data.task)
        if not data.task.labels and data.task.load().has_labels:
            records = records.materialize()  # the classes must be known before the first record is tokenized
            data.task = replace(data.task, labels=_classes(records))
        shapes, ignored = Counter[str](), set[str]()
        for table in _tokenize(records, source.cfg, tokenizer, data.task):
            renderings.update(table["rendering"].drop_null().unique().to_pylist())
            shapes.update(table["shape"].drop_null().to_pylist())
            ignored.update(pa.compute.list_flatten(table["ignored"]).to_pylist())
            for split, writer in writers.items():
                writer.add(table.filter(pa.compute.equal(table["split"], split)))
        by_count = sorted(shapes.items(), key=lambda shape: (-shape[1], shape[0]))
        data.sources[name] = SourceSummary(dict(by_count), sorted(ignored))
    if data.task.template is not None and len(renderings) == 1:  # all are chats, or texts alone, whatever was asked for
        data.task = replace(data.task, template=renderings.pop() or AS_IT_IS)
    data.splits = {split: writer.close() for split, writer in writers.items()}
    _refuse_empty_splits(data, cfg, sources)


def _refuse_empty_splits(data: TokenizedData, cfg: DataConfig, sources: Sources) -> None:
    for name in needed(cfg):
        if not data.splits[name].records:
            if data.splits[name].dropped:
                refuse_unsupervised(sources.get(name, sources["train"]).cfg)
            refuse_empty(name, sum(split.records for split in data.splits.values()), cfg)


def _read(source: Source, name: str, task: TaskSpec) -> "ray.data.Dataset":
    """The records of a source, checked, in rows of the schema `RECORD`."""
    import ray.data

    chunks = ray.data.from_items([asdict(chunk) for chunk in source.chunks], override_num_blocks=len(source.chunks))
    chunks.context.execution_options.preserve_order = True
    fixed = {"cfg": source.cfg, "source": name, "task": task}
    return chunks.map_batches(_read_chunks, batch_size=1, batch_format="pyarrow", fn_kwargs=fixed, num_cpus=TASK_CPUS)


def _read_chunks(chunks: pa.Table, cfg: DataConfig, source: str, task: TaskSpec) -> Iterator[pa.Table]:
    of = task.load()
    for chunk in chunks.to_pylist():
        records = read_chunk(Chunk(**chunk))
        while rows := [_checked(located, cfg, source, of) for located in islice(records, BATCH)]:
            yield pa.Table.from_pylist(rows, RECORD)


def _checked(located: Located, cfg: DataConfig, source: str, of: "Task") -> dict[str, Any]:
    place, record = located
    example, seen = of.parse_and_see(record, place)
    return {
        "key": order_key(record, cfg.seed) - 2**63,
        "split": split_of(record, cfg, source),
        "shape": seen.shape,
        "ignored": seen.ignored,
        "classes": of.labels(example),
        "example": pickle.dumps(example),
    }


def _classes(records: "ray.data.Dataset") -> tuple[str, ...]:
    """All class names in the records, sorted; whole numbers by their size."""
    found: set[str] = set()
    for table in records.select_columns(["classes"]).iter_batches(batch_size=None, batch_format="pyarrow"):
        found.update(pa.compute.list_flatten(table["classes"]).unique().to_pylist())
    return in_order(found)


def _tokenize(
    records: "ray.data.Dataset", cfg: DataConfig, tokenizer: TokenizerArguments, task: TaskSpec
) -> Iterator[pa.Table]:
    """Tables in the order of keys: the columns of the shards, and what the writer counts."""
    common: dict[str, Any] = {"batch_format": "pyarrow", "num_cpus": TASK_CPUS}
    if cfg.limit:  # of each block first, so that fewer are sorted
        records = records.map_batches(_smallest, batch_size=None, fn_kwargs={"limit": cfg.limit}, **common)
    ordered = records.sort("key")
    if cfg.limit:
        ordered = ordered.limit(cfg.limit)
    fixed = {"cfg": cfg, "tokenizer": tokenizer, "task": task}
    tokenized = ordered.map_batches(_tokenize_batch, batch_size=BATCH, fn_kwargs=fixed, **common)
    yield from tokenized.iter_batches(batch_size=BATCH, batch_format="pyarrow")


def _smallest(records: pa.Table, limit: int) -> pa.Table:
    return records.take(pa.compute.sort_indices(records["key"])[:limit])


@lru_cache(maxsize=1)
def _tokenizer(model: str, trust_remote_code: bool, chat_template: str | None) -> Any:
    from ftray.models.load import load_tokenizer

    return load_tokenizer(model, trust_remote_code, chat_template)


def _tokenize_batch(records: pa.Table, cfg: DataConfig, tokenizer: TokenizerArguments, task: TaskSpec) -> pa.Table:
    of = task.load()
    examples = [pickle.loads(example) for example in records["example"].to_pylist()]
    refuse_mixture(examples, of)
    words = _tokenizer(*tokenizer)
    renderings = [rendering(example, words, cfg) if task.name == CAUSAL.name else None for example in examples]
    numbered = spread(of.tokenize(examples, words, cfg))
    tokens = [row for _, row in numbered]
    records = records.take([i for i, _ in numbered])
    first = [at == 0 or i != numbered[at - 1][0] for at, (i, _) in enumerate(numbered)]  # of the rows of a record
    keys = [key + 2**63 for key in records["key"].to_pylist()]
    return pa.table(
        {
            "key": pa.array(keys, pa.uint64()),
            "input_ids": pa.array([t.input_ids if t else [] for t in tokens], pa.list_(pa.int32())),
            "labels": pa.array([t.labels if t else [] for t in tokens], pa.list_(pa.int32())),
            "prompt": pa.array([t.prompt if t else "" for t in tokens], pa.string()),
            "target": pa.array([t.target if t else "" for t in tokens], pa.string()),
            "prompt_tokens": pa.array([t.prompt_tokens if t else 0 for t in tokens], pa.int32()),
            "token_type_ids": pa.array([t.token_type_ids if t else [] for t in tokens], pa.list_(pa.int32())),
            "lengths": pa.array([t.lengths if t else [] for t in tokens], pa.list_(pa.int32())),
            "score": pa.array([t.score if t else 0.0 for t in tokens], pa.float32()),
            "extra": pa.array([t.extra if t else "" for t in tokens], pa.string()),
            "split": records["split"],
            "shape": pa.compute.if_else(pa.array(first), records["shape"], None),  # counted once a record
            "rendering": pa.array([renderings[i] for i, _ in numbered], pa.string()),
            "ignored": records["ignored"],
            "truncated": [bool(t and t.truncated) for t in tokens],
        }
    )
