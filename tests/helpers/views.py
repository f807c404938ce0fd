"""A configuration that fails where a command reads a field that its command line would refuse."""

from functools import lru_cache

from pydantic import BaseModel

from ftray.cli import reads
from ftray.config import Config

INFERRED = ("search.metric", "search.direction", "search.best")  # which `infer_task` completes for whatever command


def guarded(command: str, cfg: Config) -> Config:
    """`cfg` and its sections, each read of which is held against what `command` declares; copies are guarded too.

    What the command itself puts into a copy is its own.
    """
    for name in Config.model_fields:
        value = cfg.__dict__[name]
        if isinstance(value, BaseModel):
            object.__setattr__(value, "__class__", _guard(command, type(value), f"{name}."))
    object.__setattr__(cfg, "__class__", _guard(command, Config, ""))
    return cfg


@lru_cache
def _guard(command: str, kind: type[BaseModel], prefix: str, free: frozenset[str] = frozenset()) -> type[BaseModel]:
    fields = kind.model_fields.items()
    own = {name for name, field in fields if prefix or not hasattr(field.annotation, "model_fields")} - free

    def read(self, name):
        if name in own and f"{prefix}{name}" not in INFERRED and not reads(command, f"{prefix}{name}"):
            raise AssertionError(f"ftray {command} reads {prefix}{name}, which COMMANDS does not say")
        return kind.__getattribute__(self, name)

    def copied(self, *, update=None, deep=False):
        made = kind.model_copy(self, update=update, deep=deep)
        object.__setattr__(made, "__class__", _guard(command, kind, prefix, free | frozenset(update or ())))
        return made

    def as_plain(self, protocol):
        """Other processes, which may not see this module, get what the user would."""
        return object.__new__, (kind,), self.__getstate__()

    inside = {"__getattribute__": read, "model_copy": copied, "__reduce_ex__": as_plain, "__module__": __name__}
    return type(kind.__name__, (kind,), inside)
