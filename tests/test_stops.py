"""Answers end at the same tokens everywhere, with models that are made to say one thing, so that the text is known."""

import json
import shutil

import pytest
import torch
from conftest import llama, make_tokenizer
from helpers.engines import asked, run, text_of
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from ftray.cli import main
from ftray.config import DataConfig, EvaluationConfig
from ftray.data.inference import Renderer
from ftray.evaluation.generation import generate
from ftray.models.load import load_tokenizer
from ftray.models.stops import stop_tokens
from ftray.serving.engine import Engine
from ftray.serving.generation_request import GenerationRequest, Rendering, Sampling, prompt_tokens
from ftray.serving.vllm import VLLMReplica
from ftray.task_spec import TaskSpec

END, PAD, NEWLINE, HASH, A, B, C, X, TILDE = 0, 1, 203, 7, 69, 70, 264, 92, 98  # "<|end|>", "#" and so on
# "\n" is answered by "b", " c", "#", "x", "x", ...; of these, "#" ends the turn, and is no special token
SAYS = {NEWLINE: B, B: C, C: HASH, HASH: X, X: X, A: TILDE, TILDE: TILDE}
WANTED = "b c"


def say(embeddings, head, says):
    """Let the token after each key of `says` be its value, where the layers between add nothing."""
    places = {token: place for place, token in enumerate(says)}
    with torch.no_grad():
        embeddings.weight.zero_()
        head.weight.zero_()
        for token, following in says.items():
            embeddings.weight[token, places[token]] = 1
            head.weight[following, places[token]] = 10


def save(directory, model, generation):
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    file = directory / "generation_config.json"
    file.write_text(json.dumps(generation)) if generation is not None else file.unlink()
    return str(directory)


def speaker(directory, says=SAYS, generation=None, **config):
    model = llama(**{"eos_token_id": END, "num_hidden_layers": 1} | config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    say(model.get_input_embeddings(), model.lm_head, says)
    return save(directory, model, generation)


def adapter(base, directory):
    """A LoRA adapter that adds nothing."""
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(directory)
    return str(directory)


ENDINGS = {  # what ends the turn, and who says so
    "a list in generation_config": (SAYS, {"generation": {"eos_token_id": [END, HASH]}}),
    "a number in generation_config": (SAYS, {"generation": {"eos_token_id": HASH}}),
    "config alone": (SAYS, {"generation": {"eos_token_id": END}, "eos_token_id": [HASH, END]}),
    "config without a generation_config": (SAYS, {"eos_token_id": HASH}),
    "the tokenizer alone": (SAYS | {C: END}, {"generation": {"eos_token_id": HASH}, "eos_token_id": HASH}),
}


@pytest.fixture(params=ENDINGS)
def model(request, tmp_path):
    says, settings = ENDINGS[request.param]
    return speaker(tmp_path / "model", says, **settings)


def test_infer_ends_where_the_turn_ends(model, tmp_path, capsys):
    common = ["--model.dtype", "fp32", "--generation.max_new_tokens", "9", "--generation.chat", "false"]
    assert main(["infer", "--model", model, *common, "--prompt", "a"]) == 0
    assert capsys.readouterr().out == WANTED + "\n"
    file = tmp_path / "prompts.txt"
    file.write_text("a\n\na a a\n")
    with_adapter = ["--adapter", adapter(model, tmp_path / "adapter")]
    assert main(["infer", "--model", model, *with_adapter, *common, "--file", str(file)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["generated"] for line in lines] == [WANTED] * 2


def test_the_engine_ends_where_the_turn_ends(model):
    base, tokenizer = AutoModelForCausalLM.from_pretrained(model), load_tokenizer(model)
    engine = Engine(base.requires_grad_(False), tokenizer)
    sequences = [asked([NEWLINE], max_tokens=9), asked([A], max_tokens=4)]
    run(engine, sequences)
    assert [text_of(sequence) for sequence in sequences] == [WANTED, "~~~~"]
    assert [sequence.deltas[-1].finish for sequence in sequences] == ["stop", "length"]
    assert set(VLLMReplica("m", model, False, 8, None).stops) == engine.ends


def test_a_batch_is_read_to_the_first_stop_of_each_row(model):
    base, tokenizer = AutoModelForCausalLM.from_pretrained(model), load_tokenizer(model)
    rows = [{"input_ids": ids, "prompt_tokens": len(ids)} for ids in ([A], [A, A, NEWLINE], [B], [NEWLINE])]
    settings = EvaluationConfig(max_new_tokens=5, batch_size=3)
    assert generate(base, tokenizer, rows, settings) == ["~~~~~", WANTED, " c", WANTED]


def test_evaluate_finds_what_is_said_perfectly(cluster, tmp_path, capsys):
    model = speaker(tmp_path / "model", generation={"eos_token_id": [END, HASH]})
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"input": "a" * (1 + i % 9), "output": WANTED}) + "\n" for i in range(40)))
    given = ["--model", model, "--model.dtype", "fp32", "--data", str(data), "--data.cache", str(tmp_path / "shards")]
    given += ["--adapter", adapter(model, tmp_path / "adapter"), "--evaluation.max_new_tokens", "9", "--split", "all"]
    given += ["--data.validation_fraction", "0.2", "--data.test_fraction", "0.2"]
    assert main(["evaluate", *given, "--output", str(tmp_path / "scores.json")]) == 0
    result = json.loads((tmp_path / "scores.json").read_text())
    assert result["base"]["exact_match"] == 1
    (metrics,) = result["adapters"].values()
    assert metrics["exact_match"]["best"] == 1


