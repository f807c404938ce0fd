"""Passes of a pack that run side by side on a CPU: each in a thread of its own, over a replica of the shared model.

Threads that share one product wait for each other at its end, the longer the busier the machine; those that have a pass
each do not, and one computes while another is between two products.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from ftray.models.sharding import is_sharded
from ftray.multi_adapter.attention import Layout
from ftray.multi_adapter.shared_linear import AdapterSegments
from ftray.runtime.threads import own_torch_threads

Result = TypeVar("Result")
REPLICAS = 2  # more would wait for Python's lock


@dataclass
class Replica:
    """One of several copies of the shared model's structure, over the same weights.

    Attributes:
        segments, layout: of the current row; of layouts there is one.
        head: what makes logits of last hidden states, see :func:`ftray.multi_adapter.output_head.output_head`.
    """

    model: PreTrainedModel
    segments: AdapterSegments
    layout: list[Layout]
    head: Any


def replicas_of(base: PreTrainedModel) -> int:
    """How many there may be.

    One where ranks share weights out, and where a pass sets what all threads see: the state of quantised layers, random
    numbers before activations are computed again.
    """
    keeps = getattr(base, "is_quantized", False) or base.is_gradient_checkpointing
    alone = base.device.type != "cpu" or is_sharded(base) or keeps
    return 1 if alone else min(REPLICAS, torch.get_num_threads())


def share_out(sizes: Sequence[int], first: Sequence[int], count: int) -> list[list[int]]:
    """The places of what each of `count` replicas takes, about the same number of tokens.

    Args:
        sizes: tokens of each.
        first: places of those that must go to one replica; are they more than its share, it takes all, and is the only
            one.
    """
    load = sum(sizes[i] for i in first)
    if count == 1 or len(sizes) == 1 or load * count > sum(sizes):
        return [[*range(len(sizes))]]
    parts: list[list[int]] = [[*first], *([] for _ in range(count - 1))]
    loads = [load] + [0] * (count - 1)
    for i in sorted({*range(len(sizes))} - {*first}, key=lambda i: -sizes[i]):
        least = loads.index(min(loads))
        parts[least].append(i)
        loads[least] += sizes[i]
    return parts


def threads_of(count: int) -> ThreadPoolExecutor:
    """A thread for each replica, with its share of torch's threads."""
    return ThreadPoolExecutor(count, "replica", own_torch_threads, (max(1, torch.get_num_threads() // count),))


def side_by_side(
    threads: ThreadPoolExecutor,
    parts: Sequence[Sequence[int]],
    replicas: Sequence[Replica],
    function: Callable[[Sequence[int], Replica], Sequence[Result]],
) -> list[Result]:
    """What `function` gives for each place, in their order: of one part in this thread, of several in `threads`.

    Whatever is raised in one is raised once all are over.
    """
    if len(parts) == 1:
        return [*function(parts[0], replicas[0])]
    gradients = torch.is_grad_enabled()

    def attempt(part: Sequence[int], replica: Replica) -> Sequence[Result]:
        with torch.set_grad_enabled(gradients):  # which every thread has of its own
            return function(part, replica)

    passes = [threads.submit(attempt, *pair) for pair in zip(parts, replicas, strict=True)]
    wait(passes)
    found = dict(zip(chain(*parts), chain(*(each.result() for each in passes)), strict=True))
    return [found[place] for place in sorted(found)]
