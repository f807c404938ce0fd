"""The commands that work on what training left: evaluate, infer, merge."""

import importlib
import json
import logging
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import ray
import torch
from conftest import llama, make_tokenizer
from helpers.live_memory import most_bytes
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from ray.util.placement_group import placement_group, remove_placement_group
from transformers import AutoModelForCausalLM

from ftray.adapters.lora_init import save
from ftray.adapters.methods import attach
from ftray.cli import main
from ftray.compat.torch import storage_key
from ftray.config import AdapterConfig, ModelConfig
from ftray.data import TokenizedData
from ftray.data.inference import read_records
from ftray.models.load import LoadedModel, load_base, load_skeleton
from ftray.multi_adapter.shared_model import share, trainable
from ftray.runtime.cluster import say_if_waiting
from ftray.search.estimate import measure, saved_bytes
from ftray.task_spec import CAUSAL, CHAT, TaskSpec
from ftray.training.optimizer import TorchOptimizer
from ftray.training.pack import Pack


@pytest.fixture(autouse=True)
def logs():
    """Commands keep the logs of the libraries quiet; not those of the tests to come."""
    yield
    logging.disable(logging.NOTSET)


def make_adapter(base: str, directory: Path, seed: int, method: str = "lora", **changes) -> str:
    """A random adapter that makes a difference."""
    torch.manual_seed(seed)
    if method == "lora":
        config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | changes)
    else:
        config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    if method == "ia3":
        for name, parameter in model.named_parameters():
            if "ia3" in name:
                torch.nn.init.normal_(parameter, 1.0, 0.3)
    model.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_llama) -> dict[str, str]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        "a": make_adapter(tiny_llama, root / "a", 1),
        "b": make_adapter(tiny_llama, root / "b", 2, use_rslora=True),
        "ia3": make_adapter(tiny_llama, root / "ia3", 3, "ia3"),
    }


@pytest.fixture(scope="module")
def other_base(tmp_path_factory, tokenizer) -> dict[str, str]:
    """Of the same shape with other weights, and of another shape."""
    root = tmp_path_factory.mktemp("others")
    same = llama()
    with torch.no_grad():
        for parameter in same.parameters():
            parameter.mul_(1.1)
    same.save_pretrained(root / "same")
    llama(num_hidden_layers=3).save_pretrained(root / "deeper")
    llama(hidden_size=32).save_pretrained(root / "narrower")
    for name in ("same", "deeper", "narrower"):
        tokenizer.save_pretrained(root / name)
    return {name: str(root / name) for name in ("same", "deeper", "narrower")}


def flags(*given: str, words: str = "", cache: Path | None = None) -> list[str]:
    return [*given, "--data", words, "--data.cache", str(cache), "--model.dtype", "fp32", "--data.max_length", "64"]


def test_evaluate_scores_base_and_adapters_of_two_methods_side_by_side(
    cluster, tmp_path, capsys, words, tiny_llama, adapters
):
    from ftray.config import EvaluationConfig
    from ftray.models.load import load_tokenizer
    from ftray.tasks.causal import score

    file = tmp_path / "scores.json"
    named = [part for name in ("a", "ia3") for part in ("--adapter", adapters[name])]
    common = flags("--evaluation.max_new_tokens", "6", words=words, cache=tmp_path / "shards")
    assert main(["evaluate", "--model", tiny_llama, *named, *common, "--output", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"evaluation {file}"
    result = json.loads(file.read_text())
    shards = TokenizedData.load(next((tmp_path / "shards").glob("*/manifest.json")).parent)
    rows = shards.rows("test")
    assert result["records"] == len(rows)
    for name in ("a", "ia3"):
        metrics = result["adapters"][adapters[name]]
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), adapters[name])
        alone = score(model, load_tokenizer(tiny_llama), rows, EvaluationConfig(generate=False))
        assert metrics["loss"]["best"] == pytest.approx(alone.loss.sum() / alone.tokens.sum(), rel=1e-5)
        assert metrics["loss"]["base"] == result["base"]["loss"]
        assert metrics["loss"]["interval"][0] < metrics["loss"]["difference"] < metrics["loss"]["interval"][1]
        assert {"perplexity", "exact_match", "token_error_rate", "character_error_rate"} < set(metrics)
        assert f"{metrics['loss']['best']:.4g}" in out

    # a model alone, the result on the last line of the output
    assert main(["evaluate", "--model", tiny_llama, *common, "--split", "all", "--evaluation.generate", "false"]) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert alone["records"] == 120
    assert alone["adapters"] == {}


