"""Preferences learnt by the workers that torchrun starts, each with its share of the same records.

torchrun objective_workers.py MODEL OUTPUT
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ftray.config import AdapterConfig, ModelConfig, TrainingConfig
from ftray.task_spec import TaskSpec
from ftray.training.pack_trainer import PackTrainer
from ftray.training.run_spec import RunSpec
from ftray.training.zero3_trainer import Zero3Trainer

STEPS, BATCH = 3, 8
LORA = {"method": "lora", "rank": 4, "alpha": 16, "dropout": 0.0, "target_modules": "attention"}
KINDS = ("dpo", "orpo", "kto")


def rows(step: int) -> list[dict[str, Any]]:
    """The records of a step, of 3 to 20 tokens; their second texts are rejected answers, or those of others."""
    draw, found = torch.Generator().manual_seed(step), []
    for record in range(BATCH):
        prompt = torch.randint(2, 300, (int(torch.randint(1, 8, (), generator=draw)),), generator=draw).tolist()
        row: dict[str, Any] = {"input_ids": [], "labels": [], "lengths": [], "score": float(record % 3 > 0)}
        for _ in range(2):
            answer = torch.randint(2, 300, (int(torch.randint(2, 13, (), generator=draw)),), generator=draw).tolist()
            row["input_ids"] += prompt + answer
            row["labels"] += [-100] * len(prompt) + answer
            row["lengths"].append(len(prompt) + len(answer))
        row["reference"] = (-3 * torch.rand(2, generator=draw) * torch.tensor(row["lengths"])).tolist()
        found.append(row)
    return found


def batches(spec: TaskSpec, micro_batch: int) -> list[Any]:
    """This rank's micro-batches of all steps."""
    task, rank, world = spec.load(), dist.get_rank(), dist.get_world_size()
    found = []
    for step in range(STEPS):
        own = rows(step)[rank::world]
        parts = [own[at : at + micro_batch] for at in range(0, len(own), micro_batch)]
        found += [task.collate({name: [row[name] for row in part] for name in part[0]}) for part in parts]
    return found


def trained(model: str, kind: str, zero3: bool) -> list[torch.Tensor]:
    """The adapter's weights after the last step."""
    spec, micro_batch = TaskSpec.named(kind.upper()), BATCH // dist.get_world_size() // 2
    base = ModelConfig(dtype="fp32")
    settings = TrainingConfig(
        batch_size=BATCH, micro_batch=micro_batch, learning_rate=5e-3, warmup=0.0, zero_stage=3 if zero3 else 0
    )
    run = RunSpec(base, model, AdapterConfig(**LORA), settings, STEPS, (STEPS,), spec)
    if zero3:
        import deepspeed

        trainer = Zero3Trainer(run)
        trainer.fit(iter(batches(spec, micro_batch)), lambda: batches(spec, micro_batch)[:1], lambda _: None)
        parameters = [p for p in trainer.engine.module.parameters() if p.requires_grad]
        with deepspeed.zero.GatheredParameters(parameters):
            return [p.detach().clone() for p in parameters]
    pack = PackTrainer(base, model, settings, spec)
    pack.join("own", run)
    pack.trials["own"].batches = iter(batches(spec, micro_batch))
    for _ in range(STEPS):
        assert pack.step(["own"]) == {}
    assert pack.validate(["own"], batches(spec, micro_batch)[:1]) == {}
    return [p.detach().clone() for p in pack.trials["own"].update.parameters]


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model, output, workers = sys.argv[1], Path(sys.argv[2]), dist.get_world_size()
    found = {"packed": {kind: trained(model, kind, zero3=False) for kind in KINDS}}
    if workers > 1:
        found["zero3"] = {kind: trained(model, kind, zero3=True) for kind in KINDS}
    if dist.get_rank() == 0:
        for how, weights in found.items():
            torch.save(weights, output / f"{workers} {how}.pt")
