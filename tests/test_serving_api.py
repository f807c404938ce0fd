"""Every route of the application by itself: its key, the limit of its body, the shape of its errors."""

import asyncio
import hashlib
import json
import re
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import pytest
from fastapi import APIRouter
from fastapi.testclient import TestClient
from helpers.bodies import NO_OBJECTS
from helpers.routes import ROUTES
from ray.exceptions import ActorDiedError

from ftray.data.tool_calls import find_call_format
from ftray.serving.api.app import create_app
from ftray.serving.api.endpoint import Endpoint, current_endpoint
from ftray.serving.generation_request import OutputDelta, OutputDeltas, TokenLogprob

KEY = "correct horse battery"
OPEN = {("GET", path) for path in ("/", "/page.css", "/page.js", "/health")}  # none of them shows anything of a run
LIMIT = 1000


class Replicas:
    """A handle whose answers are `messages`."""

    def __init__(self, messages=()):
        self.messages, self.generate, self.load, self.pool = messages, self, self, self
        self.ready = SimpleNamespace(remote=partial(asyncio.sleep, 0))

    def options(self, stream=False, **kwargs):
        self.stream = stream
        return self

    def remote(self, *args):
        return self.answer() if self.stream else self.whole()

    async def whole(self):
        raise ActorDiedError

    async def answer(self):
        for message in self.messages:
            yield message


def client_of(replicas=None, key: str | None = KEY, **settings) -> TestClient:
    digest = None if key is None else hashlib.sha256(key.encode()).hexdigest()
    app = create_app(digest, LIMIT)
    cfg = {"serving": {"max_body_bytes": LIMIT, **settings}}
    endpoint = Endpoint(cfg, "base", {}, replicas or Replicas(), "CAUSAL_LM")
    app.dependency_overrides[current_endpoint] = lambda: endpoint
    return TestClient(app, raise_server_exceptions=False)


def test_all_routes_are_walked():
    assert set(ROUTES) > OPEN
    known = {"/v1/models", "/v1/models/{name}", "/v1/adapters", "/v1/adapters/{name}", "/v1/completions", "/v1/run"}
    known |= {"/v1/chat/completions", "/v1/embeddings", "/v1/classify", "/metrics"}
    assert known <= {path for _, path in ROUTES}


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("authorization", [None, "Bearer wrong", f"Basic {KEY}", "Bearer", f"Bearer x{KEY}"])
def test_without_the_key_no_route_answers(method, path, authorization):
    headers = {"Authorization": authorization} if authorization else {}
    got = client_of().request(method, path.replace("{name}", "base"), headers=headers, content=b"{}" * LIMIT)
    if (method, path) in OPEN:
        assert got.status_code == 200
        return
    assert (got.status_code, got.json()["error"]["code"]) == (401, "invalid_api_key")
    assert got.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(("method", "path"), sorted(set(ROUTES) - OPEN))
def test_with_the_key_or_where_none_is_needed_every_route_answers(method, path):
    for key, headers in ((KEY, {"Authorization": f"bearer {KEY} "}), (None, {})):
        got = client_of(key=key).request(method, path.replace("{name}", "base"), headers=headers, content=b"{")
        assert got.status_code not in (401, 500), got.text


def test_a_route_that_is_added_needs_the_key_too():
    app = create_app(hashlib.sha256(KEY.encode()).hexdigest(), LIMIT)

    @app.get("/later")
    async def later() -> str:
        return "told"

    more = APIRouter()
    more.get("/health")(later)  # the path of an open route is no way around
    app.include_router(more, prefix="/more")
    for path in ("/later", "/more/health"):
        assert TestClient(app).get(path).status_code == 401
        assert TestClient(app).get(path, headers={"Authorization": f"Bearer {KEY}"}).json() == "told"


