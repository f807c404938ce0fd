"""From sources to tokenized shards: a Ray Data pipeline, which reads each source once."""

import hashlib
import json
import logging
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.fs as pafs

from ftray.config import DataConfig
from ftray.data.check import in_order, refuse_empty, refuse_mixture, refuse_unsupervised
from ftray.data.fast_tokenizer import AnyTokenizer, FastTokenizer, state_of
from ftray.data.formats import Chunk, read_chunk
from ftray.data.load_apart import load_apart
from ftray.data.parts import Sorted, bins_of, read_bin, read_tables, write_sorted, write_tables
from ftray.data.record_task import RecordTask, record_task
from ftray.data.shards import MANIFEST, SourceSummary, SplitWriter, TokenizedData
from ftray.data.sources import content_stamp
from ftray.data.splits import FEW, SPLITS, Source, Sources, filled, find_sources, key_place_and_split, needed
from ftray.data.tokens import Tokens, prompt_template, spread
from ftray.errors import UserError
from ftray.models.tokenizer import load_tokenizer
from ftray.runtime.cluster import say_if_waiting
from ftray.storage.atomic import atomic_dir
from ftray.storage.location import Location, parse_location
from ftray.task_spec import AS_IT_IS, CAUSAL, TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

TokenizerArguments = tuple[str, bool, str | None]  # of `load_tokenizer`, in other processes

