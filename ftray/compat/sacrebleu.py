"""Private names of sacreBLEU; seen in sacreBLEU 2.6.0."""

from collections.abc import Callable, Sequence

import numpy as np
from sacrebleu.metrics import CHRF


def chrf(wanted: Sequence[str], predicted: Sequence[str]) -> tuple[np.ndarray, Callable[[Sequence[float]], float]]:
    """Counts of each record [records, counts], and the chrF score of a sum of them.

    The public functions score whole corpora: a bootstrap would count all n-grams anew for each resample.
    """
    scorer = CHRF()
    counts = np.array(scorer._extract_corpus_statistics(list(predicted), [list(wanted)]))
    return counts, lambda total: scorer._compute_score_from_stats(list(total)).score
