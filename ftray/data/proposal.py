"""The mapping that a record of unknown shape probably needs."""

import json
import re
from typing import Any

from ftray.data.records import ROLE_KEYS, ROLES
from ftray.data.shapes import Record, is_empty, listed

# what a field is probably for, by words in its name
_ASKS = re.compile(
    "question|prompt|instruct|query|input|source|src|problem|article|document|dialog|post|request|ask|user|human"
)
_ANSWERS = re.compile(
    "answer|response|output|completion|reply|target|tgt|solution|summary|result|label|assistant|bot|gold"
)
_LABELS = re.compile("label|class|sentiment|category|intent|stars|rating|emotion|topic")
# the same of what a turn names its speaker by, and of how that one is called
_SPEAKERS = re.compile("role|from|speaker|author|sender|who|user|name|agent|party|type")
_USERS = re.compile("user|human|customer|client|patient|question|asker|student|caller|visitor|prompter")
_SYSTEMS = re.compile("system|developer|instruction")
MOST_SPEAKERS = 4
_GAP = ("prefix", "suffix", "middle")  # of fill-in-the-middle, which each model has tokens of its own for
_ONE_OF_SEVERAL = re.compile(r"[\W_]*([ab]|[0-9]+)$")  # how one of several answers is numbered


def proposal(record: Record) -> str:
    """The mapping that a record of unknown shape probably needs, as one would type it; empty: no guess."""
    inner = [
        (f"{key}.{name}", part) for key, held in record.items() if isinstance(held, dict) for name, part in held.items()
    ]
    for path, value in (*record.items(), *inner):
        if messages := _messages(str(path), value):
            return f"--data.fields 'messages: {messages}'"
    if all(isinstance(record.get(key), str) for key in _GAP):
        filled = "<|fim_prefix|>{{ prefix }}<|fim_suffix|>{{ suffix }}<|fim_middle|>{{ middle }}"
        return f"--data.fields 'text: \"{filled}\"', with the tokens that the model has for these three"
    texts = [str(key) for key, value in record.items() if isinstance(value, str) and not is_empty(value)]
    plain = [str(key) for key, value in record.items() if isinstance(value, str | int | float) and not is_empty(value)]
    answer = next((key for key in plain if _ANSWERS.search(key.lower()) and not _LABELS.search(key.lower())), None)
    label = next((key for key in plain if _LABELS.search(key.lower())), None)
    others = [key for key in plain if answer and _ONE_OF_SEVERAL.sub("", key) == _ONE_OF_SEVERAL.sub("", answer)]
    rest = [key for key in texts if key not in (*others, answer, label)]
    asked = next((key for key in rest if _ASKS.search(key.lower())), None)
    if answer is None and label is not None and rest:
        return f"--data.fields 'text: {asked or rest[0]}, label: {label}'"
    if answer is None and len(rest) > 1:
        answer = next(key for key in reversed(rest) if key != asked)
    asked = asked or next((key for key in rest if key != answer), None)
    if answer and asked:
        return f"--data.fields 'prompt: {asked}, completion: {answer}'"
    return f"--data.fields 'text: {texts[0]}'" if texts else ""


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
    template = "[{% for t in " + path + " %}" + turns_as + "{% endfor %}]"
    # as YAML has it in double quotes, and a shell in single ones
    return "" if "'" in template else json.dumps(template, ensure_ascii=False)


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
