"""Finds tool calls in generated text, in the form in which the model's chat template writes them.

Each family of models writes calls in its own way, and no file of a model says which. So the template renders invented
calls, and the rendering shows the form: a JSON object, a name and an object, or key by key. A form that does not give
the invented calls back is unknown, and such answers stay text.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any, NoReturn

_NAME = r"[\w.:/-]+"


@dataclass(frozen=True)
class ToolCall:
    """A call that a model has written; `arguments` as OpenAI has them, a text of JSON."""

    name: str
    arguments: str
    id: str | None = None

    def __post_init__(self) -> None:
        """Refuse what no JSON can hold.

        Raises:
            ValueError: half a surrogate pair.
        """
        f"{self.name}{self.arguments}{self.id}".encode()


@dataclass(frozen=True)
class ObjectForm:
    """A call is a JSON object like `example`; `name`, `arguments` and `id` are the keys that lead to each."""

    example: dict[str, Any]
    name: tuple[str, ...]
    arguments: tuple[str, ...]
    id: tuple[str, ...] | None

    @classmethod
    def found(cls, text: str, call: dict[str, Any]) -> "tuple[ObjectForm, int, int] | None":
        """The form of `call` in `text`, and where it begins and ends there; None: it has another."""
        for at in (match.start() for match in re.finditer(r"\{", text)):
            try:
                value, end = _decode(text, at)
            except ValueError:
                continue
            name, arguments = _path(value, call["name"]), _path(value, call["arguments"])
            if name and arguments:
                return cls(value, name, arguments, _path(value, call["id"])), at, end
        return None

    def read(self, text: str, at: int, parameters: Mapping[str, Any]) -> tuple[ToolCall, int]:
        """The call at a place of `text`, and where it ends.

        Raises:
            ValueError: there is none.
        """
        value, end = _decode(text, at)
        name, arguments = _at(value, self.name), _at(value, self.arguments)
        if not isinstance(name, str) or not isinstance(arguments, dict | str):
            raise ValueError("no call")
        own = _at(value, self.id) if self.id else None
        return ToolCall(name, _as_json(arguments), own if isinstance(own, str) else None), end


@dataclass(frozen=True)
class NamedForm:
    """A call is a name, the texts `middle`, between which its id may stand, and the arguments as a JSON object."""

    middle: tuple[str, ...]

    @classmethod
    def found(cls, text: str, call: dict[str, Any]) -> "tuple[NamedForm, int, int] | None":
        """As :meth:`ObjectForm.found`."""
        start = text.find(call["name"])
        after = start + len(call["name"])
        for at in (match.start() for match in re.finditer(r"\{", text) if start >= 0 and match.start() >= after):
            try:
                value, end = _decode(text, at)
            except ValueError:
                continue
            if value == call["arguments"]:
                return cls(tuple(text[after:at].split(call["id"]))), start, end
        return None

    def read(self, text: str, at: int, parameters: Mapping[str, Any]) -> tuple[ToolCall, int]:
        """As :meth:`ObjectForm.read`."""
        middle = r"(?P<id>\S+?)".join(_loose(part) for part in self.middle[:2])
        head = re.compile(rf"(?P<name>{_NAME}){middle}").match(text, at)
        if head is None:
            raise ValueError("no call")
        value, end = _decode(text, head.end())
        if not isinstance(value, dict):
            raise ValueError("no arguments")
        return ToolCall(head["name"], _as_json(value), head.groupdict().get("id")), end


@dataclass(frozen=True)
class TaggedForm:
    """A call is a name, then each key and its value, with these texts around them; text values are bare."""

    before_key: str
    after_key: str
    after_value: str

    @classmethod
    def found(cls, text: str, call: dict[str, Any]) -> "tuple[TaggedForm, int, int] | None":
        """As :meth:`ObjectForm.found`."""
        texts = [call["name"], *(part for pair in call["arguments"].items() for part in pair)]
        places, at = [], 0
        for part in texts:
            if (at := text.find(part, at)) < 0:
                return None
            places.append((at, at := at + len(part)))
        (start, after_name), (key, key_end), (value, value_end), (next_key, _), *_ = places
        between = text[value_end:next_key]
        after_value = between[: len(between) - _alike(between[::-1], text[after_name:key][::-1])]
        before_key = between[len(after_value) :]
        if not before_key.strip() or not after_value.strip() or not text.startswith(after_value, at):
            return None
        return cls(before_key, text[key_end:value], after_value), start, at + len(after_value)

    def read(self, text: str, at: int, parameters: Mapping[str, Any]) -> tuple[ToolCall, int]:
        """As :meth:`ObjectForm.read`."""
        head = re.compile(_NAME).match(text, at)
        if head is None:
            raise ValueError("no call")
        at, arguments = head.end(), dict[str, Any]()
        kinds = _kinds(parameters.get(head[0]))
        while key := re.compile(_loose(self.before_key)).match(text, at):
            middle = text.index(self.after_key, key.end())
            end = text.index(self.after_value, middle + len(self.after_key))
            name = text[key.end() : middle]
            arguments[name] = _value(text[middle + len(self.after_key) : end], kinds.get(name))
            at = end + len(self.after_value)
        return ToolCall(head[0], _as_json(arguments)), at


@dataclass(frozen=True)
class CallFormat:
    """How a chat template writes the calls of a turn.

    Attributes:
        opening: what stands before the first call.
        between: what stands between two; None: a turn has one.
        closing: what stands after the last one.
        form: of each.
    """

    opening: str
    between: str | None
    closing: str
    form: ObjectForm | NamedForm | TaggedForm

    @property
    def marked(self) -> bool:
        """Whether words open the calls; else they are all that an answer holds."""
        return re.search(r"\w", self.opening) is not None

    def certain(self, text: str) -> int:
        """How many characters at the beginning of `text` can be no part of a call, whatever follows."""
        if not self.marked:
            first = (self.opening.strip() or "{")[0]
            return 0 if not text.strip() or text.lstrip()[0] == first else len(text)
        mark = self.opening.split()[0]
        at = text.find(mark)
        if at < 0:
            lengths = (n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n]))
            at = len(text) - next(lengths, 0)
        return len(text[:at].rstrip())

    def parse(self, text: str, parameters: Mapping[str, Any]) -> tuple[str, list[ToolCall]]:
        """The text before the calls, and the calls; the whole text and none, if it does not end with calls.

        Args:
            parameters: of each tool that may be called, by its name: a JSON schema.
        """
        pattern = re.compile(_loose(self.opening))
        openings = pattern.finditer(text) if self.marked else filter(None, [pattern.match(text)])
        for opening in openings:
            try:
                calls = self._calls(text, opening.end(), parameters)
            except ValueError:
                continue
            if self.marked or all(call.name in parameters for call in calls):
                return text[: opening.start()].rstrip(), calls
        return text, []

    def _calls(self, text: str, at: int, parameters: Mapping[str, Any]) -> list[ToolCall]:
        calls = []
        closing = "".join(self.closing.split())
        while True:
            call, at = self.form.read(text, at + len(text[at:]) - len(text[at:].lstrip()), parameters)
            calls.append(call)
            if closing.startswith("".join(text[at:].split())):  # the end of it may have ended generation
                return calls
            between = None if self.between is None else re.compile(_loose(self.between)).match(text, at)
            if between is None:
                raise ValueError("something else follows")
            at = between.end()


class CallReader:
    """Tells calls from text in an answer that grows.

    Args:
        form: how calls are written.
        tools: that may be called, as OpenAI has them.
    """

    def __init__(self, form: CallFormat, tools: Sequence[dict[str, Any]]):
        self.form, self._held, self._said = form, "", False
        functions = [tool["function"] for tool in tools]
        self.parameters = {function["name"]: function.get("parameters") for function in functions}

    def add(self, text: str) -> str:
        """The text that is certain now."""
        if self._said and not self.form.marked:
            return text
        self._held += text
        count = self.form.certain(self._held)
        certain, self._held = self._held[:count], self._held[count:]
        self._said = self._said or bool(certain)
        return certain

    def end(self) -> tuple[str, list[ToolCall]]:
        """What is left of the text, and the calls."""
        return self.form.parse(self._held, self.parameters)


_PROBES: tuple[dict[str, Any], ...] = (
    {"id": "call00001", "name": "zqxja", "arguments": {"zqka": "zqva", "zqkb": "zqvb"}},
    {"id": "call00002", "name": "zqxjb", "arguments": {"zqkc": "zqvc", "zqkd": "zqvd"}},
    {"id": "call00003", "name": "zqxjc", "arguments": {"a": {"b": [1, 'x}"\\', []]}, "c": "é\n", "d": 1.5, "e": True}},
)
_KINDS = {"a": "object", "c": "string", "d": "number", "e": "boolean"}


def find_call_format(written: Callable[[list[dict[str, Any]]], str], said: str) -> CallFormat | None:
    """How a template writes calls; None: in no known way.

    Args:
        written: renders a conversation that ends with such calls; empty: the template can't.
        said: the same conversation as it is rendered with a text in place of the calls.
    """
    parameters = {probe["name"]: {"properties": _schemas()} for probe in _PROBES}
    one, two, odd = (_without_frame(written(list(calls)), said) for calls in (_PROBES[:1], _PROBES[:2], _PROBES[2:]))
    for form in (ObjectForm, NamedForm, TaggedForm):
        first = form.found(one, _PROBES[0])
        if first is None:
            continue
        own, start, end = first
        second = form.found(two[end:], _PROBES[1]) if two.startswith(one[:end]) else None
        result = CallFormat(one[:start], second and two[end : end + second[1]], one[end:], own)
        texts = [(one, _PROBES[:1]), (odd, _PROBES[2:]), *([(two, _PROBES[:2])] if second else [])]
        if (result.marked or form is ObjectForm) and all(
            [(call.name, json.loads(call.arguments)) for call in result.parse(text, parameters)[1]]
            == [(probe["name"], probe["arguments"]) for probe in probes]
            for text, probes in texts
        ):
            return result
    return None


def _schemas() -> dict[str, Any]:
    texts = {key: "string" for probe in _PROBES[:2] for key in probe["arguments"]}
    return {key: {"type": kind} for key, kind in (texts | _KINDS).items()}


def _without_frame(text: str, said: str) -> str:
    """`text` without what it begins and ends with as `said` does."""
    text = text[_alike(text, said) :]
    return text[: len(text) - _alike(text[::-1], said[::-1])]


def _alike(one: str, two: str) -> int:
    """How many characters both texts begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))


