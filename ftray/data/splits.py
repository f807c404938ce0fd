"""Which record belongs to which split, by its content; and the check of the data before work starts."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from ftray.config import DataConfig
from ftray.data.formats import Chunk, Located
from ftray.data.record_task import RecordTask, record_task
from ftray.data.shapes import GROUP
from ftray.data.sources import content_stamp, find_chunks, find_splits, is_small, read_for_check
from ftray.data.tokens import spread
from ftray.errors import UserError
from ftray.task_spec import TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "validation", "test")
MEASURED = 10_000  # records at most, a random sample, whose lengths `max_length: auto` goes by
REDRAWN_BYTES = 2**20  # sources up to this size have their split drawn anew where chance leaves one empty
REDRAWS = 100  # at most, of which each succeeds in about half of the cases
NAMED = 3  # files at most, in a line that says which are held out
TOKENIZED_AT_ONCE = 64  # records of the check, of which as a rule the first ones have something to learn


@dataclass(frozen=True)
class Source:
    """Where records come from.

    Attributes:
        chunks: of it, that can be read in parallel; in a mixture, each names its part.
        cfg: how its records are split and tokenized; `source` names it.
        records: of each part, where they have been read.
    """

    chunks: list[Chunk]
    cfg: DataConfig
    records: dict[str, list[Located]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def parts(self) -> dict[str, "Source"]:
        """The sources of a mixture, by name; of another, itself under the name ''."""
        found = {name: [chunk for chunk in self.chunks if chunk.part == name] for name in self.cfg.parts}
        return {name: Source(found[name], cfg) for name, cfg in self.cfg.parts.items() if found[name]}


# by the split that a source was given for; that of `train` is cut into the splits that have none of their own
Sources = dict[str, Source]


def find_sources(cfg: DataConfig) -> Sources:
    """The sources of a configuration, `train` first.

    Raises:
        UserError: as :func:`ftray.data.sources.find_splits`.
    """
    given = {"validation": cfg.validation, "test": cfg.test}
    own = {part: find_splits(of.source, of) for part, of in cfg.parts.items()}
    # what a source has a split of its own for is not cut from what it is to be trained on
    uncut = {
        part: {f"{name}_fraction": 0.0 for name, source in given.items() if source or name in splits}
        for part, splits in own.items()
    }
    mixed = [one.model_copy(update=uncut[one.source]) for one in cfg.sources]
    sources = {"train": Source(_chunks(own, "train"), cfg.model_copy(update={"sources": mixed, **uncut.get("", {})}))}
    for name, source in given.items():
        if source:
            chunks = find_chunks(source, cfg, name)
            sources[name] = Source(chunks, cfg.model_copy(update={"source": source, "sources": [], "limit": None}))
        elif chunks := _chunks(own, name):
            sources[name] = Source(chunks, cfg.model_copy(update={"limit": None}))
    train = sources["train"]
    known = json.dumps([content_stamp(train.chunks), train.cfg.model_dump_json(exclude={"cache"})], default=str)
    if known not in _REDRAWS:
        _REDRAWS[known] = _redraws(train)
    train.cfg.redraw(_REDRAWS[known])
    return sources


_REDRAWS: dict[str, int] = {}  # of sources that this process has read, so that none is read again


def _redraws(source: Source) -> int:
    """How often the split of a source of few records is drawn anew, until each split has some whose share is a record.

    It follows from the records alone, and is 0 where the first draw leaves no such split empty. Fills `records`.
    """
    size = sum(REDRAWN_BYTES + 1 if chunk.bytes is None else chunk.bytes for chunk in source.chunks)
    if size > REDRAWN_BYTES or not is_small(source.chunks):
        return 0
    try:
        read = {name: [*read_for_check(own.chunks)] for name, own in source.parts.items()}
    except UserError:  # the check of the data comes to it
        return 0
    source.records.update(read)
    found = [
        (order_key(record, own.cfg.seed, name), _content(record.get(GROUP, record)), own.cfg)
        for name, own in source.parts.items()
        for _, record in read[name]
    ]
    different = {content: cfg for _, content, cfg in sorted(found, key=lambda one: one[0])[: source.cfg.limit]}
    shares = {
        "validation": sum(cfg.validation_fraction for cfg in different.values()),
        "test": sum(cfg.test_fraction for cfg in different.values()),
    }
    wanted = {"train", *(name for name, share in shares.items() if share > 1 - 1e-9)}
    for redraws in range(REDRAWS):
        if wanted <= {_split(content, cfg, "train", redraws) for content, cfg in different.items()}:
            return redraws
    return 0


def _chunks(splits: dict[str, dict[str, list[Chunk]]], name: str) -> list[Chunk]:
    """Those of a split, of all parts, each with the name of its part."""
    return [replace(chunk, part=part) for part, own in splits.items() for chunk in own.get(name, [])]


def needed(cfg: DataConfig) -> list[str]:
    """The splits that must not be empty: those that were asked for."""
    parts = cfg.parts.values()
    asked = {
        "validation": cfg.validation or any(part.validation_fraction for part in parts),
        "test": cfg.test or any(part.test_fraction for part in parts),
    }
    return ["train", *(split for split, given in asked.items() if given)]


def require(split: str, cfg: DataConfig, why: str) -> None:
    """Refuse a configuration that asks for no records of a split which a command needs.

    Args:
        why: it needs them.

    Raises:
        UserError: that is so.
    """
    if split not in needed(cfg):
        raise UserError(f"data.{split}_fraction 0: {why}: raise it, or give data.{split}")


def order_key(record: dict[str, Any], seed: int, part: str = "") -> int:
    """The record's place in the order of all records, an unsigned 64-bit number.

    Args:
        part: of a mixture; equal records of two parts have places of their own.
    """
    return _hash(_content(record), seed, _order(part))


def split_of(record: dict[str, Any], cfg: DataConfig, source: str) -> str:
    """The split of a record; equal records share it, and those of one group (see `data.group`).

    It takes a hash of its own, so that `limit`, which takes the smallest order keys, leaves the shares as they are.
    """
    return _split(_content(record.get(GROUP, record)), cfg, source)


def key_and_split(record: dict[str, Any], cfg: DataConfig, source: str, part: str = "") -> tuple[int, str]:
    """:func:`order_key` and :func:`split_of`."""
    content = _content(record)
    grouped = _content(record[GROUP]) if GROUP in record else content
    return _hash(content, cfg.seed, _order(part)), _split(grouped, cfg, source)


def _split(content: bytes, cfg: DataConfig, source: str, redraws: int | None = None) -> str:
    if source != "train":
        return source
    redraws = cfg.redraws if redraws is None else redraws
    place = _hash(content, cfg.seed, f"split{redraws or ''}") / 2**64
    if place < cfg.test_fraction:
        return "test"
    return "validation" if place < cfg.test_fraction + cfg.validation_fraction else "train"


def _order(part: str) -> str:
    return f"order{part and hashlib.blake2b(part.encode(), digest_size=8).hexdigest()}"


def _content(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode(errors="surrogatepass")


def _hash(content: bytes, seed: int, purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=f"{purpose}{seed}".encode()).digest())


@dataclass(frozen=True)
class _Record:
    """A record that was read: its part of a mixture, its place in the order, its split, what the task found in it."""

    part: str
    key: int
    split: str
    example: Any


class DataCheck:
    """One pass over the data before anything expensive starts: gives the first record, checks and splits them all.

    Sources up to 64 MiB are read in full, of larger ones the first 1000 records.

    Attributes:
        first: the first training record, by which the task is inferred.
        lengths: tokens of training records, whole; of none unless `max_length` is `auto`.

    Raises:
        UserError: as :func:`find_sources`; or the first training record can't be read.
    """

    def __init__(self, cfg: DataConfig):
        self.cfg, self.sources = cfg, find_sources(cfg)
        self.lengths: list[int] = []
        self._records = {
            (name, part): iter(source.records[part]) if part in source.records else read_for_check(own.chunks)
            for name, source in self.sources.items()
            for part, own in source.parts.items()
        }
        at = next(iter(self._records))  # train comes first
        first = next(self._records[at], None)
        if first is None:
            raise _no_record(self.sources["train"].parts[at[1]].cfg)
        self.first = first
        self._records[at] = chain([first], self._records[at])

    def run(
        self, tokenizer: "PreTrainedTokenizerBase", task: str = "CAUSAL_LM", labels: tuple[str, ...] = ()
    ) -> TaskSpec:
        """Find what is wrong with the data. Reads on from :attr:`first`, so it can be called once.

        Args:
            labels: the classes of the task; empty: those of the training records.

        Returns:
            The task with the labels of the records that were read, or the given ones.

        Raises:
            UserError: see :mod:`ftray.data.sources` and :mod:`ftray.data.record_task`; also an empty split, or no
                supervised token within `max_length`, where the whole source was read; a cache that can't be
                written.
        """
        from ftray.data.pipeline import check_cache  # which imports this module

        check_cache(self.cfg, self.sources, tokenizer, task, labels)
        self._say_held_out()
        of = record_task(TaskSpec(task, labels, pad=tokenizer.pad_token_id or 0))
        counts: Counter[str] = Counter()
        different: set[int] = set()
        first: list[Any] = []  # of all, with which those of other sources must agree
        for name, source in self.sources.items():
            records = [record for part, own in source.parts.items() for record in self._read(name, part, own.cfg, of)]
            first = first or [records[0].example]
            refuse_mixture([*first, *(record.example for record in records)], of)
            if name == "train" and of.has_labels and not labels:
                of = record_task(replace(of.spec, labels=_classes(records, of, source)))
            taken = sorted(records, key=lambda record: record.key)[: source.cfg.limit]
            counts.update(record.split for record in taken)
            different.update(record.key for record in taken)
            if name == "train" and self.cfg.max_length == "auto":
                self.lengths = _lengths(taken[:MEASURED], tokenizer, of, source)
            if is_small(source.chunks):
                for part, own in source.parts.items():
                    of_part = [record for record in records if record.part == part]
                    to_learn = [record.example for record in taken if (record.part, record.split) == (part, name)]
                    examples = to_learn or [record.example for record in of_part]
                    _refuse_nothing_to_learn(examples, tokenizer, of, own.cfg)
        if all(is_small(source.chunks) for source in self.sources.values()):
            for split in needed(self.cfg):
                if not counts[split]:
                    refuse_empty(split, counts.total(), self.cfg, len(different))
        return of.spec

    def _say_held_out(self) -> None:
        """Say which files are held out by their names alone: perhaps they aren't meant so."""
        for name, given in (("validation", self.cfg.validation), ("test", self.cfg.test)):
            files = [] if given or name not in self.sources else self.sources[name].chunks
            paths = dict.fromkeys(chunk.path for chunk in files if chunk.kind != "hub")
            if paths:
                more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
                print(
                    f"{name}, by name: {', '.join([*paths][:NAMED])}{more}: rename what is to be trained on", flush=True
                )

    def _read(self, name: str, part: str, cfg: DataConfig, of: RecordTask) -> list[_Record]:
        records = [
            _Record(part, *key_and_split(record, cfg, name, part), of.parse(record, place))
            for place, record in self._records[name, part]
        ]
        if not records:
            raise _no_record(cfg)
        return records