VERSION = 6  # of the rules that make tokens from records: raise it when they change
BATCH = 1024  # records that a task reads or tokenizes at once
TASK_CPUS = 1  # of a Ray task
LOCAL_BYTES = 2**22  # of a source that is read in this process, with which tasks of Ray would take longer to begin
LATER = ("sources", "group")  # settings that came later: data that has none keeps its name
PARTS, TOKENIZER = ".parts2", "tokenizer.json"  # what a directory of unfinished work is called by; a file in it
# a record that was read and checked
RECORD = pa.schema(
    {
        "key": pa.int64(),  # place in the order; signed, for the sort
        "place": pa.int64(),  # among the splits; signed as well
        "split": pa.string(),
        "source": pa.string(),  # of a mixture
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
    connect: Callable[[], None] | None = None,
    sources: Sources | None = None,
) -> TokenizedData:
    """Tokenize, split and cache, or reuse what an equal earlier call left; Ray must be initialised, or `connect` do it.

    The order of rows, their split and the row groups depend on the records' content and `seed` alone, never on the
    cluster: rows are sorted by a seeded hash of the record, so any row group is a random sample of the data. On a
    cluster, `cfg.cache` must be a path that all nodes share, or a URI.

    Args:
        cfg: source, lengths, fractions, seed.
        model: directory of the base model, for its tokenizer.
        trust_remote_code: run Python code that comes with the tokenizer.
        task: one of `ftray.task_spec.TASKS` or `OBJECTIVES`.
        labels: its classes; empty: those of the training records.
        connect: initialises Ray; it is called only if there are sources to read that need its tasks.
        sources: of `cfg`; None: they are listed.

    Raises:
        UserError: as :meth:`ftray.data.check.DataCheck.run`, also about records beyond the part that it reads.
    """
    sources = sources or find_sources(cfg)
    spec = TaskSpec.named(task, labels)
    if spec.name == CAUSAL.name and not trust_remote_code:
        tokenizer = load_apart(model, cfg.chat_template)
    else:
        tokenizer = load_tokenizer(model, trust_remote_code, cfg.chat_template)
    chat_template = tokenizer.chat_template if cfg.chat_template else None
    fingerprint = fingerprint_of(cfg, sources, tokenizer, task, labels)
    target = _cache(cfg) / fingerprint
    if (target / MANIFEST).exists():
        log.info("reusing the tokenized shards in %s", target)
        return TokenizedData.load(str(target))
    tokens = fingerprint_of(_unweighted(cfg), sources, tokenizer, task, labels) if cfg.sources else ""
    if twin := _same_tokens(_cache(cfg), tokens):
        log.info("taking the tokenized shards in %s, with other weights, into %s", twin.directory, target)
        with atomic_dir(target, cached=True, marker=MANIFEST) as directory:
            _copy(twin, directory, fingerprint, cfg)
        return TokenizedData.load(str(target))
    log.info("tokenizing %s into %s", cfg.names, target)
    if connect and not read_here(sources):
        connect()
    template = prompt_template(tokenizer, cfg) if spec.name == CAUSAL.name else None
    spec = replace(spec, pad=tokenizer.pad_token_id or 0, template=template, chat_template=chat_template)
    work = _cache(cfg) / f"{fingerprint}{PARTS}"  # a killed run leaves it, which the next one resumes
    work.mkdir(parents=True, exist_ok=True)
    if spec.name == CAUSAL.name and (state := state_of(tokenizer)):
        (work / TOKENIZER).write_text(state)
    try:
        with atomic_dir(target, cached=True, marker=MANIFEST) as directory:
            data = TokenizedData(str(directory), fingerprint, {}, spec, tokens=tokens)
            with _user_errors():
                _write(data, cfg, sources, (model, trust_remote_code, chat_template), work)
            data.save()
    except UserError:
        work.remove()
        raise
    except Exception:
        if not (target / MANIFEST).exists():  # else another process was first, and has taken its parts away
            raise
    work.remove()
    for left in _cache(cfg).published_dirs(f".{fingerprint}.*"):  # of killed runs; one that lives finds ours instead
        left.remove()
    return TokenizedData.load(str(target))


def read_here(sources: Sources) -> bool:
    """Whether :func:`prepare` reads all sources in this process, without tasks of Ray."""
    return all(map(_is_small, sources.values()))


def fingerprint_of(
    cfg: DataConfig, sources: Sources, tokenizer: AnyTokenizer, task: str, labels: tuple[str, ...] = ()
) -> str:
    """The same for all that makes the same tokens: the name of their directory in the cache."""
    if isinstance(tokenizer, FastTokenizer):
        vocabulary: Any = tokenizer.stored
    else:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend else sorted(tokenizer.get_vocab().items())
    parts = {
        "version": VERSION,
        "task": [task, *labels],
        "content": {name: content_stamp(source.chunks) for name, source in sources.items()},
        "settings": cfg.model_dump(exclude={"cache", *(name for name in LATER if not getattr(cfg, name))}),
        "tokenizer": vocabulary,
        "special": [str(tokenizer.special_tokens_map), tokenizer.chat_template],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _unweighted(cfg: DataConfig) -> DataConfig:
    """A mixture whose sources all have a weight of one: it makes the same tokens."""
    return cfg.model_copy(update={"sources": [mixed.model_copy(update={"weight": 1.0}) for mixed in cfg.sources]})


def _same_tokens(cache: Location, tokens: str) -> TokenizedData | None:
    """Data of a mixture that differs in weights alone; None: there is none."""
    for place in cache.published_dirs("[0-9a-f]*") if tokens else ():
        if (place / MANIFEST).exists() and json.loads((place / MANIFEST).read_text()).get("tokens") == tokens:
            return TokenizedData.load(str(place))
    return None


def _copy(twin: TokenizedData, directory: Path, fingerprint: str, cfg: DataConfig) -> None:
    """Put the shards of data, with the weights of `cfg`, into a local directory."""
    place = parse_location(twin.directory)
    local = pafs.LocalFileSystem()
    pafs.copy_files(place.path, str(directory), source_filesystem=place.filesystem, destination_filesystem=local)
    data = replace(twin, directory=str(directory), fingerprint=fingerprint)
    for mixed in cfg.sources:
        if rows := data.splits["train"].sources.get(mixed.source):
            rows.weight = mixed.weight
    data.save()


def _cache(cfg: DataConfig) -> Location:
    from ftray.models.find import cache_root

    return parse_location(cfg.cache or cache_root() / "data").absolute()  # workers have directories of their own


def check_cache(
    cfg: DataConfig, sources: Sources, tokenizer: "PreTrainedTokenizerBase", task: str, labels: tuple[str, ...]
) -> None:
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


def _write(
    data: TokenizedData, cfg: DataConfig, sources: Sources, tokenizer: TokenizerArguments, work: Location
) -> None:
    """Write the Parquet files, and complete the description in `data`."""
    weights = {mixed.source: mixed.weight for mixed in cfg.sources}
    learns_first = record_task(data.task).learns_first
    writers = {
        split: SplitWriter(Path(data.directory), split, weights if split == "train" else {}, learns_first)
        for split in SPLITS
    }
    renderings: set[str] = set()
    for name, source in sources.items():  # train comes first
        found = _read(source, name, data.task, work)
        if not data.task.labels and record_task(data.task).has_labels:
            data.task = replace(data.task, labels=in_order({label for part in found for label in part.classes}))
        parts = {part: SourceSummary() for part in source.parts}
        for table in _tokenize(found, sources, name, tokenizer, data.task, work):
            renderings.update(table["rendering"].drop_null().unique().to_pylist())
            for part, summary in parts.items():
                summary.add(table.filter(pa.compute.equal(table["source"], part)) if part else table)
            for split, writer in writers.items():
                writer.add(table.filter(pa.compute.equal(table["split"], split)))
        data.sources |= {f"{name} {part}".rstrip(): summary.in_order() for part, summary in parts.items()}
    if data.task.template is not None and len(renderings) == 1:  # all are chats, or texts alone, whatever was asked for
        data.task = replace(data.task, template=renderings.pop() or AS_IT_IS)
    data.splits = {split: writer.close() for split, writer in writers.items()}
    for written in data.splits.values():  # as they were given, not as they came
        written.sources = {name: written.sources[name] for name in weights if name in written.sources}
    _refuse_empty_splits(data, cfg, sources)


def _refuse_empty_splits(data: TokenizedData, cfg: DataConfig, sources: Sources) -> None:
    for name in needed(cfg):
        if not data.splits[name].records:
            if data.splits[name].dropped:
                refuse_unsupervised(sources.get(name, sources["train"]).cfg, record_task(data.task).unlearnt)
            records = sum(split.records for split in data.splits.values())
            refuse_empty(name, records, cfg, record_task(data.task).grouped_by)


def _read(source: Source, name: str, task: TaskSpec, work: Location) -> list[Sorted]:
    """Check the records of a source and leave them in `work`; what was found in each chunk, in order."""
    chunks = [{"number": number, "chunk": json.dumps(asdict(chunk))} for number, chunk in enumerate(source.chunks)]
    fixed = {"cfg": source.cfg, "source": name, "task": task, "work": str(work), "bins": bins_of(source.chunks)}
    return [Sorted(**json.loads(row["sorted"])) for row in _in_tasks(_read_chunk, chunks, fixed, source)]


def _in_tasks(
    function: Callable[..., pa.Table], rows: list[dict[str, Any]], fixed: dict[str, Any], source: Source
) -> Iterator[dict[str, Any]]:
    """What `function` makes of each row, in their order: in tasks of Ray, or of a small source in this process."""
    if _is_small(source):
        for row in rows:
            yield from function(pa.Table.from_pylist([row]), **fixed).to_pylist()
        return
    import ray.data

    say_if_waiting(1, {"CPU": TASK_CPUS})
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    data.context.execution_options.preserve_order = True
    done = data.map_batches(function, batch_size=1, batch_format="pyarrow", fn_kwargs=fixed, num_cpus=TASK_CPUS)
    for table in done.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from table.to_pylist()


def _is_small(source: Source) -> bool:
    """Whether it is read in this process."""
    sizes = [chunk.bytes for chunk in source.chunks]
    return None not in sizes and sum(size or 0 for size in sizes) <= LOCAL_BYTES


def _read_chunk(rows: pa.Table, cfg: DataConfig, source: str, task: TaskSpec, work: str, bins: int) -> pa.Table:
    (row,) = rows.to_pylist()
    tables = _checked(Chunk(**json.loads(row["chunk"])), cfg, source, record_task(task))
    found = write_sorted(tables, parse_location(work), f"{source}-{row['number']:06d}", bins, cfg.limit)
    pa.default_memory_pool().release_unused()  # Arrow would keep it as long as this process lives
    return pa.table({"sorted": [json.dumps(asdict(found))]})


def _checked(chunk: Chunk, cfg: DataConfig, source: str, of: RecordTask) -> Iterator[pa.Table]:
    """The records of a chunk, in tables of the schema `RECORD`."""
    records, own = read_chunk(chunk), cfg.parts[chunk.part]
    while located := list(islice(records, BATCH)):
        rows: list[tuple[Any, ...]] = []
        for place, record in located:
            example, seen = of.parse_and_see(record, place)
            key, place_of_split, split = key_place_and_split(record, own, source, chunk.part, of.group(example))
            said = [*of.labels(example)], pickle.dumps(example, protocol=5)
            rows.append((key - 2**63, place_of_split - 2**63, split, chunk.part, seen.shape, seen.ignored, *said))
        columns = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), RECORD, strict=True)]
        yield pa.Table.from_arrays(columns, schema=RECORD)


