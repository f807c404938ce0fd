"""Adapters trained together against the same adapters trained alone by plain PEFT and AdamW."""

from typing import Any

import pytest
import torch
from conftest import gpt2, llama
from helpers.live_memory import most_bytes
from helpers.packs import CONFIGS, STEPS, TARGETS, Trial, alone, assert_same_weights, packed_row, together
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import (
    PeftModel,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from benchmarks.tiny_models import tiny_config
from ftray.config import ModelConfig
from ftray.models.load import load_base
from ftray.multi_adapter.dropout import Dropout
from ftray.multi_adapter.shared_linear import update_of
from ftray.task_spec import CAUSAL
from ftray.training.pack import Pack

trials = st.builds(
    Trial,
    method=st.sampled_from(sorted(CONFIGS)),
    rank=st.sampled_from([2, 4, 8]),
    targets=st.sampled_from(TARGETS),
    seed=st.integers(0, 99),
    rate=st.sampled_from([1e-3, 1e-2]),
    decay=st.sampled_from([0.0, 0.1]),
    clip=st.sampled_from([0.0, 0.3]),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    rows=st.integers(1, 3),
    micro_batches=st.integers(1, 2),
    first=st.integers(0, 3),
    steps=st.integers(1, STEPS),
)


@given(st.lists(trials, min_size=1, max_size=5), st.sampled_from([64, 2**16]))
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_pack_equals_its_adapters_alone(chosen, tokens):
    base = llama().requires_grad_(False)
    for got, trial in zip(together(base, chosen, tokens), chosen, strict=True):
        assert_same_weights(got, alone(base, trial), 1e-5)


@pytest.mark.parametrize("make", [gpt2, lambda: MistralForCausalLM(mistral())], ids=["gpt2", "sliding window"])
def test_other_models(make):
    base = make().requires_grad_(False)
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    leaves = ["c_attn", "c_proj"] if hasattr(base, "transformer") else TARGETS[0]
    chosen = [Trial("lora", targets=leaves), Trial("ia3", targets=leaves, seed=3)]
    for got, trial in zip(together(base, chosen), chosen, strict=True):
        assert_same_weights(got, alone(base, trial), 1e-5)


def mistral() -> MistralConfig:
    sizes = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=8)


def test_dropout_does_not_depend_on_mates_or_passes():
    base = llama().requires_grad_(False)
    one = Trial("lora", dropout=0.3, micro_batches=2)
    mates = [one, Trial("lora", dropout=0.5, seed=5), Trial("oft", seed=6, first=2)]
    (by_itself,) = together(base, [one])
    in_company, *_ = together(base, mates, tokens=64)
    assert_same_weights(in_company, by_itself, 1e-5)
    (without,) = together(base, [Trial("lora", micro_batches=2)])
    with pytest.raises(AssertionError):
        assert_same_weights(without, by_itself, 1e-3)


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_dropout_drops_its_share_and_keeps_the_mean(share):
    torch.manual_seed(0)
    dropped = Dropout(share)(torch.ones(1000, 1001))
    assert (dropped == 0).float().mean().item() == pytest.approx(share, abs=0.003)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.003)
    assert len(dropped.unique()) == 2


def test_one_that_diverges_leaves_its_mates_as_they_are():
    base = llama().requires_grad_(False)

    def run(rate: float) -> tuple[list[PeftModel], list[str | None]]:
        pack, trials = Pack(base, CAUSAL), [Trial("lora"), Trial("lora", seed=1, rate=rate), Trial("oft", seed=2)]
        models, failures = [trial.model(base) for trial in trials], []
        for name, (trial, model) in enumerate(zip(trials, models, strict=True)):
            pack.add(str(name), model, trial.update(model))
        for step in range(STEPS):
            stepped = pack.step({name: trials[int(name)].batches(step) for name in pack.adapters})
            failures += [s.failure for s in stepped.values() if s.failure]
            if step == 1 and "1" in pack.adapters:
                pack.remove("1")
        return models, failures

    sound, none = run(1e-3)
    models, failures = run(1e30)
    assert none == []
    (reason,) = failures
    assert reason.endswith("at step 2")
    assert "nan" in reason or "inf" in reason or "not finite" in reason
    for name in (0, 2):
        assert_same_weights(models[name], sound[name], 0.0)


