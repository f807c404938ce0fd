"""A metric of the user's own: checked before anything begins, used wherever answers are judged, mended and resumed."""

import json
import re

import numpy as np
import pytest
from helpers.searches import SPACE, command, run_here, study

from ftray.cli import main
from ftray.config import Config, metrics_named
from ftray.errors import UserError
from ftray.evaluation.metrics import Scores, compare
from ftray.evaluation.user_metric import UserMetric, UserMetricError, user_metrics

ROWS = [{"prompt": f"p{i}", "target": "T" * i, "source": None, "key": 3} for i in range(4)]
SAME = """
def same(records, answers):
    return [answer.strip() == record["target"].strip() for record, answer in zip(records, answers)]
"""


def test_a_record_s_own_fields_are_never_written_over():
    own = {"prompt": [{"role": "user", "content": "q"}], "target": 4, "source": "amc"}
    row = {"prompt": "<|user|>q", "target": "4", "source": "a.jsonl"}
    found = row | {"level": 2}
    for extra, given in ((own, own), ({"level": 2}, found)):
        source = f"def f(records, answers):\n    return [record == {given!r} for record in records]\n"
        assert UserMetric("r.py", "f", source).values([row | {"extra": json.dumps(extra)}], ["4"]).tolist() == [1.0]


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("def f(records, answers:\n    return []", "score.py:1: "),
        ("import nowhere\n", "score.py:1: ModuleNotFoundError: No module named 'nowhere'"),
        ("1 / 0\n", "score.py:1: ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit(3)\n", "score.py:2: SystemExit: 3"),
        ("def g(records, answers):\n    return []\n", "score.py: has no function f"),
        ("f = 3\n", "score.py: has no function f"),
        ("\n\ndef f(records):\n    return []\n", "score.py:3: f must take (records, answers), two lists: too many"),
        (
            "def f(records, answers, more):\n    return []\n",
            "score.py:1: f must take (records, answers), two lists: ",
        ),
        (
            "def f(records, answers):\n    return [1 / len(a) for a in answers]\n",
            "score.py:2: ZeroDivisionError: division by zero (f of record 0, prompt 'p0', answer '')",
        ),
        (
            "def h(r):\n    return r['wish']\ndef f(records, answers):\n    return [h(r) for r in records]\n",
            "score.py:2: KeyError: 'wish' (f of record 0, prompt 'p0', answer '')",
        ),
        (
            "def f(records, answers):\n    assert len(records) < 2, 'few'\n    return [1.0]\n",
            "score.py:2: AssertionError: few (f of 4 records together)",
        ),
        ("def f(records, answers):\n    return 1.0\n", "score.py:1: f gave 1.0, not a list of numbers, one a record"),
        (
            "def f(records, answers):\n    return ['good'] * 4\n",
            "score.py:1: f gave ['good', 'good', 'good', 'good']",
        ),
        ("def f(records, answers):\n    return [1.0]\n", "score.py:1: f gave 1 numbers for 4 records"),
        (
            "def f(records, answers):\n    return [1, 2, float('nan'), 3]\n",
            "score.py:1: f gave nan for record 2, prompt 'p2', answer 'TT'",
        ),
    ],
)
def test_a_function_that_can_not_be_used_is_one_line(source, line):
    with pytest.raises(UserError) as told:
        UserMetric("score.py", "f", source).try_on(ROWS)
    assert str(told.value).startswith(line)
    assert "\n" not in str(told.value)