def _tokenize(
    found: list[Sorted], sources: Sources, name: str, tokenizer: TokenizerArguments, task: TaskSpec, work: Location
) -> Iterator[pa.Table]:
    """Tables in the order of keys: the columns of the shards, and what the writer counts."""
    bins, source = list[dict[str, Any]](), sources[name]
    left = source.cfg.limit or sys.maxsize
    for number, counts in enumerate(zip(*(part.counts for part in found), strict=True)):
        taken = min(left, sum(counts))
        left -= taken
        if taken:
            bins.append({"number": number, "taken": taken, "splits": None})
    if not bins:
        return
    parts = [name for part in found for name in part.parts]
    if name == "train" and sum(bin["taken"] for bin in bins) <= FEW:
        _fill(bins, parts, sources, work)
    fixed = {"cfg": source.cfg, "source": name, "parts": parts, "tokenizer": tokenizer, "task": task, "work": str(work)}
    for row in _in_tasks(_tokenize_bin, bins, fixed, source):
        yield from read_tables(work / row["file"])


def _fill(bins: list[dict[str, Any]], parts: list[str], sources: Sources, work: Location) -> None:
    """Note in each bin the splits of its records, of which none is then empty by chance."""
    whole = pa.concat_tables([read_bin(work, parts, bin["number"])[: bin["taken"]] for bin in bins])
    by_hash, places, sources_of = (whole[name].to_pylist() for name in ("split", "place", "source"))
    splits = iter(filled(by_hash, places, sources_of, sources))
    for bin in bins:
        bin["splits"] = [*islice(splits, bin["taken"])]


