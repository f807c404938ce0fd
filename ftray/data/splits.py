"""Which record belongs to which split, decided by its content; and what is wrong with the data before work starts."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ftray.config import DataConfig
from ftray.data.sources import Chunk, find_chunks, find_splits, is_small, read_for_check
from ftray.errors import UserError
from ftray.task_spec import TaskSpec

SPLITS = ("train", "validation", "test")
Sources = dict[str, tuple[list[Chunk], DataConfig]]


def find_sources(cfg: DataConfig) -> Sources:
    """The split a source belongs to (train: all that it is cut into) -> its chunks and settings."""
    given, own = {"validation": cfg.validation, "test": cfg.test}, find_splits(cfg.source, cfg)
    shares = {f"{name}_fraction": 0.0 for name, source in given.items() if source or name in own}
    sources = {"train": (own["train"], cfg.model_copy(update=shares))}
    for name, source in given.items():
        if source:
            chunks = find_chunks(source, cfg, name)
            sources[name] = (chunks, cfg.model_copy(update={"source": source, "limit": None}))
        elif name in own:
            sources[name] = (own[name], cfg.model_copy(update={"limit": None}))
    return sources


def needed(cfg: DataConfig) -> list[str]:
    """The splits that must not be empty: a test split only where one was asked for."""
    return [*SPLITS[:2], *(["test"] if cfg.test or cfg.test_fraction else [])]


def order_key(record: dict[str, Any], seed: int) -> int:
    """Place of a record among all, an unsigned 64-bit number."""
    return _hash(record, seed, "order")


def split_of(record: dict[str, Any], cfg: DataConfig, source: str) -> str:
    """The split of a record; equal records share it.

    It takes a hash of its own, so that `limit`, which takes the smallest order keys, leaves the shares as they are.
    """
    if source != "train":
        return source
    place = _hash(record, cfg.seed, "split") / 2**64
    if place < cfg.test_fraction:
        return "test"
    return "validation" if place < cfg.test_fraction + cfg.validation_fraction else "train"


def _hash(record: dict[str, Any], seed: int, purpose: str) -> int:
    content = json.dumps(record, sort_keys=True, ensure_ascii=False, default=str).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=f"{purpose}{seed}".encode()).digest())


def check(cfg: DataConfig, tokenizer: Any, task: str = "CAUSAL_LM", labels: tuple[str, ...] = ()) -> TaskSpec:
    """Find what is wrong with the data before anything expensive starts.

    Sources up to 64 MiB are read in full, of larger ones the first 1000 records.

    Args:
        labels: the classes of the task; none: those of the training records.

    Returns:
        The task with the labels of the records that were read, or the given ones.

    Raises:
        UserError: see :mod:`ftray.data.sources` and :class:`ftray.tasks.task.Task`; also an empty split, or no
            supervised token within `max_length`, where the whole source was read.
    """
    found: dict[str, int] = dict.fromkeys(SPLITS, 0)
    total, complete = 0, True
    known: list[Any] = []
    of = TaskSpec(task, labels, pad=tokenizer.pad_token_id or 0).load()
    for name, (chunks, local) in find_sources(cfg).items():
        keyed = []
        for place, record in read_for_check(chunks):
            example = of.parse(record, place)
            keyed.append((order_key(record, cfg.seed), split_of(record, local, name), example))
        if not keyed:
            raise UserError(f"data {local.names}: holds no record")
        known = [*known[:1], *(example for _, _, example in keyed)]
        refuse_mixture(known, of)
        if name == "train" and of.has_labels and not labels:
            seen = Counter(label for _, _, example in keyed for label in of.labels(example))
            if is_small(chunks):
                refuse_labels(seen, [example for _, _, example in keyed], of, local)
            of = replace(of.spec, labels=in_order(seen)).load()
        keyed.sort(key=lambda entry: entry[0])
        examples: dict[str, list[Any]] = {split: [] for split in SPLITS}
        for _, split, example in keyed[: local.limit]:
            examples[split].append(example)
        for split in SPLITS:
            found[split] += len(examples[split])
        total += len(keyed[: local.limit])
        complete = complete and is_small(chunks)
        learned = examples[name] or [example for _, _, example in keyed]
        # in small helpings, for as a rule the first one has something to learn
        helpings = (learned[at : at + 64] for at in range(0, len(learned), 64))
        if not any(any(of.tokenize(helping, tokenizer, local)) for helping in helpings) and is_small(chunks):
            refuse_unsupervised(local)
    if complete:
        for split in needed(cfg):
            if not found[split]:
                refuse_empty(split, total, cfg)
    return of.spec


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Class names sorted; numbers by their size."""
    return tuple(sorted(labels, key=lambda label: (0, int(label), "") if label.isdecimal() else (1, 0, label)))


def refuse_mixture(examples: list[Any], task: Any) -> None:
    """Raise the UserError about records of two shapes, if there are any."""
    first = examples[0]
    for example in examples:
        if task.shape(example) != task.shape(first):
            raise UserError(
                f"{example.where}: has {task.shape(example)}, but {first.where} has {task.shape(first)}: "
                "all records must be alike"
            )


def refuse_labels(seen: Counter[str], examples: list[Any], task: Any, cfg: DataConfig) -> None:
    """Raise the UserError about labels that can't be learnt, if there are any."""
    if len(seen) < 2:
        raise UserError(f"data {cfg.names}: {next(iter(seen))!r} is the only label: there is nothing to tell apart")
    rare = next((label for label, count in seen.items() if count < task.min_label_count), None)
    if rare is not None:
        where = next(example.where for example in examples if rare in task.labels(example))
        raise UserError(
            f"{where}: label {rare!r} occurs only once: it can't be learnt and validated; give more such records"
        )


def refuse_empty(split: str, records: int, cfg: DataConfig) -> None:
    """Raise the UserError about a split without records."""
    if split == "train":
        raise UserError(f"data {cfg.names}: none of {records} record(s) is left for training: give more records")
    raise UserError(
        f"data {cfg.names}: the {split} split of {records} record(s) is empty: "
        f"raise data.{split}_fraction, or give data.{split}"
    )


def refuse_unsupervised(cfg: DataConfig) -> None:
    """Raise the UserError about a source of which tokenization left nothing."""
    hint = "raise data.max_length" + (" or set data.overlong to truncate" if cfg.overlong == "drop" else "")
    raise UserError(f"data {cfg.names}: no supervised token is left within max_length {cfg.max_length}: {hint}")
