"""Calls of tools: read back from what chat templates of many kinds write, whole and as it grows."""

import copy
import json

import pytest
from helpers.call_templates import CALLS, EACH, OFFERED, TOKENIZERS, template, tokenizer_with
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftray.data.chat import chat_template
from ftray.data.records import parse
from ftray.data.tool_calls import CallReader


def written(name, calls, content=None):
    """The assistant's turn as it is trained: what stands after the prompt, without what ends it."""
    messages = [
        {"role": "user", "content": "?"},
        {
            "role": "assistant",
            "content": content,
            "tool_calls": [
                {"id": f"call0000{i}", "type": "function", "function": {"name": f, "arguments": json.dumps(arguments)}}
                for i, (f, arguments) in enumerate(calls)
            ],
        },
    ]
    example = parse({"messages": messages, "tools": OFFERED}, "here")
    (answer,) = chat_template(TOKENIZERS[name]).answers(example, "all")
    return answer.text.removesuffix("\n").removesuffix("<|end|>")


def read(name, text, sizes=(10**6,)):
    """What is read of a text that comes in pieces of these sizes."""
    reader = CallReader(chat_template(TOKENIZERS[name]).call_format, OFFERED)
    said, at = "", 0
    while at < len(text):
        size = sizes[at % len(sizes)]
        said, at = said + reader.add(text[at : at + size]), at + size
    rest, calls = reader.end()
    return said + rest, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(calls=CALLS, sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_calls_are_read_back_as_they_are_trained(name, calls, sizes):
    calls = calls[:1] if name == "an object alone" else calls
    text = written(name, calls)
    assert read(name, text) == ("", calls)
    assert read(name, text, sizes) == ("", calls)


@pytest.mark.parametrize("name", sorted(set(TOKENIZERS) - {"an object alone", "a list without a word"}))
def test_what_is_said_before_a_call_is_text(name):
    calls = [("get_weather", {"city": "Rome"})]
    text = written(name, calls, "I look < it [up")
    assert text.startswith("I look < it [up")
    for sizes in ((10**6,), (1,), (3,)):
        assert read(name, text, sizes) == ("I look < it [up", calls)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        " It is {sunny}. \n",
        '{"name": "nobody", "parameters": {}, "arguments": {}}',
        '{"city": "Rome"}',
        '[{"name": "f"}]',
        "[1, 2]",
        "<tool_call>",
        '<tool_call>\n{"name": "f", "arguments": {}',
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call> and more',
        '<tool_call>\n{"name": "f", "arguments": {"a": NaN}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": "\\ud83d"}}\n</tool_call>',
        '<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>',
        "[TOOL_CALLS] [" + "[" * 100_000,
        "[TOOL_CALLS]f[ARGS]3",
        "<calls><call>function<sep>f",
        "<tool_call>\n<function=f>\n<parameter=city>\nRome",
    ],
)
def test_what_is_no_call_stays_text(name, text):
    for sizes in ((10**6,), (1,)) if len(text) < 1000 else ((10**6,),):
        assert read(name, text, sizes) == (text, [])


def test_a_call_ends_where_generation_was_ended():
    for missing in ("</tool_call>", "\n</tool_call>", "tool_call>"):
        text = written("chatml", [("f", {"days": 3})]).removesuffix(missing)
        assert read("chatml", text) == ("", [("f", {"days": 3})])


def test_ids_that_a_model_writes_are_kept():
    for name in ("a list after a word", "a name, its id, then an object"):
        reader = CallReader(chat_template(TOKENIZERS[name]).call_format, OFFERED)
        assert reader.add(written(name, [("f", {}), ("f", {"days": 1})])) == ""
        assert [call.id for call in reader.end()[1]] == ["call00000", "call00001"]


def test_values_without_a_type_are_text():
    name = "key by key, in tags of two"
    tools = copy.deepcopy(OFFERED)
    del tools[1]["function"]["parameters"]
    reader = CallReader(chat_template(TOKENIZERS[name]).call_format, tools)
    reader.add(written(name, [("f", {"days": 1, "city": "2"})]))
    assert [json.loads(call.arguments) for call in reader.end()[1]] == [{"days": "1", "city": "2"}]


@pytest.mark.parametrize(
    "calls",
    [
        EACH + "{{ f.name }}({{ f.arguments.items() | list }}){% endfor %}",  # as Python
        EACH + "{{ f.name }} {{ f.arguments | tojson }}{% endfor %}",  # any text might be one
        EACH + "<call>{{ f.name | upper }}: {{ f.arguments | tojson }}</call>{% endfor %}",
        "",
    ],
)
def test_a_form_that_can_not_be_read_back_is_not_known(calls):
    assert chat_template(tokenizer_with(template(calls))).call_format is None
