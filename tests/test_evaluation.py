import numpy as np
import pytest
import torch
from conftest import llama
from torch.nn import functional as F

from ftray.config import EvaluationConfig
from ftray.evaluation.metrics import Scores, compare
from ftray.evaluation.score import generate, score


def scores(loss, generated=(), targets=()) -> Scores:
    result = Scores(np.asarray(loss, float), np.ones(len(loss)))
    if generated:
        result.add_generated(generated, targets)
    return result


def test_error_rates_are_corpus_sums():
    result = scores([1, 1], ["F R IH1 S", " K AE1 T "], ["F R IH1 S B", "K AE1 T"])
    ratios = {name: top.sum() / bottom.sum() for name, (top, bottom) in result.ratios().items()}
    assert ratios["token_error_rate"] == pytest.approx(1 / 8)  # one of 5 + 3 phonemes is missing
    assert ratios["character_error_rate"] == pytest.approx(2 / (11 + 7))  # " B"
    assert ratios["exact_match"] == 0.5


def test_interval_holds_the_true_difference_as_often_as_it_claims():
    draw = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        base = draw.normal(2.0, 1.0, 80)
        best = base - 0.3 + draw.normal(0, 0.5, 80)
        low, high = compare(scores(base), scores(best), 400, seed=trial)["loss"]["interval"]
        held += low <= -0.3 <= high
    assert 0.90 <= held / 200 <= 0.99


def test_interval_shrinks_to_nothing_for_equal_models():
    metrics = compare(scores([1, 2, 3], ["a"] * 3, ["a", "b", "a"]), scores([1, 2, 3], ["a"] * 3, ["a", "b", "a"]), 100)
    for metric in metrics.values():
        assert metric["difference"] == 0
        assert metric["interval"] == [0, 0]
    assert metrics["perplexity"]["base"] == pytest.approx(np.exp(2))


@pytest.fixture(scope="module")
def rows(tokenizer):
    result = []
    for text in ("a b c", "the cat sat on the mat", "g", "a cat on a mat f"):
        prompt, target = tokenizer(text + "\n")["input_ids"], tokenizer(text.upper())["input_ids"] + [0]
        result.append(
            {
                "input_ids": prompt + target,
                "labels": [-100] * len(prompt) + target,
                "prompt": text + "\n",
                "target": text.upper(),
                "prompt_tokens": len(prompt),
            }
        )
    return result


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_scores_equal_one_record_at_a_time(rows, tokenizer, batch_size):
    model = llama().eval()
    got = score(model, tokenizer, rows, EvaluationConfig(generate=False, batch_size=batch_size))
    for n, row in enumerate(rows):
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"])[1:]
        wanted = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        assert got.loss[n] == pytest.approx(wanted, rel=1e-5)
        assert got.tokens[n] == (labels != -100).sum()


def test_batched_generation_equals_unbatched_greedy(rows, tokenizer):
    model = llama().eval()
    cfg = EvaluationConfig(max_new_tokens=12, batch_size=3)
    texts = generate(model, tokenizer, rows, cfg)
    for row, text in zip(rows, texts, strict=True):
        ids = list(row["input_ids"][: row["prompt_tokens"]])
        for _ in range(cfg.max_new_tokens):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(ids[row["prompt_tokens"] :], skip_special_tokens=True)
