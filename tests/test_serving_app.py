"""The real command with a tiny model, asked by the real openai client. One start of Serve for all tests."""

import asyncio
import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
import torch
import uvicorn
from helpers.servers import KEY, Server, chromium
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from ftray.serving.key import digest_of
from ftray.serving.live import Looked, create_app
from ftray.storage.local import LocalLocation


@pytest.fixture(scope="module")
def server(tiny_llama, tmp_path_factory):
    server = Server(tiny_llama, tmp_path_factory.mktemp("adapters"))
    yield server
    for _ in range(2):  # the second changes nothing
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    assert server.process.wait(60) == 0
    said = (server.directory / "log").read_text().partition("endpoint ")[2]
    assert said == f"{server.url}/v1\ndraining\n"


MESSAGES = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "the cat sat"}]


def chat_ids(server, name="lora"):
    given = server.other if name == "trial-3" else None
    rendered = server.tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, tokenize=False, chat_template=given
    )
    return server.tokenizer(rendered, add_special_tokens=False)["input_ids"]


def test_models_are_the_base_and_every_adapter(server):
    assert {m.id for m in server.client().models.list()} == {server.base, "best", "trial-3", "lora"}
    assert server.client().models.retrieve("lora").id == "lora"
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}


@pytest.mark.parametrize("name", ["lora", "trial-3", None, "best"])  # more than a replica may hold
def test_answers_are_those_of_generate(server, name):
    name, client = name or server.base, server.client()
    ids = server.tokenizer("the cat sat on")["input_ids"]
    text, new = server.wanted(name, ids, 12)
    got = client.completions.create(model=name, prompt="the cat sat on", max_tokens=12, temperature=0)
    assert got.choices[0].text == text
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(ids), len(new))
    assert got.choices[0].finish_reason == ("stop" if new[-1] == 0 else "length")
    text, _ = server.wanted(name, chat_ids(server, name), 12)
    got = client.chat.completions.create(model=name, messages=MESSAGES, max_completion_tokens=12, temperature=0)
    assert got.choices[0].message.content == text


@pytest.mark.parametrize("stream", [False, True])
def test_an_adapter_that_was_trained_raw_says_so_to_whoever_chats(server, stream):
    def header(model, path="chat/completions", ask=None):
        body = {"model": model, "max_tokens": 2, "stream": stream} | (ask or {"messages": MESSAGES})
        return server.post(f"/v1/{path}", json=body).headers.get("x-ftray-warning")

    wanted = r"trained on prompts in the template 'say {prompt}:\n', not on chats: ask /v1/completions"
    assert header("best") == wanted
    assert [header(name) for name in ("lora", "trial-3", server.base)] == [None] * 3
    assert header("best", "completions", {"prompt": "a"}) is None


