"""The runbook's commands, each as the program that it names takes it; what the paths stand for is run elsewhere.

`ftray status`, `stop` and `add` are run in test_control, test_storage (s3://) and test_cluster (a job's id), `ray job
submit` and a growing cluster in test_cluster, `optuna-dashboard` in test_search, the trackers in test_trackers.
"""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from helpers.pages import blocks, indented
from ray.scripts import scripts

from ftray.cli import COMMANDS, parse

ROOT = Path(__file__).parents[1]
PROGRAMS = "ftray|ray|kubectl|optuna-dashboard|tensorboard|mlflow|wandb|pip|pytest"


def commands() -> list[str]:
    """Those of blocks and of code within lines."""
    pages = [ROOT / "docs" / name for name in ("operations.md", "object-store.md")]
    shown = [block.text for page in pages for block in [*indented(page), *blocks(page)]]
    lines = [line.strip() for text in shown for line in text.replace("\\\n", " ").splitlines()]
    inline = [found for page in pages for found in re.findall(rf"`((?:{PROGRAMS}) [^`]+)`", page.read_text())]
    return lines + inline


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_runbook_is_one_that_its_program_takes(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(command)
    if program == "ftray":
        output = parse(words[0], words[1:]).output
        named = len(words) == 1  # in a sentence
        assert named or output == "/shared/runs/mine" or "s3://" in command or output.startswith("raysubmit_")
    elif program == "ray":
        group, rest = scripts.cli, words
        while hasattr(group, "commands"):
            group, rest = group.commands[rest[0]], rest[1:]
        if not rest:  # named in a sentence
            return
        taken = group.make_context(command, list(rest)).params
        if words[:2] == ["job", "submit"]:
            python, flag, module, *flags = taken["entrypoint"]
            assert (python, flag) == ("python", "-m")
            assert parse(module.removeprefix("ftray."), flags).output.startswith("/")
        elif words[0] == "up":
            assert Path(taken["cluster_config_file"]).exists()
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert re.fullmatch(r"ftray\[(\w+)\]", words[-1])[1] in extras
    elif program == "pytest":
        assert Path(words[-1]).exists()
        assert "pytest.mark.slow" in Path(words[-1]).read_text()
    elif program == "kubectl":
        assert Path(words[-1]).exists()
    elif program == "wandb":
        cli = pytest.importorskip("wandb.cli.cli").cli
        taken = cli.commands[words[0]].make_context(command, words[1:-1]).params
        assert words[0] == "login" or taken["include_offline"]
    elif program == "mlflow":  # the whole package has the page; test_trackers reads its database
        assert words == ["ui", "--backend-store-uri", "sqlite:////shared/runs/mine/mlflow.db"]
    else:
        assert program in ("optuna-dashboard", "tensorboard")


def test_the_runbook_is_about_every_way_to_see_and_lead_a_search():
    asked = {shlex.split(command)[1] for command in commands() if command.startswith("ftray ")}
    assert {"tune", "status", "stop", "add", "serve", "evaluate"} <= asked <= COMMANDS.keys()
