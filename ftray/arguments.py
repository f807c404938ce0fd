"""From the arguments of a Python call to a :class:`~ftray.config.Config`: what `cli.py` does with a command line.

A keyword is a flag of the command, with `_` for `-`, or a section with a mapping of its fields. What else there is to
say of a call: its values may be Python objects, and it leaves the program that it is made in as it was.
"""

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

from ftray.cli import COMMANDS, assign, give_way, read_yaml, reads, refuse_unread, sections
from ftray.config import INPUTS, PYTHON_CALL, Config, config_from
from ftray.errors import UserError, near
from ftray.runtime.cluster import quietly
from ftray.runtime.threads import wait_briefly
from ftray.storage.location import Location, parse_location

if TYPE_CHECKING:
    from ftray.data.in_memory import Records

P = ParamSpec("P")
R = TypeVar("R")

StrPath: TypeAlias = str | os.PathLike[str]  # or URI; a result of a command is one too: it stands for its output
Settings: TypeAlias = Mapping[str, Any]  # fields of a section
Data: TypeAlias = "StrPath | Sequence[StrPath] | Records | Settings"
Metric: TypeAlias = str | Callable[[list[dict[str, Any]], list[str]], Sequence[float]]

# keywords that are called otherwise than a flag
OWN = {"start": "start.adapter", "metric": "search.metric", "direction": "search.direction"}
ELSEWHERE = {  # flags that are no keywords
    "plan": "ftray.plan takes the arguments of ftray.tune, and returns the plan",
    "from": "the command line's --from is start",
    "from_as": "the command line's --from-as is start={'form': ...}",
}
RECORDS = ("data.source", "data.validation", "data.test", "generation.file")
FUNCTIONS = ("search.metric", "training.reward")


def command(function: Callable[P, R]) -> Callable[P, R]:
    """A command as a Python function: it refuses unknown arguments by name, and other libraries log nothing."""
    name, known = function.__name__, list(inspect.signature(function).parameters)

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        for given in kwargs:
            if given not in known:
                hint = f"; {ELSEWHERE[given]}" if given in ELSEWHERE else near(given, known)
                raise UserError(f"{name}: unknown argument {given}{hint}")
        config = kwargs.get("config")
        verbose = config.verbose if isinstance(config, Config) else bool(kwargs.get("verbose"))
        call = PYTHON_CALL.set(PYTHON_CALL.get())
        wait_briefly()
        try:
            with quietly(verbose):
                return function(*args, **kwargs)
        finally:
            PYTHON_CALL.reset(call)

    return called


def arguments_of(other: Callable[P, object]) -> Callable[[Callable[[dict[str, Any]], R]], Callable[P, R]]:
    """A function that takes the arguments of another command: it is given a mapping of all of them."""

    def as_other(function: Callable[[dict[str, Any]], R]) -> Callable[P, R]:
        signature = inspect.signature(other)

        @wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            return function(given.arguments)

        returns = inspect.signature(function).return_annotation
        called.__signature__ = signature.replace(return_annotation=returns)  # type: ignore[attr-defined]
        return called

    return as_other


def config_of(name: str, given: dict[str, Any]) -> Config:
    """The configuration that a call makes; what it holds in memory is written into the output, once.

    Args:
        name: of the command.
        given: its arguments by name; None: not given. `config` is a whole :class:`Config`, as the command line makes
            it, or a YAML file or a mapping of sections, over which the other arguments win.

    Raises:
        UserError: an unknown field, one that the command does not read, or a bad value.
    """
    given = {keyword: value for keyword, value in given.items() if value is not None}
    config = given.pop("config", {})
    if isinstance(config, Config):
        if given:
            raise UserError(f"{name}: config is all of the configuration: leave out {next(iter(given))}")
        return config
    values = read_yaml(os.fspath(config)) if isinstance(config, str | os.PathLike) else _plain(config)
    if not isinstance(values, dict):
        raise UserError(f"{name}: config must be a YAML file or a mapping of sections, not a {type(config).__name__}")
    assigned = _by_field(name, given)
    give_way(values, {*assigned})
    for field, value in assigned.items():
        assign(values, field, value)
    _keep_objects(name, values)
    values = _plain(values)
    PYTHON_CALL.set(f"ftray.{name}(config={values!r})")
    return config_from(values)


