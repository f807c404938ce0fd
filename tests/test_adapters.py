from dataclasses import replace

import pytest
import torch
from conftest import bert, gpt2, llama, t5
from torch.nn import functional as F

from ftray.adapters.merge import save_merged
from ftray.adapters.methods import attach, parameters
from ftray.adapters.targets import resolve_targets
from ftray.config import AdapterConfig, ModelConfig
from ftray.errors import UserError
from ftray.models.load import load_base
from ftray.multi_adapter.shared_model import share
from ftray.task_spec import TaskSpec
from ftray.training.pack import Pack

FP32 = ModelConfig(dtype="fp32")


def ids(n: int = 24) -> torch.Tensor:
    return torch.randint(5, 300, (2, n), generator=torch.Generator().manual_seed(1))


def train(model, steps=12, rate=1e-2) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        logits = model(ids()).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids()[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_oft_on_conv1d_is_refused(tiny_gpt2):
    with pytest.raises(UserError, match="Conv1D layers of GPT2LMHeadModel"):
        attach(load_base(FP32, tiny_gpt2), AdapterConfig(method="oft"), steps=12, seed=0)


def test_a_head_that_the_base_lacks_is_trained_and_none_is_forgotten(tiny_llama):
    base = load_base(FP32, tiny_llama, TaskSpec("SEQ_CLS", ("a", "b"), 1))
    for own in (base, replace(base, model=share(base.model))):  # as a search trains it, and a pack
        model = attach(own, AdapterConfig(method="lora"), 10, 0)
        head = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
        assert head == ["base_model.model.score.modules_to_save.default.weight"]
    with pytest.raises((AttributeError, UserError)):  # nobody said what it lacks
        attach(base.model, AdapterConfig(method="lora"), 10, 0)
    with pytest.raises(TypeError, match="task"):
        Pack(base.model)


def test_initialisation_depends_on_the_seed_alone(tiny_llama):
    def first(seed: int) -> torch.Tensor:
        torch.rand(seed + 7)  # whatever the global generator did before
        model = attach(load_base(FP32, tiny_llama), AdapterConfig(method="lora"), 10, seed)
        return next(p for n, p in model.named_parameters() if "lora_A" in n).detach()

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))


@pytest.mark.parametrize("settings", [{"quantization": "4bit"}, {"quantization": "8bit"}], ids=str)
def test_merging_dequantises_and_says_so(tiny_llama, tmp_path, settings, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cfg = ModelConfig(dtype="fp32", **settings)
    model = attach(load_base(cfg, tiny_llama), AdapterConfig(method="lora", target_modules="all-linear"), 10, 0)
    losses = train(model)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    save_merged(cfg, tiny_llama, tmp_path / "adapter", tmp_path / "merged")
    assert "base is dequantised first" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32
    assert not hasattr(merged.config, "quantization_config")
    again, trained = merged(ids()).logits, model.eval()(ids()).logits
    # what bitsandbytes' own products of rounded activations differ from plain ones
    assert (again - trained).abs().max() < 0.01 * trained.abs().max()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


def test_4bit_settings_reach_the_base(tiny_llama):
    states = [
        base.model.get_submodule("model.layers.0.mlp.up_proj").weight.quant_state
        for own in ({}, {"quant_type": "fp4", "double_quantization": False})
        for base in [load_base(ModelConfig(quantization="4bit", **own), tiny_llama)]
    ]
    assert [state.quant_type for state in states] == ["nf4", "fp4"]
    assert [state.nested for state in states] == [True, False]


@pytest.mark.parametrize(
    ("model", "spec", "names"),
    [
        (llama, "attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (llama, "attention-qv", {"q_proj", "v_proj"}),
        (llama, "attention-kv", {"k_proj", "v_proj"}),
        (llama, "mlp", {"gate_proj", "up_proj", "down_proj"}),
        (llama, "mlp-down", {"down_proj"}),
        (llama, ["q_proj", "mlp-down"], {"q_proj", "down_proj"}),
        (llama, r"model\.layers\.1\..*q_proj", {"model.layers.1.self_attn.q_proj"}),
        (gpt2, "attention", {"c_attn", "attn.c_proj"}),
        (gpt2, "mlp", {"c_fc", "mlp.c_proj"}),
        (gpt2, "attention-qv", {"c_attn"}),
        (bert, "attention-qv", {"query", "value"}),
        (bert, "attention", {"query", "key", "value", "attention.output.dense"}),
        (t5, "attention", {"q", "k", "v", "o"}),
        (t5, "mlp", {"wi", "wo"}),
    ],
)
def test_target_groups_are_read_off_the_model(model, spec, names):
    assert set(resolve_targets(model(), spec)) == names


@pytest.mark.parametrize("model", [llama, gpt2, bert, t5])
def test_all_linear_is_every_linear_layer_but_the_head(model):
    from peft import LoraConfig, get_peft_model

    base = model()
    inside = {n for n, m in base.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and ".layer" in f".{n}"}
    inside |= {n for n, m in base.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and ".h." in n}
    inside |= {n for n, m in base.named_modules() if type(m).__name__ == "Linear" and ".block." in n}
    adapted = get_peft_model(base, LoraConfig(target_modules=resolve_targets(base, "all-linear")))
    assert {n.removeprefix("base_model.model.") for n, m in adapted.named_modules() if hasattr(m, "lora_A")} == inside
    assert not any("head" in n for n in inside)


def test_blocks_are_chosen_by_number():
    assert resolve_targets(llama(), "attention-qv", [1]) == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    with pytest.raises(UserError, match="none of the target modules is in a block 2"):
        resolve_targets(llama(), "attention", [0, 2])


def test_unknown_names_are_refused_with_near_ones():
    for adapter, what in [
        ({"method": "lorra"}, "did you mean lora"),
        ({"method": "lora", "rnk": 4}, "lora has no such parameter; did you mean rank"),
        ({"method": "lora", "rank": 0}, "greater than 0"),
        ({"method": "ia3", "rank": 4}, "ia3 has no such parameter"),
    ]:
        with pytest.raises(UserError, match=what):
            parameters(AdapterConfig(**adapter))
    with pytest.raises(UserError, match="did you mean attention"):
        resolve_targets(llama(), "atention")
    with pytest.raises(UserError, match="did you mean q_proj"):
        resolve_targets(llama(), ["q_prj"])
