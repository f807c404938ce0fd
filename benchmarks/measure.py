"""What the benchmarks share: a flag, busy processes, sides in turns, and the line that a machine reads."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.side import Side

PACKAGES = ("torch", "transformers", "peft", "ray", "deepspeed")
# it ends with the benchmark, however that ends: a process whose parent is gone has another one
SPINNER = """
import os, sys
os.setpriority(os.PRIO_PROCESS, 0, 0)
print(flush=True)
while os.getppid() == int(sys.argv[1]):
    for _ in range(100_000):
        pass
"""


def machine() -> str:
    """The accelerator, or the processor and its cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{model}, {os.cpu_count()} cores"


def versions() -> str:
    """Those of the packages at hand."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Of the benchmark `name`, which measures speed; `description`: its docstring."""
    return add_busy(argparse.ArgumentParser(prog=f"benchmarks.{name}", description=description.partition("\n")[0]))


def add_busy(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--busy`, which every benchmark of speed takes; returns the parser."""
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="measure beside N processes that spin")
    return parser


@contextmanager
def busy(number: int) -> Iterator[None]:
    """`number` processes of niceness 0 that do nothing but spin, until the block ends, in whatever way.

    Raises:
        SystemExit: one of them did not start, or has ended before the block: what was measured is not what it says.
    """
    command = [sys.executable, "-I", "-S", "-c", SPINNER, str(os.getpid())]
    with ExitStack() as running:
        spinners = []
        for _ in range(number):
            spinners.append(running.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE)))
            running.callback(spinners[-1].kill)
        for spinner in spinners:
            if not spinner.stdout.readline():  # type: ignore[union-attr]  # it is a pipe
                raise SystemExit("a busy process did not start")
        yield
        if any(spinner.poll() is not None for spinner in spinners):
            raise SystemExit("a busy process has ended before the measurement")


def beside(number: int) -> str:
    """Words for so many busy processes."""
    return f" beside {number} busy process{'es' * (number != 1)}" if number else ""


def compare(
    name: str,
    given: dict[str, Any],
    work: float,
    unit: str,
    n: int,
    spinning: int = 0,
    alike: bool = False,
    also: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run both sides once to warm up, then `n` times in turns; print medians of `work` a second and their ratio.

    Where a run is so long that warming up would not change it, `n` may be 0: the first one counts.

    The sides are what `ours` and `peer` of the module `benchmarks.NAME` make of `given`, each in a process of its own:
    :mod:`benchmarks.side`.

    Args:
        given: keyword arguments of both, as JSON knows them.
        spinning: so many busy processes run beside both.
        alike: the peer, too, has the environment that ftray's processes have.
        also: further entries of the last line.

    Returns:
        What the sides have found; it stands in the last line, too, as `ours_...` and `peer_...`.
    """
    print(f"{name}{beside(spinning)} on {machine()} with {versions()}", flush=True)
    with ExitStack() as running:
        sides = {
            side: running.enter_context(Side(f"benchmarks.{name}", side, given, as_ftray=alike or side == "ours"))
            for side in ("ours", "peer")
        }
        for side in sides.values():
            side.ready()
        taken: dict[str, list[float]] = {side: [] for side in sides}
        with busy(spinning):
            for turn in range(n + 1):
                for side, process in sides.items():
                    taken[side].append(process.run())
                last, counts = {side: values[-1] for side, values in taken.items()}, turn or not n
                print(
                    f"  ours {last['ours']:.3f} s, peer {last['peer']:.3f} s{'' if counts else ' (warm-up)'}",
                    flush=True,
                )
        found = {side: process.found() for side, process in sides.items()}
    more = {f"{side}_{key}": value for side, own in found.items() for key, value in own.items()}
    a, b = (work / statistics.median(taken[side][n > 0 :]) for side in ("ours", "peer"))
    show(name, a, b, a / b, unit, (also or {}) | more, spinning)
    return found["ours"], found["peer"]


def show(
    name: str,
    ours: float,
    peer: float | None,
    ratio: float | None,
    unit: str,
    also: dict[str, Any],
    spinning: int = 0,
) -> None:
    """Both figures and how many times better ours is; then the same as one line of JSON, the last of all.

    Args:
        peer: None, and `ratio` too: there is nothing to compare with.
    """
    against = "" if peer is None else f", peer {peer:.4g} {unit}, ratio {ratio:.2f}"
    print(f"ours {ours:.4g} {unit}{against}{beside(spinning)}")
    line = {"name": name, "ours": ours, "peer": peer, "ratio": ratio, "unit": unit, "machine": machine()}
    print(json.dumps(line | {"busy": spinning} | also), flush=True)
