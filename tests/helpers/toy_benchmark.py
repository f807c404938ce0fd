"""A benchmark that measures nothing: its sides tell their environment, and it ends as it is told to."""

import os
import subprocess
import sys
import time

from benchmarks.measure import parser, show
from benchmarks.side import Timed


def ours(seconds: float, fails: bool = False) -> Timed:
    runs = []

    def run() -> None:
        print("not an answer")
        time.sleep(seconds)
        if fails:
            raise ValueError("as it was told to")
        runs.append("run")

    found = {"spins": os.environ.get("GOMP_SPINCOUNT"), "torch": "torch" in sys.modules}
    return Timed(run, lambda: runs.append("before"), lambda: runs.append("after"), lambda: found | {"runs": runs})


peer = ours


if __name__ == "__main__":
    made = parser("toy", __doc__)
    made.add_argument("how", choices=["ends", "fails", "hangs"])
    args = made.parse_args()
    if args.how == "fails":
        sys.exit("the two sides differ")
    if args.how == "hangs":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(child.pid, flush=True)
        time.sleep(600)
    print("ours is good")
    show("toy", 6.0, 2.0, 3.0, "things/s", {"bytes": 7.0}, args.busy)
