"""What bounds `benchmarks.pack`: its step beside nothing but the base model's own matrix products for the same tokens.

    python -m benchmarks.floor [--quick]

Any trainer of adapters over a frozen base multiplies each token by each weight once forward and once back (the head at
the positions that bear loss). The ratio is the share of a step that these products alone take.
"""

from typing import Any

import torch
from torch import nn

from benchmarks.measure import compare
from benchmarks.pack import TOKENS, arguments, load
from benchmarks.pack import ours as ours
from benchmarks.side import Timed


def products(base: Any, tokens: int, supervised: int) -> Any:
    """A function that makes the products, on random activations of the base's precision."""
    head = base.get_output_embeddings()
    work = []
    for module in base.modules():
        if isinstance(module, nn.Linear):
            rows = supervised if module is head else tokens
            weight = module.weight
            work.append((weight, weight.new_empty(rows, weight.shape[1]).normal_()))

    @torch.no_grad()
    def run() -> None:
        for weight, x in work:
            y = x @ weight.T
            y @ weight

    return run


def peer(trials: int, size: str, dtype: str) -> Timed:
    """The products for the tokens of a step."""
    tokens = trials * TOKENS
    return Timed(products(load(size, dtype), tokens, tokens // 2))


def main() -> None:
    args = arguments("floor", __doc__)
    tokens = args.trials * TOKENS
    print(f"{args.trials} adapters, {tokens} tokens; the peer is the base's matrix products alone")
    given = {"trials": args.trials, "size": args.size, "dtype": args.dtype}
    compare("floor", given, tokens, "tokens/s", 3 if args.quick else 7, args.busy, alike=True)


if __name__ == "__main__":
    main()
