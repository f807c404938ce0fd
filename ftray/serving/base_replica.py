"""What replicas of every task have: one base model, its tokenizer, and adapters loaded on demand."""

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from ray import serve

from ftray.config import Config
from ftray.errors import UserError
from ftray.runtime.threads import own_torch_threads
from ftray.task_spec import CAUSAL, TaskSpec

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass
class LoadedAdapter:
    """An adapter in memory; Serve calls `__del__` when it is the least recently used of too many.

    Attributes:
        model: the replica's handle of it: a model, or its name in the engine; None: dropped.
        forget: is called with `model` when it is dropped.
    """

    model: "PeftModel | str | None"
    forget: Callable[[Any], None]

    def drop(self) -> None:
        """Free what it holds; answers under way are finished."""
        if self.model is not None:
            model, self.model = self.model, None
            self.forget(model)

    __del__ = drop


def give_memory_back() -> None:
    """Return the memory that the C library keeps free to the system: after a load, more than an adapter's; takes ms."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim:
        trim(0)


class BaseReplica(ABC):
    """What the deployments have in common; adapters are Serve's multiplexed models.

    Args:
        settings: the configuration, as plain data.
        model_path: of the base model.
        task: what the models are for.
    """

    def __init__(self, settings: dict[str, Any], model_path: str, task: TaskSpec = CAUSAL):
        from ftray.models.load import load_on_device, load_tokenizer

        self.cfg = Config.model_validate(settings)
        own_torch_threads(1)
        self._loader = ThreadPoolExecutor(1, "loader", own_torch_threads, (1,))
        loaded = load_on_device(self.cfg.model, model_path, task)
        self.base, self.new_modules = loaded.model.eval(), loaded.new_modules
        self.tokenizer = load_tokenizer(model_path, self.cfg.model.trust_remote_code)
        self._sources: dict[str, str] = {}
        self._kept: WeakValueDictionary[str, LoadedAdapter] = WeakValueDictionary()

        async def load(adapter: str) -> LoadedAdapter:
            self._kept[adapter] = loaded = await self._load(self._sources[adapter])
            give_memory_back()
            return loaded

        self._multiplexed = serve.multiplexed(load, max_num_models_per_replica=self.cfg.serving.max_adapters)

    @abstractmethod
    async def _load(self, source: str) -> LoadedAdapter:
        """Load the adapter in `source`.

        Raises:
            UserError: it can't be.
        """

    async def ready(self) -> bool:
        """True: Serve calls nothing of a replica whose model is still being loaded."""
        return True

    async def loaded(self, adapter: str, source: str | None) -> "PeftModel | str":
        """The replica's handle of an adapter (:attr:`LoadedAdapter.model`), which is loaded unless it is in memory.

        Raises:
            UserError: it can't be loaded, or it was dropped.
        """
        self._sources[adapter] = source or ""
        model = (await self._multiplexed(adapter)).model
        if model is None:
            raise UserError("the adapter was removed")
        return model

    async def load(self, adapter: str, source: str) -> str | None:
        """Load an adapter; returns why it can't be."""
        try:
            await self.loaded(adapter, source)
        except (UserError, OSError) as error:  # the system refuses some paths, as those that are too long
            return str(error)
        return None

    async def drop(self, adapter: str) -> bool:
        """Free what an adapter holds; its id is not used again. Returns whether it was loaded."""
        loaded = self._kept.pop(adapter, None)
        if loaded is None or loaded.model is None:
            return False
        loaded.drop()
        return True
