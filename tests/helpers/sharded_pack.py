"""One process of two under torchrun: trials of mixed methods in a pack over MODEL, whole and shared out, into OUTPUT.

Ranks have batches of unlike sizes, and unlike numbers of them in validation. In one of the runs memory runs out on rank
1 alone, in the midst of a pass. Rank 0 writes, by kind of run and trial, the trained weights, the validation loss and
the bytes of all tensors before the first trial.
"""

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from ftray.adapters.methods import METHODS
from ftray.compat.torch import storage_key
from ftray.config import AdapterConfig, ModelConfig, TrainingConfig
from ftray.training.pack_trainer import PackTrainer
from ftray.training.run_spec import RunSpec
from helpers.packs import packed_row

STEPS, HALF = 4, 2
TRIALS = {
    "lora": {"method": "lora", "rank": 4, "dropout": 0.1, "target_modules": "all-linear"},
    "dora": {"method": "lora", "rank": 4, "use_dora": True, "dropout": 0.0},
    "upper": {"method": "lora", "rank": 2, "layers_to_transform": [1], "dropout": 0.0},
    "ia3": {"method": "ia3"},
    "lokr": {"method": "lokr", "rank": 4},
    "apart": {"method": "prompt_tuning", "virtual_tokens": 4},
}


def tensor_bytes() -> int:
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    return sum({storage_key(t): t.untyped_storage().nbytes() for t in alive}.values())


class Shortage:
    """Rank 1 has no memory for more than 120 tokens in a layer, and once none for more than 80 in its backward pass."""

    def __init__(self, trainer: PackTrainer):
        self.hit: list[str] = []
        trainer.pack.shared.model.layers[1].register_forward_pre_hook(self)

    def __call__(self, layer: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        tokens = inputs[0].shape[1]
        if dist.get_rank() == 0:
            return
        if tokens > 120:
            self.refuse("forward")
        if tokens > 80 and "backward" not in self.hit and inputs[0].requires_grad and torch.is_grad_enabled():
            inputs[0].register_hook(lambda gradient: self.refuse("backward"))

    def refuse(self, where: str) -> None:
        self.hit.append(where)
        raise RuntimeError("can't allocate memory: there is none")


def train(
    model: str, directory: Path, resume: bool = False, quantization: str = "none", short: bool = False, **settings
) -> dict[str, list[torch.Tensor]]:
    """All trials to the last step, from the middle where they `resume`; leaves checkpoints of the middle."""
    before, rank = tensor_bytes(), dist.get_rank()
    base = ModelConfig(dtype="fp32", quantization=quantization)
    trials = {n: a for n, a in TRIALS.items() if quantization in ("none", *METHODS[a["method"]].quantized)}
    trainer = PackTrainer(base, model, TrainingConfig.model_validate(settings))
    held = tensor_bytes() - before
    trainer.pack.tokens = 200  # so that a step takes several passes
    for i, (name, adapter) in enumerate(trials.items()):
        own = {"batch_size": 4, "micro_batch": 1, "learning_rate": 5e-3, "zero_stage": 2 * (i % 2), "seed": i}
        run = RunSpec(base, model, AdapterConfig(**adapter), TrainingConfig(**own | settings), STEPS, (STEPS,))
        trainer.join(name, run, str(directory / name) if resume else None)
        draw = torch.Generator().manual_seed(10 * i + rank)
        rows = [packed_row(draw, 1 + rank) for _ in range(2 * STEPS)]
        trainer.trials[name].batches = iter(rows[2 * trainer.trials[name].history.step :])
    shortage = Shortage(trainer) if short else None
    while not trainer.trials["lora"].history.over:
        assert trainer.step(list(trials)) == {}
        if trainer.trials["lora"].history.step == HALF:
            for name in trials:
                trainer.save(name, str(directory / name))
    draw = torch.Generator().manual_seed(rank)
    assert trainer.validate(list(trials), [packed_row(draw, 3) for _ in range(2 - rank)]) == {}
    found = {"held": [torch.tensor(held)]}
    for name, trial in trainer.trials.items():
        loss = trial.history.reports[-1]["validation_loss"]
        found[name] = [*(p.detach().clone() for p in trial.update.parameters), torch.tensor(loss)]
    if shortage:
        assert trainer.pack.tokens == 50
        assert dist.get_rank() == 0 or {*shortage.hit} == {"forward", "backward"}
        alike = [
            packed_row(torch.Generator().manual_seed(0), 12 if name == "upper" else 1) for name in ("lora", "upper")
        ]
        for name, row in zip(("lora", "upper"), alike, strict=True):
            trainer.trials[name].batches = iter([row, row])
        (failed,) = trainer.step(["lora", "upper"]).items()
        assert failed == ("upper", f"out of memory: one micro-batch at step {STEPS + 1}")
    for name in trials:
        trainer.leave(name)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model, output = sys.argv[1], Path(sys.argv[2])
    results = {"whole": train(model, output / "whole")}
    results["sharded"] = train(model, output / "sharded", shard_base=True)
    results["resumed"] = train(model, output / "sharded", resume=True, shard_base=True)
    results["recomputed"] = train(model, output / "recomputed", shard_base=True, gradient_checkpointing=True)
    results["short of memory"] = train(model, output / "short", short=True, shard_base=True)
    for kind, shard_base in (("4bit", False), ("4bit, sharded", True)):
        results[kind] = train(model, output / kind, quantization="4bit", shard_base=shard_base)
    if dist.get_rank() == 0:
        torch.save(results, output / "results.pt")
