"""What says which of two answers is the better one: beside a pair, which says so itself, or beside two columns."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ftray.data import meanings
from ftray.data.fields import as_typed
from ftray.data.meanings import ANSWER_WORDS, BETTER, SIDE_FILLERS, TURNED
from ftray.data.reading import read
from ftray.data.shapes import Record, Shape, fitting, is_empty, listed, number
from ftray.data.turns import TURNS
from ftray.errors import UserError

_TIES = ("tie", "tied", "draw", "equal", "same", "both", "neither", "none", "no_preference", "tie_bothbad")
_MOST_WORDS = 3  # of a verdict; a longer text is a comment
_NUMBERED = re.compile(r"(.+?)[\W_]?([ab]|[0-2])", re.IGNORECASE)
_SIDES = (("a", "b"), ("0", "1"), ("1", "2"))
_NAMED = re.compile(rf"(?:(?:{'|'.join(ANSWER_WORDS)}|model|assistant|chatbot|option|the)[\W_]*)*([ab]|[0-2])")


def says_which(key: object, value: object) -> bool:
    """Whether a key says which of two answers is the better one, by a number, a boolean or a few words."""
    own = {*meanings.words(key)}
    if "choice" in own and isinstance(value, str) and _NUMBERED.fullmatch(str(key)):
        return False  # one of the choices that a question offers
    is_short = isinstance(value, bool | int | float) or (isinstance(value, str) and len(value.split()) <= _MOST_WORDS)
    return is_short and bool(own & (BETTER | TURNED)) and own <= BETTER | TURNED | SIDE_FILLERS


def is_tie(value: object) -> bool:
    """Whether a verdict says that neither answer is better."""
    return isinstance(value, str) and "_".join(meanings.words(value)) in _TIES


def refuse_tie(record: Record, own: Sequence[str], where: object) -> None:
    """Raise the UserError about a record that says that neither answer is better."""
    for key, value in record.items():
        if key not in own and BETTER & {*meanings.words(key)} and is_tie(value):
            raise UserError(f"{where}: {key} is {value!r}: neither answer is better: leave the record out")


def refuse_other_verdict(record: Record, good: str, bad: str, kept: Mapping[str, str], where: object) -> None:
    """Raise the UserError about a key that may say that the other answer of a pair is the better one.

    Args:
        kept: the mapping that leaves such keys out.
    """
    for key, value in record.items():
        if key in kept or is_empty(value) or not says_which(key, value) or _agrees(key, value, record, good):
            continue
        turned = _either(record, good, bad, key) if TURNED & {*meanings.words(key)} else {}
        more = f", or {as_typed({**kept, **turned})} heeds it" if turned else ""
        raise UserError(
            f"{where}: {key} is {value!r:.40}, which may say that {bad} is the better answer: {as_typed({**kept})} "
            f"leaves {key} out, where {good} is{more}"
        )


def _agrees(key: str, value: object, record: Record, good: str) -> bool:
    """Whether a verdict says what its pair says itself."""
    said, own = number(value), {*meanings.words(key)}
    if TURNED & own:
        return _turns_nothing(key, value)
    is_named = isinstance(value, str) and (value == record[good] or meanings.words(value) == meanings.words(good))
    return said is True or is_named


def _either(record: Record, good: str, bad: str, key: str) -> dict[str, str]:
    """The mapping that swaps two texts where a key says so; empty: they are no texts, or their keys no names."""
    if not all(isinstance(record[name], str) and name.isidentifier() for name in (good, bad)) or not key.isidentifier():
        return {}
    says = f"{key} | string | lower in ['1', '1.0', 'true', 'yes']"
    return {good: f"{{{{ {bad} if {says} else {good} }}}}", bad: f"{{{{ {good} if {says} else {bad} }}}}"}


def refuse_names(record: Record, good: str, bad: str, kept: Mapping[str, str], where: object) -> None:
    """Raise the UserError about answers that only name where they stand: another key, or a place in a list.

    Args:
        kept: the mapping to a pair as it is read; what is asked holds no answers.
    """
    named = [record[good], record[bad]]
    others = {key: value for key, value in record.items() if key not in kept and key not in TURNS}
    columns = columns_of(others)
    sides = [side_of(name, columns) for name in named] if columns else []
    keys = [columns[side] for side in sides if side is not None] if columns else []
    if len({*keys}) < 2:
        keys = [name for name in named if isinstance(name, str) and isinstance(others.get(name), str | list | dict)]
    places = [number(name) for name in named]
    are_places = all(isinstance(place, int) and not isinstance(place, bool) for place in places)
    if len(keys) < 2 and not (are_places and any(_has_places(value, places) for value in others.values())):
        return
    way = ""
    if len(keys) == 2:
        way = f", as by {as_typed({**kept, good: keys[0], bad: keys[1]})} where all records prefer the same one"
    raise UserError(
        f"{where}: {good} and {bad} are {named[0]!r} and {named[1]!r}, which only say where the answers stand: "
        f"give the answers themselves{way}"
    )


def _has_places(value: object, places: Sequence[int]) -> bool:
    """Whether a value is a list of answers, texts or objects, in which all places are those of one."""
    answers = listed(value)
    return (
        isinstance(answers, list)
        and 0 <= min(places) <= max(places) < len(answers)
        and any(all(isinstance(answer, kind) for answer in answers) for kind in (str, dict, list))
    )


def in_columns(shapes: Sequence[Shape], answers: tuple[str, str]) -> Shape:
    """The shape of two answers in columns, as `response_a` and `response_b`, and a key that says which is better.

    Args:
        shapes: of pairs, by which a record is read once its answers stand under the keys `answers`.
    """

    def as_pair(record: Record, better: str, other: str) -> Record:
        left = {key: value for key, value in record.items() if key not in (better, other, *verdicts_of(record))}
        return left | dict(zip(answers, (record[better], record[other]), strict=True))

    def asked(record: Record, columns: tuple[str, str]) -> list[str] | None:
        """The keys of what is asked, and of what belongs to it; None: it is no pair."""
        shape = fitting(as_pair(record, *columns), shapes)
        keys = (*shape.required_keys, *shape.honours) if shape else ()
        return [key for key in keys if key in record and key not in answers] if shape else None

    def fits(record: Record) -> tuple[str, ...]:
        columns, verdicts = columns_of(record), verdicts_of(record)
        keys = asked(record, columns) if columns and verdicts else None
        return () if columns is None or keys is None else (*keys, *columns, *verdicts)

    def parse(record: Record, where: object) -> object:
        columns = columns_of(record)
        assert columns is not None
        kept = {key: key for key in asked(record, columns) or ()}
        return read(as_pair(record, *better_of(record, columns, kept, where)), shapes, where)[0]

    return Shape("two answers and the better one", (), parse, refuses={}, fits=fits, compares=True)


def columns_of(record: Record) -> tuple[str, str] | None:
    """The two keys of a record that hold answers and are told by a letter or number at the end; None: not just two."""
    found: dict[str, dict[str, str]] = {}
    for key, value in record.items():
        named = _NUMBERED.fullmatch(str(key))
        is_answer = isinstance(value, str | list | dict) and not is_empty(value)
        if named and is_answer and ANSWER_WORDS & {*meanings.words(named[1])}:
            found.setdefault(named[1].lower(), {})[named[2].lower()] = key
    pairs = [own for own in found.values() if any({*own} == {*sides} for sides in _SIDES)]
    if len(pairs) != 1:
        return None
    first, second = sorted(pairs[0])
    return pairs[0][first], pairs[0][second]


def side_of(value: object, columns: tuple[str, str]) -> int | None:
    """Which of two columns a value names, 0 or 1; None: it names neither, or could mean both.

    A number names the column that ends in it; where they end in letters, nobody knows from where it counts.
    """
    value = number(value)
    value = int(value) if isinstance(value, float) and value.is_integer() else value  # as pandas makes them
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    said = str(value).strip().lower()
    if said in (names := [key.lower() for key in columns]):
        return names.index(said)
    named = _NAMED.fullmatch(said)
    ends = [name[-1] for name in names]
    return ends.index(named[1]) if named and named[1] in ends else None


def verdicts_of(record: Record) -> dict[str, Any]:
    """What a record's keys say of which of two columns holds the better answer."""
    return {
        key: value
        for key, value in record.items()
        if not is_empty(value)
        and not _turns_nothing(key, value)
        and (says_which(key, value) or (key == "chosen" and isinstance(value, str | int)))
    }