def _no_record(cfg: DataConfig) -> UserError:
    return UserError(f"data {cfg.names}: holds no record")


def _classes(records: list[_Record], of: RecordTask, source: Source) -> tuple[str, ...]:
    """The class names of the training records, none of which is too rare."""
    seen = Counter(label for record in records for label in of.labels(record.example))
    if is_small(source.chunks):
        refuse_labels(seen, [record.example for record in records], of, source.cfg)
    return in_order(seen)


def _lengths(records: list[_Record], tokenizer: "PreTrainedTokenizerBase", of: RecordTask, source: Source) -> list[int]:
    """The most tokens that a model reads, or writes, of each record at once."""
    found = []
    for part, own in source.parts.items():
        examples = [record.example for record in records if record.part == part]
        for at in range(0, len(examples), TOKENIZED_AT_ONCE):
            rows = spread(of.tokenize(examples[at : at + TOKENIZED_AT_ONCE], tokenizer, own.cfg))
            found += [max([*(row.lengths or [len(row.input_ids)]), len(row.labels)]) for _, row in rows if row]
    if not found:
        refuse_unsupervised(source.cfg)
    return found


def _refuse_nothing_to_learn(
    examples: list[Any], tokenizer: "PreTrainedTokenizerBase", of: RecordTask, cfg: DataConfig
) -> None:
    """Raise the UserError about records of which tokenization leaves nothing, if that is so."""
    batches = (examples[at : at + TOKENIZED_AT_ONCE] for at in range(0, len(examples), TOKENIZED_AT_ONCE))
    if not any(any(of.tokenize(batch, tokenizer, cfg)) for batch in batches):
        refuse_unsupervised(cfg)


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Class names sorted; whole numbers by their size."""
    return tuple(sorted(labels, key=lambda label: (0, int(label), "") if label.isdecimal() else (1, 0, label)))


def refuse_mixture(examples: list[Any], task: RecordTask) -> None:
    """Raise the UserError about records that can't be trained on together, if there are any."""
    first = examples[0]
    for example in examples:
        if task.shape(example) != task.shape(first):
            raise UserError(
                f"{example.where}: has {task.shape(example)}, but {first.where} has {task.shape(first)}: "
                "all records must be alike"
            )


