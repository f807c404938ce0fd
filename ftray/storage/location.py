"""Where outputs lie: a directory, or a prefix of an object store that pyarrow knows (`s3://`, `gs://`, `abfss://`).

Stores are reached as their own tools reach them (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, an instance's role), or by
what stands in the URI (https://arrow.apache.org/docs/python/filesystems.html).
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs

from ftray.errors import UserError

PROBE = ".probe"


class Stored:
    """A file or directory of an object store, with those methods of a `Path` that are used of an output.

    A file appears whole or not at all; a directory is what its files make it. What fails raises an OSError.
    """

    def __init__(self, root: str, inside: str = ""):
        self.root, self.inside = root, inside

    def __truediv__(self, name: str) -> "Stored":
        return Stored(self.root, f"{self.inside}/{name}".lstrip("/"))

    def __str__(self) -> str:
        base, mark, options = self.root.partition("?")
        return f"{base.rstrip('/')}/{self.inside}".rstrip("/") + mark + options

    @property
    def parent(self) -> "Stored":
        """One step up, inside of what was named."""
        return Stored(self.root, self.inside.rpartition("/")[0])

    @property
    def filesystem(self) -> pyarrow.fs.FileSystem:
        """pyarrow's own."""
        return _opened(self.root)[0]

    @property
    def path(self) -> str:
        """On :attr:`filesystem`."""
        return f"{_opened(self.root)[1]}/{self.inside}".rstrip("/")

    @property
    def modified(self) -> float:
        """Seconds since 1970, by the store's clock."""
        return self.filesystem.get_file_info(self.path).mtime.timestamp()

    def exists(self) -> bool:
        """Whether there is such a file or directory."""
        return self.filesystem.get_file_info(self.path).type != pyarrow.fs.FileType.NotFound

    def is_file(self) -> bool:
        """Whether it is a file."""
        return self.filesystem.get_file_info(self.path).is_file

    def glob(self, pattern: str) -> list["Stored"]:
        """The files in it, at any depth, whose last parts fit."""
        found = self.filesystem.get_file_info(pyarrow.fs.FileSelector(self.path, recursive=True, allow_not_found=True))
        files = [info.path.removeprefix(self.path).lstrip("/") for info in found if info.is_file]
        return [self / file for file in files if PurePosixPath(file).match(pattern)]

    def read_bytes(self) -> bytes:
        """All of the file."""
        with self.filesystem.open_input_stream(self.path) as file:
            return file.read()

    def read_text(self, encoding: str = "utf-8") -> str:
        """All of the file."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes) -> None:
        """Put the file in place of what was there."""
        with self.filesystem.open_output_stream(self.path) as file:
            file.write(content)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        """Put the file in place of what was there."""
        self.write_bytes(text.encode(encoding))

    def unlink(self) -> None:
        """Take the file away."""
        self.filesystem.delete_file(self.path)

    def upload(self, directory: Path) -> None:
        """Add the files of a local directory."""
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            with (self / path.relative_to(directory).as_posix()).open_output() as target, open(path, "rb") as file:
                shutil.copyfileobj(file, target, 2**23)

    def open_output(self) -> Any:
        """A stream; the file appears when it is closed."""
        return self.filesystem.open_output_stream(self.path)


Location = Path | Stored


def parse_location(name: str) -> Location:
    """The directory, or what the URI names."""
    return Stored(name) if "://" in name else Path(name)


def refuse_unreachable(output: Stored) -> None:
    """Try an object store.

    Raises:
        UserError: it can't be written to; the message says why.
    """
    try:
        (output / PROBE).write_bytes(b"")
        (output / PROBE).unlink()
    except OSError as error:
        raise UserError(f"output {output}: can't write there ({reason(error)})") from None


@contextmanager
def as_local_dir(source: Location) -> Iterator[Path]:
    """A directory as a local one, for as long as it is wanted."""
    if isinstance(source, Path):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="ftray-") as directory:
        pyarrow.fs.copy_files(source.path, directory, source_filesystem=source.filesystem)
        yield Path(directory)


def remove(target: Location) -> None:
    """Take a directory away, if there is one."""
    if isinstance(target, Path):
        shutil.rmtree(target, ignore_errors=True)
    elif target.exists():
        target.filesystem.delete_dir(target.path)


def for_ray(target: Location) -> dict[str, Any]:
    """What Ray's `RunConfig` takes as its storage."""
    if isinstance(target, Path):
        return {"storage_path": str(target.resolve())}
    return {"storage_path": target.path, "storage_filesystem": target.filesystem}


def reason(error: BaseException) -> str:
    """What a store said, on one line."""
    return (str(error).splitlines() or [type(error).__name__])[0].partition(" (Request ID")[0]


@lru_cache(maxsize=8)
def _opened(root: str) -> tuple[pyarrow.fs.FileSystem, str]:
    try:
        return pyarrow.fs.FileSystem.from_uri(root)
    except pa.ArrowException as error:  # a scheme that it doesn't know, or an option
        raise OSError(str(error)) from None
