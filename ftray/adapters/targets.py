"""Which modules an adapter goes to: names, a regular expression, or groups read off the model's structure."""

import re
from collections.abc import Collection, Iterable, Iterator
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ftray.errors import UserError, near

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

FUSED = r"c_attn|qkv(_proj)?|Wqkv|W_pack|query_key_value|in_proj|kv(_b)?_proj"  # kv_b_proj: of DeepSeek's latents
QUERY_VALUE = re.compile(rf"q|v|query|value|[qv]_(proj|lin)|q_b_proj|wq|wv|{FUSED}")
KEY_VALUE = re.compile(rf"k|v|key|value|[kv]_(proj|lin)|wk|wv|{FUSED}")
# by the class of what holds a layer, the innermost first: "MiniMaxLightningAttention" carries a state
MIXER = re.compile(r"mamba|delta|linear_?attention|lightning|shortconv|recurrent|rglru|lstm|ssm", re.I)
ATTENTION = re.compile(r"attention|attn", re.I)
CROSS = re.compile(r"encoder_attn|cross_?attention", re.I)  # of decoders: without an encoder it is passed over
READ_PAST = re.compile(r"dt_proj")  # Mamba multiplies by its weight itself: an adapter's update is never added
ROUTER = re.compile(r"router|gating|topkgate|indexer", re.I)  # an indexer chooses what attention sees
EXPERTS = "experts"
GROUPS = {
    "attention": "every projection of the attention",
    "attention-qv": "query and value projections (a fused projection counts as both)",
    "attention-kv": "key and value projections (a fused projection counts as both)",
    "mixer": "every linear layer of what takes attention's place: state spaces, linear attention, short convolutions",
    "mlp": "every linear layer of the feed-forward blocks; beside experts that are one weight, of what all tokens pass",
    "mlp-down": "the feed-forward layer that projects back to the hidden size",
    EXPERTS: "the weights of all experts of a block at once (lora without dropout)",
    "all-linear": "every linear layer of the blocks; never the head, routers, or experts that are one weight",
    "norms": "every normalisation layer",
}


def resolve_targets(
    model: nn.Module,
    spec: str | Iterable[str],
    blocks: Iterable[int] | None = None,
    unreachable: Collection[str] = (),
    idle: Collection[str] = (),
) -> list[str]:
    """Names that PEFT's `target_modules` matches to just the modules meant by `spec`.

    Args:
        model: the base model; the meta device will do.
        spec: groups (see `GROUPS`) and module names, or one regular expression for whole module names.
        blocks: numbers of the blocks whose layers are meant; None: all.
        unreachable: last parts of names that PEFT takes for something else; groups leave them out.
        idle: whole names of layers that change nothing, see :func:`ftray.models.probe.idle_layers`; so do groups.

    Raises:
        UserError: a part of `spec` matches no linear or normalisation layer of the model, or there is no such block.
    """
    norms = [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    whole = _groups(model)
    whole["norms"] = norms
    there = {group: [n for n in names if _leaf(n) not in unreachable] for group, names in whole.items()}
    groups = {group: [n for n in names if n not in idle] for group, names in there.items()}
    named = linears + norms
    selected: set[str] = set()
    parts = [spec] if isinstance(spec, str) else list(spec)
    for part in parts:
        if part == EXPERTS and expert_parameters(model, parts):
            continue
        found = groups.get(part) or _matching(part, named)
        if not found:
            leaves = sorted({_leaf(name) for name in named})
            if there.get(part):
                raise UserError(
                    f"target_modules: {part!r}: nothing that {type(model).__name__} says depends on such layers: take "
                    "another group"
                )
            if whole.get(part):
                raise UserError(
                    f"target_modules: {part!r}: PEFT takes {', '.join(sorted({_leaf(n) for n in whole[part]}))} of "
                    f"{type(model).__name__} for something else: take another group (layers: {', '.join(leaves[:12])})"
                )
            if part in GROUPS:
                others = ", ".join(g for g, names in groups.items() if names or expert_parameters(model, g))
                raise UserError(f"target_modules: {part!r}: {type(model).__name__} has no such layers; it has {others}")
            hint = near(part, [*GROUPS, *leaves], otherwise=f"groups: {', '.join(GROUPS)}", most=3)
            raise UserError(
                f"target_modules: {part!r} matches no linear layer{hint} (layers: {', '.join(leaves[:12])})"
            )
        selected.update(found)
    for block in blocks or ():
        if not any(f".{block}." in name for name in [*selected, *expert_parameters(model, parts)]):
            raise UserError(f"layers_to_transform: none of the target modules is in a block {block}")
    if blocks is not None:
        selected = {name for name in selected if any(f".{block}." in name for block in blocks)}
    return short_names(model, selected)


def left_out(
    model: nn.Module,
    spec: str | Iterable[str],
    blocks: Iterable[int] | None,
    unreachable: Collection[str],
    idle: Collection[str],
) -> list[str]:
    """What groups in `spec` leave out, in words; the arguments are those of :func:`resolve_targets`."""
    groups, parts = _groups(model), [spec] if isinstance(spec, str) else list(spec)
    asked = {name for part in parts for name in groups.get(part, ())}
    if blocks is not None:
        asked = {name for name in asked if any(f".{block}." in name for block in blocks)}
    found, taken = [], [name for name in asked if _leaf(name) in unreachable]
    if useless := asked & set(idle):
        found.append(f"{len(useless)} layers that the model never uses for this task")
    if taken:
        names = ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in taken}))
        found.append(f"{names}, whose names PEFT takes for something else")
    if {"all-linear", "mlp"} & set(parts) and EXPERTS not in parts and expert_parameters(model, EXPERTS, blocks):
        found.append(f"the weights of experts, which are the group {EXPERTS!r}")
    return found


