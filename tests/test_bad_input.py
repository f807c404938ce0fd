"""A user's mistake: one line that says what, where and what to do; exit code 2; no Ray is left behind."""

import json
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import ray

from ftray.adapters.methods import attach
from ftray.adapters.peft_config import wrong_field
from ftray.cli import run_command
from ftray.config import AdapterConfig, ModelConfig, config_from
from ftray.errors import UserError
from ftray.models.load import load_base
from ftray.runtime import cluster
from ftray.search.run_manifest import RUN, SEARCH, check_output, sole_driver, write_definition
from ftray.search.space import load_space
from ftray.storage.location import parse_location


@pytest.fixture(autouse=True)
def impatient(monkeypatch, ray_undone):
    monkeypatch.setattr(cluster, "JOIN_PATIENCE", 0)
    yield
    logging.disable(logging.NOTSET)


GOOD = '{"input": "a b", "output": "A B"}\n'


def lines(*records) -> str:
    return "".join(json.dumps(r) + "\n" for r in records)


def chat(*turns) -> str:
    return lines({"messages": list(turns)})


# name: (content of data.jsonl, further arguments, what the one line must say)
DATA = {
    "missing file": (None, ["--data", "wrds.jsonl"], "no such file or folder; did you mean words.jsonl"),
    "empty file": ("", [], "empty"),
    "blank lines only": ("\n\n", [], "holds no record"),
    "half a surrogate pair": (
        GOOD * 2 + '{"input": "a", "output": "emoji \\ud83d"}\n',
        [],
        "data.jsonl:3: output holds \\ud83d, half of a surrogate pair",
    ),
    "half a surrogate pair in a key": (GOOD + '{"\\udc00": "a"}\n', [], "data.jsonl:2: \\udc00 holds \\udc00, half of"),
    "json that goes too deep": (GOOD + "[" * 100000 + "\n", [], "data.jsonl:2: not valid JSON"),
    "broken json": (GOOD * 2 + '{"input": "a", "output": \n', [], "data.jsonl:3: not valid JSON"),
    "not an object": (GOOD + "[1, 2]\n", [], "data.jsonl:2: a record must be a JSON object, not list"),
    "unknown shape": (lines({"question": "q", "reply": "a"}), [], "keys question, reply; known shapes: input/output"),
    "wrong type": (lines({"input": "a", "output": [5]}), [], "data.jsonl:1: output must be text, not list"),
    "empty target": (lines({"input": "a", "output": " "}), [], "output is empty"),
    "empty chat": (lines({"messages": []}), [], "messages must be a list of turns"),
    "no assistant": (chat({"role": "user", "content": "hi"}), [], "no assistant turn"),
    "unknown role": (chat({"role": "robot", "content": "hi"}), [], "'robot'; known: human"),
    "turn without text": (chat({"role": "user"}), [], "must have role and content"),
    "good and bad answers": (
        lines({"prompt": "a", "completion": "b", "label": False}),
        ["--task", "CAUSAL_LM"],
        "data.jsonl:1: label: marks answers as good or bad, which --task KTO learns from",
    ),
    "preferences": (
        lines({"prompt": "a", "chosen": "b", "rejected": "c"}),
        ["--task", "CAUSAL_LM"],
        "data.jsonl:1: chosen: one of a preference pair, which --task DPO learns from",
    ),
    "images": (
        GOOD + lines({"input": "a", "output": "b", "images": ["i"]}),
        [],
        "data.jsonl:2: images: ftray reads text",
    ),
    "tools": (
        lines(
            {"tools": [{"name": "f"}], "messages": [{"role": "user", "content": "a"}, {"role": "gpt", "content": "b"}]}
        ),
        [],
        "data.jsonl:1: tools: the model's chat template leaves them out: take a model whose chat template does",
    ),
    "half a turn": (
        chat({"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}),
        [],
        "data.jsonl:1: messages[1].weight is 0.5: a turn or record is learnt or not",
    ),
    "turns without loss and a loss of all": (
        chat(
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "weight": 0},
            {"role": "assistant", "content": "b"},
        ),
        ["--data.train_on_prompt", "true"],
        "data.jsonl:1: has turns that bear no loss: data.train_on_prompt can't be set",
    ),
    "too short": (GOOD * 60, ["--data.max_length", "2", "--data.overlong", "drop"], "no supervised token"),
    "empty validation split": (GOOD, [], "split of 1 record(s) is empty"),
    "unknown format": (None, ["--data", "notes.docx"], "unknown format .docx"),
    "folder without data": (None, ["--data", "empty"], "the folder holds no .jsonl"),
    "csv with ragged rows": (None, ["--data", "ragged.csv"], "ragged.csv:3: not as many fields"),
    "not a parquet": (None, ["--data", "fake.parquet"], "can't be read"),
}
TEXTS = [{"text": f"t {i}", "label": "ab"[i % 2]} for i in range(40)]
PAIR = {"sentence1": "a", "sentence2": "b"}
QUESTION = {"question": "q", "context": "a b"}
# the same for other tasks than text that continues
TASKS = {
    "no label": (lines(*TEXTS, {"text": "t"}), [], "data.jsonl:41: label is missing"),
    "label is a list": (
        lines(*TEXTS, {"text": "t", "label": []}),
        [],
        ":41: label must be text or a whole number, not",
    ),
    "text is a list": (lines({"text": [3], "label": 1}), [], "data.jsonl:1: text must be text, not list"),
    "one label": (lines(*TEXTS[::2]), [], "'a' is the only label: there is nothing to tell apart"),
    "pairs and single texts": (
        lines(*TEXTS, {"text": "t", "text_pair": "u", "label": "a"}),
        [],
        "data.jsonl:1 has no text_pair: all records must be alike",
    ),
    "scored and other pairs": (
        lines(PAIR | {"score": 0.5}, {"anchor": "a", "positive": "b"}),
        [],
        "data.jsonl:1 has a score: all records must be alike",
    ),
    "second text by another name": (
        lines(*[text | {"sentence2": "u"} for text in TEXTS]),
        [],
        "data.jsonl:1: sentence2 would be lost: a record with text/label is read by text, label, text_pair alone",
    ),
    "label only once": (lines(*TEXTS, {"text": "t", "label": "c"}), [], "data.jsonl:41: label 'c' occurs only once"),
    "unknown label": (
        lines(*TEXTS),
        ["--validation-data", "other.jsonl"],
        ":1: label 'aa' is in no training record; did",
    ),
    "fewer tags": (lines({"tokens": ["a", "b"], "tags": ["O"]}), [], "data.jsonl:1: 2 tokens, but 1 tags"),
    "no tags": (lines({"tokens": ["a"], "tags": []}), [], "data.jsonl:1: tags must be a list that isn't empty"),
    "token is a number": (lines({"tokens": [1], "tags": ["O"]}), [], "tokens[0] must be text"),
    "no such answer": (lines(QUESTION | {"answers": ["c"]}), [], "data.jsonl:1: the answer 'c' is not in the context"),
    "answer elsewhere": (
        lines(QUESTION | {"answers": {"text": ["b"], "answer_start": [0]}}),
        [],
        "the answer 'b' is not in the context at character 0",
    ),
    "answer without start": (lines(QUESTION | {"answers": {"text": ["b"]}}), [], "text and answer_start, two lists of"),
    "long question": (
        lines({"question": "a b c d e f g h", "context": "a", "answers": ["a"]}),
        ["--data.max_length", "8"],
        "max_length 8: the question 'a b c d e f g h' alone is as long",
    ),
    "no positive": (lines({"anchor": "a", "positive": None}), [], "data.jsonl:1: positive is missing"),
    "score out of range": (lines(PAIR | {"score": 5}), [], "data.jsonl:1: score must be a number from -1 to 1"),
    "chat for an encoder and a decoder": (
        chat({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}),
        ["--task", "SEQ_2_SEQ_LM"],
        "SEQ_2_SEQ_LM learns one text from another: records must hold input/output",
    ),
    "records of another task": (
        GOOD,
        ["--task", "SEQ_CLS"],
        "text is missing; records of this task hold text and label",
    ),
    "unknown task": (GOOD, ["--task", "NER"], "task: must be 'auto', 'CAUSAL_LM'"),
    "metric of another task": (lines(*TEXTS), ["--search.metric", "entity_f1"], "SEQ_CLS has no such metric"),
}
RESUME = ["--resume", "--output", "begun"]
CONFIG = {
    "unknown model": (["--model", "smollm2-135"], "did you mean smollm2-135m"),
    "model directory without weights": (["--model", "empty"], "lacks config.json"),
    "unknown option": (["--trails", "3"], "unknown option --trails; did you mean trials"),
    "unknown key": (["--training.learnin_rate", "1"], "unknown key training.learnin_rate; did you mean learning_rate"),
    "bad number": (["--trials", "many"], "search.trials: must be a whole number (got 'many')"),
    "out of range": (["--training.learning_rate", "-1"], "training.learning_rate: must be greater than 0 (got -1)"),
    "missing value": (["--training.steps"], "--training.steps needs a value"),
    "missing config": (["--config", "nope.yaml"], "can't read nope.yaml"),
    "broken config": (["--config", "broken.yaml"], "broken.yaml:3: not valid YAML"),
    "unknown section": (["--config", "section.yaml"], "unknown key trainin; did you mean training"),
    "setting of another objective": (
        ["--training.beta", "0.1"],
        "training.beta: what is learnt here has no such setting: only preferences and GRPO have some",
    ),
    "fractions too large": (["--data.validation_fraction", "0.95"], "nothing is left to train on"),
    "metric of text without text": (
        ["--search.metric", "exact_match", "--evaluation.generate", "false"],
        "search.metric exact_match: is of generated text, and evaluation.generate is false",
    ),
    "nothing to search by": (
        ["--data.validation_fraction", "0"],
        "data.validation_fraction 0: a search goes by records",
    ),
    "nothing to prove by": (["--data.test_fraction", "0"], "data.test_fraction 0: the proof needs records"),
    "no text but a date": (["--config", "date.yaml"], "date.yaml: not valid YAML: "),
    "template without prompt": (["--data.template", "x"], "template must hold {prompt}"),
    "batch not divisible": (["--training.micro_batch", "3"], "make it a multiple of 3"),
    "pack under ZeRO 3": (["--pack", "4", "--training.zero_stage", "3"], "ZeRO 3 shards the base model"),
    "offload without stage": (["--training.offload", "optimizer"], "needs zero_stage"),
    "output of another search": (["--output", "used"], "already holds a search (summary.json)"),
    "search without definition": (["--resume", "--output", "used"], "can't be resumed without its config.yaml"),
    "resumed with other data": ([*RESUME, "--data.limit", "9"], "data.limit 9: the search in begun has None; take"),
    "resumed with another rate": ([*RESUME, "--training.learning_rate", "1"], "in begun has 0.0002; take that, or"),
    "resumed in another space": ([*RESUME, "--space", "ia3"], "not the space of the search in begun"),
    "no cluster there": (["--scaling.address", "127.0.0.1:9"], "no Ray cluster answers at"),
    "no address": (["--scaling.address", "head"], "scaling.address: Invalid address format: head"),
    "cluster from outside": (["--scaling.address", "ray://head:10001"], "from outside its cluster: ray job submit"),
    "output under a file": (["--output", "words.jsonl/out"], "can't write there"),
}
SPACE = {
    "missing space": (None, ["--space", "quik"], "no such file; did you mean quick"),
    "broken space": ("method: [lora\nx: 1", [], "not valid YAML"),
    "no method": ("learning_rate: 0.1", [], "mapping with the key method"),
    "unknown method": ("method: lorra", [], "unknown method 'lorra'; did you mean lora"),
    "unknown space key": ("method: lora\nlearning_rat: 1", [], "unknown key; did you mean learning_rate"),
    "unknown parameter": ("method: lora\nlora: {rnk: 3}", [], "lora.rnk: unknown key; did you mean rank"),
    "range upside down": ("method: lora\nlearning_rate: {log: [0.1, 0.01]}", [], "upside down: 0.1 > 0.01"),
    "log from zero": ("method: lora\nlearning_rate: {log: [0, 0.01]}", [], "must lie above 0"),
    "empty choice": ("method: lora\nlora: {rank: {choice: []}}", [], "choice needs a list that isn't empty"),
    "unknown kind": ("method: lora\nlora: {rank: {chioce: [1]}}", [], "unknown kind chioce; did you mean choice"),
    "times of nothing": ("method: lora\nlora: {alpha: {times: rank, choice: [1]}}", [], "not a parameter above it"),
    "value out of range": ("method: lora\nlora: {dropout: {float: [0, 2]}}", [], "less than 1"),
    "foreign method": ("method: lora\nia3: {}", [], "ia3: is not among the methods (lora)"),
    "budget in space": ("method: lora\nsteps: 3", [], "steps: is equal for all trials"),
    "setting of another objective": (
        "method: lora\nbeta: {log: [0.1, 1]}",
        [],
        "space.yaml: beta: what is learnt here has no such setting: only preferences and GRPO have some",
    ),
    "setting of another objective, of a method": (
        "method: {choice: [ia3, lora]}\nlora: {gamma: {choice: [1]}}",
        [],
        "space.yaml: gamma: what is learnt here has no such setting",
    ),
    "target module": ("method: lora\nlora: {target_modules: q_prj}", [], "did you mean q_proj"),
}


def begin(directory: Path, model: str) -> None:
    """What a search writes first."""
    cfg = config_from({"data": {"source": "words.jsonl"}, "model": {"name": model}, "task": "CAUSAL_LM"})
    write_definition(cfg, load_space("quick"), directory)
    (directory / "study.log").touch()


def run(tmp_path, monkeypatch, capsys, model: str, words: str, arguments: list[str]) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.jsonl").write_text(Path(words).read_text())
    (tmp_path / "notes.docx").write_text("x")
    (tmp_path / "other.jsonl").write_text(lines({"text": "t", "label": "aa"}))
    (tmp_path / "ragged.csv").write_text("input,output\na,A\nb\n")
    (tmp_path / "fake.parquet").write_text("not parquet")
    (tmp_path / "broken.yaml").write_text("training:\n  steps: [1\n")
    (tmp_path / "date.yaml").write_text("training: {steps: 2000-99-99}\n")
    (tmp_path / "section.yaml").write_text("trainin: {steps: 1}\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "summary.json").write_text("{}")
    begin(tmp_path / "begun", model)
    capsys.readouterr()
    given = {a for a in arguments if a.startswith("--")}
    defaults = {"--data": "words.jsonl", "--model": model, "--output": "out", "--space": "quick"}
    for flag, value in defaults.items():
        if flag not in given:
            arguments = [*arguments, flag, value]
    code = run_command("tune", [*arguments, "--data.cache", str(tmp_path / "shards")])
    captured = capsys.readouterr()
    assert code == 2, captured
    assert captured.out == ""
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()] if (tmp_path / "out").exists() else True
    message = captured.err.strip()
    assert len(message.splitlines()) == 1, message
    assert message.startswith("ftray tune: error: ")
    return message


@pytest.mark.parametrize("name", [*DATA, *TASKS])
def test_data(name, tmp_path, monkeypatch, capsys, tiny_llama, words):
    content, arguments, what = (DATA | TASKS)[name]
    if content is not None:
        (tmp_path / "data.jsonl").write_text(content)
        arguments = ["--data", "data.jsonl", *arguments]
    assert what in run(tmp_path, monkeypatch, capsys, tiny_llama, words, arguments)


def test_a_task_that_cannot_be_told(tmp_path, monkeypatch, capsys, tiny_bert, words):
    told = run(tmp_path, monkeypatch, capsys, tiny_bert, words, [])
    assert "task: can't be inferred from records with input, output and a BertModel: give --task, one of" in told


@pytest.mark.parametrize("name", CONFIG)
def test_configuration(name, tmp_path, monkeypatch, capsys, tiny_llama, words):
    arguments, what = CONFIG[name]
    assert what in run(tmp_path, monkeypatch, capsys, tiny_llama, words, arguments)


PREFERRED = [{"prompt": f"The sky {i} is", "chosen": " blue.", "rejected": " green."} for i in range(20)]
JUDGED = [{"prompt": f"The sky {i} is", "completion": " blue.", "label": i % 2 == 0} for i in range(20)]


@pytest.mark.parametrize(
    ("records", "arguments", "what"),
    [
        (PREFERRED, ["--training.gamma", "1"], "training.gamma: what is learnt here has no such setting: it has beta,"),
        (PREFERRED, ["--space", "kto"], "kto.yaml: undesirable_weight: what is learnt here has no such setting: it"),
        (PREFERRED, ["--space", "simpo"], "simpo.yaml: gamma: what is learnt here has no such setting: it has beta,"),
        (PREFERRED, ["--task", "ORPO", "--space", "preference"], "preference.yaml: loss: what is learnt here has no"),
        (PREFERRED, ["--task", "REWARD", "--training.beta", "1"], "training.beta: what is learnt here has no such"),
        (JUDGED, ["--training.loss", "hinge"], "training.loss: what is learnt here has no such setting: it has beta,"),
    ],
)
def test_settings_of_another_objective(records, arguments, what, tmp_path, monkeypatch, capsys, tiny_llama, words):
    (tmp_path / "data.jsonl").write_text(lines(*records))
    arguments = ["--data", "data.jsonl", *arguments]
    assert what in run(tmp_path, monkeypatch, capsys, tiny_llama, words, arguments)


def test_settings_of_another_objective_of_one_run(tmp_path, capsys, tiny_llama):
    (tmp_path / "data.jsonl").write_text(lines(*PREFERRED))
    flags = ["--data", str(tmp_path / "data.jsonl"), "--model", tiny_llama, "--output", str(tmp_path / "out")]
    assert run_command("train", [*flags, "--training.desirable_weight", "2"]) == 2
    assert "train: error: training.desirable_weight: what is learnt here has no such" in capsys.readouterr().err


@pytest.mark.parametrize("name", SPACE)
def test_space(name, tmp_path, monkeypatch, capsys, tiny_llama, words):
    content, arguments, what = SPACE[name]
    if content is not None:
        (tmp_path / "space.yaml").write_text(content)
        arguments = ["--space", "space.yaml", *arguments]
    assert what in run(tmp_path, monkeypatch, capsys, tiny_llama, words, arguments)


def test_no_room(tmp_path, monkeypatch, capsys, tiny_llama, words):
    import shutil

    full = shutil.disk_usage("/")._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert "needs at least 1 GiB" in run(tmp_path, monkeypatch, capsys, tiny_llama, words, [])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_rights(tmp_path, monkeypatch, capsys, tiny_llama, words):
    (tmp_path / "locked").mkdir(mode=0o500)
    arguments = ["--output", "locked/out"]
    assert "can't write there" in run(tmp_path, monkeypatch, capsys, tiny_llama, words, arguments)


@pytest.mark.parametrize(("more", "refused"), [({}, ""), ({"warmup": 0.2}, "training.warmup 0.2: the search in ")])
def test_a_search_from_before_a_field_was_there_has_its_default(tmp_path, tiny_llama, more, refused):
    begin(tmp_path, tiny_llama)
    written = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(written.replace("  warmup: 0.05\n", ""))
    assert (tmp_path / "config.yaml").read_text() != written
    sections = {"data": {"source": "words.jsonl"}, "model": {"name": tiny_llama}, "task": "CAUSAL_LM"}
    cfg = config_from({**sections, "training": more, "output": str(tmp_path), "resume": True})
    if not refused:
        check_output(cfg, load_space("quick"))
        return
    with pytest.raises(UserError) as told:
        check_output(cfg, load_space("quick"))
    assert str(told.value) == f"{refused}{tmp_path} has 0.05; take that, or name another --output"


MISSPELT = {
    "tune": (["--data", "wrds.jsonl"], "data wrds.jsonl: no such file or folder"),
    "train": (["--model", "smollm2-135"], "did you mean smollm2-135m"),
    "preprocess": (["--data", "wrds.jsonl"], "data wrds.jsonl: no such file or folder"),
    "evaluate": (["--adapter", "runs/none"], "adapter runs/none: no such directory"),
    "infer": (["--adapter", "runs/none"], "adapter runs/none: no such directory"),
    "merge": (["--output", "merged"], "merge: give --adapter DIR"),
}


@pytest.mark.parametrize("command", MISSPELT)
def test_what_is_misspelt_is_told_before_anything_slow_is_imported(command, tmp_path, tiny_llama):
    """These imports take ten times as long as all else that comes before the message."""
    arguments, what = MISSPELT[command]
    arguments = [command, "--model", tiny_llama, *arguments]
    code = (
        f"import sys; from ftray.cli import main; code = main({arguments!r}); "
        "print(code, {'torch', 'transformers', 'ray'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == "2 set()\n"
    assert what in done.stderr


@pytest.mark.parametrize(
    ("command", "more", "what"),
    [
        ("preprocess", ["--data.cache", "words.jsonl/cache"], "/words.jsonl/cache: can't write there"),
        ("train", ["--data.cache", "words.jsonl/cache"], "/words.jsonl/cache: can't write there"),
        ("evaluate", ["--output", "words.jsonl/scores.json"], "output words.jsonl: can't write there"),
        ("evaluate", ["--split", "test", "--data.test_fraction", "0"], "data.test_fraction 0: there is no test split"),
        ("infer", ["--file", "p.txt", "--output", "words.jsonl/a.jsonl"], "output words.jsonl: can't write there"),
        ("infer", ["--file", "p.txt", "--output", "empty"], "output empty: is a directory: name a file"),
        ("merge", ["--adapter", "a", "--output", "words.jsonl/merged"], "can't write there"),
        ("merge", ["--adapter", "a", "--output", "s3://bucket/merged"], "merge writes to a directory"),
    ],
)
def test_places_that_can_not_be_written(command, more, what, tmp_path, monkeypatch, capsys, tiny_llama, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.jsonl").write_text(Path(words).read_text())
    (tmp_path / "p.txt").write_text("a\n")
    (tmp_path / "empty").mkdir()
    given = ["--data", "words.jsonl"] if command in ("preprocess", "train", "evaluate") else []
    assert run_command(command, ["--model", tiny_llama, *given, *more]) == 2
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1, message
    assert what in message


def test_a_path_that_the_system_refuses_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_command("preprocess", ["--model", "x" * 300]) == 2
    assert capsys.readouterr().err.endswith("File name too long\n")


@pytest.mark.parametrize(
    ("environment", "address", "what"),
    [
        ({"RAY_TMPDIR": "/tmp/" + "x" * 60}, "local", "too long for Ray's sockets"),
        ({"RAY_TMPDIR": "/dev/null/ray"}, "local", "RAY_TMPDIR /dev/null/ray: can't write there"),
        ({"RAY_ADDRESS": "127.0.0.1:9"}, None, "no Ray cluster answers at"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/none"}, "10.0.0.1:9", "RAY_AUTH_TOKEN_PATH /none: can't"),
        ({"RAY_AUTH_MODE": "token", "HOME": "/none"}, "10.0.0.1:9", "RAY_AUTH_MODE is token, and there is none"),
    ],
)
def test_a_cluster_that_can_not_be_had(environment, address, what, monkeypatch):
    from ftray.runtime import cluster

    monkeypatch.setattr(cluster, "JOIN_PATIENCE", 0)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(what)):
        cluster.check_address(config_from({"scaling": {"address": address}}))


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"generation": {"system": "a\ud83d"}}, "generation.system"),
        ({"data": {"source": ["a", "b\udcff"]}}, "data.source"),  # a byte of the shell that is not UTF-8
        ({"adapter": {"target_modules": {"a": "\ud83d"}}}, "adapter.target_modules.a"),
        ({"data": {"\ud83d": 1}}, "data"),
    ],
)
def test_half_a_character_in_a_configuration_is_refused(values, field):
    with pytest.raises(UserError, match=rf"^{re.escape(field)}: .*holds half of a surrogate pair") as refused:
        config_from(values)
    str(refused.value).encode()


