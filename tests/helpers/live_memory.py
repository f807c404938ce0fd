"""The most bytes that tensors made during a call hold at one time."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701  # the only way to see each tensor
from torch.utils._pytree import tree_leaves  # noqa: PLC2701

from ftray.compat.torch import storage_key


class _Live(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (key := storage_key(tensor)) not in self.known | given:
                self.known.add(key)
                size = tensor.untyped_storage().nbytes()
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(tensor.untyped_storage(), self.forget, key, size)
        return result

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def most_bytes(call: Callable[[], object]) -> int:
    """Call it; returns the most that the tensors made meanwhile held at one time, whoever made them."""
    with _Live() as live:
        kept = call()
    del kept
    return live.most
