"""Every method, precision and ZeRO stage: see `helpers/matrix.py`, which also writes docs/matrix.md."""

import json
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import matrix
from helpers.trainers import FP32, plain_loop
from peft import PeftType
from safetensors.torch import load_file

from ftray.adapters.compatibility import NOT_COVERED, document, dry_run, refuse
from ftray.adapters.methods import METHODS, attach
from ftray.config import AdapterConfig, ModelConfig, TrainingConfig, config_from
from ftray.errors import UserError
from ftray.models.load import load_base, load_skeleton
from ftray.models.next_token import token_losses
from ftray.multi_adapter.shared_model import trainable
from ftray.search.space import load_space
from ftray.training.pack_trainer import PackTrainer
from ftray.training.single_run_trainer import SingleRunTrainer

DOCUMENT = Path(__file__).parents[1] / "docs" / "methods.md"
QUICK = {
    "bf16": ("lora", "full", "adaption_prompt"),
    "fp16": ("lora",),
    "8bit": ("lora", "lora, LoftQ"),
    "4bit": ("lora", "lora, LoftQ"),
}
APART = {
    **dict.fromkeys(
        ("lora, PiSSA", "lora, fast PiSSA", "lora, PiSSA, rsLoRA, patterns", "lora, OLoRA"),
        "starts from a changed copy of",
    ),
    **dict.fromkeys(("prompt_tuning", "p_tuning", "prefix_tuning"), "adds tokens or activations"),
    **dict.fromkeys(("adaption_prompt", "full"), "trains parameters outside of the layers"),
}
QUICK_TASKS = ("ia3", "lora, LoftQ")
NO_TASK = {
    *(("adaption_prompt", task) for task in matrix.TASKS if not task.endswith("decoder")),
    *((v, task) for v in matrix.VARIANTS if "patterns" in v for task in matrix.TASKS if not task.endswith("decoder")),
    ("lora, EVA", "SEQ_2_SEQ_LM"),
    ("prompt_tuning", "SEQ_CLS decoder"),
    ("p_tuning", "SEQ_CLS decoder"),
}
CELLS = [(variant, precision) for precision in matrix.PRECISIONS for variant in matrix.VARIANTS]


def test_every_method_of_the_installed_peft_is_covered_or_has_a_reason():
    known = {kind.value for kind in PeftType}
    covered = {name.upper() for name in METHODS} - {"FULL", "PEFT"}  # PEFT has no types for these
    assert covered <= known
    assert covered.isdisjoint(NOT_COVERED)
    assert covered | set(NOT_COVERED) == known
    assert {adapter["method"] for adapter, _ in matrix.VARIANTS.values()} == set(METHODS)


@pytest.mark.parametrize(
    ("variant", "precision"),
    [
        pytest.param(v, p, marks=() if p == "fp32" or v in QUICK.get(p, ()) else pytest.mark.slow, id=f"{v}-{p}")
        for v, p in CELLS
    ],
)
def test_trains_saves_reloads_and_merges(variant, precision, tiny_llama, tmp_path):
    wanted = matrix.run(variant, precision, tiny_llama)
    try:
        refuse(wanted.adapter, wanted.model, wanted.training)
    except UserError:
        with pytest.raises(UserError):
            matrix.try_out(wanted)
        return
    matrix.check(matrix.cell(wanted, matrix.records(), tmp_path), precision)


@pytest.mark.parametrize("variant", ["lora", "lora, one block", "lora, rsLoRA", "lora, DoRA", "adalora", "ia3"])
def test_trains_saves_reloads_and_merges_where_weights_are_stored_transposed(variant, tiny_gpt2, tmp_path):
    rate = {"learning_rate": 1e-1} if variant == "adalora" else {}
    wanted = matrix.run(variant, "fp32", tiny_gpt2, **rate)
    matrix.check(matrix.cell(wanted, matrix.records(), tmp_path), "fp32")


def test_adalora_ends_at_its_target_rank(tiny_llama, tmp_path):
    wanted = matrix.run("adalora", "fp32", tiny_llama)
    matrix.train(wanted, matrix.records(), tmp_path)
    pattern = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    target = wanted.adapter.parameters["target_rank"]
    assert sum(sum(mask) for mask in pattern.values()) == target * len(pattern)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    values = [weight for name, weight in weights.items() if "lora_E" in name]
    assert len(values) == len(pattern)
    assert sum(int((weight != 0).sum()) for weight in values) <= target * len(pattern)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("variant", [v for v in matrix.VARIANTS if v != "lora, LoftQ"])
