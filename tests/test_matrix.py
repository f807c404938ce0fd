"""Every method, precision and ZeRO stage: see `matrix.py`, which also writes docs/matrix.md."""

import matrix
import pytest
from peft import PeftType

from ftray.adapters.limits import NOT_COVERED, refuse
from ftray.adapters.methods import METHODS
from ftray.config import UserError

QUICK = {"bf16": ("lora", "full", "adaption_prompt"), "fp16": ("lora",), "8bit": ("lora",), "4bit": ("lora, LoftQ",)}
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