def test_a_command_says_what_it_waits_for(cluster, tmp_path, capsys, monkeypatch, words, tiny_llama):
    monkeypatch.setattr("ftray.runtime.cluster.ROOM_PATIENCE", 0.5)
    others = placement_group([{"CPU": 3}])
    assert others.wait(60)
    threading.Timer(4, remove_placement_group, [others]).start()
    common = flags("--split", "all", "--evaluation.generate", "false", words=words, cache=tmp_path)
    assert main(["evaluate", "--model", tiny_llama, *common]) == 0
    said = capsys.readouterr()
    assert [line for line in said.err.splitlines() if "waits" in line] == ["ftray waits for 4 CPU; free: 1 of 4 CPU"]
    assert json.loads(said.out.splitlines()[-1])["records"] == 120
    monkeypatch.setattr("ftray.runtime.cluster.ROOM_PATIENCE", 60)  # the task of a moment ago has to end
    say_if_waiting(2, {"CPU": 2, "GPU": 0})
    assert capsys.readouterr().err == ""
    deadline = time.monotonic() + 60  # what found room was given back: Ray tells of it a moment later
    while ray.available_resources().get("CPU", 0) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    monkeypatch.setattr("ftray.runtime.cluster.ROOM_PATIENCE", 0.5)
    say_if_waiting(3, {"CPU": 2, "GPU": 1})
    assert capsys.readouterr().err == "ftray waits for 3 times 2 CPU and 1 GPU; free: 4 of 4 CPU and 0 of 0 GPU\n"


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_an_adapter_of_prompts_is_asked_and_not_merged(method, tmp_path, capsys, tiny_llama, tokenizer):
    adapter = tmp_path / "adapter"
    model = attach(load_base(ModelConfig(dtype="fp32"), tiny_llama), AdapterConfig(method=method), 1, 0)
    save(model, TaskSpec(template="say {prompt}\n"), adapter)
    asked = ["--adapter", str(adapter), "--model.dtype", "fp32"]
    assert main(["infer", *asked, "--prompt", "a b", "--generation.max_new_tokens", "8"]) == 0
    prompt = tokenizer("say a b\n", return_tensors="pt")
    fresh = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), adapter)
    new = fresh.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert capsys.readouterr().out == tokenizer.decode(new, skip_special_tokens=True) + "\n"

    assert main(["merge", *asked, "--output", str(tmp_path / "merged")]) == 2
    assert "can't be folded" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "merged").exists()

    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    for change in ({"num_virtual_tokens": 7}, {"num_transformer_submodules": 3}):
        file.write_text(json.dumps(config | change))
        assert main(["infer", *asked, "--prompt", "a b"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"adapter {adapter}: " in line


@pytest.mark.parametrize("command", ["evaluate", "infer", "merge", "merge two"])
def test_settings_that_only_weights_show_to_be_wrong(command, cluster, tmp_path, capsys, words, tiny_llama, adapters):
    shutil.copytree(adapters["a"], tmp_path / "odd")
    file = tmp_path / "odd" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": "as you like"}))
    asked = {
        "evaluate": flags("--evaluation.generate", "false", words=words, cache=tmp_path / "cache"),
        "infer": ["--prompt", "a"],
        "merge": ["--output", str(tmp_path / "merged")],
        "merge two": ["--adapter", adapters["b"], "--output", str(tmp_path / "merged")],
    }
    assert main([command.split()[0], "--adapter", str(tmp_path / "odd"), *asked[command]]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"adapter {tmp_path}/odd: PEFT can't apply its adapter_config.json: " in said
    assert "as you like" in said
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("command", ["evaluate", "infer", "merge"])
def test_an_adapter_for_another_base_is_refused(command, tmp_path, capsys, words, adapters, other_base):
    reasons = {"same": "was made for another base, ", "deeper": "another base", "narrower": "another base"}
    for name, reason in reasons.items():
        asked = {
            "evaluate": flags(words=words, cache=tmp_path),
            "infer": ["--prompt", "a"],
            "merge": ["--output", str(tmp_path / "merged")],
        }
        assert main([command, "--model", other_base[name], "--adapter", adapters["a"], *asked[command]]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert reason in line
        assert adapters["a"] in line


def test_where_the_base_was_moved_shapes_tell_it_apart(tmp_path, capsys, tiny_llama, adapters, other_base):
    moved = tmp_path / "moved"
    shutil.copytree(adapters["a"], moved)
    path = moved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "/gone/away"}))
    for name, reason in {"deeper": "layers.2", "narrower": "size mismatch"}.items():
        assert main(["infer", "--model", other_base[name], "--adapter", str(moved), "--prompt", "a"]) == 2
        assert reason in capsys.readouterr().err
    assert main(["infer", "--adapter", str(moved), "--prompt", "a"]) == 2
    assert "its base can't be found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda d: None, "no such directory"),
        (lambda d: d.mkdir(), "holds no adapter_config.json"),
        (lambda d: (d.mkdir(), (d / "adapter_config.json").write_text("{}")), "holds no weights"),
        (lambda d: (d.mkdir(), (d / "config.json").write_text("{}")), "give it as --model"),
    ],
)
def test_what_is_no_adapter_is_refused(tmp_path, capsys, make, reason):
    make(tmp_path / "it")
    assert main(["evaluate", "--adapter", str(tmp_path / "it")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line


def test_infer_asks_as_training_did_and_writes_what_it_answers(tmp_path, capsys, tiny_llama, tokenizer, adapters):
    """The rendered prompt is the one of the training records, in the template of the run that left the adapter."""
    run = tmp_path / "run"
    shutil.copytree(adapters["a"], run / "adapter")
    (run / "config.yaml").write_text("data: {template: 'spell {prompt} :'}\n")
    file, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    records = [
        {"input": "a b"},
        {"input": "the cat sat", "output": "known"},
        {"instruction": "do", "input": "it"},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"text": "the cat"},
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    common = ["--adapter", str(run), "--model.dtype", "fp32", "--generation.max_new_tokens", "8"]
    assert main(["infer", *common, "--file", str(file), "--output", str(output)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"generated {output}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers.jsonl", "prompts.jsonl", "run"]
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{k: v for k, v in a.items() if k != "generated"} for a in answers] == records
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), adapters["a"]).eval()
    asked = ["spell a b :", "spell the cat sat :", "spell do\nit :", "<|user|>hi<|end|><|assistant|>", "the cat"]
    wanted = []
    for text in asked:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            whole = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=0, pad_token_id=1)
        wanted.append(tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True))
    assert [a["generated"] for a in answers] == wanted
    assert main(["infer", *common, "--prompt", "a b"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == wanted[0].rstrip("\n")

    odd = [{"riddle": "a b", "weight": 0}, {"riddle": "the cat sat", "gold": "known", "is_correct": False}]
    file.write_text("".join(json.dumps(r) + "\n" for r in odd))
    assert main(["infer", *common, "--file", str(file)]) == 2
    (proposed,) = re.findall("--data.fields '(.*)'", capsys.readouterr().err)
    assert proposed == "text: riddle"
    fields = ["--data.fields", "prompt: riddle, completion: gold"]
    assert main(["infer", *common, "--file", str(file), *fields]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answers == [record | {"generated": text} for record, text in zip(odd, wanted[:2], strict=True)]

    sampled = set()
    for seed in ("1", "1", "2"):
        sampling = ["--generation.temperature", "5", "--generation.seed", seed]
        assert main(["infer", *common, *sampling, "--prompt", "a b"]) == 0
        sampled.add(capsys.readouterr().out)
    assert len(sampled) == 2


OTHER = "{% for m in messages %}[{{ m.content }}]<|end|>{% endfor %}{% if add_generation_prompt %}[{% endif %}"


@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        (TaskSpec(template="say {prompt}:"), "say a b:"),
        (TaskSpec(template="chat"), "<|user|>a b<|end|><|assistant|>"),
        (TaskSpec(template="chat", chat_template=OTHER), "[a b]<|end|>["),
        (TaskSpec(), "a b\n"),  # of before there was more to say
    ],
)
def test_an_adapter_and_the_model_merged_with_it_are_asked_as_it_was_trained(
    tmp_path, capsys, tiny_llama, tokenizer, adapters, spec, asked
):
    one, merged = tmp_path / "one", tmp_path / "merged"
    shutil.copytree(adapters["a"], one)
    spec.save(one)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), one).eval()
    ids = tokenizer(asked, return_tensors="pt")["input_ids"]
    whole = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=0, pad_token_id=1)
    wanted = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True).rstrip("\n")
    settings = ["--model.dtype", "fp32", "--generation.max_new_tokens", "8", "--prompt", "a b"]
    assert main(["infer", "--adapter", str(one), *settings]) == 0
    assert capsys.readouterr().out.rstrip("\n") == wanted
    assert main(["merge", "--adapter", str(one), "--model.dtype", "fp32", "--output", str(merged)]) == 0
    capsys.readouterr()
    assert main(["infer", "--model", str(merged), *settings]) == 0
    assert capsys.readouterr().out.rstrip("\n") == wanted
    assert TaskSpec.read(merged) == (spec if spec.template else None)