@pytest.mark.parametrize("path", sorted(path for method, path in ROUTES if method == "POST"))
def test_a_body_that_is_too_large_is_refused_with_and_without_its_length(path):
    def chunks() -> Iterator[bytes]:
        yield from [b" " * (LIMIT // 2)] * 3

    for body in (b" " * (LIMIT + 1), chunks()):
        got = client_of().post(path, headers={"Authorization": f"Bearer {KEY}"}, content=body)
        assert (got.status_code, got.json()["error"]["code"]) == (413, "too_large")
    got = client_of().post(path, headers={"Authorization": f"Bearer {KEY}"}, content=b" " * LIMIT)
    assert (got.status_code, got.json()["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("path", sorted(path for method, path in ROUTES if method == "POST"))
def test_a_body_is_a_json_object_whatever_curl_calls_it(path):
    fields_are_missing = ("application/x-www-form-urlencoded", b"{}", (400, "invalid_value"), "")  # it is JSON
    for kind, content, refused, reason in (*NO_OBJECTS, fields_are_missing):
        headers = {"Authorization": f"Bearer {KEY}"} | ({"Content-Type": kind} if kind else {})
        got = client_of().post(path, headers=headers, content=content)
        error = got.json()["error"]
        assert (got.status_code, error["code"]) == refused, kind
        assert error["message"].startswith(reason)
        assert "\n" not in error["message"]


def test_health_is_of_the_replicas_and_not_of_the_endpoint_alone(monkeypatch):
    class NoReplica:
        """As Serve's answer while no replica is up."""

        cancelled = 0

        def __await__(self):
            return asyncio.sleep(60).__await__()

        def cancel(self):
            NoReplica.cancelled += 1

    async def died():
        raise ActorDiedError

    monkeypatch.setattr("ftray.serving.router.HEALTH_SECONDS", 0.1)
    replicas = Replicas()
    assert client_of(replicas).get("/health").json() == {"status": "ok"}
    for remote in (NoReplica, died):
        replicas.ready = SimpleNamespace(remote=remote)
        got = client_of(replicas).get("/health")
        assert (got.status_code, got.json()["error"]["code"], got.headers["retry-after"]) == (503, "not_ready", "10")
    assert NoReplica.cancelled == 1


def test_errors_have_one_shape(tmp_path):
    headers = {"Authorization": f"Bearer {KEY}"}
    adapter = {"name": "a", "source": str(tmp_path)}
    cases = [
        (client_of().get("/nothing", headers=headers), 404, None),
        (client_of().put("/v1/models", headers=headers), 405, None),
        (
            client_of(adapter_sources=[str(tmp_path)]).post("/v1/adapters", headers=headers, json=adapter),
            500,
            "replica_died",
        ),
    ]
    for got, status, code in cases:
        assert (got.status_code, got.json()["error"]["code"]) == (status, code)
        assert set(got.json()["error"]) == {"message", "type", "param", "code"}


def test_what_can_not_be_remembered_is_told(tmp_path):
    class Loads(Replicas):
        async def whole(self):
            return None

    registry = tmp_path / "gone" / "registry.json"
    client = client_of(Loads(), registry=str(registry), adapter_sources=[str(tmp_path)])
    headers, adapter = {"Authorization": f"Bearer {KEY}"}, {"name": "a", "source": str(tmp_path)}
    got = client.post("/v1/adapters", headers=headers, json=adapter)
    assert (got.status_code, got.json()["error"]["code"]) == (500, "not_remembered")
    assert [model["id"] for model in client.get("/v1/models", headers=headers).json()["data"]] == ["base"]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_an_answer_that_fails_is_an_error_whatever_its_text(path):
    """The text "error: ..." is an answer like any other."""
    body = (
        {"model": "base", "messages": [{"role": "user", "content": "a"}]}
        if "chat" in path
        else {"model": "base", "prompt": "a"}
    )
    said = OutputDelta(0, "error: said the model", count=3, finish="stop")
    failed = OutputDelta(0, finish="error", error="ValueError: on purpose")
    for last, status in ((said, 200), (failed, 500)):
        messages = [OutputDeltas(), OutputDeltas(prompt_tokens=1), OutputDeltas([last])]
        headers = {"Authorization": f"Bearer {KEY}"}
        whole = client_of(Replicas(messages)).post(f"/v1/{path}", headers=headers, json=body)
        streamed = client_of(Replicas(messages)).post(f"/v1/{path}", headers=headers, json={**body, "stream": True})
        assert whole.status_code == status, whole.text
        if status == 200:
            assert "error: said the model" in whole.text
            assert streamed.text.endswith("data: [DONE]\n\n")
        else:
            assert whole.json()["error"]["code"] == "model_error"
            assert "on purpose" in whole.json()["error"]["message"]
            assert "event: error" in streamed.text


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "strict": None, "parameters": {"type": "object"}, "x": 1}}
ASK = {"role": "user", "content": "q"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "annotations": None}
ANSWERED = {
    "role": "tool",
    "tool_call_id": "c1",
    "content": [{"type": "text", "text": "2"}, {"type": "text", "text": "1"}],
}


@pytest.mark.parametrize(
    ("changes", "param", "reason"),
    [
        ({"tool_choice": "required"}, "tool_choice", "no tools to call"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "there is no tool 'f'"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]}, "tool_choice", "tool 'g'"),
        ({"tool_choice": {"type": "function", "name": "f"}, "tools": [TOOL]}, "tool_choice", "by its name"),
        ({"tool_choice": "some"}, "tool_choice", "'auto', 'none', 'required' or"),
        ({"tool_choice": ["f"]}, "tool_choice", "'auto', 'none', 'required' or"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools", "type: must be 'function'"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools", "function.name: is missing"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "function.name"),
        ({"tools": {"f": 1}}, "tools", "list"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported field"),
        ({"messages": [ASK, {"role": "assistant", "content": None}]}, "messages", "messages.1: content"),
        ({"messages": [ASK, {**CALLED, "role": "user"}]}, "messages", "a turn of role user can't hold calls"),
        ({"messages": [ASK, {**CALLED, "tool_calls": [{**CALL, "type": "custom"}]}]}, "messages", "type"),
        ({"messages": [ASK, {**CALLED, "function_call": {"name": "f"}}]}, "messages.1.function_call", "unsupported"),
        ({"messages": [ASK, CALLED, {"role": "tool", "content": "21"}]}, "messages", "tool_call_id"),
        ({"messages": [ASK, CALLED, {**ANSWERED, "tool_call_id": "c2"}]}, "messages", "made a call 'c2'"),
        ({"messages": [ASK, ANSWERED, CALLED]}, "messages", "made a call 'c1'"),
        ({"messages": [{**ASK, "tool_call_id": "c1"}]}, "messages", "no other turn"),
        (
            {"messages": [{**ASK, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            "messages.0.content: part 0 must be of type text, not 'image_url'",
        ),
        (
            {"messages": [{**ASK, "content": [{"type": "text", "text": "a"}, "b"]}]},
            "messages",
            "part 1 must be of type text",
        ),
        ({"messages": [{**ASK, "content": {"text": "a"}}]}, "messages", "messages.0.content: must be a text"),
    ],
)
def test_what_of_tools_and_turns_can_not_be_had_is_named(changes, param, reason):
    got = client_of(key=None).post("/v1/chat/completions", json={"model": "base", "messages": [ASK], **changes})
    error = got.json()["error"]
    assert (got.status_code, error["param"]) == (400, param), error
    assert reason in error["message"]


def test_a_replica_gets_turns_and_tools_as_they_were_given():
    asked = []

    class Sees(Replicas):
        def remote(self, request):
            asked.append(request)
            return super().remote()

    messages = [OutputDeltas(prompt_tokens=1), OutputDeltas([OutputDelta(0, "a", count=1, finish="stop")])]
    client = client_of(Sees(messages), key=None)
    body = {"model": "base", "messages": [ASK, CALLED, ANSWERED], "tools": [TOOL], "parallel_tool_calls": False}
    for choice, tools in (({}, [TOOL]), ({"tool_choice": "auto"}, [TOOL]), ({"tool_choice": "none"}, [])):
        assert client.post("/v1/chat/completions", json={**body, **choice}).status_code == 200
        called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
        assert asked[-1].messages == [ASK, called, {"role": "tool", "tool_call_id": "c1", "content": "21"}]
        assert list(map(json.dumps, asked[-1].tools)) == list(map(json.dumps, tools))  # in the same order too
        assert asked[-1].must_call == ()


def test_a_replica_gets_what_an_answer_must_call():
    asked = []

    class Sees(Replicas):
        def remote(self, request):
            asked.append(request)
            return super().remote()

    form = find_call_format(lambda given: "\n".join(map(tagged, given)), "said")
    parts = [OutputDeltas(prompt_tokens=1, calls=form), OutputDeltas([OutputDelta(0, SAID, finish="stop")])]
    client = client_of(Sees(parts), key=None)
    other = {"type": "function", "function": {"name": "g"}}
    body = {"model": "base", "messages": [ASK], "tools": [TOOL, other]}
    only = {"type": "function", "function": {"name": "g"}}
    for choice, names, one in (
        ({"tool_choice": "required"}, ("f", "g"), False),
        ({"tool_choice": "required", "parallel_tool_calls": False}, ("f", "g"), True),
        ({"tool_choice": only}, ("g",), True),
    ):
        assert client.post("/v1/chat/completions", json={**body, **choice}).status_code == 200
        assert (asked[-1].must_call, asked[-1].one_call, asked[-1].tools) == (names, one, [TOOL, other])


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_can_not_be_read_back_is_an_error(stream):
    """Where a call was asked for, a text in its place would be a wrong answer; a text that was cut says so itself."""
    form = find_call_format(lambda given: "\n".join(map(tagged, given)), "said")
    body = {"model": "base", "messages": [ASK], "tools": [TOOL], "tool_choice": "required", "stream": stream}
    for finish, changes, failed in (("stop", {}, True), ("length", {}, False), ("stop", {"stop": "x"}, False)):
        parts = [OutputDeltas(prompt_tokens=1, calls=form), OutputDeltas([OutputDelta(0, "a", finish=finish)])]
        got = client_of(Replicas(parts), None).post("/v1/chat/completions", json={**body, **changes})
        assert ("can't be read back" in got.text) == failed
        assert got.status_code == (500 if failed and not stream else 200)


SAID = 'I look.\n<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'
TWICE = SAID + SAID.removeprefix("I look.")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "finish", "changes", "content", "calls"),
    [
        (SAID, "stop", {}, "I look.", 1),
        (SAID.removeprefix("I look.\n"), "stop", {}, None, 1),
        (TWICE, "stop", {}, "I look.", 2),
        (TWICE, "stop", {"parallel_tool_calls": False}, "I look.", 1),
        (SAID, "length", {}, "I look.", 1),  # there was more to say
        (SAID.removesuffix("}\n</tool_call>"), "length", {}, SAID.removesuffix("}\n</tool_call>"), 0),
        (SAID, "stop", {"tools": None}, SAID, 0),
        (SAID, "stop", {"tool_choice": "none"}, SAID, 0),
        (" It is 3 < 4. ", "stop", {}, " It is 3 < 4. ", 0),
    ],
)
def test_calls_in_an_answer_are_told_from_its_text(text, finish, changes, content, calls, stream):
    form = find_call_format(lambda given: "\n".join(map(tagged, given)), "said") if "tools" not in changes else None
    form = None if changes.get("tool_choice") == "none" else form
    parts = [OutputDelta(0, part, count=1) for part in text] + [OutputDelta(0, finish=finish)]
    client = client_of(Replicas([OutputDeltas(prompt_tokens=1, calls=form), *(OutputDeltas([p]) for p in parts)]), None)
    body = {"model": "base", "messages": [ASK], "tools": [TOOL], "stream": stream, **changes}
    got = client.post("/v1/chat/completions", json={k: v for k, v in body.items() if v is not None})
    if stream:
        events = [json.loads(line.removeprefix("data: ")) for line in got.text.split("\n\n") if line.endswith("}")]
        deltas = [event["choices"][0]["delta"] for event in events]
        assert deltas[0]["role"] == "assistant"
        said = "".join(delta.get("content") or "" for delta in deltas) or None
        made = [call for delta in deltas for call in delta.get("tool_calls", [])]
        assert [call.pop("index") for call in made] == list(range(calls))
        (ended,) = {event["choices"][0]["finish_reason"] for event in events} - {None}
    else:
        (choice,) = got.json()["choices"]
        said, made = choice["message"]["content"], choice["message"].get("tool_calls", [])
        ended = choice["finish_reason"]
    assert said == content
    assert [call["function"] for call in made] == [{"name": "f", "arguments": '{"a": "é"}'}] * calls
    assert all(call["type"] == "function" and re.fullmatch("[0-9a-f]{9}", call["id"]) for call in made)
    assert ended == ("tool_calls" if calls and finish == "stop" else finish)


def tagged(call):
    return f"<tool_call>\n{json.dumps({'name': call['name'], 'arguments': call['arguments']})}\n</tool_call>"


def test_a_character_of_several_tokens_has_their_bytes_and_one_place():
    euro = [TokenLogprob(b"a", -0.5, [(b"a", -0.5), (b"\xe2", -1.0)])]
    euro += [TokenLogprob(data, -0.5, [(data, -0.5)]) for data in (b"\xe2\x82", b"\xac", b" b")]
    messages = [OutputDeltas(prompt_tokens=1), OutputDeltas([OutputDelta(0, "a€ b", euro, 4, "stop")])]
    client = client_of(Replicas(messages), key=None)
    chat = {"model": "base", "messages": [ASK], "logprobs": True, "top_logprobs": 2}
    (choice,) = client.post("/v1/chat/completions", json=chat).json()["choices"]
    entries = choice["logprobs"]["content"]
    assert [(entry["token"], entry["bytes"]) for entry in entries] == [
        ("a", [97]),
        ("\\xe2\\x82", [0xE2, 0x82]),
        ("\\xac", [0xAC]),
        (" b", [32, 98]),
    ]
    assert [top["bytes"] for top in entries[0]["top_logprobs"]] == [[97], [0xE2]]
    plain = {"model": "base", "prompt": "p", "logprobs": 2}
    (choice,) = client.post("/v1/completions", json=plain).json()["choices"]
    assert choice["logprobs"]["tokens"] == ["a", "\\xe2\\x82", "\\xac", " b"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 2]
    assert choice["logprobs"]["top_logprobs"][0] == {"a": -0.5, "\\xe2": -1.0}