def test_streams_say_the_same(server):
    client = server.client()
    text, new = server.wanted("lora", chat_ids(server), 12)
    chunks = list(
        client.chat.completions.create(
            model="lora",
            messages=MESSAGES,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.completion_tokens == len(new)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    ids = server.tokenizer("a b c")["input_ids"]
    parts = client.completions.create(model="trial-3", prompt="a b c", max_tokens=12, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts) == server.wanted("trial-3", ids, 12)[0]


def test_many_at_once_over_all_adapters(server):
    async def ask(client, name, prompt):
        got = await client.completions.create(model=name, prompt=prompt, max_tokens=10, temperature=0)
        return got.choices[0].text

    async def all_of_them():
        async with server.client(openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(ask(client, *case) for case in cases))

    names = [server.base, "lora", "trial-3", "lora", server.base, "trial-3"]
    cases = [(name, "the cat " * (i + 1)) for i, name in enumerate(names)]
    wanted = [server.wanted(name, server.tokenizer(prompt)["input_ids"], 10)[0] for name, prompt in cases]
    assert asyncio.run(all_of_them()) == wanted


def test_several_prompts_several_answers_seeds_and_stops(server):
    client = server.client()
    settings = {"model": "lora", "max_tokens": 8, "temperature": 1.2, "top_p": 0.95, "seed": 4}
    got = client.completions.create(prompt=["a b", "the cat"], n=2, **settings)
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    again = client.completions.create(prompt=["a b", "the cat"], n=2, **settings)
    assert [c.text for c in again.choices] == [c.text for c in got.choices]
    assert got.choices[0].text != got.choices[1].text
    whole = client.completions.create(model="lora", prompt="a b", max_tokens=20, temperature=0).choices[0].text
    stop = whole[3:5]
    cut = client.completions.create(model="lora", prompt="a b", max_tokens=20, temperature=0, stop=[stop]).choices[0]
    assert cut.text == whole[: whole.find(stop)]
    assert cut.finish_reason == "stop"


def test_likelihoods_as_an_evaluation_harness_reads_them(server):
    prompts = [server.tokenizer("the cat sat")["input_ids"], server.tokenizer("a b c d")["input_ids"]]
    got = server.client().completions.create(
        model="lora", prompt=prompts, max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1
    )
    for choice, ids in zip(got.choices, prompts, strict=True):
        logits = server.models["lora"](torch.tensor([ids])).logits[0].float()
        wanted = torch.log_softmax(logits, -1)
        lp = choice.logprobs
        assert lp.token_logprobs[0] is None
        assert lp.top_logprobs[0] is None
        assert len(lp.tokens) == len(lp.text_offset) == len(ids) + 1
        for place, token in enumerate(ids[1:]):
            assert lp.token_logprobs[place + 1] == pytest.approx(wanted[place, token].item(), abs=1e-4)
            assert max(lp.top_logprobs[place + 1].values()) == pytest.approx(wanted[place].max().item(), abs=1e-4)
        assert choice.text.startswith(server.tokenizer.decode(ids))
    chat = server.client().chat.completions.create(
        model="lora", messages=MESSAGES, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    entries = chat.choices[0].logprobs.content
    assert all(len(e.top_logprobs) == 2 and e.logprob == e.top_logprobs[0].logprob for e in entries)
    assert all(bytes(e.bytes).decode(errors="backslashreplace") == e.token for e in entries)
    said = b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace")
    assert re.sub(r"<\|(end|pad)\|>", "", said) == chat.choices[0].message.content


OK = {"model": "lora", "prompt": "a", "max_tokens": 2}
SAY = {"model": "lora", "messages": MESSAGES, "max_tokens": 2}
TOOL = {"type": "function", "function": {"name": "f"}}
JSON = {"type": "json_object"}


def schema_of(body):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": body, "strict": True}}


MALFORMED = [
    ("completions", b"", 400, "JSON"),
    ("completions", b"{", 400, "JSON"),
    ("completions", b"[1]", 400, "object"),
    ("completions", b"\xff\xfe", 400, "JSON"),
    ("completions", b"[" * 10000, 400, "JSON"),
    ("completions", b'"' + b"x" * 30000 + b'"', 413, "bytes"),
    ("completions", {}, 400, "model"),
    ("completions", {"model": "lora"}, 400, "prompt"),
    ("completions", {**OK, "model": 3}, 400, "model"),
    ("completions", {**OK, "model": "nobody"}, 404, "no model"),
    ("completions", {**OK, "model": "../lora"}, 404, "no model"),
    ("completions", {**OK, "prompt": ""}, 400, "prompt"),
    ("completions", {**OK, "prompt": []}, 400, "prompt"),
    ("completions", {**OK, "prompt": [[]]}, 400, "prompt"),
    ("completions", {**OK, "prompt": {"a": 1}}, 400, "prompt"),
    ("completions", {**OK, "prompt": ["a", 1]}, 400, "prompt"),
    ("completions", {**OK, "prompt": [-1]}, 400, "prompt"),
    ("completions", {**OK, "prompt": [10**6]}, 400, "prompt"),
    ("completions", {**OK, "prompt": ["a"] * 300}, 400, "prompt"),
    ("completions", {**OK, "prompt": "a b " * 400}, 400, "300 are allowed"),
    ("completions", {**OK, "max_tokens": -1}, 400, "max_tokens"),
    ("completions", {**OK, "max_tokens": "many"}, 400, "max_tokens"),
    ("completions", {**OK, "max_tokens": 0}, 400, "max_tokens"),
    ("completions", {**OK, "max_tokens": 481}, 400, "max_tokens"),
    ("completions", {**OK, "max_tokens": 300, "n": 2}, 400, "max_tokens"),
    ("completions", {**OK, "prompt": [5] * 290, "max_tokens": 300}, 400, "max_tokens"),
    ("completions", {**OK, "temperature": -0.1}, 400, "temperature"),
    ("completions", {**OK, "temperature": float("nan")}, 400, "temperature"),
    ("completions", {**OK, "top_p": 0}, 400, "top_p"),
    ("completions", {**OK, "n": 0}, 400, "n"),
    ("completions", {**OK, "n": 17}, 400, "n"),
    ("completions", {**OK, "stop": ["a"] * 5}, 400, "stop"),
    ("completions", {**OK, "stop": ""}, 400, "stop"),
    ("completions", {**OK, "logprobs": 21}, 400, "logprobs"),
    ("completions", {**OK, "best_of": 3}, 400, "best_of"),
    ("completions", {**OK, "suffix": "b"}, 400, "unsupported field 'suffix'"),
    ("completions", {**OK, "presence_penalty": 2.1}, 400, "presence_penalty"),
    ("completions", {**OK, "repetition_penalty": 0}, 400, "repetition_penalty"),
    ("completions", {**OK, "logit_bias": {"cat": 1}}, 400, "logit_bias"),
    ("completions", {**OK, "logit_bias": {"5": 101}}, 400, "logit_bias"),
    ("completions", {**OK, "logit_bias": {"500": 1}}, 400, "tokens are from 0 to 383, not 500"),
    ("completions", {**OK, "response_format": {"type": "json_schema"}}, 400, "response_format"),
    ("completions", {**OK, "response_format": {"type": "json_object", "json_schema": {"name": "a"}}}, 400, "schema"),
    ("completions", {**OK, "response_format": {"type": "xml"}}, 400, "response_format"),
    ("completions", {**OK, "stream": "perhaps"}, 400, "stream"),
    ("completions", {**OK, "seed": 2**64}, 400, "seed"),
    ("chat/completions", {**SAY, "messages": []}, 400, "messages"),
    ("chat/completions", {**SAY, "messages": [{"role": "king", "content": "a"}]}, 400, "role"),
    ("chat/completions", {**SAY, "messages": [{"role": "user"}]}, 400, "content"),
    ("chat/completions", {**SAY, "messages": "hello"}, 400, "messages"),
    ("chat/completions", {**SAY, "tools": [{"type": "function"}]}, 400, "tools"),
    ("chat/completions", {**SAY, "tools": [TOOL]}, 400, "has no place for tools"),
    ("chat/completions", {**SAY, "response_format": schema_of({"type": "nonsense"})}, 400, "Invalid type: nonsense"),
    ("chat/completions", {**SAY, "response_format": schema_of({"not": {"const": 1}})}, 400, 'keys: ["not"]'),
    ("chat/completions", {**SAY, "response_format": schema_of({"$ref": "http://a/b"})}, 400, "response_format"),
    ("chat/completions", {**SAY, "response_format": JSON, "tools": [TOOL]}, 400, "calls no tool"),
    ("chat/completions", {**SAY, "top_logprobs": 2}, 400, "top_logprobs"),
    ("chat/completions", {**SAY, "prompt": "a"}, 400, "unsupported field 'prompt'"),
    ("adapters", {"name": "../x", "source": "/tmp"}, 400, "adapter name"),
    ("adapters", {"name": "x", "source": "/etc"}, 403, "may come from"),
    ("adapters", {"name": "x", "source": "s3://bucket/x"}, 403, "may come from"),
    ("adapters", {"name": "lora", "source": "/tmp"}, 409, "already"),
    ("nothing", {}, 404, "Not Found"),
    ("completions", b'{"model": "lora", "prompt": "a", "temperature": 1e999}', 400, "temperature"),
    ("completions", {**OK, "temperature": 10**400}, 400, "temperature"),
    ("completions", {**OK, "top_p": float("nan")}, 400, "top_p"),
    ("completions", {**OK, "top_p": float("inf")}, 400, "top_p"),
    ("completions", {**OK, "seed": float("nan")}, 400, "seed"),
    ("completions", {**OK, "max_tokens": 10**4000}, 400, "max_tokens"),
    ("completions", {**OK, "prompt": [10**4000]}, 400, "prompt"),
    ("completions", b'{"model": "lora", "prompt": [' + b"1" * 5000 + b"]}", 400, "JSON"),
    ("completions", {**OK, "prompt": "a\ud83d"}, 400, "prompt"),
    ("completions", {**OK, "prompt": ["a", "\ude00b"]}, 400, "prompt"),
    ("completions", b'{"model": "lora", "prompt": "\xed\xa0\x80"}', 400, "prompt"),
    ("completions", {**OK, "stop": ["\ud83d"]}, 400, "stop"),
    ("completions", {**OK, "model": "\ud83d"}, 400, "model"),
    ("completions", {**OK, "user": "\ud83d"}, 400, "user"),
    ("completions", {**OK, "\ud83d": 1}, 400, "field name"),
    ("chat/completions", {**SAY, "messages": [{"role": "user", "content": "\ud83d"}]}, 400, "messages"),
    ("chat/completions", {**SAY, "messages": [{"role": "user", "content": "a", "\ud83d": 1}]}, 400, "messages"),
    ("chat/completions", {**SAY, "max_completion_tokens": 2**31}, 400, "max_completion_tokens"),
    ("adapters", {"name": "x", "source": "/tmp/\0"}, 400, "source"),
    ("adapters", {"name": "\ud83d", "source": "/tmp"}, 400, "name"),
    ("adapters", {"name": 1e-40, "source": "/tmp"}, 400, "name"),
]


def test_malformed_requests_get_a_clear_answer_and_harm_nothing(server):
    assert len(MALFORMED) >= 40
    for path, body, status, reason in MALFORMED:
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        got = server.post(f"/v1/{path}", content=sent)
        case = f"{path} {sent[:100]!r}: {got.status_code} {got.text[:300]}"
        assert got.status_code == status, case
        error = got.json()["error"]
        assert reason in error["message"] or reason == error["param"], case
        assert set(error) == {"message", "type", "param", "code"}, case
        assert "Traceback" not in got.text, case
    assert server.client().completions.create(**OK).choices[0].text is not None
    with pytest.raises(openai.BadRequestError, match="top_k"):
        server.client().completions.create(**OK, extra_body={"top_k": 3})


RECORD = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_answers_conform_to_their_schema(server, stream):
    """Of a model that has never seen JSON; beside answers without a schema, which stay what they are."""
    client, format_ = server.client(), schema_of(RECORD)
    ids = server.tokenizer("the cat sat on")["input_ids"]
    for name in ("lora", "best", server.base):
        for temperature in (0, 1):
            ask = {"messages": MESSAGES, "max_tokens": 120, "temperature": temperature, "response_format": format_}
            got = client.chat.completions.create(model=name, stream=stream, **ask)
            if stream:
                parts = [chunk.choices[0] for chunk in got]
                text, finish = "".join(part.delta.content or "" for part in parts), parts[-1].finish_reason
            else:
                text, finish = got.choices[0].message.content, got.choices[0].finish_reason
            assert finish == "stop"
            jsonschema.validate(json.loads(text), RECORD)
    several = client.completions.create(
        model="lora", prompt="the", n=3, max_tokens=120, seed=1, extra_body={"response_format": format_}
    )
    values = [json.loads(choice.text) for choice in several.choices]
    assert len({json.dumps(value) for value in values}) > 1
    plain = client.completions.create(model="lora", prompt="the cat sat on", max_tokens=8, temperature=0)
    assert plain.choices[0].text == server.wanted("lora", ids, 8)[0]


def test_biases_and_penalties_reach_the_engine(server):
    client, (cat, mat) = server.client(), [server.tokenizer(word)["input_ids"][0] for word in ("c", "m")]
    ask = {"model": "lora", "prompt": "the", "max_tokens": 4, "temperature": 0, "logit_bias": {cat: 100, mat: 99}}
    assert client.completions.create(**ask).choices[0].text == "cccc"
    assert client.completions.create(**ask, presence_penalty=2).choices[0].text == "cmcc"
    assert client.completions.create(**ask, extra_body={"repetition_penalty": 2}).choices[0].text != "cccc"


@pytest.mark.parametrize("odd", [{"temperature": 1e-40}, {"temperature": 5e-324}, {"temperature": 1, "top_p": 1e-40}])
def test_next_to_no_temperature_is_none(server, odd):
    ids = server.tokenizer("the cat sat on")["input_ids"]
    ask = {"prompt": "the cat sat on", "max_tokens": 8, "n": 2, "logprobs": 2, **odd}
    for name in ("lora", server.base):
        got = server.post("/v1/completions", json={"model": name, **ask}).json()
        assert [choice["text"] for choice in got["choices"]] == [server.wanted(name, ids, 8)[0]] * 2


def test_an_adapter_that_gives_nothing_finite_fails_alone(server):
    weights = load_file(server.directory / "lora" / "adapter_model.safetensors")
    for name, factor in (("nan", float("nan")), ("broken", 1e30)):
        shutil.copytree(server.directory / "lora", server.directory / name)
        file = server.directory / name / "adapter_model.safetensors"
        save_file({key: weight * factor for key, weight in weights.items()}, file)
    refused = server.post("/v1/adapters", json={"name": "nan", "source": str(server.directory / "nan")})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "source")
    assert "not finite" in refused.json()["error"]["message"]
    source = str(server.directory / "broken")
    assert server.post("/v1/adapters", json={"name": "broken", "source": source}).status_code == 200
    ids = server.tokenizer("a b c")["input_ids"]

    async def ask(client, name):
        body = {"model": name, "prompt": "a b c", "max_tokens": 30, "temperature": 0}
        return await client.post(server.url + "/v1/completions", json=body, timeout=120)

    async def together():
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}) as client:
            return await asyncio.gather(*(ask(client, name) for name in ("lora", "broken", "lora", "broken")))

    try:
        good, bad = [], []
        for which, got in zip((good, bad, good, bad), asyncio.run(together()), strict=True):
            which.append(got)
        assert [got.json()["choices"][0]["text"] for got in good] == [server.wanted("lora", ids, 30)[0]] * 2
        assert [(got.status_code, got.json()["error"]["code"]) for got in bad] == [(500, "model_error")] * 2
        assert all("not finite" in got.json()["error"]["message"] for got in bad)
    finally:
        httpx.delete(server.url + "/v1/adapters/broken", headers={"Authorization": f"Bearer {KEY}"})