REFUSED_RESULTS = {
    "{0: 1, 1: 0, 2: 1, 3: 0}": "{0: 1, 1: 0, 2: 1, 3: 0}, not",
    "{'reward': [1.0] * 4}": "{'reward': [1.0, 1.0, 1.0, 1.0]}, not",
    "'1010'": "1010, not",
    "b'1010'": "b'1010', not",
    "{1, 2, 3, 4}": "{1, 2, 3, 4}, not",
    "['1', '0', '1', '0']": "['1', '0', '1', '0'], not",
    "None": "None, not",
    "[1, None, 1, 0]": "[1, None, 1, 0], not",
    "[[1], [0], [1], [0]]": "[[1], [0], [1], [0]], not",
    "[10**400, 1, 1, 1]": "[1000",
    "[1j, 1, 1, 1]": "[1j, 1, 1, 1], not",
    "np.float32(3)": "3.0 of shape (), not",
    "np.ones((4, 1))": "[[1.] [1.] [1.] [1.]] of shape (4, 1), not",
    "np.ones((1, 4))": "[[1. 1. 1. 1.]] of shape (1, 4), not",
    "np.array(['1', '0', '1', '0'])": "['1' '0' '1' '0'], not",
    "torch.ones(4, 1)": "tensor([[1.], [1.], [1.], [1.]]) of shape (4, 1), not",
    "torch.tensor(1.0)": "tensor(1.) of shape (), not",
    "list(torch.ones(4, 1))": "[tensor([1.]), tensor([1.]), tensor([1.]), tensor([1.])], not",
    "[1.0] * 5": "5 numbers for 4 records",
    "np.ones(3)": "3 numbers for 4 records",
    "torch.tensor([1.0, float('nan'), 1.0, 1.0])": "nan for record 1, prompt 'p1', answer 'T'",
    "[1, float('-inf'), 1, 1]": "-inf for record 1, prompt 'p1', answer 'T'",
}
TAKEN_RESULTS = [
    "[1, 0.0, True, False]",
    "(1, 0, 1, 0)",
    "np.array([1, 0, 1, 0])",
    "np.array([1, 0, 1, 0], np.float16)",
    "np.array([1, 0, 1, 0]) > 0",
    "list(np.array([1.0, 0, 1, 0]))",
    "torch.tensor([1, 0, 1, 0])",
    "torch.tensor([1.0, 0, 1, 0], dtype=torch.bfloat16, requires_grad=True)",
    "[torch.tensor(1.0), torch.tensor(0), 1, 0]",
    "(float(i % 2 == 0) for i in range(4))",
    "{0: 1, 1: 0, 2: 1, 3: 0}.values()",
]


def giving(result: str) -> UserMetric:
    return UserMetric(
        "score.py", "f", f"import numpy as np\nimport torch\ndef f(records, answers):\n    return {result}"
    )


@pytest.mark.parametrize("result", REFUSED_RESULTS)
def test_a_result_that_is_no_list_of_numbers_is_refused_and_not_read_by_its_keys_or_rows(result):
    with pytest.raises(UserError) as told:
        giving(result).try_on(ROWS)
    assert str(told.value).startswith(f"score.py:3: f gave {REFUSED_RESULTS[result]}")
    assert "record" in str(told.value)


@pytest.mark.parametrize("result", TAKEN_RESULTS)
def test_a_number_a_record_is_taken_in_whatever_list_it_comes(result):
    assert giving(result).values(ROWS, [""] * 4).tolist() == [1.0, 0.0, 1.0, 0.0]


def test_a_generator_that_raises_is_named_by_the_line_and_the_record():
    with pytest.raises(UserError, match=r"score.py:4: ZeroDivisionError: .* \(f of record 0, prompt 'p0', answer ''\)"):
        giving("(1 / len(answer) for answer in answers)").try_on(ROWS)


def test_a_function_sees_prompt_target_and_source_and_may_change_what_it_is_given():
    source = (
        "from dataclasses import dataclass\n@dataclass\nclass Seen:\n    keys: list\n"
        "def f(records, answers):\n    keys = Seen(sorted(records[0])).keys\n"
        "    records[0].clear()\n    answers.clear()\n"
        "    return [len(keys)]\n"
    )
    metric = UserMetric("score.py", "f", source)
    rows = [{"prompt": "p", "target": "t", "source": "part", "input_ids": [1]}]
    answers = ["a"]
    assert metric.values(rows, answers).tolist() == [3.0]
    assert metric.values([rows[0] | {"source": None}], answers).tolist() == [2.0]
    assert (answers, rows[0]["prompt"]) == (["a"], "p")


