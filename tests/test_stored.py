"""Bases that are stored quantised, as they lie on hubs: by bitsandbytes they are trained on, all others are refused."""

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import ray
import torch
from conftest import make_tokenizer
from helpers.searches import command, run_here
from transformers import AutoModelForCausalLM

from ftray.adapters.compatibility import dry_run
from ftray.cli import main
from ftray.config import AdapterConfig, ModelConfig, TrainingConfig
from ftray.errors import UserError
from ftray.models.load import load_base, load_skeleton
from ftray.models.stored import as_stored
from ftray.task_spec import TaskSpec

# as the models' config.json say it
OTHERS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "fbgemm_fp8": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "nobody's": {"quant_method": "nobody's", "bits": 3},
    "NVFP4": {"quant_algo": "NVFP4"},
    "a method that it does not name": {"bits": 4},
}


@pytest.fixture(autouse=True)
def logs():
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def stored(tmp_path_factory, tiny_llama) -> dict[str, str]:
    """The tiny Llama as bitsandbytes has it, written by transformers."""
    places = {}
    for bits in ("4bit", "8bit"):
        places[bits] = str(tmp_path_factory.mktemp("stored") / bits)
        load_base(ModelConfig(dtype="fp32", quantization=bits), tiny_llama).model.save_pretrained(places[bits])
        make_tokenizer().save_pretrained(places[bits])
    return places