def expert_parameters(model: nn.Module, spec: str | Iterable[str], blocks: Iterable[int] | None = None) -> list[str]:
    """Names that PEFT's `target_parameters` matches to the weights of experts, if they are among those in `spec`.

    Each such weight is of shape [experts, ...]: that of all experts of a block.
    """
    if EXPERTS not in ([spec] if isinstance(spec, str) else list(spec)):
        return []
    inside = dict(model.named_modules())
    found = {
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3
        and re.search(r"\.\d+\.", name)
        and "expert" in f"{name.rpartition('.')[0]}.{type(inside[name.rpartition('.')[0]]).__name__}".lower()
    }
    if blocks is not None:
        found = {name for name in found if any(f".{block}." in name for block in blocks)}
    return _short_names(found, [name for name, _ in model.named_parameters()])


def asked_for(model: nn.Module, config: "PeftConfig") -> set[str]:
    """The modules and parameters of the base `model` that the names in PEFT's `config` stand for."""
    modules = [name for name, _ in model.named_modules() if name]
    parameters = [name for name, _ in model.named_parameters()]
    found = set()
    for names, there in (("target_modules", modules), ("target_parameters", parameters)):
        given = getattr(config, names, None) or ()
        ends = tuple(f".{name}" for name in given if not isinstance(given, str))
        found |= {name for name in there if f".{name}".endswith(ends)}
    return found


def refuse_others(adapted: "PeftModel", asked: set[str]) -> None:
    """Compare what a new PEFT model has adapted with what was :func:`asked_for`.

    Raises:
        UserError: PEFT took names for others than those in the model.
    """
    if not asked:
        return
    there = set(adapted_names(adapted))
    for names, what in ((asked - there, "does not adapt"), (there - asked, "adapts, which nobody asked for,")):
        if names:
            raise UserError(
                f"target_modules: PEFT {what} {sorted(names)[0]} and {len(names) - 1} more of "
                f"{type(adapted.get_base_model()).__name__}: name other layers"
            )