TEXTS = st.text(st.characters(exclude_categories=()), max_size=8)  # half surrogates too
NUMBERS = st.integers() | st.integers(-2, 500) | st.floats() | st.floats(0, 2) | st.sampled_from([2**31, 2**63, 1e-40])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=6,
)
FIELDS = {
    "model": st.sampled_from(["lora", "trial-3", "best"]),
    "prompt": st.text(max_size=9) | st.lists(st.integers(0, 400), max_size=5) | st.lists(TEXTS, max_size=2),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "n": st.integers(1, 3),
    "seed": st.integers(-(2**64), 2**64),
    "stop": st.lists(st.text(max_size=2), max_size=5) | st.text(max_size=2),
    "max_tokens": st.integers(0, 12),
    "logprobs": st.integers(0, 20),
    "echo": st.booleans(),
    "user": TEXTS,
    "stream": st.just(False),
    "frequency_penalty": st.floats(-2, 2),
    "presence_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.5, 2),
    "logit_bias": st.dictionaries(st.integers(0, 400).map(str), st.integers(-100, 100), max_size=3),
    "response_format": st.sampled_from([{"type": "text"}, JSON, schema_of({"type": "integer"}), schema_of(True)]),
}
ODD = st.sampled_from(sorted(FIELDS)).flatmap(lambda name: st.tuples(st.just(name), FIELDS[name] | VALUES))
ODD |= st.tuples(TEXTS, VALUES)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant"]), "content": TEXTS | VALUES})


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    changes=st.lists(ODD, min_size=1, max_size=4),
    messages=st.none() | st.lists(MESSAGE, max_size=2) | VALUES,
    stream=st.booleans(),
)
def test_no_request_is_odd_enough_to_fail_us(server, changes, messages, stream):
    body = {**OK, "stream": stream, **dict(changes)}
    path = "completions"
    if messages is not None:
        path, body["messages"] = "chat/completions", messages
        body.pop("prompt", None)
    got = server.post(f"/v1/{path}", content=json.dumps(body).encode())
    assert got.status_code in (200, 400, 404), (body, got.text)
    if got.status_code != 200:
        assert set(got.json()["error"]) == {"message", "type", "param", "code"}
    assert "event: error" not in got.text
    ids = server.tokenizer("a")["input_ids"]
    good = server.post("/v1/completions", json={**OK, "temperature": 0})
    assert good.json()["choices"][0]["text"] == server.wanted("lora", ids, OK["max_tokens"])[0]


