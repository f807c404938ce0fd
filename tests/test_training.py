"""The training step against a plain PyTorch + PEFT loop: one process, two workers, every ZeRO stage, resumed."""

import json
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import llama
from helpers.trainers import ADALORA, FP32, LORA, assert_same, make_run, plain_loop, with_trainer

from ftray.adapters.lora_init import SAMPLES
from ftray.config import Config, TrainingConfig
from ftray.data.loader import batches, batches_in_order
from ftray.errors import RunFailed, UserError
from ftray.models.load import load_base
from ftray.training.run_spec import RunSpec, accumulation_steps
from ftray.training.single_run_trainer import SingleRunTrainer
from ftray.training.zero3_trainer import Zero3Trainer

EVA = {**LORA, "init": "eva"}
PREFIX = {"method": "prefix_tuning", "virtual_tokens": 5}


def wanted_of(run: RunSpec, data, samples=None) -> list[tuple[int, float, float]]:
    """What a plain loop reports."""
    stream = batches(data, run.training.seed, 0, run.training.batch_size)
    return plain_loop(run, stream, list(batches_in_order(data, "validation", 8)), samples)[1]


@pytest.mark.parametrize("adapter", [LORA, ADALORA], ids=["lora", "adalora"])
@pytest.mark.parametrize(
    "training",
    [
        {},
        {"micro_batch": 2},
        {"zero_stage": 1},
        {"zero_stage": 2, "offload": "optimizer"},
        *(
            pytest.param(settings, marks=pytest.mark.slow)
            for settings in (
                {"zero_stage": 1, "offload": "optimizer"},
                {"zero_stage": 2},
                {"zero_stage": 3},
                {"zero_stage": 3, "offload": "optimizer"},
                {"zero_stage": 3, "offload": "all"},
            )
        ),
    ],
    ids=str,
)
def test_one_process_equals_a_plain_loop(tiny_llama, data, adapter, training):
    run = make_run(tiny_llama, adapter, **training)
    wanted = wanted_of(run, data)
    assert wanted[-1][2] < wanted[0][2]  # there is something to compare: the loss falls
    assert_same(with_trainer(run, data), wanted, 1e-5)


