"""A search that is hit by faults at random moments comes to what an undisturbed one comes to.

`FTRAY_FAULT_MOMENTS=20` takes that many moments of each fault, up to five of them in one search;
`FTRAY_FAULT_TABLE=docs/faults.md` writes the table.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray
from helpers.faults import (
    RESUME,
    SEARCHES,
    STEPS,
    Search,
    begun,
    compare,
    journal,
    moments,
    raylet,
    record,
    reports,
    untouched,
    victims,
)
from helpers.faults import undisturbed as undisturbed_search
from helpers.searches import command, environment, finished, run, study
from ray.cluster_utils import Cluster


@dataclass(frozen=True)
class Fault:
    """A signal to one of a search's processes.

    Attributes:
        title: what the process is called, several separated by |.
        sent: signal.
        code: exit code of the driver, if it can't continue.
        seconds: in which it then ends; None: it continues, as a rule.
        failures: restarts that are allowed for each.
    """

    title: str
    pack: str = "auto"
    sent: int = signal.SIGKILL
    code: int = 1
    seconds: float | None = None
    failures: int = 3


TERM = signal.SIGTERM
STREAMED = 6000  # of which eight in ten are trained on: five row groups
DATA = "ray::MapBatches|ray::Map|ray::_MapWorker|ray::StatsActor|ray::_StatsActor"
FAULTS = {
    "pack's worker killed": Fault("ray::RayTrainWorker"),
    "trial's process killed, pack off": Fault("ray::ImplicitFunc|ray::ResourceTrainable|ray::run_trial", "off"),
    "pack's controller killed": Fault("ray::TrainController"),
    "broker between trials and packs killed": Fault("ray::TrialBroker", seconds=120),
    "training worker killed, pack off": Fault("ray::RayTrainWorker", "off"),
    "task of Ray Data killed": Fault(DATA),
    "driver killed": Fault("ftray.tune", code=-signal.SIGKILL, seconds=10),
    "driver told to end (SIGTERM)": Fault("ftray.tune", sent=TERM, code=143, seconds=60),
    "driver told to end (SIGTERM), pack off": Fault("ftray.tune", "off", TERM, 143, 60),
    "pack's worker told to end (SIGTERM)": Fault("ray::RayTrainWorker", sent=TERM, failures=0),
    "training worker told to end (SIGTERM), pack off": Fault("ray::RayTrainWorker", "off", TERM, failures=0),
    "raylet of the driver killed": Fault("/raylet/raylet", seconds=30),
    "head's GCS killed": Fault("/gcs/gcs_server", seconds=90),
}


def strike(search: Search, fault: Fault, draw: random.Random, struck: set[psutil.Process]) -> bool:
    """Send the signal to a process that has had none yet; False: the search was over before there was one."""

    def left() -> list[psutil.Process]:
        return [victim for victim in victims(fault.title, search.process.pid) if victim not in struck]

    search.wait_for(left)
    time.sleep(draw.random())  # somewhere between two rungs
    while search.process.poll() is None:
        search.wait_for(left)  # it may have come and gone
        with suppress(IndexError, psutil.NoSuchProcess):
            hit = draw.choice(left())
            hit.send_signal(fault.sent)
            struck.add(hit)
            return True
    return False


@pytest.fixture(scope="module")
def streamed(tmp_path_factory, tiny_llama):
    """More records than a worker reads itself, and the search over them without any fault."""
    place = tmp_path_factory.mktemp("streamed")
    rows = [{"input": f"{n % 97} {n}", "output": str(n)} for n in range(STREAMED)]
    (place / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(place / "many.jsonl"), undisturbed_search(place / "out", str(place / "many.jsonl"), tiny_llama)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "hits"), SEARCHES)
@pytest.mark.parametrize("name", FAULTS)
def test_nothing_is_lost(name, seed, hits, request, tmp_path, words, tiny_llama):
    fault, draw, output = FAULTS[name], random.Random(f"{name} {seed}"), tmp_path / "out"
    if fault.title == DATA:
        words, undisturbed = request.getfixturevalue("streamed")
    else:
        undisturbed = request.getfixturevalue("undisturbed")
    flags = ["--pack", fault.pack, "--max-failures", str(fault.failures * hits)]
    search, known, before = Search(output, words, tiny_llama, *flags), set(undisturbed), {}
    outcomes, struck = [], set()
    for after in moments(draw, hits):
        search.wait_for(lambda after=after: reports(output) >= after)
        if strike(search, fault, draw, struck):
            outcomes.append("the search continues")
        if fault.seconds:
            search.end(fault.seconds)
        before |= finished(output)
        if search.process.poll() in (None, 0):
            continue
        outcomes[-1] = "the driver ends, --resume continues"
        assert search.end() == fault.code, search.text
        assert "Traceback" not in search.text, search.text
        if fault.code != -signal.SIGKILL:
            (line,) = search.lines()
            assert line.endswith(RESUME)
        known &= begun(output)  # later ones are drawn anew
        search = Search(output, words, tiny_llama, *flags, "--resume")
    assert search.end() == 0, search.text
    assert outcomes
    untouched(output, before)
    difference = compare(output, undisturbed, known)
    for outcome in outcomes:
        record(name, outcome, difference)


def test_sigterm_loses_no_step(cluster, tmp_path, words, tiny_llama):
    """The quick one of these: what was trained since the last rung is in a checkpoint, and that is taken up."""
    import torch

    from ftray.storage.manifest import find_corruption, seal

    address = ray.get_runtime_context().gcs_address
    search = Search(tmp_path / "out", words, tiny_llama, "--training.evaluations", "2", address=address)
    search.wait_for(lambda: reports(tmp_path / "out") > 0)
    time.sleep(0.5)  # into the second half
    search.process.send_signal(TERM)
    assert search.end(60) == 143, search.text
    assert search.lines() == [f"ftray tune: terminated, with checkpoints: {RESUME}"]
    assert "Traceback" not in search.text
    kept = list((tmp_path / "out" / "tune").glob("trial-*/checkpoint_*"))
    assert not [checkpoint for checkpoint in kept if find_corruption(checkpoint)]
    kept = [checkpoint for checkpoint in kept if not (checkpoint / "report.json").exists()]
    assert kept  # from between two rungs
    for checkpoint in kept:
        path = checkpoint / "state" / "mp_rank_00_model_states.pt"
        state = torch.load(path, weights_only=False)
        assert 0 < state["step"] < STEPS
        assert state["step"] != STEPS // 2
        torch.save(state | {"tokens": state["tokens"] + 10**9}, path)  # to be known again by
        seal(checkpoint)
    search.resume(here=True)
    tokens = {t.number: t.user_attrs["reports"][-1]["tokens"] for t in study(tmp_path / "out").get_trials()}
    cut_off = {int(checkpoint.parent.name.removeprefix("trial-")) for checkpoint in kept}
    assert {number for number, seen in tokens.items() if seen > 10**9} == cut_off


@pytest.mark.slow
@pytest.mark.parametrize("pack", ["auto", "off"])
def test_a_damaged_checkpoint_is_not_taken_for_whole(pack, undisturbed, tmp_path, words, tiny_llama):
    output = tmp_path / "out"
    search = Search(output, words, tiny_llama, "--pack", pack)
    search.wait_for(lambda: any(t.state.name == "RUNNING" and t.user_attrs.get("reports") for t in journal(output)))
    # at once, before any worker has come to a last step
    for process in [*psutil.Process(search.process.pid).children(recursive=True), search.process]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    search.end()
    known, running = begun(output), {t.number for t in journal(output) if t.state.name == "RUNNING"}
    damaged = []
    for number in running:
        for weights in (output / "tune" / f"trial-{number}").glob("checkpoint_*/state/mp_rank_00_model_states.pt"):
            os.truncate(weights, weights.stat().st_size // 2)
            damaged.append(weights)
    assert damaged
    done = search.resume()
    for weights in damaged:
        (line,) = [line for line in done.stdout.splitlines() if str(weights.parents[1]) in line]
        assert "is damaged (state/mp_rank_00_model_states.pt is not as it was written)" in line
    difference = compare(output, undisturbed, known)
    name = "checkpoints cut off" + (", pack off" if pack == "off" else "")
    record(name, "--resume says so and continues from before", difference)


@pytest.mark.slow
@pytest.mark.parametrize("pack", ["auto", "off"])
def test_a_full_disk_stops_a_search_that_goes_on_when_there_is_room(pack, undisturbed, tmp_path, words, tiny_llama):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1100m", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    try:
        search = Search(disk / "out", words, tiny_llama, "--pack", pack)
        search.wait_for(lambda: reports(disk / "out") >= 2)
        with open(disk / "filler", "wb") as filler:
            while free := shutil.disk_usage(disk).free // 2**12 * 2**12:
                with suppress(OSError):  # the search has written in between
                    os.posix_fallocate(filler.fileno(), os.fstat(filler.fileno()).st_size, free)
        assert search.end() == 1, search.text
        assert "Traceback" not in search.text, search.text
        assert [line.partition(": its")[2] for line in search.lines()] == [
            f" disk is full: make room, then {RESUME}"
        ], search.text
        known = begun_after_mending(disk / "out")
        (disk / "filler").unlink()
        search.resume()
        name = "output's disk full" + (", pack off" if pack == "off" else "")
        record(name, "the driver ends, --resume continues", compare(disk / "out", undisturbed, known))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def begun_after_mending(output: Path) -> set[int]:
    """As `begun`, of a journal whose last line may be cut off."""
    copy = output.parent.parent / "copy"
    copy.mkdir()
    text = (output / "study.log").read_bytes()
    (copy / "study.log").write_bytes(text[: text.rfind(b"\n") + 1])
    return begun(copy)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "hits"), SEARCHES)
def test_a_lost_node_is_made_up_for_by_another(seed, hits, undisturbed, nodes, tmp_path, words, tiny_llama):
    cluster, others = nodes
    output, draw, before, lost = tmp_path / "out", random.Random(f"node {seed}"), {}, 0
    flags = ["--scaling.packs", "1", "--scaling.cpus_per_worker", "1", "--max-failures", str(3 * hits)]
    search = Search(output, words, tiny_llama, *flags, address=cluster.address)

    def trains() -> list:
        return [node for node in others if victims("ray::RayTrainWorker", raylet(node).pid)]

    for after in moments(draw, hits):
        search.wait_for(lambda after=after: reports(output) >= after)
        search.wait_for(trains)
        time.sleep(draw.random())
        for node in trains():
            others.remove(node)
            for process in [raylet(node), *raylet(node).children(recursive=True)]:
                process.kill()
            lost += 1
            others.append(cluster.add_node(num_cpus=2))
        before |= finished(output)
    assert search.end() == 0, search.text
    assert lost
    untouched(output, before)
    difference = compare(output, undisturbed, set(undisturbed))
    for _ in range(lost):
        record("node of the pack lost", "the search continues", difference)


@pytest.mark.slow
def test_a_drained_node_is_left_in_time(undisturbed, nodes, tmp_path, words, tiny_llama):
    """As a spot instance's is that gets notice: no failure is counted, no step is lost."""
    cluster, others = nodes
    output = tmp_path / "out"
    flags = ["--scaling.packs", "1", "--scaling.cpus_per_worker", "1", "--max-failures", "0"]
    search = Search(output, words, tiny_llama, *flags, address=cluster.address)
    search.wait_for(lambda: reports(output) >= 2)
    (drained,) = [n for n in others if victims("ray::RayTrainWorker", raylet(n).pid)]
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "60"]
    ray = str(Path(sys.executable).with_name("ray"))
    drain = [ray, "drain-node", "--address", cluster.address, "--node-id", drained.node_id, *why]
    subprocess.run(drain, check=True, capture_output=True, env=environment())
    assert search.end() == 0, search.text
    assert "pack 0: its node goes away" in search.text
    record("node of the pack drained", "the search continues", compare(output, undisturbed, set(undisturbed)))