def test_places_that_the_system_can_not_look_at_are_refused(server):
    for source in ("x" * 300, "a/" * 400, "\n"):
        got = server.post("/v1/adapters", json={"name": "x", "source": f"{server.directory}/{source}"})
        assert (got.status_code, set(got.json())) == (400, {"error"}), got.text


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}])
def test_without_the_key_nothing_is_told(server, header):
    for path in ("/v1/models", "/metrics", "/v1/models/lora"):
        got = httpx.get(server.url + path, headers=header)
        assert (got.status_code, got.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.post(server.url + "/v1/completions", headers=header, json=OK).status_code == 401


def test_adapters_come_and_go(server):
    body = {"name": "late", "source": str(server.directory / "extra")}
    with pytest.raises(openai.NotFoundError):
        server.client().completions.create(**{**OK, "model": "late"})
    assert server.post("/v1/adapters", json=body).json()["id"] == "late"
    ids = server.tokenizer("the cat")["input_ids"]
    ask = {"model": "late", "prompt": "the cat", "max_tokens": 9, "temperature": 0}
    assert server.client().completions.create(**ask).choices[0].text == server.wanted("extra", ids, 9)[0]
    gone = httpx.delete(server.url + "/v1/adapters/late", headers={"Authorization": f"Bearer {KEY}"})
    assert gone.json() == {"id": "late", "object": "model", "deleted": True}
    with pytest.raises(openai.NotFoundError):
        server.client().completions.create(**ask)
    other = server.directory / "other"
    other.mkdir()
    config = json.loads((server.directory / "lora" / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "elsewhere/b"}))
    (other / "adapter_model.safetensors").write_bytes(
        (server.directory / "lora/adapter_model.safetensors").read_bytes()
    )
    refused = server.post("/v1/adapters", json={"name": "other", "source": str(other)})
    assert refused.status_code == 400
    assert "made for the base model elsewhere/b" in refused.json()["error"]["message"]


