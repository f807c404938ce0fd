"""Every method, precision and ZeRO stage: see `matrix.py`, which also writes docs/matrix.md."""

from pathlib import Path

import matrix
import pytest
from peft import PeftType

from ftray.adapters.limits import NOT_COVERED, document, refuse, try_on
from ftray.adapters.methods import METHODS
from ftray.config import AdapterConfig, ModelConfig, TrainingConfig, UserError
from ftray.models.load import load_skeleton

DOCUMENT = Path(__file__).parents[1] / "docs" / "methods.md"
QUICK = {
    "bf16": ("lora", "full", "adaption_prompt"),
    "fp16": ("lora",),
    "8bit": ("lora",),
    "4bit": ("lora", "lora, LoftQ"),
}
CELLS = [(variant, precision) for precision in matrix.PRECISIONS for variant in matrix.VARIANTS]


def test_every_method_of_the_installed_peft_is_covered_or_has_a_reason():
    known = {kind.value for kind in PeftType}
    covered = {name.upper() for name in METHODS} - {"FULL"}  # PEFT has no type for it
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
            matrix.cell(variant, precision, tiny_llama, tmp_path)
        return
    matrix.check(matrix.cell(variant, precision, tiny_llama, tmp_path), precision)


@pytest.mark.parametrize("variant", matrix.VARIANTS)
def test_what_trains_can_be_tried_on_a_skeleton(variant, tiny_llama):
    wanted = matrix.run(variant, "4bit" if "LoftQ" in variant else "fp32", tiny_llama)
    try_on(wanted.adapter, load_skeleton(wanted.model, tiny_llama), wanted.model, wanted.training)


@pytest.mark.parametrize(
    ("adapter", "model", "training", "reason"),
    [
        ({"method": "hra"}, {"quantization": "4bit"}, {}, "hra with model.quantization 4bit"),
        ({"method": "full"}, {"quantization": "8bit"}, {}, "full with model.quantization 8bit"),
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
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(adapter, model, training, reason, tiny_llama):
    model, training = ModelConfig(**model), TrainingConfig(**training)
    with pytest.raises(UserError, match=reason) as refused:
        try_on(AdapterConfig(**adapter), load_skeleton(model, tiny_llama), model, training)
    assert "\n" not in str(refused.value)


def test_the_list_of_methods_and_refusals_is_up_to_date():
    assert DOCUMENT.read_text() == document()
