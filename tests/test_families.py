"""Families of models through all that ftray does with them; `make models` tries every one that transformers knows."""

from dataclasses import replace

import pytest
import torch
import transformers

from benchmarks.models import GOOD, study
from benchmarks.tiny_models import tiny_config
from ftray.adapters import merge
from ftray.adapters.methods import attach, layers_left_out
from ftray.adapters.targets import adapted_names, described, expert_parameters, resolve_targets
from ftray.compat.peft import taken_names
from ftray.config import AdapterConfig, ModelConfig
from ftray.errors import UserError
from ftray.models.limits import embedded_tokens
from ftray.models.load import LoadedModel, load_skeleton
from ftray.multi_adapter.shared_model import share
from ftray.task_spec import CAUSAL, TaskSpec

# how records of several adapters share a pass; for heads each adapter trains in passes of its own
FAMILIES = [
    ("llama", "CAUSAL_LM", "packed"),
    ("gpt2", "CAUSAL_LM", "packed"),
    ("granite", "CAUSAL_LM", "packed"),  # scales its logits
    ("gemma2", "CAUSAL_LM", "padded"),  # caps its logits and its attention
    ("gemma3", "CAUSAL_LM", "packed"),  # language model beside a tower
    ("gpt_oss", "CAUSAL_LM", "padded"),  # sinks
    ("deepseek_v3", "CAUSAL_LM", "packed"),  # latents, narrow values, names that PEFT takes for experts
    ("phimoe", "CAUSAL_LM", "packed"),  # a router that is a linear layer
    ("llama4", "CAUSAL_LM", "padded"),  # chunks; its base is not where its prefix says
    ("jamba", "CAUSAL_LM", "padded"),  # weights that are read past their layer
    ("qwen3_5_text", "CAUSAL_LM", "padded"),
    ("falcon", "CAUSAL_LM", "padded"),  # a mask of its own
    ("bart", "CAUSAL_LM", "padded"),  # attention to an encoder that is not there
    ("hunyuan_v1_moe", "CAUSAL_LM", "apart"),  # reads the weight of its router past the layer
    ("rwkv", "CAUSAL_LM", "padded"),  # rescales its weights for evaluation
    ("zamba", "CAUSAL_LM", "padded"),  # blocks that share their weights
    ("luke", "SEQ_CLS", "apart"),  # layers that no text needs
    ("bart", "SEQ_CLS", "apart"),  # reads the state of the end
    ("roberta", "SEQ_CLS", "apart"),  # a head of two layers
    ("bert", "TOKEN_CLS", "apart"),
    ("xlnet", "SEQ_CLS", "apart"),  # reads the last position, padding or not
    ("fnet", "TOKEN_CLS", "apart"),  # mixes all positions, padding too
    ("distilbert", "QUESTION_ANS", "apart"),
    ("big_bird", "QUESTION_ANS", "apart"),  # a head around what PEFT takes for the head
    ("t5", "SEQ_2_SEQ_LM", "apart"),
    ("fsmt", "SEQ_2_SEQ_LM", "apart"),  # looks for the end of the labels; with a cache it masks nothing
    ("switch_transformers", "SEQ_2_SEQ_LM", "apart"),  # experts that no token reaches
    ("encoder-decoder", "SEQ_2_SEQ_LM", "apart"),  # its configuration has neither words nor an end
    ("m2m_100", "SEQ_2_SEQ_LM", "apart"),  # does not say how it shifts labels
    ("t5gemma", "SEQ_2_SEQ_LM", "apart"),  # its head is tied to the decoder's words, not to the encoder's
]


@pytest.mark.parametrize(("kind", "task", "how"), FAMILIES)
def test_a_family_gets_what_its_records_get_alone(kind, task, how):
    found = study(kind, task)
    assert {name: cell for name, cell in found.items() if cell["verdict"] not in GOOD} == {}
    assert found["training"]["verdict"] == how


def tiny(kind: str):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(tiny_config(kind, "CAUSAL_LM")).requires_grad_(False).eval()


def lora(model, targets, dropout=0.0):
    base = model if isinstance(model, LoadedModel) else LoadedModel(model, CAUSAL, ())
    return attach(base, AdapterConfig(method="lora", target_modules=targets, rank=4, dropout=dropout), 10, 0)