@pytest.mark.parametrize("starts", [PAD, END])  # the second as BART does, whose decoder starts with the end token
def test_seq2seq_ends_where_the_turn_ends(tmp_path, starts):
    sizes = {"vocab_size": 384, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    special = {"decoder_start_token_id": starts, "pad_token_id": PAD, "eos_token_id": END}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, **special))
    with torch.no_grad():
        for name, weight in t5.named_parameters():
            if name.endswith((".o.weight", ".wo.weight")):
                weight.zero_()
        t5.shared.weight.zero_()  # the head too: by growing, each token is more like the next one than like itself
        for place, token in enumerate((starts, B, C, HASH, X)):
            t5.shared.weight[token, place : place + 2] = 3**place
    directory = save(tmp_path / "t5", t5, special | {"eos_token_id": [END, HASH]})
    model, task = T5ForConditionalGeneration.from_pretrained(directory), TaskSpec("SEQ_2_SEQ_LM").load()
    labels = [B, C, END]
    row = {"input_ids": [A, END], "token_type_ids": [], "labels": labels, "target": WANTED}
    scores = task.score(model, load_tokenizer(directory), [row, {**row, "input_ids": [A] * 3}], EvaluationConfig())
    assert scores.generated == [WANTED] * 2


def test_seq2seq_ends_where_the_decoder_has_no_more_positions():
    sizes = {"vocab_size": 384, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "decoder_ffn_dim": 32}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32}
    special = {"decoder_start_token_id": END, "pad_token_id": PAD, "eos_token_id": END, "forced_eos_token_id": None}
    bart = BartForConditionalGeneration(BartConfig(**sizes, **special, max_position_embeddings=12)).eval()
    bart.final_logits_bias[0, [X, END]] = torch.tensor([1e4, -1e4])  # it says x, for ever
    row = {"input_ids": [A, END], "token_type_ids": [], "labels": [B, END], "target": "b"}
    settings = EvaluationConfig(max_new_tokens=40)
    scores = TaskSpec("SEQ_2_SEQ_LM", (), PAD).load().score(bart, make_tokenizer(), [row], settings)
    assert scores.generated == ["x" * 12]


