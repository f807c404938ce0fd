"""The reward of examples/grpo.yaml: how much of a word is pronounced as the dictionary has it."""

from typing import Any

from rapidfuzz.distance import Levenshtein


def pronunciation(records: list[dict[str, Any]], answers: list[str]) -> list[float]:
    """1 less the phoneme error rate of each answer, at least -1: endless answers are as bad as can be."""
    rewards = []
    for record, answer in zip(records, answers, strict=True):
        wanted = record["target"].split()
        errors = Levenshtein.distance(answer.split(), wanted)
        rewards.append(max(-1.0, 1 - errors / len(wanted)))
    return rewards
