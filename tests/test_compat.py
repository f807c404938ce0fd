"""What ftray takes from other libraries by private names: each test names one, and fails where it has changed."""

import ast
import inspect
import math
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from ray import ActorID, PlacementGroupID, serve
from ray.util.placement_group import placement_group, remove_placement_group
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import ftray


def test_ray_bootstrap_address(monkeypatch):
    from ftray.compat.ray import bootstrap_address

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:7000")
    assert bootstrap_address("auto") == "10.0.0.9:7000"
    assert bootstrap_address("10.0.0.8:6379") == "10.0.0.8:6379"
    assert bootstrap_address("local") is None
    with pytest.raises(ValueError, match="nonsense"):
        bootstrap_address("nonsense")


def test_ray_takes_our_token(cluster):
    address = ray.get_runtime_context().gcs_address
    code = f"from ftray.compat.ray import takes_our_token; print(takes_our_token({address!r}, False))"
    for environment, said in ({}, "True\n"), ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, "False\n"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=True
        )
        assert done.stdout == said


def test_ray_socket_path(cluster):
    from ftray.compat.ray import raylet_socket, socket_path

    real, ours = Path(raylet_socket()), Path(socket_path())
    assert ours.parents[2] == real.parents[2]  # the root of all sessions
    assert abs(len(str(ours.parent)) - len(str(real.parent))) <= 2  # ids of processes differ
    assert len(ours.name) >= len(real.name)


SLOW = """
import os, sys
from pathlib import Path
from ray._private import services
slow = Path(sys.argv[1])
slow.write_text(f"#!/bin/sh\\nsleep 40\\nexec {services.RAYLET_EXECUTABLE} \\"$@\\"\\n")
slow.chmod(0o755)
services.RAYLET_EXECUTABLE = str(slow)
from ftray.config import Config
from ftray.runtime.cluster import connect
connect(Config.model_validate({"scaling": {"address": "local"}}), dashboard=False)
import ray
print(len(ray.nodes()))
"""


