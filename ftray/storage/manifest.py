"""Directories whose damage shows: a manifest holds the hash of every file."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from ftray.errors import UserError

MANIFEST = "MANIFEST"  # .json; what several processes write together has one of each


def seal(directory: Path, part: int = 0, parts: int = 1) -> None:
    """Write the manifest of what lies in `directory`, and bring all of it to the disk.

    Prose (`*.md`) is not in it: it may be changed later.

    Args:
        part: of `parts` processes that each write into a directory of their own, to be put together into one later.
    """
    files = {}
    for path in sorted(directory.rglob("*")):
        own = path.parent == directory and path.name.startswith(MANIFEST)
        if path.is_file() and path.suffix != ".md" and not own:
            files[path.relative_to(directory).as_posix()] = _digest(path)
        if not own:
            sync(path)
    name = f"{MANIFEST}.json" if part == 0 else f"{MANIFEST}.{part}.json"
    (directory / name).write_text(json.dumps({"parts": parts, "sha256": files}, indent=1), encoding="utf-8")
    sync(directory / name)
    sync(directory)


def find_corruption(directory: Path, partly: bool = False) -> str | None:
    """What in `directory` is not as it was written; None: nothing.

    Args:
        partly: files may be absent.
    """
    try:
        first = json.loads((directory / f"{MANIFEST}.json").read_text(encoding="utf-8"))
        others = [json.loads(path.read_text(encoding="utf-8")) for path in directory.glob(f"{MANIFEST}.*.json")]
        if len(others) + 1 != first["parts"]:
            return "a part of it is missing"
        for name, digest in [file for part in (first, *others) for file in part["sha256"].items()]:
            path = directory / name
            if not path.is_file():
                if partly:
                    continue
                return f"{name} is missing"
            if _digest(path) != digest:
                return f"{name} is not as it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST}.json can't be read ({getattr(error, 'strerror', None) or error})"
    return None


def check(directory: Path, what: str, partly: bool = False) -> None:
    """Refuse a damaged directory; one without a manifest was made by others, and is taken as it is.

    Raises:
        UserError: it is damaged; the message begins with `what` it is.
    """
    if (directory / f"{MANIFEST}.json").exists() and (reason := find_corruption(directory, partly)):
        raise UserError(
            f"{what}: is damaged: {reason}; "
            f"take another copy, or delete its {MANIFEST}.json if you have changed it yourself"
        )


@contextmanager
def refuse_damaged(path: object) -> Iterator[None]:
    """Report a file of a run that no longer holds what ftray wrote, because it was edited or cut off.

    Args:
        path: of the file that is read inside the block, for the message.

    Raises:
        UserError: the block could not make sense of it.
    """
    try:
        yield
    except (UserError, ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        kind = "" if isinstance(error, UserError | ValueError) else f"{type(error).__name__}: "
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path}: is not as ftray wrote it ({kind}{reason}): mend it, or take another copy") from None


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """As fsync(2); a directory's own entries are synced with it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
