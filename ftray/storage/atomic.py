"""Files and directories that appear whole or not at all, on a local disk and in an object store.

Locally they are written beside their place, brought to the disk and renamed. A file of an object store appears when
it is closed; of a directory there, the file that says that it is complete comes last.
"""

import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from ftray.storage.location import Location, Stored, remove
from ftray.storage.manifest import MANIFEST, seal, sync


@contextmanager
def atomic_write(target: Location) -> Iterator[TextIO]:
    """An empty text file (UTF-8, line ends as they are written) that takes the place of `target`, if all goes well."""
    if isinstance(target, Stored):
        text = io.StringIO(newline="")
        yield text
        target.write_text(text.getvalue())
        return
    aside = _beside(target)
    try:
        with open(aside, "w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def atomic_dir(target: Location, cached: bool = False, marker: str = f"{MANIFEST}.json") -> Iterator[Path]:
    """An empty local directory whose content becomes `target`, if all goes well.

    Args:
        cached: the name says what `target` holds: what another process has put there meanwhile stays. Else the
            directory is sealed (see :func:`ftray.storage.manifest.seal`) and takes the place of what is there.
        marker: the file in it that says that it is complete.
    """
    if isinstance(target, Stored):
        with tempfile.TemporaryDirectory(prefix="ftray-") as name:
            directory = Path(name)
            yield directory
            if not cached:
                seal(directory)
                remove(target)
            last = (directory / marker).read_bytes()
            (directory / marker).unlink()
            target.upload(directory)
            (target / marker).write_bytes(last)
        return
    aside = _beside(target)
    aside.mkdir(parents=True)
    try:
        yield aside
        if cached:
            _keep_first(aside, target)
        else:
            publish(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def publish(aside: Path, target: Path) -> None:
    """Seal `aside`, a directory on the same disk, and give it the name `target`, in the stead of what has it."""
    seal(aside)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    sync(target.parent)


def _keep_first(aside: Path, target: Path) -> None:
    try:
        aside.rename(target)
    except OSError:  # another process was first
        if not target.is_dir():
            raise


def _beside(target: Path) -> Path:
    """A name that no other process takes, whatever machine it runs on."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}")
