"""Every route of the application by itself: its key, the limit of its body, the shape of its errors."""

import hashlib
from collections.abc import Iterator

import pytest
from fastapi import APIRouter
from fastapi.testclient import TestClient
from helpers.routes import ROUTES
from ray.exceptions import ActorDiedError

from ftray.serving.api.app import create_app
from ftray.serving.api.endpoint import Endpoint, current_endpoint
from ftray.serving.generation_request import OutputDelta, OutputDeltas

KEY = "correct horse battery"
OPEN = {("GET", "/"), ("GET", "/health")}
LIMIT = 1000


class Replicas:
    """A handle whose answers are `messages`."""

    def __init__(self, messages=()):
        self.messages, self.generate, self.load, self.pool = messages, self, self, self

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


def test_errors_have_one_shape(tmp_path):
    headers = {"Authorization": f"Bearer {KEY}"}
    adapter = {"name": "a", "source": str(tmp_path)}
    cases = [
        (client_of().get("/nothing", headers=headers), 404, None),
        (client_of().put("/v1/models", headers=headers), 405, None),
        (
            client_of(adapter_sources=[str(tmp_path)]).post("/v1/adapters", headers=headers, json=adapter),
            503,
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
