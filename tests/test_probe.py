"""Models that mix the records of a packed row, beside models that don't: each gets what plain PEFT gives it alone."""

import pytest
import torch
import transformers
from conftest import llama, make_tokenizer
from helpers.packs import Trial, alone, assert_same_weights, together
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from ftray.config import EvaluationConfig
from ftray.evaluation.generation import generate
from ftray.multi_adapter.shared_model import share, trainable
from ftray.serving.engine import Engine, Sequence
from ftray.serving.generation_request import Sampling
from ftray.task_spec import CAUSAL
from ftray.tasks.causal import score
from ftray.training.optimizer import TorchOptimizer
from ftray.training.pack import Pack

SIZES = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 0,
}
LINEAR_ATTENTION = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

# name -> (class, configuration, changes, how its records share a pass, layers that an adapter is put on)
MODELS = {
    "gated delta net": (
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        LINEAR_ATTENTION,
        "padded",
        "q_proj v_proj in_proj_qkv",
    ),
    "short convolution": (
        "Lfm2ForCausalLM",
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention"]},
        "padded",
        "in_proj q_proj",
    ),
    "state space and experts": (
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 64, **MAMBA, **EXPERTS},
        "padded",
        "in_proj out_proj q_proj",
    ),
    "alibi": (
        "BloomForCausalLM",
        "BloomConfig",
        {"n_layer": 2, "n_head": 4, "hidden_dropout": 0.0},
        "padded",
        "query_key_value",
    ),
    "attention of its own": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "embed_dropout": 0.0,
            "resid_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        "padded",
        "q_proj v_proj",
    ),
    "attention sinks": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], **EXPERTS},
        "padded",
        "q_proj o_proj",
    ),
    "layers given rows without a batch": (
        "OPTForCausalLM",
        "OPTConfig",
        {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0},
        "packed",
        "q_proj fc1 fc2",
    ),
    "windows beside full attention": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "packed",
        "q_proj down_proj",
    ),
    "capped logits": ("Gemma2ForCausalLM", "Gemma2Config", {"head_dim": 16, "sliding_window": 8}, "padded", "q_proj"),
    "scaled logits": ("GraniteForCausalLM", "GraniteConfig", {"logits_scaling": 8.0}, "packed", "q_proj"),
    "values narrower than queries": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 12,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 2,
            "n_group": 1,
            "topk_group": 1,
        },
        "packed",
        "q_b_proj kv_b_proj o_proj",
    ),
}


