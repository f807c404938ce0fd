"""Outputs, data and shards in an object store: a real S3 server on loopback, and a machine that keeps nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pytest
import torch
from helpers.faults import raylet, victims
from helpers.object_store import Store
from helpers.searches import command, environment, run_here
from safetensors.torch import load_file

from ftray.adapters.discovery import data_settings, find_adapter
from ftray.cli import main
from ftray.config import Config, ServingConfig
from ftray.errors import UserError
from ftray.reports.status import read
from ftray.search import control
from ftray.search.advisor import Advisor
from ftray.search.control import Requests, ask_to_add, ask_to_stop
from ftray.search.journal import past_trials
from ftray.search.packs import Capacity
from ftray.search.run_manifest import refuse_held, running_since, sole_driver
from ftray.search.sampler import Sampler
from ftray.search.space import load_space
from ftray.serving.adapters import local_adapter
from ftray.serving.catalog import find_catalog, leaderboard, model_of_run
from ftray.storage.location import parse_location
from ftray.storage.object_store import ObjectStoreLocation

SPACE = "method: {choice: [lora, ia3]}\nlearning_rate: {log: [1.0e-3, 1.0e-2]}\n"


def asked(tmp_path: Path, words: str, model: str, output: str, *more: str, steps: int = 18) -> list[str]:
    """As `test_search.command`, with `output` in the store and no directory of this machine but caches."""
    tmp_path.mkdir(exist_ok=True)
    arguments = command(tmp_path / "out", words, model, *more, space=SPACE, steps=steps)
    arguments[arguments.index("--output") + 1] = output
    return arguments


def run(arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=400, env=environment())


def states(output: str) -> list[str]:
    return [trial.state.name for trial in past_trials(ObjectStoreLocation(output) / "study.log")]


def test_a_file_is_written_read_listed_and_removed(store, tmp_path):
    here = ObjectStoreLocation("s3://runs/files?region=us-east-1")
    assert not (here / "a.txt").exists()
    (here / "a.txt").write_text("ä")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt").write_text("c")
    (here / "up").upload(tmp_path)
    assert (here / "a.txt").read_text() == "ä"
    assert str(here / "up" / "b") == "s3://runs/files/up/b?region=us-east-1"
    assert [str(found) for found in here.glob("b/*.txt")] == ["s3://runs/files/up/b/c.txt?region=us-east-1"]
    assert [found.read_text() for found in parse_location(str(here / "up")).glob("*.txt")] == ["c"]
    (here / "a.txt").unlink()
    assert not (here / "a.txt").exists()


def test_one_driver_holds_an_output(store, monkeypatch):
    monkeypatch.setattr("ftray.storage.lock.BEAT", 0.2)
    monkeypatch.setattr("ftray.storage.lock.PATIENCE", 3.0)
    output = ObjectStoreLocation("s3://runs/held")
    with sole_driver(output):
        assert time.time() - running_since(output) < 60
        with pytest.raises(UserError, match="a search is running there"), sole_driver(output):
            pass
        with pytest.raises(UserError, match="a search is running there"):
            refuse_held(output)
        left = (output / ".lock").read_text()
    assert running_since(output) is None
    (output / ".lock").write_text(left)  # as a driver leaves it that is killed
    assert running_since(output) is not None
    refuse_held(output)  # which takes over what nobody writes
    with sole_driver(output):
        assert (output / ".lock").read_text() != left


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("s3://nowhere/out", "NO_SUCH_BUCKET"),
        ("s3://runs/out?endpoint_override=127.0.0.1:9&scheme=http", "can't write there"),
        ("s5://runs/out", "Unrecognized filesystem type"),
    ],
)
def test_a_store_that_can_not_be_written_is_told_before_ray_starts(store, output, reason, capsys):
    with pytest.raises(UserError, match=reason):
        ObjectStoreLocation(output).check_writable()
    assert main(["tune", "--output", output]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert reason in error


def test_wrong_credentials_are_told_on_one_line(store, monkeypatch):
    guarded = Store(INITIAL_NO_AUTH_ACTION_COUNT="0")
    monkeypatch.setenv("AWS_ENDPOINT_URL", guarded.url)
    try:
        done = run([sys.executable, "-m", "ftray.tune", "--output", "s3://runs/secret"])
    finally:
        guarded.process.kill()
        guarded.process.wait()
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1
    assert "s3://runs/secret: can't write there" in done.stderr


@pytest.mark.parametrize("pack", ["auto", pytest.param("off", marks=pytest.mark.slow)])
def test_a_killed_search_goes_on_from_the_store_alone(store, cluster, tmp_path, words, tiny_llama, pack, capsys):
    data = ObjectStoreLocation("s3://runs/records.jsonl")
    data.write_bytes(Path(words).read_bytes())
    output = f"s3://runs/{pack}"
    more = ["--pack", pack, "--trials", "3", "--search.scheduler", "none", "--concurrency", "1"]
    more += ["--data.cache", "s3://runs/shards"]
    first = asked(tmp_path / "one", str(data), tiny_llama, output, *more, steps=60)
    search = subprocess.Popen(first, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment())
    deadline = time.monotonic() + 240
    while "COMPLETE" not in states(output):
        assert time.monotonic() < deadline
        assert search.poll() is None, search.stdout.read().decode()
        time.sleep(0.5)
    assert main(["status", "--run", output]) == 0
    assert "/3 trials over" in capsys.readouterr().out
    assert running_since(ObjectStoreLocation(output))
    search.send_signal(signal.SIGKILL)
    search.wait()
    before = {
        trial.number: trial.user_attrs["reports"]
        for trial in past_trials(ObjectStoreLocation(output) / "study.log")[:1]
    }
    assert not (ObjectStoreLocation(output) / "summary.json").exists()

    second = asked(tmp_path / "two", str(data), tiny_llama, output, *more, "--resume", steps=60)
    done = run_here(second)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((ObjectStoreLocation(output) / "summary.json").read_text())
    assert [trial["status"] for trial in summary["trials"]] == ["finished"] * 3
    assert past_trials(ObjectStoreLocation(output) / "study.log")[0].user_attrs["reports"] == before[0]
    assert states(output) == ["COMPLETE"] * 3
    assert summary["best"]["checkpoint"].startswith(f"{output}/tune/trial-")
    made = {str(file).removeprefix(f"{output}/best/") for file in (ObjectStoreLocation(output) / "best").glob("*")}
    assert {"adapter/adapter_model.safetensors", "adapter/README.md", "merged/model.safetensors"} <= made
    assert not (ObjectStoreLocation(output) / ".lock").exists()
    assert read(ObjectStoreLocation(output)).summary().startswith("3/3 trials over")
    assert f"summary  {output}/summary.json" in done.stdout

    offer = find_catalog(model_of_run(Config(serving=ServingConfig(run=output))))
    assert {"best", "trial-0", "trial-1", "trial-2"} == offer.adapters.keys()
    with local_adapter(offer.adapters["best"]) as directory:
        assert (directory / "adapter_model.safetensors").is_file()
    assert [trial["status"] for trial in leaderboard(output)["trials"]] == ["finished"] * 3
    adapter = find_adapter(output)
    assert data_settings(Config(), adapter).template == "auto"  # by the chat template, which the base has
    assert (adapter / "adapter_model.safetensors").stat().st_size > 0


@pytest.mark.slow
def test_a_killed_training_goes_on_from_the_store_alone(store, tmp_path, words, tiny_llama, capsys):
    output = "s3://runs/trained"
    flags = {
        "--data": words,
        "--model": tiny_llama,
        "--output": output,
        "--data.cache": "s3://runs/train-shards",
        "--data.max_length": "64",
        "--training.steps": "400",
        "--training.evaluations": "4",
        "--model.dtype": "fp32",
    }
    arguments = [sys.executable, "-m", "ftray.train", *(part for pair in flags.items() for part in pair)]
    training = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment())
    deadline = time.monotonic() + 240
    while not (ObjectStoreLocation(output) / "train").glob("checkpoint_*/MANIFEST*.json"):
        assert time.monotonic() < deadline
        assert training.poll() is None, training.stdout.read().decode()
        time.sleep(0.1)
    training.send_signal(signal.SIGKILL)
    training.wait()
    again = run(arguments)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "already holds a run" in again.stderr
    done = run([*arguments, "--resume"])
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [line for line in done.stdout.splitlines() if line.startswith("step ")]

    whole = run([output + "-whole" if argument == output else argument for argument in arguments])
    assert whole.returncode == 0, whole.stdout + whole.stderr
    undisturbed = [line for line in whole.stdout.splitlines() if line.startswith("step ")]
    assert [line.split(",")[:2] for line in undisturbed][-len(losses) :] == [line.split(",")[:2] for line in losses]
    assert len(undisturbed) == 4
    with local_adapter(f"{output}/adapter") as one, local_adapter(f"{output}-whole/adapter") as other:
        one, other = (load_file(found / "adapter_model.safetensors") for found in (one, other))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], rtol=1e-4, atol=1e-6), name
    assert main(["evaluate", "--data", words, "--model", tiny_llama, "--adapter", f"{output}/adapter"]) == 0


@pytest.mark.slow
def test_several_nodes_share_nothing_but_the_store(store, nodes, tmp_path, words, tiny_llama):
    """Both nodes train, one of them is lost, and what it had saved is taken up on another."""
    cluster, others = nodes
    output = "s3://runs/nodes"
    flags = ["--trials", "4", "--search.scheduler", "none", "--scaling.packs", "2", "--scaling.cpus_per_worker", "1"]
    flags += ["--data.cache", "s3://runs/node-shards", "--pack", "2", "--max-failures", "3"]
    arguments = asked(tmp_path, words, tiny_llama, output, *flags, "--training.evaluations", "4", steps=240)
    log = tmp_path / "log"
    with open(log, "w") as file:
        environs = environment() | {"RAY_ADDRESS": cluster.address}
        search = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, env=environs)
    deadline = time.monotonic() + 240
    while len(trains := [n for n in others if victims("ray::RayTrainWorker", raylet(n).pid)]) < 2 or not (
        ObjectStoreLocation(output) / "tune"
    ).glob("trial-*/checkpoint_*/MANIFEST*.json"):
        assert time.monotonic() < deadline, log.read_text()
        assert search.poll() is None, log.read_text()
        time.sleep(0.1)
    for process in [raylet(trains[0]), *raylet(trains[0]).children(recursive=True)]:
        process.kill()
    assert search.wait(400) == 0, log.read_text()
    assert states(output) == ["COMPLETE"] * 4
    summary = json.loads((ObjectStoreLocation(output) / "summary.json").read_text())
    assert [trial["status"] for trial in summary["trials"]] == ["finished"] * 4


@pytest.mark.slow  # a store that does not answer is given up after a minute
def test_a_store_that_goes_away_stops_the_search_and_one_that_comes_back_resumes_it(store, tmp_path, words, tiny_llama):
    output = "s3://runs/outage"
    flags = ["--trials", "3", "--search.scheduler", "none", "--concurrency", "1", "--training.evaluations", "20"]
    arguments = asked(tmp_path, words, tiny_llama, output, *flags, "--search.rungs", "6", steps=300)
    search = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    deadline = time.monotonic() + 240
    while "COMPLETE" not in states(output):
        assert time.monotonic() < deadline
        assert search.poll() is None, search.stderr.read()
        time.sleep(0.5)
    os.kill(store.process.pid, signal.SIGSTOP)
    try:
        log, error = search.communicate(timeout=240)
    finally:
        os.kill(store.process.pid, signal.SIGCONT)
    assert search.returncode == 1, log + error
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("ftray tune:")]
    assert "--resume continues" in line
    done = run([*arguments, "--resume"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(output) == ["COMPLETE"] * 3


def test_what_is_asked_through_a_store_comes_into_the_journal(store, tmp_path, monkeypatch):
    store = Store()  # of its own: it will go away
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    boto3.client("s3").create_bucket(Bucket="runs")
    output = ObjectStoreLocation("s3://runs/asked")
    cfg = Config.model_validate({"search": {"trials": 4}})
    (tmp_path / "space.yaml").write_text(SPACE)
    space = load_space(str(tmp_path / "space.yaml"))
    journal = output / "study.log"
    sampler = Sampler(space, cfg, 100, journal, lambda: 3, Advisor(space, cfg, 64, 12, 10))
    assert sampler.suggest("a")["number"] == 0
    ask_to_stop(journal, 0)
    added = {"adapter": {"method": "ia3"}, "training": {"learning_rate": 0.002}}
    assert ask_to_add(journal, cfg, space, added) == 1
    with pytest.raises(UserError, match="none of that number"):
        ask_to_stop(journal, 5)
    driver = Requests(sampler, None, Capacity(1), None, False)
    monkeypatch.setattr(control, "LOOKS", 0)
    driver.on_step_begin(0, [])
    assert driver.stopping == {0}
    assert {"number": 1, **added} == sampler.suggest("b")
    assert not (output / "requests").glob("*.json")
    with pytest.raises(UserError, match="trial 1 has this configuration already"):
        ask_to_add(journal, cfg, space, added)  # as another process reads it
    assert not sampler.broken
    store.process.kill()
    store.process.wait()
    sampler.suggest("c")
    assert "s3://runs/asked/study.log can't be written" in sampler.broken
