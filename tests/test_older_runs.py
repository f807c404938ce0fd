"""What an earlier layout of the code left on disk still resumes and is still served.

The fixture was made by version 0.1.0 before its rooms were moved: a search of two trials and a training run, over a
tiny model. Its paths were relative to the folder that it is unpacked into.
"""

import json
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from helpers.ports import free_port
from helpers.searches import environment

FIXTURE = Path(__file__).parent / "fixtures" / "run_of_the_first_layout.tar.gz"
SETTINGS = ["--data", "records.jsonl", "--model", "model", "--data.max_length", "64"]
SETTINGS += ["--training.steps", "4", "--training.batch_size", "4"]
RESUMED = ["--space", "space.yaml", "--trials", "3", "--evaluation.max_new_tokens", "8", "--output", "run", "--resume"]
ONE_AFTER_ANOTHER = """
import json, sys
from ftray.cli import main
for arguments in json.loads(sys.argv[1]):
    print("command", *arguments, flush=True)
    code = main(arguments)
    print("exit code", code, flush=True)
"""
ASKED = {"model": "best", "prompt": "the cat\n", "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """What each command makes of it, one after another in one process: the search is served before it is resumed.

    Gives `before` and `after`, the folder then and now; the `answer` of the endpoint; what was `printed`, by command.
    """
    before, after = (tmp_path_factory.mktemp("old") for _ in range(2))
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(before, filter="data")
    shutil.copytree(before, after, dirs_exist_ok=True)
    port, log = free_port(), after / "log"
    served = ["serve", "--run", "run", "--model.dtype", "fp32", "--port", str(port)]
    resumed = [["train", *SETTINGS, "--output", "trained", "--resume"], ["tune", *SETTINGS, *RESUMED]]
    command = [sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps([served, *resumed])]
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=after, stdout=file, stderr=subprocess.STDOUT, env=environment())
    try:
        while "endpoint http" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=ASKED, timeout=120).json()
        process.terminate()
        assert process.wait(400) == 0, log.read_text()
    finally:
        process.kill()
    printed = {part.split()[0]: part for part in log.read_text().split("command ")[1:]}
    assert [part.rstrip().endswith("exit code 0") for part in printed.values()] == [True] * 3, log.read_text()
    return SimpleNamespace(before=before, after=after, answer=answer, printed=printed)


def rows(folder: Path) -> dict[int, dict]:
    return {row["trial"]: row for row in json.loads((folder / "run" / "summary.json").read_text())["trials"]}


def test_a_search_resumes_with_the_trials_that_it_had(old):
    before, after = rows(old.before), rows(old.after)
    assert sorted(before) == [0, 1]
    assert sorted(after) == [0, 1, 2]
    for number, row in before.items():
        assert (after[number]["value"], after[number]["curve"]) == (row["value"], row["curve"])
    assert after[2]["value"] is not None


def test_a_training_run_resumes_at_its_end(old):
    assert "step 4:" in old.printed["train"]
    before, after = (
        (folder / "trained" / "adapter" / "adapter_model.safetensors").read_bytes()
        for folder in (old.before, old.after)
    )
    assert after == before


def test_a_search_is_served(old):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, adapter = old.before / "model", old.before / "run" / "best" / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    ids = tokenizer("the cat\n", return_tensors="pt")["input_ids"]
    wanted = model.eval().generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert old.answer["choices"][0]["text"] == tokenizer.decode(wanted, skip_special_tokens=True)
