"""One process of two under torchrun: train a step on MODEL at a ZeRO STAGE, print the peak memory."""

import os
import resource
import sys
from itertools import repeat

import torch
import torch.distributed as dist

from ftray.config import AdapterConfig, ModelConfig, TrainingConfig
from ftray.training.loop import Trainer
from ftray.training.run import Run

model, stage = sys.argv[1], int(sys.argv[2])
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
dist.init_process_group("gloo")
settings = TrainingConfig.model_validate({"batch_size": 2, "zero_stage": stage})
trainer = Trainer(Run(ModelConfig(dtype="fp32"), model, AdapterConfig(method="lora"), settings, 1))
ids = torch.arange(2, 18)[None]
batch = {"input_ids": ids, "position_ids": torch.arange(16)[None], "labels": ids}
trainer.fit(repeat(batch), lambda: [batch], lambda metrics: None)
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)
