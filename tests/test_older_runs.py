"""What an earlier layout of the code left on disk still resumes and is still served.

The fixture was made by version 0.1.0 before its rooms were moved: a search of two trials and a training run, over a
tiny model. Its paths were relative to the folder that it is unpacked into.
"""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import httpx
import pytest

FIXTURE = Path(__file__).parent / "fixtures" / "run_of_the_first_layout.tar.gz"
SETTINGS = ["--data", "records.jsonl", "--model", "model", "--data.max_length", "64"]
SETTINGS += ["--training.steps", "4", "--training.batch_size", "4"]


@pytest.fixture
def old(tmp_path):
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def command(name: str, *arguments: str, directory: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"ftray.{name}", *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_search_resumes_with_the_trials_that_it_had(old):
    before = {row["trial"]: row for row in json.loads((old / "run" / "summary.json").read_text())["trials"]}
    flags = ["--space", "space.yaml", "--trials", "3", "--evaluation.max_new_tokens", "8", "--output", "run"]
    command("tune", *SETTINGS, *flags, "--resume", directory=old)
    after = {row["trial"]: row for row in json.loads((old / "run" / "summary.json").read_text())["trials"]}
    assert sorted(before) == [0, 1]
    assert sorted(after) == [0, 1, 2]
    for number, row in before.items():
        assert (after[number]["value"], after[number]["curve"]) == (row["value"], row["curve"])
    assert after[2]["value"] is not None


def test_a_training_run_resumes_at_its_end(old):
    before = (old / "trained" / "adapter" / "adapter_model.safetensors").read_bytes()
    printed = command("train", *SETTINGS, "--output", "trained", "--resume", directory=old)
    assert "step 4:" in printed
    assert (old / "trained" / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_a_search_is_served(old):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = [sys.executable, "-m", "ftray.serve", "--run", "run", "--model.dtype", "fp32", "--port", "8371"]
    with open(old / "log", "w") as log:
        process = subprocess.Popen(arguments, cwd=old, stdout=log, stderr=subprocess.STDOUT)
    try:
        while "endpoint http" not in (old / "log").read_text():
            assert process.poll() is None, (old / "log").read_text()
            time.sleep(0.2)
        body = {"model": "best", "prompt": "the cat\n", "max_tokens": 6, "temperature": 0}
        answer = httpx.post("http://127.0.0.1:8371/v1/completions", json=body, timeout=120).json()
    finally:
        process.terminate()
        process.wait(60)
    tokenizer = AutoTokenizer.from_pretrained(old / "model")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(old / "model"), old / "run/best/adapter")
    ids = tokenizer("the cat\n", return_tensors="pt")["input_ids"]
    wanted = model.eval().generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert answer["choices"][0]["text"] == tokenizer.decode(wanted, skip_special_tokens=True)
