"""A search whose processes are killed at random moments comes to what an undisturbed one comes to."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import optuna
import psutil
import pytest
from test_search import command, environment, run, study

pytestmark = pytest.mark.slow

TRIALS, STEPS = 3, 240
FLAGS = ["--trials", str(TRIALS), "--search.scheduler", "none", "--training.evaluations", "4", "--max-failures", "3"]
SPACE = "method: {choice: [lora, ia3]}\nlearning_rate: {log: [1.0e-3, 1.0e-2]}\n"
# what dies: how its process is called, and the packing that has it
FAULTS = {
    "pack worker": ("ray::RayTrainWorker", "auto"),
    "trial": ("ray::ResourceTrainable", "auto"),
    "controller of the pack": ("ray::TrainController", "auto"),
    "board": ("ray::Board", "auto"),
    "training worker": ("ray::RayTrainWorker", "off"),
    "data task": ("ray::MapBatches|ray::Map|ray::_MapWorker|ray::StatsActor|ray::_StatsActor", "auto"),
    "driver": ("ftray.tune", "auto"),
}
MOMENTS = int(os.environ.get("FTRAY_FAULT_MOMENTS", "1"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, words, tiny_llama):
    """The value of each trial, by number, without any fault."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    done = run(command(output, words, tiny_llama, *FLAGS, space=SPACE, steps=STEPS))
    assert done.returncode == 0, done.stdout + done.stderr
    return values(output)


def values(output: Path) -> dict[int, float]:
    trials = json.loads((output / "summary.json").read_text())["trials"]
    assert {t["status"] for t in trials} == {"finished"}
    return {t["trial"]: t["value"] for t in trials}


def journal(output: Path) -> list[optuna.trial.FrozenTrial]:
    """All trials so far."""
    if not (output / "study.log").exists() or "ftray" not in (output / "study.log").read_text():
        return []
    return study(output).get_trials()


def reports(output: Path) -> int:
    """Rungs that are in the journal."""
    return sum(len(trial.user_attrs.get("reports", [])) for trial in journal(output))


def victims(pattern: str, parent: int) -> list[psutil.Process]:
    """The processes of that search whose title holds one of the names, separated by |."""
    found = []
    for process in [psutil.Process(parent), *psutil.Process(parent).children(recursive=True)]:
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if any(name in title for name in pattern.split("|")):
            found.append(process)
    return found


@pytest.mark.parametrize("moment", range(MOMENTS))
@pytest.mark.parametrize("name", FAULTS)
def test_nothing_is_lost(name, moment, undisturbed, tmp_path, words, tiny_llama):
    pattern, pack = FAULTS[name]
    draw = random.Random(f"{name} {moment}")
    output = tmp_path / "out"
    arguments = command(output, words, tiny_llama, *FLAGS, "--pack", pack, space=SPACE, steps=STEPS)
    with open(tmp_path / "log", "w") as log:
        search = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT, env=environment())
        after = draw.randrange(0, TRIALS * 4 - 2)  # reports
        deadline = time.monotonic() + 240
        while reports(output) < after and search.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        killed = None
        while killed is None and search.poll() is None and time.monotonic() < deadline:
            if found := victims(pattern, search.pid):
                killed = draw.choice(found)
                killed.send_signal(signal.SIGKILL)
            time.sleep(0.05)
        assert killed, (tmp_path / "log").read_text()
        try:
            search.wait(240)
        except subprocess.TimeoutExpired:
            search.kill()
            raise AssertionError("hangs: " + (tmp_path / "log").read_text()) from None
    text = (tmp_path / "log").read_text()
    begun = {trial.number for trial in journal(output) if "config" in trial.user_attrs}
    if search.returncode:
        assert "Traceback" not in text, text
        done = run([*arguments, "--resume"])
        assert done.returncode == 0, text + done.stdout + done.stderr
    got = values(output)
    # a driver that resumes draws anew what had not begun
    begun = begun if search.returncode else set(undisturbed)
    assert {n: got[n] for n in begun} == pytest.approx({n: undisturbed[n] for n in begun}, rel=1e-5)
    states = [trial.state.name for trial in study(output).get_trials()]
    assert states == ["COMPLETE"] * TRIALS
