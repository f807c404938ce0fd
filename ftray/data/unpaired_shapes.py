"""Shapes of answers that were judged one by one: an answer, and whether it is a good one."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ftray.data import meanings
from ftray.data.fields import as_typed
from ftray.data.meanings import VERDICTS
from ftray.data.records import REFUSED, SHAPES, Example, turns_of_both
from ftray.data.refusals import kept
from ftray.data.respelt import respelt
from ftray.data.shapes import Record, Shape, fitting, is_empty, number
from ftray.data.turns import Turn
from ftray.errors import UserError

NEEDS = "prompt/completion/label, messages/label or any question and its answer, and label or kto_tag, true or false"


@dataclass(frozen=True)
class Judged:
    """An answer, and whether it is a good one.

    Attributes:
        example: the prompt with the answer, which alone bears loss; in conversations, earlier turns are context.
        desirable: whether it is a good one.
        where: the record stands.
        mismatched: the same prompt with the answer to another one; None: with its own.
    """

    example: Example
    desirable: bool
    where: object = field(default="", compare=False)
    mismatched: Example | None = None

    @property
    def answer(self) -> tuple[Turn, ...]:
        """The answer as turns."""
        example = self.example
        if example.messages is None:
            return (Turn("assistant", example.target),)
        return example.messages[example.learnt[0] : example.learnt[-1] + 1]


def with_answer_of(judged: Judged, other: Judged) -> Judged:
    """A record with the answer to another one as the mismatched one."""
    example, answer = judged.example, other.answer
    if example.messages is None:
        return replace(judged, mismatched=replace(example, target=answer[-1].words or answer[-1].text))
    prompt = example.messages[: example.learnt[0]]
    context = frozenset(index for index, turn in enumerate(prompt) if turn.role == "assistant")
    return replace(judged, mismatched=replace(example, messages=(*prompt, *answer), context=context))


def verdict(value: object) -> bool | None:
    """Whether a label says that an answer is good (True) or bad (False); None: it says neither."""
    value = number(value)
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (-1, 0, 1)):  # pandas makes floats
        return value > 0
    said = "_".join(meanings.words(value)) or value.strip() if isinstance(value, str) else ""
    return True if said in meanings.YES else False if said in meanings.NO else None


def _judged(shape: Shape) -> Shape:
    """The shape of an answer with a verdict beside."""

    def parse(record: Record, where: object) -> Judged:
        said = {key: verdict(record[key]) for key in VERDICTS if not is_empty(record.get(key))}
        if len({*said.values()}) > 1:
            raise UserError(f"{where}: {' and '.join(said)} say different things of one answer: leave one of them out")
        example = shape.parse({key: value for key, value in record.items() if key not in said}, where)
        return Judged(last_alone(example, len(shape.turns) == 2, where), any(said.values()), where)

    def fits(record: Record) -> bool:
        said = [verdict(record[key]) for key in VERDICTS if not is_empty(record.get(key))]
        return bool(said) and None not in said and (shape.fits is None or bool(shape.fits(record)))

    return replace(shape, parse=parse, fits=fits, honours=(*shape.honours, *VERDICTS), refuses=REFUSED)


def last_alone(example: Example, is_parted: bool, where: object) -> Example:
    """An example of which the last answer alone bears loss.

    Args:
        is_parted: whether the record itself says where its prompt ends.
    """
    if example.messages is None or is_parted:
        return example
    last = max(index for index, turn in enumerate(example.messages) if turn.role == "assistant")
    if last in example.context:
        raise UserError(
            f"{where}: the last answer, which alone is learnt, is marked as one that isn't learnt: leave that out"
        )
    return replace(example, context=frozenset(example.learnt[:-1]) | example.context)


def _unknown(record: Record, where: object) -> Judged:
    answered = fitting({key: value for key, value in record.items() if key not in VERDICTS}, ANSWERED)
    for key in VERDICTS:
        if not is_empty(record.get(key)) and verdict(record[key]) is None:
            raise UserError(
                f"{where}: {key} is {record[key]!r:.40}, which doesn't say whether the answer is a good one: give true "
                f"or false{_without_verdict(record, key, answered) if answered else ''}"
            )
    other = next((key for key, value in record.items() if meanings.is_verdict(key) and verdict(value) is not None), "")
    hint = f"; or say what is what, as in {as_typed(kept(record, answered) | {'label': other})}" if answered else ""
    raise UserError(
        f"{where}: record with keys {', '.join(map(str, record)) or '(none)'}; known shapes of answers that are judged "
        f"one by one: {NEEDS}; answers alone are learnt by --task CAUSAL_LM, pairs of answers by --task DPO"
        f"{hint if other else ''}"
    )


def _without_verdict(record: Record, key: str, shape: Shape) -> str:
    """What to do about a label that is none: a score becomes one, anything else is left out."""
    if isinstance(number(record[key]), int | float):
        return f", as by {as_typed(kept(record, shape) | {'label': f'{{{{ {key} | float > 0.5 }}}}'})}"
    return f"; {as_typed(kept(record, shape))} leaves it out, for --task CAUSAL_LM to learn all answers"


ANSWERED = [
    turns_of_both("prompt", "completion", transcribed=True),
    *(shape for shape in SHAPES if shape.required_keys and not shape.is_alone),
]
# In the order they are tried; the last one takes the rest.
UNPAIRED: Sequence[Shape] = (
    *(_judged(shape) for shape in ANSWERED),
    respelt([_judged(shape) for shape in ANSWERED]),
    Shape("judged answer", ("completion", "label"), _unknown, refuses={}, compares=True),
)
