"""What each model answered to each record, side by side: the lines of `answers.jsonl`."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NotRequired, TypedDict

from ftray.evaluation.metrics import Scores

UNDESIRABLE: Final = "undesirable"  # key of an answer that people judged bad


class Answer(TypedDict):
    """What one model made of one record.

    Attributes:
        text: generated or predicted; missing where the task has no text for an answer, or nothing was generated.
        loss: nats per supervised token of the target; missing where the record has none that is learnt.
    """

    text: NotRequired[str]
    loss: NotRequired[float]


class Answered(TypedDict):
    """A record with the answers of all models, by name.

    Attributes:
        target: empty where it has none.
        undesirable: an answer that people judged bad, of a record that has no other.
    """

    prompt: str
    target: str
    undesirable: NotRequired[str]
    answers: dict[str, Answer]


def side_by_side(rows: Sequence[Mapping[str, Any]], scores: Mapping[str, Scores | None]) -> list[Answered]:
    """One entry a record that every model was scored on.

    Args:
        rows: the records, of length [records].
        scores: by the name of the model; None: it was not scored.
    """
    known = {name: own for name, own in scores.items() if own is not None}
    found: list[Answered] = []
    for i, row in enumerate(rows):
        if all(i < len(own.loss) for own in known.values()):
            answers = {name: _answer(own, i) for name, own in known.items()}
            one: Answered = {"prompt": row["prompt"] or "", "target": row["target"] or "", "answers": answers}
            if UNDESIRABLE in row:
                one["undesirable"] = row[UNDESIRABLE]
            found.append(one)
    return found


def _answer(scores: Scores, i: int) -> Answer:
    answer: Answer = {"loss": float(scores.loss[i] / scores.tokens[i])} if scores.tokens[i] else {}
    if i < len(scores.generated):
        answer["text"] = scores.generated[i]
    return answer
