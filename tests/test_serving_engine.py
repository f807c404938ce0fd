"""Many sequences of many adapters answered together, against transformers.generate for each alone."""

import json
import math
import subprocess
import sys

import jsonschema
import pytest
import torch
from conftest import gpt2, llama, make_tokenizer
from helpers.engines import asked, run, text_of
from helpers.packs import APART, CONFIGS, TARGETS, Trial
from helpers.servers import generated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from ftray.errors import UserError
from ftray.multi_adapter.served_linear import ServedLinear
from ftray.serving.adapters import load_adapter
from ftray.serving.engine import Engine
from ftray.serving.generation_request import Rendering
from ftray.serving.logits import Grammars
from ftray.serving.registry import check_name
from ftray.serving.sampling import token_bytes
from ftray.task_spec import TaskSpec

SMALL = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "eos_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def gemma2():
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, **HEADS, head_dim=16, attn_implementation="eager"))


def mistral():
    return MistralForCausalLM(MistralConfig(**SMALL, **HEADS, sliding_window=8))


def engine_of(base, methods=(), targets=TARGETS[2], **settings):
    engine = Engine(base.requires_grad_(False), make_tokenizer(), **settings)
    for i, method in enumerate(methods):
        engine.add(method, engine.prepare(Trial(method, targets=targets, seed=i).model(base).eval()))
    return engine


def prompts(count, longest=40):
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest, (count,), generator=draw).tolist()
    return [torch.randint(2, 300, (n,), generator=draw).tolist() for n in lengths]


def assert_as_alone(engine, names, at=(), longest=40, max_tokens=12):
    given = prompts(len(names), longest)
    sequences = [asked(p, name, max_tokens=max_tokens) for p, name in zip(given, names, strict=True)]
    got = run(engine, sequences, at)
    for name, prompt, tokens in zip(names, given, got, strict=True):
        model = engine.adapters[name].model if name else engine.base
        assert tokens == generated(model, prompt, max_tokens), name
    assert not engine.busy


def test_an_adapter_ends_where_its_own_template_ends_a_turn_and_the_base_does_not():
    engine = engine_of(llama(), ["lora"])
    prompt = [5, 6, 7]
    (whole,) = run(engine, [asked(prompt, "lora", max_tokens=12)])
    end = next(token for token in whole if token not in engine.ends)
    engine.adapters["lora"].ends = frozenset({end})
    base = generated(engine.base, prompt, 12)
    assert run(engine, [asked(prompt, "lora", max_tokens=12), asked(prompt, max_tokens=12)]) == [
        whole[: whole.index(end) + 1],
        base,
    ]
    tokenizer = make_tokenizer()
    other = "{% for m in messages %}{{ m.content }}<|pad|>{% endfor %}"
    assert Rendering(tokenizer, TaskSpec(template="chat", chat_template=other)).ends == {1}
    assert Rendering(tokenizer, None).ends == frozenset()


def test_every_method_beside_the_others_joining_at_different_times():
    engine = engine_of(llama(), CONFIGS, slots=5, prompt_tokens=16)
    names = [None, *CONFIGS, "lora", None, "oft", "dora"]
    assert not any(adapter.isolation_reason for adapter in engine.adapters.values())
    assert_as_alone(engine, names, at=[0, 0, 0, 2, 3, 3, 5, 9, 9, 9, 14, 20, 20])


def test_what_cannot_share_a_batch_is_answered_by_itself():
    engine = engine_of(llama(), [*APART, "lora"])
    assert [a.isolation_reason is None for a in engine.adapters.values()] == [False] * len(APART) + [True]
    assert_as_alone(engine, [*APART, "lora", None, *APART])


