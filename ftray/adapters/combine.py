"""Several adapters of one method into one, by PEFT's `add_weighted_adapter`.

https://huggingface.co/docs/peft/developer_guides/model_merging: TIES (arXiv 2306.01708), DARE (2311.03099).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftray.adapters.discovery import adapter_config, refuse_settings
from ftray.config import Config
from ftray.errors import UserError
from ftray.task_spec import TaskSpec

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

COMBINED = "combined"
LEFT_OUT = ("use_dora", "lora_bias", "bias", "modules_to_save", "trainable_token_indices")  # settings of an adapter
NEED_DENSITY = ("ties", "dare", "magnitude_prune")


def check_combination(cfg: Config, base: str, adapters: list[Path], task: TaskSpec) -> None:
    """Find out whether PEFT can combine the adapters, on an architecture without weights.

    Raises:
        UserError: it can't; the message says why.
    """
    import torch

    from ftray.models.load import load_skeleton

    asked, configs = cfg.merge, [adapter_config(adapter) for adapter in adapters]
    methods = [config.peft_type.value for config in configs]
    if asked.weights and len(asked.weights) != len(adapters):
        raise UserError(f"merge.weights: {len(asked.weights)} for {len(adapters)} adapters: give one an adapter")
    if len(set(methods)) > 1:
        raise UserError(f"merge: PEFT combines adapters of one method only, these are {' and '.join(methods)}")
    if methods[0] not in ("LORA", "IA3"):
        raise UserError(f"merge: PEFT combines adapters of LORA or IA3, not of {methods[0]}")
    if methods[0] == "IA3" and asked.combination != "linear":
        raise UserError(f"merge.combination {asked.combination}: PEFT combines IA3 adapters by linear only")
    for adapter, config in zip(adapters, configs, strict=True):
        for setting in LEFT_OUT:
            if getattr(config, setting, None) not in (None, False, "none", []):
                raise UserError(f"adapter {adapter}: PEFT's combination would leave out what {setting} has learnt")
    if asked.combination.startswith(NEED_DENSITY) and asked.density is None:
        raise UserError(f"merge.combination {asked.combination}: needs --density, the share of values to keep")
    if asked.rank and "svd" not in asked.combination:
        raise UserError(f"merge.rank: only svd combinations choose a rank, {asked.combination} doesn't")
    try:
        with torch.device("meta"):
            _combined(cfg, load_skeleton(cfg.model, base, task).model, adapters)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"merge.combination {asked.combination}: {str(error).strip().splitlines()[0]}") from None


def combine(cfg: Config, base: str, adapters: list[Path], task: TaskSpec, output: Path) -> Path:
    """Write the combination of the adapters as a PEFT directory below `output`; returns where."""
    from ftray.models.load import load_base

    full = cfg.model.model_copy(update={"quantization": "none", "dtype": "fp32"})
    model = _combined(cfg, load_base(full, base, task).model, adapters)
    model.save_pretrained(str(output), selected_adapters=[COMBINED])
    task.save(output / COMBINED)
    return output / COMBINED


def _combined(cfg: Config, base: "PreTrainedModel", adapters: list[Path]) -> "PeftModel":
    import torch
    from peft import PeftModel

    names = [f"adapter-{i}" for i in range(len(adapters))]
    with refuse_settings(adapters[0]):
        model = PeftModel.from_pretrained(base, str(adapters[0]), adapter_name=names[0])
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        with refuse_settings(adapter):
            model.load_adapter(str(adapter), adapter_name=name)
    layers = [_name_layers(model, name) for name in names]
    weights = cfg.merge.weights or [1 / len(adapters)] * len(adapters)
    settings: dict[str, Any] = {"adapters": names, "weights": weights, "adapter_name": COMBINED}
    first = model.peft_config[names[0]]
    if first.peft_type.value == "LORA":
        # each adapter's own scaling is applied already; PEFT means the result to have a scaling of one, by alpha = rank
        first.use_rslora = False
        if "svd" not in cfg.merge.combination and cfg.merge.combination != "cat":
            _refuse_other_ranks(layers, names)
        settings |= {
            "combination_type": cfg.merge.combination,
            "density": cfg.merge.density,
            "svd_rank": cfg.merge.rank,
            "svd_full_matrices": False,
        }
    elif unlike := {path for own in layers for path in own if any(path not in other for other in layers)}:
        raise ValueError(f"only some of the adapters change {min(unlike)}, and PEFT would add up only their factors")
    torch.manual_seed(cfg.merge.seed)
    model.add_weighted_adapter(**settings)
    if first.peft_type.value == "LORA":
        _fill_ranks(model)
    return model


def _name_layers(model: "PeftModel", name: str) -> dict[str, Any]:
    """The layers that adapter `name` changes, by path; from now on its configuration names each of them.

    PEFT gives the combination the targets of all adapters, but other choices of layers (`layers_to_transform`,
    `exclude_modules`) as the first adapter has them.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    config, modules = model.peft_config[name], model.get_base_model().named_modules()
    layers = {
        path: layer
        for path, layer in modules
        if isinstance(layer, BaseTunerLayer) and any(name in getattr(layer, part) for part in layer.adapter_layer_names)
    }
    config.target_modules, config.exclude_modules = set(layers), None
    if config.peft_type.value == "LORA":
        config.layers_to_transform = config.layers_pattern = None
    else:
        config.feedforward_modules = {path for path, layer in layers.items() if layer.is_feedforward}
    return layers


def _refuse_other_ranks(layers: list[dict[str, Any]], names: list[str]) -> None:
    for path in sorted({path for own in layers for path in own}):
        ranks = {own[path].r[name] for own, name in zip(layers, names, strict=True) if path in own}
        if len(ranks) > 1:
            shown = " and ".join(str(rank) for rank in sorted(ranks))
            raise ValueError(f"{path} has rank {shown}, and it needs the same one: take cat, or one that ends in svd")


def _fill_ranks(model: "PeftModel") -> None:
    """Fill the factors of the combination with zeros up to the one rank that its configuration names.

    PEFT leaves them as wide as those of the adapters, which `rank_pattern` and small layers may make narrower.
    """
    from torch.nn.functional import pad

    rank = model.peft_config[COMBINED].r
    for layer in model.get_base_model().modules():
        for a, b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            factors = [getattr(layer, part, {}) for part in (a, b)]
            if COMBINED not in factors[0]:
                continue
            down, up = (getattr(f[COMBINED], "weight", f[COMBINED]) for f in factors)
            down.data = pad(down.data, (0, 0, 0, rank - down.shape[0]))
            up.data = pad(up.data, (0, rank - up.shape[1]))
