"""The adapters that are served, by name: those given at the start and those added over HTTP, without those removed."""

import json
import os
import re
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from ftray.adapters.discovery import CONFIG, INSIDE
from ftray.config import ServingConfig
from ftray.errors import UserError
from ftray.storage.location import Location, parse_location

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter that is served; `id` is unique to this name and source, `created` in seconds since 1970."""

    id: str
    source: str
    created: int


class Registry:
    """Remembers what was added and removed, in a file if the configuration names one; a file is for one process.

    Args:
        cfg: names the file: `registry`, else `serving.json` in `run`.
        given: directory or URI of each adapter that is served from the start.

    Attributes:
        entries: by name.

    Raises:
        UserError: the file can't be read.
    """

    def __init__(self, cfg: ServingConfig, given: dict[str, str]):
        self.given, self.started = given, int(time.time())
        self.file: Location | None = None
        if cfg.registry:
            self.file = parse_location(cfg.registry)
        elif cfg.run and not cfg.merged:
            self.file = parse_location(cfg.run) / "serving.json"
        added, self.removed = self._read()
        kept = {n: source for n, source in given.items() if self.removed.get(n) != source}
        self.entries = {n: AdapterEntry(n, source, self.started) for n, source in kept.items()}
        self.entries |= {n: e for n, e in added.items() if n not in kept and allowed(cfg, e.source)}

    def _read(self) -> tuple[dict[str, AdapterEntry], dict[str, str]]:
        """The entries that were added, and the source of each that was removed: with another source, it is another."""
        if self.file is None or not self.file.is_file():
            return {}, {}
        try:
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            return {name: AdapterEntry(**fields) for name, fields in kept["added"].items()}, dict(kept["removed"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.file}: can't be read ({error}): mend or remove it") from None

    def new(self, name: str, source: str) -> AdapterEntry:
        """An entry for :meth:`add`."""
        return AdapterEntry(f"{name}@{uuid.uuid4().hex[:8]}", source, int(time.time()))

    def add(self, name: str, entry: AdapterEntry) -> None:
        """Serve it from now on.

        Raises:
            OSError: the file can't be written; nothing has changed.
        """
        self._write(self.entries | {name: entry}, self.removed)

    def remove(self, name: str) -> AdapterEntry:
        """Serve it no longer; returns what it was.

        Raises:
            OSError: the file can't be written; nothing has changed.
        """
        left, removed = dict(self.entries), dict(self.removed)
        entry = left.pop(name)
        if name in self.given:
            removed[name] = self.given[name]
        self._write(left, removed)
        return entry

    def _write(self, entries: dict[str, AdapterEntry], removed: dict[str, str]) -> None:
        """The file first: what is answered to a client must outlive this process."""
        if self.file:
            added = {name: asdict(entry) for name, entry in entries.items() if entry.id != name}
            text = json.dumps({"added": added, "removed": removed}, indent=2)
            self.file.write_text(text)
        self.entries, self.removed = entries, removed


def allowed(cfg: ServingConfig, source: str) -> str | None:
    """`source`, made absolute; None: it lies outside of all :func:`roots`."""
    for root in roots(cfg):
        if "://" in root:
            if source.startswith(root.rstrip("/") + "/") and ".." not in source:
                return source
        elif "://" not in source:
            path = Path(os.path.realpath(source))
            if path.is_relative_to(os.path.realpath(root)):
                return str(path)
    return None


def roots(cfg: ServingConfig) -> list[str]:
    """Directories and URIs from which adapters may be added over HTTP."""
    return cfg.adapter_sources or ([cfg.run] if cfg.run else [])


def check_name(name: str) -> str:
    """Returns `name`.

    Raises:
        UserError: it can't be the name of an adapter.
    """
    if not NAME.fullmatch(name) or ".." in name:
        raise UserError(
            f"adapter name {name[:80]!r}: at most 64 letters, digits, '.', '_' and '-', the first a letter or digit"
        )
    return name


def adapter_in(source: str) -> str:
    """The adapter that `source`, a directory or URI, is, or has in it as an output of `tune` or `train`.

    `source` itself where none is found or the store can't be reached: it is refused where it is read.
    """
    try:
        places = (parse_location(source) / inside if inside else parse_location(source) for inside in ("", *INSIDE))
        return next((str(place) for place in places if (place / CONFIG).is_file()), source)
    except (OSError, UserError):
        return source
