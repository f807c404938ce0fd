"""The grammar of answers that are calls of tools, in the form in which the model's chat template writes them.

It is the reverse of :mod:`ftray.data.tool_calls`: what follows it is read back by it. In llguidance's Lark, see
https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ftray.data.tool_calls import CallFormat, NamedForm, ObjectForm, TaggedForm, is_text

ID = "/[a-zA-Z0-9]{9}/"  # which every chat template takes
SAYS_NOTHING = {"title", "description", "default", "examples", "deprecated", "$schema", "$comment"}
PLAIN_TEXT = {"type", "enum", "const"}
PLAIN_OBJECT = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}


def call_grammar(
    form: CallFormat, functions: Sequence[dict[str, Any]], one: bool, added: Mapping[str, int], whitespace: str
) -> str:
    """The grammar of one call or several.

    Args:
        functions: that may be called, as OpenAI has them.
        one: a single call, where the form has room for several.
        added: ids of the tokens that stand outside of the tokenizer's own vocabulary, by their text: the model was
            trained on them, not on their letters.
        whitespace: pattern of what may stand between the parts of JSON.

    Raises:
        ValueError: arguments can't be held to the parameters of a function; names it.
    """
    writer = _Writer(added, whitespace)
    calls = [writer.call(form.form, function["name"], _parameters(function)) for function in functions]
    more = f"({writer.literal(form.between)} call)*" if form.between is not None and not one else ""
    start = f"start: {writer.literal(form.opening)} call {more} {writer.literal(form.closing)}"
    return "\n".join([start, f"call: {' | '.join(calls)}", *writer.rules])


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments, which are an object; without parameters it takes none."""
    name, given = function["name"], function.get("parameters")
    if not given:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    kinds = given.get("type", "object")
    if "object" not in (kinds if isinstance(kinds, list) else [kinds]):
        raise ValueError(f"{name}: the parameters must be a schema of an object, not of {str(kinds)[:40]}")
    result: dict[str, Any] = given | {"type": "object"}
    return result


class _Writer:
    """Writes parts of a grammar; `rules` are those that they name."""

    def __init__(self, added: Mapping[str, int], whitespace: str):
        self.added, self.whitespace, self.rules = added, whitespace, list[str]()
        longest_first = sorted(filter(None, added), key=len, reverse=True)
        self._added = re.compile("|".join(["(?!)", *map(re.escape, longest_first)]))

    def literal(self, text: str) -> str:
        """A text as it is."""
        return " ".join(self._parts(text))

    def _parts(self, text: str) -> list[str]:
        parts, at = list[str](), 0
        for token in self._added.finditer(text):
            parts += [json.dumps(text[at : token.start()]), f"<[{self.added[token[0]]}]>"]
            at = token.end()
        return [part for part in [*parts, json.dumps(text[at:])] if part != '""']

    def call(self, form: ObjectForm | NamedForm | TaggedForm, name: str, parameters: dict[str, Any]) -> str:
        """A call of one function."""
        if isinstance(form, ObjectForm):
            values = {form.name: json.dumps(json.dumps(name)), form.arguments: self._json(parameters)}
            if form.id:
                values[form.id] = rf'"\"" {ID} "\""'
            return self._like(form.example, (), values)
        if isinstance(form, NamedForm):
            middle = f" {ID} ".join(map(self.literal, form.middle[:2]))
            return f"{self.literal(name)} {middle} {self._json(parameters)}"
        return f"{self.literal(name)} {self._pairs(form, name, parameters)}"

    def _like(self, example: object, path: tuple[str, ...], values: Mapping[tuple[str, ...], str]) -> str:
        """JSON like `example`, with `values` in the places to which their paths lead."""
        if path in values:
            return values[path]
        if not isinstance(example, dict):
            return json.dumps(json.dumps(example))
        space = f"/{self.whitespace}/"
        pairs = (
            f'{json.dumps(json.dumps(key))} {space} ":" {space} {self._like(inner, (*path, key), values)}'
            for key, inner in example.items()
        )
        return f'"{{" {space} ' + f' {space} "," {space} '.join(pairs) + f' {space} "}}"'

    def _json(self, schema: dict[str, Any]) -> str:
        """JSON that conforms to a schema; the name of the rule for it."""
        options = {"x-guidance": {"whitespace_pattern": self.whitespace}}
        return self._rule(f"%json {json.dumps(schema | options)}")

    def _rule(self, body: str, kind: str = "json") -> str:
        kind, bracket, options = kind.partition("[")
        name = f"{kind}_{len(self.rules)}"
        self.rules.append(f"{name}{bracket}{options}: {body}")
        return name

    def _pairs(self, form: TaggedForm, function: str, parameters: dict[str, Any]) -> str:
        """The arguments key by key, in the order in which the schema has them."""
        _check(parameters, PLAIN_OBJECT, function)
        properties, required = parameters.get("properties", {}), parameters.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise ValueError(f"{function}: properties must be an object, and required a list")
        shared: dict[str, Any] = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
        pairs = []
        for key in dict.fromkeys([*properties, *map(str, required)]):
            schema = properties.get(key, {})
            if not isinstance(schema, dict):
                raise ValueError(f"{function}.{key}: must be a schema, as an object")
            if is_text(schema.get("type")):
                value = self._text(form, schema, f"{function}.{key}")
            else:
                value = f"{self._bare(schema, shared)} {self.literal(form.after_value)}"
            pair = f"{self.literal(form.before_key)} {self.literal(key)} {self.literal(form.after_key)} {value}"
            pairs.append(pair if key in required else f"({pair})?")
        return " ".join(pairs)

    def _bare(self, schema: dict[str, Any], shared: dict[str, Any]) -> str:
        """A value that is no text: JSON, or as jinja prints it."""
        json_ = self._json(schema | shared)
        printed = {"boolean": ["True", "False"], "null": ["None"]}.get(str(schema.get("type")), [])
        own = [] if set(schema) - SAYS_NOTHING - {"type"} else list(map(json.dumps, printed))
        return f"({' | '.join([json_, *own])})"

    def _text(self, form: TaggedForm, schema: dict[str, Any], where: str) -> str:
        """A text without quotes, and what stands after it."""
        _check(schema, PLAIN_TEXT, where)
        end = self.literal(form.after_value)
        if "enum" in schema or "const" in schema:
            choices = [schema["const"]] if "const" in schema else schema["enum"]
            texts = choices if isinstance(choices, list) else []
            whole = [text for text in texts if isinstance(text, str) and form.after_value not in text]
            texts = [self.literal(text) or '""' for text in whole]
            if not texts:
                raise ValueError(f"{where}: none of its values is a text")
            return f"({' | '.join(texts)}) {end}"
        if end.startswith("<["):  # a token of its own, of which a text can hold the letters
            own = self._added.match(form.after_value)
            letters = json.dumps(own[0]) if own else ""
            return f"{self._rule(f'/(?s:.*)/ & ~(/(?s:.*)/ {letters} /(?s:.*)/)', 'TEXT')} {end}"
        first, *rest = self._parts(form.after_value)
        return " ".join([self._rule("/(?s:.*)/", f"text[suffix={first}]"), *rest])


def _check(schema: dict[str, Any], known: set[str], where: str) -> None:
    """Refuse what a call that is no JSON can't be held to."""
    if others := sorted(set(schema) - known - SAYS_NOTHING):
        raise ValueError(f"{where}: the chat template writes it key by key, which can't be held to {', '.join(others)}")
