"""Classes and vectors over HTTP: the real command with a tiny encoder, beside what PEFT makes of the same texts."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from array import array
from base64 import b64decode
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
import torch
from helpers.ports import free_port
from helpers.servers import chromium, serving_here
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from ray import serve
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from transformers import AutoTokenizer, RobertaConfig, RobertaModel

from ftray.adapters import lora_init
from ftray.adapters.merge import save_merged
from ftray.adapters.methods import attach
from ftray.cli import parse
from ftray.config import AdapterConfig, Config, ModelConfig
from ftray.errors import UserError
from ftray.models.load import load_base
from ftray.serving.catalog import find_catalog
from ftray.serving.errors import APIError
from ftray.serving.pooling import PoolingReplica, PoolingRequest
from ftray.task_spec import TaskSpec

FP32 = ModelConfig(dtype="fp32")
TEXTS = ["the cat sat", "a dog", "the cat sat on the mat and the dog did not"]


def adapter(model: str, spec: TaskSpec, directory: Path, seed: int) -> Path:
    """An adapter with random weights, as a search leaves it."""
    trained = attach(load_base(FP32, model, spec), AdapterConfig(method="lora"), 1, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    directory.mkdir(parents=True)
    lora_init.save(trained, spec, directory)
    return directory


def decoded(vector: str) -> list[float]:
    return list(array("f", b64decode(vector)))


@contextmanager
def endpoint(directory: Path, *flags: str):
    port = free_port()
    command = [sys.executable, "-m", "ftray.serve", *flags, "--port", str(port), "--model.dtype", "fp32"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "FTRAY_API_KEY")}
    with open(directory / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        for _ in range(1200):
            if "endpoint http" in (directory / "log").read_text():
                break
            assert process.poll() is None, (directory / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.fixture(scope="module")
def begin(cluster):
    with serving_here() as begin:
        yield begin


def alone(model: str, spec: TaskSpec, directory: Path | None, texts: list[str], pairs: list[str] | None = None):
    """What the task itself makes of each text by itself."""
    base, tokenizer = load_base(FP32, model, spec).model.eval(), AutoTokenizer.from_pretrained(model)
    adapted = PeftModel.from_pretrained(base, str(directory)).eval() if directory else base
    rows = []
    for i, text in enumerate(texts):
        inputs = tokenizer(text, pairs[i] if pairs else None, return_tensors="pt")
        with torch.no_grad():
            output = adapted(**inputs)
        if spec.name == "SEQ_CLS":
            rows.append(torch.softmax(output.logits[0], -1))
        else:
            rows.append(torch.nn.functional.normalize(output.last_hidden_state[0].mean(0), dim=-1))
    return torch.stack(rows)


def page(url: str, directory: Path, text: str, left: str) -> list[list[str]]:
    """The lines that the page shows of the model `left` and, beside it, of `best`; by keyboard alone."""
    with chromium(url, directory / "profile") as browser:

        def at(name: str):
            return browser.find_element("id", name)

        wait = WebDriverWait(browser, 30)
        wait.until(lambda _: at("model-1").get_attribute("value") == "best")
        assert not at("generation").is_displayed()
        at("model-0").send_keys(left)
        at("prompt").send_keys(text, Keys.CONTROL + Keys.ENTER)
        wait.until(lambda _: at("speed-0").text and at("speed-1").text)
        return [at(f"answer-{side}").get_attribute("textContent").splitlines() for side in (0, 1)]


def test_classes_of_a_run_its_trials_and_another_adapter(tiny_bert, tmp_path):
    spec = TaskSpec("SEQ_CLS", ("ugly", "good", "bad"), 1)
    run = tmp_path / "run"
    best = adapter(tiny_bert, spec, run / "best" / "adapter", 1)
    more = adapter(tiny_bert, spec, tmp_path / "more", 2)
    (run / "summary.json").write_text(json.dumps({"metric": "validation_macro_f1", "trials": []}))
    (run / "config.yaml").write_text(
        f"model: {{name: {tiny_bert}, dtype: fp32}}\ndata: {{template: null}}\ntask: SEQ_CLS\n"
    )
    with endpoint(tmp_path, "--run", str(run), f"--adapter=more={more}") as url:
        for name, directory in (("best", best), ("more", more)):
            got = httpx.post(f"{url}/v1/classify", json={"model": name, "input": TEXTS}, timeout=60).json()
            wanted = alone(tiny_bert, spec, directory, TEXTS)
            assert got["labels"] == list(spec.labels)
            torch.testing.assert_close(torch.tensor([d["probs"] for d in got["data"]]), wanted, rtol=1e-4, atol=1e-5)
            assert [d["label"] for d in got["data"]] == [spec.labels[i] for i in wanted.argmax(1)]
            assert got["usage"]["prompt_tokens"] == got["usage"]["total_tokens"] > len(TEXTS)
        pair = {"model": "best", "input": TEXTS[0], "pair": TEXTS[1]}
        (of_pair,) = httpx.post(f"{url}/v1/classify", json=pair, timeout=60).json()["data"]
        wanted = alone(tiny_bert, spec, best, TEXTS[:1], TEXTS[1:2])
        torch.testing.assert_close(torch.tensor([of_pair["probs"]]), wanted, rtol=1e-4, atol=1e-5)
        for path, body, field, reason in (
            ("classify", {"model": Path(tiny_bert).name, "input": "a"}, "model", "of its own: name an adapter"),
            ("classify", {"model": "best", "input": []}, "input", "none of them empty"),
            ("classify", {"model": "best", "input": ["a"], "pair": ["a", "b"]}, "pair", "as many texts as"),
            ("classify", {"model": "best", "input": "a " * 9000}, "input", "are allowed"),
            ("classify", {"model": "best", "input": "a", "top": 3}, "top", "unsupported"),
            ("embeddings", {"model": "best", "input": "a"}, None, "use /v1/classify"),
            ("completions", {"model": "best", "prompt": "a"}, None, "use /v1/classify"),
        ):
            refused = httpx.post(f"{url}/v1/{path}", json=body, timeout=60)
            error = refused.json()["error"]
            assert (refused.status_code, error["param"]) == (400, field), error
            assert reason in error["message"]
        assert 'ftray_requests_total{model="best",status="200"} 2.0' in httpx.get(f"{url}/metrics").text
        for name, directory, shown in zip(
            ("more", "best"), (more, best), page(url, tmp_path, TEXTS[2], "more"), strict=True
        ):
            probs = alone(tiny_bert, spec, directory, TEXTS[2:])[0].tolist()
            wanted = sorted(zip(probs, spec.labels, strict=True), reverse=True)
            assert shown == [f"{100 * share:.1f} %  {label}" for share, label in wanted], name


def test_vectors_of_a_base_and_of_the_merged_model(begin, tiny_bert, tmp_path):
    spec = TaskSpec("FEATURE_EXTRACTION", (), 1)
    run = tmp_path / "run"
    best = adapter(tiny_bert, spec, run / "best" / "adapter", 1)
    (run / "summary.json").write_text(json.dumps({"metric": "validation_mrr", "trials": []}))
    (run / "config.yaml").write_text(f"model: {{name: {tiny_bert}, dtype: fp32}}\ndata: {{template: null}}\n")
    save_merged(FP32, tiny_bert, best, run / "best" / "merged", spec)
    url = begin("--run", str(run), "--model.dtype", "fp32")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    for name, directory in (("best", best), (Path(tiny_bert).name, None)):
        wanted = alone(tiny_bert, spec, directory, TEXTS)
        for form in ("float", "base64"):
            got = client.embeddings.create(model=name, input=TEXTS, encoding_format=form)
            assert [d.index for d in got.data] == [0, 1, 2]
            read = [d.embedding if form == "float" else decoded(d.embedding) for d in got.data]
            torch.testing.assert_close(torch.tensor(read), wanted, rtol=1e-4, atol=1e-5)
        by_default = client.embeddings.create(model=name, input=TEXTS[0])  # the client asks for base64 and decodes
        torch.testing.assert_close(torch.tensor([by_default.data[0].embedding]), wanted[:1], rtol=1e-4, atol=1e-5)
    ids = AutoTokenizer.from_pretrained(tiny_bert)(TEXTS[1])["input_ids"]
    of_tokens = client.embeddings.create(model="best", input=ids)
    wanted = alone(tiny_bert, spec, best, TEXTS[1:2])
    torch.testing.assert_close(torch.tensor([of_tokens.data[0].embedding]), wanted, rtol=1e-4, atol=1e-5)
    url = begin("--run", str(run), "--merged", "--model.dtype", "fp32")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    got = torch.tensor([d.embedding for d in client.embeddings.create(model="best", input=TEXTS).data])
    vectors = alone(tiny_bert, spec, best, TEXTS)
    torch.testing.assert_close(got, vectors, rtol=1e-4, atol=1e-4)
    for shown in page(url, tmp_path, "\n".join(TEXTS), "best"):
        assert shown == [f"{like:.3f}  {text}" for like, text in zip(vectors @ vectors[0], TEXTS, strict=True)]


def test_a_tag_of_each_word(begin, tiny_bert, tmp_path):
    spec = TaskSpec("TOKEN_CLS", ("O", "B-X", "I-X"), 1)
    tags = adapter(tiny_bert, spec, tmp_path / "tags", 1)
    url = begin("--model", tiny_bert, f"--adapter=tags={tags}", "--model.dtype", "fp32")
    got = httpx.post(f"{url}/v1/classify", json={"model": "tags", "input": TEXTS}, timeout=60).json()
    pair = {"model": "tags", "input": "a", "pair": "b"}
    refused = httpx.post(f"{url}/v1/classify", json=pair, timeout=60).json()["error"]
    assert (refused["param"], refused["message"]) == ("pair", "the models here read one text")
    base, tokenizer = load_base(FP32, tiny_bert, spec).model.eval(), AutoTokenizer.from_pretrained(tiny_bert)
    model = PeftModel.from_pretrained(base, str(tags)).eval()
    for text, read in zip(TEXTS, got["data"], strict=True):
        encoded = tokenizer(text.split(), is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            probs = torch.softmax(model(**encoded).logits[0], -1)
        wanted = probs[[encoded.word_ids().index(word) for word in range(len(text.split()))]]
        torch.testing.assert_close(torch.tensor(read["probs"]), wanted, rtol=1e-4, atol=1e-5)
        assert read["words"] == text.split()
        assert read["tags"] == [spec.labels[i] for i in wanted.argmax(1)]


def test_requests_of_several_clients_are_read_together(begin, tiny_bert):
    class Counting(PoolingReplica):
        """Says how many requests it reads at a time."""

        async def _pool_all(self, requests):
            self.together = len(requests)
            return await super()._pool_all(requests)

        async def at_once(self, requests):
            async def read(one):
                begun, response = [message async for message in self.pool(one)]
                assert begun is True
                return response

            return await asyncio.gather(*map(read, requests)), self.together

    spec = TaskSpec("FEATURE_EXTRACTION", (), 1)
    settings = Config(model=FP32).model_dump()
    handle = serve.run(serve.deployment(Counting).bind(settings, tiny_bert, 1, spec), name="reader", route_prefix=None)
    requests = [PoolingRequest(TEXTS[:2], None, None, None, 99), PoolingRequest(TEXTS[2:], None, None, None, 99)]
    try:
        reads, together = handle.at_once.remote(requests).result()
    finally:
        serve.delete("reader")
    rows = torch.tensor([row for read in reads for row in read.values])
    torch.testing.assert_close(rows, alone(tiny_bert, spec, None, TEXTS), rtol=1e-4, atol=1e-5)
    assert together == 2


def test_a_text_that_fails_leaves_those_read_with_it_alone(tiny_bert):
    spec = TaskSpec("FEATURE_EXTRACTION", (), 1)
    reader = PoolingReplica(Config(model=FP32).model_dump(), tiny_bert, 1, spec)

    def refuse(module, args, kwargs):
        if (kwargs["input_ids"] == 7).any():
            raise RuntimeError("on purpose")

    reader.base.register_forward_pre_hook(refuse, with_kwargs=True)
    with torch.no_grad():
        reader.base.get_input_embeddings().weight[9] = float("nan")
    requests = [
        PoolingRequest(texts, None, None, None, 99) for texts in (TEXTS[:1], [[3, 7]], TEXTS[1:], [[3, 9], [4, 4]])
    ]
    got = reader.forward([replace(reader.encode(one), model=reader.base) for one in requests])
    assert (str(got[1]), type(got[3])) == ("on purpose", FloatingPointError)
    rows = torch.tensor([row for own in (got[0], got[2]) for row in own])
    torch.testing.assert_close(rows, alone(tiny_bert, spec, None, TEXTS), rtol=1e-4, atol=1e-5)


def test_a_text_may_be_as_long_as_the_table_of_positions(tmp_path, tokenizer):
    """RoBERTa keeps the first of its rows free: a text that the configuration has room for is too long by two."""
    sizes = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(**sizes, intermediate_size=32, max_position_embeddings=20, pad_token_id=1)
    RobertaModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reader = PoolingReplica(Config(model=FP32).model_dump(), str(tmp_path), 1, TaskSpec("FEATURE_EXTRACTION", (), 1))
    longest = reader.encode(PoolingRequest([[5] * 18], None, None, None, 99))
    (found,) = reader.forward([replace(longest, model=reader.base)])
    assert not isinstance(found, BaseException)
    with pytest.raises(APIError, match="19 tokens; 18 are allowed"):
        reader.encode(PoolingRequest([[5] * 19], None, None, None, 99))


WORDS = st.text(max_size=6) | st.sampled_from([" ", "\t \n", "\0", "\u2028", "a" * 300])


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(WORDS, min_size=1, max_size=4), st.booleans(), st.sampled_from(["SEQ_CLS", "TOKEN_CLS"]))
def test_odd_texts_are_read_or_refused(tiny_bert, texts, pairs, task):
    if task not in READERS:
        READERS[task] = PoolingReplica(Config(model=FP32).model_dump(), tiny_bert, 1, TaskSpec(task, ("a", "b"), 1))
    reader = READERS[task]
    try:
        encoded = reader.encode(PoolingRequest(texts, texts if pairs else None, None, None, 99))
    except APIError:
        return
    (rows,) = reader.forward([replace(encoded, model=reader.base)])
    assert len(rows) == len(texts)
    if task == "TOKEN_CLS":
        assert [len(row) for row in rows] == [len(text.split()) for text in texts]


READERS: dict[str, PoolingReplica] = {}


def test_what_no_route_answers_is_refused(tiny_bert, tmp_path):
    with pytest.raises(UserError, match="no route answers QUESTION_ANS"):
        find_catalog(parse("serve", ["--model", tiny_bert, "--task", "QUESTION_ANS"]))
    with pytest.raises(UserError, match="no route answers REWARD"):  # whose scores are no classes
        find_catalog(parse("serve", ["--model", tiny_bert, "--task", "REWARD"]))
    reward = adapter(tiny_bert, TaskSpec.named("REWARD", (), 1), tmp_path / "reward", 1)
    with pytest.raises(UserError, match="no route answers REWARD"):
        find_catalog(parse("serve", ["--model", tiny_bert, "--adapter", f"reward={reward}"]))
    one = adapter(tiny_bert, TaskSpec("SEQ_CLS", ("a", "b"), 1), tmp_path / "one", 1)
    other = adapter(tiny_bert, TaskSpec("SEQ_CLS", ("a", "c"), 1), tmp_path / "other", 1)
    with pytest.raises(UserError, match="it has other labels than a, b"):
        find_catalog(parse("serve", ["--model", tiny_bert, f"--adapter=one={one}", f"--adapter=other={other}"]))
