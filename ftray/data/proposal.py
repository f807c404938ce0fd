"""The mapping that a record of unknown shape probably needs, guessed from its keys."""

import json
import re
from collections.abc import Collection
from typing import Any

from ftray.data import meanings
from ftray.data.fields import as_typed
from ftray.data.meanings import ROLE_KEYS, ROLES
from ftray.data.pair_verdicts import says_which
from ftray.data.refusals import joined
from ftray.data.shapes import Record, is_empty, listed, number
from ftray.data.unpaired_shapes import verdict

# what a field is probably for, by words in its name
_ASKS = re.compile(
    "question|prompt|instruct|query|input|source|src|problem|article|document|dialog|post|request|ask|user|human"
)
_ANSWERS = re.compile(
    "answer|response|output|completion|reply|target|tgt|solution|summary|result|label|assistant|bot|gold"
)
_LABELS = re.compile("label|class|sentiment|category|intent|stars|rating|emotion|topic|duplicate|^is_")
# the same of what a turn names its speaker by, and of how that one is called
_SPEAKERS = re.compile("role|from|speaker|author|sender|who|user|name|agent|party|type")
_USERS = re.compile("user|human|customer|client|patient|question|asker|student|caller|visitor|prompter")
_SYSTEMS = re.compile("system|developer|instruction")
MOST_SPEAKERS = 4
WORDS_OF_LABEL = 4  # at most: a longer one is an answer
_ONE_OF_SEVERAL = re.compile(r"[\W_]*([ab]|[0-9]+)$")  # how one of several answers is numbered
# the tokens of models between which a gap is filled in: before what stands before it, what stands after it, and the gap
_GAPS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001
)


