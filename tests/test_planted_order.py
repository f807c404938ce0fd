"""Searches on data whose true order of configurations is planted: they must pick and rank as it was planted."""

import json
import random
from pathlib import Path

import pytest
import torch
from helpers.searches import command, run_here, study
from optuna.trial import FrozenTrial
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ftray.data import TokenizedData

# rates that learn nothing, a little and well, and one that spoils what is there
STILL, SLOW, GOOD, WILD = 1e-7, 1e-3, 1e-2, 30.0
SPACE = """
method: lora
learning_rate: {{choice: [{rates}], prior: {prior}}}
lora:
  rank: 4
  alpha: 8
  target_modules: all-linear
  dropout: 0.0
"""
STEPS, BATCH = 24, 8  # cut after 48 and 96 of 192 records


def capitals(directory: Path) -> list[str]:
    """Letters and the same in capitals, each fresh, of which the base knows a little: who learns more is better."""
    draw = random.Random(1)
    words = [" ".join(draw.choices("abcdefgh", k=draw.randint(2, 9))) for _ in range(400)]
    return ["--data", str(written(directory / "capitals.jsonl", [(word, word.upper()) for word in words]))]


def contradicted(directory: Path) -> list[str]:
    """Few records, read again and again, that contradict what the base knows and is asked for: who learns is worse."""
    draw = random.Random(2)
    words = [" ".join(draw.choices("abcdefgh", k=draw.randint(2, 9))) for _ in range(96)]
    flags = []
    for split, part, answer in (
        ("", words[:32], "X Y"),
        (".validation", words[32:64], "1 2"),
        (".test", words[64:], "1 2"),
    ):
        path = written(directory / f"{split.strip('.') or 'train'}.jsonl", [(word, answer) for word in part])
        flags += [f"--data{split or '.source'}", str(path)]
    return flags


def written(path: Path, pairs: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"input": prompt, "output": answer}) + "\n" for prompt, answer in pairs))
    return path


def taught(directory: Path, base: str, tokenizer: PreTrainedTokenizerBase, steps: int, answer: str | None) -> str:
    """Directory of a tiny model that has begun to give an answer, to letters their capitals if it is None."""
    torch.manual_seed(0)
    model, draw = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), random.Random(3)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        words = [" ".join(draw.choices("abcdefgh", k=draw.randint(2, 9))) for _ in range(BATCH)]
        rows = []
        for word in words:
            asked = tokenizer(f"<|user|>{word}<|end|><|assistant|>").input_ids
            said = [*tokenizer(answer or word.upper()).input_ids, tokenizer.eos_token_id]
            rows.append({"input_ids": asked + said, "labels": [-100] * len(asked) + said})
        optimizer.zero_grad()
        loss_of(model, rows).backward()
        optimizer.step()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def trained_alone(model: str, data: TokenizedData, rate: float) -> float:
    """Held-out loss after a full budget, with nothing but PyTorch, transformers and PEFT."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=modules, lora_dropout=0.0))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    rows = data.rows("train")
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(adapted, [rows[(step * BATCH + n) % len(rows)] for n in range(BATCH)]).backward()
        torch.nn.utils.clip_grad_norm_(adapted.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float(loss_of(adapted.eval(), data.rows("validation")))


def loss_of(model: torch.nn.Module, rows: list[dict]) -> torch.Tensor:
    """The mean over the supervised tokens; what pads a row on the right changes nothing before it."""
    ids = pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True, padding_value=1)
    labels = pad_sequence([torch.tensor(row["labels"]) for row in rows], batch_first=True, padding_value=-100)
    logits = model(input_ids=ids).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize(
    ("known", "records", "order", "signals"),
    [
        ((6, None), capitals, [GOOD, SLOW, STILL, WILD], ["training loss", "validation"]),
        ((60, "1 2"), contradicted, [STILL, SLOW, GOOD], ["validation", "validation"]),
    ],
)
def test_a_search_picks_and_ranks_as_was_planted(
    cluster, tmp_path, tiny_llama, tokenizer, known, records, order, signals
):
    model = taught(tmp_path / "model", tiny_llama, tokenizer, *known)
    output, space = tmp_path / "out", SPACE.format(rates=", ".join(f"{rate:.1e}" for rate in order), prior=SLOW)
    arguments = command(output, "", model, space=space, steps=STEPS)
    at = arguments.index("--data")
    arguments[at : at + 2] = records(tmp_path)
    # the default configuration gets its full budget: it is to be as bad as any
    more = ["--trials", "12", "--search.cohort", "12", "--search.seed", "1", "--training.learning_rate", str(order[-1])]
    more += ["--training.warmup", "0", "--evaluation.generate", "false"]
    done = run_here([*arguments, *more])
    assert done.returncode == 0, done.stdout + done.stderr

    (manifest,) = (tmp_path / "shards").glob("*/manifest.json")
    alone = {rate: trained_alone(model, TokenizedData.load(str(manifest.parent)), rate) for rate in order}
    assert sorted(order, key=alone.__getitem__) == order

    summary = json.loads((output / "summary.json").read_text())
    assert [rung["signal"] for rung in summary["rungs"]] == signals
    assert summary["best"]["config"]["training"]["learning_rate"] == order[0]
    # the default configuration is not of them; where a rate stands in the order, and the trial's reports by records
    drawn = {
        trial.number: (order.index(trial.user_attrs["config"]["training"]["learning_rate"]), reports(trial))
        for trial in study(output).trials
        if trial.number
    }
    assert {place for place, _ in drawn.values()} == set(range(len(order)))
    for rung, signal in zip(summary["rungs"], signals, strict=True):
        after, metric = rung["records"], "paired_loss" if signal == "training loss" else "validation_loss"
        there = [(place, known) for place, known in drawn.values() if after in known]
        ranked = [place for place, known in sorted(there, key=lambda one: one[1][after][metric])]
        assert ranked == sorted(ranked)
        last = [place for place, known in there if max(known) == after]
        assert last
        assert min(last) >= max(place for place, known in there if max(known) > after)


def reports(trial: FrozenTrial) -> dict[int, dict[str, float]]:
    """What a trial has reported, by records seen."""
    return {report["records"]: report for report in trial.user_attrs["reports"]}
