"""Short runs of a trainer on the records of the fixture `data`, what they report, and the same by a plain loop."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.nn import functional as F
from transformers import get_scheduler

from ftray.adapters.methods import attach
from ftray.config import AdapterConfig, ModelConfig, TrainingConfig
from ftray.data.loader import batches, batches_in_order
from ftray.models.load import load_base
from ftray.training.run_spec import RunSpec
from ftray.training.single_run_trainer import SingleRunTrainer
from ftray.training.zero3_trainer import Zero3Trainer

FP32 = ModelConfig(dtype="fp32")
LORA = {"method": "lora", "rank": 4, "dropout": 0.0}
ADALORA = {"method": "adalora", "initial_rank": 6, "target_rank": 3, "dropout": 0.0}
STEPS, AT = 8, (2, 5, 8)


def make_run(path: str, adapter: dict = LORA, **training) -> RunSpec:
    settings = TrainingConfig(batch_size=8, learning_rate=5e-3, clip_norm=0.5, weight_decay=0.01, **training)
    return RunSpec(FP32, path, AdapterConfig(**adapter), settings, STEPS, AT)


def trainer_of(run: RunSpec) -> type[SingleRunTrainer | Zero3Trainer]:
    """The one that :func:`ftray.search.trial_worker.train_worker` takes."""
    return Zero3Trainer if run.training.zero_stage == 3 else SingleRunTrainer


def with_trainer(
    run: RunSpec, data, resume_from: str | None = None, save_at: tuple[int, str] | None = None, make=None
) -> list[tuple[int, float, float]]:
    """Step, training loss and validation loss of each report; `make` is :func:`trainer_of` unless it is given."""
    trainer = (make or trainer_of(run))(run)
    if resume_from:
        trainer.restore(resume_from)
    rows = run.training.micro_batch or run.training.batch_size
    first = trainer.history.step * run.training.batch_size
    reports = []

    def report(metrics):
        reports.append((metrics["step"], metrics["train_loss"], metrics["validation_loss"]))
        if save_at and metrics["step"] == save_at[0]:
            trainer.save(save_at[1])

    records = run.training.validation_records
    held_out = partial(batches_in_order, data, "validation", 8, limit=records)
    trainer.fit(batches(data, run.training.seed, first, rows), held_out, report)
    return reports


def plain_loop(
    run: RunSpec, stream: Iterator, held_out: Iterable, samples: Callable[[], list] | None = None
) -> tuple[Any, list[tuple[int, float, float]]]:
    """The trained model and its reports, by plain PEFT and PyTorch: full logits of one record after another, AdamW.

    Args:
        stream: a batch of packed rows for each step.
        held_out: batches of the validations.
        samples: see :func:`ftray.adapters.methods.attach`.
    """
    cfg, ratio = run.training, run.adapter.parameters.get("rate_ratio", 1.0)  # of LoRA+
    model = attach(load_base(run.model, run.model_path), run.adapter, run.steps, cfg.seed, samples)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p], "lr": cfg.learning_rate * (ratio if "lora_B" in n else 1.0)} for n, p in named]
    optimizer = torch.optim.AdamW(groups, weight_decay=cfg.weight_decay)
    schedule = get_scheduler(cfg.schedule, optimizer, round(cfg.warmup * run.steps), run.steps)
    allocates = hasattr(model.base_model, "update_and_allocate")
    factors = [p for n, p in named if "lora_A" in n or "lora_B" in n]

    def loss_of(batch):
        """The sum over the tokens that bear loss, and their number."""
        starts, total = (batch["position_ids"][0] == 0).nonzero().squeeze(1).tolist(), 0.0
        for first, end in zip(starts, [*starts[1:], batch["labels"].shape[1]], strict=True):
            logits = model(input_ids=batch["input_ids"][:, first:end]).logits[0, first - end : -1]
            total += F.cross_entropy(logits, batch["labels"][0, first + 1 : end], reduction="sum")
        return total, int((batch["labels"] != -100).sum())

    reports, total, tokens = [], 0.0, 0
    for step, batch in enumerate(islice(stream, run.steps)):
        model.train()
        loss, count = loss_of(batch)
        (loss / count + (orthogonality(factors) if allocates else 0.0)).backward()
        if cfg.clip_norm:
            torch.nn.utils.clip_grad_norm_([p for _, p in named], cfg.clip_norm)
        optimizer.step()
        schedule.step()
        if allocates:
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        total, tokens = total + loss.item(), tokens + count
        if step + 1 in run.evaluate_at:
            model.eval()
            with torch.no_grad():
                held = [loss_of(b) for b in held_out]
            validation = sum(v.item() for v, _ in held) / sum(n for _, n in held)
            reports.append((step + 1, total / tokens, validation))
            total, tokens = 0.0, 0
    return model.eval(), reports


def orthogonality(factors: list[torch.Tensor]) -> torch.Tensor:
    """AdaLoRA's penalty, from the paper: how far the singular vectors are from orthonormal."""
    grams = [p @ p.T if p.shape[0] < p.shape[1] else p.T @ p for p in factors]
    return 0.5 * torch.stack([(g - torch.eye(len(g))).pow(2).sum().sqrt() for g in grams]).mean()


def assert_same(got, wanted, tolerance):
    assert [r[0] for r in got] == [r[0] for r in wanted]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=tolerance, atol=0)
