"""Tokenized shards on disk: a `manifest.json`, and Parquet files of each split in row groups of 1024 rows."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from ftray.data.formats import SourceLocation
from ftray.data.parts import read_tables
from ftray.storage.location import Location, parse_location
from ftray.task_spec import CAUSAL, IGNORE, TaskSpec

MANIFEST = "manifest.json"
ROW_GROUP_ROWS = 1024  # a row group is read and shuffled as a whole
ROW_GROUPS_PER_FILE = 64
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
        "teacher_ids": pa.list_(pa.int32()),  # of distillation; else empty
        "teacher_logprobs": pa.list_(pa.float32()),
        "source": pa.string(),  # of a mixture; else empty
    }
)
REFERENCE = "reference"  # column beside them: log-probabilities of a row's answers before training, nats, list<float32>
NO_REFERENCE = "none"  # in place of its directory: zeros, for estimates of time and memory
_LATER = ("source", "teacher_ids", "teacher_logprobs")  # columns that older shards lack
_NAMES_ON_DISK = {"row_groups": "windows"}  # that version 0.1.0 gave to fields of a split


@dataclass
class MixedRows:
    """What a split holds of one source of a mixture.

    Attributes:
        row_groups: rows in each row group.
        weight: how often an epoch draws each of them.
        tokens, supervised_tokens: in all of them.
    """

    weight: float = 1.0
    row_groups: list[int] = field(default_factory=list)
    tokens: int = 0
    supervised_tokens: int = 0

    @property
    def rows(self) -> int:
        """In all row groups."""
        return sum(self.row_groups)

    @property
    def drawn(self) -> int:
        """Rows that an epoch draws: at least one."""
        return max(1, round(self.weight * self.rows)) if self.rows else 0


@dataclass
class Split:
    """One split's files and counts.

    Attributes:
        files: Parquet files relative to the data directory, in order.
        row_groups: rows of each row group, over all files in order; all but the last hold `ROW_GROUP_ROWS`.
        records: rows in all of them; a long text and some conversations give several.
        tokens: in all of them.
        supervised_tokens: labels that bear loss.
        lengths: percentiles (0, 50, 90, 99, 100) of tokens per row.
        dropped, truncated: records left out, and rows cut to fit.
        longest_cut, longest_cut_at: tokens that the longest of those that were cut had, and where it stands; 0 and
            empty if none was cut, and in shards made before they were added.
        digest: of all that is trained on; empty in shards made before it was added.
        highest: token id; -1 in shards made before it was added.
        sources: of a mixture, by name; else empty.
    """

    files: list[str] = field(default_factory=list)
    row_groups: list[int] = field(default_factory=list)
    records: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    lengths: list[int] = field(default_factory=list)
    dropped: int = 0
    truncated: int = 0
    longest_cut: int = 0
    longest_cut_at: str = ""
    digest: str = ""
    highest: int = -1
    sources: dict[str, MixedRows] = field(default_factory=dict)

    @property
    def drawn(self) -> int:
        """Rows of an epoch: all, but in a mixture, where weights say how often."""
        return sum(source.drawn for source in self.sources.values()) if self.sources else self.records

    @property
    def drawn_tokens(self) -> float:
        """Tokens in the rows of an epoch, about."""
        shares = [source.tokens * source.drawn / max(1, source.rows) for source in self.sources.values()]
        return sum(shares) if self.sources else self.tokens

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Split":
        """From what :meth:`to_json` gave."""
        names = {on_disk: name for name, on_disk in _NAMES_ON_DISK.items()}
        split = cls(**{names.get(name, name): value for name, value in fields.items()})
        split.sources = {name: MixedRows(**rows) for name, rows in fields.get("sources", {}).items()}
        return split

    def to_json(self) -> dict[str, Any]:
        """Its fields, by the names that they have in files."""
        fields = {_NAMES_ON_DISK.get(name, name): value for name, value in asdict(self).items()}
        if self.highest < 0:
            del fields["highest"]
        if not self.sources:
            del fields["sources"]
        if not self.longest_cut:
            del fields["longest_cut"], fields["longest_cut_at"]
        return fields


@dataclass
class SourceSummary:
    """What a source holds.

    Attributes:
        shapes: number of records of each shape, the most frequent first.
        ignored: keys that the records have and no shape reads.
    """

    shapes: dict[str, int] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    def add(self, tokenized: pa.Table) -> None:
        """Count what was recognised in the records of a table."""
        for shape in tokenized["shape"].drop_null().to_pylist():
            self.shapes[shape] = self.shapes.get(shape, 0) + 1
        self.ignored = sorted({*self.ignored, *pa.compute.list_flatten(tokenized["ignored"]).to_pylist()})

    def in_order(self) -> "SourceSummary":
        """The most frequent shape first."""
        by_count = sorted(self.shapes.items(), key=lambda shape: (-shape[1], shape[0]))
        return SourceSummary(dict(by_count), self.ignored)


@dataclass
class TokenizedData:
    """A directory of tokenized shards, as its manifest describes it.

    Attributes:
        directory: a path or URI.
        fingerprint: equal for all that would make the same shards.
        splits: by name.
        task: with the classes of the training records.
        sources: a summary of each source, by the split that it was given for; in a mixture by split and name, as
            `train FILE`.
        row_groups_per_file: of each split; the last file may hold fewer.
        tokens: of a mixture, equal for all that differ in weights alone; else, and in older shards, empty.
        reference: the directory of the column `REFERENCE`, see :mod:`ftray.search.reference`; not in the manifest,
            as it depends on the model. Empty: there is none.
    """

    directory: str
    fingerprint: str
    splits: dict[str, Split]
    task: TaskSpec = CAUSAL
    sources: dict[str, SourceSummary] = field(default_factory=dict)
    row_groups_per_file: int = field(default_factory=lambda: ROW_GROUPS_PER_FILE)
    tokens: str = ""
    reference: str = ""

    @classmethod
    def load(cls, directory: str | Path, reference: str = "") -> "TokenizedData":
        """Read the manifest."""
        manifest = json.loads((parse_location(str(directory)) / MANIFEST).read_text())
        splits = {name: Split.from_json(split) for name, split in manifest["splits"].items()}
        sources = {name: SourceSummary(**summary) for name, summary in manifest["read"].items()}
        per_file = manifest.get("row_groups_per_file", 64)  # what it was before manifests said so
        task, tokens = TaskSpec.of(manifest["task"]), manifest.get("tokens", "")
        return cls(str(directory), manifest["fingerprint"], splits, task, sources, per_file, tokens, reference)

    def save(self) -> None:
        """Write the manifest into the directory, which is a local one."""
        manifest = {
            "fingerprint": self.fingerprint,
            "task": asdict(self.task),
            "splits": {name: split.to_json() for name, split in self.splits.items()},
            "read": {name: asdict(summary) for name, summary in self.sources.items()},
            "row_groups_per_file": self.row_groups_per_file,
        } | ({"tokens": self.tokens} if self.tokens else {})
        (Path(self.directory) / MANIFEST).write_text(json.dumps(manifest, indent=1))

    def row_group(self, split: str, index: int, columns: list[str]) -> pa.Table:
        """Row group `index` of a split."""
        path = parse_location(self.directory) / self.splits[split].files[index // self.row_groups_per_file]
        with pq.ParquetFile(path.path, filesystem=path.filesystem) as file:
            stored = [name for name in columns if name != REFERENCE]
            table = file.read_row_group(index % self.row_groups_per_file, stored)
        return table.append_column(REFERENCE, self._reference(split, index)) if REFERENCE in columns else table

    def _reference(self, split: str, index: int) -> pa.Array:
        """The column `REFERENCE` of a row group."""
        if self.reference == NO_REFERENCE:
            return pa.array([[0.0, 0.0]] * self.splits[split].row_groups[index], pa.list_(pa.float32()))
        (table,) = read_tables(reference_file(self.reference, split, index))
        return table[REFERENCE]

    def rows(self, split: str, limit: int | None = None) -> list[dict[str, Any]]:
        """Rows of a split in stored order, in memory: for scoring test records."""
        has = {"source": bool(self.splits[split].sources)}
        names = [n for n in SCHEMA.names if n not in _LATER or has.get(n, self.task.objective == "DISTILLATION")]
        names += [REFERENCE] if self.reference else []
        rows: list[dict[str, Any]] = []
        for index in range(len(self.splits[split].row_groups)):
            rows += self.row_group(split, index, names).to_pylist()
            if limit and len(rows) >= limit:
                break
        return rows[:limit]


def reference_file(directory: str, split: str, index: int) -> Location:
    """The file that holds the column `REFERENCE` of a row group."""
    return parse_location(directory) / f"{split}-{index:06d}.arrow"


class SplitWriter:
    """Writes the rows of one split, in row groups of exactly `ROW_GROUP_ROWS`."""

    def __init__(self, directory: Path, name: str, weights: dict[str, float] | None = None, learns_first: bool = False):
        """Begin a split.

        Args:
            weights: of the sources of a mixture, by name.
            learns_first: of the texts of a row, the first one alone bears loss.
        """
        self.directory, self.name, self.split = directory, name, Split()
        self.learns_first = learns_first
        self.weights = weights or {}
        self.pending: list[pa.Table] = []
        self.writer: pq.ParquetWriter | None = None
        self.lengths = [np.empty(0, np.int32)]
        self.digest = hashlib.sha256()
        self.longest_cut_at = ""  # JSON of the place: to print one, lines may have to be counted

    def add(self, table: pa.Table) -> None:
        """Take the rows of `table`, except those that tokenization left empty."""
        lengths = pa.compute.list_value_length(table["input_ids"])
        kept = table.filter(pa.compute.greater(lengths, 0))
        self.split.dropped += table.num_rows - kept.num_rows
        self._count_cut(kept.filter(pa.compute.greater(kept["truncated"], 0)))
        self.pending.append(kept.select(SCHEMA.names).cast(SCHEMA))
        while sum(t.num_rows for t in self.pending) >= ROW_GROUP_ROWS:
            self._write_row_group()

    def close(self) -> Split:
        """Write what is left; returns the split's description."""
        if any(t.num_rows for t in self.pending):
            self._write_row_group()
        if self.writer:
            self.writer.close()
        if self.longest_cut_at:
            self.split.longest_cut_at = str(SourceLocation(**json.loads(self.longest_cut_at)))
        self.split.digest = self.digest.hexdigest()[:16]
        ordered = np.sort(np.concatenate(self.lengths))
        if len(ordered):
            self.split.lengths = [int(ordered[round((len(ordered) - 1) * q)]) for q in (0, 0.5, 0.9, 0.99, 1)]
        return self.split

    def _count_cut(self, cut: pa.Table) -> None:
        self.split.truncated += cut.num_rows
        longest = pa.compute.max(cut["truncated"]).as_py() or 0
        if longest > self.split.longest_cut:
            self.split.longest_cut = longest
            self.longest_cut_at = cut["place"][pa.compute.index(cut["truncated"], longest).as_py()].as_py()

    def _write_row_group(self) -> None:
        rows = pa.concat_tables(self.pending).combine_chunks()
        row_group, self.pending = rows.slice(0, ROW_GROUP_ROWS), [rows.slice(ROW_GROUP_ROWS)]
        self._file().write_table(row_group, row_group_size=ROW_GROUP_ROWS)
        self._count(row_group)

    def _file(self) -> pq.ParquetWriter:
        """The file that the next row group belongs to."""
        if len(self.split.row_groups) % ROW_GROUPS_PER_FILE == 0:
            if self.writer:
                self.writer.close()
            file = f"{self.name}/{len(self.split.files):05d}.parquet"
            self.split.files.append(file)
            (self.directory / self.name).mkdir(exist_ok=True)
            self.writer = pq.ParquetWriter(self.directory / file, SCHEMA, compression="zstd")
        assert self.writer is not None
        return self.writer

    def _count(self, row_group: pa.Table) -> None:
        self.digest.update(row_group["key"].to_numpy().tobytes())  # a hash of all that the record says
        for name in ("input_ids", "labels"):
            self.digest.update(pa.compute.list_flatten(row_group[name]).to_numpy().tobytes())
        ids = pa.compute.list_flatten(row_group["input_ids"])
        self.split.highest = max(self.split.highest, pa.compute.max(ids).as_py())
        lengths = pa.compute.list_value_length(row_group["input_ids"]).to_numpy()
        self.lengths.append(lengths)
        self.split.row_groups.append(row_group.num_rows)
        self.split.records += row_group.num_rows
        self.split.tokens += int(lengths.sum())
        self.split.supervised_tokens += self._supervised(row_group)
        self._count_sources(row_group)

    def _count_sources(self, row_group: pa.Table) -> None:
        for name in row_group["source"].unique().to_pylist():
            if name and name not in self.split.sources:
                self.split.sources[name] = MixedRows(
                    self.weights.get(name, 1.0), [0] * (len(self.split.row_groups) - 1)
                )
        for name, mixed in self.split.sources.items():
            own = row_group.filter(pa.compute.equal(row_group["source"], name))
            mixed.row_groups.append(own.num_rows)
            mixed.tokens += len(pa.compute.list_flatten(own["input_ids"]))
            mixed.supervised_tokens += self._supervised(own)

    def _supervised(self, rows: pa.Table) -> int:
        """How many labels of rows bear loss."""
        bears = pa.compute.list_flatten(rows["labels"]).to_numpy() != IGNORE
        if self.learns_first and rows.num_rows:
            of_row = pa.compute.list_value_length(rows["labels"]).to_numpy()
            place = np.arange(len(bears)) - np.repeat(of_row.cumsum() - of_row, of_row)
            bears &= place < np.repeat(pa.compute.list_element(rows["lengths"], 0).to_numpy(), of_row)
        return int(bears.sum())
