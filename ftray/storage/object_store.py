"""Outputs in an object store.

Stores are reached as their own tools reach them (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, an instance's role), or by
what stands in the URI (https://arrow.apache.org/docs/python/filesystems.html).
"""

import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs

from ftray.errors import UserError
from ftray.storage.location import Location, reason
from ftray.storage.lock import hold_lease, lease_held_since, lease_is_kept
from ftray.storage.manifest import MANIFEST, seal

PROBE = ".probe"


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

    def is_held(self) -> bool:
        """By whether the lease changes."""
        return lease_is_kept(self)

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
