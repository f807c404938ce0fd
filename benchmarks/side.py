"""A side of a comparison, in a process of its own: ours with the environment that ftray sets, the peer's as it is.

    python -m benchmarks.side MODULE ours|peer JSON [--as-ftray]

How threads wait for each other is decided when a process loads OpenMP, so that two sides in one process would have to
wait alike. The process makes its side, says so, and runs it whenever it is told to; it ends with its standard input.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any


@dataclass
class Timed:
    """What a side does, in its own process.

    Attributes:
        run: what is timed.
        before: what comes before each run, not timed.
        after: what comes after it, not timed.
        found: what the side has to say after the last run, as JSON knows it.
    """

    run: Callable[[], object]
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None
    found: Callable[[], dict[str, Any]] = dict


class Side:
    """The process of a side, from outside; it ends with the block."""

    def __init__(self, module: str, function: str, given: dict[str, Any], as_ftray: bool):
        """`function` of `module` takes `given` and returns a :class:`Timed`."""
        command = [sys.executable, "-m", "benchmarks.side", module, function, json.dumps(given)]
        command += ["--as-ftray"] if as_ftray else []
        self.name = function
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.communicate()

    def ready(self) -> None:
        """Wait until it is made."""
        self._answer()

    def run(self) -> float:
        """One run; returns its seconds."""
        return float(self._ask("run"))

    def found(self) -> dict[str, Any]:
        """What it has to say."""
        return dict(self._ask("found"))

    def _ask(self, what: str) -> Any:
        self.process.stdin.write(f"{what}\n")  # type: ignore[union-attr]  # it is a pipe
        self.process.stdin.flush()  # type: ignore[union-attr]
        return self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            self.process.wait()  # it says why
            raise SystemExit(f"{self.name} failed")
        return json.loads(line)


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock of one call, work on the GPU included."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.side")
    parser.add_argument("module")
    parser.add_argument("function")
    parser.add_argument("given", type=json.loads)
    parser.add_argument("--as-ftray", action="store_true")
    args = parser.parse_args()
    if args.as_ftray:
        from ftray.runtime.threads import wait_briefly

        wait_briefly()
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print is no answer

        def answer(value: object) -> None:
            print(json.dumps(value), file=answers, flush=True)

        side = getattr(importlib.import_module(args.module), args.function)(**args.given)
        answer("ready")
        for asked in sys.stdin:
            if asked.strip() == "run":
                side.before()
                taken = seconds(side.run)
                side.after()
                answer(taken)
            else:
                answer(side.found())


if __name__ == "__main__":
    main()
