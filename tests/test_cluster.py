"""A search submitted to a cluster that grows for it: Ray's own job server and autoscaler, each node a raylet here."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from helpers.faults import FLAGS, SEARCHES, STEPS, begun, compare, moments, record, reports, untouched
from helpers.faults import SPACE as FAULT_SPACE
from helpers.ports import free_port
from helpers.searches import SPACE, command, finished
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).parent / "ray")


class GrowingCluster:
    """A head without CPUs, and nodes of two CPUs that come when they are asked for and go when they are idle."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.port, self.dashboard, self.metrics = free_port(), free_port(), free_port()
        config = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())
        config["provider"]["gcs_address"] = f"127.0.0.1:{self.port}"
        config["idle_timeout_minutes"] = 0.1
        config["available_node_types"]["cpu"]["min_workers"] = 0
        (directory / "cluster.yaml").write_text(yaml.safe_dump(config))
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_ADDRESS": f"127.0.0.1:{self.port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0123456789abcdef" * 2,
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_metrics_report_interval_ms": "1000",
        }
        self.log = directory / "log"
        self.start()

    def start(self) -> None:
        """The head, at the same address each time."""
        flags = {
            "--node-ip-address": "127.0.0.1",
            "--port": self.port,
            "--num-cpus": 0,
            "--num-gpus": 0,
            "--autoscaling-config": self.directory / "cluster.yaml",
            "--dashboard-host": "127.0.0.1",
            "--dashboard-port": self.dashboard,
            "--metrics-export-port": self.metrics,
            "--ray-client-server-port": free_port(),
            "--temp-dir": self.directory / "ray",
            "--object-store-memory": 200_000_000,
        }
        start = [RAY, "start", "--head", "--block", *(f"{flag}={value}" for flag, value in flags.items())]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(start, stdout=log, stderr=subprocess.STDOUT, env=self.environment)
        self.wait_for(lambda: self.status().count("ray.head.default") == 1, 90)

    def status(self) -> str:
        """What `ray status` says; nothing while the head does not answer."""
        done = subprocess.run([RAY, "status"], capture_output=True, text=True, env=self.environment, check=False)
        return done.stdout

    def nodes(self) -> int:
        """Those that run beside the head."""
        found = re.search(r"^ (\d+) cpu$", self.status().partition("Pending:")[0], re.MULTILINE)
        return int(found[1]) if found else 0

    def wait_for(self, condition, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.status() + self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.5)

    def submit(self, entrypoint: list[str], *more: str) -> subprocess.Popen:
        """The job, as a user submits it."""
        where = ["--address", f"http://127.0.0.1:{self.dashboard}", *more]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([RAY, "job", "submit", *where, "--", *entrypoint], env=self.environment, **pipes)

    def measured(self) -> dict[str, float]:
        """ftray's own metrics as the head exports them, summed up by name and by state."""
        try:
            text = httpx.get(f"http://127.0.0.1:{self.metrics}/metrics").text
        except httpx.HTTPError:
            return {}
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("ray_ftray_"):
                    name = sample.name.removeprefix("ray_ftray_")
                    name += "." + sample.labels["state"] if "state" in sample.labels else ""
                    found[name] = found.get(name, 0.0) + sample.value
        return found

    @contextmanager
    def prometheus(self) -> Iterator[Callable[[str], list[dict]]]:
        """Debian's Prometheus with the repository's configuration; yields what answers an expression."""
        written = (ROOT / "cluster" / "observability" / "prometheus.yaml").read_text()
        found = str(self.directory / "ray" / "prom_metrics_service_discovery.json")
        config = self.directory / "prometheus.yaml"
        config.write_text(written.replace("/tmp/ray/prom_metrics_service_discovery.json", found).replace("10s", "1s"))
        assert found in config.read_text()
        port = free_port()
        where = [f"--config.file={config}", f"--web.listen-address=127.0.0.1:{port}"]
        process = subprocess.Popen(["prometheus", *where, f"--storage.tsdb.path={self.directory / 'tsdb'}"])

        def ask(expression: str) -> list[dict]:
            try:
                got = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": expression})
            except httpx.HTTPError:
                return []
            return got.json()["data"]["result"] if got.status_code == 200 else []

        try:
            yield ask
        finally:
            process.kill()
            process.wait()

    def stop(self) -> None:
        """The head, and all that it started."""
        everything = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
        mine = [
            p for p in psutil.process_iter(["cmdline"]) if str(self.log.parent) in " ".join(p.info["cmdline"] or [])
        ]
        for process in [*everything, *mine]:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def growing():
    with tempfile.TemporaryDirectory(
        prefix="ray", dir="/tmp", ignore_cleanup_errors=True
    ) as directory:  # short: sockets
        cluster = GrowingCluster(Path(directory))
        yield cluster
        cluster.stop()


def test_a_submitted_search_makes_nodes_appear_uses_them_and_lets_them_go(growing, tmp_path, words, tiny_llama):
    assert growing.nodes() == 0
    entrypoint = command(tmp_path / "out", words, tiny_llama, "--trials", "3", space=SPACE, steps=60)
    entrypoint[0] = "python"
    entrypoint[entrypoint.index("--output") + 1] = str(tmp_path / "out")  # the job runs in another directory
    job = growing.submit(entrypoint)
    most, seen = 0, {}
    while job.poll() is None:
        most = max(most, growing.nodes())
        seen |= growing.measured()
        time.sleep(1)
    log = job.stdout.read()
    assert job.returncode == 0, log
    assert most == 1
    assert sorted(re.findall(r"trial (\d) (?:finished|stopped early)$", log, re.M)) == ["0", "1", "2"]
    lines = [line for line in log.splitlines() if line.startswith("summary ")]
    assert lines == [f"summary  {tmp_path / 'out' / 'summary.json'}"]
    assert (tmp_path / "out" / "best" / "merged" / "config.json").exists()
    assert seen["trials.runs"] + seen["trials.done"] > 0
    assert seen["best"] > 0
    assert seen["rung_records_total"] > 0
    growing.wait_for(lambda: growing.nodes() == 0, 60)


