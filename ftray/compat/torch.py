"""Private names of PyTorch; seen in PyTorch 2.13.0.

Operations on lists of tensors run in a few kernels on a GPU, however many tensors there are, and have no public name.
"""

from collections.abc import Callable

import torch


def add(first: list[torch.Tensor], second: list[torch.Tensor]) -> list[torch.Tensor]:
    """The sums of pairs."""
    return list(torch._foreach_add(first, second))


def copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Fill each target with its source."""
    torch._foreach_copy_(targets, sources)


def storage_key(tensor: torch.Tensor) -> int:
    """The same for all tensors that share memory; `data_ptr`, the public one, is 0 for all on the meta device."""
    return int(tensor.untyped_storage()._cdata)


def can_pack_weights() -> bool:
    """Whether products by a packed bfloat16 weight are to be had here; torch.compile makes the same ones."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed_weight(weight: torch.Tensor) -> torch.Tensor:
    """A copy of a linear layer's weight [out, in] in the layout by which oneDNN multiplies."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    return packed


def packed_product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What `torch.nn.functional.linear` gives, of a packed weight; without a gradient."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


def after_backward(function: Callable[[], None]) -> None:
    """Call `function` at the end of the backward pass that is under way; public hooks are those of single tensors."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU, or this machine, ran out of memory: for the latter PyTorch has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
