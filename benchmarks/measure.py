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


def compare(name: str, ours: Callable[[], object], peer: Callable[[], object], work: float, unit: str, n: int) -> None:
    """Run both once to warm up, then `n` times in turns; print medians of `work` a second and their ratio."""
    print(f"{name} on {machine()} with {versions()}", flush=True)
    seconds(ours), seconds(peer)
    taken: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(n):
        taken["ours"].append(seconds(ours))
        taken["peer"].append(seconds(peer))
        print(f"  ours {taken['ours'][-1]:.3f} s, peer {taken['peer'][-1]:.3f} s", flush=True)
    a, b = work / statistics.median(taken["ours"]), work / statistics.median(taken["peer"])
    print(f"ours {a:.1f} {unit}, peer {b:.1f} {unit}, ratio {a / b:.2f}")
    line = {"name": name, "ours": a, "peer": b, "ratio": a / b, "unit": unit, "machine": machine()}
    print(json.dumps(line))
