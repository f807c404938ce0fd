"""One driver an output in an object store, which knows no locks: its driver writes a file there again and again."""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ftray.errors import UserError
from ftray.storage.location import Stored

BEAT, PATIENCE = 5.0, 16.0  # seconds between two writes; without a new one, after which the driver counts as dead


@contextmanager
def held(lock: Stored) -> Iterator[None]:
    """Hold `lock`; that of a driver that was killed is taken over once it has been still for long enough.

    Only changes are looked at, no clocks of two machines compared. A driver that finds its lock taken over, as it was
    asleep or cut off for longer, ends at once: another goes on from what it left.

    Raises:
        UserError: a search that runs holds it.
    """
    running = UserError(f"output {lock.parent}: a search is running there; see ftray status --run {lock.parent}")
    mine = {"driver": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
    if lock.exists():
        before, deadline = lock.read_text(), time.monotonic() + PATIENCE
        while time.monotonic() < deadline and lock.exists():
            if lock.read_text() != before:
                raise running
            time.sleep(1)
    lock.write_text(json.dumps(mine | {"beat": 0}))
    time.sleep(1)  # two may begin at once: the last to write has it
    if _driver(lock) != mine["driver"]:
        raise running
    over = threading.Event()

    def beat() -> None:
        n = 0
        while not over.wait(BEAT):
            n += 1
            with suppress(OSError):  # the search itself finds out, and says so
                if _driver(lock) != mine["driver"]:
                    print(f"ftray tune: output {lock.parent}: another search has taken it over", file=sys.stderr)
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
    """When the driver that holds `lock` began, in seconds since 1970; None: there is none that lives."""
    if not lock.exists() or time.time() - lock.modified > PATIENCE:
        return None
    return json.loads(lock.read_text())["since"]


def _driver(lock: Stored) -> str | None:
    return json.loads(lock.read_text())["driver"] if lock.exists() else None
