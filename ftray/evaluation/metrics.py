"""Corpus metrics of generated text, and bootstrap intervals of their differences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from rapidfuzz.distance import Levenshtein


@dataclass
class Scores:
    """Per-record counts of one model over one list of records, all float64 of shape [records].

    Attributes:
        loss, tokens: summed cross-entropy (nats) and supervised tokens.
        exact: 1 where the generated text equals the target but for white space at the ends.
        token_edits, token_length: edit distance over white-space separated tokens (words, phonemes), and how many
            the target has.
        character_edits, character_length: the same over characters.
        generated: the generated texts; empty lists throughout if nothing was generated.
    """

    loss: np.ndarray
    tokens: np.ndarray
    exact: np.ndarray = field(default_factory=lambda: np.zeros(0))
    token_edits: np.ndarray = field(default_factory=lambda: np.zeros(0))
    token_length: np.ndarray = field(default_factory=lambda: np.zeros(0))
    character_edits: np.ndarray = field(default_factory=lambda: np.zeros(0))
    character_length: np.ndarray = field(default_factory=lambda: np.zeros(0))
    generated: list[str] = field(default_factory=list)

    def add_generated(self, generated: Sequence[str], targets: Sequence[str]) -> None:
        """Fill in the counts that compare text; distances by RapidFuzz."""
        self.generated = list(generated)
        pairs = [(g.strip(), t.strip()) for g, t in zip(generated, targets, strict=True)]
        self.exact = np.array([g == t for g, t in pairs], float)
        self.token_edits = np.array([Levenshtein.distance(g.split(), t.split()) for g, t in pairs], float)
        self.token_length = np.array([len(t.split()) for _, t in pairs], float)
        self.character_edits = np.array([Levenshtein.distance(g, t) for g, t in pairs], float)
        self.character_length = np.array([len(t) for _, t in pairs], float)

    def ratios(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Every metric as (numerator, denominator) of corpus sums."""
        ratios = {"loss": (self.loss, self.tokens)}
        if self.generated:
            ratios |= {
                "exact_match": (self.exact, np.ones_like(self.exact)),
                "token_error_rate": (self.token_edits, self.token_length),
                "character_error_rate": (self.character_edits, self.character_length),
            }
        return ratios


def compare(base: Scores, best: Scores, resamples: int, seed: int = 0) -> dict[str, dict[str, float | list[float]]]:
    """Each metric for both models, with a 95 % percentile-bootstrap interval of the difference best - base.

    Records are resampled in pairs, since both models saw the same ones (Efron and Tibshirani 1993, chapter 13).
    `token_error_rate` is the word or phoneme error rate. Perplexity is exp(loss), and so are its interval's ends
    the differences of resampled perplexities.
    """
    records = len(base.loss)
    # how often each record is drawn, one row a resample
    draws = np.random.default_rng(seed).multinomial(records, np.full(records, 1 / records), size=resamples)
    result: dict[str, dict[str, float | list[float]]] = {}
    for name, (top, bottom) in base.ratios().items():
        other_top, other_bottom = best.ratios()[name]
        before, after = top.sum() / bottom.sum(), other_top.sum() / other_bottom.sum()
        drawn = ((draws @ top) / (draws @ bottom), (draws @ other_top) / (draws @ other_bottom))
        result[name] = _entry(before, after, drawn[1] - drawn[0])
        if name == "loss":
            exponentials = [np.exp(np.minimum(d, 700)) for d in drawn]
            perplexities = math.exp(min(before, 700)), math.exp(min(after, 700))
            result["perplexity"] = _entry(*perplexities, exponentials[1] - exponentials[0])
    return result


def _entry(base: float, best: float, differences: np.ndarray) -> dict[str, float | list[float]]:
    low, high = np.percentile(differences, [2.5, 97.5])
    return {
        "base": float(base),
        "best": float(best),
        "difference": float(best - base),
        "interval": [float(low), float(high)],
    }
