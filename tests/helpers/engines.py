"""Sequences for the serving engine, and an engine that runs until they are done."""

from ftray.serving.engine import Sequence
from ftray.serving.generation_request import OutputDelta, Sampling


def asked(prompt, adapter=None, max_tokens=16, **sampling):
    deltas: list[OutputDelta] = []
    settings = Sampling(**{"temperature": 0.0, **sampling})
    sequence = Sequence(list(prompt), max_tokens, settings, deltas.append, adapter)
    sequence.deltas = deltas
    return sequence


def run(engine, sequences, at=()):
    """Submit each sequence at its step (default: at once) and step until all are done."""
    due = list(zip(at or [0] * len(sequences), sequences, strict=True))
    for step in range(1000):
        for when, sequence in due:
            if when == step:
                engine.submit(sequence)
        engine.step()
        if all(s.done for s in sequences):
            return [s.ids[len(s.prompt) :] for s in sequences]
    raise AssertionError("not done")


def text_of(sequence):
    return "".join(delta.text for delta in sequence.deltas)