def test_adapters_that_were_asked_in_other_ways_are_not_evaluated_on_the_same_tokens(tmp_path, capsys, words, adapters):
    names = []
    for name, template in (("one", "chat"), ("two", "say {prompt}:")):
        shutil.copytree(adapters["a"], tmp_path / name)
        TaskSpec(template=template).save(tmp_path / name)
        names += ["--adapter", str(tmp_path / name)]
    assert main(["evaluate", "--data", words, *names]) == 2
    assert "two: was trained with another template than" in capsys.readouterr().err


def test_infer_at_next_to_no_temperature_takes_the_likeliest(capsys, tiny_llama):
    common = ["infer", "--model", tiny_llama, "--model.dtype", "fp32", "--generation.max_new_tokens", "8"]
    said = []
    for temperature in ("0", "1e-40", "5e-324"):
        assert main([*common, "--prompt", "a b", "--generation.temperature", temperature]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2]
    for temperature in ("nan", "inf", "-1"):
        assert main([*common, "--prompt", "a b", f"--generation.temperature={temperature}"]) == 2
        assert "generation.temperature" in capsys.readouterr().err


def test_infer_ends_where_the_learnt_positions_do(tmp_path, capsys, tiny_gpt2):
    """512 of them; a prompt of as many leaves no place for an answer."""
    common = ["infer", "--model", tiny_gpt2, "--model.dtype", "fp32", "--data.template", "{prompt}"]
    assert main([*common, "--prompt", "\x01" * 509, "--generation.max_new_tokens", "3000"]) == 0
    prompt = torch.full((1, 509), make_tokenizer()("\x01")["input_ids"][0])
    new = AutoModelForCausalLM.from_pretrained(tiny_gpt2).generate(prompt, max_new_tokens=3, do_sample=False)[0, 509:]
    assert capsys.readouterr().out == make_tokenizer().decode(new, skip_special_tokens=True) + "\n"
    assert main([*common, "--prompt", "\x01" * 512]) == 2
    said = "has 512 tokens, but the model has 512 positions: shorten the prompt"
    assert capsys.readouterr().err.endswith(f"ftray infer: error: generation.prompt: {said}\n")
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"input": "\x01" * length}) + "\n" for length in (3, 512)))
    assert main([*common, "--file", str(file)]) == 2
    assert f"{file}:2: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("p.jsonl", '{"input": "a"}\n[1]\n', "p.jsonl:2: a record must be"),
        ("p.jsonl", '{"frage": "a"}\n', "p.jsonl:1: record with keys frage"),
        ("p.txt", "\n", "holds no prompt"),
        ("p.docx", "a", "p.docx: unknown format .docx; known: .jsonl"),
    ],
)
def test_a_bad_file_of_prompts_is_refused(tmp_path, capsys, tiny_llama, name, content, reason):
    (tmp_path / name).write_text(content)
    assert main(["infer", "--model", tiny_llama, "--file", str(tmp_path / name)]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\ufeff"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_only_line_breaks_end_a_line_of_prompts(tmp_path, suffix, odd):
    prompts = [f"a{odd}b", "c"]
    lines = prompts if suffix == ".txt" else [json.dumps({"prompt": p}, ensure_ascii=False) for p in prompts]
    file = tmp_path / f"prompts{suffix}"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, ""]).encode())
    found = [(str(where), record) for where, record in read_records(str(file))]
    assert found == [(f"{file}:{i}", {"prompt": p}) for i, p in enumerate(prompts, 1)]


