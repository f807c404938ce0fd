"""Names of metrics as people say them, and which way is better."""

from collections.abc import Iterable

NAMES = {
    "loss": "loss",
    "paired_loss": "training loss",
    "exact_match": "exact match",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
    "mrr": "mean reciprocal rank",
    "squad_em": "SQuAD exact match",
    "squad_f1": "SQuAD F1",
    "macro_f1": "macro F1",
    "entity_f1": "entity F1",
    "adapter_bytes": "adapter size in bytes",
    "latency": "latency in seconds",
}
SMALL_IS_GOOD = ("loss", "perplexity", "error_rate")  # parts of the names of metrics; of the others, more is better
SAME = "the same trial"  # where the default configuration has won
SHARES = ("exact_match", "accuracy", "squad_em")  # metrics that are a share of the records


def metric_name(metric: str) -> str:
    """As it is said in a sentence."""
    validation = "validation " if metric.startswith("validation_") else ""
    plain = metric.removeprefix("validation_")
    return validation + NAMES.get(plain, plain.replace("_", " "))


def less_is_better(metric: str) -> bool:
    """Of a metric that ftray itself has."""
    return any(part in metric for part in SMALL_IS_GOOD)


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Of paths, as many parts from the end as tell them apart."""
    known = [*names]
    parts = {name: name.rstrip("/").split("/") for name in known}
    for count in range(1, max(map(len, parts.values()), default=0) + 1):
        tails = {name: "/".join(own[-count:]) for name, own in parts.items()}
        if len({*tails.values(), "base"}) == len(known) + 1:
            return tails
    return {name: name for name in known}


def counted(number: int, what: str) -> str:
    """So many things."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def capital(said: str) -> str:
    """With a capital letter first."""
    return said[:1].upper() + said[1:]


def percent(share: float) -> str:
    """A share as it is said in a sentence, which does not break in it: three digits that count."""
    return f"{100 * share:,.0f}\u00a0%" if abs(share) >= 1 else f"{100 * share:.3g}\u00a0%"
