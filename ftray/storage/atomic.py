"""Files and directories that appear whole or not at all, on a local disk and in an object store.

Locally they are written beside their place, synced and renamed. A file of an object store appears when it is closed;
of a directory there, the file that says that it is complete is written last.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from ftray.storage.location import Location, parse_location
from ftray.storage.manifest import MANIFEST, seal


@contextmanager
def atomic_write(target: Path | Location) -> Iterator[TextIO]:
    """An empty text file (UTF-8, line ends as they are written) that replaces `target`, unless the block raises."""
    text = io.StringIO(newline="")
    yield text
    parse_location(target).write_text(text.getvalue())


@contextmanager
def atomic_dir(target: Path | Location, cached: bool = False, marker: str = f"{MANIFEST}.json") -> Iterator[Path]:
    """An empty local directory whose content becomes `target`, unless the block raises.

    Args:
        cached: the name says what `target` holds: what another process has put there meanwhile stays. Else the
            directory is sealed (see :func:`ftray.storage.manifest.seal`) and replaces what is there.
        marker: the file in it that says that it is complete.
    """
    target = parse_location(target)
    with target.scratch_dir() as made:
        yield made
        if not cached:
            seal(made)
        target.put_dir(made, [marker], replace=not cached)