def refuse_idle(adapted: "PeftModel", idle: Collection[str]) -> None:
    """Refuse a new PEFT model that adapts `idle` layers, see :func:`ftray.models.probe.idle_layers`.

    Raises:
        UserError: it does, as the user has named them.
    """
    there, base = adapted_names(adapted), adapted.get_base_model()
    if useless := sorted(set(there) & set(idle)):
        others = f" and {len(useless) - 1} more" if useless[1:] else ""
        acting = _short_names(
            set(there) - set(idle), [name.replace(".base_layer", "") for name, _ in base.named_modules()]
        )
        advice = f"give --adapter.target_modules '[{', '.join(acting)}]'" if acting else "take another model"
        raise UserError(
            f"target_modules: {type(base).__name__} does not use the output of {useless[0]}{others}: an adapter "
            f"there would change nothing: {advice}"
        )


def refuse_unloadable(adapted: "PeftModel") -> None:
    """Load what would be saved of a new adapter: for models whose checkpoints have other names, PEFT renames layers.

    Raises:
        UserError: some of it would be lost.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    base = adapted.get_base_model()
    if not get_checkpoint_conversion_mapping(base.config.model_type):
        return
    saved = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(adapted).items()}
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    lost = sorted(trained & set(set_peft_model_state_dict(adapted, saved).missing_keys))
    if lost:
        raise UserError(
            f"target_modules: PEFT would not load what it saves of {lost[0]} and {len(lost) - 1} more of "
            f"{type(base).__name__}: name other layers"
        )


def adapted_names(model: "PeftModel") -> dict[str, int]:
    """Each module and parameter of the base that a PEFT model adapts, and how many parameters it trains for it."""
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer):
            own = sum(p.numel() for n, p in layer.named_parameters() if p.requires_grad and "base_layer." not in n)
            path = name.replace(".base_layer", "")  # of several parameters of one module the wrappers are nested
            found[f"{path}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else path] = own
    return found


def described(model: "PeftModel", without: Iterable[str] = ()) -> str:
    """What a PEFT model adapts, in one line: by name pattern, how many layers and trained parameters.

    `without` is what groups leave out, see :func:`left_out`.
    """
    found: dict[str, list[int]] = {}
    for name, count in adapted_names(model).items():
        found.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(count)
    parts = [f"{pattern}: {len(own)} of {sum(own):,} parameters" for pattern, own in sorted(found.items())]
    parts += [f"left out: {what}" for what in without]
    return "; ".join(parts)


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _matching(part: str, linears: list[str]) -> list[str]:
    named = [name for name in linears if name == part or name.endswith(f".{part}")]
    if named:
        return named
    try:
        return [name for name in linears if re.fullmatch(part, name)]
    except re.error:
        return []


def _groups(model: nn.Module) -> dict[str, list[str]]:
    kinds = {name: kind for name, kind in layer_kinds(model) if kind}
    attention = [name for name, kind in kinds.items() if kind == "attention"]
    mlp = [name for name, kind in kinds.items() if kind == "mlp"]
    down = {}
    for name in mlp:  # the last feed-forward layer of each numbered block
        down[re.match(r".*\.\d+\.", name).group()] = name  # type: ignore[union-attr]
    return {
        "attention": attention,
        "attention-qv": [name for name in attention if QUERY_VALUE.fullmatch(_leaf(name))],
        "attention-kv": [name for name in attention if KEY_VALUE.fullmatch(_leaf(name))],
        "mixer": [name for name, kind in kinds.items() if kind == "mixer"],
        "mlp": mlp,
        "mlp-down": list(down.values()),
        EXPERTS: [name for name, kind in kinds.items() if kind == "mlp" and re.search(r"experts?\.\d+\.", name)],
        "all-linear": list(kinds),
    }


def layer_kinds(model: nn.Module) -> Iterator[tuple[str, str | None]]:
    """Each linear layer's name, and whether it belongs to attention, mixer or mlp; None: to none that is adapted.

    Those are routers and gates of experts, whose outputs choose and weigh; heads and embeddings; a decoder's attention
    to an encoder that is not there; and, where a language model is a part of the whole, all other parts.
    """
    modules, language = dict(model.named_modules()), _language_part(model)
    towers = tuple(f"{name}." for name, part in modules.items() if name and _reads_no_text(part))
    alone = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    for name, module in modules.items():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        # blocks are numbered (nn.ModuleList); a linear layer outside of them is a head or an embedding projection
        if not re.search(r"\.\d+\.", name) or not f"{name}.".startswith(language) or name.startswith(towers):
            yield name, None
            continue
        parts = name.split(".")
        owners = [modules[".".join(parts[:i])] for i in range(len(parts) - 1, 0, -1)]
        if alone and CROSS.search(name):
            yield name, None
            continue
        kind = _kind(owners, type(model).__name__)
        other = _routes(module, owners[0]) or _own_product(module)
        yield name, None if other or (kind == "mixer" and READ_PAST.fullmatch(_leaf(name))) else kind


def _kind(owners: list[nn.Module], family: str) -> str:
    for owner in owners:
        kind = type(owner).__name__
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(kind, family, strict=False)))
        kind = kind[shared:]  # RecurrentGemmaMlp does not recur
        if kind.endswith("Layer") and any(child in owners for child in owner.children()):
            continue  # a block may be called after one of its parts
        state = any(isinstance(child, nn.Conv1d) for child in owner.children()) or hasattr(owner, "A_log")
        if MIXER.search(kind) or (state and not ATTENTION.search(kind)):
            return "mixer"
        if ATTENTION.search(kind):
            return "attention"
    return "mlp"


def _routes(linear: nn.Module, owner: nn.Module) -> bool:
    """Whether a layer's outputs weigh experts: as many as there are, or one beside those that all tokens pass."""
    if ROUTER.search(type(linear).__name__) or ROUTER.search(type(owner).__name__):
        return True
    experts = [child for child_name, child in owner.named_children() if "expert" in child_name.lower()]
    counts = {1} if experts else set()
    for child in experts:
        counts |= {len(child)} if isinstance(child, nn.ModuleList | nn.ModuleDict) else set()
        counts |= {p.shape[0] for p in child.parameters(recurse=False) if p.dim() == 3}
    weight: Any = linear.weight
    return weight.shape[1 if isinstance(linear, Conv1D) else 0] in counts


