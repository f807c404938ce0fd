"""Search spaces: YAML in, configurations out, each method with its own parameters.

A space is a mapping. `method` lists the methods to try. Other top-level keys are fields of the `training` section.
A key named like a method holds what applies to that method alone: its parameters, and training fields that win over
the top level. `model` may hold constants for the `model` section. A value is a constant or one of

    {choice: [a, b, ...]}      {float: [low, high]}      {log: [low, high]}      {int: [low, high]}

`float` and `int` take `log: true`, `int` takes `step`; with `times: <parameter above>` the value is multiplied by it;
with `prior: <value>` the first trials lie near that value, which leaves nothing out.
"""

import copy
import json
import math
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ftray.adapters.methods import METHODS, parameters
from ftray.config import AdapterConfig, ModelConfig, TrainingConfig, parse_yaml
from ftray.errors import UserError, first_error, near

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

CLONE = Path(__file__).parents[2] / "search_spaces"
INSTALLED = Path(sysconfig.get_path("data")) / "share" / "ftray" / "search_spaces"
DIRECTORY = CLONE if CLONE.is_dir() else INSTALLED
KINDS = ("choice", "float", "log", "int")
# equal for all trials
FIXED_TRAINING = ("steps", "epochs", "evaluations", "validation_records", "shard_base", "reward")
BASELINE: dict[str, Any] = {
    "method": "lora",
    "rank": 8,
    "alpha": 16,
    "dropout": 0.05,
    "target_modules": "attention-qv",
}


@dataclass(frozen=True)
class Domain:
    """The values one parameter may take.

    Attributes:
        kind: choice, float, log or int.
        values: the choices, or (low, high).
        times: parameter that the drawn value multiplies, if any.
        prior: the value that is likely to be the best, if a user knows one.
    """

    kind: str
    values: tuple[Any, ...]
    log: bool = False
    step: int = 1
    times: str | None = None
    prior: Any = None

    @cached_property
    def labels(self) -> tuple[Any, ...]:
        """What Optuna is given for each choice: it stores None, bool, int, float and str, and compares them by `==`.

        A choice of these types is given as it is. A list or a mapping is given as YAML text; so is a choice that equals
        another one, as 1, 1.0 and true do.
        """
        texts = [_as_yaml(value) for value in self.values]
        named = {text: value for text, value in zip(texts, self.values, strict=True) if isinstance(value, str)}
        for text, value in zip(texts, self.values, strict=True):
            label = value if _storable(value) and value not in named.values() else text
            while text not in named and label in named.values():
                label = f"({label})"
            named.setdefault(text, label)
        return tuple(named[text] for text in texts)

    def suggest(self, trial: "BaseTrial", name: str) -> object:
        """Draw from an Optuna trial."""
        if self.kind == "choice":
            drawn = trial.suggest_categorical(name, self.labels)
            return copy.deepcopy(self.values[self.labels.index(drawn)])
        if self.kind == "int":
            return trial.suggest_int(name, *self.values, log=self.log, step=self.step)
        return trial.suggest_float(name, *self.values, log=self.kind == "log" or self.log)

    def holds(self, value: object) -> bool:
        """Whether `value` lies in the domain."""
        if self.kind == "choice":
            return value in self.values
        low, high = self.values
        numeric = isinstance(value, int | float) and low <= value <= high
        return numeric and (self.kind != "int" or (value - low) % self.step == 0)

    def stored(self, value: object) -> object:
        """What the Optuna study stores for `value`, which must lie in the domain."""
        if self.kind != "choice":
            return value
        texts = [_as_yaml(known) for known in self.values]
        text = _as_yaml(value)  # 1, 1.0 and true are equal: the very one, if it is there
        return self.labels[texts.index(text) if text in texts else self.values.index(value)]


Setting = Domain | Any  # a domain or a constant


