"""Where outputs are: a directory, or a prefix of an object store that pyarrow knows (`s3://`, `gs://`, `abfss://`).

Both are a :class:`Location`; a caller never asks which of the two it holds.
"""

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyarrow.fs

from ftray.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)


class Location(ABC):
    """A file or directory, local or in an object store.

    Methods that `pathlib.Path` has too mean the same, but a file that is written appears whole or not at all.
    What fails raises an OSError.
    """

    @abstractmethod
    def __truediv__(self, name: str) -> "Location":
        """What is called `name` in this directory."""

    @property
    @abstractmethod
    def parent(self) -> "Location":
        """The directory that holds it."""

    @property
    @abstractmethod
    def filesystem(self) -> pyarrow.fs.FileSystem:
        """The pyarrow file system that it is on."""

    @property
    @abstractmethod
    def path(self) -> str:
        """Its path on :attr:`filesystem`."""

    @property
    @abstractmethod
    def local_path(self) -> Path | None:
        """Its path on this machine, for what needs a real file, such as a database; None: it has none."""

    @abstractmethod
    def absolute(self) -> "Location":
        """The same, whatever the working directory."""

    @abstractmethod
    def resolve(self) -> "Location":
        """As :meth:`absolute`, without symbolic links."""

    @abstractmethod
    def exists(self) -> bool:
        """Whether there is such a file or directory."""

    @abstractmethod
    def is_file(self) -> bool:
        """Whether it is a file."""

    @abstractmethod
    def glob(self, pattern: str) -> Iterable["Location"]:
        """The files in it whose last path components match."""

    @abstractmethod
    def published_dirs(self, pattern: str) -> Iterable["Location"]:
        """The directories in it whose names match and that were written to their end."""

    @abstractmethod
    def read_bytes(self) -> bytes:
        """The content of the file."""

    @abstractmethod
    def read_text(self, encoding: str = "utf-8") -> str:
        """The content of the file."""

    @abstractmethod
    def write_bytes(self, data: bytes) -> int:
        """Replace the file atomically; returns the number of bytes."""

    @abstractmethod
    def write_text(self, data: str, encoding: str = "utf-8") -> int:
        """Replace the file atomically; returns the number of bytes."""

    @abstractmethod
    def unlink(self) -> None:
        """Delete the file."""

    @abstractmethod
    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Make the directory, where directories have to be made."""

    @abstractmethod
    def remove(self) -> None:
        """Delete the directory, if there is one."""

    @abstractmethod
    def drop_cut_line(self) -> None:
        """Delete a last line that a full disk or a power failure cut off: the next one would be appended to it.

        For the process alone that holds the file.
        """

    @abstractmethod
    def as_local_dir(self) -> AbstractContextManager[Path]:
        """The directory itself or a temporary copy, as a local directory."""

    @abstractmethod
    def scratch_dir(self) -> AbstractContextManager[Path]:
        """An empty local directory, deleted at the end, whose content :meth:`put_dir` can publish."""

    @abstractmethod
    def put_dir(self, made: Path, last: Sequence[str], replace: bool) -> None:
        """Give the content of a :meth:`scratch_dir` this location.

        Args:
            last: the files that say that the directory is complete; they appear after all others.
            replace: take the place of what is there, instead of leaving what another process has put there meanwhile.
        """

    @abstractmethod
    def shared_dir(
        self, rank: int, ranks: int, wait: Callable[[], None], last: Sequence[str]
    ) -> AbstractContextManager[Path]:
        """A local directory for each of several processes, whose content together becomes this directory, sealed.

        Args:
            rank: of this process among `ranks`, from 0.
            wait: returns once every rank has called it.
            last: as for :meth:`put_dir`, beside the manifest.
        """

    @abstractmethod
    def hold(self, refusal: Callable[[], UserError]) -> AbstractContextManager[None]:
        """Hold the file as a lock, as long as this process lives.

        Raises:
            UserError: what `refusal` returns: another live process holds it.
        """

    @abstractmethod
    def held_since(self) -> float | None:
        """When the process that holds the lock began to, in seconds since 1970; None: nobody holds it."""

    @abstractmethod
    def is_held(self) -> bool:
        """Whether a process that lives holds the lock; one that was killed a moment ago is none."""

    @abstractmethod
    def ray_storage(self) -> dict[str, Any]:
        """The arguments of Ray's `RunConfig` that make this its storage."""

    @abstractmethod
    def check_writable(self, what: str = "output") -> None:
        """Try to write there.

        Args:
            what: it is, for the message.

        Raises:
            UserError: it can't be written to; the message says why.
        """

    @abstractmethod
    def free_bytes(self) -> float:
        """Free space; infinite where there is no limit."""

    @abstractmethod
    def is_full(self) -> bool:
        """Whether the disk is full, or a quota used up."""

    @abstractmethod
    def why_unreachable(self, error: BaseException) -> str | None:
        """What `error` says of a store that does not answer; None: it is about something else."""


def parse_location(name: str | os.PathLike[str] | Location) -> Location:
    """The location that a path or URI names."""
    from ftray.storage.local import LocalLocation  # both import this module
    from ftray.storage.object_store import ObjectStoreLocation

    if isinstance(name, Location):
        return name
    text = os.fspath(name)
    return ObjectStoreLocation(text) if "://" in text else LocalLocation(text)


def reason(error: BaseException) -> str:
    """What a store said, on one line."""
    return (str(error).splitlines() or [type(error).__name__])[0].partition(" (Request ID")[0]
