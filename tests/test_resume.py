"""`--resume` continues with what is there, and with nothing else; an output has one driver."""

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import ray
import yaml
from conftest import llama
from helpers.searches import run_here

from ftray.cli import main
from ftray.runtime import cluster
from ftray.search.run_manifest import RUN, SEARCH, sole_driver
from ftray.storage.local import LocalLocation


class Begins(Exception):
    """All was found to be well: now Ray would be used."""


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    def started(*args, **kwargs):
        raise Begins

    monkeypatch.setattr(cluster, "connect", lambda cfg, **more: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # a cluster of other tests
    for first in ("gpus_per_worker", "ends_with_ray"):  # of a run, of a search
        monkeypatch.setattr(cluster, first, started)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def asked(tmp_path, words, tiny_llama):
    """The flags of a run on its own copy of the records."""
    (tmp_path / "words.jsonl").write_text(Path(words).read_text())
    named = {"--data": tmp_path / "words.jsonl", "--model": tiny_llama, "--output": tmp_path / "out"}
    return [*(str(part) for pair in named.items() for part in pair), "--training.steps", "2", "--model.dtype", "fp32"]


def begin(command: str, arguments: list[str], output: Path) -> None:
    with pytest.raises(Begins):
        main([command, *arguments])
    (output / {"train": "train", "tune": "tune"}[command]).mkdir()  # what Ray makes first


def refused(command: list[str], capsys) -> str:
    capsys.readouterr()
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (["--training.learning_rate", "1"], "training.learning_rate 1.0: the run in OUT has 0.0002; take that, or"),
        (["--adapter.rank", "4"], "adapter.rank 4: the run in OUT has 8"),
        (["--method", "ia3"], "adapter.method ia3: the run in OUT has lora"),
        (
            ["--adapter.target_modules", "[q_proj]"],
            "adapter.target_modules ['q_proj']: the run in OUT has attention-qv",
        ),
        (["--data.limit", "50"], "data.limit 50: the run in OUT has None"),
        (["--data", "OTHER"], "the run in OUT has "),
        (["--model", "OTHERMODEL"], "the run in OUT has "),
        (["--model.dtype", "bf16"], "model.dtype bf16: the run in OUT has fp32"),
        (["--training.steps", "3"], "training.steps 3: the run in OUT has 2"),
        (["--scaling.workers", "2"], "scaling.workers 2: the run in OUT has 1"),
        (
            ["--search.metric", "exact_match"],
            "search.metric validation_exact_match: the run in OUT has validation_loss",
        ),
        (["--task", "SEQ_2_SEQ_LM"], None),
    ],
)
def test_a_run_that_would_be_another_is_refused(more, what, asked, tmp_path, capsys, words, tiny_gpt2):
    output = tmp_path / "out"
    begin("train", asked, output)
    before = (output / "config.yaml").read_text()
    more = [{"OTHER": words, "OTHERMODEL": tiny_gpt2}.get(part, part) for part in more]
    line = refused(["train", *asked, *more, "--resume"], capsys)
    assert what is None or what.replace("OUT", str(output)) in line
    assert (output / "config.yaml").read_text() == before
    with pytest.raises(Begins):
        main(["train", *asked, "--resume"])


@pytest.mark.parametrize(
    "more",
    [
        {"adapter": {"rank": 8}},  # what it is without being said
        {"search": {"trials": 99, "scheduler": "none"}},
        {"scaling": {"cpus_per_worker": 0.5}, "search": {"max_failures": 3}},
        {"evaluation": {"samples": 1}},
    ],
)
def test_where_and_what_comes_after_may_change(more, asked, tmp_path):
    begin("train", asked, tmp_path / "out")
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(more))
    with pytest.raises(Begins):
        main(["train", *asked, "--config", str(tmp_path / "more.yaml"), "--resume"])


def test_a_search_that_is_resumed_may_be_looked_at(asked, tmp_path):
    begin("tune", asked, tmp_path / "out")
    with pytest.raises(Begins):
        main(["tune", *asked, "--ui", "--ui.port", "0", "--resume"])


