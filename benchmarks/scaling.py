"""What a search costs beside its training, as it grows: suggestions, journal, reports, the data plan.

    python -m benchmarks.scaling [--trials 2000] [--loop 200] [--quick]

Nothing is trained: a stub hands out losses in place of the step. `sampler` is the real sampler and journal in one
process; `loop` is the real search: Ray Tune, its trials' processes, the broker between them and the pack, ASHA.
`store` puts that journal into a real S3 server on loopback. `plan` is the order of a billion records.
"""

import contextlib
import json
import logging
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from benchmarks.measure import beside, busy, machine, parser, versions

BUDGET = 9000  # records of a trial that nothing stops
RUNGS = (1000, 3000, 9000)


def main() -> int:
    made = parser("scaling", __doc__)
    made.add_argument("--trials", type=int, default=2000, help="of the sampler alone")
    made.add_argument("--loop", type=int, default=200, help="trials of the search under Ray; 0: none")
    made.add_argument("--quick", action="store_true", help="200 and 20 trials")
    args = made.parse_args()
    trials, loop = (200, 20) if args.quick else (args.trials, args.loop)
    print(f"scaling{beside(args.busy)} on {machine()} with {versions()}", flush=True)
    with tempfile.TemporaryDirectory() as directory, busy(args.busy):
        results = {"sampler": sampler(trials, Path(directory)), "plan": plan(10**6)}
        if loop:
            results["loop"] = searched(loop, Path(directory) / "search")
    print(json.dumps({"name": "scaling", "machine": machine(), "busy": args.busy, **results}))
    return 0


def memory() -> float:
    """MiB of this process."""
    return psutil.Process().memory_info().rss / 2**20


def loss(number: int, records: int) -> float:
    """A curve a trial, the same in every run."""
    return 1 + random.Random(number).random() + 1000 / records


def report(number: int, rung: int) -> dict[str, Any]:
    """What a pack says of a trial."""
    records = RUNGS[rung]
    return {
        "step": records // 8,
        "records": records,
        "tokens": records * 100,
        "seconds": records / 100,
        "tokens_per_second": 1e4,
        "train_loss": 1.0,
        "learning_rate": 0.0,
        "validation_loss": loss(number, records),
        "done": rung == len(RUNGS) - 1,
    }


