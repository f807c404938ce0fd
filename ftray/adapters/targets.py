"""Which modules an adapter goes to: names, a regular expression, or groups read off the model itself."""

import re
from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from ftray.errors import UserError, near

QUERY_VALUE = re.compile(r"q|v|query|value|[qv]_(proj|lin)|c_attn|qkv(_proj)?|Wqkv|query_key_value|in_proj|wq|wv")
KEY_VALUE = re.compile(r"k|v|key|value|[kv]_(proj|lin)|c_attn|qkv(_proj)?|Wqkv|query_key_value|in_proj|wk|wv")
GROUPS = {
    "attention": "every projection of the attention",
    "attention-qv": "query and value projections (a fused projection counts as both)",
    "attention-kv": "key and value projections (a fused projection counts as both)",
    "mlp": "every linear layer of the feed-forward blocks",
    "mlp-down": "the feed-forward layer that projects back to the hidden size",
    "all-linear": "every linear layer of the blocks; never the head",
    "norms": "every normalisation layer",
}


def resolve_targets(model: nn.Module, spec: str | Iterable[str], blocks: Iterable[int] | None = None) -> list[str]:
    """Names that PEFT's `target_modules` matches to just the modules meant by `spec`.

    Args:
        model: the base model; the meta device will do.
        spec: groups (see `GROUPS`) and module names, or one regular expression for whole module names.
        blocks: numbers of the blocks whose layers are meant; None: all.

    Raises:
        UserError: a part of `spec` matches no linear or normalisation layer of the model, or there is no such block.
    """
    norms = [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    groups = _groups(model, linears) | {"norms": norms}
    linears += norms
    selected: set[str] = set()
    for part in [spec] if isinstance(spec, str) else spec:
        found = groups.get(part) or _matching(part, linears)
        if not found:
            leaves = sorted({name.rsplit(".", 1)[-1] for name in linears})
            hint = near(part, [*GROUPS, *leaves], otherwise=f"groups: {', '.join(GROUPS)}", most=3)
            raise UserError(
                f"target_modules: {part!r} matches no linear layer{hint} (layers: {', '.join(leaves[:12])})"
            )
        selected.update(found)
    for block in blocks or ():
        if not any(f".{block}." in name for name in selected):
            raise UserError(f"layers_to_transform: none of the target modules is in a block {block}")
    if blocks is not None:
        selected = {name for name in selected if any(f".{block}." in name for block in blocks)}
    return _short_names(selected, linears)


def _matching(part: str, linears: list[str]) -> list[str]:
    named = [name for name in linears if name == part or name.endswith(f".{part}")]
    if named:
        return named
    try:
        return [name for name in linears if re.fullmatch(part, name)]
    except re.error:
        return []


def _groups(model: nn.Module, linears: list[str]) -> dict[str, list[str]]:
    modules = dict(model.named_modules())
    # blocks are numbered (nn.ModuleList); a linear layer outside of them is a head or an embedding projection
    inside = [name for name in linears if re.search(r"\.\d+\.", name)]

    def in_attention(name: str) -> bool:
        parents = name.split(".")[:-1]
        owners = (modules[".".join(parents[: i + 1])] for i in range(len(parents)))
        return any("attention" in type(owner).__name__.lower() for owner in owners)

    attention = [name for name in inside if in_attention(name)]
    mlp = [name for name in inside if name not in set(attention)]
    down = {}
    for name in mlp:  # the last feed-forward layer of each numbered block
        down[re.match(r".*\.\d+\.", name).group()] = name  # type: ignore[union-attr]
    return {
        "attention": attention,
        "attention-qv": [name for name in attention if QUERY_VALUE.fullmatch(name.rsplit(".", 1)[-1])],
        "attention-kv": [name for name in attention if KEY_VALUE.fullmatch(name.rsplit(".", 1)[-1])],
        "mlp": mlp,
        "mlp-down": list(down.values()),
        "all-linear": inside,
    }


def _short_names(selected: set[str], linears: list[str]) -> list[str]:
    """The shortest suffixes without layer numbers that match the selected modules alone, else whole names."""
    names: dict[str, None] = {}
    for module in sorted(selected):
        parts = module.split(".")
        suffix = module
        for depth in range(1, len(parts)):
            if parts[-depth].isdigit():
                break
            candidate = ".".join(parts[-depth:])
            if all(n in selected for n in linears if n == candidate or n.endswith(f".{candidate}")):
                suffix = candidate
                break
        names[suffix] = None
    return list(names)