def _by_field(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The values by the dotted names of their fields."""
    from ftray.data.in_memory import kind_of  # a command line has no such values

    own = {keyword: field for keyword, field in OWN.items() if reads(name, field)}
    flags = {flag.replace("-", "_"): field for flag, field in COMMANDS[name].flags.items()} | own
    if COMMANDS[name].argument:
        flags[COMMANDS[name].argument.rpartition(".")[2]] = COMMANDS[name].argument
    assigned: dict[str, Any] = {}
    for keyword, value in given.items():
        field = flags.get(keyword, keyword)
        if isinstance(value, Mapping) and keyword in sections() and field != "adapters" and not kind_of(value):
            for key, inner in value.items():
                try:
                    refuse_unread(name, f"{keyword}.{key}")
                except UserError as error:
                    raise UserError(str(error).replace("--", "", 1)) from None
                assigned[f"{keyword}.{key}"] = inner
        elif field == "adapters":
            assigned[field] = _adapters(value)
        elif field == "request.configuration" and isinstance(value, Mapping):
            assigned[field] = json.dumps(_plain(value))
        else:
            assigned[field] = value
    return assigned


def _adapters(value: Any) -> list[Any]:
    """Paths, or NAME=PATH; of one or several."""
    if isinstance(value, Mapping):
        return [f"{name}={_plain(path)}" for name, path in value.items()]
    return list(value) if isinstance(value, list | tuple) else [value]


def _keep_objects(name: str, values: dict[str, Any]) -> None:
    """Write records and functions that are given as objects; in `values`, the names of files take their places."""
    from ftray.data.in_memory import kind_of, write_records

    sources = [(field, values.get(field.split(".")[0]), field.split(".")[1]) for field in RECORDS]
    data = values.get("data")
    mixed = data.get("sources") or () if isinstance(data, dict) else ()
    sources += [(f"data.sources[{number}].source", one, "source") for number, one in enumerate(mixed)]
    for field, of, key in sources:
        if isinstance(of, dict) and kind_of(of.get(key)):
            files = write_records(of[key], field, _inputs(name, values))
            of[key] = files.pop("train")
            if field == "data.source":  # of which a data set may bring further splits
                of |= {split: file for split, file in files.items() if of.get(split) is None}
    for field in FUNCTIONS:
        section, key = field.split(".")
        of = values.get(section)
        if isinstance(of, dict) and of.get(key) is not None:
            parts = of[key] if isinstance(of[key], list | tuple) else [of[key]]
            of[key] = ",".join(_named(part, name, field, values) for part in parts)


def _named(part: object, name: str, field: str, values: dict[str, Any]) -> str:
    from ftray.evaluation.user_metric import keep_function

    return keep_function(part, field, _inputs(name, values)) if callable(part) else str(part)


def _inputs(name: str, values: dict[str, Any]) -> Location:
    """Where objects are kept: in the output that a run is to have, else (as of a plan) in the cache.

    Raises:
        UserError: the output holds another run.
    """
    from ftray.models.find import cache_root

    if name not in ("tune", "train") or values.get("plan"):
        return parse_location(cache_root()) / INPUTS
    from ftray.search.run_manifest import RUN, SEARCH, refuse_occupied

    given = values.get("output")
    output = parse_location(given if isinstance(given, str | os.PathLike) else Config().output)
    refuse_occupied(output, SEARCH if name == "tune" else RUN, bool(values.get("resume")))
    return output / INPUTS


def _plain(value: Any) -> Any:
    """As YAML has it: lists for tuples, numbers for those of numpy, text for paths."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(inner) for inner in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    return value