def settings(trials: int) -> Any:
    """Of a search over the space of all methods."""
    from ftray.config import Config

    searched = {"trials": trials, "pack": 8}
    return Config.model_validate({"task": "CAUSAL_LM", "search": searched, "training": {"steps": BUDGET // 8}})


def sampler(trials: int, directory: Path) -> list[dict[str, float]]:
    """Seconds of a suggestion and of a report, bytes of the journal and what it takes to read, as trials grow.

    Two of three trials end at the first rung, as under ASHA; eight run side by side.
    """
    from ftray.search.journal import past_trials
    from ftray.search.sampler import Sampler
    from ftray.search.space import load_space
    from ftray.storage.local import LocalLocation

    journal = LocalLocation(directory / "study.log")
    made = Sampler(load_space("methods"), settings(trials), BUDGET, journal, lambda: trials)
    marks = sorted({max(16, trials // part) for part in (20, 4, 2, 1)})
    rows, suggestions, reports, running = [], [], [], []
    for number in range(trials):
        suggestions.append(timed(lambda n=number: made.suggest(str(n))))
        running.append(number)
        if len(running) == 8:
            over = running.pop(0)
            for rung in range(3 if over % 3 == 0 else 1):
                said = report(over, rung)
                reports.append(timed(lambda n=over, r=said: made.on_trial_result(str(n), r)))
            made.on_trial_complete(str(over), said)
        if number + 1 in marks:
            size = journal.stat().st_size
            rows.append(
                {
                    "trials": number + 1,
                    "suggestion_seconds": statistics.median(suggestions[-50:]),
                    "report_seconds": statistics.median(reports[-50:]),
                    "journal_mib": size / 2**20,
                    "reading_seconds": timed(lambda: past_trials(journal)),
                    "store_seconds": stored(journal),
                    "memory_mib": memory(),
                }
            )
            print("  sampler:", *(f"{name} {value:.3g}" for name, value in rows[-1].items()), flush=True)
    return rows


def stored(journal: Path) -> float:
    """Seconds to put the journal into an S3 server on loopback (moto), as is done after each report."""
    from moto.server import ThreadedMotoServer

    from ftray.storage.location import parse_location

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = f"endpoint_override={host}:{port}&scheme=http&allow_bucket_creation=true&region=us-east-1"
        target = parse_location(f"s3://test:test@journals?{options}") / "study.log"
        target.filesystem.create_dir("journals")
        return statistics.median(timed(lambda: target.write_bytes(journal.read_bytes())) for _ in range(5))
    finally:
        server.stop()


def plan(row_groups: int) -> dict[str, float]:
    """Seconds and memory to lay out an epoch of `row_groups` row groups of 1,024 records for a worker's stream."""
    from ftray.data.row_groups import row_group_order
    from ftray.data.shards import ROW_GROUP_ROWS, Split, TokenizedData

    before = memory()
    split = Split(row_groups=[ROW_GROUP_ROWS] * row_groups, records=ROW_GROUP_ROWS * row_groups)
    data = TokenizedData("", "", {"train": split})
    count = 0

    def all_of_them() -> None:
        nonlocal count
        count = sum(1 for _ in row_group_order(data, 0, 0, split.records))

    row = {"records": split.records, "seconds": timed(all_of_them), "memory_mib": memory() - before}
    assert count == row_groups
    print("  plan:", *(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
    return row


def searched(trials: int, output: Path) -> dict[str, float]:
    """The real search: seconds a trial takes it, from a report's making to Tune's hearing it, the driver's memory."""
    from ftray.runtime.cluster import connect, quiet
    from ftray.runtime.threads import wait_briefly

    wait_briefly()
    quiet()
    from ray import tune

    from ftray.search import driver
    from ftray.search.packs import Capacity
    from ftray.search.space import load_space

    cfg, made, latencies = settings(trials), {}, []
    output.mkdir()

    class Listener(tune.Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            latencies.append(time.time() - made[result["config"]["number"], result["step"]])

    @contextlib.contextmanager
    def stub(cfg: Any, gpus: float, experiment: Any, trials: int) -> Iterator[SimpleNamespace]:
        """In place of :func:`ftray.search.packs.packs`: the same broker, and a thread that makes reports up."""
        import ray

        from ftray.search.broker import TrialBroker

        broker = ray.remote(TrialBroker).options(num_cpus=0, max_concurrency=1000).remote(trials)
        ray.get(broker.ready.remote(0, 8))

        def train() -> None:
            rungs: dict[int, int] = {}
            reports: dict[int, list[Any]] = {}
            while not (orders := ray.get(broker.orders.remote(0, reports, {}))).close:
                rungs |= dict.fromkeys(orders.join, 0)
                reports = {}
                for number in orders.run:
                    reports[number] = [report(number, rung) for rung in range(rungs[number] + 1)]
                    made[number, reports[number][-1]["step"]] = time.time()
                    rungs[number] += 1
            ray.get(broker.lost.remote(0))

        thread = threading.Thread(target=train)
        thread.start()
        capacity = Capacity(8, time.monotonic())
        yield SimpleNamespace(broker=broker, capacity=capacity, begin=lambda search: None)
        ray.get(broker.close.remote("over"))
        thread.join()

    connect(cfg)
    driver.packs = stub
    before, started = memory(), time.monotonic()
    tokenized = SimpleNamespace(task=_Packed())
    context = SimpleNamespace(config=cfg, tokenized=tokenized, budget=lambda: BUDGET, gpus_per_worker=0.0)
    with driver.search(cfg, load_space("methods"), output, 0.0, lambda: (context, [Listener()])):
        pass
    seconds = time.monotonic() - started
    row = {
        "trials": trials,
        "seconds_a_trial": seconds / trials,
        "reports": len(latencies),
        "latency_median": statistics.median(latencies),
        "latency_p99": sorted(latencies)[int(0.99 * (len(latencies) - 1))],
        "driver_mib": memory(),
        "driver_kib_a_trial": (memory() - before) * 1024 / trials,
        "journal_mib": (output / "study.log").stat().st_size / 2**20,
    }
    print("  loop:", *(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
    return row


class _Packed:
    def load(self) -> Any:
        return SimpleNamespace(packed=True)


def timed(run: Any) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    raise SystemExit(main())