def says(model: str, directory: Path, quantization: dict, inside: str | None = None) -> str:
    """A copy of a model whose configuration says so."""
    shutil.copytree(model, directory)
    config = json.loads((directory / "config.json").read_text())
    (config.setdefault(inside, {}) if inside else config)["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


@pytest.mark.parametrize("method", OTHERS)
def test_what_can_not_be_trained_on_is_refused_by_every_command_first(
    method, tmp_path, capsys, monkeypatch, tiny_llama, words
):
    monkeypatch.setattr(ray, "init", lambda *a, **k: pytest.fail("Ray was started"))
    model, output = says(tiny_llama, tmp_path / "model", OTHERS[method]), str(tmp_path / "out")
    on_data = ["--model", model, "--data", words]
    for arguments in (
        ["tune", *on_data, "--output", output],
        ["train", *on_data, "--output", output],
        ["train", *on_data, "--output", output, "--model.quantization", "4bit"],
        ["evaluate", *on_data],
        ["infer", "--model", model, "--prompt", "a"],
        ["serve", "--model", model],
    ):
        assert main(arguments) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert f"model {model}: is stored quantised by {method}, which is neither trained on nor merged: take" in line
    assert not (tmp_path / "out").exists()


def test_it_is_seen_in_a_part_of_the_configuration_too(tmp_path, tiny_llama):
    model = says(tiny_llama, tmp_path / "model", OTHERS["awq"], "text_config")
    with pytest.raises(UserError, match="is stored quantised by awq"):
        as_stored(ModelConfig(), model)


@pytest.mark.parametrize(("content", "what"), [("{", "is not valid JSON: "), ("[1]", "must hold an object")])
def test_a_broken_configuration_is_refused(content, what, tmp_path, capsys, tiny_llama, words):
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(content)
    assert main(["tune", "--model", str(tmp_path / "model"), "--data", words, "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"its config.json {what}" in line


def test_what_is_asked_for_is_what_is_stored(stored, tiny_llama):
    assert as_stored(ModelConfig(quantization="8bit"), tiny_llama) == ModelConfig(quantization="8bit")
    for asked in ({}, {"quantization": "4bit"}, {"quantization": "4bit", "quant_type": "nf4"}, {"quant_type": "fp4"}):
        found = as_stored(ModelConfig(**asked), stored["4bit"])
        assert (found.quantization, found.quant_type, found.double_quantization) == ("4bit", "nf4", True)
        assert as_stored(ModelConfig(**found.model_dump()), stored["4bit"]) == found  # as a run's config.yaml has it
    assert as_stored(ModelConfig(), stored["8bit"]).quantization == "8bit"
    for asked, what in (
        ({"quantization": "8bit"}, "model.quantization 8bit: .* is stored with 4bit: leave it out"),
        ({"quantization": "4bit", "quant_type": "fp4"}, "model.quant_type fp4: .* is stored with nf4"),
        ({"quantization": "4bit", "double_quantization": False}, "model.double_quantization False"),
    ):
        with pytest.raises(UserError, match=what) as refused:
            as_stored(ModelConfig(**asked), stored["4bit"])
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_it_is_the_model_that_was_stored(bits, stored, tiny_llama):
    ids = torch.arange(20)[None]
    before = load_base(ModelConfig(dtype="fp32", quantization=bits), tiny_llama).model
    again = load_base(ModelConfig(dtype="fp32"), stored[bits]).model
    kind = type(before.model.layers[0].mlp.up_proj)
    assert kind is not torch.nn.Linear
    assert type(again.model.layers[0].mlp.up_proj) is kind
    torch.testing.assert_close(again(ids).logits, before(ids).logits, rtol=0, atol=0)
    assert all(type(m) is not kind for m in load_skeleton(ModelConfig(), stored[bits]).model.modules())


@pytest.mark.parametrize("skipped", [["lm_head"], None])
def test_a_head_that_it_lacks_is_trained_in_floating_point(skipped, stored, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(stored["4bit"], model)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = skipped
    (model / "config.json").write_text(json.dumps(config))
    base = load_base(ModelConfig(dtype="fp32"), str(model), TaskSpec("SEQ_CLS", ("a", "b"), 1))
    assert base.new_modules == ("score",)
    assert type(base.model.score) is torch.nn.Linear
    assert base.model.score.weight.is_floating_point()


def test_methods_know_that_it_is_quantised(stored):
    cfg = as_stored(ModelConfig(), stored["4bit"])
    skeleton = load_skeleton(cfg, stored["4bit"])
    for adapter, what in (
        ({"method": "lora", "init": "loftq"}, "with a base that is stored quantised"),
        ({"method": "hra"}, "hra with model.quantization"),
        ({"method": "lora", "init": "pissa"}, "lost in their rounding"),
    ):
        with pytest.raises(UserError, match=what):
            dry_run(AdapterConfig(**adapter), skeleton, cfg, TrainingConfig())
    dry_run(AdapterConfig(method="lora", target_modules="all-linear"), skeleton, cfg, TrainingConfig())


SPACE = "method: lora\nlora: {learning_rate: 0.02, target_modules: all-linear}\n"


def test_a_search_on_it_is_proven_and_merged_and_every_command_takes_it(cluster, tmp_path, words, stored):
    output, model = tmp_path / "out", stored["4bit"]
    done = run_here(command(output, words, model, "--trials", "2", "--pack", "2", space=SPACE, steps=12))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "quantization: 4bit" in (output / "config.yaml").read_text()
    proof = json.loads((output / "summary.json").read_text())["proof"]
    assert proof["metrics"]["loss"]["best"] < proof["metrics"]["loss"]["base"]
    assert proof["merged"]["loss"] == pytest.approx(proof["metrics"]["loss"]["best"], abs=1e-3)
    merged = AutoModelForCausalLM.from_pretrained(output / "best" / "merged")
    assert not hasattr(merged.config, "quantization_config")
    assert all(type(m) is torch.nn.Linear for name, m in merged.named_modules() if name.endswith("_proj"))
    adapter = ["--adapter", str(output)]
    again = ["ftray.merge", *adapter, "--model.dtype", "fp32", "--output", str(tmp_path / "again")]
    asked = ["ftray.infer", *adapter, "--prompt", "a b", "--generation.max_new_tokens", "4"]
    scored = ["ftray.evaluate", *adapter, "--data", words, "--data.max_length", "64", "--evaluation.generate", "false"]
    scored += ["--data.cache", str(tmp_path / "shards"), "--model.dtype", "fp32"]
    for arguments in (again, asked, scored):
        done = run_here([sys.executable, "-m", *arguments])
        assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    (metrics,) = result["adapters"].values()
    assert metrics["loss"]["best"] == pytest.approx(proof["metrics"]["loss"]["best"], abs=1e-5)
    one, other = (AutoModelForCausalLM.from_pretrained(p) for p in (tmp_path / "again", output / "best" / "merged"))
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name])
