"""Trials in a pack, each with its DeepSpeed engine, against the loop of one that ZeRO 3 needs."""

from itertools import islice

import pytest
from helpers.trainers import AT, LORA, STEPS, assert_same, make_run, with_trainer

from ftray.data.loader import batches, batches_in_order
from ftray.training.pack_trainer import PackTrainer
from ftray.training.run_spec import RunSpec
from ftray.training.zero3_trainer import Zero3Trainer

TRIALS = {
    "lora": LORA,
    "adalora": {"method": "adalora", "initial_rank": 6, "target_rank": 3, "dropout": 0.0},
    "dropout": {"method": "lora", "rank": 4, "dropout": 0.2},
    "oft": {"method": "oft", "block_size": 16},
}


def run_together(runs: dict[str, RunSpec], data, path, resume: dict[str, str] | None = None, save: dict | None = None):
    """All runs in one pack, to their ends; (step, training loss, validation loss) of every report."""
    first = next(iter(runs.values()))
    trainer = PackTrainer(first.model, path)
    for name, run in runs.items():
        trainer.join(name, run, (resume or {}).get(name))
        trial, rows = trainer.trials[name], run.training.micro_batch or run.training.batch_size
        trial.batches = batches(data, run.training.seed, trial.history.step * run.training.batch_size, rows)
    while active := [name for name, trial in trainer.trials.items() if not trial.history.over]:
        assert trainer.step(active) == {}
        due = [name for name in active if trainer.trials[name].history.due]
        assert trainer.validate(due, batches_in_order(data, "validation", 8)) == {}
        for name in due:
            if save and trainer.trials[name].history.step == save["step"]:
                trainer.save(name, save[name])
    found = {name: trial.history.reports for name, trial in trainer.trials.items()}
    for name in runs:
        trainer.leave(name)
    return {n: [(r["step"], r["train_loss"], r["validation_loss"]) for r in reports] for n, reports in found.items()}


@pytest.mark.parametrize("training", [{}, {"micro_batch": 4}, {"zero_stage": 1}, {"zero_stage": 2}], ids=str)
def test_each_trial_equals_a_trainer_of_its_own(tiny_llama, data, training):
    runs = {name: make_run(tiny_llama, adapter, seed=i, **training) for i, (name, adapter) in enumerate(TRIALS.items())}
    got = run_together(runs, data, tiny_llama)
    for name, run in runs.items():
        assert [step for step, *_ in got[name]] == list(AT)
        assert_same(got[name], with_trainer(run, data, make=Zero3Trainer), 1e-5)


def test_a_trial_goes_on_from_its_checkpoint(tiny_llama, data, tmp_path):
    runs = {name: make_run(tiny_llama, adapter, zero_stage=2) for name, adapter in TRIALS.items()}
    places = {name: str(tmp_path / name) for name in runs}
    whole = run_together(runs, data, tiny_llama, save={"step": 5, **places})
    again = run_together(runs, data, tiny_llama, resume=places)
    for name in runs:
        assert_same(again[name], whole[name], 1e-7)


def test_one_that_diverges_says_so_and_the_others_go_on(tiny_llama, data):
    sound, wild = make_run(tiny_llama, LORA), make_run(tiny_llama, LORA)
    wild.training.learning_rate = 1e30
    trainer = PackTrainer(sound.model, tiny_llama)
    for name, run in {"sound": sound, "wild": wild}.items():
        trainer.join(name, run)
        trainer.trials[name].batches = batches(data, 0, 0, 8)
    failures = {}
    while "wild" not in failures:
        failures = trainer.step(["sound", "wild"])
        assert trainer.trials["sound"].history.step < STEPS
    assert failures["wild"].startswith("diverged: ")
    trainer.leave("wild")
    for _ in islice(iter(int, 1), STEPS - trainer.trials["sound"].history.step):
        assert trainer.step(["sound"]) == {}
    assert trainer.trials["sound"].history.over
