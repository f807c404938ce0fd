import subprocess
import sys
from pathlib import Path

import pytest

from ftray.cli import COMMANDS, main, parse
from ftray.reference import reference

ROOT = Path(__file__).parents[1]


def test_the_reference_in_docs_is_what_the_models_say():
    assert (ROOT / "docs" / "configuration.md").read_text() == reference()


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
        assert COMMANDS[name].example in done.stdout
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