@pytest.mark.parametrize("found", [True, False])
def test_an_adapter_that_begins_at_its_invocation_tokens_goes_on_to_the_end(monkeypatch, found):
    def activated(rank, targets):
        return LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM", alora_invocation_tokens=[7, 8])

    monkeypatch.setitem(CONFIGS, "alora", activated)
    engine = engine_of(llama(), ["alora", "lora"])
    prompt = [5, 6, 7, 8, 9, 10] if found else [5, 6, 7, 9, 8, 10]
    got = run(engine, [asked(prompt, "alora"), asked(prompt, "lora"), asked(prompt)])
    models = [engine.adapters["alora"].model, engine.adapters["lora"].model, engine.base]
    assert got == [generated(model, prompt, 16) for model in models]
    assert (got[0] == got[2]) == (not found)


@pytest.mark.parametrize(
    ("make", "targets"), [(gpt2, ["c_attn", "c_proj"]), (mistral, TARGETS[2]), (gemma2, TARGETS[2])]
)
def test_other_models(make, targets):
    if make is gpt2:
        targets = ["c_attn", "mlp.c_proj"]
    engine = engine_of(make(), ["lora"], targets, prompt_tokens=10)
    assert bool(engine.isolation_reason) == (make is gemma2)
    assert_as_alone(engine, ["lora", None, "lora"], at=[0, 1, 4])


def test_slots_grow_with_what_they_hold():
    engine = engine_of(llama(), ["lora"], slots=3)
    assert_as_alone(engine, ["lora", None, "lora", None, "lora"], longest=400, max_tokens=30)


def test_who_goes_away_frees_the_slot():
    engine = engine_of(llama(), ["lora"], slots=1)
    first, second = asked([5, 6, 7], "lora", max_tokens=400), asked([5, 6, 7], "lora", max_tokens=5)
    engine.submit(first)
    engine.submit(second)
    engine.step()
    assert not second.deltas
    engine.cancel(first)
    engine.remove("lora")  # goes with the last that asked for it
    while engine.busy:
        engine.step()
    assert sum(delta.count for delta in second.deltas) == 5
    assert second.deltas[-1].finish in ("length", "stop")
    assert not engine.adapters
    assert_as_alone(engine, [None])


