"""Where outputs are: a directory, or a prefix of an object store that pyarrow knows (`s3://`, `gs://`, `abfss://`).

Both are a :class:`Location`; a caller never asks which of the two it holds. Object stores are reached as their own
tools reach them (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, an instance's role), or by what stands in the URI
(https://arrow.apache.org/docs/python/filesystems.html).
"""

import errno
import math
import os
import shutil
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path, PosixPath, PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.fs

from ftray.errors import UserError
from ftray.storage.lock import file_held_since, hold_file, hold_lease, lease_held_since
from ftray.storage.manifest import MANIFEST, seal, sync

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

FULL = (errno.ENOSPC, errno.EDQUOT)
SPARE = 2**25  # bytes: a disk with less free space counts as full
PROBE = ".probe"
PARTIAL = ".partial"  # directory that several processes fill together before it gets its name


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


class LocalLocation(PosixPath, Location):
    """A local path; on a cluster, one of a shared file system."""

    @property
    def filesystem(self) -> pyarrow.fs.FileSystem:
        """The local one."""
        return pyarrow.fs.LocalFileSystem()

    @property
    def path(self) -> str:
        """The absolute path."""
        return str(self.absolute())

    @property
    def local_path(self) -> Path:
        """Itself."""
        return self

    def published_dirs(self, pattern: str) -> Iterable["LocalLocation"]:
        """All that match: a directory gets its name when it is complete."""
        return self.glob(pattern)

    def write_bytes(self, data: "ReadableBuffer") -> int:
        """Written to a temporary file beside it, which is synced and renamed."""
        aside = self._beside()
        try:
            with open(aside, "wb") as file:
                written = file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self)
        finally:
            aside.unlink(missing_ok=True)
        return written

    def write_text(
        self, data: str, encoding: str | None = "utf-8", errors: str | None = None, newline: str | None = None
    ) -> int:
        """As :meth:`write_bytes`; line ends stay as they are."""
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def remove(self) -> None:
        """Delete the directory tree."""
        shutil.rmtree(self, ignore_errors=True)

    def drop_cut_line(self) -> None:
        """Truncate the file after its last line end."""
        if self.exists():
            with open(self, "rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)

    @contextmanager
    def as_local_dir(self) -> Iterator[Path]:
        """Itself."""
        yield self

    @contextmanager
    def scratch_dir(self) -> Iterator[Path]:
        """Beside the target, so that it can be renamed."""
        aside = self._beside()
        aside.mkdir(parents=True)
        try:
            yield aside
        finally:
            aside.remove()

    def put_dir(self, made: Path, last: Sequence[str], replace: bool) -> None:
        """Rename it: all of it appears at once."""
        if replace:
            self.remove()
        try:
            made.rename(self)
        except OSError:  # another process was first
            if replace or not self.is_dir():
                raise
        sync(self.parent)

    @contextmanager
    def shared_dir(self, rank: int, ranks: int, wait: Callable[[], None], last: Sequence[str]) -> Iterator[Path]:
        """One directory on the shared file system, which all ranks write to; rank 0 seals and renames it."""
        aside = self.with_name(PARTIAL)  # what a killed group left is replaced by the next one
        if rank == 0:
            aside.remove()
            aside.mkdir(parents=True)
        wait()
        yield aside
        wait()
        if rank == 0:
            seal(aside)
            self.put_dir(aside, last, replace=True)

    def hold(self, refusal: Callable[[], UserError]) -> AbstractContextManager[None]:
        """A lock of the system, which releases it when the process ends, however it ends."""
        return hold_file(self, refusal)

    def held_since(self) -> float | None:
        """By the time of the lock file."""
        return file_held_since(self)

    def ray_storage(self) -> dict[str, Any]:
        """The path alone."""
        return {"storage_path": str(self.resolve())}

    def check_writable(self, what: str = "output") -> None:
        """Makes a temporary file in the nearest directory that exists.

        Raises:
            UserError: that failed.
        """
        try:
            with tempfile.TemporaryFile(dir=self._nearest()):
                pass
        except OSError as error:
            raise UserError(f"{what} {self}: can't write there ({error.strerror})") from None

    def free_bytes(self) -> float:
        """Of the disk that it is on, or will be."""
        return shutil.disk_usage(self._nearest()).free

    def is_full(self) -> bool:
        """Also tries to write: a quota does not show in the free space."""
        try:
            if self.free_bytes() < SPARE:
                return True
            with tempfile.TemporaryFile(dir=self) as probe:
                probe.write(bytes(2**20))
                os.fsync(probe.fileno())
        except OSError as refused:
            return refused.errno in FULL
        return False

    def why_unreachable(self, error: BaseException) -> None:
        """A local disk always answers."""

    def _beside(self) -> "LocalLocation":
        """A name that no other process takes, whatever machine it runs on."""
        return self.with_name(f".{self.name}.{uuid.uuid4().hex}")

    def _nearest(self) -> Path:
        return next(place for place in (self, *self.absolute().parents) if place.exists())


class ObjectStoreLocation(Location):
    """A file of an object store, or a directory, which is a prefix of its files' names.

    Args:
        root: URI that the user gave.
        inside: path below it.
    """

    def __init__(self, root: str, inside: str = ""):
        self.root, self.inside = root, inside

    def __truediv__(self, name: str) -> "ObjectStoreLocation":
        return ObjectStoreLocation(self.root, f"{self.inside}/{name}".strip("/"))

    def __str__(self) -> str:
        base, mark, options = self.root.partition("?")
        return f"{base.rstrip('/')}/{self.inside}".rstrip("/") + mark + options

    @property
    def parent(self) -> "ObjectStoreLocation":
        """One step up, but never above the root."""
        return ObjectStoreLocation(self.root, self.inside.rpartition("/")[0])

    @property
    def filesystem(self) -> pyarrow.fs.FileSystem:
        """The store's."""
        return _opened(self.root)[0]

    @property
    def path(self) -> str:
        """Bucket and key."""
        return f"{_opened(self.root)[1]}/{self.inside}".rstrip("/")

    @property
    def local_path(self) -> None:
        """It has none."""

    @property
    def modified(self) -> float:
        """When the file was written, in seconds since 1970 by the store's clock."""
        return float(self.filesystem.get_file_info(self.path).mtime.timestamp())

    def absolute(self) -> "ObjectStoreLocation":
        """Itself."""
        return self

    def resolve(self) -> "ObjectStoreLocation":
        """Itself."""
        return self

    def exists(self) -> bool:
        """A directory exists if any file is in it."""
        return bool(self.filesystem.get_file_info(self.path).type != pyarrow.fs.FileType.NotFound)

    def is_file(self) -> bool:
        """Whether it is a file."""
        return bool(self.filesystem.get_file_info(self.path).is_file)

    def glob(self, pattern: str) -> list["ObjectStoreLocation"]:
        """Matching files at any depth."""
        found = self.filesystem.get_file_info(pyarrow.fs.FileSelector(self.path, recursive=True, allow_not_found=True))
        files = [info.path.removeprefix(self.path).lstrip("/") for info in found if info.is_file]
        return [self / file for file in files if PurePosixPath(file).match(pattern)]

    def published_dirs(self, pattern: str) -> list["ObjectStoreLocation"]:
        """Those with a manifest, which is written last."""
        return [file.parent for file in self.glob(f"{pattern}/{MANIFEST}.json")]

    def read_bytes(self) -> bytes:
        """The content of the file."""
        with self.filesystem.open_input_stream(self.path) as file:
            content: bytes = file.read()
        return content

    def read_text(self, encoding: str = "utf-8") -> str:
        """The content of the file."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> int:
        """An object appears when its stream is closed."""
        with self.filesystem.open_output_stream(self.path) as file:
            written: int = file.write(data)
        return written

    def write_text(self, data: str, encoding: str = "utf-8") -> int:
        """As :meth:`write_bytes`."""
        return self.write_bytes(data.encode(encoding))

    def unlink(self) -> None:
        """Delete the file."""
        self.filesystem.delete_file(self.path)

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing to do: a directory is what its files make it."""

    def remove(self) -> None:
        """Delete all files with the prefix."""
        if self.exists():
            self.filesystem.delete_dir(self.path)

    def drop_cut_line(self) -> None:
        """Nothing to do: objects are whole."""

    @contextmanager
    def as_local_dir(self) -> Iterator[Path]:
        """A copy."""
        with tempfile.TemporaryDirectory(prefix="ftray-") as directory:
            pyarrow.fs.copy_files(self.path, directory, source_filesystem=self.filesystem)
            yield Path(directory)

    @contextmanager
    def scratch_dir(self) -> Iterator[Path]:
        """A temporary directory."""
        with tempfile.TemporaryDirectory(prefix="ftray-") as directory:
            yield Path(directory)

    def put_dir(self, made: Path, last: Sequence[str], replace: bool) -> None:
        """Upload it."""
        if replace:
            self.remove()
        self.upload(made, [name for name in _files(made) if name not in last])
        self.upload(made, last)

    @contextmanager
    def shared_dir(self, rank: int, ranks: int, wait: Callable[[], None], last: Sequence[str]) -> Iterator[Path]:
        """A temporary directory for each rank, which seals it as its part and uploads it."""
        last = (f"{MANIFEST}.json", *last)
        with self.scratch_dir() as directory:
            yield directory
            seal(directory, rank, ranks)
            if rank == 0:
                self.remove()
            wait()
            self.upload(directory, [name for name in _files(directory) if name not in last])
            wait()
            self.upload(directory, [name for name in last if (directory / name).exists()])

    def upload(self, directory: Path, names: Iterable[str] | None = None) -> None:
        """Add files of a local directory.

        Args:
            names: relative paths, in the order of upload; None: all files.
        """
        for name in _files(directory) if names is None else names:
            with (self / name).open_output() as target, open(directory / name, "rb") as file:
                shutil.copyfileobj(file, target, 2**23)

    def open_output(self) -> pa.NativeFile:
        """A stream; the file appears when it is closed."""
        return self.filesystem.open_output_stream(self.path)

    def hold(self, refusal: Callable[[], UserError]) -> AbstractContextManager[None]:
        """A lease, which a killed process loses after :data:`ftray.storage.lock.PATIENCE`."""
        return hold_lease(self, refusal)

    def held_since(self) -> float | None:
        """By what the lease says."""
        return lease_held_since(self)

    def ray_storage(self) -> dict[str, Any]:
        """The path and its file system."""
        return {"storage_path": self.path, "storage_filesystem": self.filesystem}

    def check_writable(self, what: str = "output") -> None:
        """Writes and deletes a small file.

        Raises:
            UserError: that failed.
        """
        try:
            (self / PROBE).write_bytes(b"")
            (self / PROBE).unlink()
        except OSError as error:
            raise UserError(f"{what} {self}: can't write there ({reason(error)})") from None

    def free_bytes(self) -> float:
        """No limit."""
        return math.inf

    def is_full(self) -> bool:
        """Never."""
        return False

    def why_unreachable(self, error: BaseException) -> str | None:
        """Any OSError is taken to come from the store."""
        return reason(error) if isinstance(error, OSError) else None


def parse_location(name: str | os.PathLike[str] | Location) -> Location:
    """The location that a path or URI names."""
    if isinstance(name, Location):
        return name
    text = os.fspath(name)
    return ObjectStoreLocation(text) if "://" in text else LocalLocation(text)


def reason(error: BaseException) -> str:
    """What a store said, on one line."""
    return (str(error).splitlines() or [type(error).__name__])[0].partition(" (Request ID")[0]


def _files(directory: Path) -> list[str]:
    """The relative path of every file, sorted."""
    return [path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if path.is_file()]


@lru_cache(maxsize=8)
def _opened(root: str) -> tuple[pyarrow.fs.FileSystem, str]:
    try:
        opened: tuple[pyarrow.fs.FileSystem, str] = pyarrow.fs.FileSystem.from_uri(root)
    except pa.ArrowException as error:  # a scheme that it doesn't know, or an option
        raise OSError(str(error)) from None
    return opened
