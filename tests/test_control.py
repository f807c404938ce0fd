"""What a user asks of a search that runs, from other processes."""

import json
import os
import pty
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
import ray
from helpers.results import write_search
from helpers.searches import command, environment, run_here, study
from ray.util.placement_group import placement_group, placement_group_table

from ftray.cli import main
from ftray.config import Config, config_from
from ftray.errors import UserError
from ftray.reports.live import LiveRun
from ftray.reports.status import read, searched
from ftray.search.advisor import Advisor
from ftray.search.control import ask_to_add, ask_to_pause, ask_to_stop
from ftray.search.live import PROVING, SEARCHING, last_beats, note
from ftray.search.run_manifest import sole_driver, write_definition
from ftray.search.sampler import Sampler
from ftray.search.space import load_space
from ftray.search.trial_status import TrialStatus
from ftray.search.trial_worker import release_until_none_is_left
from ftray.storage.local import LocalLocation

SPACE = "method: lora\nlearning_rate: {log: [1.0e-4, 1.0e-3]}\n"
STEPS = 10000


def wait_for(condition, process: subprocess.Popen, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.3)
    return found


def test_a_running_search_is_seen_and_led(cluster, tmp_path, words, tiny_llama, capsys):
    output = tmp_path / "out"
    flags = ["--trials", "4", "--concurrency", "2", "--search.scheduler", "none", "--training.evaluations", "100"]
    arguments = command(output, words, tiny_llama, *flags, space=SPACE, steps=STEPS)
    joined, pipe = environment(joined=True), subprocess.PIPE
    process = subprocess.Popen(arguments, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=joined)
    on = ["--run", str(output)]
    try:
        assert main(["status", *on]) == 2
        wait_for(lambda: (output / "study.log").exists() and (output / "data.json").exists(), process)

        def both_report():
            seen = read(LocalLocation(output))
            return seen if sum(t["rung"] > 0 for t in seen.trials) == 2 else None

        seen = wait_for(both_report, process)
        assert [t["state"] for t in seen.trials] == ["runs", "runs"]
        assert (seen.total, seen.rungs, seen.budget) == (4, 100, STEPS * 8)
        assert all(t["tokens_per_second"] > 0 for t in seen.trials)
        capsys.readouterr()
        assert main(["status", *on]) == 0
        assert "0/4 trials over, best validation_loss" in capsys.readouterr().out

        again = run_here([*arguments, "--resume"])
        assert again.returncode == 2
        assert "a search is running there" in again.stderr
        assert again.stderr.count("\n") == 1

        added = '{"adapter": {"method": "ia3"}, "training": {"learning_rate": 0.05}}'
        assert main(["add", added, *on]) == 0
        assert capsys.readouterr().out == "trial 2 is the next to begin\n"
        assert main(["add", added, *on]) == 2
        assert "trial 2 has this configuration already" in capsys.readouterr().err
        assert main(["add", "{adapter: {method: ia3}, training: {beta: 1}}", *on]) == 2
        assert "training.beta: what is learnt here has no such setting" in capsys.readouterr().err
        assert [t["state"] for t in read(LocalLocation(output)).trials] == ["runs", "runs", "waits"]
        assert main(["stop", "2", *on]) == 2
        assert "it does not run (waiting)" in capsys.readouterr().err

        for number in range(4):
            wait_for(
                lambda n=number: any(t["trial"] == n and t["rung"] for t in read(LocalLocation(output)).trials), process
            )
            assert main(["stop", str(number), *on]) == 0
        output_text, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output_text
    finally:
        process.kill()
    trials = {t["trial"]: t for t in json.loads((output / "summary.json").read_text())["trials"]}
    assert {t["status"] for t in trials.values()} == {"stopped early"}
    assert all(0 < t["records"] < STEPS * 8 for t in trials.values())
    assert any(t["records"] % (STEPS * 8 // 100) for t in trials.values())  # not only at a rung
    assert trials[2]["config"] == json.loads(added)
    assert [t.state.name for t in study(output).get_trials()] == ["PRUNED"] * 4
    capsys.readouterr()
    assert main(["status", *on]) == 0
    assert "4/4 trials over" in capsys.readouterr().out


def test_a_search_pauses_trains_on_ends_when_asked_and_can_be_resumed(cluster, tmp_path, words, tiny_llama, capsys):
    output = tmp_path / "out"
    flags = ["--trials", "6", "--concurrency", "2", "--search.scheduler", "none", "--training.evaluations", "2"]
    arguments = command(output, words, tiny_llama, *flags, space=SPACE, steps=STEPS)
    joined, pipe = environment(joined=True), subprocess.PIPE
    process = subprocess.Popen(arguments, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=joined)
    on = ["--run", str(output)]

    def seen():
        return read(LocalLocation(output))

    def records():
        return [t["records"] for t in seen().trials]

    try:
        wait_for(lambda: (output / "data.json").exists() and (output / "study.log").exists(), process)
        wait_for(lambda: len(records()) == 2 and min(records()) > 0, process)  # no rung is reached yet
        assert seen().memory["cpu"] > 2**20
        wait_for(lambda: 0 < (seen().progress or 0) < 1 and seen().seconds_left, process)
        assert main(["pause", *on]) == 0
        wait_for(lambda: len([*output.glob("tune/trial-*/checkpoint_*/*")]) > 0, process)
        assert "lets it train on" in capsys.readouterr().out
        wait_for(lambda: not any(beat["tokens_per_second"] for beat in last_beats(LocalLocation(output))), process)
        time.sleep(3)  # the driver may have looked just before
        kept, left = records(), seen().seconds_left
        assert seen().summary().endswith("paused")
        assert [t["state"] for t in seen().trials] == ["paused", "paused"]
        time.sleep(3)
        assert (records(), seen().seconds_left) == (kept, left)
        assert main(["pause", *on, "--off"]) == 0
        wait_for(lambda: min(records()) > max(kept), process)
        assert "left" in seen().summary()
        assert [t["state"] for t in seen().trials] == ["runs", "runs"]

        assert main(["stop", "--prove", *on]) == 0
        told, _ = process.communicate(timeout=120)
        assert process.returncode == 0, told
    finally:
        process.kill()
    summary = json.loads((output / "summary.json").read_text())
    trials = {t["trial"]: t for t in summary["trials"]}
    assert {n: t["status"] for n, t in trials.items()} == {0: "unfinished", 1: "unfinished"}
    assert all(0 < t["records"] < STEPS * 4 and t["value"] and t["checkpoint"] for t in trials.values())
    assert summary["proof"]["metrics"]["loss"]["best"]
    assert summary["best"]["trial"] == min(trials.values(), key=lambda t: t["value"])["trial"]
    assert main(["stop", "--prove", *on]) == 2
    assert "no search is running there" in capsys.readouterr().err
    done = run_here([*arguments, "--resume", "--time-budget", "1"])
    assert done.returncode == 0, done.stdout + done.stderr  # what was asked of the driver before is not asked of it
    assert "ending" not in done.stdout
    again = {t["trial"]: t for t in json.loads((output / "summary.json").read_text())["trials"]}
    assert all(again[n]["records"] >= trials[n]["records"] for n in trials)


def test_a_trial_at_a_rung_is_called_the_same_by_the_search_and_by_all_who_look_on(
    cluster, tmp_path, words, tiny_llama, capsys
):
    """One of two trains while the other waits for it: Tune's live table, on a terminal, and the command's."""
    output = tmp_path / "out"
    flags = ["--trials", "2", "--concurrency", "1", "--pack", "off", "--training.evaluations", "3"]
    arguments = command(output, words, tiny_llama, *flags, space=SPACE, steps=200)
    own, shown = pty.openpty()
    env = environment(joined=True) | {"TERM": "xterm", "COLUMNS": "200", "LINES": "50"}
    process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=shown, stderr=shown, env=env)
    os.close(shown)
    told: list[bytes] = []

    def read_all():
        with suppress(OSError):  # the terminal is gone with what wrote to it
            while part := os.read(own, 65536):
                told.append(part)

    reader = threading.Thread(target=read_all)
    reader.start()

    def states():
        return [t["state"] for t in read(LocalLocation(output)).trials]

    try:
        wait_for(lambda: (output / "data.json").exists() and (output / "study.log").exists(), process)
        wait_for(lambda: states() == ["waits at a rung", "runs"], process)
        page = LiveRun(LocalLocation(output)).state()
        assert {t["trial"]: (t["state"], t["runs"]) for t in page["trials"]} == {
            0: ("waits at a rung", False),
            1: ("runs", True),
        }
        assert main(["status", "--run", str(output)]) == 0
        assert "waits at a rung" in capsys.readouterr().out
        process.terminate()
        assert process.wait(60) == 143
    finally:
        process.kill()
        reader.join()
        os.close(own)
        drawn = b"".join(told).decode(errors="replace")
        print(drawn[-3000:])  # for whoever wants to know why the search has ended
    assert "waits at a rung" in drawn
    assert "paused" not in drawn
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != 4:  # whatever was starting at that moment
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_trainer_that_starts_its_workers_once_more_while_it_is_stopped_holds_nothing(cluster):
    """As Train's controllers do whose workers die before them."""

    @ray.remote(num_cpus=0)
    class Controller:
        def start(self, seconds):
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                group = placement_group([{"CPU": 1}])
                assert group.wait(10)
                while time.monotonic() < until and placement_group_table(group)["state"] != "REMOVED":
                    time.sleep(0.05)

    controller = Controller.remote()
    started = controller.start.remote(2.0)
    time.sleep(0.5)
    release_until_none_is_left()
    ray.get(started)
    assert ray.available_resources()["CPU"] == 4


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["status"], "holds no search: name one by --run"),
        (["stop"], "which trial?"),
        (["stop", "one"], "request.trial"),
        (["stop", "1"], "holds no search"),
        (["stop", "1", "--prove"], "a trial, or --prove?"),
        (["stop", "--prove"], "holds no search"),
        (["pause"], "holds no search"),
        (["add"], "which configuration?"),
        (["add", "rank: 3"], "not a configuration: 'rank: 3'"),
        (["add", "adapter: {method: lorra}"], "lorra"),
        (["add", "adapter: {method: lora}"], "holds no search"),
        (["clone"], "which trial?"),
        (["clone", "1"], "holds no search"),
    ],
)
def test_what_can_not_be_asked(arguments, reason, tmp_path, capsys):
    assert main([*arguments, "--run", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_the_module_is_a_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "ftray.status", "--run", str(tmp_path)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")


def test_what_is_asked_on_a_shared_disk_is_in_the_journal_at_once(tmp_path):
    """Without a driver too: the next one finds it."""
    (tmp_path / "space.yaml").write_text("method: lora\nlearning_rate: {log: [1.0e-3, 1.0e-2]}\n")
    cfg, space = Config.model_validate({"search": {"trials": 4}}), load_space(str(tmp_path / "space.yaml"))
    journal = LocalLocation(tmp_path / "study.log")
    assert Sampler(space, cfg, 100, journal, lambda: 3, Advisor(space, cfg, 64, 12, 10)).suggest("a")["number"] == 0
    ask_to_stop(journal, 0)
    added = {"adapter": {"method": "lora"}, "training": {"learning_rate": 0.002}}
    assert ask_to_add(journal, cfg, space, added) == 1
    with pytest.raises(UserError, match="trial 1 has this configuration already"):
        ask_to_add(journal, cfg, space, added)
    running, waiting = study(tmp_path).get_trials()
    assert (running.state.name, running.user_attrs["stop"]) == ("RUNNING", True)
    assert (waiting.state.name, waiting.user_attrs["added"]) == ("WAITING", added)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["space.yaml", "study.log"]  # nothing is left beside it


def test_states_are_what_the_driver_notes_and_users_ask_for(tmp_path):
    output = tmp_path / "out"
    write_search(output, trials=4, answers=3)
    here, cfg, space = LocalLocation(output), searched(LocalLocation(output)), load_space(str(output / "space.yaml"))
    for name in ("study.log", "summary.json"):
        (output / name).unlink()
    sampler = Sampler(space, cfg, 100, here / "study.log", lambda: 9, Advisor(space, cfg, 64, 12, 10))
    for trial in "abc":
        sampler.suggest(trial)

    def states():
        return [trial["state"] for trial in read(here).trials]

    assert states() == ["unfinished"] * 3
    with sole_driver(here):
        assert states() == ["runs"] * 3  # as far as is known
        note(here, SEARCHING, 10, 10, None, {0: TrialStatus.AT_RUNG, 1: TrialStatus.RUNNING})
        assert states() == ["waits at a rung", "runs", "waits"]  # the last one is known to the journal alone
        ask_to_pause(here, cfg, space, True)
        assert states() == ["waits at a rung", "paused", "waits"]
        assert read(here).phase == "paused"
        ask_to_stop(here / "study.log", 0)
        assert states() == ["stopping", "paused", "waits"]
        note(here, PROVING)
        assert states() == ["unfinished"] * 3


def test_settings_of_another_objective_are_refused(tmp_path, tiny_llama, capsys):
    space = load_space("quick")
    cfg = config_from({"task": "KTO", "data": {"source": "unread"}, "model": {"name": tiny_llama}})
    write_definition(cfg.model_copy(update={"output": str(tmp_path)}), space, LocalLocation(tmp_path))
    journal = LocalLocation(tmp_path / "study.log")
    Sampler(space, cfg, 100, journal, lambda: 3, Advisor(space, cfg, 64, 12, 10)).suggest("a")
    for asked in (["add", "{adapter: {method: ia3}, training: {gamma: 1}}"], ["clone", "0", "--training.gamma", "1"]):
        capsys.readouterr()
        assert main([*asked, "--run", str(tmp_path)]) == 2
        assert f"ftray {asked[0]}: error: training.gamma: what is learnt here has no such" in capsys.readouterr().err


def test_a_clone_goes_on_from_the_weights_of_a_trial_with_settings_of_its_own(
    cluster, tmp_path, words, tiny_llama, capsys
):
    """With hardly any rate it stays where the trial was; a trial that begins anew would be where the base is."""
    space = "method: lora\nlora:\n  rank: 4\n  learning_rate: {log: [1.0e-2, 2.0e-2]}\n"
    flags = ["--search.scheduler", "none", "--training.evaluations", "1"]
    output = tmp_path / "out"
    arguments = command(output, words, tiny_llama, "--trials", "2", *flags, space=space, steps=12)
    done = run_here(arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    on = ["--run", str(output)]
    for asked, reason in {
        "--adapter.rank 8": "adapter.rank 8: the weights of trial 1 are of 4, and fit no other; ftray add begins",
        "--adapter.method ia3": "adapter.method ia3: the weights of trial 1 are of lora, and fit no other",
        "--adapter.target_modules mlp": "adapter.target_modules mlp: the weights of trial 1 are of ",
        "--adapter.use_dora true": "adapter.use_dora",
        "--training.zero_stage 3": "training.zero_stage 3: a trial can't begin with the weights of another",
        "--training.beta 1": "training.beta: what is learnt here has no such setting",
        "--training.learning_rate -1": "training.learning_rate: must be greater than 0",
    }.items():
        capsys.readouterr()
        assert main(["clone", "1", *on, *asked.split()]) == 2
        told = capsys.readouterr().err
        assert reason in told
        assert told.count("\n") == 1
    assert main(["clone", "7", *on]) == 2
    assert "trial 7: the search has none of that number" in capsys.readouterr().err

    assert main(["clone", "1", *on, "--training.learning_rate", "1e-9", "--adapter.dropout", "0.1"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("trial 2 has the weights of trial 1, checkpoint_00000012\n")
    assert main(["clone", "1", *on, "--training.learning_rate", "1e-9"]) == 0  # another one is not the same
    done = run_here([*arguments, "--resume", "--trials", "4"])
    assert done.returncode == 0, done.stdout + done.stderr
    trials = {t["trial"]: t for t in json.loads((output / "summary.json").read_text())["trials"]}
    for number in (2, 3):
        assert trials[number]["status"] == "finished"
        assert trials[number]["value"] == pytest.approx(trials[1]["value"], abs=1e-4)
        assert trials[number]["config"]["clone"]["trial"] == 1
    assert trials[2]["config"]["adapter"] == trials[1]["config"]["adapter"] | {"dropout": 0.1}
    assert trials[0]["value"] != pytest.approx(trials[1]["value"], abs=1e-3)
    assert not study(output).get_trials()[2].params  # nobody learns from it