def _own_product(linear: nn.Module) -> bool:
    """Whether a layer multiplies otherwise than `nn.Linear`, as in groups: an adapter's update has another shape."""
    if not type(linear).__module__.startswith("transformers.models."):
        return False
    weight: Any = linear.weight
    try:
        return bool(linear(weight.new_zeros(1, 1, weight.shape[1])).shape != (1, 1, weight.shape[0]))
    except Exception:  # whatever else it makes of one row
        return True


def _reads_no_text(part: nn.Module) -> bool:
    """Whether `part` is a model of images or sound within a larger one."""
    return isinstance(part, PreTrainedModel) and part.main_input_name.startswith(("pixel", "input_features", "input_v"))


def _language_part(model: PreTrainedModel) -> str:
    """The prefix of names of the language model, where it is a part of a model of several kinds of input; else ''."""
    config = getattr(model, "config", None)
    if config is None or config.is_encoder_decoder or config.get_text_config() is config:
        return ""
    decoder = model.get_decoder()
    return next((f"{name}." for name, module in model.named_modules() if name and module is decoder), "")


def short_names(model: nn.Module, selected: set[str]) -> list[str]:
    """The shortest names that PEFT's `target_modules` matches to the `selected` modules of `model` alone."""
    return _short_names(selected, [name for name, _ in model.named_modules()])


def _short_names(selected: set[str], everything: list[str]) -> list[str]:
    """The shortest suffixes without layer numbers that match the selected ones alone, else whole names."""
    taken = {end for name in everything if name not in selected for end in _endings(name)}
    names: dict[str, None] = {}
    for name in sorted(selected):
        numbered = re.match(r"(.*\.)?\d+\.", name)
        least = numbered.end() if numbered else 0
        names[next((end for end in _endings(name[least:]) if end not in taken), name)] = None
    return list(names)


def _endings(name: str) -> list[str]:
    """`c`, `b.c` and `a.b.c` of `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[-depth:]) for depth in range(1, len(parts) + 1)]