@pytest.mark.slow
def test_ray_start_patience(tmp_path):
    """The variables that Ray reads: it gives up a raylet after half a minute where they are not set."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    flags = [sys.executable, "-c", SLOW, str(tmp_path / "raylet")]
    done = subprocess.run(flags, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "1\n", done.stderr


def test_ray_raylet_socket(cluster):
    import socket

    from ftray.compat.ray import raylet_socket

    with socket.socket(socket.AF_UNIX) as client:
        client.connect(raylet_socket())


def test_ray_serve_runs(cluster):
    from ftray.compat.ray import serve_runs

    assert not serve_runs()
    serve.start()
    assert serve_runs()
    serve.shutdown()
    assert not serve_runs()


def test_ray_placement_groups(cluster):
    from ftray.compat.ray import is_removed, placement_groups

    group = placement_group([{"CPU": 0.01}])
    ray.get(group.ready())

    def found():
        (entry,) = [e for e in placement_groups() if PlacementGroupID(e.placement_group_id) == group.id]
        return entry

    entry = found()
    assert entry.creator_job_id.hex() == ray.get_runtime_context().get_job_id()
    assert ActorID(entry.creator_actor_id).is_nil()  # the driver made it
    assert entry.creator_actor_dead  # as of whatever is no actor
    assert not is_removed(entry)
    remove_placement_group(group)
    assert is_removed(found())


def test_ray_train_broken_checkpoint_list(tmp_path):
    from ray.train import Result
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

    from ftray.compat.ray_train import BrokenCheckpointList

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME).write_text('{"checkpoint_results": [')
    with pytest.raises(BrokenCheckpointList):
        Result.from_path(str(tmp_path / "run"))


def test_ray_train_worker_group_callback():
    from ray.train.v2._internal.execution.worker_group import WorkerGroup

    from ftray.compat.ray_train import WorkerGroupCallback

    assert [*inspect.signature(WorkerGroupCallback.after_worker_group_start).parameters] == ["self", "worker_group"]
    assert next(iter(inspect.signature(WorkerGroup.execute).parameters.values())).name == "self"


def test_ray_train_heeds_the_environment_of_the_driver():
    """By the names that `ftray.runtime.cluster.connect` sets."""
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    assert {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"} <= ENV_VARS_TO_PROPAGATE


def test_ray_train_preemption_known(monkeypatch):
    from ray.train.v2._internal.execution import context
    from ray.train.v2._internal.execution.preemption import PreemptionContext

    from ftray.compat import ray_train

    told = SimpleNamespace(preemption_context=PreemptionContext())
    monkeypatch.setattr(ray_train, "get_train_context", lambda: told)
    assert not ray_train.preemption_known()
    told.preemption_context.preemption_info = "soon"
    assert ray_train.preemption_known()
    assert "preemption_context" in inspect.signature(context.TrainContext).parameters


def test_ray_train_solo_trainer_starts_no_further_processes():
    from ray.train.torch import TorchTrainer

    from ftray.compat.ray_train_torch import UNUSED, SoloTrainer

    usual, ours = (
        [type(c).__name__ for c in make(print)._create_default_callbacks()] for make in (TorchTrainer, SoloTrainer)
    )
    assert {*UNUSED} <= {*usual}
    assert ours == [name for name in usual if name not in UNUSED]


def test_ray_llm_loaded_adapter():
    from ftray.compat.ray_llm import loaded_adapter

    first, second = (loaded_adapter(name, f"/{name}") for name in "ab")
    assert (first.model_id, first.local_path) == ("a", "/a")
    assert first.lora_assigned_int_id != second.lora_assigned_int_id


def test_peft_stored_tensors(tiny_llama):
    from ftray.compat.peft import stored_tensors

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), LoraConfig(task_type="CAUSAL_LM"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(stored_tensors(model, tiny_llama)(name), load_file(f"{tiny_llama}/model.safetensors")[name])


def test_peft_taken_names():
    """What PEFT makes of the names in a model: see what it does with them."""
    from conftest import llama
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from ftray.compat.peft import taken_names

    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        mlp_only_layers=[0],
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        moe_intermediate_size=16,
    )
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    assert {"gate_proj", "up_proj", "down_proj"} <= taken_names(model, "LORA")
    assert taken_names(model, "OFT") == taken_names(llama(), "LORA") == frozenset()
    with torch.device("meta"):
        adapted = get_peft_model(model, LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"]))
    assert not any(".mlp.gate_proj.lora_A" in name for name, _ in adapted.named_parameters())


@pytest.mark.parametrize("method", [LoraConfig(), AdaLoraConfig(total_step=9), IA3Config(), PromptTuningConfig()])
def test_peft_around_layers(tiny_llama, method):
    from ftray.compat.peft import around_layers

    model, seen = AutoModelForCausalLM.from_pretrained(tiny_llama), []
    linear = {m for name, m in model.named_modules() if name.endswith((".q_proj", ".v_proj"))}
    method.task_type, method.target_modules = "CAUSAL_LM", ["q_proj", "v_proj"]
    if isinstance(method, IA3Config):
        method.feedforward_modules = []
    if isinstance(method, PromptTuningConfig):
        method.num_virtual_tokens, linear = 2, set()

    @contextmanager
    def around(layer):
        seen.append(layer)
        yield

    with around_layers(method.peft_type, around):
        get_peft_model(model, method)
    assert set(seen) == linear
    count = len(seen)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), method)
    assert len(seen) == count


def test_transformers_kept_in_float32(tmp_path):
    """What `from_pretrained` does with T5's output projections, which float16 can't hold."""
    from conftest import t5

    from ftray.compat.transformers import kept_in_float32

    t5().save_pretrained(tmp_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16)
    kept = kept_in_float32(model, torch.float16)
    assert {n for n, p in model.named_parameters() if p.dtype == torch.float32} == set(
        filter(kept, dict(model.named_parameters()))
    )
    assert any(map(kept, dict(model.named_parameters())))
    assert not any(map(kept_in_float32(model, torch.bfloat16), dict(model.named_parameters())))


def test_transformers_attention(tiny_llama):
    from ftray.compat.transformers import set_attention

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="sdpa")
    ids = torch.arange(5)[None]
    assert model(ids, output_attentions=False).attentions is None
    set_attention(model.config, "eager")  # the one that gives its weights
    assert model(ids, output_attentions=True).attentions[0].shape[-1] == 5


def test_transformers_drop_weight_conversions(tiny_llama):
    from ftray.compat.transformers import drop_weight_conversions

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert isinstance(model._weight_conversions, list)
    packed, renamed = SimpleNamespace(operations=["unpack", "x"]), SimpleNamespace()
    model._weight_conversions = [packed, renamed]
    drop_weight_conversions(model, lambda operation: operation == "unpack")
    assert model._weight_conversions == [renamed]


def test_transformers_loads_a_tokenizer_without_torch(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    code = (
        "import sys; from ftray.compat.without_torch import leave_out_torch; leave_out_torch()\n"
        "from ftray.models.tokenizer import load_tokenizer\n"
        f"print(load_tokenizer({str(tmp_path)!r})('a b')['input_ids'], 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == f"{tokenizer('a b')['input_ids']} False\n", result.stderr


def test_deepspeed_shared_memory_extension(monkeypatch):
    import deepspeed

    from ftray.compat.deepspeed import skip_shared_memory_extension

    communication = import_module("deepspeed.comm.torch")  # as an attribute, it is torch itself
    builder = SimpleNamespace(NAME="deepspeed_shm_comm", load=lambda: "compiled", absolute_name=lambda: "it")
    accelerator = SimpleNamespace(create_op_builder=lambda name: builder)
    monkeypatch.setattr(communication, "get_accelerator", lambda: accelerator)
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, builder.NAME, True)
    assert communication.build_shm_op() == "compiled"
    skip_shared_memory_extension()
    assert communication.build_shm_op() is None


def test_torch_lists_of_tensors():
    from ftray.compat.torch import add, copy

    first, second = [torch.ones(2), torch.ones(1, 3)], [torch.arange(2.0), torch.full((1, 3), 4.0)]
    assert [t.tolist() for t in add(first, second)] == [[1.0, 2.0], [[5.0] * 3]]
    assert [t.tolist() for t in first] == [[1.0, 1.0], [[1.0] * 3]]
    copy([first[0][:1], first[1]], [second[0][1:], second[1].double()])
    assert [t.tolist() for t in first] == [[1.0, 1.0], [[4.0] * 3]]


def test_torch_after_backward():
    from ftray.compat.torch import after_backward

    events: list[str] = []
    x = torch.ones(1, requires_grad=True)
    middle = x * 2
    middle.register_hook(lambda gradient: events.append("middle"))
    end = middle * 3
    end.register_hook(lambda gradient: after_backward(lambda: events.append("over")))
    (gradient,) = torch.autograd.grad(end.sum(), x)
    assert events == ["middle", "over"]
    assert gradient.item() == 6


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_torch_storage_key(device):
    from ftray.compat.torch import storage_key

    whole, other = torch.empty(4, device=device), torch.empty(4, device=device)
    assert storage_key(whole) == storage_key(whole[1:]) == storage_key(whole.view(2, 2))
    assert storage_key(whole) != storage_key(other)


def test_sacrebleu_chrf():
    from sacrebleu.metrics import CHRF

    from ftray.compat.sacrebleu import chrf

    wanted, predicted = ["a cat sat", "on the mat"], ["a cat sits", "at a mat"]
    counts, score = chrf(wanted, predicted)
    assert math.isclose(score(counts.sum(0)), CHRF().corpus_score(predicted, [wanted]).score)
    assert math.isclose(score(counts[1]), CHRF().sentence_score(predicted[1], [wanted[1]]).score)


def test_what_ruff_takes_for_public():
    """Names like `_this_` are private too, and SLF001 lets them pass."""
    package = Path(ftray.__file__).parent
    files = [file for file in package.rglob("*.py") if file.parent != package / "compat"]
    trees = {file: ast.walk(ast.parse(file.read_text())) for file in files}
    used = [(file.name, n.attr) for file, tree in trees.items() for n in tree if isinstance(n, ast.Attribute)]
    assert [(file, name) for file, name in used if re.fullmatch("_[^_].*_", name)] == []


def test_ray_tune_trials_without_actors(cluster, tmp_path):
    """Two trials of three reports, one of them paused, by a trainable that must never be made."""
    from ray import tune
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler

    from ftray.compat.ray_tune import no_checkpoint, trials_without_actors

    class Never(tune.Trainable):
        def setup(self, config):
            raise AssertionError

    asked, taken = [], {0: 0, 1: 0}

    class Pausing(FIFOScheduler):
        def on_trial_result(self, controller, trial, result):
            number = trial.config["number"]
            taken[number] += 1
            return TrialScheduler.PAUSE if (number, taken[number]) == (1, 1) else TrialScheduler.CONTINUE

    def answer(config, method, *args, **kwargs):
        asked.append((config["number"], method))
        if method == "train":
            done = taken[config["number"]] == 2
            return ray.put({"loss": 0.5, "training_iteration": taken[config["number"]] + 1, "done": done})
        return ray.put(no_checkpoint() if method == "save" else {})

    with trials_without_actors(answer):
        results = tune.Tuner(
            tune.with_resources(Never, {"memory": 1}),
            param_space={"number": tune.grid_search([0, 1])},
            tune_config=tune.TuneConfig(scheduler=Pausing(), metric="loss", mode="min"),
            run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
        ).fit()
    assert not results.errors
    assert taken == {0: 2, 1: 2}  # the last report ends the trial unasked
    assert [asked.count((number, "train")) for number in (0, 1)] == [3, 3]
    assert asked.count((1, "__ray_ready__")) == 2  # it was paused after its first report
    assert asked.count((0, "__ray_ready__")) == 1