@pytest.mark.slow
def test_a_lost_head_is_made_up_for_by_the_same_command(undisturbed, nodes, tmp_path, words, tiny_llama):
    cluster, _ = nodes
    output = tmp_path / "out"
    search = Search(output, words, tiny_llama, "--scaling.packs", "1", address=cluster.address)
    search.wait_for(lambda: reports(output) >= 3)
    for kind in ("gcs_server", "raylet"):
        psutil.Process(cluster.head_node.all_processes[kind][0].process.pid).kill()
    assert search.end(30) == 1, search.text
    (line,) = search.lines()
    assert line.endswith(RESUME)
    known = begun(output)
    early = run([*search.arguments, "--resume"])
    assert early.returncode == 2, early.stderr
    assert "no Ray cluster answers at" in early.stderr
    anew = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    search.resume(anew.address)
    anew.shutdown()
    record("head lost", "the driver ends, --resume continues", compare(output, undisturbed, known))


@pytest.mark.slow
def test_memory_that_runs_out_in_one_trial_fails_that_one(tmp_path, words, tiny_llama):
    """A rank whose matrices no machine holds: the allocator refuses in the midst of the pack's work."""
    output = tmp_path / "out"
    space = "method: lora\nlora: {rank: {choice: [4, 2000000000]}, target_modules: attention}\n"
    flags = ["--trials", "6", "--search.scheduler", "none", "--search.seed", "1"]
    done = run(command(output, words, tiny_llama, *flags, space=space))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((output / "summary.json").read_text())["trials"]
    wrong = [row for row in rows if row["config"]["adapter"].get("rank") == 2000000000]
    assert 0 < len(wrong) < 6
    assert {row["status"] for row in rows if row not in wrong} == {"finished"}
    for row in wrong:
        assert row["status"] == "failed"
        assert "can't allocate memory" in row["reason"]
    record("memory runs out in one trial", "it fails alone, the search continues", 0.0)
