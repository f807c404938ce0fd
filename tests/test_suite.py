"""lm-eval's tasks beside the user's records, on local data: values by hand, refusals, the table and the report."""

import json
import math
import random

import numpy as np
import pytest
import torch
from helpers.searches import run_here
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import ftray
from ftray.config import SuiteConfig, config_from
from ftray.errors import UserError
from ftray.evaluation.suite import TaskScores, check_suite, compare_suite, rows_of

QUIZ = """
task: quiz
dataset_path: own/quiz
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{a}}"
doc_to_target: "{{t}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
DRAW = random.Random(0)
ROWS = [
    {"q": " ".join(DRAW.choices("abcdefgh", k=3)), "a": [f" {x}" for x in DRAW.sample("abcdefgh", 2)], "t": i % 2}
    for i in range(40)
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A task file with its data, and a copy of the data set of `arc_easy` as plain files."""
    directory = tmp_path_factory.mktemp("suite")
    (directory / "quiz.yaml").write_text(QUIZ)
    (directory / "own" / "quiz").mkdir(parents=True)
    (directory / "own" / "quiz" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    easy = directory / "allenai" / "ai2_arc" / "ARC-Easy"
    easy.mkdir(parents=True)
    asked = {"question": "a?", "choices": {"text": ["b", "c d"], "label": ["A", "B"]}, "answerKey": "B"}
    for split in ("train", "validation", "test"):
        (easy / f"{split}.jsonl").write_text("".join(json.dumps(asked) + "\n" for _ in range(5)))
    return directory


@pytest.fixture(scope="module")
def adapter(tiny_llama, tmp_path_factory):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    directory = tmp_path_factory.mktemp("adapted")
    adapted.save_pretrained(directory)
    return str(directory)


def answered(model, tokenizer):
    """Whether the model finds the right answer likelier, a record each."""
    found = []
    for row in ROWS:
        sums = []
        for choice in row["a"]:
            ids, asked = tokenizer(row["q"] + choice)["input_ids"], len(tokenizer(row["q"])["input_ids"])
            with torch.no_grad():
                logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
            sums.append(sum(logprobs[i - 1, ids[i]].item() for i in range(asked, len(ids))))
        found.append(float(np.argmax(sums) == row["t"]))
    return np.array(found)


@pytest.mark.slow
def test_what_was_forgotten_stands_beside_what_was_gained(
    cluster, directory, adapter, tiny_llama, tokenizer, words, tmp_path
):
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    given = {"--data": words, "--adapter": adapter, "--model": tiny_llama, "--model.dtype": "fp32"}
    given |= {"--data.cache": str(tmp_path / "shards"), "--data.max_length": "64", "--evaluation.max_new_tokens": "2"}
    given |= {"--suite": "lm-eval:quiz,arc_easy", "--suite.data": str(directory), "--output": str(tmp_path / "out")}
    done = run_here(["python", "-m", "ftray.evaluate", *(part for pair in given.items() for part in pair)])
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())

    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    before = answered(base, tokenizer)
    after = answered(PeftModel.from_pretrained(base, adapter), tokenizer)
    assert before.tolist() != after.tolist()
    quiz = result["suite"]["quiz acc"]
    assert (quiz["records"], quiz["less"]) == (len(ROWS), False)
    assert quiz["base"] == pytest.approx(before.mean())
    assert quiz["stderr"] == pytest.approx(before.std(ddof=1) / math.sqrt(len(ROWS)), rel=1e-6)
    own = quiz["adapters"][adapter]
    assert [own["base"], own["best"]] == pytest.approx([before.mean(), after.mean()])
    assert own["difference"] == pytest.approx((after - before).mean())
    spread = 1.96 * (after - before).std() / math.sqrt(len(ROWS))
    middle = sum(own["interval"]) / 2
    assert [middle - own["difference"], own["interval"][1] - middle] == pytest.approx([0, spread], abs=0.12)
    assert result["suite"]["arc_easy acc_norm"]["records"] == 5
    assert f"quiz acc, {len(ROWS)} records" in done.stdout
    assert f"{before.mean():.4g} ± " in done.stdout
    assert "what was forgotten shows" in done.stdout
    assert "quiz acc" in (tmp_path / "out" / "report.html").read_text()

    few = ftray.evaluate(
        data={"source": words, "max_length": 64, "cache": tmp_path / "shards"},
        model={"name": tiny_llama, "dtype": "fp32"},
        suite={"tasks": "lm-eval:quiz", "data": directory, "limit": 4},
        evaluation={"generate": False},
    )
    assert few.result["suite"]["quiz acc"]["base"] == pytest.approx(before[:4].mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tasks", "line"),
    [
        ("arc_esy", "suite.tasks: lm-eval has no task arc_esy; did you mean arc_easy"),
        ("quiz,arc_challenge", "suite.tasks: arc_challenge can't be loaded ("),
        ("hellaswag", "suite.data DIR: holds no copy of the data set Rowan/hellaswag: "),
    ],
)
def test_what_can_not_be_asked_is_one_line(tasks, line, directory):
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    with pytest.raises(UserError) as told:
        check_suite(SuiteConfig(tasks=f"lm-eval:{tasks}", data=str(directory)))
    assert str(told.value).startswith(line.replace("DIR", str(directory)))
    assert len(str(told.value).splitlines()) == 1


def test_a_suite_is_named_with_who_keeps_it():
    with pytest.raises(UserError, match=r"^suite.tasks: must match "):
        config_from({"suite": {"tasks": "arc_easy"}})
    assert SuiteConfig(tasks="lm-eval:a,b").names == ["a", "b"]
    assert SuiteConfig().names == []


def test_without_values_of_records_the_interval_follows_from_the_standard_errors():
    def scores(value, stderr, each=()):
        return TaskScores(value, stderr, 40, np.array(each, float), less=True)

    base = {"a ppl": scores(9.0, 0.3), "b it": scores(0.5, None), "c acc": scores(0.5, 0.1, [0, 1] * 20)}
    best = {"a ppl": scores(8.0, 0.4), "b it": scores(0.75, None), "c acc": scores(0.0, 0.0, [0, 0] * 20)}
    found = compare_suite(base, {"one": best}, 200)
    assert found["a ppl"]["adapters"]["one"]["interval"] == pytest.approx([-1.98, -0.02])
    assert found["b it"]["adapters"]["one"] == {
        "base": 0.5,
        "best": 0.75,
        "difference": 0.25,
        "interval": None,
        "shown": False,
        "reason": "its error is not known",
        "stderr": None,
    }
    low, high = found["c acc"]["adapters"]["one"]["interval"]
    assert -0.7 < low < -0.5 < high < -0.3
    rows = rows_of(found, ["one"])
    assert rows[0] == ("a ppl, 40 records", "9 ± 0.3", ["8  (-1.98 to -0.02)"])
    assert rows[1] == ("b it, 40 records", "0.5", ["0.75  (no interval: its error is not known)"])
