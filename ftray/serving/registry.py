"""The adapters on offer, by name: those given from the start, less those removed over HTTP, and those added so."""

import json
import os
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from ftray.config import ServingConfig
from ftray.errors import UserError
from ftray.storage.location import Location, parse_location


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter on offer: `id` is unique to this name and source."""

    id: str
    source: str
    created: int


class Registry:
    """Remembers what was added and removed in a file, if there is a place for it; one process at a time has it.

    Args:
        cfg: says where: `registry`, else `serving.json` in `run`.
        given: directory or URI of each adapter that is on offer from the start.

    Attributes:
        offers: by name.

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
        self.offers = {n: AdapterEntry(n, source, self.started) for n, source in kept.items()}
        self.offers |= {n: o for n, o in added.items() if n not in kept and allowed(cfg, o.source)}

    def _read(self) -> tuple[dict[str, AdapterEntry], dict[str, str]]:
        """What was added; and removed, with its source: from another one it is another adapter."""
        if self.file is None or not self.file.is_file():
            return {}, {}
        try:
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            return {name: AdapterEntry(**fields) for name, fields in kept["added"].items()}, dict(kept["removed"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.file}: can't be read ({error}): mend or remove it") from None

    def new(self, name: str, source: str) -> AdapterEntry:
        """An offer that is not made yet."""
        return AdapterEntry(f"{name}@{uuid.uuid4().hex[:8]}", source, int(time.time()))

    def add(self, name: str, offer: AdapterEntry) -> None:
        """AdapterEntry it from now on.

        Raises:
            OSError: it can't be remembered; then it isn't offered. :meth:`remove` does likewise.
        """
        self._write(self.offers | {name: offer}, self.removed)

    def remove(self, name: str) -> AdapterEntry:
        """No longer offer it; returns what was offered."""
        left, removed = dict(self.offers), dict(self.removed)
        offer = left.pop(name)
        if name in self.given:
            removed[name] = self.given[name]
        self._write(left, removed)
        return offer

    def _write(self, offers: dict[str, AdapterEntry], removed: dict[str, str]) -> None:
        """First in the file: what a client is told lasts."""
        if self.file:
            added = {name: asdict(offer) for name, offer in offers.items() if offer.id != name}
            text = json.dumps({"added": added, "removed": removed}, indent=2)
            self.file.write_text(text)
        self.offers, self.removed = offers, removed


def allowed(cfg: ServingConfig, source: str) -> str | None:
    """`source`, made absolute, if it lies where adapters may come from over HTTP; None: it doesn't."""
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
    """Where adapters may come from over HTTP."""
    return cfg.adapter_sources or ([cfg.run] if cfg.run else [])
