"""What every replica has, whatever its task: one base model, its tokenizer, and adapters that come on demand."""

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from ray import serve

from ftray.config import Config
from ftray.errors import UserError
from ftray.task_spec import CAUSAL, TaskSpec


@dataclass
class LoadedAdapter:
    """An adapter in memory; Serve calls `__del__` when it is the least recently used of too many.

    Attributes:
        model: what answers for it; None: dropped.
        forget: is called with `model` once it is.
    """

    model: Any
    forget: Callable[[Any], None]

    def drop(self) -> None:
        """Free what it holds; who uses it at the moment goes on."""
        if self.model is not None:
            model, self.model = self.model, None
            self.forget(model)

    __del__ = drop


def own_torch_threads(count: int) -> None:
    """How many threads torch computes with where the calling thread asks it to.

    OpenMP keeps a pool for each thread that wants several. With more of them than processors they no longer spin, but
    sleep between two products: only the thread that answers gets any.
    """
    import torch

    torch.set_num_threads(count)
    torch.get_num_threads()  # only now it is this thread's: until then, what another one sets would be


def give_memory_back() -> None:
    """Of what the C library holds free, which after a load is more than an adapter, all that it can; milliseconds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
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
        self.base = load_on_device(self.cfg.model, model_path, task).eval()
        self.tokenizer = load_tokenizer(model_path, self.cfg.model.trust_remote_code)
        self._sources: dict[str, str] = {}
        self._kept: WeakValueDictionary[str, LoadedAdapter] = WeakValueDictionary()

        async def load(adapter: str) -> LoadedAdapter:
            self._kept[adapter] = loaded = await self._load(self._sources[adapter])
            give_memory_back()
            return loaded

        self._loaded = serve.multiplexed(load, max_num_models_per_replica=self.cfg.serving.max_adapters)

    @abstractmethod
    async def _load(self, source: str) -> LoadedAdapter:
        """Load the adapter in `source`.

        Raises:
            UserError: it can't be.
        """

    async def adapted(self, adapter: str, source: str | None) -> Any:
        """What answers for an adapter, loaded if need be.

        Raises:
            UserError: it can't be, or it was dropped.
        """
        self._sources[adapter] = source or ""
        model = (await self._loaded(adapter)).model
        if model is None:
            raise UserError("the adapter was removed")
        return model

    async def load(self, adapter: str, source: str) -> str | None:
        """Load an adapter; returns why it can't be."""
        try:
            await self.adapted(adapter, source)
        except (UserError, OSError) as error:  # not every path is one that the system takes
            return str(error)
        return None

    async def drop(self, adapter: str) -> bool:
        """Free what an adapter holds; nobody asks for it by that id again. Returns whether it was loaded."""
        loaded = self._kept.pop(adapter, None)
        if loaded is None or loaded.model is None:
            return False
        loaded.drop()
        return True
