"""What a report says of single answers agrees with the texts that it shows, whatever the task is called."""

import json
import re

import numpy as np
import pytest
import yaml
from helpers.results import write_search

from ftray.evaluation.answers import side_by_side
from ftray.evaluation.metrics import Scores
from ftray.reports.contents import contents
from ftray.reports.page import rendered
from ftray.reports.run_files import read_run
from ftray.reports.samples import samples
from ftray.storage.location import parse_location
from ftray.task_spec import TaskSpec


def told(tmp_path, base: str, best: str, task: str = "CAUSAL_LM", **record):
    output = tmp_path / "out"
    write_search(output, trials=3)
    cfg = yaml.safe_load((output / "config.yaml").read_text())
    (output / "config.yaml").write_text(yaml.safe_dump(cfg | {"task": task}))
    answers = {"base": {"text": base, "loss": 1.0}, "best": {"text": best, "loss": 0.5}}
    line = {"prompt": "p", "target": "a b c", "answers": answers} | record
    (output / "answers.jsonl").write_text(json.dumps(line) + "\n")
    run = read_run(parse_location(str(output)))
    (sample,) = samples(run)
    return sample, rendered(contents(run))


@pytest.mark.parametrize(
    ("base", "best", "verdict"),
    [
        ("a b", "a b", "as before"),
        ("a b", "a b\n", "other white space"),
        ("a  b", "a b ", "other white space"),
        ("xyz", "uvw", "other words"),
        ("a b", "a b c", "better"),
        ("a b c", "a b", "worse"),
    ],
)
def test_the_badge_says_what_the_texts_show(tmp_path, base, best, verdict):
    sample, page = told(tmp_path, base, best)
    assert sample.verdict == verdict
    assert f'<span class="badge {verdict}">{verdict}</span>' in page


@pytest.mark.parametrize("task", ["SFT", "DPO", "GRPO", "CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_answers_in_words_may_be_nearly_right_whatever_the_objective(tmp_path, task):
    assert told(tmp_path, "x y", "a b x", task)[0].verdict == "better"


def test_a_class_is_right_or_wrong(tmp_path):
    assert told(tmp_path, "x y", "a b x", "SEQ_CLS")[0].verdict == "other words"


def test_an_answer_that_was_judged_bad_is_never_a_target(tmp_path):
    task = TaskSpec.named("KTO").load()
    rows = [
        {"prompt": "p", "target": "good one", "score": 1.0},
        {"prompt": "q", "target": "bad one", "score": 0.0},
    ]
    shown = [task.as_shown(row) for row in rows]
    assert [row["target"] for row in shown] == ["good one", ""]
    assert task.as_shown(shown[1]) == shown[1]
    scores = Scores(np.array([2.0, 0.0]), np.array([4.0, 0.0]))  # tokens of the good answer alone
    scores.generated = ["good one", "bad one"]
    good, bad = side_by_side(shown, {"base": scores, "best": scores})
    assert good["answers"]["best"] == {"loss": 0.5, "text": "good one"}
    assert bad == {
        "prompt": "q",
        "target": "",
        "undesirable": "bad one",
        "answers": {name: {"text": "bad one"} for name in ("base", "best")},
    }
    sample, page = told(tmp_path, "bad one", "another", "KTO", target="", undesirable="bad one")
    assert (sample.verdict, sample.right_before, sample.right_after) == ("other words", False, False)
    assert re.search(r"<h4>an answer that was judged bad</h4><div class=\"text\">bad one</div>", page)
    assert "<h4>target</h4>" not in page