def test_a_job_is_seen_and_led_by_its_id(growing, tmp_path, words, tiny_llama):
    entrypoint = command(tmp_path / "out", words, tiny_llama, "--trials", "2", space=SPACE, steps=900)
    entrypoint[0] = "python"
    entrypoint[entrypoint.index("--output") + 1] = str(tmp_path / "out")
    job = growing.submit(entrypoint, "--submission-id", "raysubmit_seen")
    where = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{growing.dashboard}"}

    def ask(*words: str) -> subprocess.CompletedProcess:
        asked = [sys.executable, "-m", f"ftray.{words[0]}", *words[1:], "--run", "raysubmit_seen"]
        return subprocess.run(asked, capture_output=True, text=True, env=growing.environment | where, check=False)

    try:
        deadline = time.monotonic() + 400
        while "best validation_loss" not in (seen := ask("status")).stdout:
            assert time.monotonic() < deadline, seen.stdout + seen.stderr
            assert job.poll() is None, job.stdout.read()
            assert seen.returncode in (0, 2)
        assert re.search(r"0/2 trials over, best validation_loss [\d.]+ \(trial \d\), \d+ tokens/s", seen.stdout)
        for number in range(2):
            while (stopped := ask("stop", str(number))).returncode:
                assert time.monotonic() < deadline, stopped.stderr
        log, _ = job.communicate(timeout=240)
        assert job.returncode == 0, log
    finally:
        job.kill()
    assert "2/2 trials over, best" in ask("status").stdout
    unknown = subprocess.run(
        [sys.executable, "-m", "ftray.status", "--run", "raysubmit_none"],
        capture_output=True,
        text=True,
        env=growing.environment | where,
        check=False,
    )
    assert (unknown.returncode, unknown.stderr) == (
        2,
        "ftray status: error: job raysubmit_none: no job of that id (ray job list)\n",
    )


def test_prometheus_scrapes_what_a_dashboard_shows(growing, tmp_path, words, tiny_llama):
    if not shutil.which("prometheus"):
        pytest.skip("needs Debian's prometheus")
    dashboard = json.loads((ROOT / "cluster" / "observability" / "grafana.json").read_text())
    asked = {panel["title"]: panel["targets"][0]["expr"].replace("$search", ".*") for panel in dashboard["panels"]}
    entrypoint = command(tmp_path / "out", words, tiny_llama, "--trials", "3", space=SPACE, steps=300)
    entrypoint[0] = "python"
    entrypoint[entrypoint.index("--output") + 1] = str(tmp_path / "out")
    answered: dict[str, list[dict]] = {}
    with growing.prometheus() as ask:
        job = growing.submit(entrypoint)
        while job.poll() is None:
            answered |= {title: found for title, expression in asked.items() if (found := ask(expression))}
            time.sleep(1)
    assert job.returncode == 0, job.stdout.read()
    assert answered.keys() == asked.keys()
    states = {series["metric"]["state"] for series in answered["Trials by state"]}
    assert {"runs", "done"} <= states
    (best,) = answered["Best value of the metric"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert float(best["value"][1]) >= summary["best"]["value"] * 0.999  # the last report may have come after it


@pytest.mark.parametrize(("seed", "hits"), SEARCHES)
def test_a_lost_head_is_made_up_for_by_the_job_submitted_again(
    seed, hits, growing, undisturbed, tmp_path, words, tiny_llama
):
    """With the machine go Ray's head, all nodes that it had started, and the driver."""
    output, draw, known, before = tmp_path / "out", random.Random(f"head {seed}"), set(undisturbed), {}
    entrypoint = command(output, words, tiny_llama, *FLAGS, "--resume", space=FAULT_SPACE, steps=STEPS)
    entrypoint[0] = "python"
    entrypoint[entrypoint.index("--output") + 1] = str(output)
    job = growing.submit(entrypoint)  # the same each time, as KubeRay's backoffLimit has it
    for after in moments(draw, hits):
        deadline = time.monotonic() + 400
        while reports(output) < after:
            assert job.poll() is None, job.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(draw.random())
        growing.stop()
        job.kill()
        known &= begun(output)
        before |= finished(output)
        growing.start()
        job = growing.submit(entrypoint)
    log, _ = job.communicate(timeout=500)
    assert job.returncode == 0, log
    untouched(output, before)
    difference = compare(output, undisturbed, known)
    for _ in range(hits):
        record("head lost, job submitted again", "--resume continues", difference)


def test_a_submitted_mistake_is_told_in_the_log_and_the_exit_code(growing, tmp_path):
    entrypoint = ["python", "-m", "ftray.tune", "--data", str(tmp_path / "nothing.jsonl")]
    job = growing.submit(entrypoint, "--working-dir", str(ROOT))  # from a clone
    log, _ = job.communicate(timeout=120)
    assert job.returncode != 0
    # a set: Ray ends with the last of the log once more
    (line,) = {line for line in log.splitlines() if "error:" in line and line.startswith("ftray tune")}
    assert "nothing.jsonl" in line
    assert growing.nodes() == 0