def test_trains_saves_reloads_and_merges_under_zero(variant, stage, tiny_llama, tmp_path):
    wanted = matrix.run(variant, "fp32", tiny_llama, zero_stage=stage)
    try:
        matrix.try_out(wanted)
    except UserError:
        assert stage == 3
    else:
        matrix.check(matrix.cell(wanted, matrix.records(), tmp_path), "fp32")


@pytest.fixture(scope="module")
def given(tiny_bert, tiny_llama, tiny_t5, tmp_path_factory):
    """For each task: the model's directory, and records."""
    paths = {"encoder": tiny_bert, "llama": tiny_llama, "t5": tiny_t5}
    found = {task: paths[make.__name__] for task, make in matrix.TASKS.items()}
    return {t: (path, matrix.task_records(t, path, tmp_path_factory.mktemp("task"))) for t, path in found.items()}


@pytest.mark.parametrize("task", matrix.TASKS)
@pytest.mark.parametrize(
    "variant",
    [v if v in QUICK_TASKS else pytest.param(v, marks=pytest.mark.slow) for v in matrix.VARIANTS],
)
def test_trains_saves_reloads_and_merges_for_every_task(variant, task, given, tmp_path):
    path, records = given[task]
    precision = "4bit" if "LoftQ" in variant else "fp32"
    wanted = matrix.run(variant, precision, path, records.task)
    if (variant, task) in NO_TASK:
        with pytest.raises(UserError):
            matrix.try_out(wanted)
        return
    matrix.check(matrix.cell(wanted, records, tmp_path), precision, records.task)


