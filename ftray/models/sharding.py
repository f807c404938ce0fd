"""The weights of a frozen base, shared out over workers: each holds a part of every layer, and gathers the whole of a
layer while it computes with it.

PyTorch's FSDP2 (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html) holds and gathers them. When to
gather is decided here, by hooks that copies of a model's structure take along: FSDP2 knows one model, a pack runs many
over the same weights. All workers must run the same layers in the same order; the next layer is on its way while one
computes.
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
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, UnshardHandle, fully_shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ftray.compat.torch import after_backward, out_of_memory, storage_key
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


class _OutOfMemoryElsewhere(torch.OutOfMemoryError):
    """Another worker ran out of memory in the pass that this one takes part in."""


class _Passes:
    """What the groups of one base know of the pass that is under way, the same on all ranks.

    Attributes:
        groups: all of them.
        under_way: whether :func:`one_pass` is.
        following: by group, and whether for its backward pass: the one that was gathered after it, the last time.
        latest: the last one of this pass, as a key of `following`.
        flags: process group of CPUs, by which ranks say that they can go on; None: there is one rank.
    """

    def __init__(self) -> None:
        self.groups: list[_Group] = []
        self.under_way = False
        self.following: dict[tuple[_Group, bool], _Group] = {}
        self.latest: tuple[_Group, bool] | None = None
        self.flags = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None

    def agree(self, fine: bool) -> None:
        """Learn whether all ranks can go on with the pass; each makes the call before it waits for others.

        Raises:
            torch.OutOfMemoryError: this one can, another can't.
        """
        if self.flags is None:
            return
        least = torch.tensor([float(fine)])
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self.flags)
        if fine and not least:
            raise _OutOfMemoryElsewhere("another worker, which holds a part of the base, ran out of memory")

    def next_after(self, group: "_Group") -> "_Group | None":
        """Note that `group` is gathered now; returns what is likely to be gathered after it."""
        key = group, group.in_backward
        if self.latest:
            self.following[self.latest] = group
        self.latest = key
        found = self.following.get(key)
        return None if found in (None, group) or found.here or found.coming else found


class _Group(nn.Module):
    """The leaves of a unit, sharded.

    Attributes:
        users: calls that need the whole weights now.
        in_backward: whether the backward pass through a caller is under way.
        here: whether the weights are whole.
        coming: of weights that were asked for ahead.
        size: bytes of the whole weights.
        storages: keys of the memory that the whole weights come to lie in.
        packed: by leaf whose weight bitsandbytes has packed into 4 bits, that weight as it knows it: FSDP2 gathers the
            same memory as a plain parameter. None: it has not been gathered yet.
    """

    def __init__(self, leaves: list[nn.Module], passes: _Passes, device: torch.device):
        super().__init__()
        self.leaves, self.passes, self.device = nn.ModuleList(leaves), passes, device
        self.users, self.in_backward, self.here = 0, False, False
        self.coming: UnshardHandle | None = None
        self.size = sum(p.numel() * p.itemsize for p in self.leaves.parameters())
        self.storages: set[int] = set()
        self.packed: dict[Any, nn.Parameter | None] = {
            leaf: None for leaf in leaves if hasattr(leaf.weight, "quant_state")
        }

    def gather(self) -> None:
        if self.here:
            return
        following = None
        if self.passes.under_way:
            following = self.passes.next_after(self)
            if self.passes.flags is not None:
                self._take_room(following)
            self.passes.agree(True)
        if self.coming:
            self.coming.wait()
        else:
            self.unshard()  # type: ignore[operator]  # FSDP2 adds it to the class
        self.here, self.coming = True, None
        for leaf, weight in self.packed.items():
            self.packed[leaf] = leaf.weight = weight if weight is not None else _as_packed(leaf)
        self.storages = self.storages or {storage_key(p) for p in self.leaves.parameters()}
        if following:
            following.coming = following.unshard(async_op=True)  # type: ignore[operator]

    def _take_room(self, following: "_Group | None") -> None:
        """Take, and give back, the memory that gathering needs: if it is not there, others don't wait in vain."""
        sizes = [self.size, 0 if self.coming else self.size, following.size if following else 0]
        taken = [torch.empty(size, dtype=torch.uint8, device=self.device) for size in sizes]
        del taken

    def acquire(self) -> None:
        self.users += 1
        self.gather()

    def release(self) -> None:
        self.users -= 1
        self._free()

    def begin_backward(self) -> None:
        """The backward pass reaches what a caller returned."""
        if not self.in_backward:
            self.in_backward = True
            self.gather()
            after_backward(self.end_backward)

    def end_backward(self) -> None:
        """It has passed what a caller was given; or, where that takes no gradient, it ends."""
        if self.in_backward:
            self.in_backward = False
            self._free()

    def drop(self) -> None:
        """Free the weights, whoever asked for them."""
        self.users, self.in_backward = 0, False
        if self.coming:
            self.coming.wait()
        if self.coming or self.here:
            self.coming = None
            self._free()

    def _free(self) -> None:
        if not self.users and not self.in_backward:
            self.here = False
            self.reshard()  # type: ignore[operator]

    def serve(self, caller: nn.Module) -> None:
        """Gather the weights for each forward and backward pass of `caller`, and of its copies."""

        # functions, which a copy of a module's structure shares; bound methods would be copied
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.acquire()
            given = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
            if given is not None and given.requires_grad and torch.is_grad_enabled():
                given.register_hook(lambda gradient: self.end_backward())

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
            for tensor in output if isinstance(output, tuple) else (output,):
                if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
                    # not of the tensor: there hooks of whom it is given to come later, whose weights are to go first
                    tensor.grad_fn.register_prehook(lambda gradients: self.begin_backward())
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
    mesh, passes = init_device_mesh(device.type, (dist.get_world_size(),)), _Passes()
    found = units(model, new_modules)
    leaves = {leaf for unit in found for leaf in unit.leaves}
    for part in model.modules():
        if part not in leaves:
            prepare(part)
    for unit in found:
        for leaf in unit.leaves:
            prepare(leaf)
        group = _Group(unit.leaves, passes, device)
        passes.groups.append(group)
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


@contextmanager
def one_pass(model: nn.Module) -> Iterator[None]:
    """Inside, all ranks make the same pass of the sharded `model`. Memory that runs out on one runs out on all.

    Raises:
        torch.OutOfMemoryError: it ran out on another rank.
        RuntimeError: it ran out here, see :func:`ftray.compat.torch.out_of_memory`.
    """
    passes = _groups[sharded_leaves(model)[0]].passes
    passes.under_way, passes.latest = True, None
    try:
        yield
        passes.agree(True)
    except RuntimeError as error:
        if out_of_memory(error) and not isinstance(error, _OutOfMemoryElsewhere):
            passes.agree(False)
        for group in passes.groups:
            group.drop()
        raise
    finally:
        passes.under_way = False
        for group in passes.groups:
            if group.coming:  # it took another way than the last time
                group.drop()