@pytest.mark.parametrize("more", [{}, {"do_sample": False, "temperature": 0.6, "top_p": 0.9}])  # the second is unsound
def test_a_merged_model_ends_where_its_base_does_in_plain_transformers(tmp_path, more):
    base = speaker(tmp_path / "model", generation={"eos_token_id": [HASH], **more}, eos_token_id=X)
    merged = tmp_path / "merged"
    given = ["--model", base, "--adapter", adapter(base, tmp_path / "adapter")]
    assert main(["merge", *given, "--output", str(merged)]) == 0
    kept = json.loads((merged / "generation_config.json").read_text())
    assert kept["eos_token_id"] == [END, HASH, X]
    assert more.items() <= kept.items()
    plain = AutoModelForCausalLM.from_pretrained(merged)
    ids = plain.generate(input_ids=torch.tensor([[NEWLINE]]), do_sample=False, max_new_tokens=9, pad_token_id=PAD)
    assert ids[0].tolist() == [NEWLINE, B, C, HASH]


def test_what_names_no_token_is_no_stop_token(tmp_path, tokenizer):
    directory = speaker(tmp_path / "model", generation={"eos_token_id": [-1, HASH]}, eos_token_id=-1)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert stop_tokens(tokenizer, model.config, model.generation_config) == [END, HASH]
    shutil.copytree(directory, tmp_path / "bare")
    endless = load_tokenizer(tmp_path / "bare")
    endless.eos_token = None
    assert stop_tokens(endless, model.config, GenerationConfig()) == [END]  # by which its chat template ends a turn
    endless.chat_template = None
    assert stop_tokens(endless, model.config, GenerationConfig()) == []


USER, ASSISTANT = 2, 3  # special tokens
MARKED = {NEWLINE: USER, USER: B, B: ASSISTANT, ASSISTANT: C, C: PAD, PAD: END}
MARKS = "<|user|>b<|assistant|> c"  # padding and end are no part of it


def test_special_tokens_inside_an_answer_are_part_of_its_text(cluster, tmp_path, capsys):
    model = speaker(tmp_path / "model", MARKED)
    common = ["--model", model, "--model.dtype", "fp32", "--adapter", adapter(model, tmp_path / "adapter")]
    assert main(["infer", *common, "--prompt", "a"]) == 0
    assert capsys.readouterr().out == MARKS + "\n"
    base, tokenizer = AutoModelForCausalLM.from_pretrained(model), load_tokenizer(model)
    engine = Engine(base.requires_grad_(False), tokenizer)
    sequences = [asked([NEWLINE], max_tokens=9), asked([NEWLINE], max_tokens=9, stop=("<|assistant|>",))]
    run(engine, sequences)
    assert [text_of(sequence) for sequence in sequences] == [MARKS, "<|user|>b"]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"input": "a" * (1 + i % 9), "output": MARKS}) + "\n" for i in range(40)))
    given = [*common, "--data", str(data), "--data.cache", str(tmp_path / "shards"), "--split", "all"]
    given += ["--data.validation_fraction", "0.2", "--data.test_fraction", "0.2"]
    assert main(["evaluate", *given, "--output", str(tmp_path / "scores.json")]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["base"]["exact_match"] == 1


@pytest.mark.parametrize(("frame", "first"), [("$A <|end|>", []), ("<|system|> $A <|end|>", [4]), ("$A", [])])
def test_a_prompt_is_not_ended_by_a_tokenizer_that_ends_texts(tokenizer, frame, first):
    """The same tokens by the endpoint as by `infer`: the tokenizer's beginning, the text, and no end."""
    framed = make_tokenizer()
    framed.bos_token = "<|system|>"
    special = [("<|end|>", END), ("<|system|>", 4)]
    framed.backend_tokenizer.post_processor = TemplateProcessing(single=frame, special_tokens=special)
    wanted = [*first, *tokenizer("a b")["input_ids"]]
    request = GenerationRequest(["a b"], None, 1, None, None, 9, Sampling(), False, 99, 99)
    assert prompt_tokens(request, Rendering(framed, None), 384) == [wanted]
    assert Renderer(framed, DataConfig(template="{prompt}"), None).plain("a b") == wanted
