"""Seconds that a trial costs beyond its tokens, beside the usual script.

    python -m benchmarks.overhead [--quick]

Searches of few and of many trials, with few and with many steps a trial, each a process of its own as in
`benchmarks.search`. With T(n, s) = start + n (c + s r), the differences give r, the seconds of a step, and c, what a
trial costs besides: its process, adapter, optimiser, data stream, validation (of 6 records), checkpoint and report.
"""

import argparse
import statistics
import sys
import tempfile

from benchmarks.measure import machine, show, versions
from benchmarks.search import prepare, run

RECORDS = 60
TRIALS = {"ours": (8, 24), "peer": (2, 6)}
STEPS = (2, 6)


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.overhead", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one set of searches a side instead of three")
    args = parser.parse_args()
    print(f"overhead on {machine()} with {versions()}", flush=True)
    found: dict[str, list[float]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as cache:
        prepare(cache, RECORDS)
        for turn in range(1 if args.quick else 3):
            for side, (few, many) in TRIALS.items():
                (short, long), taken = STEPS, {}
                for n, s in ((few, short), (many, short), (many, long)):
                    taken[n, s] = run(side, n, s, None, cache, f"{cache}/{side}-{turn}-{n}-{s}")["seconds"]
                a_step = (taken[many, long] - taken[many, short]) / (many * (long - short))
                found[side].append((taken[many, short] - taken[few, short]) / (many - few) - short * a_step)
                listed = ", ".join(f"{n} x {s} steps {t:.0f} s" for (n, s), t in taken.items())
                print(f"  {side}: {listed}; {found[side][-1]:.2f} s a trial", flush=True)
    ours, peer = (statistics.median(found[side]) for side in ("ours", "peer"))
    show("overhead", ours, peer, peer / ours, "s/trial", {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
