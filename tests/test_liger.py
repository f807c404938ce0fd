"""Liger's kernels as an option. They need a GPU: here a stand-in patches a model in the way that Liger does."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.packs import packed_row
from helpers.trainers import LORA, make_run

from ftray.adapters.compatibility import refuse
from ftray.config import AdapterConfig, ModelConfig, TrainingConfig
from ftray.errors import UserError
from ftray.training.pack_trainer import PackTrainer
from ftray.training.run_spec import check_workers


def norm(self: Any, states: torch.Tensor) -> torch.Tensor:
    """The same as Llama's."""
    return torch.nn.functional.rms_norm(states, self.weight.shape, self.weight, self.variance_epsilon)


@pytest.fixture
def liger(monkeypatch) -> list[str]:
    """Installs the stand-in; names of what it has patched."""
    patched: list[str] = []

    def to_llama(model: Any, cross_entropy: bool = False, fused_linear_cross_entropy: bool = True) -> None:
        assert not cross_entropy
        assert not fused_linear_cross_entropy
        for name, module in model.named_modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.__dict__["forward"] = liger_kernel.norm.__get__(module)
                patched.append(name)

    liger_kernel: Any = ModuleType("liger_kernel")
    inside: Any = ModuleType("liger_kernel.transformers.monkey_patch")
    liger_kernel.norm = norm
    inside.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": to_llama}
    monkeypatch.setitem(sys.modules, "liger_kernel", liger_kernel)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", ModuleType("liger_kernel.transformers"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", inside)
    monkeypatch.setattr("ftray.adapters.compatibility.find_spec", lambda name: object())
    return patched


def losses(path: str, **training: Any) -> list[float]:
    run = make_run(path, LORA, **training)
    trainer = PackTrainer(run.model, path, run.training)
    trainer.join("one", run)
    draw = torch.Generator().manual_seed(0)
    trainer.trials["one"].batches = iter([packed_row(draw, 2) for _ in range(3)])
    for _ in range(3):
        assert trainer.step(["one"]) == {}
    assert trainer.pack.verdict == "records are packed in one row"
    return trainer.trials["one"].history.losses


def test_a_pack_trains_on_a_base_with_liger_as_without(tiny_llama, liger):
    wanted = losses(tiny_llama)
    assert liger == []
    assert losses(tiny_llama, liger=True) == pytest.approx(wanted, rel=1e-5)
    assert len(liger) == 5  # two in each of two layers, and one


def test_kernels_that_change_what_the_base_says_are_refused(tiny_llama, liger, monkeypatch):
    base, settings = ModelConfig(dtype="fp32"), TrainingConfig(liger=True)
    for wrong, reason in ((lambda self, states: states, "something else"), (lambda self: None, "fail on this llama")):
        monkeypatch.setattr(sys.modules["liger_kernel"], "norm", wrong)
        with pytest.raises(UserError, match=rf"training\.liger: .*{reason}"):
            PackTrainer(base, tiny_llama, settings)


def test_a_model_without_kernels_is_refused(tiny_gpt2, liger):
    with pytest.raises(UserError, match="no kernels for a gpt2 model"):
        PackTrainer(ModelConfig(dtype="fp32"), tiny_gpt2, TrainingConfig(liger=True))


def test_what_liger_lacks_is_told_before_training(liger, monkeypatch):
    settings = TrainingConfig(liger=True)
    refuse(AdapterConfig(), ModelConfig(), settings)
    with pytest.raises(UserError, match="take stage 2"):
        refuse(AdapterConfig(), ModelConfig(), settings.model_copy(update={"zero_stage": 3}))
    monkeypatch.setattr("ftray.adapters.compatibility.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install liger-kernel"):
        refuse(AdapterConfig(), ModelConfig(), settings)
    check_workers(settings, 1, 1.0)
    with pytest.raises(UserError, match="needs GPUs"):
        check_workers(settings, 1, 0.0)
