"""Counts how often a file is opened, by whichever process of this machine."""

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OPEN, _CLOSE = 0x20, 0x18  # IN_OPEN, IN_CLOSE of <sys/inotify.h>
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, bytes of the name that follows


@contextmanager
def opens(path: str | Path) -> Iterator[list[int]]:
    """Yields a list that holds the number of times that `path` was opened once the block is left. Linux only.

    The kernel reports equal events that follow each other as one: the file must be closed before it is opened again.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    watch = libc.inotify_add_watch(descriptor, os.fsencode(path), _OPEN | _CLOSE)
    assert watch >= 0, os.strerror(ctypes.get_errno())
    counts: list[int] = []
    try:
        yield counts
        counts.append(sum(bool(mask & _OPEN) for mask in _masks(descriptor)))
    finally:
        os.close(descriptor)


def _masks(descriptor: int) -> Iterator[int]:
    while True:
        try:
            content = os.read(descriptor, 2**16)
        except BlockingIOError:
            return
        while content:
            _, mask, _, name = _EVENT.unpack_from(content)
            yield mask
            content = content[_EVENT.size + name :]
