"""The check of the data before anything expensive starts: every record is read, and whatever is wrong is said."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from ftray.config import DataConfig
from ftray.data.record_task import RecordTask, record_task
from ftray.data.sources import is_small, read_for_check
from ftray.data.splits import Source, filled, find_sources, held_out_files, key_place_and_split, needed
from ftray.data.tokens import longest_text, spread
from ftray.errors import UserError
from ftray.task_spec import TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEASURED = 10_000  # records at most, a random sample, whose lengths `max_length: auto` goes by
TRIED = 4  # validation records on which a user's metric is tried
TOKENIZED_AT_ONCE = 64  # records of the check: as a rule, one of the first has something to learn


@dataclass(frozen=True)
class _Record:
    """A record that was read.

    Attributes:
        part: name of its part of a mixture, or empty.
        key, place, split: as :func:`ftray.data.splits.key_place_and_split` gives them.
        example: what the task found in it.
    """

    part: str
    key: int
    place: int
    split: str
    example: Any


class DataCheck:
    """One pass over the data before anything expensive starts: gives the first record, checks and splits them all.

    Sources up to 64 MiB are read in full, of larger ones the first 1000 records.

    Attributes:
        first: the first training record, by which the task is inferred.
        lengths: tokens of training records, whole; of none unless `max_length` is `auto`.
        shown: a few validation records, with their `prompt`, `target` and `extra` as the shards will have them.

    Raises:
        UserError: as :func:`find_sources`; or the first training record can't be read.
    """

    def __init__(self, cfg: DataConfig):
        self.cfg, self.sources = cfg, find_sources(cfg)
        self.lengths: list[int] = []
        self.shown: list[dict[str, Any]] = []
        self._records = {
            (name, part): read_for_check(own.chunks)
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
        if held_out := held_out_files(self.sources):
            print(held_out, flush=True)
        of = record_task(TaskSpec.named(task, labels, tokenizer.pad_token_id or 0))
        counts: Counter[str] = Counter()
        different: set[int] = set()
        first: list[Any] = []  # of all, with which those of other sources must agree
        are_parted, unlearnt = False, ""
        for name, source in self.sources.items():
            records = [record for part, own in source.parts.items() for record in self._read(name, part, own.cfg, of)]
            first = first or [records[0].example]
            refuse_mixture([*first, *(record.example for record in records)], of)
            if name == "train" and of.has_labels and not labels:
                of = record_task(replace(of.spec, labels=_classes(records, of, source)))
            taken = sorted(records, key=lambda record: record.key)[: source.cfg.limit]
            if name == "train" and is_small(source.chunks):
                taken = self._filled(taken)
                in_split = {(record.place, record.part, record.split) for record in taken}
                are_parted = len(in_split) > len({(record.place, record.part) for record in taken})
            if is_small(source.chunks) and not any(of.learns(record.example) for record in taken):
                raise UserError(
                    f"data {source.cfg.names}: holds only {of.unlearnt}, of which {of.spec.full_name} learns nothing: "
                    "give good ones too, or --task KTO, which learns from both"
                )
            learnt = [record for record in taken if of.learns(record.example)]
            unlearnt = unlearnt or (of.unlearnt if len(learnt) < len(taken) else "")
            counts.update(record.split for record in learnt)
            different.update(record.key for record in taken)
            self._show([record for record in taken if record.split == "validation"], tokenizer, of, source)
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
                    refuse_empty(split, counts.total(), self.cfg, of.grouped_by, len(different), unlearnt)
        if are_parted:
            alike = f"those of one {of.grouped_by}" if of.grouped_by else "equal ones"
            print(
                f"data {self.cfg.names}: too few records differ: {alike} are trained on and held out, and what is held "
                "out proves nothing",
                flush=True,
            )
        return of.spec

    def _show(
        self, held_out: list[_Record], tokenizer: "PreTrainedTokenizerBase", of: RecordTask, source: Source
    ) -> None:
        for record in held_out[: TRIED - len(self.shown)]:
            own = source.parts[record.part].cfg
            rows = spread(of.tokenize([record.example], tokenizer, own))
            part = {"source": record.part} if record.part else {}
            shown = [row for _, row in rows if row]
            self.shown += [{"prompt": r.prompt, "target": r.target, "extra": r.extra, **part} for r in shown]

    def _filled(self, taken: list[_Record]) -> list[_Record]:
        """Records with their final splits."""
        by_hash, places, parts = zip(*((record.split, record.place, record.part) for record in taken), strict=True)
        splits = filled(by_hash, places, parts, self.sources)
        return [replace(record, split=split) for record, split in zip(taken, splits, strict=True)]

    def _read(self, name: str, part: str, cfg: DataConfig, of: RecordTask) -> list[_Record]:
        records = []
        for place, record in self._records[name, part]:
            example = of.parse(record, place)
            records.append(_Record(part, *key_place_and_split(record, cfg, name, part, of.group(example)), example))
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
            found += [longest_text(len(row.input_ids), len(row.labels), row.lengths) for _, row in rows if row]
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
                "all records must be alike; or say by --data.fields what is to be read of each"
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


def refuse_empty(
    split: str,
    records: int,
    cfg: DataConfig,
    grouped_by: str = "",
    different: int | None = None,
    unlearnt: str = "",
) -> None:
    """Raise the UserError about a split without records.

    Args:
        grouped_by: what records that share a split have in common, unless `data.group` says it.
        different: how many of the records differ from each other; None: not known.
        unlearnt: which records don't count, if there may be any.
    """
    said, do = f"{records} record(s){f', without {unlearnt},' if unlearnt else ''}", f"raise data.{split}_fraction"
    if different is not None and 2 * different < records:
        said, do = f"{said}, only {different} of them different,", "equal ones share a split: give more that differ"
    group = cfg.group or grouped_by
    together = f"; records of one {group} stay together" if group else ""
    if split == "train":
        raise UserError(f"data {cfg.names}: none of {said} is left for training: give more records{together}")
    raise UserError(f"data {cfg.names}: the {split} split of {said} is empty: {do}, or give data.{split}{together}")


def refuse_unsupervised(cfg: DataConfig, unlearnt: str = "") -> None:
    """Raise the UserError about a source of which tokenization left nothing.

    Args:
        unlearnt: which records have nothing to be learnt, if there may be any.
    """
    hint = "raise data.max_length" + (" or set data.overlong to truncate" if cfg.overlong == "drop" else "")
    or_else = f"; {unlearnt} are not learnt: give more of the others" if unlearnt else ""
    raise UserError(
        f"data {cfg.names}: no supervised token is left within max_length {cfg.max_length}: {hint}{or_else}"
    )
