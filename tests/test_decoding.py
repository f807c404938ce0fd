"""Answers of many adapters that train, decoded together, against transformers.generate for each alone."""

import copy

import pytest
import torch
from conftest import gpt2, llama, make_tokenizer
from helpers.packs import APART, CONFIGS, TARGETS, Trial
from peft import get_peft_model_state_dict

from ftray.config import EvaluationConfig
from ftray.evaluation.generation import generate
from ftray.multi_adapter.decoding import PackDecoder
from ftray.multi_adapter.shared_model import trainable
from ftray.task_spec import CAUSAL
from ftray.training.pack import Pack

LENGTHS = (3, 40, 7, 7, 90, 21)


def rows_of(lengths=LENGTHS):
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(2, 300, (length,), generator=draw).tolist() for length in lengths]
    return [{"input_ids": [*own, 5, 6], "prompt_tokens": len(own), "target": ""} for own in ids]


def counted(base):
    """The passes of a model and of all that shares its weights."""
    passes: list[int] = []
    base.get_input_embeddings().register_forward_pre_hook(lambda *_: passes.append(1))
    return passes


@pytest.mark.parametrize(
    ("base", "targets"), [(llama(), TARGETS[2]), (gpt2(), ["c_attn", "c_proj", "c_fc"])], ids=["llama", "gpt2"]
)
def test_each_adapter_answers_what_it_answers_alone_in_the_passes_of_one(base, targets):
    base.requires_grad_(False)
    passes, rows, tokenizer = counted(base), rows_of(), make_tokenizer()
    cfg = EvaluationConfig(max_new_tokens=12, batch_size=len(rows))
    methods = CONFIGS if base.config.model_type == "llama" else ("lora", "rslora", "dora")  # not on its Conv1D
    models = {f"{m}-{i}": Trial(m, rank=2 + i, targets=targets, seed=i).model(base) for i, m in enumerate(methods)}
    alone = {name: generate(model.eval(), tokenizer, rows, cfg) for name, model in models.items()}
    assert len(passes) >= len(models) * cfg.max_new_tokens
    assert len({tuple(answers) for answers in alone.values()}) == len(models)  # they do differ
    decoder = PackDecoder(base, tokenizer, cfg)
    assert decoder.isolation_reason is None
    assert decoder.answers(models, rows) == alone
    passes.clear()  # now each kind of adapter was tried
    assert decoder.answers(models, rows) == alone
    assert len(passes) == cfg.max_new_tokens  # a token of all sequences of all adapters each


def test_few_slots_give_the_same_answers_in_more_passes():
    base = llama().requires_grad_(False)
    passes, rows, tokenizer = counted(base), rows_of(), make_tokenizer()
    models = {str(i): Trial("lora", seed=i).model(base).eval() for i in range(3)}
    found = {}
    for size in (1, 4):
        decoder = PackDecoder(base, tokenizer, EvaluationConfig(max_new_tokens=12, batch_size=size))
        decoder.answers(models, rows)
        passes.clear()
        found[size] = decoder.answers(models, rows), len(passes)
    assert found[1][0] == found[4][0]
    assert (found[1][1], found[4][1]) == (18 // 3 * 12, 18 // 12 * 12 + 12)  # 18 sequences in 3 and in 12 slots


@pytest.mark.parametrize("method", APART)
def test_one_that_can_share_no_pass_answers_beside_the_others(method):
    base = llama().requires_grad_(False)
    rows, tokenizer, cfg = rows_of(), make_tokenizer(), EvaluationConfig(max_new_tokens=6)
    models = {"lora": Trial("lora").model(base).eval(), method: Trial(method).model(base).eval()}
    alone = {name: generate(model, tokenizer, rows, cfg) for name, model in models.items()}
    assert PackDecoder(base, tokenizer, cfg).answers(models, rows) == alone


def test_a_base_with_settings_that_only_generate_heeds_is_decoded_by_it():
    base = llama().requires_grad_(False)
    base.generation_config.repetition_penalty = 1.5
    rows, tokenizer, cfg = rows_of(), make_tokenizer(), EvaluationConfig(max_new_tokens=8)
    model = Trial("lora").model(base).eval()
    decoder = PackDecoder(base, tokenizer, cfg)
    assert decoder.isolation_reason == "generation_config.json sets repetition_penalty"
    assert decoder.answers({"a": model}, rows)["a"] == generate(model, tokenizer, rows, cfg)


def test_a_learnt_table_of_positions_ends_an_answer():
    base = gpt2().requires_grad_(False)
    rows, tokenizer, cfg = rows_of((510, 512, 30)), make_tokenizer(), EvaluationConfig(max_new_tokens=6)
    model = Trial("lora", targets=["c_attn"]).model(base).eval()
    alone = [generate(model, tokenizer, [row], cfg)[0] for row in rows]
    assert alone[1] == ""
    assert PackDecoder(base, tokenizer, cfg).answers({"a": model}, rows)["a"] == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_trains_is_left_as_it_was(dtype):
    """Weights to the last bit, dropout and the draws of a later step."""
    trials = [Trial("lora", dropout=0.3), Trial("oft"), Trial("prefix tuning")]
    reached = []
    for decodes in (False, True):
        base = llama().to(dtype).requires_grad_(False)
        pack = Pack(base, CAUSAL)
        models = {t.method: t.model(base) for t in trials}
        for model in models.values():
            for parameter in trainable(model):
                parameter.data = parameter.data.float()
        for t in trials:
            pack.add(t.method, models[t.method], t.update(models[t.method]), t.seed)
        pack.step({t.method: t.batches(0) for t in trials})
        if decodes:
            before = copy.deepcopy({name: get_peft_model_state_dict(model) for name, model in models.items()})
            PackDecoder(base, make_tokenizer(), EvaluationConfig(max_new_tokens=4)).answers(models, rows_of())
            for name, weights in before.items():
                after = get_peft_model_state_dict(models[name])
                assert all(torch.equal(weights[key], after[key]) for key in weights)
        pack.step({t.method: t.batches(1) for t in trials})
        reached.append({name: get_peft_model_state_dict(model) for name, model in models.items()})
    for name, weights in reached[0].items():
        assert all(torch.equal(weights[key], reached[1][name][key]) for key in weights), name


def test_an_adapter_whose_output_is_not_finite_spoils_no_other():
    base = llama().requires_grad_(False)
    rows, tokenizer, cfg = rows_of(), make_tokenizer(), EvaluationConfig(max_new_tokens=6)
    models = {str(i): Trial("lora", seed=i).model(base).eval() for i in range(2)}
    alone = generate(models["0"], tokenizer, rows, cfg)
    trainable(models["1"])[0].data.fill_(float("nan"))
    assert PackDecoder(base, tokenizer, cfg).answers(models, rows)["0"] == alone


def test_the_time_of_an_answer_is_that_of_one_alone():
    base = llama().requires_grad_(False)
    passes, tokenizer = counted(base), make_tokenizer()
    model = Trial("lora").model(base).eval()
    for tokens in (2, 40):
        decoder = PackDecoder(base, tokenizer, EvaluationConfig(max_new_tokens=tokens))
        decoder.seconds(model, rows_of())
        passes.clear()
        assert 0 < decoder.seconds(model, rows_of()) < 5
        assert len(passes) <= tokens * (1 + len(LENGTHS))
        assert len(passes) > tokens * len(LENGTHS) / 2
