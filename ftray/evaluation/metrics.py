"""Corpus metrics of predictions, and bootstrap intervals of their differences."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein

from ftray.evaluation.intervals import interval_of

# Of `draws`, how often each record is drawn ([resamples, records]), the metric of each resample ([resamples]).
Metric = Callable[[np.ndarray], np.ndarray]


@dataclass
class Scores:
    """Per-record counts of one model over one list of records, all float64 of shape [records].

    Attributes:
        loss, tokens: summed cross-entropy (nats) and supervised tokens.
        exact: 1 where the generated text equals the target but for white space at the ends.
        token_edits, token_length: edit distance over white-space separated tokens (words, phonemes), and how many
            the target has.
        character_edits, character_length: the same over characters.
        rouge: ROUGE-L F measure (https://aclanthology.org/W04-1013), on lower-cased words without stemming.
        generated: the generated texts, or predictions as text; empty lists throughout if nothing was generated.
        metrics: those that a task has of its own.
        lengths: tokens of texts, by what they are, as `answer`, one a record that has such a text; see :func:`lengths`.
        of_text: whether the loss is that of text, so that its exponential is a perplexity.
    """

    loss: np.ndarray
    tokens: np.ndarray
    exact: np.ndarray = field(default_factory=lambda: np.zeros(0))
    token_edits: np.ndarray = field(default_factory=lambda: np.zeros(0))
    token_length: np.ndarray = field(default_factory=lambda: np.zeros(0))
    character_edits: np.ndarray = field(default_factory=lambda: np.zeros(0))
    character_length: np.ndarray = field(default_factory=lambda: np.zeros(0))
    rouge: np.ndarray = field(default_factory=lambda: np.zeros(0))
    generated: list[str] = field(default_factory=list)
    metrics: dict[str, Metric] = field(default_factory=dict)
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    of_text: bool = True

    def add_generated(self, generated: Sequence[str], targets: Sequence[str]) -> None:
        """Fill in the counts that compare text; distances by RapidFuzz, ROUGE-L by rouge-score, chrF by sacreBLEU.

        Where no record has a target, there is nothing to compare with.
        """
        from rouge_score.rouge_scorer import RougeScorer

        self.generated = list(generated)
        if not any(targets):
            return
        pairs = [(g.strip(), t.strip()) for g, t in zip(generated, targets, strict=True)]
        self.exact = np.array([g == t for g, t in pairs], float)
        self.token_edits = np.array([Levenshtein.distance(g.split(), t.split()) for g, t in pairs], float)
        self.token_length = np.array([len(t.split()) for _, t in pairs], float)
        self.character_edits = np.array([Levenshtein.distance(g, t) for g, t in pairs], float)
        self.character_length = np.array([len(t) for _, t in pairs], float)
        scorer = RougeScorer(["rougeL"])
        self.rouge = np.array([scorer.score(t, g)["rougeL"].fmeasure for g, t in pairs], float)
        self.metrics["chrf"] = chrf([t for _, t in pairs], [g for g, _ in pairs])

    def ratios(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Every metric as (numerator, denominator) of corpus sums."""
        ratios = {"loss": (self.loss, self.tokens)} if self.tokens.any() else {}
        if self.generated and len(self.exact):
            ratios |= {
                "exact_match": (self.exact, np.ones_like(self.exact)),
                "token_error_rate": (self.token_edits, self.token_length),
                "character_error_rate": (self.character_edits, self.character_length),
                "rouge_l": (self.rouge, np.ones_like(self.rouge)),
            }
        return ratios

    def all_metrics(self) -> dict[str, Metric]:
        """Every metric, as a function of the records that are drawn."""
        found = {name: ratio(*sums) for name, sums in self.ratios().items()}
        if self.of_text and (loss := found.get("loss")):
            found["perplexity"] = lambda draws: np.exp(np.minimum(loss(draws), 700))
        return found | self.metrics

    def values(self) -> dict[str, float]:
        """Every metric over all records."""
        everything = np.ones((1, len(self.loss)), int)
        return {name: float(metric(everything)[0]) for name, metric in self.all_metrics().items()}


def ratio(top: np.ndarray, bottom: np.ndarray) -> Metric:
    """A ratio of sums over records; 0 where there is nothing to divide by."""

    def metric(draws: np.ndarray) -> np.ndarray:
        tops, bottoms = draws @ top, draws @ bottom
        shares: np.ndarray = np.divide(tops, bottoms, out=np.zeros(len(draws)), where=bottoms != 0)
        return shares

    return metric


def macro_f1(wanted: np.ndarray, predicted: np.ndarray) -> Metric:
    """Mean over classes of F1, by scikit-learn; a class that is neither drawn nor predicted counts as 0."""
    from sklearn.metrics import f1_score

    def metric(draws: np.ndarray) -> np.ndarray:
        return np.array([f1_score(wanted, predicted, sample_weight=d, average="macro", zero_division=0) for d in draws])

    return metric


def chrf(wanted: Sequence[str], predicted: Sequence[str]) -> Metric:
    """Character n-gram F score (https://aclanthology.org/W15-3049) from 0 to 100, by sacreBLEU."""
    from ftray.compat import sacrebleu

    counts, score = sacrebleu.chrf(wanted, predicted)
    return lambda draws: np.array([score(total) for total in draws @ counts])


def spearman(wanted: np.ndarray, predicted: np.ndarray) -> Metric:
    """Rank correlation, by SciPy; 0 where it isn't defined, since all values are equal."""
    from scipy.stats import rankdata

    def one(draw: np.ndarray) -> float:
        a, b = (rankdata(np.repeat(values, draw)) for values in (wanted, predicted))
        return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0

    return lambda draws: np.array([one(draw) for draw in draws])


def resampled(records: int, resamples: int, seed: int = 0) -> np.ndarray:
    """How often each record is drawn, [resamples, records]."""
    return np.random.default_rng(seed).multinomial(records, np.full(records, 1 / records), size=resamples)


def compare(
    base: Scores, best: Scores, resamples: int, seed: int = 0, candidates: int = 1
) -> dict[str, dict[str, Any]]:
    """Each metric for both models, with a 95 % percentile-bootstrap interval of the difference best - base.

    Records are resampled in pairs, since both models saw the same ones (Efron and Tibshirani 1993, chapter 13).
    `token_error_rate` is the word or phoneme error rate. Perplexity is exp(loss), and so are its interval's ends
    the differences of resampled perplexities.

    Args:
        candidates: of which `best` was chosen. The interval is widened so that those of all of them would hold together
            with a chance of 95 %, whichever was chosen.

    Returns:
        Of each metric `base`, `best`, `difference`, and what :func:`ftray.evaluation.intervals.interval_of` tells.
    """
    draws = resampled(len(base.loss), resamples, seed)
    metrics, others = base.all_metrics(), best.all_metrics()
    values, other_values = base.values(), best.values()
    found = {}
    for name, metric in metrics.items():
        base_value, best_value = values[name], other_values[name]
        difference = best_value - base_value
        told = interval_of(others[name](draws) - metric(draws), difference, len(base.loss), candidates)
        found[name] = {"base": base_value, "best": best_value, "difference": difference, **told}
    return found


def compare_sources(
    sources: Sequence[str | None], base: Scores, best: Scores, resamples: int, candidates: int = 1
) -> dict[str, dict[str, Any]]:
    """The loss of both models on the records of each source of a mixture, as :func:`compare` has it, and their number.

    Nothing of tasks without one.

    Args:
        sources: the name of each record's source; those of no name are left out.
    """
    found = {}
    for name in sorted({name for name in sources if name}) if base.tokens.any() else ():
        own = [i for i, source in enumerate(sources) if source == name]
        before, after = (Scores(scores.loss[own], scores.tokens[own]) for scores in (base, best))
        found[name] = {"records": len(own), **compare(before, after, resamples, candidates=candidates)["loss"]}
    return found


def lengths(models: Mapping[str, Scores | None], resamples: int) -> dict[str, dict[str, Any]]:
    """Mean tokens of each model's answers, by its name, and of the texts of the records, by what they are.

    Each has a 95 % percentile-bootstrap interval of its own over records, where they are enough for one. Nothing where
    nobody has counted.
    """
    counted = [(name, scores.lengths) for name, scores in models.items() if scores]
    found = {name: own["answer"] for name, own in counted if "answer" in own}
    found |= {name: own for _, counts in counted for name, own in counts.items() if name != "answer"}
    return {name: _mean(own, resamples) for name, own in found.items() if len(own)}


def _mean(values: np.ndarray, resamples: int) -> dict[str, Any]:
    mean, drawn = float(values.mean()), resampled(len(values), resamples) @ values / len(values)
    told = {name: one for name, one in interval_of(drawn, mean, len(values)).items() if name != "shown"}
    return {"mean": mean, **told}