def test_an_adapter_of_chats_is_not_prompted_raw_where_the_template_is_gone(
    tmp_path, capsys, words, tiny_llama, adapters
):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama, bare)
    (bare / "chat_template.jinja").unlink()
    shutil.copytree(adapters["a"], tmp_path / "adapter")
    TaskSpec("CAUSAL_LM", template=CHAT).save(tmp_path / "adapter")
    asked = ["infer", "--adapter", str(tmp_path / "adapter"), "--model", str(bare), "--prompt", "a"]
    assert main(asked) == 2
    assert "a chat template, which the tokenizer of" in capsys.readouterr().err
    assert main([*asked, "--data.chat_template", "chatml", "--generation.max_new_tokens", "2"]) == 0
    capsys.readouterr()
    scored = ["evaluate", *asked[1:5], "--data", words]
    assert main(scored) == 2
    assert "a chat template, which the tokenizer of" in capsys.readouterr().err


def test_evaluate_renders_by_the_template_that_an_adapter_was_trained_with(
    cluster, tmp_path, tiny_llama, tokenizer, words, adapters
):
    """Whether the base's tokenizer has one of its own or none."""
    for place, template in (("bare", OTHER), ("own", None)):
        base, adapter = tmp_path / place, tmp_path / f"{place}-adapter"
        shutil.copytree(tiny_llama, base)
        if place == "bare":
            (base / "chat_template.jinja").unlink()
        shutil.copytree(adapters["a"], adapter)
        TaskSpec(template=CHAT, chat_template=template).save(adapter)
        cache, file = tmp_path / f"{place}-shards", tmp_path / f"{place}.json"
        given = flags("--evaluation.generate", "false", "--split", "test", words=words, cache=cache)
        asked = ["evaluate", "--model", str(base), "--adapter", str(adapter), *given, "--output", str(file)]
        assert main(asked) == 0
        shards = TokenizedData.load(next(cache.glob("*/manifest.json")).parent)
        row = shards.rows("test")[0]
        records = map(json.loads, Path(words).read_text().splitlines())
        record = next(record for record in records if record["output"] == row["target"])
        turns = [{"role": "user", "content": record["input"]}, {"role": "assistant", "content": record["output"]}]
        wanted = tokenizer.apply_chat_template(turns, tokenize=False, chat_template=template)
        assert tokenizer.decode(row["input_ids"]) == wanted
        assert json.loads(file.read_text())["adapters"][str(adapter)]["loss"]["best"] > 0


