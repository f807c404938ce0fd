"""`ftray export`: what it writes answers, in each format's own runtime, in the adapter's words."""

import json
import logging
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from conftest import llama, make_tokenizer
from helpers.hub import TOKEN, Hub
from helpers.searches import command, environment, run_here
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ftray.cli import main
from ftray.config import EvaluationConfig
from ftray.data import pipeline
from ftray.errors import UserError
from ftray.exports import formats, gguf, llama_cpp, ollama, plain_lora
from ftray.exports.convert_gguf import name_of_cuts
from ftray.exports.proof import ExportFailed, Question, Reference, Reply, prove
from ftray.exports.quantize import packed_as, type_of
from ftray.task_spec import CHAT, TaskSpec

LORA = """
method: lora
lora:
  rank: {choice: [2, 4]}
  target_modules: all-linear
  learning_rate: {log: [5.0e-3, 2.0e-2]}
"""


@pytest.fixture(autouse=True)
def logs():
    """Commands keep the logs of the libraries quiet; not those of the tests to come."""
    yield
    logging.disable(logging.NOTSET)


def trained(output: Path, base: str, records: str, task: TaskSpec, **settings) -> Path:
    """`output`, as `train` leaves it, with an adapter that makes a difference."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(output / "adapter")
    task.save(output / "adapter")
    data = {"source": records, "max_length": 64, "cache": str(output.parent / "shards"), **settings}
    written = {
        "model": {"name": base, "dtype": "fp32"},
        "data": data,
        "training": {},
        "evaluation": {"max_new_tokens": 12, "bootstrap": 50},
    }
    (output / "config.yaml").write_text(yaml.safe_dump(written))
    return output


@pytest.fixture(scope="module")
def run(cluster, tmp_path_factory, words, tiny_llama) -> Path:
    output = tmp_path_factory.mktemp("export") / "out"
    return trained(output, tiny_llama, words, TaskSpec(template="{prompt}\n"), template="{prompt}\n")


@pytest.fixture(scope="module")
def merged(run, tiny_llama) -> torch.nn.Module:
    """What all exports of `run` must do, by PEFT and transformers alone."""
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    return PeftModel.from_pretrained(base, run / "adapter").merge_and_unload()


def said_by(model, ids: list[int], most: int) -> list[int]:
    """The likeliest continuation, up to the end of sequence."""
    answer = model.generate(torch.tensor([ids]), max_new_tokens=most, do_sample=False, pad_token_id=1, eos_token_id=0)
    found = answer[0, len(ids) :].tolist()
    return found[: found.index(0)] if 0 in found else found


def prompts(words: str, count: int = 8) -> list[list[int]]:
    lines = Path(words).read_text().splitlines()[:count]
    return [make_tokenizer()(json.loads(line)["input"] + "\n")["input_ids"] for line in lines]


def export(run: Path, output: Path, to: str, *more: str) -> int:
    return main(["export", "--run", str(run), "--to", to, "--output", str(output), *more])


@pytest.mark.parametrize("to", ["gguf", "ollama"])
def test_a_gguf_file_answers_in_the_adapters_words(run, merged, tmp_path, capsys, words, to):
    output = tmp_path / "out"
    assert export(run, output, to) == 0
    proof = json.loads((output / "proof.json").read_text())
    assert proof["equal"] + proof["tied"] == proof["records"] > 8
    assert abs(proof["metrics"]["loss"]["difference"]) < 1e-3
    assert f"{proof['equal']} of {proof['records']} are the adapter's" in capsys.readouterr().out

    # llama.cpp, asked here, token for token
    asked = [Question(ids, len(ids), []) for ids in prompts(words)]
    seen = llama_cpp.ask(output / "model.gguf", asked, 0, 12, ["f e d\n"], None)
    assert [reply.ids for reply in seen.replies] == [said_by(merged, q.ids, 12) for q in asked]

    # another reader: transformers' own
    again = AutoModelForCausalLM.from_pretrained(output, gguf_file="model.gguf", dtype=torch.float32)
    ids = torch.tensor([asked[0].ids])
    torch.testing.assert_close(again(ids).logits, merged(ids).logits, atol=5e-3, rtol=0)
    if to == "ollama":
        text = (output / "Modelfile").read_text()
        assert "FROM ./model.gguf" in text
        assert 'TEMPLATE """{{ .Prompt }}\n{{ .Response }}"""' in text
        assert 'PARAMETER stop "<|end|>"' in text


def test_no_ray_is_needed_where_the_shards_are_there_or_soon_made(run, tmp_path):
    """By a command that would not find its cluster; the shards are those of the run, then new ones."""
    env = environment() | {"RAY_ADDRESS": "127.0.0.1:1"}
    for name, more in (("again", []), ("new", ["--data.cache", str(tmp_path / "shards")])):
        flags = ["--run", str(run), "--to", "vllm", "--output", str(tmp_path / name), *more]
        done = subprocess.run([sys.executable, "-m", "ftray.export", *flags], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / name / "adapter_config.json").exists()


def test_records_that_tasks_of_ray_read_begin_it(run, tmp_path, words, capsys, monkeypatch):
    began = []
    monkeypatch.setattr(pipeline, "LOCAL_BYTES", 10)
    monkeypatch.setattr("ftray.runtime.cluster.connect", lambda cfg, dashboard: began.append(dashboard))
    more = ["--data.cache", str(tmp_path / "shards")]
    assert export(run, tmp_path / "out", "vllm", *more) == 0
    assert export(run, tmp_path / "again", "vllm", *more) == 0  # from the cache
    assert began == [False]


def test_the_loss_of_a_coarser_precision_is_shown_and_bounded(run, tmp_path, capsys):
    assert export(run, tmp_path / "q8", "gguf", "--precision", "q8_0") == 0
    proof = json.loads((tmp_path / "q8" / "proof.json").read_text())
    assert 0 < abs(proof["loss_increase"]) < 0.1
    assert proof["metrics"]["loss"]["difference"] == pytest.approx(proof["loss_increase"], rel=1e-6)
    assert (tmp_path / "q8" / "model.gguf").stat().st_size < 200_000
    assert "loss" in capsys.readouterr().out

    assert export(run, tmp_path / "q4", "gguf", "--precision", "q4_k_m", "--export.max_loss_increase", "0") in (0, 1)
    if not (tmp_path / "q4").exists():  # it was worse, as was to be expected
        assert "more than 0" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == [tmp_path / "q8"]


def test_q4_k_m_packs_as_llama_cpp_does(tmp_path, tokenizer):
    """Rows of 256 get the k-quants; llama.cpp reads them, and they are as near as their bits allow."""
    import gguf as library

    directory, file = tmp_path / "model", tmp_path / "model.gguf"
    model = llama(hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    gguf.write(directory, [0], "q4_k_m", file)
    reader = library.GGUFReader(file)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["output.weight"] == types["blk.3.ffn_down.weight"] == types["blk.2.attn_v.weight"] == "Q6_K"
    assert types["token_embd.weight"] == types["blk.1.ffn_down.weight"] == types["blk.0.attn_q.weight"] == "Q4_K"
    assert types["output_norm.weight"] == "F32"
    assert reader.fields["general.file_type"].contents() == 15
    ids = tokenizer("the cat sat on the mat")["input_ids"]
    (reply,) = llama_cpp.ask(file, [Question(ids, 3, [4, 5])], 0, 4, [], None).replies
    log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert reply.loss == pytest.approx(-sum(log_probs[at - 1, ids[at]].item() for at in (4, 5)), abs=0.2)


@pytest.mark.parametrize(
    ("name", "columns", "tied", "kind"),
    [
        ("blk.0.attn_q.weight", 256, False, "Q4_K"),
        ("blk.0.attn_v.weight", 256, False, "Q6_K"),
        ("blk.5.attn_v.weight", 256, False, "Q4_K"),
        ("blk.6.attn_v.weight", 256, False, "Q6_K"),  # (6 - 32 / 8) % 3 == 2
        ("blk.30.ffn_down.weight", 512, False, "Q6_K"),
        ("blk.0.attn_qkv.weight", 256, False, "Q5_K"),
        ("blk.0.attn_q.weight", 576, False, "Q5_0"),
        ("token_embd.weight", 256, False, "Q4_K"),
        ("token_embd.weight", 256, True, "Q6_K"),
        ("token_embd.weight", 576, True, "Q8_0"),
        ("blk.0.attn_q.weight", 20, False, None),
        ("blk.0.ffn_gate_inp.weight", 256, False, None),
        ("blk.0.ssm_conv1d.weight", 256, False, None),
    ],
)
def test_the_mixture_is_llama_cpps(name, columns, tied, kind):
    assert type_of(name, (64, columns), 32, tied) == kind


@pytest.mark.parametrize(("kind", "off"), [("Q4_K", 0.08), ("Q5_K", 0.04), ("Q6_K", 0.02), ("Q5_0", 0.05)])
def test_packed_rows_are_near_what_they_were(kind, off):
    import gguf as library

    rows = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)).numpy()
    back = library.dequantize(packed_as(kind, rows), library.GGMLQuantizationType[kind])
    assert 0 < abs(back - rows).mean() < off


def test_what_answers_in_other_words_is_a_failure_and_no_file(run, tmp_path, capsys, monkeypatch, tiny_llama):
    write = gguf.write
    monkeypatch.setattr(gguf, "write", lambda merged, *more: write(Path(tiny_llama), *more))  # the base alone
    assert export(run, tmp_path / "out", "gguf") == 1
    assert "ftray export: nothing is left: what was written answers record" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_tie_is_no_other_word(tiny_llama, tokenizer):
    """Where the adapter holds two tokens for equally likely, a file may say the other; nowhere else."""
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    ids = tokenizer("the cat")["input_ids"]
    rows = [{"input_ids": [*ids, 9], "labels": [-100] * len(ids) + [9], "prompt_tokens": len(ids), "prompt": "the cat"}]
    rows[0] |= {"target": "x"}
    reference = Reference(model, tokenizer, rows, EvaluationConfig(max_new_tokens=4))
    (own,) = reference.replies

    def measure(token: int, loss: float = 0.0):
        return lambda questions, stops, most: [Reply([token, *own.ids[1:]], own.ended, own.loss + loss)]

    found = reference.log_probs(ids)
    other = int(found.topk(2).indices[1])
    assert prove(reference, measure(own.ids[0]), None).equal == 1
    with pytest.raises(ExportFailed, match="answers record 0 of the test with"):
        prove(reference, measure(int(found.argmin())), None)
    gap = float(found[own.ids[0]] - found[other])
    assert reference.preference(0, Reply([other], False, 0.0)) == pytest.approx(gap, abs=1e-5)
    with pytest.raises(ExportFailed, match=r"loss that differs by 0\.5"):
        prove(reference, measure(own.ids[0], 0.5), None)
    assert prove(reference, measure(int(found.argmin()), 0.05), 0.1).loss_increase == pytest.approx(0.05, abs=1e-6)
    with pytest.raises(ExportFailed, match=r"loses 0\.2000 nats a token on 1 test records, more than 0\.1"):
        prove(reference, measure(own.ids[0], 0.2), 0.1)
    # an answer that ends sooner is other words too
    assert reference.preference(0, Reply(own.ids[:2], True, 0.0)) > 0


def test_a_chat_keeps_its_template_and_stops_in_gguf_and_ollama(cluster, tmp_path, tiny_llama, tokenizer):
    records, output = tmp_path / "chats.jsonl", tmp_path / "out"
    with open(records, "w") as file:
        for i in range(40):
            turns = [{"role": "user", "content": f"{i} cats"}, {"role": "assistant", "content": f"mat {i}"}]
            file.write(json.dumps({"messages": turns}) + "\n")
    chat = trained(tmp_path / "chat", tiny_llama, str(records), TaskSpec(template=CHAT), test_fraction=0.3)
    assert export(chat, output, "ollama") == 0
    turns = [{"role": "user", "content": "12 cats"}]
    seen = llama_cpp.ask(output / "model.gguf", [], 0, 4, [], turns)
    assert seen.rendered == "<|user|>12 cats<|end|><|assistant|>"
    text = (output / "Modelfile").read_text()
    assert '{{ if eq .Role "system" }}<|system|>{{ .Content }}<|end|>' in text
    assert '{{ else if eq .Role "user" }}<|user|>{{ .Content }}' in text
    assert 'PARAMETER stop "<|end|>"' in text


def test_a_modelfile_says_what_the_chat_template_says(tokenizer):
    found = ollama.turn_template(tokenizer)
    turns = [{"role": role, "content": "x y"} for role in ("system", "user", "assistant", "user")]
    assert found.render(turns) == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    other = make_tokenizer()
    other.chat_template = (
        "{% if messages[0].role != 'system' %}<|system|>Be nice.<|end|>\n{% endif %}"
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    assert ollama.turn_template(other).without_system == "<|system|>Be nice.<|end|>"
    for template, why in (
        ("{% for m in messages %}<|user|>{{ m.content | upper }}<|end|>{% endfor %}", "more than put texts around"),
        ("{{ strftime_now('%Y') }}" + tokenizer.chat_template, "the day's date"),
    ):
        other.chat_template = template
        with pytest.raises(UserError, match=why):
            ollama.turn_template(other)


def run_go(directory: Path, program: str, turns: list[dict[str, str]]) -> str:
    """What Go's text/template makes of a Modelfile's template."""
    system = " ".join(turn["content"] for turn in turns if turn["role"] == "system")
    messages = [{"Role": turn["role"], "Content": turn["content"]} for turn in turns]
    source = f"""package main
