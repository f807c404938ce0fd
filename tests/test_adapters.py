import pytest
import torch
from conftest import bert, gpt2, llama, t5
from peft import PeftModel
from torch.nn import functional as F

from ftray.adapters.merge import merge, save_merged
from ftray.adapters.methods import METHODS, attach, parameters
from ftray.adapters.targets import resolve_targets
from ftray.config import AdapterConfig, ModelConfig
from ftray.errors import UserError
from ftray.models.load import load_base
from ftray.tasks.causal import collate

FP32 = ModelConfig(dtype="fp32")
VARIANTS = {
    "lora": {"method": "lora", "rank": 4, "dropout": 0.0},
    "lora-all": {"method": "lora", "rank": 4, "dropout": 0.0, "target_modules": "all-linear"},
    "rslora": {"method": "lora", "rank": 4, "dropout": 0.0, "use_rslora": True},
    "dora": {"method": "lora", "rank": 4, "dropout": 0.0, "use_dora": True},
    "adalora": {"method": "adalora", "initial_rank": 6, "target_rank": 3, "dropout": 0.0},
    "ia3": {"method": "ia3"},
    "oft": {"method": "oft", "block_size": 16},
}
OFT_GPT2 = ("oft", "tiny_gpt2")  # refused: PEFT has no OFT for Conv1D
RATE = {"ia3": 1e-1}


def ids(n: int = 24) -> torch.Tensor:
    return torch.randint(5, 300, (2, n), generator=torch.Generator().manual_seed(1))


def train(model, steps=12, rate=1e-2) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for step in range(steps):
        logits = model(ids()).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids()[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("name", "make"), [(n, m) for m in ("tiny_llama", "tiny_gpt2") for n in VARIANTS if (n, m) != OFT_GPT2]
)
def test_method_trains_saves_reloads_and_merges(name, make, tmp_path, request):
    path = request.getfixturevalue(make)
    adapter = AdapterConfig(**VARIANTS[name])
    model = attach(load_base(FP32, path), adapter, steps=12, seed=0)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert trainable
    assert all(p.dtype == torch.float32 for p in trainable)
    losses = train(model, rate=RATE.get(name, 1e-2))
    assert losses[-1] < losses[0] - 0.05

    model.eval()
    trained = model(ids()).logits
    with model.disable_adapter():
        assert not torch.allclose(model(ids()).logits, trained, atol=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    again = PeftModel.from_pretrained(load_base(FP32, path), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(ids()).logits, trained, rtol=0, atol=1e-6)

    merged = merge(again).eval()
    assert not any("lora" in n or "ia3" in n or "oft" in n for n, _ in merged.named_parameters())
    tolerance = METHODS[adapter.method].merge_tolerance * trained.abs().max().item()
    torch.testing.assert_close(merged(ids()).logits, trained, rtol=0, atol=tolerance)


def test_oft_on_conv1d_is_refused(tiny_gpt2):
    with pytest.raises(UserError, match="Conv1D layers of GPT2LMHeadModel"):
        attach(load_base(FP32, tiny_gpt2), AdapterConfig(method="oft"), steps=12, seed=0)


def test_adalora_ends_at_its_target_rank(tiny_llama):
    adapter = AdapterConfig(**VARIANTS["adalora"], target_modules="all-linear")
    model = attach(load_base(FP32, tiny_llama), adapter, steps=12, seed=0)
    train(model)
    pattern = model.base_model.peft_config["default"].rank_pattern
    kept = [sum(mask) for mask in pattern.values()]
    assert sum(kept) == 3 * len(kept)
    alive = [(p != 0).sum().item() for n, p in model.named_parameters() if "lora_E" in n]
    assert sum(alive) <= sum(kept)


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
        load_base(ModelConfig(quantization="4bit", **own), tiny_llama).model.layers[0].mlp.up_proj.weight.quant_state
        for own in ({}, {"quant_type": "fp4", "double_quantization": False})
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


@pytest.mark.parametrize("make", ["tiny_llama", "tiny_gpt2"])
def test_packed_records_do_not_see_each_other(make, request):
    model = load_base(FP32, request.getfixturevalue(make)).eval()
    records = [ids(n)[0].tolist() for n in (5, 11, 8)]
    packed = collate({"input_ids": records, "labels": records})
    together = model(input_ids=packed["input_ids"], position_ids=packed["position_ids"]).logits[0]
    alone = torch.cat([model(torch.tensor([record])).logits[0] for record in records])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
