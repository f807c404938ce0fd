"""Answers before and after: which changed most, and in which words."""

import math
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from html import escape

from rapidfuzz.distance import Levenshtein

from ftray.evaluation.answers import UNDESIRABLE, Answer, Answered
from ftray.reports.run_files import RunFiles
from ftray.reports.words import short_names
from ftray.task_spec import TaskSpec

LONGEST = 1200  # characters shown of a text
ROOM = 1_400_000  # bytes of all samples together: a report stays a file that one can send
FRAME = 900  # bytes of markup around the texts of a sample
WORDS = 400  # of a text whose differences are marked
GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")  # tasks whose answers may be nearly right

Marked = list[tuple[str, bool]]  # stretches of a text, and whether the other one lacks them


@dataclass(frozen=True)
class Sample:
    """A record with the answers before and after.

    Attributes:
        undesirable: an answer that people judged bad, where the record has no target; else empty.
        change: how much nearer to the target the answer has come: from -1, right before and all wrong now, to 1.
        verdict: the change in a word, or whether the answers differ.
        before, after: the answers, in stretches that differ or don't.
        right_before, right_after: whether they are the target, but for white space at the ends.
        others: answers of further models.
        losses: of the target, by model.
        name: of the model that has answered after.
    """

    prompt: str
    target: str
    undesirable: str
    change: float
    verdict: str
    before: Marked
    after: Marked
    right_before: bool
    right_after: bool
    others: dict[str, str]
    losses: dict[str, float]
    name: str


def samples(run: RunFiles) -> list[Sample]:
    """Those that got most better first, those that got most worse last; none where nothing was answered in words.

    Where there are more than a page holds, those in the middle are left out.
    """
    known = [record for record in _answered(run) if sum("text" in answer for answer in record["answers"].values()) > 1]
    if not known:
        return []
    names = [*known[0]["answers"]]
    before, after = "base", "best" if "best" in names else next(name for name in names if name != "base")
    task = run.cfg.task if run.cfg else (run.evaluation or {}).get("task", "CAUSAL_LM")
    whole = TaskSpec.named(task).name in GENERATING
    ranked = sorted(known, key=lambda record: -_rank(record, before, after, whole))
    return _as_fit(ranked, lambda record: _sample(record, before, after, whole))


def _answered(run: RunFiles) -> list[Answered]:
    """Those in the output; where an older version left none, the few samples of the summary or the evaluation."""
    if run.answers:
        return run.answers
    if run.search and run.search.proof:
        few = run.search.proof.get("samples", [])
    else:
        few = run.evaluation.get("samples", []) if run.evaluation else []
    found: list[Answered] = []
    for sample in few:
        answers: dict[str, Answer] = {
            name: {"text": text} for name, text in sample.items() if name not in ("prompt", "target", UNDESIRABLE)
        }
        found.append({"prompt": sample["prompt"], "target": sample["target"], "answers": answers})
    return found


def _rank(record: Answered, before: str, after: str, nearly: bool) -> float:
    """The change; of equal ones, the fall of the loss decides."""
    losses = [record["answers"][name].get("loss", math.nan) for name in (before, after)]
    fall = losses[0] - losses[1] if all(loss == loss for loss in losses) else 0.0
    return _change(record, before, after, nearly) + 1e-6 * max(-1e3, min(1e3, fall))


def _change(record: Answered, before: str, after: str, nearly: bool) -> float:
    errors = [_error(record["answers"][name].get("text", ""), record["target"], nearly) for name in (before, after)]
    return errors[0] - errors[1]


def _verdict(change: float, before: str, after: str) -> str:
    """Of answers that are as near to the target, or have none, whether they differ, and in what."""
    if change:
        return "better" if change > 0 else "worse"
    if before == after:
        return "as before"
    return "other white space" if before.split() == after.split() else "other words"


def _error(text: str, target: str, nearly: bool) -> float:
    """0 where the text is the target; 1 where nothing of it is, or, unless `nearly` counts, where it is another."""
    text, target = text.strip(), target.strip()
    return float(Levenshtein.normalized_distance(text, target)) if nearly else float(text != target)


def _as_fit(ranked: Sequence[Answered], sample: Callable[[Answered], Sample]) -> list[Sample]:
    """From both ends, as many as there is room for."""
    first: list[Sample] = []
    last: list[Sample] = []
    left, room = deque(ranked), ROOM
    while left:
        worst = len(last) < len(first)
        made = sample(left.pop() if worst else left.popleft())
        room -= _size(made)
        if room < 0:
            break
        (last if worst else first).append(made)
    return [*first, *reversed(last)]


def _size(sample: Sample) -> int:
    """Bytes of its markup, about."""
    texts = [sample.prompt, sample.target, sample.undesirable, *sample.others.values()]
    marked = [*sample.before, *sample.after]
    parts = [*texts, *(part for part, _ in marked)]
    return sum(len(escape(part).encode()) for part in parts) + 11 * sum(own for _, own in marked) + FRAME


def _sample(record: Answered, before: str, after: str, nearly: bool) -> Sample:
    texts = {name: answer.get("text", "") for name, answer in record["answers"].items()}
    marked = differences(shown(texts[before]), shown(texts[after]))
    target, names = record["target"].strip(), {"base": "base"} | short_names(name for name in texts if name != "base")
    change = _change(record, before, after, nearly)
    return Sample(
        prompt=shown(record["prompt"]),
        target=shown(record["target"]),
        undesirable=shown(record.get(UNDESIRABLE, "")),
        change=change,
        verdict=_verdict(change, texts[before], texts[after]),
        before=marked[0],
        after=marked[1],
        right_before=target != "" and texts[before].strip() == target,
        right_after=target != "" and texts[after].strip() == target,
        others={names[name]: shown(text) for name, text in texts.items() if name not in (before, after)},
        losses={
            names[name]: own["loss"]
            for name, own in record["answers"].items()
            if not math.isnan(own.get("loss", math.nan))
        },
        name=names[after],
    )


def shown(text: str) -> str:
    """As much of a text as a page shows."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text) - LONGEST:,} characters more)"


def differences(before: str, after: str) -> tuple[Marked, Marked]:
    """Two texts in stretches of words, each with whether the other text lacks it."""
    words = [re.findall(r"\s+|\w+|[^\w\s]", text) for text in (before, after)]
    if max(map(len, words)) > WORDS:
        return [(before, False)], [(after, False)]
    left: Marked = []
    right: Marked = []
    for kind, a, b, c, d in SequenceMatcher(None, words[0], words[1], autojunk=False).get_opcodes():
        for marked, stretch in ((left, words[0][a:b]), (right, words[1][c:d])):
            if stretch:
                marked.append(("".join(stretch), kind != "equal"))
    return _joined(left), _joined(right)


def _joined(marked: Marked) -> Marked:
    """With the white space between two marked words marked too, in one stretch with them."""
    found: Marked = []
    for i, (part, own) in enumerate(marked):
        between = part.isspace() and 0 < i < len(marked) - 1 and marked[i - 1][1] and marked[i + 1][1]
        if found and found[-1][1] is (own or between):
            found[-1] = found[-1][0] + part, own or between
        else:
            found.append((part, own or between))
    return found
