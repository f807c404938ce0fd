"""Who holds a file or an output: a lock of the system, or, in an object store that knows none, a lease.

The holder of a lease writes its file there again and again.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from ftray.errors import UserError

if TYPE_CHECKING:
    from ftray.storage.object_store import ObjectStoreLocation

LOOK = 1.0  # seconds: longer than :func:`file_held_since` has the lock of a file
BEAT, PATIENCE = 5.0, 16.0  # seconds between two writes; without a new one, after which the holder counts as dead


@contextmanager
def hold_file(lock: Path, refusal: Callable[[], UserError]) -> Iterator[None]:
    """Hold a local `lock`; the system releases it when this process ends, however it ends.

    Raises:
        UserError: what `refusal` returns: another live process holds it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = FileLock(lock)
    try:
        file.acquire(timeout=LOOK)
    except Timeout:
        raise refusal() from None
    try:
        os.utime(lock)  # since when it is held, for whoever asks
        yield
    finally:
        file.release()


def file_held_since(lock: Path) -> float | None:
    """When the process that holds a local `lock` began to, in seconds since 1970; None: nobody holds it."""
    if not lock.exists():
        return None
    file = FileLock(lock)
    try:
        file.acquire(timeout=0)
    except Timeout:
        return lock.stat().st_mtime
    file.release()
    return None


@contextmanager
def wait_for(lock: Path) -> Iterator[None]:
    """Hold a local `lock`, as soon as no other process does."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        yield


@contextmanager
def hold_lease(lock: "ObjectStoreLocation", refusal: Callable[[], UserError]) -> Iterator[None]:
    """Hold the lease `lock`. Only changes are looked at, no clocks of two machines compared.

    The lease of a process that was killed is taken over once it has not changed for long enough. A process that finds
    its own taken over, as it was suspended or cut off for longer, ends at once: another resumes what it left.

    Raises:
        UserError: what `refusal` returns: another live process holds it.
    """
    mine = {"driver": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
    if lock.exists():
        before, deadline = lock.read_text(), time.monotonic() + PATIENCE
        while time.monotonic() < deadline and lock.exists():
            if lock.read_text() != before:
                raise refusal()
            time.sleep(1)
    lock.write_text(json.dumps(mine | {"beat": 0}))
    time.sleep(1)  # two may begin at once: the last to write has it
    if _driver(lock) != mine["driver"]:
        raise refusal()
    over = threading.Event()

    def beat() -> None:
        n = 0
        while not over.wait(BEAT):
            n += 1
            with suppress(OSError):  # the search itself finds out, and says so
                if _driver(lock) != mine["driver"]:
                    print(f"ftray: output {lock.parent}: another driver has taken it over", file=sys.stderr)
                    os._exit(1)
                lock.write_text(json.dumps(mine | {"beat": n}))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(BEAT)
        if not thread.is_alive():  # else the store doesn't answer
            with suppress(OSError):
                lock.unlink()


def lease_held_since(lock: "ObjectStoreLocation") -> float | None:
    """As :func:`file_held_since`, for a lease."""
    if not lock.exists() or time.time() - lock.modified > PATIENCE:
        return None
    since: float = json.loads(lock.read_text())["since"]
    return since


def lease_is_kept(lock: "ObjectStoreLocation") -> bool:
    """Whether somebody holds the lease and writes it still; to tell takes as long as from one write to the next."""
    try:
        if lease_held_since(lock) is None:
            return False
        before, deadline = lock.read_text(), time.monotonic() + BEAT + 1
        while time.monotonic() < deadline and lock.exists():
            if lock.read_text() != before:
                return True
            time.sleep(0.5)
    except FileNotFoundError:  # its holder has ended between two looks
        pass
    return False


def _driver(lock: "ObjectStoreLocation") -> str | None:
    return json.loads(lock.read_text())["driver"] if lock.exists() else None
