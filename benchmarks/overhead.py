"""Seconds that a trial costs beyond its tokens, beside the usual script.

    python -m benchmarks.overhead [--quick]

Searches of few and of many trials, with few and with many steps a trial, each a process of its own as in
`benchmarks.search`. With T(n, s) = start + n (c + s r), the differences give r, the seconds of a step, and c, what a
trial costs besides: its process, adapter, optimiser, data stream, validation (of 6 records), checkpoint and report.
"""

import statistics
import sys
import tempfile

from benchmarks.measure import beside, busy, machine, parser, show, versions
from benchmarks.search import prepare, run

RECORDS = 60
TRIALS = {"ours": (8, 24), "peer": (2, 6)}
STEPS = (2, 6)


def main() -> int:
    made = parser("overhead", __doc__)
    made.add_argument("--ours", action="store_true", help="without the usual script")
    made.add_argument("--quick", action="store_true", help="one set of searches a side instead of three")
    args = made.parse_args()
    print(f"overhead{beside(args.busy)} on {machine()} with {versions()}", flush=True)
    found: dict[str, list[float]] = {side: [] for side in ("ours", "peer") if side == "ours" or not args.ours}
    with tempfile.TemporaryDirectory() as cache:
        prepare(cache, RECORDS)
        with busy(args.busy):
            for turn in range(1 if args.quick else 3):
                for side, costs in found.items():
                    costs.append(of_a_trial(side, turn, cache))
    ours, *peers = (statistics.median(costs) for costs in found.values())
    peer = peers[0] if peers else None
    show("overhead", ours, peer, peer and peer / ours, "s/trial", {}, args.busy)
    return 0


def of_a_trial(side: str, turn: int, cache: str) -> float:
    """Seconds, from three searches."""
    few, many = TRIALS[side]
    short, long = STEPS
    taken = {
        (n, s): run(side, n, s, turn, None, cache)["seconds"] for n, s in ((few, short), (many, short), (many, long))
    }
    a_step = (taken[many, long] - taken[many, short]) / (many * (long - short))
    cost = (taken[many, short] - taken[few, short]) / (many - few) - short * a_step
    listed = ", ".join(f"{n} x {s} steps {t:.0f} s" for (n, s), t in taken.items())
    print(f"  {side}: {listed}; {cost:.2f} s a trial", flush=True)
    return cost


if __name__ == "__main__":
    sys.exit(main())
