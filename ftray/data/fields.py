"""The mapping `data.fields`: which keys of a record become the fields by which its shape is recognised."""

import json
import re
import shlex
from functools import lru_cache
from typing import Any

from ftray.data.shapes import GROUP, LEFT_OUT, OWN, Record, as_text, is_empty
from ftray.errors import UserError, near


class Fields:
    """A mapping, ready for use.

    Args:
        fields: field -> key of the record (dots lead into it), or a jinja template over its keys.

    Raises:
        UserError: a template that jinja can't read.
    """

    def __init__(self, fields: dict[str, str]):
        from jinja2 import StrictUndefined, TemplateSyntaxError, meta
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        # as chat templates are run: a template out of somebody else's configuration is not to reach the machine
        jinja = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        self.keys: dict[str, str] = {}
        self.templates: dict[str, tuple[Any, set[str]]] = {}
        for field, source in fields.items():
            if "{{" not in source and "{%" not in source:
                self.keys[field] = source
                continue
            try:
                self.templates[field] = jinja.from_string(source), meta.find_undeclared_variables(jinja.parse(source))
            except TemplateSyntaxError as error:
                raise UserError(f"data.fields: {field}: jinja can't read it: {error.message}") from None

    def __call__(self, record: Record, where: object) -> Record:
        """The record that the mapping makes; the names of keys that it doesn't use stand under `LEFT_OUT`.

        Raises:
            UserError: a key is missing, or a template fails; says where.
        """
        made = {field: _value(record, path, f"data.fields: {field}", where) for field, path in self.keys.items()}
        made |= {field: _rendered(template, record, field, where) for field, (template, _) in self.templates.items()}
        used = {_used(record, path) for path in self.keys.values()}
        used = used.union(*(keys for _, keys in self.templates.values()))
        left = sorted(str(key) for key in record if key not in used)
        return made | ({LEFT_OUT: left} if left else {})


def as_typed(fields: dict[str, str]) -> str:
    """A mapping as a flag of a command, quoted for a shell."""
    return f"--data.fields {shlex.quote(', '.join(f'{field}: {_quoted(source)}' for field, source in fields.items()))}"


def _quoted(source: str) -> str:
    """A key or template as YAML takes it: in quotes, unless it is a plain word."""
    return source if re.fullmatch(r"[^\W\d][\w. -]*", source) else json.dumps(source, ensure_ascii=False)


@lru_cache(maxsize=16)
def compiled(fields: str) -> Fields:
    """The mapping in a text of JSON."""
    return Fields(json.loads(fields))


def with_group(made: Record, record: Record, path: str, where: object) -> Record:
    """`made` with the group of `record`, which is the value at `path`, under `GROUP`.

    Raises:
        UserError: it has none; says where.
    """
    value = _value(record, path, "data.group", where)
    if is_empty(value):
        raise UserError(f"{where}: data.group: {path} is empty: give each record one, or leave data.group out")
    return made | {GROUP: [_used(record, path), as_text(value, f"data.group: {path}", where)]}


def _used(record: Record, path: str) -> str:
    """The record's own key that a path begins with."""
    return path if path in record else path.partition(".")[0]


def _value(record: Record, path: str, field: str, where: object) -> Any:
    value: Any = record
    for key in [path] if path in record else path.split("."):
        try:
            value = value[int(key) if isinstance(value, list) else key]
        except (KeyError, IndexError, ValueError, TypeError):
            keys = [str(own) for own in record if not str(own).startswith(OWN)]
            hint = near(path, keys, otherwise=f"it has {', '.join(keys) or 'none'}")
            raise UserError(f"{where}: {field}: the record has no key {path}{hint}") from None
    return value


def _rendered(template: Any, record: Record, field: str, where: object) -> str:
    try:
        return str(template.render(record))
    except Exception as error:  # a template is a program, and raises whatever it likes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where}: data.fields: the template of {field} fails: {reason}") from None
