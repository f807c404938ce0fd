"""What the benchmarks share: interleaved runs, medians, and the line that a machine reads."""

import json
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "peft", "ray", "deepspeed")


def machine() -> str:
    """The accelerator, or the processor and its cores."""
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


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock of one call, work on the GPU included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


Pair = tuple[Callable[[], object], Callable[[], object]]


def compare(
    name: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    work: float,
    unit: str,
    n: int,
    around: dict[str, Pair] | None = None,
    also: Callable[[], dict[str, object]] = dict,
) -> None:
    """Run both once to warm up, then `n` times in turns; print medians of `work` a second and their ratio.

    Args:
        around: what comes before and after each run of `ours` and `peer`, and is not timed.
        also: gives further entries of the last line.
    """
    print(f"{name} on {machine()} with {versions()}", flush=True)
    taken: dict[str, list[float]] = {"ours": [], "peer": []}
    for turn in range(n + 1):
        for side, run in (("ours", ours), ("peer", peer)):
            before, after = (around or {}).get(side, (lambda: None, lambda: None))
            before()
            taken[side].append(seconds(run))
            after()
        print(
            f"  ours {taken['ours'][-1]:.3f} s, peer {taken['peer'][-1]:.3f} s{'' if turn else ' (warm-up)'}",
            flush=True,
        )
    a, b = (work / statistics.median(taken[side][1:]) for side in ("ours", "peer"))
    show(name, a, b, a / b, unit, also())


def show(name: str, ours: float, peer: float, ratio: float, unit: str, also: dict[str, object]) -> None:
    """Both figures and how many times better ours is; then the same as one line of JSON, the last of all."""
    print(f"ours {ours:.4g} {unit}, peer {peer:.4g} {unit}, ratio {ratio:.2f}")
    line = {"name": name, "ours": ours, "peer": peer, "ratio": ratio, "unit": unit, "machine": machine(), **also}
    print(json.dumps(line))
