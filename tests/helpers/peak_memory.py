"""One process under torchrun: train a step on MODEL with the JSON settings TRAINING, print the peak of its own memory.

Pages of the mapped weight files do not count: the system takes them back whenever it needs them.
"""

import os
import sys
import threading
import time
from itertools import repeat

import psutil
import torch
import torch.distributed as dist

from ftray.config import AdapterConfig, ModelConfig, TrainingConfig
from ftray.training.run_spec import RunSpec
from ftray.training.single_run_trainer import SingleRunTrainer
from ftray.training.zero3_trainer import Zero3Trainer

peak = 0


def watch() -> None:
    global peak
    while True:
        memory = psutil.Process().memory_info()
        peak = max(peak, memory.rss - memory.shared)
        time.sleep(0.005)


threading.Thread(target=watch, daemon=True).start()
model, settings = sys.argv[1], TrainingConfig.model_validate_json(sys.argv[2])
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
dist.init_process_group("gloo")
make = SingleRunTrainer if settings.shard_base else Zero3Trainer
trainer = make(RunSpec(ModelConfig(dtype="fp32"), model, AdapterConfig(method="lora"), settings, 1))
ids = torch.arange(2, 18)[None]
batch = {"input_ids": ids, "position_ids": torch.arange(16)[None], "labels": ids}
trainer.fit(repeat(batch), lambda: [batch], lambda metrics: None)
os.write(1, f"peak {peak}\n".encode())  # at once: several processes share the pipe
