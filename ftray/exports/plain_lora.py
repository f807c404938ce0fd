"""LoRA as vLLM and mlx-lm hold it: one rank and one scale for all layers, two matrices a layer and nothing else."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import load_peft_weights
from safetensors.torch import save_file
from torch.nn import functional

from ftray.adapters.discovery import CONFIG, adapter_config
from ftray.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig

PREFIX = "base_model.model."
HIGHEST = 512  # rank that vLLM has kernels for
# fields of PEFT's LoraConfig that make of it what two matrices a layer can't hold
EXTRAS = (
    *("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "target_parameters"),
    *("layer_replication", "alora_invocation_tokens", "use_bdlora", "monteclora_config", "use_qalora"),
    *("arrow_config", "kasa_config", "velora_config"),
)
REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change the base's weights


@dataclass(frozen=True)
class PlainLora:
    """An adapter whose scales are folded into its second matrices.

    Attributes:
        rank: of all layers; where an adapter has several, smaller ones are filled up with zeros.
        layers: by the name of the module in the base, A [rank, in] and B [out, rank], float32.
    """

    rank: int
    layers: dict[str, tuple[torch.Tensor, torch.Tensor]]


def check(adapter: Path, to: str) -> "PeftConfig":
    """The adapter's configuration.

    Raises:
        UserError: it is no plain LoRA; with the line to type.
    """
    config = adapter_config(adapter)
    kind = getattr(config.peft_type, "value", config.peft_type)
    extras = [name for name in EXTRAS if getattr(config, name, None)]
    init = str(getattr(config, "init_lora_weights", "")).lower()
    if kind != "LORA":
        found = kind
    elif extras or config.bias != "none":
        found = f"LoRA with {extras[0] if extras else 'bias'}"
    elif init.startswith(REWRITES_BASE):
        found = f"LoRA that begins with {init}, which changes the base's own weights"
    elif to == "vllm" and (rank := max([config.r, *(config.rank_pattern or {}).values()])) > HIGHEST:
        found = f"of rank {rank}, above {HIGHEST}"
    elif any(".lora_embedding_" in name for name in load_peft_weights(str(adapter), device="cpu")):
        found = "LoRA of the embeddings"
    else:
        return config
    raise UserError(
        f"export: {to} holds plain LoRA, and {adapter} is {found}: ftray merge --adapter {adapter} --output DIR "
        "makes a plain model of it"
    )


def read(adapter: Path, config: "PeftConfig") -> PlainLora:
    """The matrices of an adapter that :func:`check` let pass.

    Raises:
        UserError: they are not those of PEFT's plain LoRA.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_peft_weights(str(adapter), device="cpu").items():
        name, dot, part = key.removeprefix(PREFIX).rpartition(".lora_")
        if not dot or part not in ("A.weight", "B.weight") or tensor.dim() != 2:
            raise UserError(f"adapter {adapter}: {key} is no matrix of a plain LoRA: take --to gguf, or ftray merge")
        found.setdefault(name, {})[part[0]] = tensor.float()
    rank = max(pair["A"].shape[0] for pair in found.values())
    layers = {}
    for name, pair in found.items():
        a, b, own = pair["A"], pair["B"], pair["A"].shape[0]
        b = b * _scale(config, name, own)
        layers[name] = functional.pad(a, (0, 0, 0, rank - own)), functional.pad(b, (0, rank - own))
    return PlainLora(rank, layers)


def write_for_vllm(lora: PlainLora, config: "PeftConfig", base: str, target: Path) -> None:
    """Leave a PEFT directory that any version of vLLM reads: one rank, one scale of 1, modules by their names.

    Args:
        base: what its configuration names as the base.
    """
    target.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, (a, b) in lora.layers.items():
        tensors |= {f"{PREFIX}{name}.lora_A.weight": a.contiguous(), f"{PREFIX}{name}.lora_B.weight": b.contiguous()}
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "fan_in_fan_out": bool(getattr(config, "fan_in_fan_out", False)),
        "target_modules": sorted(lora.layers),
    }
    (target / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def write_for_mlx(lora: PlainLora, layers: int, base: str, target: Path) -> None:
    """Leave an adapter in mlx-lm's names: `lora_a` [in, rank] and `lora_b` [rank, out] a module.

    Args:
        layers: blocks of the model.
        base: what its configuration names as the base.
    """
    target.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    keys: set[str] = set()
    for name, (a, b) in lora.layers.items():
        tensors |= {f"{name}.lora_a": a.T.contiguous(), f"{name}.lora_b": b.T.contiguous()}
        before, number, inner = _in_block(name)
        keys.add(inner if number is not None else before)
    save_file(tensors, target / "adapters.safetensors", metadata={"format": "mlx"})
    fields = {
        "fine_tune_type": "lora",
        "model": base,
        "num_layers": layers,
        "lora_parameters": {"rank": lora.rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    (target / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _in_block(name: str) -> tuple[str, int | None, str]:
    """The parts of a module's name before, at and after the number of its block; None: it is in no block."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return (name, None, "") if at is None else (".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :]))


def _scale(config: "PeftConfig", name: str, rank: int) -> float:
    """What PEFT multiplies the product of both matrices with."""
    patterns = (config.alpha_pattern or {}).items()
    alpha = next((own for key, own in patterns if re.match(rf"(.*\.)?({key})$", name)), config.lora_alpha)
    scale: float = alpha / (rank**0.5 if config.use_rslora else rank)
    return scale
