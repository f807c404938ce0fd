"""A configuration that fails where a command reads a field that its command line would refuse."""

from functools import lru_cache

from pydantic import BaseModel

from ftray.cli import reads
from ftray.config import Config

INFERRED = ("search.metric", "search.direction")  # which `infer_task` completes for whatever command


def guarded(command: str, cfg: Config) -> Config:
    """`cfg` and its sections, each read of which is held against what `command` declares; copies are guarded too."""
    for name in Config.model_fields:
        value = cfg.__dict__[name]
        if isinstance(value, BaseModel):
            object.__setattr__(value, "__class__", _guard(command, type(value), f"{name}."))
    object.__setattr__(cfg, "__class__", _guard(command, Config, ""))
    return cfg


@lru_cache
def _guard(command: str, kind: type[BaseModel], prefix: str) -> type[BaseModel]:
    own = {name for name, field in kind.model_fields.items() if prefix or not hasattr(field.annotation, "model_fields")}

    def read(self, name):
        if name in own and f"{prefix}{name}" not in INFERRED and not reads(command, f"{prefix}{name}"):
            raise AssertionError(f"ftray {command} reads {prefix}{name}, which COMMANDS does not say")
        return kind.__getattribute__(self, name)

    def as_plain(self, protocol):
        """Other processes, which may not see this module, get what the user would."""
        return object.__new__, (kind,), self.__getstate__()

    return type(kind.__name__, (kind,), {"__getattribute__": read, "__reduce_ex__": as_plain, "__module__": __name__})
