"""What vLLM is given and what is made of its answers; vLLM itself needs CUDA and is not in it."""

import asyncio
import json

import pytest
from peft import IA3Config, LoraConfig, get_peft_model
from ray.llm._internal.serve.core.configs.llm_config import LLMConfig
from transformers import AutoModelForCausalLM

from ftray.cli import parse, run_command
from ftray.serving import vllm
from ftray.serving.job import Job, Part
from ftray.serving.offers import offered

LORA = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def adapters(tiny_llama, tmp_path_factory):
    """One directory each: what vLLM runs, and what it doesn't."""
    directory = tmp_path_factory.mktemp("adapters")
    for name, config in {
        "plain": LoraConfig(r=4, rank_pattern={"q_proj": 20}, **LORA),
        "dora": LoraConfig(r=4, use_dora=True, **LORA),
        "bias": LoraConfig(r=4, bias="lora_only", **LORA),
        "wide": LoraConfig(r=600, **LORA),
        "ia3": IA3Config(task_type="CAUSAL_LM"),
    }.items():
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
        get_peft_model(base, config).save_pretrained(directory / name)
    return directory


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--adapter=a={}/ia3"], "this is IA3: take builtin, or --merged"),
        (["--adapter=a={}/dora"], "this is LoRA with use_dora"),
        (["--adapter=a={}/bias"], "this is LoRA with bias"),
        (["--adapter=a={}/wide"], "this has 600"),
        (["--task", "FEATURE_EXTRACTION"], "the models here are for FEATURE_EXTRACTION"),
        (["--model.quantization", "8bit"], "leave model.quantization out"),
        (["--adapter=a={}/plain"], "no GPU here"),
        (["--scaling.gpus_per_worker", "1"], "vLLM is not installed"),
    ],
)
def test_what_vllm_cant_serve_is_told_before_ray_starts(tiny_llama, adapters, flags, reason, capsys, monkeypatch):
    monkeypatch.setattr("ftray.search.cluster.connect", lambda cfg: pytest.fail("Ray was started"))
    flags = [flag.format(adapters) for flag in flags]
    assert run_command("serve", ["--model", tiny_llama, "--engine", "vllm", *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert reason in said
    assert "\n" not in said


def test_serve_llm_takes_what_a_run_comes_to(tiny_llama, adapters):
    flags = ["--model", tiny_llama, "--engine", "vllm", f"--adapter=a={adapters}/plain", "--model.dtype", "bf16"]
    cfg = parse("serve", [*flags, "--serving.slots", "32", "--serving.max_adapters", "5"])
    what = offered(cfg)
    config = LLMConfig(**vllm.llm_config(cfg, what, {"max_ongoing_requests": 7}))
    assert (config.model_id, config.model_loading_config.model_source) == (what.base, tiny_llama)
    assert config.engine_kwargs == {
        "dtype": "bfloat16",
        "trust_remote_code": False,
        "max_num_seqs": 32,
        "max_logprobs": 20,
        "generation_config": "vllm",
        "enable_lora": True,
        "max_lora_rank": 32,
        "max_loras": 5,
        "max_cpu_loras": 5,
    }
    assert config.lora_config.max_num_adapters_per_replica == 5
    assert config.deployment_config == {"max_ongoing_requests": 7}
    cfg.serving.merged = True
    merged = LLMConfig(**vllm.llm_config(cfg, what, {}))
    assert merged.lora_config is None
    assert "enable_lora" not in merged.engine_kwargs


def job(**changes):
    sampling = {"max_tokens": 5, "temperature": 0.5, "top_p": 1.0, "seed": 3, "stop": ("x",), "logprobs": 1}
    given = {"prompts": ["a"], "messages": None, "n": 2, "adapter": "a@1", "source": "/a", "stream": True}
    limits = {"max_prompt_tokens": 9, "max_output_tokens": 99}
    return Job(**given | limits | changes, sampling=sampling | {"echo": False})


def test_an_adapter_is_found_by_its_id(tiny_llama, adapters):
    bridge = vllm.Bridge("tiny", tiny_llama, False, 32, None)
    assert asyncio.run(bridge.load("a", str(adapters / "plain"))) is None
    assert "this is IA3" in asyncio.run(bridge.load("a", f"file://{adapters}/ia3"))
    narrow = vllm.Bridge("tiny", tiny_llama, False, 8, None)
    assert "has rank 20; 8 are provided for" in asyncio.run(narrow.load("a", str(adapters / "plain")))
    loader = vllm.Adapters(download_timeout_s=1, max_tries=1)  # as Serve LLM makes it
    for source in (str(adapters / "plain"), f"file://{adapters}/plain"):
        name = vllm.model_id(job(source=source))
        found = asyncio.run(loader.load_model_from_config(lora_model_id=name, llm_config=None))
        assert found.model_id == name
        assert vllm.lora_rank(vllm.Path(found.local_path), tiny_llama) == 20
    assert vllm.model_id(job(adapter=None, source=None)) == ""


def test_requests_and_answers_in_openais_words():
    asked = vllm.completion(job(), [[4, 5]], 5, "a@1|/a")
    wanted = {"model": "a@1|/a", "prompt": [[4, 5]], "n": 2, "max_tokens": 5, "stop": ["x"], "logprobs": 1}
    assert wanted.items() <= asked.items()
    assert (asked["stream"], asked["stream_options"]) == (True, {"include_usage": True})
    logprobs = {"tokens": ["b"], "token_logprobs": [-0.5], "top_logprobs": [{"b": -0.5, "c": -2.0}], "text_offset": [0]}
    choice = {"index": 1, "text": "b", "logprobs": logprobs, "finish_reason": None}
    end = {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}
    bodies = [{"choices": [choice]}, {"choices": [end]}, {"choices": [], "usage": {"completion_tokens": 7}}]
    text = "".join(f"data: {json.dumps(body)}\n\n" for body in bodies) + "data: [DONE]\n\n"
    assert vllm.read(text) == (
        [Part(1, "b", [("b", -0.5, [("b", -0.5), ("c", -2.0)])]), Part(0, finish="length")],
        7,
    )
    (failed,), _ = vllm.read('data: {"error": {"message": "too long"}}\n\n')
    assert failed.finish == "error: too long"
