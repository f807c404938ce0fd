"""From adapter and base to one plain transformers model."""

import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from transformers import PreTrainedModel

from ftray.adapters.methods import METHODS
from ftray.config import ModelConfig
from ftray.errors import UserError
from ftray.models.load import choose_dtype, load_base, load_tokenizer
from ftray.models.stops import stop_tokens
from ftray.storage.location import Location, atomic_dir, parse_location
from ftray.task_spec import CAUSAL, TaskSpec


def merge(model: PeftModel) -> PreTrainedModel:
    """Fold the adapter into the base's weights.

    Raises:
        UserError: the method leaves the weights as they are, so there is nothing to fold.
        ValueError: the merged weights hold NaN (PEFT's `safe_merge`).
    """
    method = model.active_peft_config.peft_type.value.lower()
    if method in METHODS and METHODS[method].merge_tolerance is None:
        raise UserError(f"{method} adds to the model's input and changes no weight: serve the adapter itself")
    merged = model.merge_and_unload(safe_merge=True)
    for name, module in list(merged.named_modules()):  # a head that ln_tuning leaves wrapped
        if isinstance(module, ModulesToSaveWrapper):
            whole = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            merged.set_submodule(name, whole)
    return merged


def save_merged(
    cfg: ModelConfig, base_path: str, adapter: str | Path, output: str | Location, task: TaskSpec = CAUSAL
) -> None:
    """Merge the adapter directory into the base and write a plain transformers directory with tokenizer.

    A quantised base is dequantised first: the adapter was trained on what rounding left of the weights. The sum is
    made in float32 and stored in the dtype of :func:`choose_dtype`. The directory appears whole or not at all.
    """
    base = load_base(cfg.model_copy(update={"dtype": "fp32"}), base_path, task)
    if cfg.quantization != "none":
        print(f"merge: the {cfg.quantization} base is dequantised first; the merged model is in full precision")
        base = base.dequantize().float()
        base.is_loaded_in_8bit = base.is_loaded_in_4bit = False  # marks that transformers leaves, and PEFT goes by
    merged = merge(PeftModel.from_pretrained(base, str(adapter)))
    save_model(merged, load_tokenizer(base_path, cfg.trust_remote_code), cfg, output)


def save_model(model: PreTrainedModel, tokenizer: Any, cfg: ModelConfig, output: str | Location) -> None:
    """Write `model`, in the dtype of :func:`choose_dtype`, as a plain transformers directory, whole or not at all."""
    model.config.use_cache = True
    with atomic_dir(parse_location(str(output))) as made:
        model.to(choose_dtype(cfg)).save_pretrained(made)
        tokenizer.save_pretrained(made)
        if model.can_generate():
            _keep_stops(made / "generation_config.json", stop_tokens(tokenizer, model.config, model.generation_config))


def _keep_stops(file: Path, stops: list[int]) -> None:
    """Let whatever reads the model end answers where ftray does.

    In the file: transformers saves a configuration that was changed only if all of it is sound, and many are not.
    """
    values = json.loads(file.read_text(encoding="utf-8"))
    if stops:
        values["eos_token_id"] = stops[0] if len(stops) == 1 else stops
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
