"""Outputs in a directory of this machine, or of a file system that the nodes of a cluster share."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PosixPath
from typing import TYPE_CHECKING, Any

import pyarrow.fs

from ftray.errors import UserError
from ftray.storage.location import FULL, Location
from ftray.storage.lock import file_held_since, hold_file
from ftray.storage.manifest import seal, sync

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

SPARE = 2**25  # bytes: a disk with less free space counts as full
PARTIAL = ".partial"  # directory that several processes fill together before it gets its name


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

    def is_held(self) -> bool:
        """As the system says."""
        return file_held_since(self) is not None

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
