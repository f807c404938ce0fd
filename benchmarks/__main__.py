"""The table of all claims with their bars, from quick runs, in under 20 minutes on two quiet cores.

    python -m benchmarks [--only NAME ...] [--busy N] [--output FILE.json]

Each benchmark is a process of its own; one that fails or takes too long is a row that says so, and the others run on.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.claims import BENCHMARKS, LEFT_OUT, Benchmark, Claim
from benchmarks.measure import add_busy, beside, machine, versions
from ftray.storage.atomic import atomic_write

COLUMNS = ("claim", "ours", "peer", "ratio", "bar", "met", "seconds")


@dataclass
class Result:
    """Of one benchmark.

    Attributes:
        command: what ran, after `python -m`.
        seconds: that it took.
        line: its last line; None if it failed.
        failed: why, in one line.
    """

    command: list[str]
    seconds: float = 0.0
    line: dict[str, Any] | None = None
    failed: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where the results go, after each benchmark")
    args = add_busy(parser).parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended, too
    where = f"{machine()}{beside(args.busy)}, with {versions()}"
    print(where, flush=True)
    results: dict[str, Result] = {}
    for name in args.only or BENCHMARKS:
        print(f"  {name}: ", end="", flush=True)
        results[name] = run(BENCHMARKS[name], args.busy)
        print(results[name].failed or f"{results[name].seconds:.0f} s", flush=True)
        if args.output:
            found = {"where": where, "busy": args.busy, "results": {n: asdict(r) for n, r in results.items()}}
            with atomic_write(args.output) as file:
                file.write(json.dumps(found, indent=1) + "\n")
    print()
    print_table([row for name, result in results.items() for row in rows(name, BENCHMARKS[name], result)])
    total = sum(result.seconds for result in results.values())
    print(f"\n{total / 60:.1f} minutes{beside(args.busy)}. Not in the table:")
    for command, what in LEFT_OUT.items():
        print(f"  {command}: {what}")
    return 1 if any(result.failed for result in results.values()) else 0


def run(benchmark: Benchmark, busy: int) -> Result:
    """Run one in a process of its own, which is ended with all below it if it takes too long, or if this one ends."""
    result = Result([*benchmark.command, *(["--busy", str(busy)] if busy and benchmark.spins else [])])
    limit = benchmark.limit * (1 + busy)
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        process = subprocess.Popen([sys.executable, "-m", *result.command], stdout=out, stderr=error)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            result.failed = f"failed: not over after {limit:.0f} s"
        finally:
            if process.poll() is None:
                end(process)
        result.seconds = time.monotonic() - started
        for file in (out, error):
            file.seek(0)
        lines, errors = out.read().splitlines(), error.read().splitlines()
    if process.returncode and not result.failed:
        print(*errors[-20:], sep="\n", file=sys.stderr)
        said = next((line for line in reversed(errors) if line.strip()), "")
        result.failed = f"failed with {process.returncode}: {said}"
    if not result.failed:
        result.line = json.loads(lines[-1])
    return result


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it has started."""
    root = psutil.Process(process.pid)
    for one in [*root.children(recursive=True), root]:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def rows(name: str, benchmark: Benchmark, result: Result) -> list[tuple[str, ...]]:
    """The rows of a benchmark's claims."""
    if result.line is None:
        return [(name, result.failed, "", "", "", "no", f"{result.seconds:.0f}")]
    made = [row(claim, result.line) for claim in benchmark.claims]
    return [(*cells, f"{result.seconds:.0f}" if i == 0 else "") for i, cells in enumerate(made)]


def row(claim: Claim, line: dict[str, Any]) -> tuple[str, ...]:
    """All columns of a claim but the seconds."""
    value, unit = line[claim.value], claim.unit and f" {claim.unit}"
    if claim.value == "ratio":
        cells = [f"{line[side]:.4g} {line['unit']}" for side in ("ours", "peer")] + [f"{value:.2f}"]
    else:
        cells = [f"{value:.3g}{unit}", f"{line[claim.peer]:.3g}{unit}" if claim.peer else "", ""]
    if claim.bar is None:
        return claim.says, *cells, "", ""
    met = value <= claim.bar if claim.at_most else value >= claim.bar
    return claim.says, *cells, f"at {'most' if claim.at_most else 'least'} {claim.bar:g}{unit}", "yes" if met else "no"


def print_table(found: list[tuple[str, ...]]) -> None:
    """As Markdown, in columns."""
    widths = [max(map(len, column)) for column in zip(COLUMNS, *found, strict=True)]
    for cells in (COLUMNS, tuple("-" * width for width in widths), *found):
        print("|", " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), "|")


if __name__ == "__main__":
    sys.exit(main())