def _turns_nothing(key: object, value: object) -> bool:
    """Whether a key says that a pair stands the right way round."""
    return bool(TURNED & {*meanings.words(key)}) and number(value) in (0, "no")  # False is 0


def _is_graded(key: str, value: object) -> bool:
    """Whether a number says how good an answer is which the key names itself, or is one of a scale of both."""
    is_number = isinstance(number(value), int | float)
    return is_number and (bool(re.search(r"\d", key)) or "overall" in meanings.words(key))


def better_of(record: Record, columns: tuple[str, str], asked: Mapping[str, str], where: object) -> tuple[str, str]:
    """The column of the better answer, and that of the other one.

    Args:
        asked: the mapping that keeps what is asked.

    Raises:
        UserError: a verdict is a tie or names neither, or two of them differ.
    """
    verdicts = verdicts_of(record)
    refuse_tie(record, columns, where)
    sides = {key: None if _is_graded(key, value) else side_of(value, columns) for key, value in verdicts.items()}
    for key, side in sides.items():
        if side is None:
            raise UserError(
                f"{where}: {key} is {verdicts[key]!r:.40}, which names neither {columns[0]} nor {columns[1]}: say by "
                "--data.fields which answer is chosen and which one rejected"
            )
    if len({*sides.values()}) > 1:
        said = " and ".join(f"{key} is {value!r:.40}" for key, value in verdicts.items())
        raise UserError(
            f"{where}: {said}: they differ in which answer is the better one: say which of them is meant"
            f"{_by_template(record, columns, next(iter(verdicts)), asked)}"
        )
    side = next(iter(sides.values()))
    assert side is not None
    return columns[side], columns[1 - side]


def _by_template(record: Record, columns: tuple[str, str], key: str, asked: Mapping[str, str]) -> str:
    """The mapping that goes by one verdict alone; empty: the answers are no texts, or a key is no name."""
    if not all(isinstance(record[name], str) and name.isidentifier() for name in columns) or not key.isidentifier():
        return ""
    better = columns[side_of(record[key], columns) or 0]
    other = columns[columns[0] == better]
    test = f"if {key} == {record[key]!r} else"
    pair = {"chosen": f"{{{{ {better} {test} {other} }}}}", "rejected": f"{{{{ {other} {test} {better} }}}}"}
    return f", as by {as_typed({**asked, **pair})}"
