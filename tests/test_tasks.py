"""Each task from file to gradient to a plain model: the loss falls, metrics rise, plain PEFT gives the same outputs."""

import json
import random
import subprocess
import sys

import pytest
import torch
import transformers
from helpers.searches import run_here
from helpers.task_cases import CASES, token_labels, write
from peft import PeftModel

from ftray.adapters.merge import save_merged
from ftray.config import AdapterConfig, EvaluationConfig, ModelConfig, TrainingConfig, config_from
from ftray.data import DataCheck, prepare
from ftray.data.loader import batches, batches_in_order
from ftray.models.load import load_base, load_tokenizer
from ftray.task_spec import TaskSpec
from ftray.tasks.infer_task import infer_task
from ftray.training.run_spec import RunSpec
from ftray.training.single_run_trainer import SingleRunTrainer

FP32 = ModelConfig(dtype="fp32")
STEPS = 120


@pytest.mark.parametrize("name", CASES)
def test_a_task_learns_and_its_result_loads_anywhere(name, cluster, request, tmp_path):
    fixture, record, rate, metric, least = CASES[name]
    model, source = request.getfixturevalue(fixture), write(tmp_path / "data.jsonl", record)
    name = name.split()[0]
    cfg = config_from({"data": {"source": source, "cache": str(tmp_path), "max_length": 64}})
    check = DataCheck(cfg.data)
    cfg = infer_task(cfg, model, check.first)
    assert cfg.task == name
    tokenizer = load_tokenizer(model)
    data = prepare(cfg.data, model, task=name)
    assert data.task == check.run(tokenizer, name)

    adapter = AdapterConfig(method="lora", rank=8, target_modules="all-linear", dropout=0.0)
    training = TrainingConfig(batch_size=16, learning_rate=rate)
    trainer = SingleRunTrainer(RunSpec(FP32, model, adapter, training, STEPS, (1,), data.task))
    task, rows, held_out = data.task.load(), data.rows("test"), data.rows("validation")
    batch, losses, reports = next(batches_in_order(data, "validation", 4)), [], []

    def measure(adapted):
        with torch.no_grad():
            losses.append(task.loss(adapted.eval(), batch))
        return task.score(adapted, tokenizer, held_out, EvaluationConfig()).values()

    trainer.measure = measure
    trainer.fit(batches(data, 0, 0, 16), lambda: batches_in_order(data, "validation", 16), reports.append)
    trainer.save(str(tmp_path / "checkpoint"))
    assert reports[-1]["validation_loss"] < 0.8 * reports[0]["validation_loss"]

    base = load_base(FP32, model, data.task).model
    before = task.score(base, tokenizer, rows, EvaluationConfig())
    adapted = PeftModel.from_pretrained(base, tmp_path / "checkpoint" / "adapter")
    after = task.score(adapted, tokenizer, rows, EvaluationConfig())
    assert after.values()[metric] > max(least, before.values()[metric])
    assert set(task.choices(record(random.Random(0)))[0]) <= set(after.values())
    assert len(after.generated) == len(rows)
    scored = task.score(adapted, tokenizer, held_out, EvaluationConfig()).values()
    assert scored == pytest.approx({name: reports[-1][name] for name in scored}, rel=1e-5)

    save_merged(FP32, model, tmp_path / "checkpoint" / "adapter", tmp_path / "merged", data.task)
    auto = getattr(transformers, task.auto_class)
    labels = {"id2label": dict(enumerate(data.task.labels))} if data.task.labels else {}
    torch.manual_seed(1)  # the head that the base lacks comes from the adapter
    base = auto.from_pretrained(model, dtype=torch.float32, **labels)
    again = PeftModel.from_pretrained(base, tmp_path / "checkpoint" / "adapter").eval()
    merged = auto.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert not data.task.labels or merged.config.id2label == labels["id2label"]
    with torch.no_grad():
        torch.testing.assert_close(task.loss(again, batch), losses[-1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(task.loss(merged, batch), losses[-1], rtol=1e-4, atol=1e-5)


def test_micro_batches_of_unlike_size_make_the_same_step(cluster, tiny_bert, tmp_path):
    cfg = config_from({"data": {"source": write(tmp_path / "data.jsonl", token_labels), "cache": str(tmp_path)}})
    data = prepare(cfg.data, tiny_bert, task="TOKEN_CLS")
    adapter = AdapterConfig(method="lora", dropout=0.0)
    losses = []
    for rows in (16, 4):
        training = TrainingConfig(batch_size=16, micro_batch=rows, learning_rate=1e-2)
        trainer = SingleRunTrainer(RunSpec(FP32, tiny_bert, adapter, training, 4, (1, 2, 3, 4), data.task))
        reports = []
        trainer.fit(batches(data, 0, 0, rows), lambda: batches_in_order(data, "validation", 16), reports.append)
        losses.append([report[name] for report in reports for name in ("train_loss", "validation_loss")])
    words = {int((b["labels"] != -100).sum()) for b, _ in zip(batches(data, 0, 0, 4), range(4), strict=False)}
    assert len(words) > 1  # a mean of means would be another number
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


LOAD = """
import json, sys, torch, transformers
from peft import PeftModel
auto, base, best, labels = sys.argv[1:]
labels = json.loads(labels)
kwargs = {"id2label": dict(enumerate(labels))} if labels else {}
kind = getattr(transformers, auto)
adapted = PeftModel.from_pretrained(kind.from_pretrained(base, dtype=torch.float32, **kwargs), best + "/adapter").eval()
merged = kind.from_pretrained(best + "/merged", dtype=torch.float32).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(best + "/merged")
inputs = tokenizer("a b c", return_tensors="pt")
if merged.config.is_encoder_decoder:
    inputs["decoder_input_ids"] = inputs["input_ids"]
with torch.no_grad():
    for a, m in zip(adapted(**inputs).to_tuple(), merged(**inputs).to_tuple()):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, m, rtol=0, atol=1e-4 * a.abs().max().item())
assert "ftray" not in sys.modules
"""


@pytest.mark.parametrize(
    "name", [name if name == "SEQ_CLS" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_search_from_records_to_a_plain_model(name, cluster, request, tmp_path):
    fixture, record, _, metric, _ = CASES[name]
    model, source = request.getfixturevalue(fixture), write(tmp_path / "data.jsonl", record, 400)
    space = tmp_path / "space.yaml"
    space.write_text("method: lora\nlearning_rate: {log: [5.0e-3, 2.0e-2]}\nlora: {target_modules: all-linear}\n")
    output = tmp_path / "out"
    flags = ["--data", source, "--model", model, "--space", str(space), "--output", str(output), "--trials", "3"]
    settings = [
        "--data.cache",
        str(tmp_path),
        "--training.steps",
        "60",
        "--model.dtype",
        "fp32",
        "--data.max_length",
        "64",
        "--search.finalist_seeds",
        "1",
    ]
    if name == "SEQ_2_SEQ_LM":
        settings += ["--evaluation.max_new_tokens", "8"]
    command = [sys.executable, "-m", "ftray.tune", *flags, *settings]
    done = run_here(command)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((output / "summary.json").read_text())
    proof = summary["proof"]["metrics"]
    task = name.split()[0]
    assert f"one trial a pass: {task} pads its records" in done.stdout
    assert {t["status"] for t in summary["trials"]} <= {"finished", "stopped early"}
    usual = TaskSpec(task).load().choices(record(random.Random(0)))[1]
    assert summary["metric"] == f"validation_{usual}"
    assert summary["best"]["value"] == (min if usual == "loss" else max)(t["value"] for t in summary["trials"])
    assert proof[metric]["best"] > proof[metric]["base"]
    low, high = proof[metric]["interval"]
    assert low <= proof[metric]["difference"] <= high
    labels = json.loads((output / "best" / "adapter" / "task.json").read_text())["labels"]
    auto = TaskSpec(task).load().auto_class
    arguments = [auto, model, str(output / "best"), json.dumps(labels)]
    loaded = subprocess.run([sys.executable, "-c", LOAD, *arguments], capture_output=True, text=True, cwd=output)
    assert loaded.returncode == 0, loaded.stderr