DAMAGED = {
    "status": ("config.yaml", ["--run", "run"]),
    "stop": ("config.yaml", ["1", "--run", "run"]),
    "add": ("config.yaml", ["{adapter: {method: lora}}", "--run", "run"]),
    "clone": ("config.yaml", ["1", "--run", "run"]),
    "serve": ("config.yaml", ["--run", "run"]),
    "infer": ("best/adapter/task.json", ["--adapter", "run", "--prompt", "a"]),
    "merge": ("best/adapter/task.json", ["--adapter", "run", "--output", "merged"]),
    "train": ("config.yaml", ["--data", "words.jsonl", "--output", "run", "--resume"]),
    "tune": ("config.yaml", ["--data", "words.jsonl", "--output", "run", "--resume"]),
}
NO_MAPPING, MAPPING = (b"", b"[", b"[1]", b"\xff"), (b'{"name": 3}', b"model: {name: [1]}")


@pytest.mark.parametrize(
    ("command", "content"),
    [(command, content) for command in DAMAGED for content in NO_MAPPING]
    + [(command, content) for command in list(DAMAGED)[:-2] for content in MAPPING],
)
def test_a_file_of_a_run_that_was_changed_is_named(command, content, tmp_path, monkeypatch, capsys, tiny_llama, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.jsonl").write_text(Path(words).read_text())
    adapter = tmp_path / "run" / "best" / "adapter"
    adapter.mkdir(parents=True)
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": tiny_llama}
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": ["q_proj"]}))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    for name in ("config.yaml", "space.yaml", "study.log", "data.json"):
        (tmp_path / "run" / name).write_text("{}")
    (tmp_path / "run" / "summary.json").write_text('{"trials": []}')
    file, arguments = DAMAGED[command]
    (tmp_path / "run" / file).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    more = ["--model", tiny_llama] if command in ("train", "tune", "infer", "merge") else []
    assert run_command(command, [*arguments, *more]) == 2
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1, message
    assert file in message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "setting",
    [
        {"alpha_pattern": []},
        {"r": "8"},
        {"target_modules": 3},
        {"lora_dropout": {}},
        {"lora_dropout": True},
        {"lora_alpha": math.nan},
        {"use_dora": "no"},
        {"r": [8]},
        {"modules_to_save": {"lm_head": 1}},
        {"base_model_name_or_path": ["base"]},
        {"monteclora_config": " "},
        {"monteclora_config": {"num_samples": "8"}},
        {"eva_config": 3},
        *({"alora_invocation_tokens": tokens} for tokens in ("call", 7, {"a": 1}, [[7]], ["7"])),
    ],
)
def test_settings_of_an_adapter_that_peft_can_not_apply(setting, tmp_path, capsys, tiny_llama):
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **setting}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert run_command("infer", ["--adapter", str(tmp_path), "--model", tiny_llama, "--prompt", "a"]) == 2
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1, message
    assert f"adapter {tmp_path}: " in message
    assert f"adapter_config.json: {next(iter(setting))}: " in message