def test_a_client_that_goes_away_frees_its_slot(server):
    _, new = server.wanted("lora", server.tokenizer("a")["input_ids"], 450)
    assert len(new) == 450  # it never ends by itself
    ask = {"model": "lora", "prompt": "a", "max_tokens": 450, "temperature": 0}
    before = server.metric("ftray_requests_total")
    for _ in range(6):  # more than there are slots
        stream = server.client().completions.create(**ask, stream=True)
        next(iter(stream))
        stream.close()
    patience, headers = httpx.Timeout(60, read=0.3), {"Authorization": f"Bearer {KEY}"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + "/v1/completions", headers=headers, json=ask, timeout=patience)
    for _ in range(300):
        if server.metric("ftray_requests_total") == before + 7 and server.metric("ftray_requests_under_way") == 0:
            break
        time.sleep(0.1)
    assert server.metric("ftray_requests_under_way") == 0
    assert server.metric("ftray_requests_total") == before + 7
    assert server.client().completions.create(**OK).usage.completion_tokens > 0


def test_what_is_too_much_is_told_to_come_again(server):
    async def ask(client):
        body = {"model": "trial-3", "prompt": "a", "max_tokens": 200, "temperature": 2.0}
        return await client.post(server.url + "/v1/completions", json=body, timeout=300)

    async def flood():
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}) as client:
            return await asyncio.gather(*(ask(client) for _ in range(20)))

    got = asyncio.run(flood())
    refused = [response for response in got if response.status_code == 429]
    assert 0 < len(refused) <= 12
    assert all(response.headers["retry-after"] == "1" for response in refused)
    assert all(response.status_code == 200 for response in got if response not in refused)


