"""Calls that a request asks for, of models that have learnt none: by OpenAI's client, from the real application."""

import json
import re

import jsonschema
import openai
import pytest
from conftest import llama, make_tokenizer
from helpers.call_templates import EACH, TEMPLATES, template
from helpers.servers import serving_here
from peft import LoraConfig, get_peft_model

from ftray.task_spec import TaskSpec

pytestmark = pytest.mark.usefixtures("cluster")

NAMED = template(EACH + "<call>{{ f.name | upper }}: {{ f.arguments | tojson }}</call>{% endfor %}")
WRITES = {
    "objects": TEMPLATES["objects between tags"],
    "names": TEMPLATES["a name, its id, then an object"],
    "tags": TEMPLATES["key by key, in tags of two"],
    "unknown": NAMED,
    "plain": None,  # the base's own, without a place for tools
}
FUNCTIONS = {
    "book": {
        "type": "object",
        "properties": {"seats": {"type": "integer", "minimum": 1, "maximum": 4}, "class": {"enum": ["a", "b"]}},
        "required": ["seats", "class"],
        "additionalProperties": False,
    },
    "idle": {"type": "object", "properties": {}, "additionalProperties": False},
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in FUNCTIONS.items()]
ONE = {"type": "function", "function": {"name": "book"}}
ASK = {"messages": [{"role": "user", "content": "the cat"}], "tools": TOOLS, "max_tokens": 600}  # blanks are tokens


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    directory = tmp_path_factory.mktemp("calls")
    base = llama(max_position_embeddings=2048)
    base.save_pretrained(directory / "base")
    make_tokenizer().save_pretrained(directory / "base")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    for name, written in WRITES.items():
        model.save_pretrained(directory / name)
        if written:
            TaskSpec(template="chat", chat_template=written).save(directory / name)
    with serving_here() as begin:
        url = begin("--model", f"{directory}/base", *(f"--adapter={name}={directory}/{name}" for name in WRITES))
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def choices_of(client, stream, **asked):
    """Of each choice: text, calls and why it ends."""
    got = client.chat.completions.create(stream=stream, **asked)
    if not stream:
        return [(one.message.content, one.message.tool_calls or [], one.finish_reason) for one in got.choices]
    found = {}
    for part in (part for event in got for part in event.choices):
        text, calls, _ = found.get(part.index, (None, [], None))
        text = (text or "") + part.delta.content if part.delta.content else text
        found[part.index] = text, calls + (part.delta.tool_calls or []), part.finish_reason
    return [found[index] for index in sorted(found)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["objects", "names", "tags"])
def test_a_call_comes_where_one_is_asked_for(client, model, stream):
    for more, wanted in (
        ({"tool_choice": ONE, "temperature": 0}, {"book"}),
        ({"tool_choice": ONE, "temperature": 1, "seed": 1, "n": 2}, {"book"}),
        ({"tool_choice": "required", "parallel_tool_calls": False, "temperature": 1, "seed": 2}, {"book", "idle"}),
    ):
        choices = choices_of(client, stream, model=model, **ASK, **more)
        assert len(choices) == more.get("n", 1)
        for text, (call,), finish in choices:
            assert (text, finish, call.type) == (None, "tool_calls", "function")
            assert call.function.name in wanted
            jsonschema.validate(json.loads(call.function.arguments), FUNCTIONS[call.function.name])


def test_several_calls_come_where_they_may(client):
    counts = set()
    for seed in range(6):
        asked = {"tool_choice": "required", "temperature": 1.5, "seed": seed}
        ((text, calls, finish),) = choices_of(client, False, model="names", **ASK | asked)
        if finish == "length":  # cut, which it says
            continue
        assert (text, finish) == (None, "tool_calls")
        counts.add(len(calls))
        for call in calls:
            jsonschema.validate(json.loads(call.function.arguments), FUNCTIONS[call.function.name])
    assert max(counts) > 1


def test_a_call_that_is_cut_is_text_and_says_so(client):
    ((text, calls, finish),) = choices_of(
        client, False, model="objects", **ASK | {"tool_choice": ONE, "max_tokens": 12}
    )
    assert (calls, finish) == ([], "length")
    assert text.strip().startswith("<tool_call>")


def test_without_a_choice_the_model_decides(client):
    ((text, calls, finish),) = choices_of(client, False, model="objects", **ASK | {"max_tokens": 5}, temperature=0)
    assert (calls, finish) == ([], "length")
    assert text


@pytest.mark.parametrize(
    ("model", "changes", "param", "reason"),
    [
        ("unknown", {}, "tool_choice", "form that is not known"),
        ("plain", {}, "tools", "no place for tools"),
        ("objects", {"tools": []}, "tool_choice", "no tools to call"),
        ("objects", {"parameters": {"properties": {"a": {"not": {}}}}}, "tools", "tools: f: Unimplemented keys"),
        ("tags", {"parameters": {"properties": {"a": {"maxLength": 2}}}}, "tools", "tools: f.a: .* to maxLength"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_can_not_be_had_is_refused_in_a_line(client, model, changes, param, reason, stream):
    asked = {**ASK, "tool_choice": "required", "stream": stream, **changes}
    if parameters := asked.pop("parameters", None):
        asked["tools"] = [*TOOLS, {"type": "function", "function": {"name": "f", "parameters": parameters}}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=model, **asked)
    assert refused.value.param == param
    assert re.search(reason, refused.value.body["message"])
    assert "\n" not in refused.value.body["message"]