def test_a_conversation_on_a_terminal(tiny_llama, adapters):
    """A real pseudo-terminal: the answer streams, Ctrl-C stops one, the next turn follows, Ctrl-D ends."""
    import sys

    import pexpect

    arguments = ["-m", "ftray.infer", "--adapter", adapters["a"], "--generation.max_new_tokens", "20000"]
    child = pexpect.spawn(sys.executable, [*arguments, "--model.dtype", "fp32"], encoding="utf-8", timeout=120)
    child.expect("Ctrl-D ends.*\r\n> ")
    child.sendline("hello")
    child.expect("hello\r\n")
    child.expect(r"\S{3}")  # it has begun to answer
    child.sendintr()
    child.expect("> ")
    child.sendline("/reset")
    child.expect("> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def weights(directory: str | Path, adapter: str | None = None) -> dict[str, torch.Tensor]:
    """Of a model, after merging `adapter` by PEFT alone."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.state_dict()


@pytest.mark.parametrize(("combination", "more"), [("cat", []), ("svd", ["--merge.rank", "8"])])
def test_combined_adapters_are_the_weighted_sum_of_their_updates(
    tmp_path, capsys, tiny_llama, adapters, combination, more
):
    """Exact for `cat` and for `svd` of the full rank; the second adapter is scaled by the root of its rank."""
    two = ["--adapter", adapters["b"], "--adapter", adapters["a"], "--weights", "0.7,0.3", "--combination", combination]
    assert main(["merge", *two, *more, "--model.dtype", "fp32", "--output", str(tmp_path / "merged")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"model {tmp_path / 'merged'}"
    base, a, b = weights(tiny_llama), weights(tiny_llama, adapters["a"]), weights(tiny_llama, adapters["b"])
    for name, weight in weights(tmp_path / "merged").items():
        wanted = base[name] + 0.3 * (a[name] - base[name]) + 0.7 * (b[name] - base[name])
        torch.testing.assert_close(weight, wanted, rtol=0, atol=2e-6)
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize(
    ("names", "more"),
    [
        (["a"], []),
        (["ia3"], []),
        (["ia3", "ia3"], ["--combination", "linear", "--weights", "0.5,0.5"]),
        (["a", "b"], ["--combination", "linear"]),
        (["a", "b"], ["--combination", "ties", "--density", "0.5"]),
        (["a", "b"], ["--combination", "dare_linear", "--density", "0.5"]),
        (["a", "b"], ["--combination", "dare_ties_svd", "--density", "0.5"]),
        (["a", "b"], ["--combination", "magnitude_prune", "--density", "0.5"]),
    ],
)
def test_merged_models_and_adapters_are_the_same_model(tmp_path, tiny_llama, adapters, names, more):
    given = [part for name in names for part in ("--adapter", adapters[name])]
    common = [*given, *more, "--model.dtype", "fp32", "--output"]
    assert main(["merge", *common, str(tmp_path / "model")]) == 0
    assert main(["merge", *common, str(tmp_path / "adapter"), "--form", "adapter"]) == 0
    merged, whole = weights(tmp_path / "model"), weights(tiny_llama, str(tmp_path / "adapter"))
    assert any((merged[name] - weight).abs().max() > 1e-3 for name, weight in weights(tiny_llama).items())
    for name, weight in merged.items():
        torch.testing.assert_close(weight, whole[name], rtol=0, atol=1e-6)


def test_combinations_that_peft_can_not_make_are_refused_with_the_reason(
    tmp_path, capsys, monkeypatch, tiny_llama, adapters
):
    monkeypatch.setattr("ftray.models.load.load_base", lambda *a: pytest.fail("the base was loaded"))
    made = {
        "dora": make_adapter(tiny_llama, tmp_path / "dora", 4, use_dora=True),
        "rank": make_adapter(tiny_llama, tmp_path / "rank", 5, r=2),
        "pattern": make_adapter(tiny_llama, tmp_path / "pattern", 6, rank_pattern={"q_proj": 2}),
        "bias": make_adapter(tiny_llama, tmp_path / "bias", 7, bias="lora_only"),
        "head": make_adapter(tiny_llama, tmp_path / "head", 8, modules_to_save=["norm"]),
        **adapters,
    }
    capsys.readouterr()
    asked = {
        ("a", "ia3"): ([], "of one method only, these are LORA and IA3"),
        ("ia3", "ia3"): ([], "by linear only"),
        ("a", "dora"): ([], "use_dora"),
        ("a", "rank"): (["--combination", "linear"], "rank 2 and 4"),
        ("a", "pattern"): (["--combination", "linear"], "rank 2 and 4, and it needs the same one: take cat"),
        ("a", "bias"): ([], "bias"),
        ("a", "head"): ([], "modules_to_save"),
        ("a", "b"): (["--combination", "ties"], "needs --density"),
        ("b", "a"): (["--weights", "1"], "1 for 2 adapters"),
        ("b", "b"): (["--merge.rank", "3"], "only svd"),
        ("a",): (["--weights", "1"], "several adapters"),
    }
    for names, (more, reason) in asked.items():
        given = [part for name in names for part in ("--adapter", made[name])]
        assert main(["merge", *given, *more, "--output", str(tmp_path / "out")]) == 2, names
        (line,) = capsys.readouterr().err.splitlines()
        assert reason in line
        assert not (tmp_path / "out").exists()
    assert main(["merge", "--adapter", adapters["a"], "--output", str(tmp_path)]) == 2
    assert "exists" in capsys.readouterr().err


def assert_same_adapter(directory: Path, other: Path, tolerance: float = 0) -> None:
    from safetensors.torch import load_file

    got, wanted = (load_file(d / "adapter_model.safetensors") for d in (directory, other))
    assert got.keys() == wanted.keys()
    assert any(weight.abs().max() > 0 for name, weight in wanted.items() if "lora_B" in name or "lora_E" in name)
    for name, weight in wanted.items():
        torch.testing.assert_close(got[name], weight, rtol=0, atol=tolerance)


def keep_configuration_only(checkpoint: Path, aside: Path) -> None:
    """Move the adapter that lies in the checkpoint aside, but for its configuration."""
    shutil.move(checkpoint / "adapter", aside)
    (checkpoint / "adapter").mkdir()
    shutil.copy(aside / "adapter_config.json", checkpoint / "adapter")


@pytest.mark.parametrize("method", ["lora", "adalora"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_zero_checkpoint_becomes_the_adapter_that_was_trained(tmp_path, tiny_llama, data, stage, method):
    from helpers.trainers import ADALORA, LORA, make_run, with_trainer

    run = make_run(tiny_llama, {"lora": LORA, "adalora": ADALORA}[method], zero_stage=stage)
    checkpoint = tmp_path / "checkpoint"
    with_trainer(run, data, save_at=(8, str(checkpoint)))
    keep_configuration_only(checkpoint, tmp_path / "trained")
    merge = ["merge", "--adapter", str(checkpoint), "--model.dtype", "fp32", "--output"]
    assert main([*merge, str(tmp_path / "adapter"), "--form", "adapter"]) == 0
    assert_same_adapter(tmp_path / "adapter", tmp_path / "trained")
    assert main([*merge, str(tmp_path / "model")]) == 0
    whole = weights(tiny_llama, str(tmp_path / "trained"))
    for name, weight in weights(tmp_path / "model").items():
        torch.testing.assert_close(weight, whole[name], rtol=0, atol=1e-6)


def test_a_zero_checkpoint_of_full_fine_tuning_becomes_a_model(tmp_path, capsys, tiny_llama, other_base):
    """DeepSpeed's own layout: shards in `global_step1`, named by `latest`, and no adapter."""
    from ftray.config import TrainingConfig
    from ftray.training.engine import build_engine, join_process_group

    join_process_group()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    engine = build_engine(model, TrainingConfig(batch_size=1, learning_rate=1e-2, zero_stage=2, warmup=0), 2)
    ids = torch.randint(5, 300, (1, 12))
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.save_checkpoint(str(tmp_path / "checkpoint"))
    merge = ["merge", "--adapter", str(tmp_path / "checkpoint"), "--model.dtype", "fp32", "--output"]
    assert main([*merge, str(tmp_path / "out")]) == 2
    assert "give it alone, with --model" in capsys.readouterr().err
    assert main([*merge, str(tmp_path / "out"), "--model", other_base["narrower"]]) == 2
    assert "size mismatch" in capsys.readouterr().err
    assert main([*merge, str(tmp_path / "out"), "--model", tiny_llama]) == 0
    before = weights(tiny_llama)
    for name, weight in weights(tmp_path / "out").items():
        torch.testing.assert_close(weight, dict(model.state_dict())[name].float(), rtol=0, atol=0)
        assert not torch.equal(weight, before[name])


def two_workers(tiny_llama: str, data, root: Path, stage: int) -> Path:
    """The last checkpoint of a run under Ray Train."""
    from helpers.trainers import LORA, make_run

    from ftray.config import Config
    from ftray.search.trial_worker import SearchContext, trainer
    from ftray.storage.local import LocalLocation

    run = make_run(tiny_llama, LORA, zero_stage=stage, micro_batch=2)
    config = Config.model_validate({"scaling": {"workers": 2}, "training": run.training.model_dump()})
    result = trainer(SearchContext(config, tiny_llama, data.directory, 0.0), run, "two", LocalLocation(root)).fit()
    return Path(result.checkpoint.path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_checkpoint_of_two_ray_train_workers_becomes_the_adapter(tmp_path, capsys, tiny_llama, data, stage):
    checkpoint = two_workers(tiny_llama, data, tmp_path, stage)
    assert len(list((checkpoint / "state").glob("*optim_states.pt"))) == 2
    keep_configuration_only(checkpoint, tmp_path / "trained")
    merge = ["merge", "--adapter", str(checkpoint), "--model.dtype", "fp32", "--form", "adapter", "--output"]
    assert main([*merge, str(tmp_path / "adapter")]) == 0
    assert_same_adapter(tmp_path / "adapter", tmp_path / "trained")
    next((checkpoint / "state").glob("*rank_1*optim_states.pt")).unlink()
    capsys.readouterr()
    assert main([*merge, str(tmp_path / "again")]) == 2
    assert "but found 1 files" in capsys.readouterr().err.splitlines()[-1]


SPACE = """
method: {choice: [lora, ia3]}
lora: {rank: {choice: [2, 4]}, target_modules: all-linear, learning_rate: {log: [1.0e-3, 1.0e-2]}}
ia3: {learning_rate: {log: [1.0e-2, 1.0e-1]}}
"""


def planned(capsys, tmp_path: Path, words: str, tiny_llama: str, *more: str) -> dict:
    (tmp_path / "space.yaml").write_text(SPACE)
    named = ["--model", tiny_llama, "--space", str(tmp_path / "space.yaml"), "--output", str(tmp_path / "out" / "run")]
    common = flags("--trials", "9", "--training.steps", "9", words=words, cache=tmp_path / "shards")
    assert main(["tune", "--plan", *named, *common, *more]) == 0
    assert not (tmp_path / "out").exists()
    return json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("plan     "))


def test_a_plan_counts_what_a_search_would_run(cluster, tmp_path, capsys, words, tiny_llama):
    from ftray.adapters.methods import attach
    from ftray.config import AdapterConfig, ModelConfig
    from ftray.models.load import load_base

    asha = ["--search.scheduler", "asha"]
    plan = planned(capsys, tmp_path, words, tiny_llama, "--pack", "2", *asha)
    assert plan["rungs"] == [{"records": 8, "trials": 9}, {"records": 24, "trials": 3}, {"records": 72, "trials": 1}]
    largest = AdapterConfig(method="lora", rank=4, target_modules="all-linear")
    model = attach(load_base(ModelConfig(), tiny_llama), largest, 9, 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan["methods"]["lora"]["parameters"] == trained
    assert plan["methods"]["ia3"]["runs"] == "in a pack, together with others"
    assert plan["memory"]["base"] == sum(p.numel() * 4 for p in llama().parameters())
    assert plan["memory"]["adapters"] == 2 * 16 * trained
    assert plan["probe"]["trials"] == 2
    # 9 trials to the first rung, of 3 the second part, of 1 the third
    length = plan["tokens"]["at_most"] / (9 * 72)
    assert plan["tokens"]["expected"] == (9 * 8 + 3 * 16 + 48) * length
    assert plan["seconds"] > 9 * 8 * length / plan["probe"]["tokens"] * plan["probe"]["step"]


def test_a_plan_times_what_has_but_one_step(cluster, tmp_path, capsys, words, tiny_llama):
    plan = planned(capsys, tmp_path, words, tiny_llama, "--pack", "2", "--training.steps", "1")
    assert plan["tokens"]["at_most"] > 0
    assert plan["probe"]["tokens"] > 0


LORA = {"method": "lora", "rank": 4, "target_modules": "all-linear", "dropout": 0.0}
OFT = {"method": "oft", "block_size": 16}
SHAPES = [
    *((adapter, length, torch.float32) for adapter in (LORA, OFT) for length in (48, 160, 400)),
    (LORA | {"use_dora": True}, 48, torch.float32),  # its norms take no gradient: what they are made of is not kept
    (LORA, 48, torch.bfloat16),
    (OFT, 48, torch.bfloat16),
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("adapter", "length", "dtype"), SHAPES, ids=str)
def test_memory_counted_from_shapes_is_what_a_real_step_of_a_pack_takes(adapter, length, dtype, checkpointing):
    """A Llama whose proportions are those of SmolLM2, its words and all; of records of one length."""
    sizes = {"vocab_size": 12000, "num_hidden_layers": 6, "hidden_size": 144, "intermediate_size": 384}
    base = llama(**sizes).to(dtype).requires_grad_(False)
    with torch.device("meta"):
        planned = llama(**sizes).to(dtype)
    shapes = measure(LoadedModel(planned, CAUSAL, ()), {"adapter": adapter, "training": {}}, length, checkpointing)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    pack, batches, trials = Pack(base, CAUSAL), {}, 4
    for name in map(str, range(trials)):
        model = attach(LoadedModel(share(base), CAUSAL, ()), AdapterConfig(**adapter), 9, 0)
        pack.add(name, model, TorchOptimizer(model, torch.optim.SGD(trainable(model), lr=0.0)))
        ids = torch.arange(length)[None]
        labels = torch.where(ids > 0, ids, -100)
        batches[name] = [{"input_ids": ids, "position_ids": ids, "labels": labels}]
    pack.step(batches)
    trained = 4 * trials * shapes.parameters
    taken = most_bytes(lambda: pack.step(batches))
    assert taken - trained <= 1.15 * shapes.activations(trials * length, trials)
    assert taken >= 0.85 * shapes.activations(trials * length, trials)


@pytest.mark.parametrize(("fixture", "task"), [("tiny_bert", "TOKEN_CLS"), ("tiny_t5", "SEQ_2_SEQ_LM")])
def test_activations_of_tasks_that_pad(request, fixture, task):
    path, spec = request.getfixturevalue(fixture), TaskSpec(task, ("a", "b") if task == "TOKEN_CLS" else (), 1)
    cfg, adapter = ModelConfig(dtype="fp32"), {"method": "lora"}
    shapes = measure(load_skeleton(cfg, path, spec), {"adapter": adapter, "training": {}}, 20, False)
    model = attach(load_base(cfg, path, spec), AdapterConfig(**adapter), 9, 0)
    assert shapes.isolation_reason == f"{task} pads its records"
    ids = torch.arange(50)[None]
    further = {"decoder_input_ids": ids} if task == "SEQ_2_SEQ_LM" else {}
    own = {storage_key(p) for p in model.parameters()}
    kept = saved_bytes(lambda _: model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), **further), 50, own)
    assert shapes.activations(50) == pytest.approx(kept, rel=0.15)