@dataclass(frozen=True)
class Space:
    """A validated search space."""

    source: str
    methods: tuple[str, ...]
    shared: dict[str, Setting]  # training fields
    own: dict[str, dict[str, Setting]]  # method -> its parameters and training fields
    model: dict[str, Any]  # constants of the model section
    content: dict[str, Any]  # as it was written
    default: dict[str, Any] = field(default_factory=BASELINE.copy)  # adapter of the first trial

    def suggest(self, trial: "BaseTrial") -> dict[str, dict[str, Any]]:
        """Draw a configuration, `{"adapter": {...}, "training": {...}}`, define-by-run.

        Optuna's names are `method`, `learning_rate`, `lora/rank`, ...: one name, one distribution.
        """
        method = trial.suggest_categorical("method", self.methods)
        return self._configuration(method, lambda name, domain: domain.suggest(trial, name))

    def locate(self, configuration: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
        """The Optuna parameters that give `configuration`, or None if the space does not hold it."""
        method = configuration["adapter"]["method"]
        if method not in self.methods:
            return None
        flat = configuration["adapter"] | configuration["training"]
        found: dict[str, Any] = {"method": method}
        for name, setting in self.settings(method).items():
            key = name.rsplit("/", 1)[-1]
            value = flat.get(key)
            if not isinstance(setting, Domain):
                if value != setting:
                    return None
                continue
            if setting.times:
                value = value / flat[setting.times] if value is not None else None
            if setting.kind == "int" and isinstance(value, float) and value.is_integer():
                value = int(value)
            if not setting.holds(value):
                return None
            found[name] = setting.stored(value)
        return found

    def choices(self) -> dict[str, tuple[Any, ...]]:
        """The choices of each categorical parameter as Optuna knows them, by Optuna's name of the parameter."""
        settings = [setting for method in self.methods for setting in self.settings(method).items()]
        return {name: s.labels for name, s in settings if isinstance(s, Domain) and s.kind == "choice"}

    def corners(self) -> Iterable[dict[str, dict[str, Any]]]:
        """Configurations which together hold the ends of every range and every choice of every parameter."""
        for method in self.methods:
            settings = self.settings(method)
            widest = max((len(s.values) for s in settings.values() if isinstance(s, Domain)), default=1)
            multiplied = {s.times for s in settings.values() if isinstance(s, Domain) and s.times}
            for i, j in product(range(widest), range(widest if multiplied else 1)):

                def pick(name: str, domain: Domain, i: int = i, j: int = j, own: set[Any] = multiplied) -> object:
                    return domain.values[min(j if name.rsplit("/", 1)[-1] in own else i, len(domain.values) - 1)]

                yield self._configuration(method, pick)

    def settings(self, method: str) -> dict[str, Setting]:
        """What a method draws or is given, by Optuna's names of the parameters."""
        own = self.own.get(method, {})
        shared = {name: setting for name, setting in self.shared.items() if name not in own}
        return shared | {f"{method}/{name}": setting for name, setting in own.items()}

    def _configuration(self, method: str, draw: Callable[[str, Domain], Any]) -> dict[str, dict[str, Any]]:
        values: dict[str, Any] = {}
        for name, setting in self.settings(method).items():
            key = name.rsplit("/", 1)[-1]
            value = draw(name, setting) if isinstance(setting, Domain) else setting
            if isinstance(setting, Domain) and setting.times:
                value *= values[setting.times]
            values[key] = value
        training = {k: v for k, v in values.items() if k in TrainingConfig.model_fields}
        adapter = {k: v for k, v in values.items() if k not in training}
        return {"adapter": {"method": method, **adapter}, "training": training}


def load_space(name: str | dict[str, Any]) -> Space:
    """Read and validate a space.

    Args:
        name: a YAML file, or one in `search_spaces/` without its suffix; or the content of one.

    Raises:
        UserError: with file and key: unknown key, method or kind, a range upside down, a value no trial could take.
    """
    path, content = Path("search.space"), cast(object, name)
    if isinstance(name, str):
        path = _find(name)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"search.space {path}: can't be read ({getattr(error, 'strerror', error)})") from None
        content = parse_yaml(text, path)
    if not isinstance(content, dict) or "method" not in content:
        raise UserError(f"{path}: a search space is a mapping with the key method")
    return _Reader(path).space(content)


def space_from(content: dict[str, Any], source: str, default: dict[str, Any]) -> Space:
    """A space from its content.

    Args:
        source: the file that messages name.
        default: the adapter of the first trial.

    Raises:
        UserError: as :func:`load_space`.
    """
    return replace(_Reader(Path(source)).space(content), default=default)


