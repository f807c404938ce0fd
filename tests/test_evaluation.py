import numpy as np
import pytest
import torch
from conftest import llama
from torch.nn import functional as F

from ftray.config import EvaluationConfig
from ftray.evaluation.generation import generate
from ftray.evaluation.intervals import said
from ftray.evaluation.metrics import Scores, chrf, compare, macro_f1, spearman
from ftray.tasks.answers import Window, best_span, normalised, word_f1
from ftray.tasks.causal import score
from ftray.tasks.token_labels import entities


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


def test_equal_models_have_no_interval_and_no_difference():
    own, target = [1, 2, 3] * 3, ["a", "b", "a"] * 3
    metrics = compare(scores(own, ["a"] * 9, target), scores(own, ["a"] * 9, target), 100)
    for metric in metrics.values():
        assert metric["difference"] == 0
        assert (metric["interval"], metric["shown"]) == (None, False)
    assert metrics["perplexity"]["base"] == pytest.approx(np.exp(2))


def test_so_few_records_bear_no_interval_and_no_claim():
    """By scipy's exact sign test: that all differences have one sign must be rarer than one case in twenty."""
    from scipy.stats import binomtest

    for candidates in (1, 2, 3):
        for records in range(1, 10):
            loss = np.linspace(1, 2, records)
            told = compare(scores(loss + np.linspace(1, 2, records)), scores(loss), 200, candidates=candidates)["loss"]
            is_enough = bool(binomtest(records, records).pvalue <= 0.05 / candidates)
            assert told["shown"] is is_enough
            assert (told["interval"] is not None) is is_enough
            assert is_enough is not ("too few: it takes" in told.get("reason", ""))
    one = compare(scores([2.0]), scores([1.0]), 200)["loss"]
    assert said(one) == "no interval: 1 record is too few: it takes 6"


def test_where_all_records_differ_by_as_much_there_is_a_difference_and_no_interval():
    told = compare(scores([1] * 8, ["a"] * 8, ["b"] * 8), scores([1] * 8, ["b"] * 8, ["b"] * 8), 100)
    exact = told["exact_match"]
    assert (exact["difference"], exact["shown"]) == (1.0, True)
    assert said(exact) == "no interval: the same on all 8 records"
    assert not told["loss"]["shown"]


def over_all(metric, records: int) -> float:
    return float(metric(np.ones((1, records), int))[0])


def test_metrics_of_drawn_records_equal_the_libraries_on_these_records():
    from sacrebleu.metrics import CHRF
    from scipy.stats import spearmanr
    from sklearn.metrics import f1_score

    wanted, predicted = ["the cat sat", "on the mat", "F R IH1 S"], ["the cat sits", "on a mat", "F R IH1 S"]
    draws = np.array([[1, 1, 1], [2, 0, 1]])
    given = [CHRF().corpus_score(predicted, [wanted]).score]
    given += [CHRF().corpus_score([predicted[i] for i in (0, 0, 2)], [[wanted[i] for i in (0, 0, 2)]]).score]
    assert chrf(wanted, predicted)(draws) == pytest.approx(given)
    assert over_all(chrf(wanted, wanted), 3) == pytest.approx(100)

    scores_, cosines = np.array([0.1, 0.5, 0.5, 0.9]), np.array([0.2, 0.1, 0.6, 0.7])
    assert over_all(spearman(scores_, cosines), 4) == pytest.approx(spearmanr(scores_, cosines).statistic)
    assert over_all(spearman(scores_, -cosines), 4) == pytest.approx(-spearmanr(scores_, cosines).statistic)
    assert over_all(spearman(np.ones(4), cosines), 4) == 0

    classes, guesses = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1])
    by_hand = (2 / 3 + 1 / 2 + 0) / 3  # class 0: 1 of 1 and 1 of 2; class 1: 1 of 3 and 1 of 1; class 2: none
    assert over_all(macro_f1(classes, guesses), 4) == pytest.approx(by_hand)
    assert f1_score(classes, guesses, average="macro") == pytest.approx(by_hand)


def test_entities_follow_their_scheme():
    assert entities(["B-A", "I-A", "O", "B-B"]) == {("A", 0, 1), ("B", 3, 3)}
    assert entities(["B-A", "B-A"]) == {("A", 0, 0), ("A", 1, 1)}
    assert entities(["B-A", "I-B"]) == {("A", 0, 0), ("B", 1, 1)}
    assert entities(["noun", "O", "noun"]) == {("noun", 0, 0), ("noun", 2, 2)}  # no scheme: an entity a word


def test_answers_compare_as_in_squad():
    assert normalised("The  Eiffel-Tower, a tower!") == "eiffeltower tower"
    assert word_f1("the cat sat", "a cat sat down") == pytest.approx(2 * 2 / (2 + 3))  # articles don't count
    assert word_f1("cat cat", "cat") == pytest.approx(2 / 3)
    assert word_f1("dog", "cat") == 0
    assert word_f1("", "the") == 1
    assert word_f1("", "cat") == 0


def test_the_best_span_ends_where_it_starts_or_later():
    window = Window([0] * 4, [], [None, (0, 1), (2, 3), (4, 5)])
    logits = np.array([[9.0, 0.0, 1.0, 5.0], [9.0, 4.0, 2.0, 0.0]])
    assert best_span(window, logits) == (5.0, (4, 5))  # 5 + 4 would end before it starts, 9 + 9 isn't of the context
    logits[0, 3] = 0.0
    assert best_span(window, logits) == (4.0, (0, 1))


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