def test_commands_know_the_task_of_an_adapter(cluster, tmp_path, capsys, tiny_bert):
    from ftray.adapters import lora_init
    from ftray.adapters.methods import attach
    from ftray.config import AdapterConfig, ModelConfig
    from ftray.models.load import load_base
    from ftray.task_spec import TaskSpec

    records = [{"text": f"{word} {i}", "label": "bad" if i % 3 else "good"} for i in range(60) for word in ("a", "cat")]
    # of three classes, in an order of their own, of which the records hold two
    spec = TaskSpec("SEQ_CLS", ("ugly", "good", "bad"), 1)
    model = attach(load_base(ModelConfig(dtype="fp32"), tiny_bert, spec), AdapterConfig(method="lora"), 1, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    (tmp_path / "adapter").mkdir()
    lora_init.save(model, spec, tmp_path / "adapter")
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    adapter, given = (
        ["--adapter", str(tmp_path / "adapter")],
        flags(words=str(tmp_path / "words.jsonl"), cache=tmp_path),
    )

    def evaluated(*which: str) -> dict:
        assert main(["evaluate", *which, "--split", "all", *given]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    found = evaluated(*adapter)
    assert found["task"] == "SEQ_CLS"
    assert found["records"] == len(records)
    (metrics,) = found["adapters"].values()
    assert metrics["loss"]["best"] != pytest.approx(metrics["loss"]["base"])
    assert "perplexity" not in metrics
    assert main(["merge", *adapter, "--output", str(tmp_path / "merged"), "--model.dtype", "fp32"]) == 0
    assert evaluated("--model", str(tmp_path / "merged"))["base"] == pytest.approx(
        {name: metric["best"] for name, metric in metrics.items()}, abs=1e-4
    )
    for arguments, reason in (
        (["infer", *adapter, "--prompt", "a"], "infer: only CAUSAL_LM answers prompts, this is for SEQ_CLS"),
        (["evaluate", *adapter, "--task", "TOKEN_CLS", *given], "adapter is for SEQ_CLS"),
        (["merge", *adapter, *adapter, "--output", str(tmp_path / "both")], "modules_to_save"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1


def test_a_proof_reads_no_more_records_than_it_needs(tmp_path, monkeypatch, tiny_llama, data, adapters):
    from ftray.config import Config
    from ftray.search.trial_worker import SearchContext
    from ftray.storage.location import parse_location

    tune = importlib.import_module("ftray.tune")
    monkeypatch.setattr(tune, "PROOF_RECORDS", 3)
    assert data.splits["test"].records > 3
    shutil.copytree(adapters["a"], tmp_path / "best" / "adapter")
    job = SearchContext(Config.model_validate({"model": {"dtype": "fp32"}}), tiny_llama, data.directory, 0.0)
    proof = tune.prove(job, parse_location(str(tmp_path)))
    assert proof["records"] == len(proof["samples"]) == 3
    assert tune.merge_best(job, parse_location(str(tmp_path)))["difference"] < 1e-5
    assert (tmp_path / "best" / "merged" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--pack", "off"], ["--training.zero_stage", "3", "--scaling.workers", "2"]])
def test_a_plan_of_trials_with_workers_of_their_own(cluster, tmp_path, capsys, words, tiny_llama, more):
    plan = planned(capsys, tmp_path, words, tiny_llama, *more)
    assert plan["probe"]["trials"] == 1
    assert plan["probe"]["step"] > 0
    assert plan["methods"]["lora"]["runs"].startswith("workers of its own")


def test_a_rendered_chat_shows_context_and_answer_in_colours_and_whole_characters(tokenizer):
    import io

    from rich.console import Console

    from ftray.config import DataConfig
    from ftray.data.records import parse
    from ftray.data.tokens import tokenize
    from ftray.reports.data import rendered

    turns = [{"role": "user", "content": "wie [bold]groß?"}, {"role": "assistant", "content": "ganz groß €"}]
    tokens = tokenize([parse({"messages": turns}, "")], tokenizer, DataConfig())[0]
    text = rendered({"input_ids": tokens.input_ids, "labels": tokens.labels}, tokenizer)
    shown = io.StringIO()
    Console(file=shown, force_terminal=True, color_system="standard").print(text, soft_wrap=True)
    asked, answered = "<|user|>wie [bold]groß?<|end|><|assistant|>", "ganz groß €<|end|>"
    assert shown.getvalue() == f"\x1b[2m{asked}\x1b[0m\x1b[1;32m{answered}\x1b[0m\n"


@pytest.mark.parametrize(
    ("record", "asked"),
    [
        (
            {"instruction": "a", "input": "b", "system": "S", "history": [["c", "d"]]},
            "<|system|>S<|end|><|user|>c<|end|><|assistant|>d<|end|><|user|>a\nb<|end|><|assistant|>",
        ),
        ({"prompt": "a", "history": []}, "<|system|>be kind<|end|><|user|>a<|end|><|assistant|>"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                    {"role": "assistant", "content": "c", "weight": 0},
                    {"role": "user", "content": "d"},
                    {"role": "assistant", "content": "e", "weight": 0},
                ]
            },
            "<|system|>be kind<|end|><|user|>ab<|end|><|assistant|>c<|end|><|user|>d<|end|><|assistant|>",
        ),
        (
            {"messages": [{"role": "developer", "content": "S"}, {"role": "user", "content": "a"}]},
            "<|system|>S<|end|><|user|>a<|end|><|assistant|>",
        ),
        ({"prompt": "a"}, "<|system|>be kind<|end|><|user|>a<|end|><|assistant|>"),
        ({"question": "a", "context": "b"}, "<|system|>be kind<|end|><|user|>a\nb<|end|><|assistant|>"),
        ({"text": "the cat", "id": 3}, "the cat"),
    ],
)
def test_a_record_is_asked_by_the_keys_that_training_reads(tokenizer, record, asked):
    from ftray.config import DataConfig
    from ftray.data.inference import Renderer

    assert tokenizer.decode(Renderer(tokenizer, DataConfig(), "be kind").record("f:1", record, False)) == asked


def test_a_prompt_is_asked_raw_where_the_template_says_so(tokenizer):
    from ftray.config import DataConfig
    from ftray.data.inference import Renderer

    renderer = Renderer(tokenizer, DataConfig(template="say {prompt}:"), "be kind", True)
    assert tokenizer.decode(renderer.record("f:1", {"question": "a"}, False)) == "say a:"
    assert tokenizer.decode(renderer.plain("a")) == "say a:"


@pytest.mark.parametrize("lost", [{"label": True}, {"images": ["a.png"]}, {"context": "c"}, {"tools": [{}]}])
def test_what_training_refuses_is_not_asked(tokenizer, lost):
    from ftray.config import DataConfig
    from ftray.data.inference import Renderer
    from ftray.errors import UserError

    with pytest.raises(UserError, match=f"^f:1: {next(iter(lost))}"):
        Renderer(tokenizer, DataConfig(), None).record("f:1", {"prompt": "a"} | lost, False)


def test_a_conversation_is_asked_with_all_that_was_said_before(tokenizer):
    from ftray.config import DataConfig
    from ftray.data.inference import Renderer

    ids = Renderer(tokenizer, DataConfig(), "be kind").turns([("user", "a"), ("assistant", "b"), ("user", "c")])
    said = "<|system|>be kind<|end|><|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"
    assert tokenizer.decode(ids) == said