@pytest.mark.parametrize("method", ["rslora", "adalora", "dora", "ia3", "oft"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_an_adapter_that_is_not_finite_ends_its_own_answers_alone(method, value):
    engine = engine_of(llama(), ["lora", method])
    for parameter in engine.adapters[method].model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(float(value))
    bad, good = asked([7] * 50, method), asked([5, 6], "lora", max_tokens=20)
    got = run(engine, [bad, good])
    assert "not finite" in bad.deltas[-1].error
    assert got[1] == generated(engine.adapters["lora"].model, [5, 6], 20)
    assert_as_alone(engine, ["lora", None, "lora"], longest=60)


def test_an_adapter_that_would_answer_otherwise_beside_others_is_read_by_itself(monkeypatch):
    forward = ServedLinear.forward
    monkeypatch.setattr(ServedLinear, "forward", lambda self, x: 1.01 * forward(self, x))
    engine = engine_of(llama(), ["lora", "ia3"])
    assert "beside others are off by" in engine.adapters["lora"].isolation_reason
    monkeypatch.undo()
    assert_as_alone(engine, ["lora", None, "ia3", "lora"])


def test_an_adapter_of_not_a_number_says_nothing_of_others_of_its_kind():
    engine = engine_of(llama())
    broken, sound = (Trial("lora", seed=seed).model(engine.base).eval() for seed in range(2))
    for parameter in broken.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(math.nan)
    assert engine.prepare(broken).isolation_reason is None
    assert engine.prepare(sound).isolation_reason is None


def test_seeds_decide_whatever_else_is_in_the_batch():
    engine = engine_of(llama(), ["lora"])
    settings = {"temperature": 1.3, "top_p": 0.9, "max_tokens": 10}
    alone = run(engine, [asked([9, 8, 7], "lora", seed=3, **settings)])[0]
    crowd = [asked([9, 8, 7], "lora", seed=seed, **settings) for seed in (1, 3, 3, None)]
    got = run(engine, [*crowd, asked([4, 4], None, max_tokens=8)])
    assert got[1] == got[2] == alone
    assert got[0] != alone


def by_hand(model, prompt, count, change):
    """Greedy tokens, where `change` gives the logits that count, of the model's and the tokens so far."""
    ids = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([ids])).logits[0, -1]
        ids.append(int(change(logits.tolist(), ids[len(prompt) :]).argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def test_penalties_and_biases_are_those_of_the_reference():
    """Frequency and presence as OpenAI's reference has them, of the answer alone; repetition as `generate` has it."""
    engine, (prompt,) = engine_of(llama(), ["lora"]), prompts(1)
    model = engine.adapters["lora"].model
    plain = generated(model, prompt, 12)
    bias = {plain[0]: -100.0, 7: 0.05}

    def penalised(logits, answer):
        return torch.tensor(
            [
                value + bias.get(token, 0) - 0.3 * answer.count(token) - 0.2 * (token in answer)
                for token, value in enumerate(logits)
            ]
        )

    asks = [
        asked(prompt, "lora", 12),
        asked(prompt, "lora", 12, frequency_penalty=0.3, presence_penalty=0.2, logit_bias=bias),
        asked(prompt, "lora", 12, repetition_penalty=1.7),
        asked(prompt, None, 12, repetition_penalty=1.7),
    ]
    got = run(engine, asks)
    wanted = by_hand(model, prompt, 12, penalised)
    assert got[:2] == [plain, wanted[: len(got[1])]]
    assert got[1] != plain
    for own, tokens in ((model, got[2]), (engine.base, got[3])):
        given = torch.tensor([prompt])
        answer = own.generate(input_ids=given, max_new_tokens=12, do_sample=False, repetition_penalty=1.7)
        assert tokens == answer[0, len(prompt) :].tolist()
    assert got[2] != plain


SCHEMAS = {
    "object": {"type": "object", "properties": {"a": {"enum": ["x", "yy"]}}, "required": ["a"]},
    "number": {"type": "integer", "minimum": 10, "maximum": 999},
    "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
}


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_conforms_to_its_schema_and_ends_with_it(name, temperature):
    """Whatever else is in the batch, which answers as it does without."""
    engine = engine_of(llama(), ["lora", "ia3"])
    given = [engine.tokenizer(text)["input_ids"] for text in ("the cat", "a b c", "sat on")]
    matcher = Grammars(engine.tokenizer, 384).of_schema(json.dumps(SCHEMAS[name]), engine.ends)
    asks = [
        asked(prompt, own, 200, temperature=temperature, seed=3)
        for prompt, own in zip(given, ("lora", None), strict=False)
    ]
    for sequence in asks:
        sequence.matcher = matcher.deep_copy()
    beside = [asked(given[2], "lora", 12), asked(given[2], "ia3", 12)]
    run(engine, asks + beside)
    for sequence in asks:
        text = text_of(sequence)
        jsonschema.validate(json.loads(text), SCHEMAS[name])
        assert sequence.deltas[-1].finish == "stop"
    for sequence in beside:
        assert sequence.ids[len(given[2]) :] == generated(engine.adapters[sequence.adapter].model, given[2], 12)


@pytest.mark.parametrize("schema", [{"not": {"const": 1}}, {"type": "nonsense"}, {"$ref": "http://a/b"}])
def test_what_of_a_schema_can_not_be_held_to_is_refused(schema):
    with pytest.raises(ValueError, match=r"not|nonsense|http://a/b"):
        Grammars(make_tokenizer(), 384).of_schema(json.dumps(schema), frozenset({0}))


def test_steps_do_not_look_up_factors_again(monkeypatch):
    """Of a layer, an adapter and a token: on a small model that took a tenth of a step."""
    engine = engine_of(llama(), ["lora", "adalora", "ia3"])
    asks = [asked([9, 8, 7], name, 4) for name in ("lora", "adalora", "ia3")]
    for module in ("served_linear", "shared_linear"):
        monkeypatch.setattr(f"ftray.multi_adapter.{module}.update_of", lambda *given: pytest.fail("looked up again"))
    assert run(engine, asks) == [generated(engine.adapters[s.adapter].model, [9, 8, 7], 4) for s in asks]


def test_top_p_leaves_the_unlikely_out():
    engine = engine_of(llama())
    sure = asked([9, 8, 7], temperature=1.0, top_p=1e-6, max_tokens=6)
    assert run(engine, [sure])[0] == generated(engine.base, [9, 8, 7], 6)


@pytest.mark.parametrize("prompt_tokens", [256, 4])
def test_echoed_log_probabilities_are_the_models(prompt_tokens):
    engine = engine_of(llama(), ["lora", "prompt tuning"], prompt_tokens=prompt_tokens)
    prompt = prompts(1)[0]
    for name in ("lora", "prompt tuning"):
        sequence = asked(prompt, name, max_tokens=3, echo=True, logprobs=2)
        run(engine, [sequence])
        tokens = [t for delta in sequence.deltas for t in delta.tokens]
        texts = [engine.tokenizer.decode([token]) for token in range(384)]
        assert [t.data.decode(errors="replace") for t in tokens] == [texts[token] for token in sequence.ids]
        assert "".join(delta.text for delta in sequence.deltas).startswith(
            engine.tokenizer.decode([token for token in prompt if token != engine.tokenizer.pad_token_id])
        )
        logits = engine.adapters[name].model(torch.tensor([sequence.ids])).logits[0, -len(tokens) :].float()
        wanted = torch.log_softmax(logits, -1)
        assert tokens[0].logprob is None
        for place, (token, own) in enumerate(zip(tokens[1:], sequence.ids[1:], strict=True)):
            likeliest = wanted[place].topk(2)
            assert token.logprob == pytest.approx(wanted[place, own].item(), abs=1e-4)
            assert [data.decode(errors="replace") for data, _ in token.top] == [texts[i] for i in likeliest.indices]
            assert [logprob for _, logprob in token.top] == pytest.approx(likeliest.values.tolist(), abs=1e-4)
    nothing_more = asked(prompt, "lora", max_tokens=0, echo=True, logprobs=0)
    run(engine, [nothing_more])
    (delta,) = nothing_more.deltas
    assert [t.data.decode(errors="replace") for t in delta.tokens] == [texts[token] for token in prompt]
    said = [token for token in prompt if token != engine.tokenizer.pad_token_id]
    assert (delta.text, delta.count) == (engine.tokenizer.decode(said), 0)
    assert nothing_more.deltas[-1].finish == "length"


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 9.9e-6, 1e-5, 1.1e-5])  # the last two are drawn
@pytest.mark.parametrize("top_p", [1.0, 5e-324])
def test_next_to_no_temperature_takes_the_likeliest(temperature, top_p):
    engine = engine_of(llama())
    cold, warm = asked([9, 8, 7], temperature=temperature, top_p=top_p, max_tokens=6), asked([9, 8, 7], max_tokens=6)
    assert run(engine, [cold, warm]) == [generated(engine.base, [9, 8, 7], 6)] * 2


def sentencepiece() -> PreTrainedTokenizerFast:
    """Writes a blank as a letter, drops the first one of a text, and has a token for each byte."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {piece: 256 + i for i, piece in enumerate(["▁", "a", "t", "h", "e", "th", "the", "▁the"])}
    pieces = Tokenizer(models.BPE(vocab, [("t", "h"), ("th", "e"), ("▁", "the")], byte_fallback=True))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    pieces.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=pieces)


@pytest.mark.parametrize("kind", [make_tokenizer, sentencepiece])
def test_the_bytes_of_tokens_are_those_of_the_text(kind):
    tokenizer, text = kind(), "the theé 🙂 the\n�~"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = [token_bytes(tokenizer, token) for token in ids]
    assert b"".join(parts).decode().removeprefix(" ") == text  # a blank before the first word is SentencePiece's
    assert len(parts) > len(text) - text.count("the") * 3
    assert b"\xf0" in b"".join(part for part in parts if len(part) == 1)  # an emoji is no token of either


def test_more_alternatives_than_there_are_tokens():
    engine = Engine(llama(vocab_size=12).requires_grad_(False), make_tokenizer())
    sequence = asked([2, 3], max_tokens=3, logprobs=20, echo=True)
    run(engine, [sequence])
    tokens = [token for delta in sequence.deltas for token in delta.tokens]
    assert [len(token.top) for token in tokens] == [0] + [12] * (len(tokens) - 1)


def raises(*args, **kwargs):
    raise RuntimeError("on purpose")


def break_layer(adapter):
    """One layer of it raises: where the base's own place calls it, or where its factors are put together."""
    layer = next(iter(adapter.layers.values()))
    layer.forward = raises
    if hasattr(layer, "lora_A") and layer.lora_A:
        weight = layer.lora_A["default"].weight
        weight.data = weight.detach()[:, :5].clone()


@pytest.mark.parametrize("broken", ["lora", "ia3", "oft", "prompt tuning"])
@pytest.mark.parametrize("prompt_tokens", [256, 7])
def test_an_adapter_that_raises_in_a_step_ends_its_own_answers_alone(broken, prompt_tokens):
    engine = engine_of(llama(), ["lora", "ia3", "oft", "prompt tuning"], slots=6, prompt_tokens=prompt_tokens)
    if broken == "prompt tuning":  # in a pass of its own
        engine.adapters[broken].model.forward = raises
    else:
        break_layer(engine.adapters[broken])
    names = [broken, None, *engine.adapters, broken, None, broken, *engine.adapters]
    given = prompts(len(names))
    sequences = [asked(p, name, max_tokens=12) for p, name in zip(given, names, strict=True)]
    got = run(engine, sequences, at=[0, 0, 0, 0, 1, 1, 2, 2, 5, 5, 7, 7, 9])
    for name, prompt, tokens, sequence in zip(names, given, got, sequences, strict=True):
        if name == broken:
            assert (tokens, sequence.deltas[-1].finish) == ([], "error")
            assert sequence.deltas[-1].error.startswith("RuntimeError: ")
        else:
            model = engine.adapters[name].model if name else engine.base
            assert tokens == generated(model, prompt, 12), name
    assert not engine.busy
    assert all(adapter.users == 0 for adapter in engine.adapters.values())


def test_a_row_that_can_not_be_drawn_ends_alone():
    engine = engine_of(llama(), ["lora"])
    settings = {"temperature": 1.3, "top_p": 0.9, "max_tokens": 10}
    (alone,) = run(engine, [asked([9, 8, 7], "lora", seed=3, **settings)])
    odd, same = asked([4, 4], "lora", **settings | {"top_p": -1.0}), asked([5, 5], "lora", **settings)
    good, greedy = asked([9, 8, 7], "lora", seed=3, **settings), asked([4, 4], max_tokens=10)
    for sequence in (odd, same, good, greedy):
        engine.submit(sequence)
    same.generator = "none"
    while engine.busy:
        engine.step()
    assert [s.deltas[-1].finish for s in (odd, same)] == ["error"] * 2
    assert [s.ids[len(s.prompt) :] for s in (good, greedy)] == [alone, generated(engine.base, [4, 4], 10)]


def test_what_can_not_be_told_ends_alone():
    engine = engine_of(llama())
    deaf, good = asked([9, 8, 7], max_tokens=10), asked([9, 8, 7], max_tokens=10)
    deaf.emit = raises
    assert run(engine, [deaf, good])[1] == generated(engine.base, [9, 8, 7], 10)


ODD = st.floats(0, 2) | st.sampled_from([5e-324, 1e-45, 1e-40, 1e-38, 1e-5, 2.0])


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_is_asked_neighbours_are_answered(data):
    if not hasattr(test_whatever_is_asked_neighbours_are_answered, "engine"):
        test_whatever_is_asked_neighbours_are_answered.engine = engine_of(llama(), ["lora", "ia3"], slots=3)
    engine = test_whatever_is_asked_neighbours_are_answered.engine
    tokens = st.lists(st.integers(0, 383), min_size=1, max_size=20)
    odd = data.draw(
        st.builds(
            asked,
            tokens,
            st.sampled_from([None, "lora", "ia3"]),
            max_tokens=st.integers(0, 9),
            temperature=ODD,
            top_p=ODD.filter(lambda p: 0 < p <= 1),
            seed=st.none() | st.integers(-(2**63), 2**63 - 1),
            stop=st.lists(st.text(min_size=1, max_size=3), max_size=4).map(tuple),
            logprobs=st.none() | st.integers(0, 20),
            echo=st.booleans(),
        )
    )
    got = run(engine, [odd, asked([9, 8, 7], "lora", max_tokens=5)])
    assert odd.deltas[-1].finish in ("stop", "length")
    assert got[1] == generated(engine.adapters["lora"].model, [9, 8, 7], 5)


def test_text_ends_before_a_stop_string_that_may_cross_tokens():
    engine, tokenizer = engine_of(llama()), make_tokenizer()
    free = asked([9, 8, 7], max_tokens=30)
    ids = run(engine, [free])[0]
    assert text_of(free) == tokenizer.decode(ids, skip_special_tokens=True)
    whole = text_of(free)
    for first in range(3, len(whole) - 3, 4):
        stop = whole[first : first + 3]
        stopped = asked([9, 8, 7], max_tokens=30, stop=("never this", stop))
        run(engine, [stopped])
        assert text_of(stopped) == whole[: whole.find(stop)]
        assert stopped.deltas[-1].finish == "stop"


@pytest.mark.parametrize("method", ["lora", "lora and head", "prompt tuning"])
def test_an_adapter_is_read_from_its_directory(tmp_path, method):
    base = llama().requires_grad_(False)
    base.name_or_path = "models/a"
    model = Trial(method).model(base)
    model.save_pretrained(tmp_path / "good")
    engine = engine_of(base)
    engine.add("good", engine.prepare(load_adapter(base, str(tmp_path / "good"))[0]))
    engine.add("uri", engine.prepare(load_adapter(base, f"file://{tmp_path}/good")[0]))
    assert [bool(adapter.isolation_reason) for adapter in engine.adapters.values()] == [method != "lora"] * 2
    for name in ("good", "uri"):
        assert run(engine, [asked([4, 5, 6], name, max_tokens=9)])[0] == generated(model.eval(), [4, 5, 6], 9)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"), "can run code"),
        (lambda d: (d / "adapter_config.json").unlink(), "no PEFT adapter"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "can't read its adapter_config.json"),
        (lambda d: edit(d, '"models/a"', '"models/other"'), "made for the base model models/other"),
        (lambda d: edit(d, '"CAUSAL_LM"', '"SEQ_CLS"'), "its task is SEQ_CLS"),
        (lambda d: edit(d, '"r": 4', '"r": 5'), "does not fit"),
        (lambda d: edit(d, '"q_proj"', '"nowhere"'), "does not fit"),
        (lambda d: edit(d, '"init_lora_weights": true', '"init_lora_weights": "pissa"'), "merge it"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"x" * 64), "does not fit"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_the_reason(tmp_path, change, reason):
    base = llama().requires_grad_(False)
    base.name_or_path = "models/a"
    Trial("lora", targets=["q_proj", "o_proj"]).model(base).save_pretrained(tmp_path)
    before = [p.clone() for p in base.parameters()]
    change(tmp_path)
    with pytest.raises(UserError, match=reason):
        load_adapter(base, str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(before, base.parameters(), strict=True))


def edit(directory, old, new):
    path = directory / "adapter_config.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("name", ["../x", "a/b", "a..b", "", ".a", "a b", "x" * 65, "a\n", "ü"])
def test_names_that_are_paths_are_refused(name):
    with pytest.raises(UserError, match="adapter name"):
        check_name(name)
    assert check_name("trial-3_v1.0") == "trial-3_v1.0"


def test_the_engine_imports_no_ray():
    code = "import sys, ftray.serving.engine; print({m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not eval(done.stdout) & {"ray", "deepspeed", "optuna", "fastapi"}
