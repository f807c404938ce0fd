"""What an adapter costs whoever keeps and serves it: goals of a search beside what it is worth."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ftray.task_spec import TaskSpec

if TYPE_CHECKING:
    from peft import PeftModel

TRAINABLE, BYTES, LATENCY = "trainable_parameters", "adapter_bytes", "latency"
SIZES = (TRAINABLE, BYTES)
TIMED_RECORDS = 8  # whose answers `latency` is the median of


def sizes(model: "PeftModel", task: TaskSpec) -> dict[str, float]:
    """`trainable_parameters`, and `adapter_bytes`, those of the weights' files as they are saved.

    Every rank of a model that ZeRO 3 partitions must call it.
    """
    import deepspeed

    from ftray.adapters import lora_init

    trained = [p for p in model.parameters() if p.requires_grad]
    partitioned = any(hasattr(p, "ds_id") for p in trained)
    with deepspeed.zero.GatheredParameters(trained, enabled=partitioned), tempfile.TemporaryDirectory() as directory:
        lora_init.save(model, task, Path(directory))
        saved = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
        return {TRAINABLE: float(sum(p.numel() for p in trained)), BYTES: float(saved)}
