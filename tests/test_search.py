"""Whole searches, as a user runs them: a process of its own, a real cluster, killed and resumed."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import yaml
from helpers.faults import victims
from helpers.searches import command, environment, finished, run, run_here, study
from helpers.servers import serving_here


@pytest.fixture(scope="module")
def searched(tmp_path_factory, words, tiny_llama):
    """One search of four trials, ASHA on."""
    output = tmp_path_factory.mktemp("search") / "out"
    done = run(command(output, words, tiny_llama, "--trials", "4"))
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done


def test_a_search_leaves_what_it_promises(searched):
    output, done = searched
    names = {p.name for p in output.iterdir()}
    assert {"summary.json", "leaderboard.csv", "best", "study.log", "tune", "config.yaml"} <= names
    assert {p.name for p in output.rglob(".*") if p.suffix != ".crc" and "tune" not in p.parts} == {".lock"}
    summary = json.loads((output / "summary.json").read_text())
    values = [t["value"] for t in summary["trials"]]
    assert len(values) == 4
    assert values == sorted(values)
    assert summary["best"]["value"] == values[0]
    for name, metric in summary["proof"]["metrics"].items():
        if metric["interval"] is None:  # all records alike, as where nothing is right before and after
            assert metric["reason"].startswith("the same on all "), name
            continue
        low, high = metric["interval"]
        assert low <= metric["difference"] <= high, name
    assert summary["proof"]["metrics"]["loss"]["best"] < summary["proof"]["metrics"]["loss"]["base"]
    rows = (output / "leaderboard.csv").read_text().splitlines()
    assert len(rows) == 5
    assert "leaderboard" in done.stdout
    assert "ftray serve --run" in done.stdout
    assert "Traceback" not in done.stderr


def test_paths_may_be_relative_and_have_any_letters(cluster, words, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--trials", "1", "--data.cache", "données", "--output", "été"]
    done = run_here(command(tmp_path / "out", words, tiny_llama, *flags, steps=2))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "été" / "summary.json").exists()
    assert list((tmp_path / "données").rglob("*.parquet"))


def test_nothing_of_a_search_stays_in_a_ray_that_goes_on(cluster, words, tiny_llama, tmp_path):
    flags = ["--trials", "1", "--data.cache", str(tmp_path)]
    assert run_here(command(tmp_path / "out", words, tiny_llama, *flags, steps=2)).returncode == 0
    deadline = time.monotonic() + 60
    while left := victims("TrialBroker", os.getpid()):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def test_trial_0_is_the_default_configuration(searched):
    output, _ = searched
    summary = json.loads((output / "summary.json").read_text())
    first = next(t for t in summary["trials"] if t["trial"] == 0)
    wanted = {"method": "lora", "rank": 8, "alpha": 16, "dropout": 0.05, "target_modules": "attention-qv"}
    assert first["config"]["adapter"] == wanted


def test_no_terminal_no_noise(searched):
    _, done = searched
    for noise in ("raylet", "WARNING", "INFO", "DeepSpeed", "Traceback", "it/s", "[I "):
        assert noise not in done.stdout, noise
    assert "\x1b[" not in done.stdout
    assert "records: validation_loss" in done.stdout


def test_artifacts_load_without_ftray(searched, tiny_llama):
    """Plain transformers and PEFT, in a process that imports nothing of ours, agree with each other."""
    output, _ = searched
    code = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base = AutoModelForCausalLM.from_pretrained({tiny_llama!r}, dtype=torch.float32)
adapted = PeftModel.from_pretrained(base, {str(output / "best/adapter")!r}).eval()
merged = AutoModelForCausalLM.from_pretrained({str(output / "best/merged")!r}, dtype=torch.float32).eval()
AutoTokenizer.from_pretrained({str(output / "best/adapter")!r})
ids = AutoTokenizer.from_pretrained({str(output / "best/merged")!r})("a b c\\n", return_tensors="pt")["input_ids"]
a, m = adapted(ids).logits, merged(ids).logits
with adapted.disable_adapter():
    assert (adapted(ids).logits - a).abs().max() > 1e-3
torch.testing.assert_close(a, m, rtol=0, atol=1e-4 * a.abs().max().item())
assert "ftray" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=output)
    assert done.returncode == 0, done.stderr


def test_optuna_dashboard_opens_the_study(searched):
    output, _ = searched
    with server("optuna-dashboard", str(output / "study.log")) as url:
        study = shown(f"{url}/api/studies/0")
    assert [t["number"] for t in study["trials"]] == [0, 1, 2, 3]
    assert study["trials"][0]["intermediate_values"]


def test_the_printed_command_serves_the_best(searched):
    _, done = searched
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("serve ")]
    with server(*line.split()[1:]) as url:
        assert shown(f"{url}/health") == {"status": "ok"}
        body = {"model": "best", "prompt": "a b c\n", "max_tokens": 5, "temperature": 0}
        headers = {"Content-Type": "application/json"}
        answer = shown(urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers))
    assert answer["usage"]["completion_tokens"] > 0


def test_the_merged_model_is_served_alone(searched, cluster):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output, _ = searched
    with serving_here() as begin:
        url = begin("--run", str(output), "--merged")
        assert shown(f"{url}/health") == {"status": "ok"}
        assert [model["id"] for model in shown(f"{url}/v1/models")["data"]] == ["best"]
        body = {"model": "best", "prompt": "a b c\n", "max_tokens": 8, "temperature": 0}
        headers = {"Content-Type": "application/json"}
        answer = shown(urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers))
    merged = output / "best" / "merged"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    inputs = tokenizer(body["prompt"], return_tensors="pt")
    wanted = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer["choices"][0]["text"] == tokenizer.decode(wanted, skip_special_tokens=True)


@contextmanager
def server(program: str, *arguments: str) -> Iterator[str]:
    """A program of this environment that listens on a port of its own; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name(program)), *arguments, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def shown(url: str | urllib.request.Request) -> dict:
    """The page's JSON, as soon as the server is up."""
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def test_a_search_that_is_refused_after_ray_has_begun_leaves_none_of_it(tmp_path, words, tiny_llama):
    arguments = command(tmp_path / "out", words, tiny_llama, space="method: lora\nlora: {target_modules: q_prj}")
    own = environment() | {"FTRAY_TEST": str(tmp_path)}  # all its processes inherit it
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=own)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert "did you mean q_proj" in line
    deadline = time.monotonic() + 20
    while left := [process for process in psutil.process_iter() if _has(process, "FTRAY_TEST", str(tmp_path))]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def _has(process: psutil.Process, name: str, value: str) -> bool:
    """Whether a process lives with this in its environment."""
    with suppress(psutil.Error):
        return process.environ().get(name) == value
    return False


