"""Whatever a user gives: it is taken, or refused in one line. `make fuzz` looks for what is neither for five minutes.

What was found stands as a plain test beside the code that it is about.
"""

import json
import os
import time
from pathlib import Path

import pytest
import yaml
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_serving_api import Replicas

from ftray.cli import COMMANDS, fields, parse, run_command
from ftray.config import Config, config_from
from ftray.data.splits import DataCheck
from ftray.errors import UserError
from ftray.infer import Renderer, read_records
from ftray.models.load import load_tokenizer
from ftray.search.space import load_space
from ftray.serving.api.app import create_app
from ftray.serving.api.endpoint import Endpoint, current_endpoint
from ftray.serving.generation_request import OutputDelta, OutputDeltas
from ftray.task_spec import TASKS
from ftray.tasks.infer_task import infer_task

pytestmark = pytest.mark.slow
SECONDS = float(os.environ.get("FUZZ_SECONDS", "30"))
PARTS = 6  # tests that share them

ODD = [
    "",
    " ",
    "\u2028",
    "\x85",
    "\f",
    "\ufeff",
    "\x00",
    "\ud83d",
    "a\nb",
    "é",
    "e\u0301",
    "\U0001f600",
    "~",
    "{prompt}",
    "off",
]
TEXTS = st.sampled_from(ODD) | st.text(max_size=20)
NUMBERS = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([0, 1, -1, 0.5, 1e-40, 1e308, True, False])
VALUES = st.recursive(
    TEXTS | NUMBERS | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    *("input", "output", "instruction", "prompt", "completion", "messages", "conversations", "text", "label"),
    *("system", "history", "tokens", "tags", "question", "context", "answers", "is_impossible", "anchor", "positive"),
    *("negative", "sentence1", "sentence2", "score", "text_pair", "weight", "mask", "tools", "images", "chosen"),
]
TURNS = st.lists(
    st.fixed_dictionaries({}, optional=dict.fromkeys(("role", "content", "from", "value", "weight"), TEXTS | VALUES))
    | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": TEXTS}),
    max_size=4,
)
RECORDS = st.one_of(
    st.fixed_dictionaries({"input": TEXTS, "output": TEXTS}),
    st.fixed_dictionaries({"prompt": TEXTS, "completion": TEXTS | VALUES}),
    st.fixed_dictionaries({"messages": TURNS | VALUES}, optional={"system": TEXTS, "tools": VALUES}),
    st.fixed_dictionaries({"conversations": TURNS | VALUES}),
    st.fixed_dictionaries({"text": TEXTS}, optional={"label": TEXTS | VALUES, "text_pair": TEXTS | VALUES}),
    st.fixed_dictionaries(
        {"tokens": st.lists(TEXTS, max_size=3) | VALUES, "tags": st.lists(TEXTS, max_size=3) | VALUES}
    ),
    st.fixed_dictionaries({"question": TEXTS, "context": TEXTS, "answers": VALUES | st.lists(TEXTS, max_size=2)}),
    st.fixed_dictionaries({"anchor": TEXTS, "positive": TEXTS | VALUES}, optional={"negative": TEXTS | VALUES}),
    st.fixed_dictionaries({"sentence1": TEXTS, "sentence2": TEXTS, "score": NUMBERS | VALUES}),
    st.dictionaries(st.sampled_from(KEYS) | TEXTS, VALUES, max_size=5),
)