def test_its_mean_and_interval_are_those_of_a_metric_that_is_known():
    draw = np.random.default_rng(0)
    rows = [{"prompt": "", "target": "abc"[draw.integers(3)]} for _ in range(40)]
    base, best = (Scores(np.ones(40), np.ones(40)) for _ in range(2))
    for scores in (base, best):
        scores.add_generated(["abc"[draw.integers(3)] for _ in rows], [row["target"] for row in rows])
        UserMetric("score.py", "same", SAME).add_to(scores, rows)
    found = compare(base, best, 200)
    assert found["same"] == found["exact_match"]


REFUSED = {
    "no file": (["--search.metric", "none.py:f", "--search.direction", "max"], "search.metric none.py:f: can't be re"),
    "no function": (
        ["--search.metric", "score.py:sane", "--search.direction", "max"],
        "score.py: has no function sane",
    ),
    "no direction": (["--search.metric", "score.py:same"], "search.metric score.py:same: which is better? Give searc"),
    "odd direction": (["--search.direction", "up"], "search.direction: must be min or max, one a metric, comma-separ"),
    "directions": (["--search.direction", "min,max"], "search.direction min,max: give 1, one a metric"),
    "no text": (
        ["--search.metric", "score.py:same", "--search.direction", "max", "--evaluation.generate", "false"],
        "search.metric score.py:same: is of generated text, and evaluation.generate is false",
    ),
    "taken": (
        ["--search.metric", "score.py:loss", "--search.direction", "max"],
        "search.metric score.py:loss: CAUSAL_LM has another metric validation_loss: rename one",
    ),
    "raises": (
        ["--search.metric", "score.py:shares", "--search.direction", "max"],
        "score.py:5: ZeroDivisionError: division by zero (shares of record 0, prompt ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("name", ["tune", "train"])
def test_what_is_wrong_is_told_before_anything_begins(name, case, tmp_path, words, tiny_llama, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "score.py").write_text(
        SAME + "def shares(r, a):\n    return [1 / len(x) for x in a]\nloss = same\n".lstrip()
    )
    flags, line = REFUSED[case]
    assert main([name, "--data", words, "--model", tiny_llama, "--output", "out", *flags]) == 2
    told = capsys.readouterr().err
    assert line in told, told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_function_names_no_file_twice():
    from ftray.config import SearchConfig

    search = SearchConfig(metric="~/a/score.py:one,validation_loss", direction="max,min")
    assert [(goal.metric, goal.sign) for goal in search.goals] == [("validation_one", -1), ("validation_loss", 1)]
    with pytest.raises(UserError, match=re.escape("search.metric ~/a/score.py:one: can't be read: No such file")):
        user_metrics(search)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("loss", ["loss"]),
        ("loss, exact_match", ["loss", " exact_match"]),
        ("", [""]),
        ("loss,", ["loss", ""]),
        (",loss", ["", "loss"]),
        ("/a,b/c,d.py:one", ["/a,b/c,d.py:one"]),
        ("loss,./a,b.py:one , latency", ["loss", "./a,b.py:one", " latency"]),
        ("~/a.py:one,/b,c.pkl:two,loss", ["~/a.py:one", "/b,c.pkl:two", "loss"]),
        ("s3://b/a,b.pkl:one,m.py:two", ["s3://b/a,b.pkl:one", "m.py:two"]),
        ("/no/function,loss", ["/no/function", "loss"]),
    ],
)
def test_commas_separate_metrics_and_are_parts_of_paths(given, names):
    assert metrics_named(given) == names