@pytest.mark.parametrize(
    ("make", "training"),
    [
        (SingleRunTrainer, {}),
        (SingleRunTrainer, {"zero_stage": 2}),
        (SingleRunTrainer, {"gradient_checkpointing": True}),
        (Zero3Trainer, {}),
        (Zero3Trainer, {"zero_stage": 3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("adapter", [LORA, ADALORA], ids=["lora", "adalora"])
def test_a_resumed_run_reproduces_an_undisturbed_one(tiny_llama, data, tmp_path, adapter, make, training):
    run = make_run(tiny_llama, {**adapter, "dropout": 0.1}, **training)
    whole = with_trainer(run, data, save_at=(5, str(tmp_path)), make=make)
    assert_same(with_trainer(run, data, resume_from=str(tmp_path), make=make)[-1:], whole[-1:], 1e-7)


@pytest.mark.parametrize("adapter", [LORA, ADALORA, PREFIX], ids=["lora", "adalora", "prefix"])
def test_a_pack_of_one_equals_the_loop_that_zero_3_needs(tiny_llama, data, adapter):
    run = make_run(tiny_llama, adapter, micro_batch=4)
    assert_same(with_trainer(run, data), with_trainer(run, data, make=Zero3Trainer), 1e-5)


def test_checkpoint_holds_a_plain_adapter(tiny_llama, data, tmp_path):
    from peft import PeftModel

    run = make_run(tiny_llama)
    trainer, logits = SingleRunTrainer(run), []
    batch = next(batches_in_order(data, "validation", 4))
    inputs = {k: batch[k] for k in ("input_ids", "position_ids")}

    def measure(model):
        logits.append(model.eval()(**inputs).logits.detach())
        return {}

    trainer.measure = measure
    trainer.fit(batches(data, 0, 0, 8), lambda: batches_in_order(data, "validation", 8), lambda metrics: None)
    trainer.save(str(tmp_path))
    again = PeftModel.from_pretrained(load_base(FP32, tiny_llama).model, tmp_path / "adapter")
    torch.testing.assert_close(again.eval()(**inputs).logits, logits[-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [SingleRunTrainer, Zero3Trainer])
def test_a_run_that_diverges_says_so(tiny_llama, data, make):
    run = make_run(tiny_llama)
    run.training.learning_rate = 1e30
    with pytest.raises(RunFailed, match=r"diverged: .*loss .*(nan|inf).* step"):
        with_trainer(run, data, make=make)


def test_batch_size_must_be_divisible():
    with pytest.raises(UserError, match="multiple of 6"):
        accumulation_steps(TrainingConfig(batch_size=8, micro_batch=3), workers=2)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """What a process has imported for a pack, and for a trainer; what beginning to train has compiled."""
    code = (
        "import json, sys; packages = lambda: sorted({name.split('.')[0] for name in sys.modules})\n"
        "import ftray.training.pack; pack = packages()\n"
        "import ftray.training.single_run_trainer; trainer = packages()\n"
        "from ftray.training.engine import join_process_group; join_process_group(); print(json.dumps([pack, trainer]))"
    )
    compiled = tmp_path_factory.mktemp("extensions")
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(compiled)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return *map(set, json.loads(done.stdout.splitlines()[-1])), list(compiled.iterdir())


def test_a_pack_imports_neither_ray_nor_deepspeed_nor_pydantic(begun):
    pack, _, _ = begun
    assert "peft" in pack
    assert not pack & {"ray", "deepspeed", "pydantic", "optuna", "pyarrow"}


def test_training_imports_no_ray(begun):
    _, trainer, _ = begun
    assert "deepspeed" in trainer
    assert "ray" not in trainer


def test_deepspeed_compiles_nothing(begun):
    """A process that is killed while it compiles leaves a lock behind for which all later ones wait."""
    *_, compiled = begun
    assert compiled == []


@pytest.mark.parametrize(
    ("stage", "adapter", "offload"),
    [
        (0, LORA, "none"),
        (3, ADALORA, "none"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (2, LORA, "none"),  # as test_pack_worker.py has it, in a pack
                (3, LORA, "none"),
                (1, LORA, "none"),
                (1, LORA, "optimizer"),
                (2, LORA, "optimizer"),
                (3, LORA, "optimizer"),
                (3, LORA, "all"),
                (2, ADALORA, "none"),
                (2, EVA, "none"),
            )
        ),
    ],
)
def test_two_ray_train_workers_equal_a_plain_loop(tiny_llama, data, tmp_path, stage, adapter, offload):
    from ftray.search.trial_worker import SearchContext, trainer
    from ftray.storage.local import LocalLocation

    run = make_run(tiny_llama, adapter, zero_stage=stage, micro_batch=2, offload=offload)
    config = Config.model_validate({"scaling": {"workers": 2}, "training": run.training.model_dump()})
    job = SearchContext(config, tiny_llama, data.directory, 0.0)
    result = trainer(job, run, "two", LocalLocation(tmp_path)).fit()
    assert result.return_value["failure"] is None
    # EVA looks at the first batches of rank 0
    wanted = wanted_of(run, data, lambda: list(islice(batches(data, run.training.seed, 0, 2, 0, 2), SAMPLES)))
    last = (result.metrics["step"], result.metrics["train_loss"], result.metrics["validation_loss"])
    assert_same([last], wanted[-1:], 1e-5)
    adapter_dir = f"{result.checkpoint.path}/adapter"
    assert json.loads(Path(adapter_dir, "adapter_config.json").read_text())["peft_type"] == adapter["method"].upper()


@pytest.mark.slow
def test_zero_3_shares_the_base_out(tmp_path, tokenizer):
    """Peak memory of each of two processes that train on a base of 0.7 GB: a third of the base less, at the least."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 8}
    llama(**sizes).save_pretrained(tmp_path / "model", max_shard_size="100MB")
    tokenizer.save_pretrained(tmp_path / "model")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

    def peaks(stage: int) -> list[float]:
        command = [
            *torchrun,
            str(Path(__file__).parent / "helpers" / "peak_memory.py"),
            str(tmp_path / "model"),
            json.dumps({"batch_size": 2, "zero_stage": stage}),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found = [float(peak) for peak in re.findall(r"peak (\d+)", done.stdout)]
        assert len(found) == 2, done.stdout
        return found

    whole, shared = peaks(0), peaks(3)
    # without sharding one of them has the base mapped from its file, the other a copy of its own
    assert max(shared) < max(whole) - 0.22 * 2**30, (whole, shared)
