"""How many threads torch has, and how they wait for each other: for a machine that others use too."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# GNU OpenMP's threads spin at the end of each product until the last is done, 300,000 rounds by default: where another
# process has the processor that the last one needs, they burn its time. 3,000 are longer than what a quiet machine's
# threads wait for each other, and soon over.
SPINS = "3000"
CGROUP = Path("/sys/fs/cgroup")
_ours: dict[str, str] = {}


def wait_briefly() -> dict[str, str]:
    """Let OpenMP's threads sleep when they have waited a moment, here (if torch is not loaded yet) and in children.

    Whoever says how threads wait, by `GOMP_SPINCOUNT` or `OMP_WAIT_POLICY`, is heeded.

    Returns:
        The environment variables that this process has set for it, and those on other machines need.
        https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        _ours["GOMP_SPINCOUNT"] = os.environ["GOMP_SPINCOUNT"] = SPINS
    return dict(_ours)


def own_torch_threads(count: int) -> None:
    """Let torch use `count` threads for what the calling thread computes.

    OpenMP keeps a pool for each calling thread. Where all pools together have more threads than there are processors,
    they sleep between two products instead of spinning: only the thread that answers gets more than one.
    """
    import torch

    torch.set_num_threads(count)
    torch.get_num_threads()  # makes it this thread's: until then, a value that another thread sets would hold


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """For many small operations: threads would wait for each other longer than they compute."""
    import torch

    count = torch.get_num_threads()
    own_torch_threads(1)
    try:
        yield
    finally:
        own_torch_threads(count)


def share_of_processors() -> int:
    """Processors that this process may keep busy: those it may run on, and what its container's quota comes to."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, _quota())))


def _quota() -> float:
    """Processors by the control group's quota (version 2, then 1); infinite if there is none."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (CGROUP / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (CGROUP / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return math.inf
    return math.inf if quota in ("max", "-1") else int(quota) / int(period)
