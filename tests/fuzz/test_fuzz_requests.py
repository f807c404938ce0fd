"""Whatever a client sends to any route: an answer or an error of a few lines, and the next good request is answered."""

import asyncio
import json
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient
from helpers.routes import ROUTES
from hypothesis import strategies as st

from ftray.adapters.lora_init import save
from ftray.adapters.methods import attach
from ftray.config import AdapterConfig, Config, ModelConfig, ServingConfig
from ftray.models.load import load_base
from ftray.serving.api.app import create_app
from ftray.serving.api.endpoint import Endpoint, current_endpoint
from ftray.serving.pooling import PoolingReplica
from ftray.serving.replica import Replica
from ftray.task_spec import CAUSAL, TaskSpec
from fuzz.values import RAW, TEXTS, VALUES, fuzz

pytestmark = pytest.mark.slow
FP32 = ModelConfig(dtype="fp32")
SPECS = {
    "CAUSAL_LM": CAUSAL,
    "SEQ_CLS": TaskSpec("SEQ_CLS", ("a", "b"), 1),
    "TOKEN_CLS": TaskSpec("TOKEN_CLS", ("a", "b"), 1),
    "FEATURE_EXTRACTION": TaskSpec("FEATURE_EXTRACTION", (), 1),
}
GOOD = {
    "CAUSAL_LM": ("completions", {"prompt": "the cat", "max_tokens": 4, "temperature": 0}),
    "SEQ_CLS": ("classify", {"input": "the cat"}),
    "TOKEN_CLS": ("classify", {"input": "the cat"}),
    "FEATURE_EXTRACTION": ("embeddings", {"input": "the cat"}),
}


class OneProcess:
    """Of a replica of Serve: adapters are loaded without Serve, which would want a process of its own."""

    async def loaded(self, adapter, source):
        if adapter not in self.models:
            self.models[adapter] = await self._load(source)
        return self.models[adapter].model


class Generates(OneProcess, Replica):
    models = None


class Pools(OneProcess, PoolingReplica):
    models = None

    def __init__(self, *args):
        super().__init__(*args)
        self._batched = self.unbatched

    async def unbatched(self, request):
        return (await self._pool_all([request]))[0]


class Answer:
    """An answer of a replica, as Serve's handle gives it."""

    def __init__(self, messages):
        self.messages = messages

    def __aiter__(self):
        return self.messages

    def cancel(self):
        self.closing = asyncio.ensure_future(self.messages.aclose())


class Remote:
    """A handle of one replica in this process."""

    def __init__(self, replica):
        self.replica, self.generate, self.pool, self.load = replica, self, self, self

    def options(self, stream=False, **kwargs):
        return self

    def remote(self, *args):
        if len(args) == 2:
            return self.replica.load(*args)
        if isinstance(self.replica, Replica):
            return Answer(self.replica.generate(*args))
        return self.replica.pool(*args)

    def broadcast(self, name, *args):
        return self

    async def results_async(self, **kwargs):
        return []


@pytest.fixture(scope="module")
def clients(tmp_path_factory, tiny_llama, tiny_bert):
    """A client of an endpoint of each task, each with a base, an adapter, and a directory to add others from."""
    made = {}
    for task, spec in SPECS.items():
        path = tiny_llama if task == "CAUSAL_LM" else tiny_bert
        directory = tmp_path_factory.mktemp(task)
        save(attach(load_base(FP32, path, spec), AdapterConfig(method="lora"), 1, 0), spec, directory)
        spec.save(directory)
        serving = ServingConfig(adapter_sources=[str(directory)], max_prompt_tokens=64, max_output_tokens=64)
        settings = Config(model=FP32, serving=serving).model_dump()
        replica = Generates(settings, path, 1) if task == "CAUSAL_LM" else Pools(settings, path, 1, spec)
        replica.models = {}
        endpoint = Endpoint(settings, "base", {"tuned": str(directory)}, Remote(replica), task)
        made[task] = client_of(endpoint).__enter__()  # one event loop for all its requests
        made[task].source = str(directory)
    yield made
    for client in made.values():
        client.__exit__(None, None, None)


def client_of(endpoint: Endpoint) -> TestClient:
    app = create_app(None, 10_000)
    app.dependency_overrides[current_endpoint] = lambda: endpoint
    return TestClient(app, raise_server_exceptions=False)


