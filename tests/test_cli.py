import json
import os
import pickle
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_origin

import pytest
import yaml
from helpers.views import guarded

from ftray.cli import COMMANDS, EXIT_CODES, SWITCHES, choices_of, field_of, fields, main, parse, reads
from ftray.config import Config, MixedSource, ServingConfig, StageConfig
from ftray.errors import UserError
from ftray.reference import commands, reference
from ftray.storage.location import parse_location
from ftray.tune import shown_live

ROOT = Path(__file__).parents[1]


def test_the_references_in_docs_are_what_the_code_says(capsys):
    assert (ROOT / "docs" / "configuration.md").read_text() == reference()
    assert (ROOT / "docs" / "commands.md").read_text() == commands()
    assert main(["config"]) == 0
    assert capsys.readouterr().out == reference()


SPECIAL = {
    "search.trackers": ["mlflow"],
    "search.direction": "min,max",
    "search.best": "adapter_bytes < 5e6",
    "task": "DPO",
    "suite.tasks": "lm-eval:arc_easy,hellaswag",
    "training.label_smoothing": 0.25,
    "stages": [StageConfig(task="sft", training={"epochs": 2}).model_dump()],
    "data.source": ["one", "two"],
    "data.sources": [MixedSource(source="one", weight=2).model_dump()],
    "data.validation": "something",
    "export.repo": "owner/name",
    "export.base_model": "owner/name",
    "data.test": ["one", "two"],
    "data.fields": {"prompt": "question"},
    "data.delimiter": ";",
    "data.encoding": "cp1252",
    "data.template": "ask {prompt}",
    "adapter.method": "ia3",
    "data.max_length": 77,
    "search.space": "lora",
    "training.reward": "rewards.py:function",
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
        text = value if isinstance(value, str) else json.dumps(value)  # text is taken as it is typed
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
    arguments = ["--training.batch_size=16", "--adapter.alpha", "7", "--search.trials", "3"]
    cfg = parse("config", ["--config", str(path), *arguments])
    assert cfg.training.learning_rate == 1e-3
    assert cfg.training.batch_size == 16
    assert cfg.adapter.parameters == {"rank": 2, "alpha": 7}
    assert cfg.search.trials == 3
    assert cfg.training.seed == 0
    assert not cfg.resume


def test_numbers_in_scientific_notation_are_numbers():
    assert parse("train", ["--training.learning_rate", "3e-4"]).training.learning_rate == 3e-4


@pytest.mark.parametrize(
    ("field", "typed", "value"),
    [
        ("data.template", "Q: {prompt} A:", "Q: {prompt} A:"),
        ("data.template", "{prompt}", "{prompt}"),
        ("generation.prompt", "42", "42"),
        ("generation.prompt", "null", "null"),
        ("generation.system", "Rule: be terse", "Rule: be terse"),
        ("generation.system", "[be terse", "[be terse"),
        ("data.source", "2020-01-01", "2020-01-01"),
        ("search.pack", "off", "off"),
        ("search.pack", "4", 4),
        ("evaluation.generate", "off", False),
        ("merge.weights", "0.5,1", [0.5, 1.0]),
    ],
)
def test_text_is_taken_as_it_is_typed_and_what_else_as_yaml(field, typed, value):
    section, key = field.split(".")
    for arguments in ([f"--{field}", typed], [f"--{field}={typed}"]):
        assert getattr(getattr(parse("config", arguments), section), key) == value


def test_yaml_may_say_off_of_packs(tmp_path):
    (tmp_path / "c.yaml").write_text("search: {pack: off}")
    assert parse("tune", ["--config", str(tmp_path / "c.yaml")]).search.pack == "off"


@pytest.mark.parametrize("value", ["[1, 2", "2000-99-99", "{a: b: c}", "*x", "["])
def test_what_is_no_yaml_is_refused_by_its_field(value):
    with pytest.raises(UserError, match=r"^training\.steps: must be a whole number"):
        parse("train", ["--training.steps", value])


@pytest.mark.parametrize(
    "field",
    [
        *("model.name", "data.source", "data.validation", "data.test", "data.cache", "search.space", "generation.file"),
        *("serving.run", "serving.api_key_file", "serving.adapter_sources", "serving.registry", "adapters", "output"),
    ],
)
def test_a_path_may_begin_at_home(field, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    section, _, key = field.rpartition(".")
    several = field in ("serving.adapter_sources", "adapters")
    typed, wanted = "~/here", f"{tmp_path}/here"
    nested = {key: [typed] if several else typed}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({section: nested} if section else nested))
    for arguments in (["--config", "~/c.yaml"], [f"--{field}={'[~/here]' if several else typed}"]):
        got = parse("config", arguments)
        assert getattr(getattr(got, section) if section else got, key) == ([wanted] if several else wanted)
    assert parse("serve", ["--adapter", "terse=~/a", "--adapter", "s3://b/~c"]).adapters == [
        f"terse={tmp_path}/a",
        "s3://b/~c",
    ]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_flags_and_an_example(name, capsys, monkeypatch):
    def as_a_module() -> None:
        monkeypatch.setattr(sys, "argv", [f"ftray/{name}.py", "--help"])
        runpy.run_module(f"ftray.{name}", run_name="__main__")

    for start in (as_a_module, lambda: sys.exit(main([name, "--help"]))):
        with pytest.raises(SystemExit) as ended:
            start()
        assert not ended.value.code
        shown = capsys.readouterr().out
        assert len(COMMANDS[name].example.splitlines()) >= 2
        assert all(f"  {line}\n" in shown for line in COMMANDS[name].example.splitlines())
        assert EXIT_CODES in shown
        assert all(f"--{flag}" in shown for flag in COMMANDS[name].flags)
        (line,) = [line for line in shown.splitlines() if line.startswith("fields: ")]
        named = re.sub(r" \(.*?\)|;.*", "", line.partition(" of ")[2]).split(", ")
        for section in {field.partition(".")[0] for field in fields() if "." in field}:
            read = any(reads(name, field) for field in fields() if field.startswith(f"{section}."))
            assert (section in named) == read, section


def test_a_command_starts_as_a_module_and_as_a_script():
    for command in ([sys.executable, "-m", "ftray.tune"], [str(Path(sys.executable).parent / "ftray"), "tune"]):
        done = subprocess.run([*command, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert EXIT_CODES in done.stdout


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("stop --serving.port 3", "--serving.port: ftray stop does not read it; serve does"),
        ("stop 3 --serving.port=3", "--serving.port: ftray stop does not read it; serve does"),
        ("stop 3 --serving '{port: 3}'", "--serving: ftray stop does not read it; serve does"),
        ("stop 3 --serving.prot 3", "--serving.prot: ftray stop does not read it; serve does"),
        ("stop 3 --srving.port 3", "unknown option --srving.port; did you mean serving"),
        ("stop 3 --port 3", "unknown option --port; tune, ui, serve have it"),
        ("stop 3 --resume", "--resume: ftray stop does not read it; train, tune do"),
        ("status --request.trial 3", "--request.trial: ftray status does not read it; stop, clone do"),
        ("tune --adapter.rank 4", "--adapter.rank: ftray tune does not read it; train, clone do"),
        ("train --plan", "--plan: ftray train does not read it; tune does"),
        ("train --search.trials 4", "--search.trials: ftray train does not read it; tune does"),
        ("infer --evaluation.split all", "--evaluation.split: ftray infer does not read it; evaluate, export do"),
        ("infer --evaluation '{split: all}'", "--evaluation.split: ftray infer does not read it; evaluate, export do"),
        ("infer --evaluation.batch_sise 4", "--evaluation.batch_sise; did you mean evaluation.batch_size?"),
        (
            "merge --data.limit 4",
            "--data.limit: ftray merge does not read it; preprocess, train, tune, evaluate, export",
        ),
    ],
)
def test_what_a_command_does_not_read_is_refused(typed, said, capsys):
    command, *arguments = shlex.split(typed)
    assert main([command, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ftray {command}: error: ")
    assert said in error
    assert error.count("\n") == 1


def test_the_guard_of_all_tests_tells_what_a_command_reads_without_saying_so():
    cfg = guarded("stop", parse("stop", ["3", "--run", "runs/search"])).model_copy(update={"resume": True})
    assert (cfg.request.trial, cfg.output, cfg.scaling.address, cfg.verbose) == (3, "runs/search", None, False)
    assert cfg.resume  # of its own making
    for read in (lambda: cfg.task, lambda: cfg.serving.port, lambda: cfg.scaling.workers):
        with pytest.raises(AssertionError, match="ftray stop reads "):
            read()
    assert type(pickle.loads(pickle.dumps(cfg)).serving) is ServingConfig


@pytest.mark.parametrize("name", COMMANDS)
def test_one_file_serves_all_commands(name, tmp_path):
    path = tmp_path / "all.yaml"
    path.write_text(yaml.safe_dump(Config().model_dump()))
    assert parse(name, ["--config", str(path)]) == Config()


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_documented_of_a_command_it_takes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("training: {epochs: 2}")
    for line in COMMANDS[name].example.splitlines():
        parse(name, shlex.split(line.partition(" > ")[0])[2:])
    for field in fields():
        if reads(name, field) and field.partition(".")[0] not in COMMANDS[name].flags and field not in SWITCHES:
            value = another(field)
            parse(name, [f"--{field}={value if isinstance(value, str) else json.dumps(value)}", *needed(field)])


def needed(field: str) -> list[str]:
    return ["--training.zero_stage=2"] if field == "training.offload" else []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'"a\\nb": 1', r"unknown key a\nb; known: "),
        (b'"\\L": 1', r"unknown key \u2028; known: "),
        (b'"\\N": 1', r"unknown key \x85; known: "),
        (b'"\\f": 1', r"unknown key \x0c; known: "),
        (b'"\\uD83D": 1', r"'\ud83d' holds half of a surrogate pair"),
        (b"a: 1\x02", "not valid YAML: unacceptable character #x0002"),
        (b"a: \xff", "not valid YAML: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_refusal_is_one_line_whatever_it_quotes(content, said, tmp_path, capsys):
    """Found by tests/fuzz."""
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    assert main(["config", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_unknown_command(capsys):
    assert main(["tun"]) == 2
    assert "did you mean tune" in capsys.readouterr().err


def test_readme_names_only_commands_and_files_that_exist():
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
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*build, str(tmp_path), source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel]
    subprocess.run(install, check=True, capture_output=True)
    (site,) = (tmp_path / "venv" / "lib").glob("*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_path("purelib"))
    code = "import ftray; from ftray.search.space import load_space; print(ftray.__file__, load_space('quick').methods)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout
    assert "'lora'" in done.stdout


def test_a_search_takes_the_port_that_its_page_asks_for(tmp_path, capsys):
    """Where one is taken, the page says `choose another --host or --port`."""
    ui = parse("tune", ["--ui", "--host", "0.0.0.0", "--port", "9000"]).ui
    assert (ui.serve, ui.host, ui.port) == (True, "0.0.0.0", 9000)
    cfg = Config.model_validate({"ui": {"port": 9000}})
    with shown_live(cfg, parse_location(str(tmp_path))):
        assert "page     none: --ui serves it" in capsys.readouterr().out
