"""A frozen base that the workers of a pack share out: the same training, a part of the memory."""

import json
import re
from collections.abc import Callable

import pytest
import torch
from conftest import bert, gpt2, llama, t5
from helpers.processes import torchrun
from helpers.sharded_pack import TRIALS
from torch.distributed.fsdp import FSDPModule

from ftray.adapters.compatibility import refuse
from ftray.config import AdapterConfig, Config, ModelConfig, TrainingConfig
from ftray.errors import UserError
from ftray.models.sharding import one_pass, shard, units
from ftray.search.estimate import resident_bytes
from ftray.training.engine import join_process_group
from ftray.training.run_spec import check_workers


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, list[torch.Tensor]]]:
    output = tmp_path_factory.mktemp("sharded")
    # wide, so that the matrices that are shared out outweigh what is not
    llama(hidden_size=128, intermediate_size=256).save_pretrained(output / "model")
    torchrun("sharded_pack.py", str(output / "model"), str(output))
    found: dict[str, dict[str, list[torch.Tensor]]] = torch.load(output / "results.pt")
    return found


@pytest.mark.parametrize("name", TRIALS)
@pytest.mark.parametrize("kind", ["sharded", "resumed", "recomputed", "short of memory"])
def test_a_sharded_base_trains_as_a_whole_one(results, kind, name):
    """Short of memory, the passes are others, whose sums round otherwise, and AdamW divides by a gradient's size.

    A micro-batch that is lost or taken twice would move weights fifty times as far, by a rate of 5e-3.
    """
    exact = 1e-4 if kind == "short of memory" else 1e-5
    for got, wanted in zip(results[kind][name], results["whole"][name], strict=True):
        assert (got - wanted).abs().max() <= exact * wanted.abs().max()


@pytest.mark.parametrize("name", ["lora", "dora", "upper", "ia3", "apart"])
def test_a_base_of_4_bits_is_shared_out_packed(results, name):
    for got, wanted in zip(results["4bit, sharded"][name], results["4bit"][name], strict=True):
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_the_next_layer_is_on_its_way_while_one_computes(monkeypatch):
    join_process_group()
    model = llama(num_hidden_layers=4).requires_grad_(False)
    layers, held, seen = list(model.model.layers), set(), []
    shard(model, (), torch.device("cpu"), False, lambda module: None)

    def watch(name: str, note: Callable[[int], None]) -> None:
        own = getattr(FSDPModule, name)

        def call(group, *args, **kwargs):
            note(next(i for i, layer in enumerate(layers) if group.leaves[0] in set(layer.modules())))
            return own(group, *args, **kwargs)

        monkeypatch.setattr(FSDPModule, name, call)

    watch("unshard", held.add)
    watch("reshard", held.discard)
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append({*held}))
        layer.mlp.down_proj.register_full_backward_pre_hook(lambda module, gradient: seen.append({*held}))
    gradients = []
    for _ in range(2):
        seen.clear()
        states = torch.ones(1, 5, model.config.hidden_size, requires_grad=True)
        with one_pass(model):
            model.model(inputs_embeds=states, use_cache=False).last_hidden_state.square().sum().backward()
        gradients.append(states.grad)
        assert held == set()
    # the last layer turns round
    assert seen == [{0, 1}, {1, 2}, {2, 3}, {3}, {3, 2}, {2, 1}, {1, 0}, {0}]
    assert torch.equal(*gradients)


def test_each_of_two_workers_holds_half(results):
    (whole,), (shared,) = results["whole"]["held"], results["sharded"]["held"]
    assert shared < 0.6 * whole


@pytest.mark.slow
def test_the_peak_of_each_worker_falls_with_their_number(tmp_path):
    """Loading, a step and a validation, over a base of 0.2 GB: a quarter instead of a half, and some noise."""
    model = llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8)
    model.save_pretrained(tmp_path / "model", max_shard_size="50MB")

    def peaks(workers: int) -> list[int]:
        settings = json.dumps({"batch_size": 4, "shard_base": True})
        printed = torchrun("peak_memory.py", str(tmp_path / "model"), settings, workers=workers)
        found = [int(peak) for peak in re.findall(r"peak (\d+)", printed)]
        assert len(found) == workers, printed
        return found

    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert max(peaks(4)) < min(peaks(2)) - 0.15 * size


@pytest.mark.parametrize("make", [llama, gpt2, bert, t5])
def test_every_matrix_is_in_one_unit(make):
    model = make()
    found = units(model, ())
    held = [p for unit in found for p in {p for leaf in unit.leaves for p in leaf.parameters()}]
    assert len(set(held)) == len(held)
    own = [*model.base_model.parameters(), *model.get_output_embeddings().parameters()]
    assert {p for p in own if p.ndim > 1} <= set(held)
    assert sum(unit.is_layer for unit in found) == model.config.num_hidden_layers * (2 if make is t5 else 1)


def test_a_plan_counts_parts():
    model = llama(num_hidden_layers=8, tie_word_embeddings=True)
    layer = sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim > 1)
    words = model.get_input_embeddings().weight.numel()
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)

    def planned(**training) -> float:
        sections = {"model": {"dtype": "fp32"}, "scaling": {"workers": 4}, "training": training}
        return resident_bytes(Config.model_validate(sections), model)

    assert planned() == 4 * (8 * layer + words + norms)
    assert planned(shard_base=True) == 4 * ((8 * layer + words) / 4 + norms + 2 * max(layer, words))
    assert planned(shard_base=True, offload="all") == 4 * (words / 4 + norms + 2 * max(layer, words))


@pytest.mark.parametrize(
    ("adapter", "model", "training", "reason"),
    [
        ({"method": "lora"}, {}, {"zero_stage": 3}, "ZeRO 3 shares the base out by itself"),
        ({"method": "lora"}, {"quantization": "8bit"}, {}, "FSDP2 loses the scales"),
        ({"method": "lora", "init": "pissa"}, {}, {}, "the whole base at once"),
        ({"method": "lora", "init": "eva"}, {}, {}, "the whole base at once"),
        ({"method": "full"}, {}, {}, "weights of the base itself"),
        (
            {"method": "peft", "config": {"peft_type": "LORA", "modules_to_save": ["lm_head"]}},
            {},
            {},
            "weights of the base itself",
        ),
    ],
)
def test_what_needs_whole_weights_is_refused(adapter, model, training, reason):
    settings = TrainingConfig(shard_base=True, **training)
    with pytest.raises(UserError, match=reason):
        refuse(AdapterConfig(**adapter), ModelConfig(**model), settings)


def test_nobody_to_share_with_is_refused():
    with pytest.raises(UserError, match=r"scaling\.workers 2 or more"):
        check_workers(TrainingConfig(shard_base=True), 1)
    check_workers(TrainingConfig(shard_base=True), 2)
    check_workers(TrainingConfig(), 1)
    layers_away = TrainingConfig(shard_base=True, offload="all")
    check_workers(layers_away, 1, 1.0)
    with pytest.raises(UserError, match="needs GPUs"):
        check_workers(layers_away, 1, 0.0)
