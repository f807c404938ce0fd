"""A lock in an object store, which has none itself: the driver that holds an output keeps rewriting a file there."""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ftray.errors import UserError
from ftray.storage.location import Stored

BEAT, PATIENCE = 5.0, 16.0  # seconds between two writes; without a new one, after which the driver counts as dead


@contextmanager
def held(lock: Stored, refusal: Callable[[], UserError]) -> Iterator[None]:
    """Hold `lock`; the lock of a killed driver is taken over when it has not changed for `PATIENCE` seconds.

    Only changes count, clocks of two machines are never compared. A driver that finds its lock taken over, because it
    was suspended or disconnected for longer than that, ends at once: another one continues from what it left.

    Args:
        lock: the file.
        refusal: makes the error that is raised when another driver holds it.

    Raises:
        UserError: from `refusal`: a running driver holds it.
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


def since(lock: Stored) -> float | None:
    """When the driver that holds `lock` started, in seconds since 1970; None: no running driver holds it."""
    if not lock.exists() or time.time() - lock.modified > PATIENCE:
        return None
    return json.loads(lock.read_text())["since"]


def _driver(lock: Stored) -> str | None:
    return json.loads(lock.read_text())["driver"] if lock.exists() else None