import ("encoding/json"; "os"; "text/template")
type turn struct {{ Role, Content string }}
func main() {{
  var given struct {{ System string; Messages []turn }}
  json.Unmarshal([]byte({json.dumps(json.dumps({"System": system, "Messages": messages}))}), &given)
  template.Must(template.New("").Parse({json.dumps(program)})).Execute(os.Stdout, given)
}}"""
    file = directory / "main.go"
    file.write_text(source)
    return subprocess.run(["go", "run", str(file)], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="needs go")
def test_go_renders_a_modelfile_as_jinja_renders_the_template(tmp_path, tokenizer):
    for turns in ollama.CHECKS:
        wanted = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert run_go(tmp_path, ollama.turn_template(tokenizer).go(), turns) == wanted


def test_an_adapter_for_vllm_is_plain_whatever_it_was(cluster, tmp_path, words, tiny_llama):
    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=False,
        rank_pattern={"down_proj": 2},
        alpha_pattern={"layers.1.mlp.down_proj": 3},
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), config)
    model.save_pretrained(tmp_path / "adapter")
    given = ["--adapter", str(tmp_path / "adapter"), "--data", words, "--data.template", "{prompt}\n"]
    given += ["--evaluation.max_new_tokens", "6", "--data.cache", str(tmp_path / "shards"), "--split", "all"]
    assert main(["export", *given, "--to", "vllm", "--output", str(tmp_path / "out")]) == 0
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"]) == (4, 4)
    assert not {"rank_pattern", "alpha_pattern", "use_rslora"} & fields.keys()
    shapes = {tuple(t.shape)[name.endswith("B.weight")] for name, t in load_file(weights(tmp_path)).items()}
    assert shapes == {4}
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    again = PeftModel.from_pretrained(base, tmp_path / "out")
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, atol=1e-5, rtol=0)


def weights(tmp_path: Path) -> Path:
    return tmp_path / "out" / "adapter_model.safetensors"


@pytest.mark.skipif(find_spec("mlx") is None, reason="needs mlx")
def test_mlx_lm_answers_with_the_adapter(run, merged, tmp_path, words, tiny_llama):
    import mlx.core as mx
    from mlx_lm import load

    assert export(run, tmp_path / "out", "mlx-adapter") == 0
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    assert "model.layers.0.self_attn.q_proj.lora_a" in tensors
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == 2
    assert "self_attn.q_proj" in config["lora_parameters"]["keys"]
    model, _ = load(tiny_llama, adapter_path=str(tmp_path / "out"))
    ids = prompts(words, 1)[0]
    found = torch.tensor(model(mx.array([ids])).tolist())
    torch.testing.assert_close(found, merged(torch.tensor([ids])).logits, atol=1e-3, rtol=0)


@pytest.mark.parametrize("precision", ["f32", "int8"])
def test_onnx_runtime_answers_with_the_model(run, merged, tmp_path, words, precision):
    import numpy as np
    import onnxruntime_genai as genai

    output = tmp_path / "out"
    assert export(run, output, "onnx", "--precision", precision, "--export.max_loss_increase", "1") == 0
    proof = json.loads((output / "proof.json").read_text())
    model, tokenizer = genai.Model(str(output)), AutoTokenizer.from_pretrained(output)
    ids = prompts(words, 1)[0]
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + 12, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array([ids], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(token) for token in generator.get_sequence(0)[len(ids) :]]
    if precision == "f32":
        assert proof["equal"] + proof["tied"] == proof["records"]
        assert [token for token in found if token] == said_by(merged, ids, 12)
    assert tokenizer.decode(ids) == tokenizer.decode(prompts(words, 1)[0])


@pytest.mark.parametrize(("precision", "near"), [("int8", 0.05), ("int4", 0.8)])
def test_a_compressed_model_is_read_by_transformers_and_near_the_merged_one(
    run, merged, tmp_path, words, precision, near
):
    output = tmp_path / "out"
    assert export(run, output, "vllm", "--precision", precision, "--export.max_loss_increase", "1") == 0
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    assert config["config_groups"]["group_0"]["weights"]["num_bits"] == int(precision[-1])
    assert "model.layers.0.self_attn.q_proj.weight_packed" in load_file(output / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    ids = torch.tensor([prompts(words, 1)[0]])
    wanted = merged(ids).logits
    assert 0 < (again(ids).logits - wanted).abs().max() < near * wanted.abs().max()
    assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == 0
    proof = json.loads((output / "proof.json").read_text())
    assert proof["loss_increase"] == pytest.approx(proof["metrics"]["loss"]["difference"])


def test_a_trial_and_an_adapter_of_a_search_are_exported_by_its_settings(cluster, tmp_path, words, tiny_llama, capsys):
    search = tmp_path / "search"
    done = run_here(command(search, words, tiny_llama, "--trials", "2", space=LORA))
    assert done.returncode == 0, done.stderr
    assert export(search, tmp_path / "one", "vllm", "--trial", "1") == 0
    trial = next((search / "tune").glob("trial-1/checkpoint_*/adapter"))
    assert main(["export", "--adapter", str(trial), "--to", "vllm", "--output", str(tmp_path / "two")]) == 0
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert main(["export", "--run", str(search), "--to", "vllm"]) == 0
    proof = json.loads((search / "export" / "vllm" / "proof.json").read_text())
    summary = json.loads((search / "summary.json").read_text())["proof"]
    assert proof["records"] == summary["records"]
    assert proof["metrics"]["loss"]["best"] == pytest.approx(summary["metrics"]["loss"]["best"], abs=1e-4)
    assert main(["export", "--run", str(search), "--to", "vllm"]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["export", "--run", str(search), "--to", "vllm", "--trial", "7"]) == 2
    assert "export.trial 7: has no checkpoint" in capsys.readouterr().err


def refusals(run: Path, tmp_path: Path, base: str) -> dict[str, tuple[list[str], str]]:
    """By what they are about: arguments, and what is said of them."""
    to = ["--run", str(run), "--to"]
    model = AutoModelForCausalLM.from_pretrained(base)
    prefix = get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    prefix.save_pretrained(tmp_path / "prefix")
    dora = LoraConfig(use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), dora).save_pretrained(tmp_path / "dora")
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(tmp_path / "lora")
    head = LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")
    get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), head).save_pretrained(tmp_path / "head")
    TaskSpec("SEQ_CLS", ("no", "yes"), 1).save(tmp_path / "head")

    def alone(name: str, to: str) -> list[str]:
        return ["--adapter", str(tmp_path / name), "--data", "x.jsonl", "--to", to]

    return {
        "nothing": ([], "give --to gguf"),
        "no adapter": (["--to", "gguf"], "give --run OUTPUT or --adapter DIR"),
        "no records": (["--adapter", str(tmp_path / "lora"), "--to", "vllm"], "give --data RECORDS"),
        "a trial of no run": ([*alone("lora", "vllm"), "--trial", "7"], "is one of a search"),
        "precision": ([*to, "mlx-adapter", "--precision", "q8_0"], "export.precision q8_0: mlx-adapter takes none"),
        "precision of another": ([*to, "gguf", "--precision", "int4"], "gguf takes f16, q8_0, q4_k_m"),
        "prompt": (alone("prefix", "gguf"), "prefix_tuning can't be folded"),
        "prompt, vllm": (alone("prefix", "vllm"), "vllm holds plain LoRA"),
        "dora": (alone("dora", "mlx-adapter"), "is LoRA with use_dora: ftray merge --adapter"),
        "a head": (alone("head", "gguf"), "gguf holds models that generate, and the adapter is for SEQ_CLS"),
        "no repo": ([*to, "hub"], "needs --repo OWNER/NAME"),
        "local base": ([*to, "hub", "--repo", "me/x"], "lies on this machine alone"),
        "licence": ([*to, "hub", "--repo", "me/x", "--form", "model"], "says nothing of its licence"),
    }


def test_what_a_format_cant_hold_is_refused_in_one_line_before_work(run, tmp_path, capsys, tiny_llama, monkeypatch):
    monkeypatch.setattr(formats, "load_whole", None)  # weights are not read
    asked = refusals(run, tmp_path, tiny_llama)
    capsys.readouterr()
    for about, (given, told) in asked.items():
        output = [] if about == "nothing" else ["--output", str(tmp_path / "out")]
        assert main(["export", *given, *output]) == 2, about
        error = capsys.readouterr().err
        assert told in error, about
        assert error.count("\n") == 1, error
        assert not (tmp_path / "out").exists()


def test_what_llama_cpps_converter_does_not_know_is_refused(tmp_path, tiny_llama):
    gguf.check(tiny_llama)
    config = json.loads((Path(tiny_llama) / "config.json").read_text())
    for about, architecture, cut in (("NobodysForCausalLM", "NobodysForCausalLM", True), ("pre-tokenizer", "", False)):
        changed = tmp_path / about
        shutil.copytree(tiny_llama, changed)
        (changed / "config.json").write_text(json.dumps(config | ({"architectures": [architecture]} if cut else {})))
        if not cut:  # words are cut at white space, which no model of llama.cpp does so
            tokenizer = json.loads((changed / "tokenizer.json").read_text())
            cuts = [{"type": "Whitespace"}, tokenizer["pre_tokenizer"]]
            tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": cuts}
            (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
        with pytest.raises(UserError, match=f"converter refuses .*{about}.*; no GGUF file can be made of it"):
            gguf.check(str(changed))


def test_what_llama_cpp_can_not_take_says_why(tmp_path, tiny_gpt2, tokenizer):
    """The converter's `assert` has no words, and llama.cpp's last ones are not its reason."""
    gguf.check(tiny_gpt2)  # although transformers leaves out a name that the converter asks for
    llama(vocab_size=100).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"AssertionError, at `assert max\(.*\) < vocab_size.*`; no GGUF file can"):
        gguf.check(str(tmp_path))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ExportFailed, match=r"llama.cpp can't run what its converter wrote: .*gguf.*; no GGUF file can"):
        gguf.measure(tmp_path / "bad.gguf", tokenizer, False, [], [0], 4)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}, "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}], "smollm"),
        ({"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}, None),
        ([{"type": "Whitespace"}, {"type": "ByteLevel", "use_regex": True}], None),
        ({"type": "Metaspace"}, None),
        (None, None),
    ],
)
def test_a_tokenizer_is_known_by_how_it_cuts(steps, name):
    given = {"type": "Sequence", "pretokenizers": steps} if isinstance(steps, list) else steps
    assert name_of_cuts({"pre_tokenizer": given, "normalizer": None}) == name


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.shutdown()


def push(hub: Hub, run: Path, output: Path, *more: str, token: str = TOKEN) -> subprocess.CompletedProcess:
    given = ["--run", str(run), "--to", "hub", "--repo", "me/terse", "--output", str(output), *more]
    env = environment(joined=True) | hub.environment() | {"HF_TOKEN": token}
    return subprocess.run(
        [sys.executable, "-m", "ftray.export", *given], capture_output=True, text=True, env=env, timeout=300
    )


def test_the_hub_gets_adapter_card_and_licence(run, hub, tmp_path):
    more = ["--export.base_model", "them/tiny", "--export.licence", "mit", "--export.private", "true"]
    done = push(hub, run, tmp_path / "out", *more)
    assert done.returncode == 0, done.stderr
    assert f"pushed   {hub.address}/me/terse" in done.stdout
    files = hub.repos["me/terse"]
    assert hub.private == {"me/terse"}
    assert hub.commits == 1
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json", "proof.json"} <= set(
        files
    )
    assert not {"answers.jsonl", "MANIFEST.json"} & set(files)  # test records stay here
    assert files["adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "them/tiny"
    data = ModelCard(files["README.md"].decode()).data
    assert (data.base_model, data.license, data.library_name) == ("them/tiny", "mit", "peft")
    proof = json.loads(files["proof.json"])
    told = {result.metric_type: result.metric_value for result in data.eval_results}
    assert told["loss"] == pytest.approx(proof["metrics"]["loss"]["best"])
    assert {result.dataset_split for result in data.eval_results} == {"test"}


def test_the_hub_gets_the_merged_model_which_loads_from_there(run, hub, merged, tmp_path, words):
    done = push(hub, run, tmp_path / "out", "--form", "model", "--export.licence", "mit")
    assert done.returncode == 0, done.stderr
    for name, data in hub.repos["me/terse"].items():
        (tmp_path / "again").mkdir(exist_ok=True)
        (tmp_path / "again" / name).write_bytes(data)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    ids = torch.tensor([prompts(words, 1)[0]])
    torch.testing.assert_close(again(ids).logits, merged(ids).logits, atol=1e-4, rtol=0)


def test_a_dry_run_pushes_nothing_and_what_the_hub_refuses_or_spoils_is_told(run, hub, tmp_path):
    more = ["--export.base_model", "them/tiny", "--export.licence", "mit"]
    assert push(hub, run, tmp_path / "dry", *more, "--dry-run").returncode == 0
    assert hub.repos == {}
    assert "license: mit" in (tmp_path / "dry" / "README.md").read_text()
    done = push(hub, run, tmp_path / "wrong", *more, token="hf_nobody")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the hub" in done.stderr
    hub.spoils = "adapter_model.safetensors"
    done = push(hub, run, tmp_path / "spoilt", *more)
    assert done.returncode == 1
    assert "is not what the hub returns: adapter_model.safetensors differs" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"dry"}


def test_a_classifier_goes_to_the_hub_with_its_scores(cluster, tmp_path, tiny_llama):
    records = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": "abc"[i % 3] * (1 + i % 5), "label": "yes" if i % 2 else "no"}) for i in range(60)]
    records.write_text("\n".join(lines))
    torch.manual_seed(1)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=2, pad_token_id=1)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="SEQ_CLS")
    get_peft_model(base, config).save_pretrained(tmp_path / "head")
    TaskSpec("SEQ_CLS", ("no", "yes"), 1).save(tmp_path / "head")
    given = ["--adapter", str(tmp_path / "head"), "--data", str(records), "--data.cache", str(tmp_path / "shards")]
    given += ["--repo", "me/head", "--dry-run", "--export.base_model", "them/tiny", "--export.licence", "mit"]
    assert main(["export", *given, "--to", "hub", "--output", str(tmp_path / "out")]) == 0
    assert "accuracy" in (tmp_path / "out" / "README.md").read_text()


def test_plain_lora_has_one_scale(tmp_path, tiny_llama):
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    config.init_lora_weights = False
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
    model.save_pretrained(tmp_path / "a")
    found = plain_lora.read(tmp_path / "a", plain_lora.check(tmp_path / "a", "vllm"))
    a, b = found.layers["model.layers.0.self_attn.q_proj"]
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    torch.testing.assert_close(b @ a, layer.get_delta_weight("default"))
