"""Families that are unlike Llama through the commands that a user types: train, merge, tune and serve."""

import json
from pathlib import Path

import httpx
import pytest
import torch
import transformers
from conftest import make_tokenizer
from helpers.searches import command, run_here
from helpers.servers import generated, serving_here
from peft import PeftModel

from benchmarks.tiny_models import tiny_config

SPACE = "method: {choice: [lora]}\nlora: {rank: {choice: [2, 4]}, target_modules: all-linear, learning_rate: 0.01}\n"
FAMILIES = [
    pytest.param("qwen3_5_text", id="hybrid", marks=pytest.mark.slow),
    pytest.param("gpt_oss", id="experts and sinks", marks=pytest.mark.slow),
    pytest.param("gemma3", id="language model beside a tower"),
]


def plain(directory: str | Path) -> transformers.PreTrainedModel:
    """As transformers alone loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=torch.arange(20, 50)[None]).logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_trains_merges_is_tuned_and_serves(kind, cluster, tmp_path, words):
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(tiny_config(kind, "CAUSAL_LM"))
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    own = {
        "--data": words,
        "--model": f"{tmp_path}/base",
        "--data.cache": f"{tmp_path}/shards",
        "--model.dtype": "fp32",
    }
    own |= {"--output": f"{tmp_path}/trained", "--adapter.target_modules": "all-linear", "--training.steps": "6"}
    own |= {
        "--model.dtype": "fp32",
        "--training.learning_rate": "0.01",
        "--training.evaluations": "1",
        "--data.max_length": "64",
    }
    done = run_here(["python", "-m", "ftray.train", *(part for pair in own.items() for part in pair)])
    assert done.returncode == 0, done.stderr + done.stdout
    given = ["--adapter", f"{tmp_path}/trained", "--output", f"{tmp_path}/merged", "--model.dtype", "fp32"]
    done = run_here(["python", "-m", "ftray.merge", *given])
    assert done.returncode == 0, done.stderr + done.stdout
    adapted = PeftModel.from_pretrained(plain(tmp_path / "base"), str(tmp_path / "trained" / "adapter")).eval()
    wanted = logits(adapted)
    assert (wanted - logits(plain(tmp_path / "base"))).abs().max() > 0.1  # it has learnt something
    torch.testing.assert_close(logits(plain(tmp_path / "merged")), wanted, atol=1e-4, rtol=0)
    searched = command(tmp_path / "tuned", words, f"{tmp_path}/base", "--search.trials", "2", space=SPACE, steps=6)
    done = run_here(searched)
    assert done.returncode == 0, done.stderr + done.stdout
    summary = json.loads((tmp_path / "tuned" / "summary.json").read_text())
    assert [row["status"] for row in summary["trials"]] == ["finished"] * len(summary["trials"])
    best = PeftModel.from_pretrained(plain(tmp_path / "base"), str(tmp_path / "tuned" / "best" / "adapter")).eval()
    tokenizer = make_tokenizer()
    with serving_here() as begin:
        url = begin("--run", f"{tmp_path}/tuned", f"--adapter=trained={tmp_path}/trained/adapter")
        for prompt in ("a b c\n", "f e d h\n"):
            for name, model in (("best", best), ("trained", adapted)):
                asked = {"model": name, "prompt": prompt, "max_tokens": 8, "temperature": 0}
                got = httpx.post(f"{url}/v1/completions", json=asked, timeout=120)
                assert got.status_code == 200, got.text
                ids = generated(model, tokenizer(prompt)["input_ids"], 8)
                assert got.json()["choices"][0]["text"] == tokenizer.decode(ids, skip_special_tokens=True)