def test_bf16_base_in_company_equals_alone():
    base = llama().to(torch.bfloat16).requires_grad_(False)
    chosen = [Trial("lora"), Trial("adalora", seed=1), Trial("oft", seed=2), Trial("dora", seed=3)]
    for got, trial in zip(together(base, chosen), chosen, strict=True):
        (by_itself,) = together(base, [trial])
        assert_same_weights(got, by_itself, 2e-2)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_low_rank_products_over_a_quantised_base_are_made_for_all_at_once(bits, tiny_llama):
    base, called = load_base(ModelConfig(dtype="fp32", quantization=bits), tiny_llama).model, []
    chosen, pack = [Trial("lora", rank=4), Trial("lora", rank=8, seed=1)], Pack(base, CAUSAL)
    models = [trial.model(base) for trial in chosen]
    for i, (trial, model) in enumerate(zip(chosen, models, strict=True)):
        assert pack.add(str(i), model, trial.update(model)) is None
        for name, module in model.named_modules():
            if name.endswith("lora_A.default"):
                module.register_forward_pre_hook(lambda *_: called.append(1))
    for step in range(STEPS):
        pack.step({str(i): trial.batches(step) for i, trial in enumerate(chosen)})
    assert called == []
    if bits == "4bit":  # of 8, activations are rounded too, some columns by what all rows of a batch hold
        for got, trial in zip(models, chosen, strict=True):
            assert_same_weights(got, alone(base, trial), 1e-5)


def test_out_of_memory_makes_passes_smaller():
    base = llama().requires_grad_(False)
    chosen = [Trial("lora"), Trial("oft", seed=1), Trial("dora", seed=2)]
    wanted, pack = together(base, chosen), Pack(base, CAUSAL)

    def limit(module: Any, inputs: Any, keywords: dict[str, Any]) -> None:
        if keywords["input_ids"].shape[1] > 70:
            raise torch.OutOfMemoryError("CUDA out of memory")

    for replica in pack.replicas:
        replica.model.base_model.register_forward_pre_hook(limit, with_kwargs=True)
    models = [trial.model(base) for trial in chosen]
    for i, (trial, model) in enumerate(zip(chosen, models, strict=True)):
        pack.add(str(i), model, trial.update(model))
    for step in range(STEPS):
        pack.step({str(i): trial.batches(step) for i, trial in enumerate(chosen)})
    assert pack.tokens <= 70 * 2 * len(pack.replicas)
    for got, model in zip(models, wanted, strict=True):
        assert_same_weights(got, model, 1e-6)


def test_one_that_multiplies_by_itself_in_some_layers_only():
    """There the others' rows are a batch without its own; elsewhere they have the same places in a longer one."""
    base = llama().requires_grad_(False)
    chosen = [Trial("lora"), Trial("oft", seed=1, targets=["q_proj", "v_proj"])]
    for trial, model in zip(chosen, together(base, chosen), strict=True):
        assert_same_weights(model, alone(base, trial), 1e-5)


def test_one_that_is_too_much_for_the_memory_leaves_alone():
    base = llama().requires_grad_(False)
    chosen, pack = [Trial("lora", seed=1, rows=1), Trial("lora", seed=2, rows=9)], Pack(base, CAUSAL)

    def limit(module: Any, inputs: Any, keywords: dict[str, Any]) -> None:
        if keywords["input_ids"].shape[1] > 70:
            raise torch.OutOfMemoryError("CUDA out of memory")

    for replica in pack.replicas:
        replica.model.base_model.register_forward_pre_hook(limit, with_kwargs=True)
    models = [trial.model(base) for trial in chosen]
    for i, (trial, model) in enumerate(zip(chosen, models, strict=True)):
        pack.add(str(i), model, trial.update(model))
    for step in range(STEPS):
        stepped = pack.step({name: chosen[int(name)].batches(step) for name in pack.adapters})
        failures = {name: result.failure for name, result in stepped.items() if result.failure}
        assert failures == ({"1": "out of memory: one micro-batch at step 1"} if step == 0 else {})
    assert_same_weights(models[0], alone(base, chosen[0]), 1e-5)