def fuzz(check, **strategies) -> None:
    """Call `check` with ever new values until its share of the time is over."""
    end = time.monotonic() + SECONDS / PARTS
    some = settings(max_examples=50, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    while time.monotonic() < end:
        some(given(**strategies)(check))()


def refused(error: UserError, *names: str) -> None:
    """That a refusal is one line that can be printed, and names one of `names`."""
    said = str(error)
    said.encode()
    assert len(said.splitlines()) == 1, ascii(said)
    assert not names or any(name in said for name in names), said


def test_records(tmp_path, tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    unsplit = {"validation_fraction": 0, "test_fraction": 0}  # equal records share a split: the others may be empty

    def check(records, times, task, raw):
        path = tmp_path / "records.jsonl"
        lines = [json.dumps(record) for record in records] * times
        path.write_bytes(b"\n".join([line.encode() for line in lines] + raw))
        cfg = config_from({"data": {"source": str(path), "max_length": 64, **unsplit}, "task": task})
        try:
            data = DataCheck(cfg.data)
            task = infer_task(cfg, tiny_llama, data.first).task
            data.run(tokenizer, task)
        except UserError as error:
            refused(error, "records.jsonl", "task", "data.", "QUESTION_ANS")

    raw = st.just([]) | st.lists(
        st.binary(max_size=30) | TEXTS.map(lambda t: t.encode(errors="surrogatepass")), max_size=2
    )
    tasks = st.sampled_from(["auto", *TASKS])
    fuzz(check, records=st.lists(RECORDS, min_size=1, max_size=6), times=st.sampled_from([1, 12]), task=tasks, raw=raw)


def test_prompts(tmp_path, tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)

    def check(records, raw, suffix, chat, system):
        path = tmp_path / f"prompts{suffix}"
        path.write_bytes(b"\n".join([json.dumps(record).encode() for record in records] + raw))
        try:
            renderer = Renderer(tokenizer, Config().data, system)
            for where, record in read_records(str(path)):
                assert all(isinstance(token, int) for token in renderer.record(where, record, chat))
        except UserError as error:
            refused(error, "prompts")

    raw = st.lists(st.binary(max_size=30) | TEXTS.map(lambda text: text.encode(errors="surrogatepass")), max_size=2)
    suffixes = st.sampled_from([".jsonl", ".txt"])
    fuzz(
        check,
        records=st.lists(RECORDS, max_size=3),
        raw=raw,
        suffix=suffixes,
        chat=st.booleans(),
        system=st.none() | TEXTS,
    )


def test_configurations(tmp_path):
    names = sorted(fields())

    def check(command, values, flags, raw):
        path, nested = tmp_path / "config.yaml", {}
        for name, value in values.items():
            section, _, key = name.partition(".")
            if key:
                nested.setdefault(section, {})
                if isinstance(nested[section], dict):
                    nested[section][key] = value
            else:
                nested[section] = value
        path.write_bytes(yaml.safe_dump(nested).encode(errors="surrogatepass") + raw)
        for arguments in (["--config", str(path)], [f"--{name}={text}" for name, text in flags.items()]):
            try:
                parse(command, arguments)
            except UserError as error:
                refused(error)

    named = st.sampled_from(names) | TEXTS
    raw = st.just(b"") | st.binary(max_size=40) | st.text("[]{}:,&*!|>'\"- \n\tab0~", max_size=20).map(str.encode)
    texts = TEXTS.filter(lambda text: "\0" not in text) | st.text("[]{}:,&*!|>'\"- \n\tab0~", max_size=20)
    flags = st.dictionaries(st.sampled_from(names), texts, max_size=3)
    fuzz(
        check,
        command=st.sampled_from(sorted(COMMANDS)),
        values=st.dictionaries(named, VALUES, max_size=4),
        flags=flags,
        raw=raw,
    )


def test_commands(tmp_path, monkeypatch, capsys, tiny_llama, words):
    """From a command line to its exit code, as far as a command goes without Ray."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ftray.runtime.cluster.check_address", stop_here)
    monkeypatch.setattr("ftray.runtime.cluster.connect", stop_here)
    readable = [name for name in sorted(fields()) if name not in ("verbose", "resume", "plan", "output", "data.cache")]

    def check(command, flags):
        given = {"data.source": words, "model.name": tiny_llama, "output": "out"} | flags
        if command == "preprocess":
            given.pop("output")
        before = sorted(Path().rglob("*"))
        code = run_command(command, [f"--{name}={text}" for name, text in given.items()])
        shown = capsys.readouterr()
        assert code == 2, shown
        assert len(shown.err.splitlines()) == 1, shown.err
        assert sorted(Path().rglob("*")) == before

    texts = TEXTS.filter(lambda text: "\0" not in text) | NUMBERS.map(str)
    fuzz(
        check,
        command=st.sampled_from(["preprocess", "train", "tune"]),
        flags=st.dictionaries(st.sampled_from(readable), texts, min_size=1, max_size=2),
    )


def stop_here(cfg) -> None:
    raise UserError("would start")


def test_spaces(tmp_path):
    def check(content, raw):
        path = tmp_path / "space.yaml"
        path.write_bytes(yaml.safe_dump(content).encode(errors="surrogatepass") + raw)
        try:
            load_space(str(path)).corners()
        except UserError as error:
            refused(error, "space")

    kinds = st.dictionaries(
        st.sampled_from(["choice", "float", "log", "int", "times", "step"]) | TEXTS, VALUES, max_size=3
    )
    keys = st.sampled_from(["learning_rate", "batch_size", "lora", "ia3", "model", "steps"]) | TEXTS
    own = st.dictionaries(
        st.sampled_from(["rank", "alpha", "dropout", "target_modules"]) | TEXTS, kinds | VALUES, max_size=3
    )
    methods = st.sampled_from(["lora", ["lora", "ia3"]]) | VALUES
    spaces = st.builds(
        lambda m, rest: {**rest, "method": m}, methods, st.dictionaries(keys, kinds | own | VALUES, max_size=3)
    )
    fuzz(check, content=spaces | VALUES, raw=st.just(b"") | st.binary(max_size=10))


ROUTES = ["completions", "chat/completions", "embeddings", "classify", "adapters", "models/x", "run", "nothing"]
BODIES = [
    {"model": "base", "prompt": "a"},
    {"model": "base", "messages": [{"role": "user", "content": "a"}]},
    {"model": "base", "input": "a"},
    {"name": "a", "source": "/tmp"},
]
NAMES = [
    *(
        "model",
        "prompt",
        "messages",
        "input",
        "pair",
        "name",
        "source",
        "max_tokens",
        "temperature",
        "top_p",
        "n",
        "seed",
    ),
    *(
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "stop",
        "stream",
        "stream_options",
        "logprobs",
        "top_logprobs",
        "echo",
        "user",
        "encoding_format",
    ),
]


def test_requests(tmp_path):
    messages = [
        OutputDeltas(begun=True),
        OutputDeltas(prompt_tokens=1),
        OutputDeltas([OutputDelta(0, "b", count=1, finish="stop")]),
    ]

    def check(method, route, body, changes, raw):
        app = create_app(None, 10_000)
        endpoint = Endpoint(
            {"serving": {"adapter_sources": [str(tmp_path)]}}, "base", {}, Replicas(messages), "CAUSAL_LM"
        )
        app.dependency_overrides[current_endpoint] = lambda: endpoint
        client = TestClient(app, raise_server_exceptions=False)
        content = raw if raw is not None else json.dumps({**body, **changes}).encode()
        got = client.request(method, f"/v1/{route}", content=content)
        if got.status_code != 200:
            assert got.status_code < 500 or got.json()["error"]["code"] == "replica_died", (content, got.text)
            assert set(got.json()["error"]) == {"message", "type", "param", "code"}
        good = client.post("/v1/completions", json={"model": "base", "prompt": "a"})
        assert good.json()["choices"][0]["text"] == "b", good.text

    fuzz(
        check,
        method=st.sampled_from(["POST", "POST", "POST", "GET", "DELETE"]),
        route=st.sampled_from(ROUTES),
        body=st.sampled_from(BODIES),
        changes=st.dictionaries(st.sampled_from(NAMES) | TEXTS, VALUES, max_size=3),
        raw=st.none() | st.binary(max_size=30),
    )
