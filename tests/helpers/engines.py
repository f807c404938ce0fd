"""Sequences for the serving engine, and an engine that runs until they are done."""

from ftray.serving.engine import Sequence, SequenceDelta
from ftray.serving.sampling import Sampling


def asked(prompt, adapter=None, **sampling):
    pieces: list[SequenceDelta] = []
    sequence = Sequence(list(prompt), Sampling(**{"temperature": 0.0, **sampling}), pieces.append, adapter)
    sequence.pieces = pieces
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
    return "".join(piece.text for piece in sequence.pieces)
