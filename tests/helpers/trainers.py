"""Short runs of a trainer on the records of the fixture `data`, and what they report."""

from functools import partial

import torch

from ftray.config import AdapterConfig, ModelConfig, TrainingConfig
from ftray.data.loader import batches, batches_in_order
from ftray.training.run_spec import RunSpec
from ftray.training.zero3_trainer import Zero3Trainer

FP32 = ModelConfig(dtype="fp32")
LORA = {"method": "lora", "rank": 4, "dropout": 0.0}
ADALORA = {"method": "adalora", "initial_rank": 6, "target_rank": 3, "dropout": 0.0}
STEPS, AT = 8, (2, 5, 8)


def make_run(path: str, adapter: dict = LORA, **training) -> RunSpec:
    settings = TrainingConfig(batch_size=8, learning_rate=5e-3, clip_norm=0.5, weight_decay=0.01, **training)
    return RunSpec(FP32, path, AdapterConfig(**adapter), settings, STEPS, AT)


def with_trainer(
    run: RunSpec, data, resume_from: str | None = None, save_at: tuple[int, str] | None = None, make=Zero3Trainer
):
    trainer = make(run)
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
    held_out = partial(batches_in_order, data, "validation", 8, records=records)
    trainer.fit(batches(data, run.training.seed, first, rows), held_out, report)
    return reports


def assert_same(got, wanted, tolerance):
    assert [r[0] for r in got] == [r[0] for r in wanted]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=tolerance, atol=0)