@lru_cache(maxsize=64)
def _loose(literal: str) -> str:
    """A pattern of `literal` with any white space in place of its own."""
    return r"\s*".join(re.escape(part) for part in re.split(r"\s+", literal))


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_not_json)


def _decode(text: str, at: int) -> tuple[Any, int]:
    """The JSON value at a place of `text`, and where it ends.

    Raises:
        ValueError: there is none.
    """
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError:
        raise ValueError("too many levels") from None


def _as_json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _path(value: object, wanted: object) -> tuple[str, ...] | None:
    """The keys of objects that lead to `wanted`, or to its JSON; None: it isn't there."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        if inner == wanted or (isinstance(wanted, dict) and inner == json.dumps(wanted)):
            return (key,)
        if (path := _path(inner, wanted)) is not None:
            return (key, *path)
    return None


def _at(value: object, path: tuple[str, ...]) -> object:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _kinds(schema: object) -> dict[str, Any]:
    """The type that a JSON schema names for each key of an object."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    inner = properties if isinstance(properties, dict) else {}
    return {key: own.get("type") for key, own in inner.items() if isinstance(own, dict)}


def is_text(kind: object) -> bool:
    """Whether a bare value is a text as it stands, by the type that its schema names, if any."""
    return kind is None or kind == "string" or (isinstance(kind, list) and "string" in kind)


def _value(text: str, kind: object) -> object:
    """A bare value: what the schema says it is, if it can be that; else a text."""
    if is_text(kind):
        return text
    bare = text.strip()
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(bare, bare), parse_constant=_not_json)
    except (ValueError, RecursionError):
        return text
