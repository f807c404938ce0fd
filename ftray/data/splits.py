"""Which record belongs to which split: by a hash of its content, so that the order of records changes nothing."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ftray.config import DataConfig
from ftray.data.formats import Chunk, open_path
from ftray.data.shapes import GROUP
from ftray.data.sources import find_chunks, find_splits
from ftray.errors import UserError

SPLITS = ("train", "validation", "test")
FEW = 1000  # records, up to which no split that was asked for is left empty by chance
LEAST_SHARE = 0.1  # records that a split must be expected to have, for that
SHOWN = 3  # files of a split that are named


@dataclass(frozen=True)
class Source:
    """Where records come from.

    Attributes:
        chunks: pieces of it that can be read in parallel; in a mixture, each names the part that it belongs to.
        cfg: how its records are split and tokenized; `source` names it.
    """

    chunks: list[Chunk]
    cfg: DataConfig

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
    # a split that a source brings with it is not cut from its training records
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
    return sources


def held_out_files(sources: Sources) -> str:
    """A line that says which files of folders, globs and the hub are held out because of their names; empty: none."""
    said = []
    for name in SPLITS[1:]:
        paths = [*dict.fromkeys(chunk.path for chunk in sources[name].chunks)] if name in sources else []
        given = sources[name].cfg.source if paths else ""
        asked_for = [
            open_path(one)[1] if "://" not in one else one for one in ([given] if isinstance(given, str) else given)
        ]
        if paths and paths != asked_for:  # not a file that the user named for it
            more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
            said.append(f"{name} is {', '.join(paths[:SHOWN])}{more}")
    return f"by their names, {'; '.join(said)}" if said else ""


def _chunks(splits: dict[str, dict[str, list[Chunk]]], name: str) -> list[Chunk]:
    """The chunks of a split, over all parts; each with the name of its part."""
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
    return _split(_hash(_content(record.get(GROUP, record)), cfg.seed, "split"), cfg, source)


def key_place_and_split(
    record: dict[str, Any], cfg: DataConfig, source: str, part: str = "", group: object | None = None
) -> tuple[int, int, str]:
    """:func:`order_key`, the 64-bit hash by which the record is in its split, and :func:`split_of`.

    Args:
        group: plain data that is equal for records which share a split, unless `data.group` says which do.
    """
    content = _content(record)
    group = record.get(GROUP, group)
    grouped = content if group is None else _content(group)
    place = _hash(grouped, cfg.seed, "split")
    return _hash(content, cfg.seed, _order(part)), place, _split(place, cfg, source)


def _split(place: int, cfg: DataConfig, source: str) -> str:
    if source != "train":
        return source
    share = place / 2**64
    if share < cfg.test_fraction:
        return "test"
    return "validation" if share < cfg.test_fraction + cfg.validation_fraction else "train"


def filled(splits: Sequence[str], places: Sequence[int], parts: Sequence[str], sources: Sources) -> list[str]:
    """The splits of records, changed so that no split that was asked for is empty by chance, where records are few.

    An empty split takes records from the largest one, as many as its fraction asks for, and one at least. Records of
    one place (equal ones, and those of one group) move together; equal ones go to different splits only where fewer
    records differ than there are splits. The order of the records changes nothing.

    Args:
        splits, places, parts: of each training record, as :func:`key_place_and_split` gives them, and its part.

    Returns:
        A split for each record.
    """
    cfg = sources["train"].cfg
    shares = {
        "train": dict.fromkeys(cfg.parts, 1.0),
        "validation": {name: own.validation_fraction for name, own in cfg.parts.items()},
        "test": {name: own.test_fraction for name, own in cfg.parts.items()},
    }
    cut = [name for name in SPLITS if name == "train" or name not in sources]
    asked = [name for name in cut if sum(shares[name][part] for part in parts) >= LEAST_SHARE]
    result = [*splits]
    if len(result) > FEW or {*asked} <= {*result}:
        return result
    alike = cfg.group is not None or len({*places}) >= len(asked)
    units: dict[int, list[int]] = {}  # records that move together, in the order of their places
    for at in sorted(range(len(places)), key=places.__getitem__):
        units.setdefault(places[at] if alike else at, []).append(at)
    for name in asked:
        held = Counter(result[own[0]] for own in units.values())
        giver, most = held.most_common(1)[0]
        if held[name] or most < 2:
            continue
        may = [own for own in units.values() if result[own[0]] == giver and all(shares[name][parts[i]] for i in own)]
        share = 1 if name == "train" else round(sum(shares[name][parts[own[0]]] for own in may))
        spare = most - sum(not held[other] for other in asked)  # each empty split takes one, and the giver keeps one
        for at in [i for own in may[: max(1, min(share, spare))] for i in own]:
            result[at] = name
    return result


def _order(part: str) -> str:
    return f"order{part and hashlib.blake2b(part.encode(), digest_size=8).hexdigest()}"


def _content(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode(errors="surrogatepass")


def _hash(content: bytes, seed: int, purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=f"{purpose}{seed}".encode()).digest())