class _Reader:
    def __init__(self, path: Path):
        self.path = path

    def space(self, content: dict[str, Any]) -> Space:
        method = self.setting("method", content["method"], {})
        methods = method.values if isinstance(method, Domain) else (method,)
        for name in methods:
            if not isinstance(name, str) or name not in METHODS:
                raise self.error("method", f"unknown method {name!r}{near(str(name), METHODS)}")
        training = {k for k in TrainingConfig.model_fields if k not in FIXED_TRAINING}
        shared: dict[str, Setting] = {}
        own: dict[str, dict[str, Setting]] = {}
        model: dict[str, Any] = {}
        for key, value in content.items():
            if key in METHODS:
                if key not in methods:
                    raise self.error(key, f"is not among the methods ({', '.join(methods)})")
                own[key] = self.section(key, value, {*METHODS[key].parameters.model_fields, *training})
            elif key == "model":
                model = self.model(value)
            elif key in FIXED_TRAINING:
                raise self.error(key, "is equal for all trials: set it in the training section")
            elif key in training:
                shared[key] = self.setting(key, value, shared)
            elif key != "method":
                raise self.error(key, f"unknown key{near(key, [*training, *METHODS, 'model', 'method'])}")
        space = Space(str(self.path), tuple(methods), shared, own, model, content)
        for corner in space.corners():
            self.try_out(corner)
        return space

    def section(self, method: str, value: object, known: set[str]) -> dict[str, Setting]:
        value = value or {}
        if not isinstance(value, dict):
            raise self.error(method, "must hold a mapping of parameters")
        settings: dict[str, Setting] = {}
        for key, content in value.items():
            if key not in known:
                raise self.error(f"{method}.{key}", f"unknown key{near(key, sorted(known))}")
            field = METHODS[method].parameters.model_fields.get(key)
            if isinstance(content, dict) and not set(KINDS) & content.keys() and field and _holds_mapping(field):
                settings[key] = self.plain(f"{method}.{key}", content)
            else:
                settings[key] = self.setting(f"{method}.{key}", content, settings)
        return settings

    def setting(self, where: str, value: object, above: dict[str, Setting]) -> Setting:
        if not isinstance(value, dict):
            return self.plain(where, value)
        kinds = [key for key in value if key in KINDS]
        unknown = [key for key in value if key not in (*KINDS, "times", "step", "prior") and key != "log"]
        if unknown:
            raise self.error(where, f"unknown kind {unknown[0]}{near(str(unknown[0]), KINDS)}")
        if not kinds:
            raise self.error(where, f"a mapping names one of {', '.join(KINDS)}, as in {{float: [0.1, 0.5]}}")
        kind = next((k for k in kinds if k != "log"), "log")
        if [k for k in kinds if k not in (kind, "log")]:
            raise self.error(where, f"holds two kinds: {', '.join(kinds)}")
        values, times, step = value[kind], value.get("times"), value.get("step", 1)
        if not isinstance(values, list) or not values:
            raise self.error(where, f"{kind} needs a list that isn't empty")
        if times is not None and (not isinstance(times, str) or times not in above):
            raise self.error(where, f"times: {times!r} is not a parameter above it{near(str(times), above)}")
        if not _number(step) or step != int(step) or step < 1:
            raise self.error(where, f"step must be a whole number from 1, not {step!r}")
        log = kind == "log" or bool(kind != "log" and value.get("log", False))
        if kind != "choice":
            values = self.range(where, kind, values, log)
        if log and step != 1:
            raise self.error(where, "log and step don't go together")
        domain = Domain(kind, tuple(self.plain(where, v) for v in values), log, step, times, value.get("prior"))
        if domain.prior is not None and not domain.holds(domain.prior):
            raise self.error(where, f"prior {domain.prior!r} is not among the values it may take")
        for name, factor in ((where, domain), (times, above[times])) if times is not None else ():
            for one in factor.values if isinstance(factor, Domain) else (factor,):
                if not _number(one):
                    raise self.error(where, f"times multiplies numbers, and {name} may be {one!r}")
        return domain

    def plain(self, where: str, value: object) -> object:
        try:
            json.dumps(value)
        except (TypeError, ValueError):  # the journal and summary.json are JSON
            raise self.error(where, f"no setting can be a date, bytes or a set (got {value!r})") from None
        return value

    def range(self, where: str, kind: str, values: list[Any], log: bool) -> list[Any]:
        try:
            low, high = (int(v) if kind == "int" else float(v) for v in values)
            finite = math.isfinite(low) and math.isfinite(high)
        except (TypeError, ValueError, OverflowError):
            finite = False
        if not finite:
            raise self.error(where, f"{kind} needs two numbers [low, high], not {values}")
        if low > high:
            raise self.error(where, f"the range is upside down: {low} > {high}")
        if log and low <= 0:
            raise self.error(where, f"a logarithmic range must lie above 0, not start at {low}")
        return [low, high]

    def model(self, value: object) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.error("model", "must hold a mapping of constants")
        for key in value:
            if key not in ModelConfig.model_fields:
                raise self.error(f"model.{key}", f"unknown key{near(key, ModelConfig.model_fields)}")
        try:
            ModelConfig.model_validate(value)
        except ValidationError as error:
            first = first_error(error)
            raise self.error(".".join(["model", *first.path]), first.reason) from None
        return value

    def try_out(self, corner: dict[str, dict[str, Any]]) -> None:
        method = corner["adapter"]["method"]
        try:
            parameters(AdapterConfig(**corner["adapter"]))
            TrainingConfig.model_validate(corner["training"])
        except UserError as error:
            raise UserError(f"{self.path}: {str(error).replace('adapter.', f'{method}.', 1)}") from None
        except ValidationError as error:
            first = first_error(error)
            raise self.error(".".join(first.path) or method, first.reason) from None

    def error(self, where: str, what: str) -> UserError:
        return UserError(f"{self.path}: {where}: {what}")


def _holds_mapping(field: FieldInfo) -> bool:
    return dict in [get_origin(kind) for kind in (field.annotation, *get_args(field.annotation))]


def _as_yaml(value: object) -> str:
    """`value` as YAML on one line; different values have different texts."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("\n...\n").strip()


def _storable(value: object) -> bool:
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and not math.isnan(value))


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _find(name: str) -> Path:
    bundled = DIRECTORY / f"{name}.yaml"
    if bundled.is_file():
        return bundled
    path = Path(name)
    if path.is_file():
        return path
    known = sorted(p.stem for p in DIRECTORY.glob("*.yaml"))
    raise UserError(f"search.space {name}: no such file{near(path.stem, known)}")
