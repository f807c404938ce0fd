"""The site is built strictly, and what its pages tell the reader to type is taken as it stands.

A page whose blocks name files (`title="…"`) is followed: the files are written, the commands run on a tiny model, what
is quoted after them is what they print. `tune` and `train` run up to where they would start Ray, with all that they
check; of what needs an earlier run, the command line is parsed. On all other pages, command lines alone are checked.
"""

import importlib
import io
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from helpers.pages import FENCE, Block, blocks, commands, indented, says, write
from helpers.ports import free_port
from helpers.record_files import TEMPLATE
from helpers.searches import environment, run_here
from transformers import AutoTokenizer

from ftray.cli import COMMANDS, parse
from ftray.errors import UserError

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted((REPOSITORY / "docs").glob("*.md"))
FOLLOWED = [page for page in PAGES if any(block.title for block in blocks(page))]
OF_EARLIER_RUNS = {"--from", "--adapter", "--run", "--warm-start", "--resume", "--merged"}


def test_the_site_is_built_without_a_warning(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    home = (tmp_path / "site" / "index.html").read_text()
    assert "https://fonts." not in home  # it opens from disk, without a network
    assert (tmp_path / "site" / "repository" / "search_spaces" / "kto.yaml.html").is_file()
    assert not list((tmp_path / "site").glob("*.py"))


def test_lists_begin_after_a_blank_line():
    """GitHub takes them without, the site does not."""
    begun = re.compile(r"^(?! |[-#>|]|\d+\.).+\n(?:-|1\.) .*", re.MULTILINE)
    texts = {page.name: FENCE.sub("", page.read_text()) for page in PAGES}
    assert {name: found for name, text in texts.items() if (found := begun.findall(text))} == {}


def test_what_is_said_of_other_tools_names_where_they_say_it():
    text = (REPOSITORY / "docs" / "comparison.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if "|" in line]
    cells = [(row[0], cell.strip(" |")) for row in rows if len(row) == 7 for cell in row[2:]]
    heads = {"axolotl", "LLaMA-Factory", "RapidFire AI", "Ludwig", "TRL", "---"}
    assert len(cells) > 80
    assert [cell for cell in cells if cell[1] not in heads and not re.match(r"-|.*\]\(https://", cell[1])] == []


@pytest.mark.parametrize("page", [REPOSITORY / "README.md", *PAGES], ids=lambda page: page.stem)
def test_command_lines_of_a_page_are_taken(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = blocks(page)
    for block in (block for block in shown if block.title):
        write(block, tmp_path)
    for block in [block for block in shown if block.language == "sh"] + indented(page):
        for name, *arguments in commands(block):
            if "--config" in arguments and not Path(config := arguments[arguments.index("--config") + 1]).exists():
                own = REPOSITORY / config
                shutil.copy(own, tmp_path / own.name) if own.exists() else (tmp_path / own.name).touch()
                arguments[arguments.index(config)] = own.name
            parse(name, arguments)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory, tiny_llama) -> str:
    """Directory of the tiny Llama, with a chat template that has a place for tools."""
    directory = str(tmp_path_factory.mktemp("chat") / "model")
    shutil.copytree(tiny_llama, directory)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("page", FOLLOWED, ids=lambda page: page.stem)
def test_what_a_page_shows_works(page, cluster, chat_model, clean_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed, shown = "", blocks(page)
    for block, following in pairwise([*shown, Block("", None, "")]):
        if block.title:
            write(block, tmp_path)
        elif block.language == "sh":
            printed = "".join(followed(name, arguments, chat_model) for name, *arguments in commands(block))
            assert ("error: " in printed) == ("error: " in following.text), printed
        elif block.language == "text":
            assert says(printed, block.text) == [], printed


@pytest.mark.slow
def test_the_tutorial_ends_at_an_endpoint_that_answers(cluster, chat_model, clean_cache, tmp_path, monkeypatch):
    """All of its commands as they are written, on a tiny model and for a few steps each."""
    monkeypatch.chdir(tmp_path)
    shown, done = blocks(REPOSITORY / "docs" / "tutorial.md"), []
    less = ["--model", chat_model, "--training.steps", "8", "--search.finalist_seeds", "1", "--data.max_length", "128"]
    for block in shown:
        if block.title:
            write(block, tmp_path)
        for name, *arguments in commands(block) if block.language == "sh" else ():
            done.append(name)
            if name == "serve":
                endpoint_answers(arguments)
                continue
            small = {"preprocess": less[:2], "tune": less, "infer": ["--generation.max_new_tokens", "8"]}[name]
            ran = run_here([sys.executable, "-m", f"ftray.{name}", *arguments, *small])
            assert ran.returncode == 0, ran.stderr
            assert ran.stdout.strip()
    assert done == ["preprocess", "tune", "tune", "infer", "serve"]
    assert (tmp_path / "runs/mine/report.html").exists()
    for left in ("adapter/adapter_config.json", "merged/config.json"):
        assert (tmp_path / "runs/mine/best" / left).exists()


def endpoint_answers(arguments: list[str]) -> None:
    """Ask what `ftray serve` serves, as the tutorial says it can be asked."""
    command = [sys.executable, "-m", "ftray.serve", *arguments, "--port", str(free_port())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(joined=True))
    try:
        url = next(line.split()[1] for line in process.stdout if line.startswith("endpoint "))
        served = [model["id"] for model in httpx.get(f"{url}/models").json()["data"]]
        assert {"best", "model", "trial-0"} <= {*served}
        asked = {"messages": [{"role": "user", "content": "Can I pay by invoice?"}], "max_tokens": 4}
        for name in ("best", "model"):
            got = httpx.post(f"{url}/chat/completions", json={"model": name, **asked}, timeout=120).json()
            assert got["usage"]["completion_tokens"] > 0, got
        assert "<html" in httpx.get(url.removesuffix("/v1") + "/").text
    finally:
        process.terminate()
        process.wait(60)


def followed(name: str, arguments: list[str], model: str) -> str:
    """What a command prints that a page shows, on `model`."""
    if OF_EARLIER_RUNS & set(arguments) or name not in ("preprocess", "tune", "train", "config"):
        parse(name, arguments)
        return ""
    if "model" in COMMANDS[name].flags and name != "config":
        arguments = [*arguments, "--model", model]
    if name == "train" or (name == "tune" and "--plan" not in arguments):
        out = io.StringIO()
        try:
            with redirect_stdout(out), redirect_stderr(out):
                importlib.import_module(f"ftray.{name}").check(parse(name, arguments))
        except UserError as error:
            print(f"ftray {name}: error: {error}", file=out)
        return out.getvalue()
    done = run_here([sys.executable, "-m", f"ftray.{name}", *arguments])
    assert done.returncode == 0 or "error: " in done.stderr, done.stderr
    return done.stdout + done.stderr
