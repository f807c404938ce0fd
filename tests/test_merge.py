"""A merged model does what its adapter does, or there is none: shared weights, rounding, what PEFT breaks."""

import json
import logging
import shutil
import sys

import pytest
import torch
import transformers
from conftest import bert, gpt2, llama, make_tokenizer, t5
from helpers.searches import run_here
from peft import IA3Config, LoKrConfig, LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from transformers import UMT5Config, UMT5ForConditionalGeneration

from ftray.adapters import lora_init
from ftray.adapters.merge import merge, noise, outputs, refuse, relative, save_merged
from ftray.adapters.methods import attach
from ftray.cli import main
from ftray.config import AdapterConfig, Config, ModelConfig
from ftray.errors import UserError
from ftray.models.load import load_base
from ftray.search.trial_worker import SearchContext
from ftray.storage.local import LocalLocation
from ftray.task_spec import CAUSAL, TaskSpec
from ftray.tune import merge_best

FP32 = ModelConfig(dtype="fp32")
SEQ2SEQ = TaskSpec("SEQ_2_SEQ_LM", (), 1)
TEXTS = [list(range(5, 25)), list(range(100, 380, 20)), [0, 1, 2, 383]]


@pytest.fixture(autouse=True)
def logs():
    yield
    logging.disable(logging.NOTSET)


def tied_llama(**changes):
    return llama(tie_word_embeddings=True, **changes)


