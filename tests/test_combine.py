"""Several adapters made one: each learnt layer counts, whatever way the adapters choose their layers and ranks."""

import math

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ftray.cli import main


def make(base: str, directory, seed: int, **settings) -> str:
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False} | settings)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(directory)
    return str(directory)


def combined(base: str, adapters: list[str], output, *more: str) -> dict[str, torch.Tensor]:
    """What the adapter that `ftray merge` leaves changes of the base's weights, as PEFT alone reads it."""
    given = [part for adapter in adapters for part in ("--adapter", adapter)]
    assert main(["merge", "--model", base, *given, *more, "--form", "adapter", "--output", str(output)]) == 0
    return changes(base, str(output))


def changes(base: str, adapter: str) -> dict[str, torch.Tensor]:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in plain.state_dict().items()}
    merged = PeftModel.from_pretrained(plain, adapter).merge_and_unload().state_dict()
    return {name: merged[name] - weight for name, weight in before.items()}


@pytest.mark.parametrize("combination", [["cat"], ["svd", "--merge.rank", "8"]], ids=lambda c: c[0])
@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"layers_to_transform": [0]}, {"layers_to_transform": [1]}),
        ({"target_modules": r".*\.0\..*q_proj"}, {"target_modules": ["v_proj"]}),
        ({"exclude_modules": ["model.layers.0.self_attn.q_proj"]}, {}),
        ({"rank_pattern": {"layers.0.self_attn.q_proj": 2}}, {"r": 3, "alpha_pattern": {"q_proj": 16}}),
    ],
    ids=["layers", "regex", "excluded", "patterns"],
)
def test_every_layer_of_every_adapter_is_in_the_sum(tmp_path, tiny_llama, one, two, combination):
    adapters = [make(tiny_llama, tmp_path / "one", 1, **one), make(tiny_llama, tmp_path / "two", 2, **two)]
    settings = ["--weights", "0.7,0.3", "--combination", *combination]
    found = combined(tiny_llama, adapters, tmp_path / "sum", *settings)
    first, second = (changes(tiny_llama, adapter) for adapter in adapters)
    assert {name for name in found if found[name].abs().max() > 1e-3} == {
        name for name in found if max(first[name].abs().max(), second[name].abs().max()) > 1e-3
    }
    for name, change in found.items():
        torch.testing.assert_close(change, 0.7 * first[name] + 0.3 * second[name], rtol=0, atol=2e-6)


def test_ranks_by_layer_are_kept_by_a_linear_combination(tmp_path, tiny_llama):
    """By the formula: the factors of each are added up, each by the root of weight and scaling."""
    pattern = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "lora_alpha": 8}
    adapters = [make(tiny_llama, tmp_path / str(seed), seed, **pattern) for seed in (1, 2)]
    found = combined(tiny_llama, adapters, tmp_path / "sum", "--weights", "0.7,0.3", "--combination", "linear")
    for layer, rank in ((0, 2), (1, 4)):
        name = f"model.layers.{layer}.self_attn.q_proj"
        a, b = 0.0, 0.0
        for adapter, weight in zip(adapters, (0.7, 0.3), strict=True):
            factors = load_file(f"{adapter}/adapter_model.safetensors")
            root = math.sqrt(weight * 8 / rank)
            a = a + root * factors[f"base_model.model.{name}.lora_A.weight"]
            b = b + root * factors[f"base_model.model.{name}.lora_B.weight"]
        torch.testing.assert_close(found[f"{name}.weight"], b @ a, rtol=0, atol=2e-6)


def test_ia3_vectors_of_other_layers_are_not_added_up(tmp_path, capsys, tiny_llama):
    """PEFT counts a layer that an adapter leaves as it is with a factor of 0, where 1 is meant."""
    adapters = []
    for name, targets in (("one", ["k_proj"]), ("two", ["v_proj"])):
        config = IA3Config(target_modules=targets, feedforward_modules=[])
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).save_pretrained(tmp_path / name)
        adapters += ["--adapter", str(tmp_path / name)]
    given = ["merge", "--model", tiny_llama, *adapters, "--combination", "linear", "--output", str(tmp_path / "out")]
    assert main(given) == 2
    assert "only some of the adapters change" in capsys.readouterr().err