def proposal(record: Record, tokens: Collection[str] = ()) -> str:
    """The mapping that a record of unknown shape probably needs, as one would type it; empty: no guess.

    Args:
        tokens: special ones of the model, by which it may fill in a gap.
    """
    fields = _of_turns(record) or _of_gap(record, tokens) or _of_texts(record)
    used = " ".join(fields.values())
    left = [key for key in _told(record) if not re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", used)]
    return as_typed(fields) + (f", which leaves out {', '.join(left)}" if left else "") if fields else ""


def proposal_of_turns(record: Record, key: str) -> str:
    """The mapping for turns under a known key whose speakers or texts have unknown names; empty: no guess."""
    messages = _messages(key, record[key])
    return as_typed({"messages": messages} | _beside(record)) if messages and messages != key else ""


def _beside(record: Record) -> dict[str, str]:
    """What is read beside turns or an answer: a system text and tools, by whatever name."""
    found: dict[str, str] = {}
    for key, value in record.items():
        name = "" if is_empty(value) else meanings.read_as(key, value)
        if name in ("system", "tools"):
            found.setdefault(name, key)
    return found


def _of_turns(record: Record) -> dict[str, str]:
    """The mapping for a record that holds a list of turns, and no answer beside them."""
    inner = [
        (f"{key}.{name}", part, {**record, **held})
        for key, held in record.items()
        if isinstance(held, dict)
        for name, part in held.items()
    ]
    for path, value, beside in (*((key, value, record) for key, value in record.items()), *inner):
        if messages := _messages(str(path), value):
            own = path.split(".")
            others = {key: said for key, said in beside.items() if key not in own}
            return {} if _says_more(others) else {"messages": messages} | _beside(record)
    texts = [key for key, value in record.items() if _is_told(key, value)]
    said = record[texts[0]] if len(texts) == 1 else None
    if isinstance(said, list) and len(said) > 1 and all(isinstance(turn, str) for turn in said):
        return {"messages": texts[0]} | _beside(record)
    return {}


def _is_told(key: str, value: Any) -> bool:
    """Whether what stands under a key may be what a record is about: texts, and no more about the record."""
    return not is_empty(value) and not meanings.is_about(key, value, True) and not meanings.read_as(key, value)


def _says_more(others: Record) -> bool:
    """Whether something beside turns may be an answer to them, or what they begin with."""
    return any(
        _is_told(key, value) and (_ANSWERS.search(key.lower()) or key == "text" or isinstance(value, dict))
        for key, value in others.items()
    )


def _of_gap(record: Record, tokens: Collection[str]) -> dict[str, str]:
    """The mapping for a gap between two texts: in the model's own tokens for it, or in dots."""
    if not all(isinstance(record.get(key), str) for key in ("prefix", "suffix", "middle")):
        return {}
    for before, after, gap in _GAPS:
        if {before, after, gap} <= {*tokens}:
            return {"text": f"{before}{{{{ prefix }}}}{after}{{{{ suffix }}}}{gap}{{{{ middle }}}}"}
    return {"prompt": "{{ prefix }}[...]{{ suffix }}", "completion": "middle"}


def _of_texts(record: Record) -> dict[str, str]:
    """The mapping for a record of texts: what is asked and answered, a text and its label, or a text alone."""
    held = {path: value for path, value in _held(record).items() if isinstance(value, str | int | float)}
    texts = [path for path, value in held.items() if isinstance(number(value), str)]
    labels = [path for path in held if _LABELS.search(path.lower()) and _is_short(held[path])]
    labels.sort(key=lambda path: path not in ("label", "labels"))
    positive = next((path for path in texts if {"positive", "pos"} & {*meanings.words(path)}), None)
    anchor = next((path for path in texts if positive and "neg" not in path and path != positive), None)
    if positive and anchor:
        negative = next((path for path in texts if {"negative", "neg"} & {*meanings.words(path)}), None)
        return {"anchor": anchor, "positive": positive} | ({"negative": negative} if negative else {})
    answer = next((path for path in held if _ANSWERS.search(path.lower()) and path not in labels), None)
    others = [path for path in held if answer and _ONE_OF_SEVERAL.sub("", path) == _ONE_OF_SEVERAL.sub("", answer)]
    thought = next((path for path in texts if path != answer and meanings.is_reasoning(path, held[path])), None)
    rest = [path for path in texts if path not in (*others, answer, thought, *labels)]
    asking = [path for path in rest if _ASKS.search(path.lower())]
    if answer is None and labels and rest:
        pair = rest if len(rest) == 2 else [*asking, *rest][:1]
        return dict(zip(("text", "text_pair"), pair, strict=False)) | {"label": labels[0]}
    if answer is None and len(rest) > 1:
        answer = next(path for path in reversed(rest) if path not in asking[:1])
    asked = next((path for path in [*asking, *rest] if path != answer), None)
    if not answer or not asked:
        return {"text": texts[0]} if len(texts) == 1 and texts == _told(record) else {}
    if len(others) > 1 and any(key in meanings.VERDICTS or says_which(key, value) for key, value in record.items()):
        return {}  # one of them is better, and nobody knows which
    further = [path for path in asking if path not in (asked, answer)]
    more = _beside(record) | _judged(record)
    choices = next((key for key in ("choices", "options", "endings") if isinstance(record.get(key), list | dict)), "")
    if choices and (template := joined({asked: "", choices: record[choices]})):
        return {"prompt": template, "completion": answer} | more
    if thought and thought.isidentifier() and answer.isidentifier():
        return {"prompt": asked, "completion": f"<think>\n{{{{ {thought} }}}}\n</think>\n{{{{ {answer} }}}}"} | more
    blank = [key for key, value in record.items() if value in ("", None) and _ASKS.search(str(key).lower())]
    if len(further + blank) == 1:
        return {"instruction": asked, "input": (further + blank)[0], "output": answer} | more
    return {"prompt": asked, "completion": answer} | more


def _judged(record: Record) -> dict[str, str]:
    """What says, in a word, whether an answer is a good one: not by a number, which may be a class."""
    for key, value in record.items():
        said = number(value)
        is_said = isinstance(said, bool) or (isinstance(said, str) and verdict(said) is not None)
        if is_said and meanings.says_bad(key, False):
            return {"label": key}
    return {}


def _held(record: Record) -> dict[str, Any]:
    """What a record holds that is no more about it than its texts, by its path: also in objects, and lists of one."""
    found = {str(key): value for key, value in record.items() if not isinstance(value, dict | list)}
    for key, value in record.items():
        path, inner = (f"{key}.0", value[0]) if isinstance(value, list) and len(value) == 1 else (str(key), value)
        if isinstance(inner, dict):
            said = {name: part for name, part in inner.items() if isinstance(part, str) and name not in ROLE_KEYS}
            found |= {f"{path}.{name}": part for name, part in said.items()}
    return {
        path: value
        for path, value in found.items()
        if not is_empty(value) and not _is_about(path, value) and not meanings.read_as(path, value)
    }


def _is_about(path: str, value: Any) -> bool:
    """Whether what stands at a path says something about its record, and is no class by its name."""
    if {*meanings.words(path)} == {"answer", "key"}:  # of a choice
        return False
    is_text = isinstance(value, str) and isinstance(number(value), str)
    return meanings.is_about(path, value, True) and not (_LABELS.search(path.lower()) and not is_text)


def _told(record: Record) -> list[str]:
    return [key for key, value in record.items() if _is_told(key, value)]


def _is_short(value: Any) -> bool:
    return not isinstance(value, str) or len(value.split()) <= WORDS_OF_LABEL


def _messages(path: str, value: Any) -> str:
    """What `messages` is made of, if a value is a list of turns; empty: it doesn't look like one.

    Turns by other keys, or of other roles, than those that are known are rewritten by a template.
    """
    turns = listed(value)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return ""
    if all(any(str(turn.get(key)).lower() in ROLES for key in ROLE_KEYS) for turn in turns):
        return path
    texts = [key for key in turns[0] if all(isinstance(turn.get(key), str) for turn in turns)]
    few = [key for key in texts if len({turn[key] for turn in turns}) <= MOST_SPEAKERS]
    who = next((key for key in few if _SPEAKERS.search(key.lower())), None)
    letters = {key: sum(len(turn[key]) for turn in turns) for key in texts if key != who}
    if who is None or not letters or isinstance(value, str) or not re.fullmatch(r"[\w.]+", path):
        return ""
    role = f"{json.dumps(_roles([turn[who] for turn in turns]), ensure_ascii=False)}[{_item(who)}]"
    turn = f"dict(role={role}, content={_item(max(letters, key=lambda key: letters[key]))})"
    turns_as = f"{{{{ {turn} | tojson }}}}{{% if not loop.last %}},{{% endif %}}"
    return "[{% for t in " + path + " %}" + turns_as + "{% endfor %}]"


def _roles(names: list[str]) -> dict[str, str]:
    """The roles of speakers; of two that are none of a user's names, the first is taken for the user."""
    roles: dict[str, str] = {}
    for name in names:
        known = ROLES.get(name.lower())
        system, user = _SYSTEMS.search(name.lower()), _USERS.search(name.lower())
        roles[name] = known or ("system" if system else "user" if user else "assistant")
    answering = [name for name, role in roles.items() if role == "assistant"]
    if "user" not in roles.values() and len(answering) > 1:
        roles[answering[0]] = "user"
    return roles


def _item(key: str) -> str:
    """An item of a turn, as jinja takes it."""
    plain = re.fullmatch(r"[A-Za-z_]\w*", key) and not hasattr(dict, key)
    return f"t.{key}" if plain else f"t[{json.dumps(key)}]"