def umt5():
    """Its output is scaled where, and only where, head and embeddings are said to be one: it can't be untied."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 384, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    special = {"decoder_start_token_id": 1, "pad_token_id": 1, "eos_token_id": 0}
    return UMT5ForConditionalGeneration(UMT5Config(**sizes, **special, tie_word_embeddings=True))


def lora(*targets: str, **more) -> LoraConfig:
    return LoraConfig(r=4, init_lora_weights=False, target_modules=list(targets), **more)


def ia3(target: str) -> IA3Config:
    return IA3Config(target_modules=[target], feedforward_modules=[], init_ia3_weights=False)


def saved(make, directory) -> str:
    make().save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return str(directory)


def adapter_of(base: str, config, directory, task: TaskSpec = CAUSAL, size: float = 0.2) -> torch.Tensor:
    """Write a random adapter; returns what it says of `TEXTS`."""
    config.task_type = task.name
    torch.manual_seed(1)
    model = get_peft_model(load_base(FP32, base, task).model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(size * torch.randn_like(parameter))
    model.save_pretrained(directory, save_embedding_layers=False)
    task.save(directory)
    said = outputs(model, TEXTS)
    with model.disable_adapter():
        assert relative(outputs(model, TEXTS), said) > 0.01
    return said


# of models whose head is their embeddings: what is adapted
TIED = {
    "head": (tied_llama, lora("lm_head")),
    "embeddings": (tied_llama, lora("embed_tokens")),
    "both": (tied_llama, lora("embed_tokens", "lm_head")),
    "both, as one": (tied_llama, lora("embed_tokens", ensure_weight_tying=True)),
    "head and more": (tied_llama, lora("lm_head", "q_proj")),
    "head, DoRA": (tied_llama, lora("lm_head", use_dora=True)),
    "head, IA3": (tied_llama, ia3("lm_head")),
    "head, LoKr": (tied_llama, LoKrConfig(r=4, target_modules=["lm_head"], init_weights=False)),
    "whole head": (tied_llama, lora("q_proj", modules_to_save=["lm_head"])),
    "whole embeddings": (tied_llama, lora("q_proj", modules_to_save=["embed_tokens"])),
    "whole embeddings, as one": (
        tied_llama,
        lora("q_proj", modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "both whole": (tied_llama, lora("q_proj", modules_to_save=["embed_tokens", "lm_head"])),
    "tokens besides": (tied_llama, lora("q_proj", trainable_token_indices=[5, 6])),
    "tokens": (tied_llama, TrainableTokensConfig(token_indices=[5, 6, 7], target_modules=["embed_tokens"])),
    "GPT-2's head": (gpt2, lora("lm_head")),
    "GPT-2's embeddings": (gpt2, lora("wte")),
    "BERT's head": (bert, lora("decoder")),
    "BERT's head and its bias": (bert, ia3("decoder")),
    "T5's head": (t5, lora("lm_head")),
    "T5's whole head": (t5, lora("q", modules_to_save=["lm_head"])),
    "nothing that is shared": (tied_llama, lora("q_proj")),
}


@pytest.mark.parametrize("name", TIED)
def test_what_was_learnt_for_one_of_two_layers_stays_with_it(name, tmp_path):
    """By plain transformers, in the directory alone."""
    make, config = TIED[name]
    task = SEQ2SEQ if make is t5 else CAUSAL
    base = saved(make, tmp_path / "base")
    wanted = adapter_of(base, config, tmp_path / "adapter", task)
    told = save_merged(FP32, base, tmp_path / "adapter", tmp_path / "merged", task, TEXTS)
    assert told["difference"] < 1e-5
    assert told["rounding"] == 0
    merged = getattr(transformers, task.load().auto_class).from_pretrained(tmp_path / "merged")
    assert relative(wanted, outputs(merged, TEXTS)) < 1e-5
    if name in ("nothing that is shared", "whole embeddings, as one"):
        assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    if name == "head":  # for readers other than transformers, which go by it
        assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize("make", [tied_llama, gpt2, t5])
def test_full_fine_tuning_trains_head_and_embeddings_whatever_they_are_called(make, tmp_path):
    task = SEQ2SEQ if make is t5 else CAUSAL
    base, adapter = saved(make, tmp_path / "base"), tmp_path / "adapter"
    model = attach(load_base(FP32, base, task), AdapterConfig(method="full"), 3, 0)
    plain = outputs(model, TEXTS)
    ids = torch.tensor([TEXTS[0]])
    model(input_ids=ids, labels=ids).loss.backward()
    learns = {id(p) for p in model.parameters() if p.grad is not None}
    head = model.get_output_embeddings().modules_to_save["default"].weight
    assert id(head) in learns
    for parameter in model.parameters():
        if id(parameter) in learns:
            parameter.data.sub_(parameter.grad.sign(), alpha=0.02)
    adapter.mkdir()
    lora_init.save(model, task, adapter)
    wanted = outputs(model, TEXTS)
    assert relative(plain, wanted) > 0.01
    again = PeftModel.from_pretrained(load_base(FP32, base, task).model, adapter)
    assert relative(wanted, outputs(again, TEXTS)) < 1e-6
    assert save_merged(FP32, base, adapter, tmp_path / "merged", task, TEXTS)["difference"] < 1e-6
    merged = getattr(transformers, task.load().auto_class).from_pretrained(tmp_path / "merged")
    assert relative(wanted, outputs(merged, TEXTS)) < 1e-6
    assert torch.equal(merged.get_output_embeddings().weight, head)


def test_an_untied_model_stays_as_it_is(tmp_path):
    base = saved(llama, tmp_path / "base")
    adapter_of(base, lora("lm_head"), tmp_path / "adapter")
    save_merged(FP32, base, tmp_path / "adapter", tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    before = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(again.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert not torch.equal(again.lm_head.weight, before.lm_head.weight)


def told_by(command: list[str], capsys) -> str:
    capsys.readouterr()
    assert main(command) == 2
    return capsys.readouterr().err.splitlines()[-1]  # after the progress of transformers


def test_a_merged_model_that_does_something_else_is_refused_and_leaves_nothing(tmp_path, capsys):
    base = saved(umt5, tmp_path / "base")
    adapter_of(base, lora("lm_head"), tmp_path / "adapter", SEQ2SEQ)
    before = sorted(tmp_path.iterdir())
    command = ["merge", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]
    line = told_by(command, capsys)
    assert "merge: no merged model: it would differ from the adapter by " in line
    assert line.endswith("serve the adapter itself")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("value", [float("nan"), 1e25])
def test_an_adapter_that_has_diverged_is_refused(value, tmp_path, capsys):
    base = saved(llama, tmp_path / "base")
    model = get_peft_model(load_base(FP32, base).model, LoraConfig(r=4, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.fill_(value)
    model.save_pretrained(tmp_path / "adapter")
    command = ["merge", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]
    assert "PEFT refuses: NaNs detected" in told_by(command, capsys)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rounding_is_told_apart_from_a_difference(dtype, tmp_path, capsys):
    """What is stored is each weight of the float32 sum, rounded; its effect is that of the rounding alone."""
    base = saved(tied_llama, tmp_path / "base")
    wanted = adapter_of(base, lora("lm_head", "q_proj"), tmp_path / "adapter")
    whole = merge(PeftModel.from_pretrained(load_base(FP32, base).model, tmp_path / "adapter"))
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    told = save_merged(ModelConfig(dtype=dtype), base, tmp_path / "adapter", tmp_path / "merged", CAUSAL, TEXTS)
    stored = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert stored.dtype == kind
    for name, weight in whole.state_dict().items():
        assert torch.equal(stored.state_dict()[name], weight.to(kind)), name
    assert told["difference"] < 1e-5
    assert told["rounding"] == pytest.approx(relative(wanted, outputs(stored.float(), TEXTS)), rel=0.01)
    assert told["rounding"] > 1e-5  # more than a float32 sum may differ by
    command = ["merge", "--adapter", str(tmp_path / "adapter"), "--model.dtype", dtype]
    assert main([*command, "--output", str(tmp_path / "again")]) == 0
    assert "more as it is stored" in capsys.readouterr().out


def test_weights_beyond_the_dtype_are_refused(tmp_path, capsys):
    base = saved(llama, tmp_path / "base")
    adapter_of(base, lora("lm_head"), tmp_path / "adapter", size=300)  # a sum of some 1e5, and float16 ends at 65504
    command = ["merge", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]
    assert "float16 does not hold its weights: take --model.dtype fp32 or bf16" in told_by(
        [*command, "--model.dtype", "fp16"], capsys
    )
    assert not (tmp_path / "merged").exists()
    assert main([*command, "--model.dtype", "bf16"]) == 0


def test_float32_may_differ_by_what_it_is_and_a_wrong_weight_may_not(tmp_path):
    """A deep model, and the sum in float64 as the measure of what float32 makes of it."""
    base = saved(lambda: llama(num_hidden_layers=24), tmp_path / "base")
    adapter_of(base, lora("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"), tmp_path / "adapter", size=0.5)

    def adapted(dtype: torch.dtype) -> PeftModel:
        return PeftModel.from_pretrained(load_base(FP32, base).model, tmp_path / "adapter").to(dtype)

    exact = outputs(adapted(torch.float64), TEXTS)
    merged = merge(adapted(torch.float32))
    before = {name: weight.clone() for name, weight in merged.state_dict().items()}
    allowed = noise(merged, TEXTS)
    assert all(torch.equal(before[name], weight) for name, weight in merged.state_dict().items())
    off = relative(exact, outputs(merged, TEXTS))
    assert 0 < off < allowed < 1000 * off
    refuse(off, 1e-9, merged, TEXTS, "it", "the adapter")
    merged.model.layers[3].mlp.up_proj.weight.data.mul_(1.01)
    wrong = relative(exact, outputs(merged, TEXTS))
    with pytest.raises(UserError, match="would differ from the adapter"):
        refuse(wrong, 1e-5, merged, TEXTS, "it", "the adapter")


SPACE = "method: lora\nlora: {learning_rate: 0.05, target_modules: lm_head, dropout: 0.0}\n"


def test_a_search_whose_best_can_not_be_merged_keeps_its_proof(cluster, tmp_path, words):
    base = saved(umt5, tmp_path / "base")
    (tmp_path / "space.yaml").write_text(SPACE)
    output = tmp_path / "out"
    flags = {
        "--data": words,
        "--model": base,
        "--task": "SEQ_2_SEQ_LM",
        "--space": str(tmp_path / "space.yaml"),
        "--output": str(output),
        "--trials": "2",
        "--data.cache": str(tmp_path / "shards"),
        "--evaluation.max_new_tokens": "4",
        "--training.steps": "4",
        "--training.learning_rate": "1e-9",  # of the default configuration, which is to come second
        "--model.dtype": "fp32",
    }
    done = run_here([sys.executable, "-m", "ftray.tune", *(part for pair in flags.items() for part in pair)])
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("ftray tune: merge: no merged model: it would differ from the adapter by ")
    assert "merged   none: merge: no merged model" in done.stdout
    summary = json.loads((output / "summary.json").read_text())
    assert summary["best"]["trial"] == 1
    assert summary["proof"]["metrics"]["loss"]["best"] < summary["proof"]["metrics"]["loss"]["base"]
    assert "would differ" in summary["proof"]["merged"]["reason"]
    assert (output / "best" / "adapter" / "adapter_model.safetensors").exists()
    assert not (output / "best" / "merged").exists()


def test_whatever_goes_wrong_in_merging_is_a_reason(tmp_path, tiny_llama, data):
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    (tmp_path / "best" / "merged").mkdir(parents=True)  # of another best, from before
    adapter_of(str(base), lora("q_proj"), tmp_path / "best" / "adapter")
    (base / "model.safetensors").write_bytes(b"damaged")
    job = SearchContext(Config.model_validate({"model": {"dtype": "fp32"}}), str(base), data.directory, 0.0)
    reason = merge_best(job, LocalLocation(tmp_path))["reason"]
    assert reason.startswith("merge: ")
    assert "\n" not in reason
    assert [p.name for p in (tmp_path / "best").iterdir()] == ["adapter"]