@pytest.mark.parametrize(
    ("kind", "group", "names"),
    [
        ("qwen3_next", "mixer", {"in_proj_ba", "in_proj_qkvz", "out_proj"}),
        ("qwen3_next", "attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("deepseek_v3", "attention-qv", {"q_b_proj", "kv_b_proj"}),
        ("jamba", "mixer", {"in_proj", "x_proj", "out_proj"}),
        ("jamba", "mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("jamba", "attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("recurrent_gemma", "mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("recurrent_gemma", "mixer", {"linear_out", "linear_x", "linear_y"}),
        ("zamba2", "attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("axk2", "attention", {"q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_gate_proj"}),
        ("phimoe", "all-linear", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("bart", "attention", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"}),
    ],
)
def test_groups_are_read_off_the_structure(kind, group, names):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(kind, "CAUSAL_LM"))
    assert set(resolve_targets(model, group, None, taken_names(model, "LORA"))) == names


def test_towers_are_never_adapted():
    model = lora(tiny("gemma3"), "all-linear")
    assert all(name.startswith("model.language_model.layers.") for name in adapted_names(model))
    assert len(adapted_names(model)) == 2 * 7


def test_towers_within_an_encoder_are_never_adapted():
    with torch.device("meta"):
        model = transformers.AutoModelForSeq2SeqLM.from_config(tiny_config("t5gemma2", "SEQ_2_SEQ_LM"))
    model = lora(model, "all-linear")
    assert any("vision_tower" in name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    assert not any("vision" in name for name in adapted_names(model))


def test_a_model_without_a_table_of_embeddings_is_refused(tmp_path):
    transformers.AutoModel.from_config(tiny_config("canine", "SEQ_CLS")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="CanineForSequenceClassification has no table of token embeddings"):
        load_skeleton(ModelConfig(name=str(tmp_path)), str(tmp_path), TaskSpec("SEQ_CLS", ("A", "B"), 1))


def test_the_words_are_found_where_a_model_names_something_else():
    model = transformers.AutoModelForSequenceClassification.from_config(tiny_config("perceiver", "SEQ_CLS"))
    assert embedded_tokens(model) == model.config.vocab_size
    assert merge.made_up(model)


@pytest.mark.parametrize(
    ("kind", "task", "reason"),
    [
        ("reformer", "CAUSAL_LM", "a Reformer sorts tokens by hashes that it draws at random"),
        ("qwen2_audio", "SEQ_2_SEQ_LM", "a qwen2_audio model has no encoder and decoder: take another model"),
        ("llama", "SEQ_2_SEQ_LM", "a llama model has no encoder and decoder: take CAUSAL_LM"),
        ("t5", "CAUSAL_LM", "transformers has no t5 model for CAUSAL_LM"),
    ],
)
def test_what_no_task_can_be_learnt_with_is_refused_at_once(kind, task, reason, tmp_path):
    tiny_config(kind, task).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=reason):
        load_skeleton(ModelConfig(name=str(tmp_path)), str(tmp_path), TaskSpec(task))


def test_a_head_named_like_a_part_of_the_base_is_refused():
    """PEFT goes by the end of a name: it would train the head of the tower too."""
    model = transformers.AutoModelForSequenceClassification.from_config(tiny_config("modernvbert", "SEQ_CLS"))
    loaded = LoadedModel(model, TaskSpec("SEQ_CLS", ("A", "B"), 1), ("head", "classifier"))
    with pytest.raises(UserError, match=r"PEFT takes model\.vision_model\.head for the head"):
        lora(loaded, "all-linear")


@pytest.mark.parametrize(("kind", "sharing"), [("bert", "all"), ("xlnet", "equal"), ("fnet", "equal")])
def test_texts_of_a_batch_are_classified_as_alone(kind, sharing):
    """The right value is that of transformers for the text alone, without a mask."""
    torch.manual_seed(0)
    spec = TaskSpec("SEQ_CLS", ("A", "B"), 1)
    model = transformers.AutoModelForSequenceClassification.from_config(tiny_config(kind, "SEQ_CLS")).eval()
    task, texts = spec.load(), [[20, 21, 22, 23], [30, 31, 32, 33, 34, 35, 36], [40, 41, 42, 43]]
    probabilities = task.read(model, task.below(texts, [[]] * 3))
    for own, ids in zip(probabilities, texts, strict=True):
        torch.testing.assert_close(own, model(input_ids=torch.tensor([ids])).logits[0].softmax(-1), atol=1e-5, rtol=0)
    assert task.passes(model)[0] == sharing
    assert (task.passes(model)[1] is None) == (sharing == "all")


def test_experts_are_a_group_of_their_own():
    base = tiny("qwen2_moe")
    assert set(expert_parameters(base, "experts")) == {"gate_up_proj", "down_proj"}
    names = adapted_names(lora(share(base), ["attention-qv", "experts"]))
    assert {name.split(".", 3)[3] for name in names} == {
        "self_attn.q_proj",
        "self_attn.v_proj",
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    }
    assert not any("experts." in name for name in adapted_names(lora(share(base), "all-linear")))
    with pytest.raises(UserError, match="dropout"):
        lora(share(base), "experts", dropout=0.1)


def test_what_peft_takes_for_something_else_is_refused():
    """PEFT goes to the fused weights of all experts where a dense layer of such a name is asked for."""
    base = tiny("deepseek_v3")
    with pytest.raises(UserError, match="'mlp': PEFT takes down_proj, gate_proj, up_proj"):
        lora(share(base), "mlp")
    with pytest.raises(UserError, match=r"PEFT does not adapt model\.layers\.0\.mlp\.down_proj"):
        lora(share(base), ["gate_proj", "up_proj", "down_proj"])


def test_an_adapter_that_peft_would_not_load_again_is_refused():
    """PEFT renames this model's shared experts to what there is not, as it loads them."""
    with pytest.raises(UserError, match=r"would not load what it saves of .*shared_experts"):
        lora(tiny("laguna"), "all-linear")
    lora(tiny("laguna"), "attention")


def test_an_adapter_that_never_acts_is_refused():
    base = tiny("mamba")
    with pytest.raises(UserError, match=r"backbone\.layers\.0\.mixer\.dt_proj and 1 more.* '\[in_proj\]'"):
        lora(base, ["dt_proj", "in_proj"])


def with_and_without_weights(kind: str, task: str):
    """A model, and the same without weights, as a plan has it."""
    spec = TaskSpec(task, ("A", "B"), 1)
    auto, config = getattr(transformers, spec.load().auto_class), tiny_config(kind, task)
    made = auto.from_config(config).requires_grad_(False)
    with torch.device("meta"):
        planned = auto.from_config(config)
    return [LoadedModel(model, spec, ()) for model in (made, planned)]


def test_groups_leave_out_what_nothing_depends_on():
    """LUKE has projections for entities, which a text has none of: three in each of its two layers."""
    of_entities = ("w2e_query", "e2w_query", "e2e_query")
    unused = {f"luke.encoder.layer.{i}.attention.self.{name}" for i in range(2) for name in of_entities}
    for base in with_and_without_weights("luke", "SEQ_CLS"):
        model = base.model
        linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        assert base.idle_layers() & linears == unused
        with torch.device(model.device):
            adapted = lora(base, "all-linear")
        assert not unused & set(adapted_names(adapted))
        assert len(adapted_names(adapted)) == 2 * 6
        settings = AdapterConfig(method="lora", target_modules="all-linear")
        found = described(adapted, layers_left_out(settings, base))
        assert found.endswith("left out: 6 layers that the model never uses for this task")


@pytest.mark.parametrize(
    ("kind", "targets", "said"),
    [
        ("mixtral", "all-linear", ["left out: the weights of experts, which are the group 'experts'"]),
        ("mixtral", ["all-linear", "experts"], []),
        ("mixtral", "attention", []),
        ("llama", "all-linear", []),
        (
            "deepseek_v3",  # one dense block, and one of experts beside one that all tokens pass
            ["all-linear", "experts"],
            [
                "left out: model.layers.*.mlp.down_proj, model.layers.*.mlp.gate_proj, "
                "model.layers.*.mlp.shared_experts.down_proj, model.layers.*.mlp.shared_experts.gate_proj, "
                "model.layers.*.mlp.shared_experts.up_proj, model.layers.*.mlp.up_proj, "
                "whose names PEFT takes for something else"
            ],
        ),
    ],
)
def test_what_groups_leave_out_of_experts_is_told(kind, targets, said):
    base, settings = (
        LoadedModel(tiny(kind), CAUSAL, ()),
        AdapterConfig(method="lora", dropout=0.0, target_modules=targets),
    )
    parts = described(attach(replace(base, model=share(base.model)), settings, 10, 0), layers_left_out(settings, base))
    assert [part for part in parts.split("; ") if part.startswith("left out")] == said


def test_unused_layers_are_looked_for_once():
    base, calls = LoadedModel(tiny("llama"), CAUSAL, ()), []
    base.model.register_forward_hook(lambda *_: calls.append(1))
    assert base.idle_layers() == frozenset()
    for _ in range(3):
        lora(replace(base, model=share(base.model)), "all-linear")
    assert len(calls) == 1


def test_what_is_adapted_is_told_by_pattern_count_and_parameters():
    assert described(lora(tiny("llama"), "attention-qv")) == (
        "model.layers.*.self_attn.q_proj: 2 of 1,024 parameters; model.layers.*.self_attn.v_proj: 2 of 1,024 parameters"
    )


def test_a_group_that_a_model_lacks_is_refused_with_those_it_has():
    with pytest.raises(UserError, match="no such layers; it has mixer, all-linear, norms"):
        resolve_targets(tiny("mamba"), "attention")