def test_a_second_search_on_the_same_output_is_refused(searched, words, tiny_llama):
    output, _ = searched
    done = run_here(command(output, words, tiny_llama))
    assert done.returncode == 2
    assert "already holds a search" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow  # test_storage.py and test_faults.py have quick ones
@pytest.mark.parametrize(("pack", "trials", "steps"), [("auto", 6, 150), ("off", 3, 18)])
def test_a_killed_search_resumes_without_running_a_finished_trial_again(
    cluster, tmp_path, words, tiny_llama, pack, trials, steps
):
    output = tmp_path / "out"
    more = ["--pack", pack, "--trials", str(trials), "--search.scheduler", "none", "--concurrency", "2"]
    arguments = command(output, words, tiny_llama, *more, "--resume", steps=steps)  # one that begins as it continues
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment())
    deadline = time.monotonic() + 240
    while not finished(output) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(2)  # the workers of the dead driver may be about to write
    before = finished(output)
    assert before
    assert len(before) < trials
    assert not (output / "summary.json").exists()

    done = run_here(arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    after = finished(output)
    assert len(after) == trials
    assert {path: after[path] for path in before} == before
    summary = json.loads((output / "summary.json").read_text())
    assert [t["status"] for t in summary["trials"]] == ["finished"] * trials
    states = [t.state.name for t in study(output).trials]
    assert states.count("COMPLETE") == trials
    assert "RUNNING" not in states


LISTS = """
method: lora
learning_rate: 5.0e-3
lora:
  target_modules: {choice: [[q_proj, v_proj], [q_proj], all-linear]}
  rank_pattern: {choice: [{}, {q_proj: 2}]}
"""


def test_a_search_over_lists_goes_on_and_writes_them_as_they_are(cluster, tmp_path, words, tiny_llama):
    output = tmp_path / "out"
    for trials in ("4", "9"):  # of which the first three are drawn at random
        done = run_here(command(output, words, tiny_llama, "--trials", trials, "--resume", space=LISTS, steps=4))
        assert done.returncode == 0, done.stdout + done.stderr
    given = yaml.safe_load(LISTS)["lora"]
    summary = json.loads((output / "summary.json").read_text())
    with open(output / "leaderboard.csv", newline="") as file:
        written = {int(row["trial"]): row for row in csv.DictReader(file)}
    assert len(summary["trials"]) == 9
    for trial in summary["trials"]:
        if trial["trial"] == 0:
            continue
        for name, domain in given.items():
            value = trial["config"]["adapter"][name]
            assert value in domain["choice"]
            in_file = written[trial["trial"]][name]
            assert (in_file if isinstance(value, str) else json.loads(in_file)) == value
    assert yaml.safe_load((output / "space.yaml").read_text())["lora"] == given


def test_a_trial_that_diverges_is_recorded_and_the_search_goes_on(cluster, tmp_path, words, tiny_llama):
    output = tmp_path / "out"
    space = "method: lora\nlearning_rate: {choice: [1.0e+30]}\nweight_decay: 0.1\n"
    done = run_here(command(output, words, tiny_llama, "--trials", "2", "--search.scheduler", "none", space=space))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((output / "summary.json").read_text())
    assert [(t["trial"], t["status"]) for t in summary["trials"]] == [(0, "finished"), (1, "failed")]
    assert "diverged: " in summary["trials"][1]["reason"]
    assert [t.state.name for t in study(output).trials] == ["COMPLETE", "FAIL"]


@pytest.mark.slow
def test_the_best_of_a_quantised_search_is_merged_in_full_precision(tmp_path, words, tiny_llama):
    output = tmp_path / "out"
    space = "method: lora\nlearning_rate: {log: [5.0e-3, 1.0e-2]}\n"
    flags = ["--trials", "2", "--model.quantization", "4bit"]
    done = run(command(output, words, tiny_llama, *flags, space=space))
    assert done.returncode == 0, done.stdout + done.stderr
    proof = json.loads((output / "summary.json").read_text())["proof"]
    metrics = proof["metrics"]["loss"]
    assert metrics["best"] < metrics["base"]
    # the base that the adapter was trained on is the rounded one, so the merged model is that one too
    assert proof["merged"]["loss"] == pytest.approx(metrics["best"], abs=1e-3)
    assert f"loss {proof['merged']['loss']:.4g} without quantisation" in done.stdout
    assert "quantization_config" not in json.loads((output / "best" / "merged" / "config.json").read_text())


def test_a_time_budget_leaves_a_usable_result(cluster, tmp_path, words, tiny_gpt2):
    output = tmp_path / "out"
    more = ["--trials", "40", "--time-budget", "5", "--search.scheduler", "hyperband", "--pack", "off"]
    more += ["--concurrency", "2"]
    done = run_here(command(output, words, tiny_gpt2, *more, space="method: {choice: [ia3, lora]}"))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((output / "summary.json").read_text())
    assert summary["best"]["trial"] in (0, 1)
    assert len(summary["trials"]) < 40
    assert (output / "best" / "merged" / "config.json").exists()


def test_ctrl_c_leaves_a_usable_result(cluster, tmp_path, words, tiny_llama):
    output = tmp_path / "out"
    arguments = command(output, words, tiny_llama, "--trials", "99", "--search.scheduler", "none", steps=60)
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(joined=True),
    )
    deadline = time.monotonic() + 240
    while not finished(output) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=200)
    assert process.returncode in (0, 130), text
    summary = json.loads((output / "summary.json").read_text())
    assert summary["best"]
    assert summary["proof"]
    assert (output / "best" / "merged" / "config.json").exists()


