"""Private names of DeepSpeed; seen in DeepSpeed 0.19.8."""

import deepspeed


def skip_shared_memory_extension() -> None:
    """Have `init_distributed` do without an extension for inference that we never call, for which it has no switch.

    Compiling it takes half a minute on a new machine, and a process killed meanwhile leaves a lock in
    ~/.cache/torch_extensions that all later ones would wait for.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
