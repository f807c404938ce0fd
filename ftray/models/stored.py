"""Bases that are stored quantised: recognised by their config.json, before anything slow is done with them."""

import json
from pathlib import Path
from typing import Any

from ftray.config import ModelConfig
from ftray.errors import UserError


def quantization_of(path: str) -> dict[str, Any] | None:
    """What config.json of the directory or hub id `path` says of its weights; None: they are not quantised.

    Raises:
        UserError: it is no JSON object.
    """
    if Path(path).is_dir():
        try:
            config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"model {path}: its config.json is not valid JSON: {error}") from None
        if not isinstance(config, dict):
            raise UserError(f"model {path}: its config.json must hold an object, not a {type(config).__name__}")
    else:
        from transformers import PretrainedConfig

        config, _ = PretrainedConfig.get_config_dict(path)
    for part in (config, config.get("text_config") or {}):
        found: dict[str, Any] | None = part.get("quantization_config") or part.get("compression_config")
        if found:
            return found
    return None


def as_stored(cfg: ModelConfig, path: str) -> ModelConfig:
    """`cfg` with the quantisation that the weights in `path` have already; as it is where they have none.

    Raises:
        UserError: they are quantised by what can be neither trained on nor merged, or `cfg` asks for something else.
    """
    stored = quantization_of(path)
    if stored is None:
        return cfg
    own = {
        "quantization": "8bit" if stored.get("load_in_8bit") else "4bit",
        "quant_type": stored.get("bnb_4bit_quant_type", "fp4"),
        "double_quantization": stored.get("bnb_4bit_use_double_quant", False),
    }
    if not (stored.get("load_in_8bit") or stored.get("load_in_4bit")):
        method = stored.get("quant_method") or stored.get("quant_algo") or "a method that it does not name"
        raise UserError(
            f"model {path}: is stored quantised by {method}, which is neither trained on nor merged: take the "
            "model that it was made of, with --model.quantization 4bit or 8bit where memory is short"
        )
    if own["quantization"] == "8bit":
        own = {"quantization": "8bit"}
    if cfg.quantization == "none":
        return cfg.model_copy(update=own)
    for field in own.keys() & cfg.model_fields_set:
        if getattr(cfg, field) != own[field]:
            raise UserError(
                f"model.{field} {getattr(cfg, field)}: {path} is stored with {own[field]}: leave it out, or take "
                "the model that it was made of"
            )
    return cfg.model_copy(update=own)