def test_what_peft_saves_itself_is_of_its_own_types(tmp_path):
    needs = {"ADALORA": {"total_step": 10}, "CPT": {"task_type": "CAUSAL_LM"}}
    for name, kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        kind(**needs.get(name.value, {})).save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "adapter_config.json").read_text())
        assert wrong_field(kind, saved) is None, name


@pytest.mark.parametrize("wrong", [{"alora_invocation_tokens": "call"}, {"lora_dropout": [0.1]}, {"use_rslora": 2}])
def test_a_configuration_of_peft_is_held_to_its_types(wrong, tiny_llama):
    config = {"peft_type": "LORA", "target_modules": ["q_proj"], **wrong}
    with pytest.raises(UserError, match=f"adapter.config: {next(iter(wrong))}: "):
        attach(load_base(ModelConfig(), tiny_llama), AdapterConfig(method="peft", config=config), 1, 0)


@pytest.mark.parametrize(("address", "watches"), [("local", False), ("127.0.0.1:9", True)])
def test_workers_watch_for_notice_where_nodes_are_drained(address, watches, monkeypatch):
    """Not on a cluster that begins here, where the process that watches would be one too many."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **kwargs: None)
    monkeypatch.setattr(cluster, "check_address", lambda cfg: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "as before")
    monkeypatch.delenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER")  # which is undone later
    cluster.connect(config_from({"scaling": {"address": address}}))
    assert ("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER" in os.environ) == (not watches)


@pytest.mark.parametrize("address", ["local", "127.0.0.1:9"])
def test_a_ray_that_does_not_start_in_time_is_one_line_and_has_longer_than_rays_own_half_minute(
    address, tmp_path, words, tiny_llama, monkeypatch, capsys
):
    def init(**kwargs):
        waits.append([os.environ.get(name) for name in cluster.START_PATIENCE])
        raise Exception("The current node timed out during startup.\nThis could happen because ...")  # Ray's own type

    waits: list[list[str | None]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(cluster, "check_address", lambda cfg: None)
    for name, value in zip(cluster.START_PATIENCE, ("", "240"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_gcs_server_port_wait_time_s")
    given = ["--data", words, "--model", tiny_llama, "--data.cache", str(tmp_path), "--scaling.address", address]
    assert run_command("evaluate", given) == 1
    said = capsys.readouterr().err
    begins = address == "local"
    assert waits == [["180" if begins else None, "240"]]
    assert "The current node timed out during startup." in said
    assert ("RAY_gcs_server_port_wait_time_s (180) and RAY_raylet_start_wait_time_s (240)" in said) == begins
    assert said.count("\n") == 1, said


@pytest.mark.parametrize("command", ["tune", "train"])
def test_an_output_that_another_driver_holds_is_refused_before_ray_begins(
    command, tmp_path, words, tiny_llama, monkeypatch, capsys
):
    monkeypatch.setattr(cluster, "connect", lambda *args, **kwargs: pytest.fail("Ray begins"))
    monkeypatch.setattr("ftray.models.load.load_skeleton", lambda *args: pytest.fail("the model is looked at"))
    given = ["--data", words, "--model", tiny_llama, "--output", str(tmp_path / "out")]
    kind = {"tune": SEARCH, "train": RUN}[command]
    with sole_driver(parse_location(tmp_path / "out"), kind):
        assert run_command(command, given) == 2
    said = {
        "tune": "a search is running there; see ftray status",
        "train": "a run is under way there; wait for its end",
    }
    assert f"output {tmp_path / 'out'}: {said[command]}" in capsys.readouterr().err