def test_a_metric_of_a_file_with_a_comma(tmp_path, monkeypatch, words, tiny_llama, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--data", words, "--model", tiny_llama, "--output", "out", "--search.metric", "a,b.py:one"]
    assert main(["tune", *flags]) == 2
    said = "ftray tune: error: search.metric a: CAUSAL_LM has no such metric; a path with a comma begins with ./\n"
    assert capsys.readouterr().err == said
    (tmp_path / "a,b.py").write_text("def one(records, answers):\n    return [1.0] * len(records)\n")

    def search(metric):
        return Config.model_validate({"search": {"metric": metric, "direction": "max,min"}}).search

    given = search("./a,b.py:one,validation_loss")
    (metric,) = user_metrics(given)
    assert (metric.path, metric.name) == ("./a,b.py", "one")
    assert [(goal.metric, goal.direction) for goal in given.goals] == [
        ("validation_one", "max"),
        ("validation_loss", "min"),
    ]


def test_a_search_goes_by_it_stops_where_it_raises_and_resumes_once_it_is_mended(
    cluster, tmp_path, words, tiny_llama, monkeypatch
):
    """The file is read where the command is given, and by nobody else; what it must not see lies beside it."""
    monkeypatch.chdir(tmp_path)
    fails = "    assert len(records) < 5, 'many'\n" + SAME.splitlines()[-1] + "\n"
    (tmp_path / "score.py").write_text(SAME.splitlines()[1] + "\n" + fails)
    flags = ["--trials", "3", "--search.metric", "score.py:same", "--search.direction", "max", "--search.scheduler"]
    arguments = command(tmp_path / "out", words, tiny_llama, *flags, "none", space=SPACE, steps=6)
    arguments += ["--training.evaluations", "2"]
    done = run_here(arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    line = "ftray tune: score.py:2: AssertionError: many (same of 14 records together); the same command with --resume"
    assert line in done.stderr
    assert "Traceback" not in done.stderr
    stepped = {path.parent.name: path.name for path in (tmp_path / "out/tune").glob("trial-*/checkpoint_*")}
    assert set(stepped.values()) == {"checkpoint_00000003"}  # what was trained is kept

    (tmp_path / "score.py").write_text(SAME)
    done = run_here([*arguments, "--resume"])
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["metric"], summary["direction"]) == ("validation_same", "max")
    assert summary["proof"]["metrics"]["same"] == summary["proof"]["metrics"]["exact_match"]
    values = [trial["value"] for trial in summary["trials"]]
    assert values == sorted(values, reverse=True)
    assert summary["best"]["trial"] == summary["trials"][0]["trial"]
    for trial in study(tmp_path / "out").get_trials():
        assert [(report["step"], "validation_same" in report) for report in trial.user_attrs["reports"]] == [
            (3, True),
            (6, True),
        ]


def test_a_trial_with_workers_of_its_own_stops_and_resumes_likewise(cluster, tmp_path, words, tiny_llama, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "score.py").write_text(SAME.replace("return", "assert len(records) < 5; return"))
    flags = [
        "--trials",
        "1",
        "--pack",
        "off",
        "--max-failures",
        "0",
        "--search.metric",
        "score.py:same",
        "--search.direction",
        "max",
    ]
    arguments = command(tmp_path / "out", words, tiny_llama, *flags, steps=4)
    done = run_here(arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "ftray tune: score.py:3: AssertionError (same of 14 records together);" in done.stderr
    (tmp_path / "score.py").write_text(SAME)
    done = run_here([*arguments, "--resume"])
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_function_that_raises_at_the_proof_can_be_mended_too(monkeypatch):
    from ray.exceptions import RayTaskError

    from ftray.storage.local import LocalLocation
    from ftray.tune import why_it_stopped

    error = UserMetricError("score.py:3: ValueError: odd (same of record 0)")
    wrapped = RayTaskError("prove", "Traceback\n...", error).as_instanceof_cause()
    assert why_it_stopped(wrapped, LocalLocation("/nowhere")) == f"{error};"
