import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_origin

import pytest
import yaml

from ftray.cli import COMMANDS, EXIT_CODES, choices_of, field_of, fields, main, parse
from ftray.config import Config
from ftray.errors import UserError
from ftray.reference import commands, reference

ROOT = Path(__file__).parents[1]


def test_the_references_in_docs_are_what_the_code_says(capsys):
    assert (ROOT / "docs" / "configuration.md").read_text() == reference()
    assert (ROOT / "docs" / "commands.md").read_text() == commands()
    assert main(["config"]) == 0
    assert capsys.readouterr().out == reference()


SPECIAL = {
    "search.trackers": ["mlflow"],
    "data.source": ["one", "two"],
    "data.validation": "something",
    "data.test": ["one", "two"],
    "data.fields": {"prompt": "question"},
    "data.delimiter": ";",
    "data.encoding": "cp1252",
    "data.template": "ask {prompt}",
    "adapter.method": "ia3",
    "data.max_length": 77,
    "search.space": "lora",
}


def another(field: str):
    """A valid value that is not the default."""
    info = field_of(field)
    kinds = {info.annotation, *get_args(info.annotation)}
    if field in SPECIAL:
        return SPECIAL[field]
    if choices := choices_of(field):
        value = next(c for c in choices if c != str(info.default).lower())
        return yaml.safe_load(value) if value in ("true", "false") or value.isdigit() else value
    if any(get_origin(kind) is list for kind in kinds):
        return [0.25, 0.75] if field == "merge.weights" else ["one", "two"]
    if float in kinds:
        return 0.5 if info.default != 0.5 else 0.25
    if any(kind is int or get_args(kind)[:1] == (int,) for kind in kinds):
        return (info.default or 0) + 3 if not isinstance(info.default, str) else 3
    assert str in kinds, field
    return "something"


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ("prompt: question, completion: answer", {"prompt": "question", "completion": "answer"}),
        ("prompt: question", {"prompt": "question"}),
        ("{prompt: a.b, completion: '{{ c }}, d'}", {"prompt": "a.b", "completion": "{{ c }}, d"}),
        ('prompt: "{{ a }}\\n{{ b }}", completion: c', {"prompt": "{{ a }}\n{{ b }}", "completion": "c"}),
    ],
)
def test_a_mapping_may_be_written_without_braces(given, fields):
    assert parse("tune", ["--data.fields", given]).data.fields == fields


@pytest.mark.parametrize("given", ["prompt: {{ a }}", "prompt", "prompt: [a, b"])
def test_what_is_no_mapping_is_one_line(given):
    with pytest.raises(UserError, match=r"^data\.fields"):
        parse("tune", ["--data.fields", given])


def test_sources_may_be_several():
    assert parse("tune", ["--data", "a", "--data", "b*.csv"]).data.source == ["a", "b*.csv"]
    assert parse("tune", ["--data", "a", "--test-data", "b"]).data.source == "a"
    assert parse("tune", ["--data", "a", "--data", "b"]).data.names == "a, b"


def test_every_field_can_be_set_from_yaml_and_from_the_command_line(tmp_path, capsys):
    default = Config().model_dump()
    for field in fields():
        value, (*section, key) = another(field), field.split(".")
        more = {"training.offload": {"zero_stage": 2}}.get(field, {})
        nested = {section[0]: {key: value, **more}} if section else {key: value}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(nested))
        text = value if field == "task" else json.dumps(value)  # the command's own flags take text as it is
        given = [f"--{field}"] if field in ("resume", "verbose") else [f"--{field}={text}"]
        given += [f"--{section[0]}.{name}={other}" for name, other in more.items()]
        for arguments in (["--config", str(path)], given):
            got = parse("config", arguments).model_dump()
            got = got[section[0]] if section else got
            assert got[key] == value, field
            assert got[key] != (default[section[0]] if section else default)[key], field
    # what `config` resolves is a configuration file
    assert main(["config", "--training.epochs", "3", "--adapter.rank", "4"]) == 0
    path.write_text(capsys.readouterr().out)
    again = parse("train", ["--config", str(path)])
    assert again.training.epochs == 3
    assert again.adapter.parameters == {"rank": 4}


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("ftray ev", "ftray evaluate "),
        ("ftray tune --pl", "ftray tune --plan "),
        ("ftray evaluate --split va", "ftray evaluate --split validation "),
        ("ftray train --training.learn", "ftray train --training.learning_rate "),
        ("ftray merge --merge.combination dare_linear_", "ftray merge --merge.combination dare_linear_svd "),
    ],
)
def test_bash_completes(bash, typed, wanted):
    bash.sendline(f"{typed}\t'")  # what comes after the quotation mark keeps it from being run
    bash.sendline("'")
    bash.expect_exact(wanted)


@pytest.fixture(scope="module")
def bash():
    """A real one on a real terminal, with what the documentation puts into its start-up file."""
    import pexpect

    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PS1": "$ ", "TERM": "dumb"}
    child = pexpect.spawn(
        "bash --norc --noprofile", env=environment, encoding="utf-8", timeout=30, dimensions=(50, 200)
    )
    (line,) = [x for x in (ROOT / "docs" / "commands.md").read_text().splitlines() if x.startswith("| bash")]
    child.sendline(line.split("`")[3])
    child.sendline("echo ready")
    child.expect("\r\nready")
    yield child
    child.close()


def test_values_come_from_command_line_then_yaml_then_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("training: {learning_rate: 1.0e-3, batch_size: 4}\nadapter: {method: lora, rank: 2}\n")
    cfg = parse("tune", ["--config", str(path), "--training.batch_size=16", "--adapter.alpha", "7", "--trials", "3"])
    assert cfg.training.learning_rate == 1e-3
    assert cfg.training.batch_size == 16
    assert cfg.adapter.parameters == {"rank": 2, "alpha": 7}
    assert cfg.search.trials == 3
    assert cfg.training.seed == 0
    assert not cfg.resume


def test_numbers_in_scientific_notation_are_numbers():
    assert parse("train", ["--training.learning_rate", "3e-4"]).training.learning_rate == 3e-4


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_flags_and_an_example(name):
    for command in ([sys.executable, "-m", f"ftray.{name}"], [str(Path(sys.executable).parent / "ftray"), name]):
        done = subprocess.run([*command, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert len(COMMANDS[name].example.splitlines()) >= 2
        assert all(f"  {line}\n" in done.stdout for line in COMMANDS[name].example.splitlines())
        assert EXIT_CODES in done.stdout
        assert all(f"--{flag}" in done.stdout for flag in COMMANDS[name].flags)


def test_unknown_command(capsys):
    assert main(["tun"]) == 2
    assert "did you mean tune" in capsys.readouterr().err


def test_readme_names_only_commands_and_files_that_exist():
    import re

    readme = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", readme):
        assert (ROOT / target).exists(), target
    for name in re.findall(r"`?ftray (\w+)", readme):
        assert name in COMMANDS or name in ("finds",), name


def test_an_installed_package_brings_its_search_spaces(tmp_path):
    """A wheel in an environment of its own; the libraries that it needs are lent by this one."""
    import shutil
    import sysconfig
    import venv

    for name in ("ftray", "search_spaces"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / "source")
    source = str(tmp_path / "source")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True, capture_output=True)
    (site,) = (tmp_path / "venv" / "lib").glob("*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_path("purelib"))
    code = "import ftray; from ftray.search.space import load_space; print(ftray.__file__, load_space('quick').methods)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout
    assert "'lora'" in done.stdout