def test_where_there_is_nothing_to_resume_it_begins(asked, tmp_path, capsys):
    with pytest.raises(Begins):
        main(["train", *asked, "--resume"])
    assert f"output {tmp_path / 'out'} holds no run yet: it begins" in capsys.readouterr().out


@pytest.mark.parametrize("resume", [[], ["--resume"]])
@pytest.mark.parametrize(("there", "other"), [("train", "tune"), ("tune", "train")])
def test_a_search_and_a_run_do_not_share_an_output(there, other, resume, asked, tmp_path, capsys):
    begin(there, asked, tmp_path / "out")
    before = (tmp_path / "out" / "config.yaml").read_text()
    kinds = {"train": "run", "tune": "search"}
    line = refused([other, *asked, *resume], capsys)
    assert f"holds a {kinds[there]} ({there}), not a {kinds[other]}: name another --output" in line
    assert (tmp_path / "out" / "config.yaml").read_text() == before
    if not resume:
        assert f"already holds a {kinds[there]} ({there}): add --resume" in refused([there, *asked], capsys)


@pytest.mark.parametrize(
    ("command", "kind", "what"), [("train", RUN, "a run is under way"), ("tune", SEARCH, "a search")]
)
def test_an_output_has_one_driver(command, kind, what, asked, tmp_path, capsys):
    begin(command, asked, tmp_path / "out")
    with sole_driver(LocalLocation(tmp_path / "out"), kind):
        assert what in refused([command, *asked, "--resume"], capsys)
    with pytest.raises(Begins):
        main([command, *asked, "--resume"])


def test_a_run_without_its_configuration_is_not_guessed_at(asked, tmp_path, capsys):
    begin("train", asked, tmp_path / "out")
    (tmp_path / "out" / "config.yaml").unlink()
    assert "can't be resumed without its config.yaml" in refused(["train", *asked, "--resume"], capsys)


def test_other_records_or_weights_of_the_same_name_are_refused_and_leave_all_as_it_was(
    cluster, monkeypatch, asked, tmp_path, tiny_llama, tokenizer
):
    monkeypatch.undo()  # these runs do train
    asked = [sys.executable, "-m", "ftray.train", *asked]
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    asked[asked.index("--model") + 1] = str(model)
    asked += ["--data.cache", str(tmp_path / "shards"), "--data.max_length", "64"]
    first = run_here(asked)
    assert first.returncode == 0, first.stdout + first.stderr
    output, records = tmp_path / "out", tmp_path / "words.jsonl"
    told = json.loads((output / "data.json").read_text())
    assert told["train"]["digest"]
    assert len(told["base"]) == 1
    kept = {path: path.read_bytes() for path in output.rglob("*") if path.is_file() and path.name != ".lock"}

    def refused_as(what: str) -> None:
        # what may change would be written down
        done = run_here([*asked, "--resume", "--search.max_failures", "3"])
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stdout + done.stderr
        assert f"{what}: not what the run in {output} was trained on (see its data.json)" in done.stderr
        assert {path: path.read_bytes() for path in kept} == kept

    # as many records of as many tokens: the letters of one are in another order
    text = records.read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    for part in ("input", "output"):
        turned = rows[0][part][::-1]
        assert turned != rows[0][part]
        assert len(tokenizer(turned)["input_ids"]) == len(tokenizer(rows[0][part])["input_ids"])
        rows[0][part] = turned
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused_as("data")
    records.write_text(text)

    other = llama()
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    other.save_pretrained(model)
    refused_as(f"model {model}")
    shutil.copytree(tiny_llama, model, dirs_exist_ok=True)
    again = run_here([*asked, "--resume", "--search.max_failures", "3"])
    assert again.returncode == 0, again.stdout + again.stderr
    assert yaml.safe_load((output / "config.yaml").read_text())["search"]["max_failures"] == 3


def test_what_a_search_was_asked_is_not_overwritten_where_it_does_not_go_on(asked, tmp_path, monkeypatch):
    """Its data is read after Ray has begun: up to then, all stays as it is."""
    begin("tune", asked, tmp_path / "out")
    before = (tmp_path / "out" / "config.yaml").read_text()
    with pytest.raises(Begins):
        main(["tune", *asked, "--resume", "--trials", "99"])
    assert (tmp_path / "out" / "config.yaml").read_text() == before