def test_the_page_shows_two_models_side_by_side(server, tmp_path):
    with chromium(server.url, tmp_path) as browser:

        def at(name):
            return browser.find_element("id", name)

        wait = WebDriverWait(browser, 30)
        wait.until(lambda _: at("key").is_displayed())
        at("key").send_keys(KEY + Keys.TAB)
        wait.until(lambda _: at("leaderboard").is_displayed())
        assert "1.2500" in at("leaderboard").text
        assert at("template").get_attribute("value") == "say {prompt}:\n"
        assert at("model-1").get_attribute("value") == "best"
        browser.switch_to.active_element.send_keys(Keys.TAB)
        at("prompt").send_keys("the <b>cat</b>", Keys.CONTROL + Keys.ENTER)  # no mouse needed
        wait.until(lambda _: "tokens/s" in at("speed-0").text and "tokens/s" in at("speed-1").text)
        ids = server.tokenizer("say the <b>cat</b>:\n")["input_ids"]
        for side, name in enumerate((server.base, "best")):
            shown = at(f"answer-{side}").get_attribute("textContent")
            assert shown == server.wanted(name, ids, 64)[0]
        at("model-1").send_keys("trial-3")  # which has a chat template of its own
        at("prompt").send_keys(Keys.CONTROL + Keys.ENTER)
        wait.until(lambda _: "tokens/s" in at("speed-1").text and at("send").is_enabled())
        asked = [{"role": "user", "content": "the <b>cat</b>"}]
        rendered = server.tokenizer.apply_chat_template(
            asked, chat_template=server.other, add_generation_prompt=True, tokenize=False
        )
        ids = server.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert at("answer-1").get_attribute("textContent") == server.wanted("trial-3", ids, 64)[0]