@pytest.mark.slow
@pytest.mark.parametrize("task", matrix.TASKS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", matrix.PRECISIONS)
@pytest.mark.parametrize("variant", matrix.VARIANTS)
def test_the_cross_product(variant, precision, stage, task, given, tmp_path):
    path, records = given[task]
    wanted = matrix.run(variant, precision, path, records.task, zero_stage=stage)
    try:
        matrix.try_out(wanted)
    except UserError:
        return
    matrix.check(matrix.cell(wanted, records, tmp_path), precision, records.task)


def test_all_methods_in_one_pack_get_what_they_get_alone(tiny_llama):
    variants = [v for v in matrix.VARIANTS if v != "lora, LoftQ"]  # wants a 4-bit base
    runs = {v: replace(matrix.run(v, "fp32", tiny_llama, seed=1), steps=3) for v in variants}
    batch, trainer = matrix.records().batch, PackTrainer(FP32, tiny_llama)
    untouched = {name: p.clone() for name, p in trainer.pack.base.named_parameters()}
    apart = {v: trainer.join(v, run, samples=lambda: [batch]) for v, run in runs.items()}
    for variant in variants:
        trainer.trials[variant].batches = repeat(batch)
    for _ in range(3):
        assert trainer.step(variants) == {}
    assert all(torch.equal(p, untouched[name]) for name, p in trainer.pack.base.named_parameters())
    assert {v for v, reason in apart.items() if reason} == set(APART)
    for variant, reason in APART.items():
        assert reason in apart[variant]
    for variant, run in runs.items():
        alone, _ = plain_loop(run, repeat(batch), [batch], lambda: [batch])
        packed = trainer.pack.adapters[variant].model
        assert matrix.difference(matrix.losses(alone, batch), matrix.losses(packed, batch)) < 1e-4, variant


@pytest.mark.parametrize("stage", [0, 2])
def test_lora_plus_is_that_of_peft(stage, tiny_llama):
    from peft.optimizers import create_loraplus_optimizer

    wanted = matrix.run("lora, LoRA+", "fp32", tiny_llama, clip_norm=0.0, zero_stage=stage)
    batch, trainer, trained = matrix.records().batch, SingleRunTrainer(wanted), []
    trainer.measure = lambda model: trained.append(matrix.losses(model, batch)) or {}
    trainer.fit(repeat(batch), lambda: [batch], lambda metrics: None)
    model = attach(load_base(wanted.model, tiny_llama), wanted.adapter, wanted.steps, 0)
    rate, ratio = wanted.training.learning_rate, wanted.adapter.parameters["rate_ratio"]
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=ratio)
    for _ in range(wanted.steps):
        token_losses(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert matrix.difference(trained[-1], matrix.losses(model, batch)) < 1e-5


@pytest.mark.parametrize(
    ("adapter", "model", "training", "reason"),
    [
        ({"method": "hra"}, {"quantization": "4bit"}, {}, "hra with model.quantization 8bit or 4bit"),
        ({"method": "full"}, {"quantization": "8bit"}, {}, "full with model.quantization 8bit or 4bit"),
        ({"method": "lora", "init": "pissa"}, {"quantization": "4bit"}, {}, "take loftq"),
        ({"method": "lora", "init": "loftq"}, {}, {}, "set model.quantization"),
        ({"method": "lora", "init": "olora"}, {}, {"zero_stage": 3}, "take stage 2"),
        ({"method": "lora", "init": "eva"}, {}, {"zero_stage": 3}, "take stage 2"),
        ({"method": "lora", "init": "pissa", "use_dora": True}, {}, {}, "magnitudes"),
        ({"method": "lora", "init": "orthogonal", "rank": 3}, {}, {}, "even"),
        ({"method": "prefix_tuning"}, {}, {"gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"method": "lora"}, {"quantization": "4bit"}, {"zero_stage": 3}, "bitsandbytes"),
        ({"method": "road", "group_size": 24}, {}, {}, "PEFT refuses.* divisible by group_size"),
        ({"method": "adaption_prompt", "layers": 9}, {}, {}, "LlamaForCausalLM has 2"),
        ({"method": "lora", "rank_pattern": {"q_prj": 4}}, {}, {}, "did you mean q_proj"),
        ({"method": "peft", "config": {"peft_type": "LORRA"}}, {}, {}, "did you mean lora"),
        ({"method": "peft", "config": {"peft_type": "LORA", "rank": 3}}, {}, {}, "LoraConfig has no 'rank'"),
        ({"method": "peft", "config": {"peft_type": "LORA", "init_lora_weights": "pissa"}}, {}, {}, "method lora"),
        ({"method": "peft", "config": {"r": 3}}, {}, {}, "must name its peft_type"),
        ({"method": "peft", "config": {"peft_type": "XLORA"}}, {}, {}, "trained already"),
        ({"method": "peft", "config": {"peft_type": "LOHA"}}, {}, {"zero_stage": 3}, "loha with training.zero_stage 3"),
        ({"method": "peft", "config": {"peft_type": "HRA"}}, {"quantization": "4bit"}, {}, "hra with model.quantiz"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(adapter, model, training, reason, tiny_llama):
    model, training = ModelConfig(**model), TrainingConfig(**training)
    with pytest.raises(UserError, match=reason) as refused:
        dry_run(AdapterConfig(**adapter), load_skeleton(model, tiny_llama), model, training)
    assert "\n" not in str(refused.value)


def test_a_configuration_of_peft_trains_as_the_method_itself(tiny_llama, tmp_path):
    """From a dictionary, a file and the directory of an adapter, beside the registry's own LoRA."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"task_type": "SEQ_CLS", "peft_version": "0.1"}))
    adapters = [{"method": "peft", "config": c} for c in (config, str(tmp_path), f"{tmp_path}/adapter_config.json")]
    weights = []
    for adapter in [matrix.LORA, *adapters]:
        model = attach(load_base(ModelConfig(dtype="fp32"), tiny_llama), AdapterConfig(**adapter), 3, 1)
        token_losses(model, matrix.records().batch).mean().backward()
        weights.append([(p.detach(), p.grad) for p in trainable(model)])
    for own in weights[1:]:
        for (weight, gradient), (wanted, slope) in zip(own, weights[0], strict=True):
            assert torch.equal(weight, wanted)
            assert torch.equal(gradient, slope)
    with pytest.raises(UserError, match="can't read nowhere"):
        config_from({"adapter": {"method": "peft", "config": "nowhere"}})


def test_a_space_may_hold_mappings(tmp_path):
    """Where a parameter is a mapping, as a value or as one of several."""
    space = tmp_path / "space.yaml"
    one, two = {"peft_type": "LORA", "r": 2}, {"peft_type": "IA3"}
    space.write_text(f"method: peft\npeft: {{config: {{choice: {json.dumps([one, two])}}}}}\n")
    assert {c["adapter"]["config"]["peft_type"] for c in load_space(str(space)).corners()} == {"LORA", "IA3"}
    space.write_text("method: lora\nlora: {rank_pattern: {q_proj: 2}}\n")
    assert [c["adapter"]["rank_pattern"] for c in load_space(str(space)).corners()] == [{"q_proj": 2}]


def test_a_model_whose_records_depend_on_each_other_in_every_batch_is_refused():
    base = SimpleNamespace(config=SimpleNamespace(model_type="doge", is_encoder_decoder=False))
    with pytest.raises(UserError, match="Doge"):
        refuse(AdapterConfig(), ModelConfig(), TrainingConfig(), base)


def test_the_list_of_methods_and_refusals_is_up_to_date():
    assert DOCUMENT.read_text() == document()
