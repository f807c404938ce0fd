"""Private names of Ray Serve LLM; seen in Ray 2.60.0."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig


def loaded_adapter(model_id: str, directory: str) -> "DiskMultiplexConfig":
    """What Serve LLM's loader of adapters gives to vLLM: the loader can be replaced, its answer has no public class.

    Args:
        model_id: that requests name the adapter by.
    """
    from ray.llm._internal.common.models import global_id_manager
    from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig

    return DiskMultiplexConfig(
        model_id=model_id, max_total_tokens=None, local_path=directory, lora_assigned_int_id=global_id_manager.next()
    )
