"""The benchmarks' common parts; nothing is measured here."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import toy_benchmark

import benchmarks.__main__ as table
from benchmarks import measure
from benchmarks.claims import BENCHMARKS, LEFT_OUT, Benchmark, Claim
from benchmarks.measure import busy
from benchmarks.side import Side
from ftray.runtime.threads import SPINS

REPOSITORY = Path(__file__).parents[1]
NO_SPEED = ("curves", "models", "policy")  # what they show is no matter of time
PARTS = ("claims", "measure", "side", "tiny_models", "usual")
SPEED = sorted(
    path.stem
    for path in (REPOSITORY / "benchmarks").glob("*.py")
    if not path.stem.startswith("_") and path.stem not in NO_SPEED + PARTS
)
KILLED = """
import sys, time
from benchmarks.measure import busy
with busy(2):
    print("spinning", flush=True)
    time.sleep(600)
"""


def spinners(parent=None):
    children = psutil.Process(parent).children()
    return [one for one in children if measure.SPINNER in one.cmdline()]


def gone(processes):
    _, alive = psutil.wait_procs(processes, timeout=30)
    return not alive


def test_busy_processes_spin_and_are_gone_after_an_error():
    found = []

    def measured():
        with busy(2):
            found.extend(spinners())
            before = [one.cpu_times().user for one in found]
            until = time.monotonic() + 30
            while not all(one.cpu_times().user > b for one, b in zip(found, before, strict=True)):
                assert time.monotonic() < until
            assert [one.nice() for one in found] == [0, 0]
            raise ValueError("in between")

    with pytest.raises(ValueError, match="in between"):
        measured()
    assert gone(found)
    assert spinners() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_busy_processes_end_with_the_benchmark(number):
    with subprocess.Popen(
        [sys.executable, "-c", KILLED],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    ) as process:
        assert process.stdout.readline() == b"spinning\n"
        found = spinners(process.pid)
        assert len(found) == 2
        process.send_signal(number)
    assert gone(found)


def test_a_measurement_that_lost_a_busy_process_is_none():
    def measured():
        with busy(1):
            (one,) = spinners()
            one.kill()
            one.wait()

    with pytest.raises(SystemExit, match="has ended before"):
        measured()


@pytest.mark.parametrize("name", SPEED)
def test_every_benchmark_of_speed_takes_the_flag(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main()
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "--busy N" in said
    arguments = BENCHMARKS[name].command[1:] if name in BENCHMARKS else ()
    assert all(flag in said for flag in arguments if flag.startswith("--"))


def test_the_table_has_every_benchmark_or_says_how_it_is_run():
    assert {*SPEED, "policy"} == {*BENCHMARKS} | {command.split(".")[1].split()[0] for command in LEFT_OUT}
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.command[0] == f"benchmarks.{name}"
        assert benchmark.spins == (name not in NO_SPEED)


@pytest.fixture
def as_users_start_it(monkeypatch):
    """Threads wait as by default, whatever this session's own environment says."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]))


def test_ours_has_the_environment_of_ftray_and_the_peer_a_users(as_users_start_it):
    with (
        Side("helpers.toy_benchmark", "ours", {"seconds": 0.2}, as_ftray=True) as ours,
        Side("helpers.toy_benchmark", "peer", {"seconds": 0.0}, as_ftray=False) as peer,
    ):
        ours.ready()
        peer.ready()
        assert 0.2 <= ours.run() < 30
        assert ours.found() == {"spins": SPINS, "torch": False, "runs": ["before", "run", "after"]}
        assert peer.found() == {"spins": None, "torch": False, "runs": []}
    assert ours.process.returncode is not None


def test_a_side_that_fails_is_named(as_users_start_it, capfd):
    with Side("helpers.toy_benchmark", "peer", {"seconds": 0.0, "fails": True}, as_ftray=False) as peer:
        peer.ready()
        with pytest.raises(SystemExit, match="peer failed"):
            peer.run()
    assert "ValueError: as it was told to" in capfd.readouterr().err


def test_sides_take_turns_and_the_first_of_each_does_not_count(as_users_start_it, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "benchmarks.toy", toy_benchmark)
    made = []

    class Told:
        """In place of a process: seconds as they are given."""

        def __init__(self, module, function, given, as_ftray):
            made.append((module, function, as_ftray))
            self.seconds = iter({"ours": (9.0, 1.0, 2.0, 4.0), "peer": (9.0, 6.0, 3.0, 8.0)}[function])

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def ready(self):
            pass

        def run(self):
            return next(self.seconds)

        def found(self):
            return {"loss": 1.5}

    monkeypatch.setattr(measure, "Side", Told)
    measure.compare("toy", {}, 12, "things/s", 0)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["ours"] == line["peer"] == 12 / 9  # of one run each, that counts
    made.clear()

    assert measure.compare("toy", {}, 12, "things/s", 3, spinning=1) == ({"loss": 1.5}, {"loss": 1.5})
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert made == [("benchmarks.toy", "ours", True), ("benchmarks.toy", "peer", False)]
    assert (line["ours"], line["peer"], line["ratio"]) == (6.0, 2.0, 3.0)  # 12 in 2 s and in 6 s, the medians
    assert (line["busy"], line["ours_loss"], line["peer_loss"]) == (1, 1.5, 1.5)


def test_the_table_goes_on_after_a_failure_and_says_so(as_users_start_it, monkeypatch, tmp_path, capsys):
    toy = "helpers.toy_benchmark"
    claims = (
        Claim("as fast", 2.5),
        Claim("as small", 6, "bytes", at_most=True, unit="B"),
        Claim("as it is", None),
    )
    monkeypatch.setattr(
        table,
        "BENCHMARKS",
        {
            "bad": Benchmark((toy, "fails"), 60, claims),
            "slow": Benchmark((toy, "hangs"), 5, claims),
            "good": Benchmark((toy, "ends"), 60, claims),
            "none": Benchmark((toy, "ends"), 60, claims),
        },
    )
    before = {one.pid for one in psutil.Process().children(recursive=True)}
    output = tmp_path / "found.json"
    flags = [part for name in ("bad", "slow", "good") for part in ("--only", name)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *flags, "--busy", "0", "--output", str(output)])

    assert table.main() == 1

    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert cells[0] == [*table.COLUMNS]
    assert cells[2][:6] == ["bad", "failed with 1: the two sides differ", "", "", "", "no"]
    assert cells[3][:6] == ["slow", "failed: not over after 5 s", "", "", "", "no"]
    assert cells[4][:6] == ["as fast", "6 things/s", "2 things/s", "3.00", "at least 2.5", "yes"]
    assert cells[5] == ["as small", "7 B", "", "", "at most 6 B", "no", ""]
    assert cells[6] == ["as it is", "6 things/s", "2 things/s", "3.00", "", "", ""]
    found = json.loads(output.read_text())["results"]
    assert {name: result["line"] and result["line"]["ratio"] for name, result in found.items()} == {
        "bad": None,
        "slow": None,
        "good": 3.0,
    }
    assert {one.pid for one in psutil.Process().children(recursive=True)} <= before
