"""Several adapters of one method into one, by PEFT's `add_weighted_adapter`.

https://huggingface.co/docs/peft/developer_guides/model_merging: TIES (arXiv 2306.01708), DARE (2311.03099).
"""

from pathlib import Path
from typing import Any

from ftray.adapters.discovery import adapter_config
from ftray.config import Config
from ftray.errors import UserError
from ftray.task_spec import TaskSpec

COMBINED = "combined"
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
        for setting in ("use_dora", "lora_bias"):
            if getattr(config, setting, False):
                raise UserError(f"adapter {adapter}: PEFT's combination would leave out what {setting} has learnt")
    if asked.combination.startswith(NEED_DENSITY) and asked.density is None:
        raise UserError(f"merge.combination {asked.combination}: needs --density, the share of values to keep")
    if asked.rank and "svd" not in asked.combination:
        raise UserError(f"merge.rank: only svd combinations choose a rank, {asked.combination} doesn't")
    try:
        with torch.device("meta"):
            _combined(cfg, load_skeleton(cfg.model, base, task), adapters)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"merge.combination {asked.combination}: {str(error).strip().splitlines()[0]}") from None


def combine(cfg: Config, base: str, adapters: list[Path], task: TaskSpec, output: Path) -> Path:
    """Write the combination of the adapters as a PEFT directory below `output`; returns where."""
    from ftray.models.load import load_base

    full = cfg.model.model_copy(update={"quantization": "none", "dtype": "fp32"})
    model = _combined(cfg, load_base(full, base, task), adapters)
    model.save_pretrained(str(output), selected_adapters=[COMBINED])
    task.save(output / COMBINED)
    return output / COMBINED


def _combined(cfg: Config, base: Any, adapters: list[Path]) -> Any:
    import torch
    from peft import PeftModel

    names = [f"adapter-{i}" for i in range(len(adapters))]
    model = PeftModel.from_pretrained(base, str(adapters[0]), adapter_name=names[0])
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(str(adapter), adapter_name=name)
    weights = cfg.merge.weights or [1 / len(adapters)] * len(adapters)
    settings: dict[str, Any] = {"adapters": names, "weights": weights, "adapter_name": COMBINED}
    first = model.peft_config[names[0]]
    if first.peft_type.value == "LORA":
        # each adapter's own scaling is applied already; PEFT means the result to have a scaling of one, by alpha = rank
        first.use_rslora = False
        settings |= {
            "combination_type": cfg.merge.combination,
            "density": cfg.merge.density,
            "svd_rank": cfg.merge.rank,
            "svd_full_matrices": False,
        }
    torch.manual_seed(cfg.merge.seed)
    model.add_weighted_adapter(**settings)
    return model