def _tokenize_bin(
    rows: pa.Table,
    cfg: DataConfig,
    source: str,
    parts: list[str],
    tokenizer: TokenizerArguments,
    task: TaskSpec,
    work: str,
) -> pa.Table:
    (row,) = rows.to_pylist()
    place, name = parse_location(work), f"{source}-tokens-{row['number']:06d}.arrow"
    if not (place / name).exists():
        words = _tokenizer(work, *tokenizer)
        records = read_bin(place, parts, row["number"])[: row["taken"]]
        if row["splits"] is not None:
            at = records.schema.get_field_index("split")
            records = records.set_column(at, "split", pa.array(row["splits"], pa.string()))
        batches = (records[at : at + BATCH] for at in range(0, records.num_rows, BATCH))
        tables = (_tokenize_batch(batch, cfg, words, task) for batch in batches)
        first = next(tables)
        write_tables(place / name, chain([first], tables), first.schema)
        pa.default_memory_pool().release_unused()
    return pa.table({"file": [name]})


@lru_cache(maxsize=1)
def _tokenizer(work: str, model: str, trust_remote_code: bool, chat_template: str | None) -> AnyTokenizer:
    if (state := parse_location(work) / TOKENIZER).exists():
        return FastTokenizer(state.read_text())
    return load_tokenizer(model, trust_remote_code, chat_template)


def _tokenize_batch(records: pa.Table, cfg: DataConfig, words: AnyTokenizer, task: TaskSpec) -> pa.Table:
    of = record_task(task)
    examples = [pickle.loads(example) for example in records["example"].to_pylist()]
    refuse_mixture(examples, of)
    examples = of.in_batch(examples, records["split"].to_pylist())
    whole: list[Tokens | None] = [None] * len(examples)
    renderings: list[str | None] = [None] * len(examples)
    for name, part in cfg.parts.items():
        at = [i for i, source in enumerate(records["source"].to_pylist()) if source == name]
        for i, made in zip(at, of.tokenize([examples[i] for i in at], words, part) if at else [], strict=True):
            whole[i], renderings[i] = made, of.rendering(examples[i], words, part)
    numbered = spread(whole)
    tokens = [row for _, row in numbered]
    records = records.take([i for i, _ in numbered])
    first = [at == 0 or i != numbered[at - 1][0] for at, (i, _) in enumerate(numbered)]  # of the rows of a record
    keys = records["key"].to_numpy().view(np.uint64) ^ np.uint64(2**63)
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
            "teacher_ids": pa.array([t.teacher_ids if t else [] for t in tokens], pa.list_(pa.int32())),
            "teacher_logprobs": pa.array([t.teacher_logprobs if t else [] for t in tokens], pa.list_(pa.float32())),
            "split": records["split"],
            "source": records["source"],
            "shape": pa.compute.if_else(pa.array(first), records["shape"], None),  # counted once a record
            "rendering": pa.array([renderings[i] for i, _ in numbered], pa.string()),
            "ignored": records["ignored"],
            "truncated": pa.array([t.truncated if t else 0 for t in tokens], pa.int32()),
            "place": pa.array(
                [json.dumps(asdict(examples[i].where)) if t and t.truncated else None for i, t in numbered], pa.string()
            ),
        }
    )
