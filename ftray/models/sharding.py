"""The weights of a frozen base, shared out over workers: each holds a part of every layer, and gathers the whole of a
layer while it computes with it.

PyTorch's FSDP2 (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html) holds and gathers them. When to
gather is decided here, by hooks that copies of a model's structure take along: FSDP2 knows one model, a pack runs many
over the same weights. All workers must run the same layers in the same order.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ftray.compat.torch import after_backward, storage_key
from ftray.errors import UserError


@dataclass(frozen=True)
class Unit:
    """Weights that are gathered together.

    Attributes:
        leaves: the modules that hold them.
        callers: the modules in whose forward they are needed.
        is_layer: whether they are those of a layer of the model, not of what lies before or after the layers.
    """

    leaves: list[nn.Module]
    callers: list[nn.Module]
    is_layer: bool


class _Group(nn.Module):
    """The leaves of a unit, sharded.

    Attributes:
        users: calls that need the whole weights now.
        in_backward: whether the backward pass through a caller is under way.
        storages: keys of the memory that the whole weights come to lie in.
        packed: by leaf whose weight bitsandbytes has packed into 4 bits, that weight as it knows it: FSDP2 gathers the
            same memory as a plain parameter. None: it has not been gathered yet.
    """

    def __init__(self, leaves: list[nn.Module]):
        super().__init__()
        self.leaves = nn.ModuleList(leaves)
        self.users, self.in_backward = 0, False
        self.storages: set[int] = set()
        self.packed: dict[Any, nn.Parameter | None] = {
            leaf: None for leaf in leaves if hasattr(leaf.weight, "quant_state")
        }

    def gather(self) -> None:
        self.unshard()  # type: ignore[operator]  # FSDP2 adds it to the class
        for leaf, weight in self.packed.items():
            self.packed[leaf] = leaf.weight = weight if weight is not None else _as_packed(leaf)
        self.storages = self.storages or {storage_key(p) for p in self.leaves.parameters()}

    def acquire(self) -> None:
        self.users += 1
        self.gather()

    def release(self) -> None:
        self.users -= 1
        self._free()

    def begin_backward(self, gradient: torch.Tensor) -> None:
        """A hook of what a caller returned."""
        if not self.in_backward:
            self.in_backward = True
            self.gather()
            after_backward(self.end_backward)

    def end_backward(self, gradient: torch.Tensor | None = None) -> None:
        """A hook of what a caller was given; or, where that takes no gradient, the end of the backward pass."""
        if self.in_backward:
            self.in_backward = False
            self._free()

    def _free(self) -> None:
        if not self.users and not self.in_backward:
            self.reshard()  # type: ignore[operator]

    def serve(self, caller: nn.Module) -> None:
        """Gather the weights for each forward and backward pass of `caller`, and of its copies."""

        # functions, which a copy of a module's structure shares; bound methods would be copied
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.acquire()
            given = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
            if given is not None and given.requires_grad and torch.is_grad_enabled():
                given.register_hook(lambda gradient: self.end_backward(gradient))

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
            for tensor in output if isinstance(output, tuple) else (output,):
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self.begin_backward(gradient))
            self.release()

        caller.register_forward_pre_hook(before, with_kwargs=True)
        caller.register_forward_hook(after, with_kwargs=True, always_call=True)


def _as_packed(leaf: nn.Module) -> nn.Parameter:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    state, weight = cast("QuantState", leaf.quant_state), cast("torch.Tensor", leaf.weight)

    return Params4bit(
        weight.data,
        quant_state=state,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        bnb_quantized=True,
    )


_groups: WeakKeyDictionary[nn.Module, _Group] = WeakKeyDictionary()  # by leaf


def units(model: PreTrainedModel, new_modules: Sequence[str]) -> list[Unit]:
    """How the weights of `model` are shared out: matrices of layers, of embeddings and of the output layer.

    What is small, such as norms, and the `new_modules`, which trials train, is left whole.

    Raises:
        UserError: it has no layers that can be told apart.
    """
    body = getattr(model, model.base_model_prefix, model)
    new = {part for name in new_modules for part in model.get_submodule(name).modules()}
    head = model.get_output_embeddings()
    shareable = dict.fromkeys(part for part in (*body.modules(), *([head] if head else [])) if part not in new)
    leaves = [part for part in shareable if _is_leaf(part)]
    layers: list[nn.Module] = []
    for part in body.modules():
        if isinstance(part, GradientCheckpointingLayer) and not any(part in set(one.modules()) for one in layers):
            layers.append(part)
    if not layers:
        raise UserError(f"training.shard_base: {type(model).__name__} has no layers that it could be shared out by")
    homes: dict[nn.Module, list[nn.Module]] = {leaf: [] for leaf in leaves}
    for layer in layers:
        for part in layer.modules():
            if part in homes:
                homes[part].append(layer)
    holders: dict[nn.Parameter, list[nn.Module]] = {}
    for leaf in leaves:
        for parameter in leaf.parameters():
            holders.setdefault(parameter, []).append(leaf)
    own = {  # leaves of one layer, all of whose weights are its own
        leaf: at[0]
        for leaf, at in homes.items()
        if len(at) == 1 and all(homes[other] == at for p in leaf.parameters() for other in holders[p])
    }
    found = [Unit([leaf for leaf in leaves if own.get(leaf) is layer], [layer], True) for layer in layers]
    placed: set[nn.Module] = set()
    for leaf in leaves:
        if leaf not in own and leaf not in placed:
            tied = list(dict.fromkeys([leaf, *(other for p in leaf.parameters() for other in holders[p])]))
            placed.update(tied)
            found.append(Unit(tied, tied, False))
    return [unit for unit in found if unit.leaves]


def _is_leaf(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return any(p.ndim > 1 for p in own) and all(p.ndim for p in own) and len(list(module.parameters())) == len(own)


def shard(
    model: PreTrainedModel,
    new_modules: Sequence[str],
    device: torch.device,
    offload: bool,
    prepare: Callable[[nn.Module], None],
) -> None:
    """Share the weights of the frozen `model` out over all ranks; each calls it with the same model.

    Args:
        new_modules: see :class:`ftray.models.load.LoadedModel`.
        device: where it computes.
        offload: keep the parts of the layers in CPU memory, and copy them to the device for each use.
        prepare: called with each module before its own weights are shared out: puts them on the device as they are to
            be.

    Raises:
        UserError: as :func:`units`.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    found = units(model, new_modules)
    leaves = {leaf for unit in found for leaf in unit.leaves}
    for part in model.modules():
        if part not in leaves:
            prepare(part)
    for unit in found:
        for leaf in unit.leaves:
            prepare(leaf)
        group = _Group(unit.leaves)
        policy = CPUOffloadPolicy() if offload and unit.is_layer else OffloadPolicy()
        fully_shard(group, mesh=mesh, offload_policy=policy)
        for leaf in unit.leaves:
            _groups[leaf] = group
        for caller in unit.callers:
            group.serve(caller)


def is_sharded(model: nn.Module) -> bool:
    """Whether weights of `model` are shared out."""
    return any(module in _groups for module in model.modules())


def sharded_leaves(model: nn.Module) -> list[nn.Module]:
    """The modules whose weights are shared out: copies of the structure have these very modules."""
    return [module for module in model.modules() if module in _groups]


def gathered_storages(model: nn.Module) -> set[int]:
    """Keys of the memory that gathered weights of `model` lie in, see :func:`ftray.compat.torch.storage_key`."""
    return {key for leaf in sharded_leaves(model) for key in _groups[leaf].storages}


@contextmanager
def whole(*modules: nn.Module) -> Iterator[None]:
    """Inside, the weights of `modules` are whole, if they are shared out at all; every rank makes the same call."""
    with ExitStack() as stack:
        for group in dict.fromkeys(_groups[m] for m in modules if m in _groups):
            group.acquire()
            stack.callback(group.release)
        yield
