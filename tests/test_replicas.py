"""Passes of a pack that run side by side, each in a thread over a replica of the shared model."""

import time

import pytest
import torch
from conftest import llama
from helpers.packs import STEPS, Trial, alone, assert_same_weights, packed_row, together

from ftray.config import ModelConfig
from ftray.models.load import load_base
from ftray.multi_adapter.dropout import DropoutRNG
from ftray.task_spec import CAUSAL
from ftray.training.pack import Pack

METHODS = ["lora", "dora", "adalora", "lora", "prompt tuning", "oft", "rslora", "lora"]


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def pack_of(base, trials: list[Trial]) -> Pack:
    pack = Pack(base, CAUSAL)
    for i, trial in enumerate(trials):
        model = trial.model(base)
        pack.add(str(i), model, trial.update(model), trial.seed)
    return pack


def test_adapters_of_both_replicas_equal_those_trained_alone():
    base = llama().requires_grad_(False)
    trials = [Trial(method, rank=2 + i, seed=i, rows=1 + i % 3, first=i % 2) for i, method in enumerate(METHODS)]
    for got, trial in zip(together(base, trials), trials, strict=True):
        assert_same_weights(got, alone(base, trial), 1e-5)


@pytest.mark.parametrize("methods", [["lora"] * 3, ["loha", "lora", "adalora", "lora"], ["dora", "lora", "oft"]])
def test_what_one_replica_draws_the_other_does_not(methods, monkeypatch):
    """PEFT's layers draw from a generator that all threads share; LoHa without need."""
    begin, own = DropoutRNG.begin, DropoutRNG.own_generator

    def slowly(self, layer):
        begin(self, layer)
        time.sleep(0.001)

    def slow_generator(self, layer):
        generator = own(self, layer)
        time.sleep(0.001)
        return generator

    base = llama().requires_grad_(False)
    draw = {"lora", "dora", "adalora"}
    trials = [Trial(m, seed=i, dropout=0.3 if m in draw else 0.0) for i, m in enumerate(methods)]
    torch.set_num_threads(1)
    wanted = together(base, trials)
    torch.set_num_threads(2)
    monkeypatch.setattr(DropoutRNG, "begin", slowly)
    monkeypatch.setattr(DropoutRNG, "own_generator", slow_generator)
    for got, want in zip(together(base, trials), wanted, strict=True):
        assert_same_weights(got, want, 1e-5)


def test_rows_are_shared_out_by_their_tokens():
    base = llama().requires_grad_(False)
    trials = [Trial("lora", seed=i, rows=rows) for i, rows in enumerate((1, 9, 2, 3))]
    pack, seen = pack_of(base, trials), []
    for replica in pack.replicas:
        hook = lambda _, inputs, seen=seen: seen.append(inputs[0].shape[1])  # noqa: E731
        replica.model.model.layers[0].register_forward_pre_hook(hook)
    batches = {str(i): trial.batches(0) for i, trial in enumerate(trials)}
    pack.step(batches)
    sizes = [own[0]["input_ids"].numel() for own in batches.values()]
    assert sorted(seen) == sorted([sizes[1], sum(sizes) - sizes[1]])


def test_validations_are_those_of_each_adapter_by_itself():
    base = llama().requires_grad_(False)
    trials = [Trial("lora", seed=i, rank=2 + i) for i in range(3)]
    pack, batch = pack_of(base, trials), packed_row(torch.Generator().manual_seed(9), 5)
    sums = pack.validation_sums(["0", "1", "2"], batch)
    assert len(pack.replicas) == 2
    for name, got in zip("012", sums, strict=True):
        assert got == pytest.approx(pack.validation_sums([name], batch)[0], rel=1e-6)
    assert len({round(own[0], 3) for own in sums}) == 3
    assert all(p.grad is None for name in "012" for p in pack.adapters[name].parameters)


def test_what_goes_wrong_in_a_thread_is_raised():
    base = llama().requires_grad_(False)
    pack = pack_of(base, [Trial("lora"), Trial("lora", seed=1)])

    def fails(*_):
        raise ZeroDivisionError("in a thread")

    pack.replicas[1].model.model.layers[1].register_forward_pre_hook(fails)
    with pytest.raises(ZeroDivisionError, match="in a thread"):
        pack.step({"0": Trial("lora").batches(0), "1": Trial("lora", seed=1).batches(0)})


def test_there_is_one_where_a_pass_has_what_is_not_its_own(tiny_llama):
    plain = load_base(ModelConfig(dtype="fp32"), tiny_llama).model
    assert len(Pack(plain, CAUSAL).replicas) == 2
    torch.set_num_threads(1)
    assert len(Pack(plain, CAUSAL).replicas) == 1
    torch.set_num_threads(2)
    assert len(Pack(load_base(ModelConfig(quantization="8bit"), tiny_llama).model, CAUSAL).replicas) == 1
    plain.gradient_checkpointing_enable({"use_reentrant": False})
    assert len(Pack(plain, CAUSAL).replicas) == 1


def test_an_adapter_that_leaves_is_in_neither():
    base = llama().requires_grad_(False)
    pack = pack_of(base, [Trial("lora"), Trial("lora", seed=1)])
    for step in range(STEPS):
        pack.step({"0": Trial("lora").batches(step)})
    pack.remove("0")
    layers = [m for replica in pack.replicas for m in replica.model.modules() if hasattr(m, "multiplies")]
    assert layers
    assert all(set(layer.adapters) == {"1"} for layer in layers)