@pytest.mark.parametrize("where", ["pass", "update", "validation"])
def test_memory_that_is_refused_to_one_changes_nothing_for_its_mates(where):
    """The allocator itself refuses, inside of one adapter's work."""
    base = llama().requires_grad_(False)
    chosen, pack = [Trial("lora"), Trial("loha", seed=1), Trial("oft", seed=2)], Pack(base, CAUSAL)
    wanted, tokens = together(base, [chosen[0], chosen[2]]), pack.tokens
    models = [trial.model(base) for trial in chosen]
    updates = [trial.update(model) for trial, model in zip(chosen, models, strict=True)]
    for i, (model, update) in enumerate(zip(models, updates, strict=True)):
        pack.add(str(i), model, update)

    def take(*args: Any) -> None:
        if where != "validation" or not models[1].training:
            torch.empty(2**58, dtype=torch.uint8)

    if where == "update":
        updates[1].optimizer.register_step_pre_hook(take)
    else:
        next(m for m in models[1].modules() if isinstance(m, BaseTunerLayer)).register_forward_pre_hook(take)
    for step in range(STEPS):
        stepped = pack.step({name: chosen[int(name)].batches(step) for name in pack.adapters})
        failures = {name: result.failure for name, result in stepped.items() if result.failure}
        if step == 0 and where != "validation":
            said = {"pass": "one micro-batch at step 1", "update": "the update of step 1"}[where]
            assert failures == {"1": f"out of memory: {said}"}
        else:
            assert not failures
        if where == "validation" and step == 1:
            batch = chosen[0].batches(0)[0]
            losses = pack.validation_sums(["0", "1", "2"], batch)
            assert losses[1] is None
            pack.remove("1")
            again = pack.validation_sums(["0", "2"], batch)
            assert [own for (own,) in again] == pytest.approx([losses[0][0], losses[2][0]], rel=1e-6)
    assert pack.tokens == tokens
    for got, model in zip([models[0], models[2]], wanted, strict=True):
        # it was in one pass with them, until it left: sums of other shapes round differently
        assert_same_weights(got, model, 0 if where == "pass" else 1e-6)


def hybrid():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config("qwen3_5_text", "CAUSAL_LM"))


@pytest.mark.parametrize("make", [llama, hybrid])
def test_recomputed_activations_change_nothing(make):
    base = make().requires_grad_(False)
    targets = TARGETS[1]
    chosen = [Trial("lora", dropout=0.3, targets=targets), Trial("oft", seed=1, targets=targets)]
    chosen += [Trial("lora", seed=2, dropout=0.1, micro_batches=2, targets=targets), Trial("prompt tuning", seed=3)]
    chosen += [Trial("dora", seed=4, dropout=0.2, targets=targets)]
    wanted = together(base, chosen, 150)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    for got, model in zip(together(base, chosen, 150), wanted, strict=True):
        assert_same_weights(got, model, 0.0)


def test_recomputed_activations_take_less_memory():
    base = llama(num_hidden_layers=8).requires_grad_(False)
    trial = Trial("lora", rows=20, dropout=0.1)

    def most() -> int:
        pack = Pack(base, CAUSAL)
        model = trial.model(base)
        pack.add("0", model, trial.update(model))
        return most_bytes(lambda: pack.step({"0": trial.batches(0)}))

    kept = most()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    assert most() < 0.35 * kept