def make(name: str):
    kind, config, changes, *_ = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**SIZES | changes))
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("name", MODELS)
def test_a_pack_equals_plain_peft_record_by_record(name):
    *_, how, targets = MODELS[name]
    base, chosen = (
        make(name),
        [Trial("lora", targets=targets.split(), rows=3), Trial("lora", rank=2, seed=4, targets=targets.split())],
    )
    pack = Pack(base, CAUSAL)
    assert ("apart" if pack.isolation_reason else "padded" if pack.padded else "packed") == how
    for got, trial in zip(together(base, chosen), chosen, strict=True):
        assert_same_weights(got, alone(base, trial), 2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_scoring_many_at_once_equals_one_by_one(name):
    base, rows = make(name), []
    draw = torch.Generator().manual_seed(3)
    for length in (4, 30, 11, 3, 17):
        ids = torch.randint(3, 300, (length,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]], "prompt_tokens": 2, "target": ""})
    wanted = []
    with torch.no_grad():
        for row in rows:
            logits = base(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            wanted.append(F.cross_entropy(logits[1:-1], torch.tensor(row["input_ids"][2:]), reduction="sum").item())
    scores = score(base, None, rows, EvaluationConfig(batch_size=32, generate=False))
    assert scores.loss == pytest.approx(wanted, rel=1e-5)
    assert scores.tokens.tolist() == [len(row["input_ids"]) - 2 for row in rows]


def test_a_leak_shows_in_bfloat16_too():
    assert Pack(make("state space and experts").to(torch.bfloat16), CAUSAL).padded
    assert not Pack(make("windows beside full attention").to(torch.bfloat16), CAUSAL).padded


def test_dropout_is_drawn_for_a_record_as_if_nothing_were_padded():
    """In a padded batch too, an adapter's draws don't depend on how long the records of its mates are."""
    base = make("gated delta net")
    one = Trial("lora", dropout=0.3, targets=["q_proj"])
    (by_itself,) = together(base, [one])
    beside, *_ = together(base, [one, Trial("lora", seed=5, rows=6, targets=["q_proj"])])
    assert_same_weights(beside, by_itself, 1e-5)


def test_an_adapter_that_changes_other_rows_trains_by_itself():
    """What the probe is for: a layer that looks at other rows than its own is found, whatever it is called."""
    base = llama().requires_grad_(False)
    pack = Pack(base, CAUSAL)
    model = get_peft_model(
        share(base), LoraConfig(r=4, use_dora=True, target_modules=["v_proj"], task_type="CAUSAL_LM")
    )
    layer = next(m for n, m in model.named_modules() if n.endswith("v_proj"))
    plain = layer.forward
    layer.forward = lambda x, *args, **kwargs: plain(x) + 0.1 * plain(x).cumsum(-2)
    why = pack.add("0", model, TorchOptimizer(model, torch.optim.AdamW(trainable(model))))
    assert "are off by" in why


def test_weights_are_as_before_after_the_probe():
    base = llama().requires_grad_(False)
    model = Trial("lora").model(base)
    before = [p.detach().clone() for p in model.parameters()]
    Pack(base, CAUSAL).add("0", model, Trial("lora").update(model))
    for now, then in zip(model.parameters(), before, strict=True):
        assert torch.equal(now, then)


def test_a_record_longer_than_the_window_is_tried_where_there_may_be_one():
    from ftray.models.probe import probe_records

    base = make("windows beside full attention")
    base.config.sliding_window = 64
    assert max(map(len, probe_records(base))) == 64 + 7
    assert max(map(len, probe_records(base, longest=64))) < 64


@pytest.mark.parametrize(("name", "pads"), [("capped logits", True), ("recurrent", False)])
def test_answers_many_at_once_equal_one_by_one(name, pads, monkeypatch):
    """A model that reads the padding before a prompt decodes prompts of equal length together, and no others."""
    tokenizer = make_tokenizer()
    base = make(name) if name in MODELS else recurrent()
    draw = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 300, (n,), generator=draw).tolist() for n in (4, 30, 11, 4, 17)]
    rows = [{"input_ids": ids, "prompt_tokens": len(ids)} for ids in prompts]
    wanted = []
    for ids in prompts:
        out = base.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=0, pad_token_id=1)
        wanted.append(tokenizer.decode([t for t in out[0, len(ids) :].tolist() if t], skip_special_tokens=True))
    widths = []
    plain = base.generate
    monkeypatch.setattr(base, "generate", lambda **kw: widths.append(kw["input_ids"].shape) or plain(**kw))
    assert generate(base, tokenizer, rows, EvaluationConfig(batch_size=32, max_new_tokens=8)) == wanted
    assert ((5, 30) in widths) == pads


def recurrent():
    torch.manual_seed(0)
    config = transformers.RwkvConfig(**{**SIZES, "attention_hidden_size": 64, "context_length": 512})
    return transformers.RwkvForCausalLM(config).requires_grad_(False).eval()


@pytest.mark.parametrize("name", [*MODELS, "recurrent"])
def test_served_answers_equal_those_of_the_model_alone(name):
    base, targets = (recurrent(), ["key"]) if name == "recurrent" else (make(name), MODELS[name][-1].split())
    engine = Engine(base, make_tokenizer(), slots=4)
    if name == "recurrent" or MODELS[name][3] != "packed":
        assert engine.isolation_reason
    adapter = Trial("lora", targets=targets, seed=7).model(base).eval()
    engine.add("lora", engine.prepare(adapter))
    draw, sequences = torch.Generator().manual_seed(2), []
    for owner, length in (("lora", 20), (None, 5), ("lora", 3), (None, 14)):
        prompt = torch.randint(3, 300, (length,), generator=draw).tolist()
        sequences.append(Sequence(prompt, 6, Sampling(temperature=0.0), lambda delta: None, owner))
        engine.submit(sequences[-1])
    while engine.busy:
        engine.step()
    for sequence in sequences:
        model, ids = adapter if sequence.adapter else base, torch.tensor([sequence.prompt])
        settings = {"max_new_tokens": 6, "do_sample": False, "use_cache": False, "pad_token_id": 1, "eos_token_id": 0}
        wanted = model.generate(input_ids=ids, **settings)[0].tolist()
        assert sequence.ids == wanted
