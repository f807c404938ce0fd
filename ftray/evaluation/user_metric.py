"""A metric or reward of the user's own: a Python function, from records and answers to a number a record.

It stands in a file, which travels by content: workers elsewhere need not see it, and nothing that it imports from
beside it is there. A function that Python was given as an object is pickled into such a file, with what it refers to.
"""

import inspect
import json
import math
import re
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ftray.config import USER_METRIC, Config, SearchConfig, TrainingConfig, at_home, metrics_named
from ftray.errors import UserError, near
from ftray.storage.location import Location, parse_location, reason

if TYPE_CHECKING:
    from ftray.evaluation.metrics import Scores

ON_POLICY = "GRPO"
REWARD = "reward"  # the metric that a reward is
PICKLE = ".pkl"
SHOWN = 60  # characters of a prompt or an answer in a message


class UserMetricError(Exception):
    """The function can't be loaded, raised, or gave something else than a number a record; the message says where."""


@dataclass(frozen=True)
class UserMetric:
    """A function of a file.

    Attributes:
        path: of the file, as the user wrote it.
        name: of the function.
        source: text of the file, or a pickle of the function.
        metric: name of what it measures; empty: the function's.
    """

    path: str
    name: str
    source: str | bytes
    metric: str = ""

    def values(self, rows: Sequence[dict[str, Any]], answers: Sequence[str]) -> np.ndarray:
        """What the function gives of each record, float64 [records].

        Args:
            rows: of the shards; the function is given their `prompt` and `target`, of a mixture also the `source`, and
                of tasks that keep further fields of a record these.
            answers: generated for them.

        Raises:
            UserMetricError: see there; it names the line of the file and the record.
        """
        try:
            given = self._call(rows, answers)
        except (Exception, SystemExit) as error:
            raise UserMetricError(self._raised(error, self._first_that_raises(rows, answers))) from None
        place = f"{self._file}:{self._function().__code__.co_firstlineno}: {self.name} gave"
        numbers = _numbers(given)
        if numbers is None:
            raise UserMetricError(f"{place} {_described(given)}, not a list of numbers, one a record")
        if len(numbers) != len(rows):
            raise UserMetricError(f"{place} {len(numbers)} numbers for {len(rows)} records")
        for i, number in enumerate(numbers):
            if not math.isfinite(number):
                raise UserMetricError(f"{place} {number} for {_record_named(i, rows[i], answers[i])}")
        return np.array(numbers, float)

    def add_to(self, scores: "Scores", rows: Sequence[dict[str, Any]]) -> None:
        """Put the mean over records among the metrics of `scores`, which hold the answers to `rows`.

        Raises:
            UserMetricError: as :meth:`values`.
        """
        from ftray.evaluation.metrics import ratio  # here: the driver of a search needs none of it

        values = self.values(rows, scores.generated)
        scores.metrics[self.metric or self.name] = ratio(values, np.ones_like(values))

    def try_on(self, rows: Sequence[dict[str, Any]]) -> None:
        """Load the function, and try it with stand-in answers: the targets, then nothing, as a base may answer.

        Raises:
            UserError: it can't be used.
        """
        try:
            function = self._function()
            try:
                inspect.signature(function).bind([], [])
            except TypeError as error:
                line = function.__code__.co_firstlineno
                raise UserMetricError(
                    f"{self._file}:{line}: {self.name} must take (records, answers), two lists: {error}"
                ) from None
            if rows:  # of a large source, no validation record may have been read
                for answers in ([str(row["target"]) for row in rows], [""] * len(rows)):
                    self.values(rows, answers)
        except UserMetricError as error:
            raise UserError(str(error)) from None

    def _function(self) -> types.FunctionType:
        if isinstance(self.source, bytes):
            return _unpickled(self.path, self.source)
        return _loaded(self.path, self.name, self.source)

    @property
    def _file(self) -> str:
        """Where its lines are counted: of a pickled function, what it was written in, as a cell of a notebook."""
        return self._function().__code__.co_filename if isinstance(self.source, bytes) else self.path

    def _call(self, rows: Sequence[dict[str, Any]], answers: Sequence[str]) -> object:
        given = self._function()([_record(row) for row in rows], list(answers))
        return list(given) if isinstance(given, Iterator) else given  # a generator raises only when it is read

    def _raised(self, error: BaseException, record: str) -> str:
        return f"{_place(error, self._file)}: {_named(error)} ({self.name} of {record})"

    def _first_that_raises(self, rows: Sequence[dict[str, Any]], answers: Sequence[str]) -> str:
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            try:
                self._call([row], [answer])
            except (Exception, SystemExit):
                return _record_named(i, row, answer)
        return f"{len(rows)} records together"


def user_metrics(search: SearchConfig) -> tuple[UserMetric, ...]:
    """The functions among the goals of a search, with their files as they are now.

    Raises:
        UserError: a file can't be read.
    """
    names = [name for name in metrics_named(search.metric) if re.fullmatch(USER_METRIC, name)]
    return tuple(_read(name, "search.metric") for name in names)


def reward(training: TrainingConfig) -> UserMetric | None:
    """The function of `training.reward`, with its file as it is now; None: there is none.

    Raises:
        UserError: the file can't be read.
    """
    return _read(training.reward, "training.reward", REWARD) if training.reward else None


