"""What a record is refused for: keys that would change what is learnt, and that its shape doesn't read.

Each message says where the record stands, and, where it can, the `--data.fields` to type.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ftray.data import meanings
from ftray.data.fields import as_typed
from ftray.data.shapes import ADDED, ANY, LABELS, RENDERED, Record, Shape, fitting, is_empty, listed, number
from ftray.errors import UserError

_UNCLEAR_MARK = "ftray learns whole turns and records: mark them by weight, 1 or 0"


def refuse(holder: Mapping[str, Any], reasons: Mapping[str, str], where: object, path: str) -> None:
    """Raise the UserError about the first key of a turn, or a part of one, that is among `reasons` and says something.

    Args:
        path: of the turn in its record, for the message.
    """
    for key, value in holder.items():
        if key in reasons and not is_empty(value):
            raise UserError(f"{where}: {path}{key}: {reasons[key]}")


def refuse_keys(record: Record, shape: Shape, where: object) -> None:
    """Raise the UserError about the first key that would change what is learnt, and isn't read.

    It is known by the table of the shape, or by its words (see :mod:`ftray.data.meanings`).
    """
    is_known = all(key in record for key in shape.required_keys)
    reasons = shape.refuses if is_known else {} if shape.compares else ANY
    for key, value in record.items():
        if key in reasons and not is_empty(value):
            raise UserError(f"{where}: {key}: {reasons[key]}{_without(record, key, reasons[key], shape)}")
    own = (*shape.required_keys, *shape.honours)
    for key, value in record.items():
        if key in own or key in ADDED or is_empty(value) or meanings.marks_learnt(key) is not None:
            continue
        another = meanings.of_answer(key, value) if shape.teaches and not shape.compares else ""
        if why := meanings.of_media(key, value) or another:
            raise UserError(f"{where}: {key}: {why}{_without(record, key, why, shape)}")
        if shape.teaches and meanings.is_unclear_mark(key):
            raise UserError(f"{where}: {key}: {_UNCLEAR_MARK}")
        if not shape.teaches or not is_known or key in shape.beside:
            continue
        name = meanings.read_as(key, value)
        if name and not _is_repeated(record, key, shape):
            raise UserError(f"{where}: {key} would be lost: {_renamed(record, key, name, shape)}")
        if meanings.is_reasoning(key, value) and not shape.compares:
            _refuse_lost(record, key, shape, where)


def refuse_in_turn(turn: Mapping[str, Any], read_keys: Sequence[str], path: str, where: object) -> None:
    """Raise the UserError about the first key of a turn that, by its words, would change what is learnt.

    Args:
        read_keys: those that are read.
        path: of the turn in its record, for the message.
    """
    for key, value in turn.items():
        if key in read_keys or is_empty(value) or meanings.marks_learnt(key) is not None:
            continue
        why = meanings.of_media(key, value) or meanings.of_answer(key, value)
        if why := why or (_UNCLEAR_MARK if meanings.is_unclear_mark(key) else ""):
            raise UserError(f"{where}: {path}{key}: {why}")
        if meanings.is_reasoning(key, value) or meanings.read_as(key, value) == "tools":
            raise UserError(
                f"{where}: {path}{key} would be lost: a turn is read by its role, text, calls and thoughts "
                "(reasoning_content) alone: put it into one of them, or leave it out"
            )


def refuse_beside(record: Record, shape: Shape, shapes: Sequence[Shape], where: object) -> None:
    """Raise the UserError about the first text that stands beside those that are read, and would be lost.

    Args:
        shapes: of the task, of which another one may be meant.
    """
    own = (*shape.required_keys, *shape.honours)
    for key, value in record.items():
        is_count = key == "turns" and isinstance(number(value), int | float)
        if key in shape.beside and key not in own and not is_empty(value) and not is_count:
            _refuse_lost(record, key, shape, where, shapes)


def refuse_beside_text(record: Record, shape: Shape, where: object) -> None:
    """Raise the UserError about what stands beside a lone text, and is probably what is to be learnt."""
    (own,) = shape.required_keys
    is_collected = meanings.is_collected(record)
    for key, value in record.items():
        known = key in ADDED or key in shape.beside or key in LABELS or meanings.marks_learnt(key) is not None
        if key == own or known or is_empty(value) or meanings.is_about(key, value, is_collected):
            continue
        alone = f"{as_typed({'text': own})} to learn the text alone"
        if key in meanings.ROLE_KEYS and str(value).lower() in meanings.ROLES:
            raise UserError(
                f"{where}: {key} would be lost: this is one turn, and ftray reads a conversation as one record: join "
                f'its turns, as {{"messages": [{{"role": ..., "content": ...}}]}}; or give {alone}'
            )
        if isinstance(value, list | dict):
            learn = "--data.fields"
        elif meanings.is_label(key) or not isinstance(number(value), str):
            learn = f"{as_typed({'text': own, 'label': _whole(key, value)})} to learn it"
        else:
            learn = f"{as_typed({'prompt': own, 'completion': key})} to learn it"
        raise UserError(
            f"{where}: {key} would be lost: a record with {own} is read by {own} alone: say what is to be read, as by "
            f"{learn}, or {alone}"
        )


def _whole(key: str, value: Any) -> str:
    """The source of a label under a key that holds a number: of a fraction, a template that rounds it."""
    return f"{{{{ {key} | float | round | int }}}}" if isinstance(number(value), float) and key.isidentifier() else key


def bears_loss(holder: Mapping[str, Any], path: str, where: object) -> bool:
    """Whether a turn, or a record, is to be learnt, as its marks say; so it is where there are none.

    Args:
        path: of a turn in its record, for the message; of a record, empty.

    Raises:
        UserError: a mark is neither 1 nor 0.
    """
    result = True
    for key, value in holder.items():
        marked = meanings.marks_learnt(key)
        if marked is None or is_empty(value):
            continue
        value = number(value)
        if isinstance(value, str) or value not in (0, 1):
            raise UserError(
                f"{where}: {path}{key} is {value!r:.40}: a turn or record is learnt or not, there are no shares yet: "
                "give 1 or 0, or true or false"
            )
        result = result and bool(value) == marked
    return result


def refuse_bad_answer(holder: Mapping[str, Any], path: str, where: object, is_answer: bool = True) -> None:
    """Raise the UserError about an answer that its record or turn marks as a bad one: it would be learnt.

    A share (`reward: 0.3`) marks none as bad; nor does what can't be told to be a verdict, as a comment.
    """
    for key, value in holder.items():
        value = number(value)
        if meanings.says_bad(key, value, is_answer):
            raise UserError(
                f"{where}: {path}{key} is {value!r}, and what is learnt are good answers: leave the record out, or say "
                "by --data.fields what is to be read"
            )


def _refuse_lost(record: Record, key: str, shape: Shape, where: object, shapes: Sequence[Shape] = ()) -> None:
    """Raise the UserError about a key whose content would be lost, unless it only repeats what is read."""
    if _is_repeated(record, key, shape):
        return
    own = (*shape.required_keys, *shape.honours)
    ways = [f"{as_typed(fields)} to {aim}" for fields, aim in _ways(record, key, shape, shapes)]
    raise UserError(
        f"{where}: {key} would be lost: a record with {'/'.join(shape.required_keys)} is read by {', '.join(own)} "
        f"alone: say what is to be read, as by {', or '.join(ways)}"
    )


def _ways(record: Record, key: str, shape: Shape, shapes: Sequence[Shape]) -> list[tuple[dict[str, str], str]]:
    """Mappings to choose from for a record with a key that would be lost, each with what it is for."""
    alone = [(kept(record, shape), f"leave {key} out")]
    if shape.keeps:
        return _ways_to_ask(record, key, shape)
    if shape.is_alone:
        (own,) = shape.required_keys
        other = fitting({name: value for name, value in record.items() if name != own}, shapes)
        if other:
            return [(kept(record, other), f"learn by {'/'.join(other.required_keys)}"), *alone]
        ask, answer = (own, key) if key in meanings.ANSWERED else (key, own)
        return [({"prompt": ask, "completion": answer}, "learn an answer"), *alone] if key in _PAIRED else alone
    if not shape.teaches or shape.turns or len(shape.required_keys) != 2:
        return alone
    ask, answer = shape.required_keys
    more = {name: name for name in kept(record, shape) if name not in (ask, answer, *meanings.ASKED)}
    if key in meanings.ANSWERED:
        return [({"prompt": ask, "completion": key} | more, f"learn {key}"), *alone]
    if meanings.is_reasoning(key, record[key]):
        thought = joined({key: record[key], answer: record[answer]}, "<think>\n{}\n</think>\n{}")
        return [({"prompt": ask, "completion": thought} | more, "learn it too"), *alone] if thought else alone
    further = [name for name in kept(record, shape) if name not in (ask, answer, *more)]
    asked = {name: record[name] for name in (ask, *further, key)}
    if len(asked) == 2 and isinstance(record[key], str):
        return [({"instruction": ask, "input": key, "output": answer} | more, "read it too"), *alone]
    prompt = joined(asked)
    return [({"prompt": prompt, "completion": answer} | more, "read it too"), *alone] if prompt else alone


def _ways_to_ask(record: Record, key: str, shape: Shape) -> list[tuple[dict[str, str], str]]:
    """The same for a record that asks, and keeps its other keys for a reward."""
    (ask,) = shape.required_keys
    others = {name: name for name in record if name not in (key, *ADDED)}
    ways = [(others, f"leave {key} out")]
    if isinstance(record[key], str | list) and not isinstance(listed(record[ask]), list):
        own = (ask, *(name for name in shape.honours if name in meanings.ASKED and not is_empty(record.get(name))))
        prompt = joined({name: record[name] for name in (*own, key)})
        more = {name: name for name in others if name not in own}
        ways[:0] = [({"prompt": prompt} | more, "ask it too")] if prompt else []
    if isinstance(listed(record[key]), list) and not all(isinstance(part, str) for part in listed(record[key])):
        ways[:0] = [({key: key} | {name: name for name in others if name != ask}, f"ask by {key}")]
    return ways


_PAIRED = frozenset((*meanings.ASKED, *meanings.ANSWERED))


def joined(values: dict[str, Any], form: str = "") -> str:
    """The template that puts values into a form; empty: there is none, by what they are or by their keys.

    Args:
        values: by their keys.
        form: has a `{}` for each; empty: a line for each.
    """
    items = []
    for key, value in values.items():
        is_nested = isinstance(value, dict) and isinstance(value.get("text"), list)
        listing = value["text"] if is_nested else value if isinstance(value, list) else []
        if not key.isidentifier() or (isinstance(value, dict) and not is_nested):
            return ""
        if not all(isinstance(text, str) for text in listing):
            return ""
        path = f"{key}.text" if is_nested else key
        items.append(f'{{{{ {path} | join("\n") }}}}' if isinstance(value, list | dict) else f"{{{{ {path} }}}}")
    return form.format(*items) if form else "\n".join(items)


def kept(record: Record, shape: Shape) -> dict[str, str]:
    """The mapping that leaves a record what its shape reads, and nothing else."""
    return {key: key for key in (*shape.required_keys, *shape.honours) if key in record}


def _without(record: Record, key: str, why: str, shape: Shape) -> str:
    """The end of a message: the mapping that leaves a key out, or keeps the good answer of a pair; empty: no guess."""
    if why == meanings.PREFERENCE and (good := _good_answer(record)):
        return f"; {as_typed(good)} keeps the good one"
    if all(name in record for name in shape.required_keys):
        return f"; {as_typed(kept(record, shape))} leaves it out"
    from ftray.data.proposal import proposal  # which imports modules that import this one

    others = {name: value for name, value in record.items() if not (meanings.of_media(name, value))}
    if why != meanings.PREFERENCE and not any("positive" in meanings.words(name) for name in others):
        others = {name: value for name, value in others.items() if not meanings.of_answer(name, value)}
    guess = "" if why == meanings.PREFERENCE else proposal(others)
    return f"; give {guess}" if guess else ""


def _good_answer(record: Record) -> dict[str, str]:
    """The mapping that keeps the good one of a preference pair; empty: nobody knows which it is."""
    good = next(
        (
            key
            for key, value in record.items()
            if {"chosen", "preferred"} & {*meanings.words(key)}
            and not {"non", "not", "dis"} & {*meanings.words(key)}
            and (isinstance(value, list) or (isinstance(value, str) and isinstance(number(value), str)))
        ),
        "",
    )
    if not good:
        return {}
    more = {key: key for key in ("system", "tools") if not is_empty(record.get(key))}
    asked = next((key for key in ("prompt", "instruction", "question", "query", "input") if record.get(key)), None)
    answer = record[good]
    is_whole = isinstance(answer, list) and bool(answer) and isinstance(answer[0], dict) and _begins(answer[0])
    if is_whole or (asked is None and not isinstance(answer, str)):
        return {"messages": good} | more
    if asked is None:
        return {"messages" if re.search(r"^\s*human\s*:", answer, re.IGNORECASE) else "text": good}
    return {"prompt": asked, "completion": good} | more


def _begins(turn: Mapping[str, Any]) -> bool:
    """Whether a turn is one that a conversation begins with."""
    name = next((turn[key] for key in meanings.ROLE_KEYS if turn.get(key)), "")
    return meanings.ROLES.get(str(name).lower()) in ("user", "system", "developer")


def _renamed(record: Record, key: str, name: str, shape: Shape) -> str:
    """What to do about a key that is read by another name."""
    pairs = name != "history" or all(isinstance(said, list | tuple) for said in listed(record[key]))
    if name not in shape.honours or not pairs:
        return "give what was said before and what is learnt as one list of turns, as messages"
    return f"it is read by the name of {name}: rename it, as by {as_typed(kept(record, shape) | {name: key})}"


def _is_repeated(record: Record, key: str, shape: Shape) -> bool:
    """Whether what stands under a key only repeats what is read, and that not by chance."""
    own = [text for name in (*shape.required_keys, *shape.honours) for text in _texts(record.get(name))]
    given = _texts(record[key])
    if all(text in own for text in given):
        return True
    if key in RENDERED and len(given) == 1 and (_is_filled(given[0], own) or _is_ended(given[0], own)):
        return True
    if shape.is_alone:
        names = [name for name in record if name in shape.beside and name not in (*shape.required_keys, *RENDERED)]
        return bool(own) and _is_ended(own[0], [text for name in {key, *names} for text in _texts(record[name])])
    if (
        key in meanings.ANSWERED and shape.required_keys and not shape.compares
    ):  # by what is learnt, not by what is asked
        last = listed(record[shape.required_keys[-1]])
        own = _texts(last[-1:] if isinstance(last, list) else last)
    return all(any(_is_part(text, whole) for whole in own) for text in given)


# what stands before and after a part of a filled template: a line's end, or a mark such as `A:`, `</s>` or `[INST]`
_BEFORE = re.compile(r"(^|[\n:>\]|}{$#)])[ \t]*$")
_AFTER = re.compile(r"\s*\.?[ \t]*($|[\n<\[|}{$#])")
_MARKED = re.compile(r"[:>\]|}#]\s*$")
_ENDED = re.compile(r"\s*(<[^<>]*>\s*|\[[^][]*\]\s*)*$")


def _is_part(text: str, whole: str) -> bool:
    """Whether a text fills a place in a template that `whole` was made from, rather than stands in it by chance."""
    start = whole.find(text)
    while start >= 0:
        if _BEFORE.search(whole[max(0, start - 40) : start]) and _AFTER.match(whole, start + len(text)):
            return True
        start = whole.find(text, start + 1)
    return False


def _is_filled(whole: str, parts: list[str]) -> bool:
    """Whether a text is a filled template that holds all these parts."""
    return all(_is_part(part, whole) for part in parts)


def _is_ended(whole: str, parts: list[str]) -> bool:
    """Whether a text holds all parts as words, and one of them is its end, after a mark or after another part."""
    if not all(re.search(rf"(?<!\w){re.escape(part)}(?!\w)", whole) for part in parts):
        return False
    for part in parts:
        at = whole.rfind(part)
        before = whole[:at].rstrip()
        if _ENDED.match(whole, at + len(part)) and (
            _MARKED.search(before) or before.endswith(tuple({*parts} - {part}))
        ):
            return True
    return False


def _texts(value: Any) -> list[str]:
    """All texts in a value, however deep, without blanks around them; of turns, what they say and not who."""
    if isinstance(value, list | tuple):
        return [text for part in value for text in _texts(part)]
    if isinstance(value, dict):
        return _texts([text for key, text in value.items() if key not in ("role", "from")])
    return [] if is_empty(value) else [str(value).strip()]