def test_the_page_of_a_search_asks_the_endpoint_and_marks_what_differs(server, tmp_path):
    """The same room, on the page of `ftray ui`, whose key is another one."""
    app = create_app(LocalLocation(server.directory / "run"), digest_of("of the page"), server.url, KEY, Looked())
    listening = socket.create_server(("127.0.0.1", 0))
    page = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=page.run, args=([listening],))
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
    try:
        headers = {"Authorization": "Bearer of the page"}
        refused = httpx.post(f"{url}v1/completions", json={"model": "none", "prompt": "a"}, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        with chromium(f"{url}#key=of the page", tmp_path) as browser:

            def at(name):
                return browser.find_element("id", name)

            wait = WebDriverWait(browser, 30)
            wait.until(lambda _: at("model-1").get_attribute("value") == "best")
            row = wait.until(lambda _: browser.find_element("css selector", "#leaderboard tbody tr"))
            row.find_element("xpath", ".//button[text()='left']").click()
            assert at("model-0").get_attribute("value") == "trial-3"
            at("tokens").clear()
            at("tokens").send_keys("12")
            at("form").send_keys("plain")
            at("template").clear()
            at("template").send_keys("{prompt}")
            at("prompt").send_keys("the cat", Keys.CONTROL + Keys.ENTER)
            wait.until(lambda _: at("speed-0").text and at("speed-1").text and at("send").is_enabled())
            ids, own = server.tokenizer("the cat")["input_ids"], []
            for side, name in enumerate(("trial-3", "best")):
                shown = at(f"answer-{side}")
                assert shown.get_attribute("textContent") == server.wanted(name, ids, 12)[0]
                marked = shown.find_elements("tag name", "mark")
                own.append("".join(mark.get_attribute("textContent") for mark in marked))
            assert own[0] != own[1]
            assert all(own)
    finally:
        page.should_exit = True
        thread.join()


def test_the_page_is_told_how_each_was_trained(server):
    got = httpx.get(server.url + "/v1/run", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert got["template"] == "say {prompt}:\n"
    assert got["templates"] == {"best": "say {prompt}:\n", "trial-3": None}


def test_the_examples_of_the_page_on_serving_run(server, monkeypatch, capsys):
    text = (Path(__file__).parents[1] / "docs" / "serving.md").read_text().replace("http://127.0.0.1:8000", server.url)
    (curl,), (code, form) = (re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("bash", "python"))
    monkeypatch.setenv("FTRAY_API_KEY", KEY)
    wanted = server.wanted("best", server.tokenizer("f o x\n")["input_ids"], 16)[0]
    done = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["text"] == wanted
    names: dict[str, Any] = {}
    exec(compile(code, "serving.md", "exec"), names)
    assert capsys.readouterr().out == wanted
    exec(compile(form, "serving.md", "exec"), names)
    choice = names["answer"].choices[0]
    assert choice.finish_reason == "length" or set(json.loads(choice.message.content)) >= {"phonemes"}
    assert choice.message.content.lstrip().startswith("{")


def test_prometheus_is_told_what_was_done(server):
    assert server.metric('ftray_output_tokens_total{model="lora"}') > 0
    assert server.metric('ftray_prompt_tokens_total{model="lora"}') > 0
    assert server.metric('ftray_first_part_seconds_count{model="lora"}') > 0