def test_a_killed_training_run_resumes_to_the_same_losses(cluster, tmp_path, words, tiny_llama):
    def arguments(output: str) -> list[str]:
        flags = ["--data", words, "--model", tiny_llama, "--method", "lora", "--output", str(tmp_path / output)]
        settings = ["--training.steps", "120", "--training.evaluations", "12", "--data.max_length", "64"]
        cache = ["--data.cache", str(tmp_path / "shards"), "--model.dtype", "fp32"]
        return [sys.executable, "-m", "ftray.train", *flags, *settings, *cache]

    undisturbed = run_here(arguments("whole"))
    assert undisturbed.returncode == 0, undisturbed.stdout + undisturbed.stderr
    joined, pipe = environment(joined=True), subprocess.PIPE
    process = subprocess.Popen(arguments("killed"), stdout=pipe, stderr=pipe, env=joined)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed" / "train").glob("checkpoint_*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "adapter").exists()
    resumed = run_here([*arguments("killed"), "--resume"])
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr

    def losses(text: str) -> list[str]:
        return [line.rpartition(",")[0] for line in text.splitlines() if line.startswith("step ")]

    assert len(losses(undisturbed.stdout)) == 12
    assert losses(resumed.stdout) == losses(undisturbed.stdout)
    assert (tmp_path / "killed" / "adapter" / "adapter_model.safetensors").exists()
