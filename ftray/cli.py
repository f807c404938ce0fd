"""From command line and YAML to a :class:`~ftray.config.Config`, and from exceptions to exit codes.

Exit codes: 0 done, 1 a run failed, 2 the user's mistake (one line says which), 130 interrupted.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ftray.config import Config, UserError, near


@dataclass(frozen=True)
class Command:
    """What the command line knows of a command; `ftray/<name>.py` holds its `run(config)`."""

    summary: str
    flags: dict[str, str]  # short flag -> dotted field of Config
    example: str


DATA = {
    "data": "data.source",
    "validation-data": "data.validation",
    "test-data": "data.test",
    "model": "model.name",
    "task": "task",
}
COMMANDS = {
    "preprocess": Command(
        "tokenize a data set into cached shards and show statistics and a sample",
        DATA,
        "ftray preprocess --data records.jsonl --model smollm2-135m",
    ),
    "train": Command(
        "train one adapter",
        {**DATA, "method": "adapter.method", "output": "output"},
        "ftray train --data records.jsonl --method lora --adapter.rank 16 --output runs/one",
    ),
    "tune": Command(
        "search for the best adapter, prove it against the base model and merge it",
        {
            **DATA,
            "space": "search.space",
            "trials": "search.trials",
            "pack": "search.pack",
            "time-budget": "search.time_budget",
            "concurrency": "search.concurrency",
            "max-failures": "search.max_failures",
            "output": "output",
        },
        "ftray tune --data records.jsonl --space methods --trials 32 --output runs/search",
    ),
}
SWITCHES = {"resume": "resume", "verbose": "verbose"}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `ftray` console command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        return run_command(argv[0], argv[1:])
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    print(f"usage: ftray COMMAND [--help] ...\n\n{listing}")
    if not argv or argv[0] in ("-h", "--help"):
        return 0
    print(f"ftray: no command {argv[0]!r}{near(argv[0], COMMANDS)}", file=sys.stderr)
    return 2


def run_command(name: str, argv: Sequence[str] | None = None) -> int:
    """Parse `argv`, run the command and turn what it raises into an exit code."""
    try:
        config = parse(name, sys.argv[1:] if argv is None else argv)
        return importlib.import_module(f"ftray.{name}").run(config) or 0
    except UserError as error:
        print(f"ftray {name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"ftray {name}: interrupted", file=sys.stderr)
        return 130


def parse(name: str, argv: Sequence[str]) -> Config:
    """Build the configuration from the command line.

    Raises:
        UserError: unknown flag or field, bad value, or a YAML file that can't be read.
    """
    command = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=f"ftray {name}",
        description=command.summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"any field: --section.key value (sections: {', '.join(_sections())})\n\nexample:\n  {command.example}",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the sections")
    for flag, field in command.flags.items():
        parser.add_argument(f"--{flag}", dest=field, help=_description(field), metavar=flag.upper())
    for flag, field in SWITCHES.items():
        parser.add_argument(f"--{flag}", dest=field, action="store_true", default=None, help=_description(field))
    try:
        known, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    values = _read_yaml(known.config) if known.config else {}
    for field, value in vars(known).items():
        if field != "config" and value is not None:
            _assign(values, field, value)
    flags = [*command.flags, *SWITCHES, "config"]
    for field, text in _pairs(rest, flags):
        _assign(values, field, yaml.safe_load(text))
    return build(values)


def build(values: dict[str, Any]) -> Config:
    """Validate `values`; the first error becomes one line that names the field and near names.

    Raises:
        UserError: unknown key or bad value.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"]]
        if first["type"] == "extra_forbidden":
            model = _model_at(path[:-1])
            raise UserError(f"unknown key {'.'.join(path)}{near(path[-1], model.model_fields)}") from None
        message = first["msg"].removeprefix("Value error, ")
        shown = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
        raise UserError(f"{'.'.join(path) or 'configuration'}: {message}{shown}") from None


def _pairs(rest: list[str], flags: list[str]) -> list[tuple[str, str]]:
    pairs, i = [], 0
    while i < len(rest):
        name, equals, value = rest[i].partition("=")
        if not name.startswith("--"):
            raise UserError(f"unexpected argument {rest[i]!r}: options start with --")
        if "." not in name:
            raise UserError(f"unknown option {name}{near(name.removeprefix('--'), flags)}")
        if not equals:
            i += 1
            if i == len(rest) or rest[i].startswith("--"):
                raise UserError(f"{name} needs a value")
            value = rest[i]
        pairs.append((name.removeprefix("--"), value))
        i += 1
    return pairs


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold a mapping of sections, not a {type(values).__name__}")
    return values


def _assign(values: dict[str, Any], field: str, value: Any) -> None:
    *sections, key = field.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"{field}: {section} is not a section")
    values[key] = value


def _sections() -> list[str]:
    return [name for name, field in Config.model_fields.items() if _is_model(field.annotation)]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _model_at(path: list[str]) -> type[BaseModel]:
    model: Any = Config
    for part in path:
        model = model.model_fields[part].annotation
    return model


def _description(field: str) -> str:
    *sections, key = field.split(".")
    info = _model_at(sections).model_fields[key]
    default = "" if info.default in (None, False) else f" (default: {info.default})"
    return f"{info.description or key.replace('_', ' ')}{default}".replace("%", "%%")
