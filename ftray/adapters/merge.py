"""From adapter and base to one plain transformers model."""

import os
import shutil
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from ftray.config import ModelConfig
from ftray.models.load import choose_dtype, load_base, load_tokenizer
from ftray.tasks import CAUSAL, TaskSpec


def merge(model: PeftModel) -> PreTrainedModel:
    """Fold the adapter into the base's weights.

    Raises:
        ValueError: the merged weights hold NaN (PEFT's `safe_merge`).
    """
    return model.merge_and_unload(safe_merge=True)


def save_merged(
    cfg: ModelConfig, base_path: str, adapter: str | Path, output: str | Path, task: TaskSpec = CAUSAL
) -> None:
    """Merge the adapter directory into the base and write a plain transformers directory with tokenizer.

    The base is read in full precision even if training held it quantised; the sum is made in float32 and stored in
    the dtype of :func:`choose_dtype`. The directory appears whole or not at all.
    """
    full = cfg.model_copy(update={"quantization": "none", "dtype": "fp32"})
    merged = merge(PeftModel.from_pretrained(load_base(full, base_path, task), str(adapter)))
    merged.config.use_cache = True
    output = Path(output)
    aside = output.with_name(f".{output.name}.{os.getpid()}")
    merged.to(choose_dtype(cfg)).save_pretrained(aside)
    load_tokenizer(base_path, cfg.trust_remote_code).save_pretrained(aside)
    shutil.rmtree(output, ignore_errors=True)
    aside.rename(output)
