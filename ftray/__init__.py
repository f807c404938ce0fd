"""Find the best fine-tuning adapter for your data, prove it and put it in production.

Every command is a function here, with its flags as keyword arguments: see docs/python.md.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ftray.add import add as add
    from ftray.clone import clone as clone
    from ftray.errors import RunFailed as RunFailed
    from ftray.errors import UserError as UserError
    from ftray.evaluate import evaluate as evaluate
    from ftray.export import export as export
    from ftray.infer import infer as infer
    from ftray.merge import merge as merge
    from ftray.pause import pause as pause
    from ftray.preprocess import preprocess as preprocess
    from ftray.report import report as report
    from ftray.reports.result import SearchResult as SearchResult
    from ftray.reports.result import TrainResult as TrainResult
    from ftray.serve import serve as serve
    from ftray.status import status as status
    from ftray.stop import stop as stop
    from ftray.train import train as train
    from ftray.tune import plan as plan
    from ftray.tune import tune as tune
    from ftray.ui import ui as ui

# each is a command, and a function in the module of its name
COMMANDS = (
    *("preprocess", "train", "tune", "status", "stop", "pause", "add", "clone"),
    *("evaluate", "report", "ui", "infer", "merge", "export", "serve"),
)
# further name -> where it is
NAMES = {
    "plan": "ftray.tune",
    "RunFailed": "ftray.errors",
    "UserError": "ftray.errors",
    "SearchResult": "ftray.reports.result",
    "TrainResult": "ftray.reports.result",
}

__all__ = ["__version__", *COMMANDS, *NAMES]


def __getattr__(name: str) -> object:
    """Import a function or class when it is first asked for: `import ftray` itself stays fast."""
    if name not in COMMANDS and name not in NAMES:
        raise AttributeError(f"module 'ftray' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(NAMES.get(name, f"ftray.{name}")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package: `ftray.tune` is the function, whether or not the module of that name has been imported.

    Python binds a submodule in its package once it is imported; a command's name here is that of its function.
    https://docs.python.org/3/reference/datamodel.html#customizing-module-attribute-access
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in COMMANDS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __reduce__(self) -> tuple[object, ...]:
        """By name, as pickle and cloudpickle take other modules: a user's function may mention `ftray`."""
        return importlib.import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Package