def test_an_adapter_from_a_pack_is_a_plain_one(tmp_path):
    base = llama().requires_grad_(False)
    model, _ = together(base, [Trial("lora"), Trial("ia3")])
    model.save_pretrained(tmp_path)
    ids = torch.arange(2, 12)[None]
    again = PeftModel.from_pretrained(llama(), str(tmp_path))
    torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tokens", [100, 1000])
def test_losses_of_many_on_the_same_rows(tokens):
    base = llama().requires_grad_(False)
    pack = Pack(base, CAUSAL, tokens)
    some = {
        "a": Trial("lora"),
        "apart": Trial("lora on head", seed=3),
        "b": Trial("oft", seed=1),
        "c": Trial("dora", seed=2),
    }
    for name, trial in some.items():
        model = trial.model(base)
        pack.add(name, model, trial.update(model))
    batch = packed_row(torch.Generator().manual_seed(0), 4)
    losses = pack.validation_sums(list(some), batch)
    for name, (loss,) in zip(some, losses, strict=True):
        inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
        logits = pack.remove(name).eval()(**inputs, use_cache=False).logits
        wanted = F.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="sum").item()
        assert loss == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("prompt tuning", "PROMPT_TUNING adds tokens"),
        ("prefix tuning", "PREFIX_TUNING adds tokens"),
        ("lora and head", "parameters outside"),
        ("lora on head", "adapts lm_head"),
    ],
)
def test_what_cannot_share_a_batch_trains_between_the_others(method, reason):
    base = llama().requires_grad_(False)
    chosen = [Trial(method), Trial("oft", seed=1), Trial(method, seed=2, micro_batches=2)]
    pack = Pack(base, CAUSAL)
    for i, trial in enumerate(chosen):
        model = trial.model(base)
        why = pack.add(str(i), model, trial.update(model))
        assert (reason in why) if trial.method == method else why is None
    for got, trial in zip(together(base, chosen), chosen, strict=True):
        assert_same_weights(got, alone(base, trial), 1e-5)


@pytest.mark.parametrize("method", ["lora", "dora", "lora on head"])
def test_an_adapter_that_joins_is_asked_for_the_update_of_each_layer_once(method, monkeypatch):
    base, asked = llama().requires_grad_(False), []

    def counted(layer, *given):
        asked.append(layer)
        return update_of(layer, *given)

    monkeypatch.setattr("ftray.training.pack.update_of", counted)
    pack, trial = Pack(base, CAUSAL), Trial(method)
    model = trial.model(base)
    pack.add("a", model, trial.update(model))
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert [*map(id, asked)] == [*map(id, layers)]
    assert pack.adapters["a"].shares_generator == (method == "dora")


class Repeating(LlamaForCausalLM):
    """Makes the token before more likely: its logits don't follow from its last hidden states."""

    def forward(self, input_ids=None, **further):
        out = super().forward(input_ids=input_ids, **further)
        out.logits = out.logits + F.one_hot(input_ids, self.config.vocab_size).to(out.logits)
        return out


def test_models_that_cannot_be_shared_train_one_adapter_after_another():
    base = Repeating(llama().config).requires_grad_(False)
    assert "head is more" in Pack(base, CAUSAL).isolation_reason
    chosen = [Trial("lora"), Trial("lora", seed=1, micro_batches=2)]
    for got, trial in zip(together(base, chosen), chosen, strict=True):
        assert_same_weights(got, alone(base, trial), 1e-5)


def test_a_model_that_caps_its_logits_shares_its_passes():
    """By its own head; and padded, as its attention is capped too."""
    sizes = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    few = {"sliding_window": 64, "attn_implementation": "eager"}  # a record of the probe is longer than the window
    base = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, **few)).requires_grad_(False)
    assert (Pack(base, CAUSAL).isolation_reason, Pack(base, CAUSAL).padded) == (None, True)
    chosen = [Trial("lora"), Trial("lora", seed=1, micro_batches=2)]
    for got, trial in zip(together(base, chosen), chosen, strict=True):
        assert_same_weights(got, alone(base, trial), 1e-5)