def check_reward(cfg: Config, rows: Sequence[dict[str, Any]]) -> None:
    """Check that a task that learns from a reward has one, which can judge `rows`, and can draw answers.

    Raises:
        UserError: it can't.
    """
    if cfg.task != ON_POLICY:
        return
    given = reward(cfg.training)
    if given is None:
        raise UserError(
            f"training.reward: {cfg.task} learns from a reward: give FILE.py:FUNCTION, which takes records and answers "
            "and gives a number an answer"
        )
    if not cfg.evaluation.generate:
        raise UserError(f"evaluation.generate: {cfg.task} is judged by answers: leave it true")
    if cfg.training.zero_stage == 3 or cfg.training.shard_base:
        field = "shard_base" if cfg.training.shard_base else "zero_stage 3"
        raise UserError(f"training.{field}: answers are drawn where a worker has the whole base: leave it out")
    given.try_on(rows)


def _read(given: str, field: str, metric: str = "") -> UserMetric:
    path, name = re.fullmatch(USER_METRIC, given).groups()  # type: ignore[union-attr]
    try:
        if path.endswith(PICKLE):
            return UserMetric(path, name, parse_location(str(at_home(path))).read_bytes(), metric)
        return UserMetric(path, name, Path(str(at_home(path))).read_text(encoding="utf-8-sig"), metric)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{field} {given}: can't be read: {getattr(error, 'strerror', error)}") from None


def keep_function(function: Callable[..., object], field: str, directory: Location) -> str:
    """Pickle a function of the user's, by value; returns what `field` names it by.

    A module that it comes from is pickled as far as the function refers to it, unless it is an installed package, which
    workers have too.

    Args:
        field: of the configuration; a lambda is called by its last part.
        directory: where the file goes; one of the same name there is replaced, as a user mends a file.

    Raises:
        UserError: it is no function, or it refers to something that can't be pickled.
    """
    from ray import cloudpickle

    if not isinstance(function, types.FunctionType):
        raise UserError(f"{field}: must be a function, by def or lambda, or FILE.py:FUNCTION, not {_short(function)}")
    name = function.__name__ if function.__name__.isidentifier() else field.rpartition(".")[2]
    module = sys.modules.get(function.__module__)
    file = getattr(module, "__file__", None) or ""
    installed = file.startswith((sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")))
    with ExitStack() as stack:
        if module is not None and file and not installed and module.__name__ != "__main__":
            cloudpickle.register_pickle_by_value(module)
            stack.callback(cloudpickle.unregister_pickle_by_value, module)
        try:
            content = cloudpickle.dumps(function)
        except Exception as error:  # whatever the things that it refers to raise
            raise UserError(f"{field}: {name} refers to what can't be pickled: {reason(error)}") from None
    place = directory / f"{name}{PICKLE}"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return f"{place.absolute()}:{name}"


@lru_cache
def _unpickled(path: str, content: bytes) -> types.FunctionType:
    from ray import cloudpickle

    try:
        function: types.FunctionType = cloudpickle.loads(content)
        return function
    except Exception as error:  # of an import, for one
        raise UserMetricError(f"{path}: {_named(error)}") from None


@lru_cache
def _loaded(path: str, name: str, source: str) -> types.FunctionType:
    """The function; what else the file does is done once a process."""
    module = types.ModuleType(f"ftray_metric_{abs(hash(source))}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # where a dataclass looks for its own
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except SyntaxError as error:
        raise UserMetricError(f"{path}:{error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        raise UserMetricError(f"{_place(error, path)}: {_named(error)}") from None
    function = getattr(module, name, None)
    if not isinstance(function, types.FunctionType):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise UserMetricError(f"{path}: has no function {name}{near(name, there)}")
    return function


def _place(error: BaseException, path: str) -> str:
    """The last line of the file that an error came through."""
    line, trace = 0, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"{path}:{line}" if line else path


def _named(error: BaseException) -> str:
    return ": ".join(filter(None, (type(error).__name__, _short(error))))


def _record(row: dict[str, Any]) -> dict[str, Any]:
    """What a function is given of a record: what ftray has found in it, and its own fields, which stay as they are."""
    further = json.loads(row["extra"]) if row.get("extra") else {}
    found = {key: row[key] for key in ("prompt", "target", "source") if row.get(key) is not None}
    return found if not isinstance(further, dict) else found | further


def _numbers(given: object) -> list[float] | None:
    """What a function gave, if it is a list, a tuple, a vector of NumPy or torch or the like; None: it is not.

    Much else can be gone through, and would be taken for numbers: keys of a mapping, digits of a text, rows of a table.
    """
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | bytearray | Mapping | Set):
        return None
    if len(getattr(given, "shape", (0,))) != 1:
        return None
    numbers = list(given)
    if any(isinstance(n, str | bytes | complex | np.complexfloating) or getattr(n, "shape", ()) for n in numbers):
        return None
    try:
        return [float(number) for number in numbers]
    except (TypeError, ValueError, OverflowError):
        return None


def _described(given: object) -> str:
    """A wrong result; of an array its shape, which is what is wrong."""
    shape = tuple(getattr(given, "shape", (0,)))
    return _short(given) if len(shape) == 1 else f"{_short(given)} of shape {shape}"


def _record_named(index: int, row: dict[str, Any], answer: str) -> str:
    return f"record {index}, prompt {_short(row['prompt'])!r}, answer {_short(answer)!r}"


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
