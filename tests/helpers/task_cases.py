"""Records of each task that a tiny model learns in seconds."""

import json
import random
from pathlib import Path


def sequence_labels(draw: random.Random) -> dict:
    """Which of four letters comes most often."""
    most = draw.choice("abcd")
    return {"text": " ".join([*most * 6, *draw.choices("abcd", k=3)]), "label": f"many {most}"}


def token_labels(draw: random.Random) -> dict:
    """Capitals are names, of which G is a place."""
    words = draw.choices(["the", "cat", "sat", "on", "a", "F", "G"], k=draw.randint(3, 9))
    return {"tokens": words, "tags": [{"F": "B-NAME", "G": "B-PLACE"}.get(word, "O") for word in words]}


def prompt_and_answer(draw: random.Random) -> dict:
    """The letter that the text is made of, in capitals."""
    letter = draw.choice("abcd")
    return {"input": " ".join(letter * draw.randint(2, 5)), "output": letter.upper()}


def question(draw: random.Random) -> dict:
    """What stands there in capitals."""
    words = draw.choices("abcdef", k=8)
    at = draw.randrange(8)
    words[at] = words[at].upper()
    answers = {"text": [words[at]], "answer_start": [2 * at]}
    return {"question": "which", "context": " ".join(words), "answers": answers}


def pair(draw: random.Random) -> dict:
    """A word and the same in capitals."""
    word = draw.choices("abcdefg", k=4)
    return {"anchor": " ".join(word), "positive": " ".join(word).upper()}


def scored(draw: random.Random) -> dict:
    """How many of four letters two texts share."""
    a, b = draw.choices("ab", k=4), draw.choices("ab", k=4)
    return {
        "sentence1": " ".join(a),
        "sentence2": " ".join(b),
        "score": sum(x == y for x, y in zip(a, b, strict=True)) / 4,
    }


# task: (model, a record, learning rate, the metric that rises, what it must come to)
CASES = {
    "SEQ_CLS": ("tiny_bert", sequence_labels, 1e-2, "macro_f1", 0.8),
    "SEQ_CLS decoder": ("tiny_llama", sequence_labels, 1e-2, "accuracy", 0.8),
    "TOKEN_CLS": ("tiny_bert", token_labels, 1e-2, "entity_f1", 0.9),
    "SEQ_2_SEQ_LM": ("tiny_t5", prompt_and_answer, 3e-2, "exact_match", 0.5),
    "QUESTION_ANS": ("tiny_bert", question, 1e-2, "squad_f1", 0.5),
    "FEATURE_EXTRACTION": ("tiny_bert", pair, 1e-2, "mrr", 0.3),
    "FEATURE_EXTRACTION scored": ("tiny_bert", scored, 1e-2, "spearman", 0.3),
}


def write(path: Path, record, count: int = 200) -> str:
    draw = random.Random(0)
    path.write_text("".join(json.dumps(record(draw)) + "\n" for _ in range(count)))
    return str(path)