def good_answer(client: TestClient, task: str) -> object:
    route, body = GOOD[task]
    got = client.post(f"/v1/{route}", json={"model": "tuned", **body})
    assert got.status_code == 200, got.text
    return got.json()["choices" if task == "CAUSAL_LM" else "data"]


TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": TEXTS | VALUES}),
    max_size=3,
)
TOKENS = st.lists(st.integers(-2, 400), max_size=5) | st.lists(st.lists(st.integers(0, 383), max_size=4), max_size=3)
INPUTS = TEXTS | st.lists(TEXTS, max_size=4) | TOKENS | VALUES
FIELDS = {
    "prompt": INPUTS,
    "messages": TURNS | VALUES,
    "input": INPUTS,
    "pair": INPUTS,
    "max_tokens": st.sampled_from([0, 1, 3, 63, 64, 65, 2**31, -1]) | VALUES,
    "max_completion_tokens": st.sampled_from([0, 1, 64]) | VALUES,
    "temperature": st.sampled_from([0, 1e-40, 1e-5, 1, 2, 2.1, -0.0]) | VALUES,
    "top_p": st.sampled_from([0, 1e-40, 0.5, 1]) | VALUES,
    "n": st.sampled_from([0, 1, 2, 16]) | VALUES,
    "seed": st.sampled_from([0, -(2**63), 2**63 - 1, 2**63]) | VALUES,
    "stop": st.lists(TEXTS, max_size=5) | VALUES,
    "stream": st.booleans() | VALUES,
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans() | VALUES}) | VALUES,
    "logprobs": st.booleans() | st.integers(-1, 21) | VALUES,
    "top_logprobs": st.integers(-1, 21) | VALUES,
    "echo": st.booleans() | VALUES,
    "user": TEXTS | VALUES,
    "encoding_format": st.sampled_from(["float", "base64"]) | VALUES,
    "tools": st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": VALUES}), max_size=2) | VALUES,
    "tool_choice": st.sampled_from(["auto", "none", "required"]) | VALUES,
    "parallel_tool_calls": st.booleans() | VALUES,
    "name": st.sampled_from(["base", "tuned", "new", "a/b"]) | TEXTS,
    "source": TEXTS | VALUES,
}
BODIES = st.one_of(
    st.just({"prompt": "a", "max_tokens": 2}),
    st.just({"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}),
    st.just({"input": "a b"}),
    st.just({"input": ["a", "b c"]}),
    st.just({}),
)


def check_answer(got) -> None:
    """The shape of whatever came."""
    if got.status_code != 200:
        assert got.status_code < 500, got.text
        assert set(got.json()["error"]) == {"message", "type", "param", "code"}
    elif got.headers["content-type"].startswith("text/event-stream"):
        lines = [line for line in got.text.splitlines() if line]
        assert lines[-1] == "data: [DONE]", got.text
        assert all(json.loads(line.removeprefix("data: "))["object"] for line in lines[:-1])
    elif got.headers["content-type"].startswith("application/json"):
        json.loads(got.text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON: {got.text}"))


def test_requests(clients):
    wanted = {task: good_answer(client, task) for task, client in clients.items()}

    def check(task, route, name, model, body, changes, raw, content_type, query):
        client, (method, path) = clients[task], route
        named = quote(name, safe="", errors="surrogatepass")
        values = {"model": model, "source": client.source, **body, **changes}
        if not path.endswith("/adapters"):
            values.pop("source", None)
        content = raw if raw is not None else json.dumps(values).encode()
        if (method, path, name) == ("DELETE", "/v1/adapters/{name}", "tuned"):
            return  # it is asked next
        where = path.replace("{name}", named) + (f"?{quote(query, errors='surrogatepass')}" if query else "")
        got = client.request(method, where, content=content, headers={"content-type": content_type})
        check_answer(got)
        assert good_answer(client, task) == wanted[task]

    fuzz(
        check,
        task=st.sampled_from([*SPECS]),
        route=st.sampled_from(ROUTES),
        name=st.sampled_from(["base", "tuned", "new"]) | TEXTS,
        model=st.sampled_from(["tuned", "tuned", "base", "new"]) | TEXTS | VALUES,
        body=BODIES,
        changes=st.fixed_dictionaries({}, optional=FIELDS)
        | st.dictionaries(st.sampled_from([*FIELDS]) | TEXTS, VALUES),
        raw=st.none() | st.none() | st.none() | RAW,
        content_type=st.sampled_from(["application/json", "text/plain", "multipart/form-data", ""]),
        query=st.just("") | TEXTS,
    )