def refuse_labels(seen: Counter[str], examples: list[Any], task: RecordTask, cfg: DataConfig) -> None:
    """Raise the UserError about labels that can't be learnt, if there are any."""
    if len(seen) < 2:
        raise UserError(f"data {cfg.names}: {next(iter(seen))!r} is the only label: there is nothing to tell apart")
    rare = next((label for label, count in seen.items() if count < task.min_label_count), None)
    if rare is not None:
        where = next(example.where for example in examples if rare in task.labels(example))
        raise UserError(
            f"{where}: label {rare!r} occurs only once: it can't be learnt and validated; give more such records"
        )


def refuse_empty(split: str, records: int, cfg: DataConfig, different: int | None = None) -> None:
    """Raise the UserError about a split without records.

    Args:
        different: how many of the records differ from each other; None: not known.
    """
    said, do = f"{records} record(s)", f"raise data.{split}_fraction"
    if different is not None and 2 * different < records:
        said, do = f"{said}, only {different} of them different,", "equal ones share a split: give more that differ"
    if split == "train":
        raise UserError(f"data {cfg.names}: none of {said} is left for training: give more records")
    together = f"; records of one {cfg.group} stay together" if cfg.group else ""
    raise UserError(f"data {cfg.names}: the {split} split of {said} is empty: {do}, or give data.{split}{together}")


def refuse_unsupervised(cfg: DataConfig) -> None:
    """Raise the UserError about a source of which tokenization left nothing."""
    hint = "raise data.max_length" + (" or set data.overlong to truncate" if cfg.overlong == "drop" else "")
    raise UserError(f"data {cfg.names}: no supervised token is left within max_length {cfg.max_length}: {hint}")
