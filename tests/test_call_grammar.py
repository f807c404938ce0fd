"""Answers that are held to be calls: what templates write fits the grammar, what fits is read back and conforms."""

import json
import random
import re

import jsonschema
import numpy as np
import pytest
from helpers.call_templates import CALLS, KINDS, OFFERED, TOKENIZERS, tokenizer_with
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftray.data.chat import chat_template
from ftray.data.records import parse
from ftray.data.tool_calls import CallReader
from ftray.serving.logits import Grammars

END = 0  # the token that ends an answer

# of letters that are tokens of their own in the models that write so
for name, tokens in {
    "objects between tags": ["<tool_call>", "</tool_call>"],
    "a list after a word": ["[TOOL_CALLS]"],
    "key by key, in tags of two": [
        "<tool_call>",
        "</tool_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
    ],
}.items():
    tokenizer = tokenizer_with(TOKENIZERS[name].chat_template)
    tokenizer.add_tokens(tokens, special_tokens=name == "a list after a word")
    TOKENIZERS[f"{name}, as tokens"] = tokenizer
GRAMMARS = {name: Grammars(tokenizer, len(tokenizer) + 3) for name, tokenizer in TOKENIZERS.items()}


def form_of(name):
    return chat_template(TOKENIZERS[name]).call_format


def matcher(name, functions, one=False):
    return GRAMMARS[name].of_calls(form_of(name), functions, one, frozenset({END}))


def read(name, text, functions):
    reader = CallReader(form_of(name), [{"type": "function", "function": function} for function in functions])
    assert not reader.add(text).strip()
    rest, calls = reader.end()
    assert not rest.strip()
    return [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(calls=CALLS)
def test_what_a_template_writes_fits(name, calls):
    """Token by token as a model learns it, with the end after a call and not before."""
    calls = calls[:1] if name == "an object alone" else calls
    calls = [(function, {key: arguments[key] for key in KINDS if key in arguments}) for function, arguments in calls]
    turn = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": f"call0000{i}", "type": "function", "function": {"name": f, "arguments": json.dumps(arguments)}}
            for i, (f, arguments) in enumerate(calls)
        ],
    }
    example = parse({"messages": [{"role": "user", "content": "?"}, turn], "tools": OFFERED}, "here")
    tokenizer = TOKENIZERS[name]
    (answer,) = chat_template(tokenizer).answers(example, "all")
    ids = tokenizer(answer.text.removesuffix("\n").removesuffix("<|end|>"))["input_ids"]
    follows = matcher(name, [tool["function"] for tool in OFFERED])
    for at, token in enumerate(ids):
        assert len(calls) > 1 or not follows.is_accepting(), tokenizer.decode(ids[:at])
        assert follows.consume_token(token), tokenizer.decode(ids[: at + 1])
    assert follows.is_accepting()


STRICT = {
    "name": "book",
    "parameters": {
        "type": "object",
        "properties": {
            "from": {"type": "string", "enum": ["Ósló", "", "</arg_value>\n</parameter"]},
            "sitzplätze": {"type": "integer", "minimum": 1, "maximum": 12},
            "class": {"$ref": "#/$defs/class", "type": "object"},
            "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        },
        "required": ["from", "sitzplätze", "class"],
        "additionalProperties": False,
        "$defs": {
            "class": {
                "properties": {"kind": {"enum": ["first", 2]}},
                "required": ["kind"],
                "additionalProperties": False,
            }
        },
    },
}
SAYS = {
    "name": "say",
    "parameters": {"properties": {"text": {"type": "string"}}, "required": ["text"], "additionalProperties": False},
}
IDLE = {"name": "idle"}


def written_at_random(name, functions, seed, one=False):
    """An answer of tokens that are drawn from those that the grammar allows."""
    draw, follows, tokenizer, ids = random.Random(seed), matcher(name, functions, one), TOKENIZERS[name], []
    ends = [getattr(form_of(name).form, "after_value", '"'), form_of(name).closing]
    while not follows.is_stopped():
        end = tokenizer(draw.choice(ends))["input_ids"]  # or a text would hardly ever end
        if draw.random() < 0.4 and end and follows.validate_tokens(end) == len(end):
            chosen = end
        else:
            bits = np.unpackbits(np.frombuffer(follows.compute_bitmask(), np.uint8), bitorder="little")
            chosen = [draw.choice(np.flatnonzero(bits).tolist())]
        for token in chosen:
            assert follows.consume_token(token)
        ids += chosen
        assert len(ids) < 5000
    return tokenizer.decode([token for token in ids if token != END])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_fits_is_read_back_and_conforms(name):
    functions = {function["name"]: function for function in (STRICT, SAYS, IDLE)}
    counts, seen = set(), set()
    for seed in range(25):
        calls = read(name, written_at_random(name, [*functions.values()], seed), [*functions.values()])
        for called, arguments in calls:
            jsonschema.validate(arguments, functions[called].get("parameters", {"maxProperties": 0}))
        counts.add(len(calls))
        seen |= {called for called, _ in calls}
    assert seen == {"book", "say", "idle"}
    assert 1 in counts
    assert (max(counts) > 1) == (form_of(name).between is not None)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_one_call_where_one_is_asked_for(name):
    for seed in range(5):
        ((called, arguments),) = read(name, written_at_random(name, [IDLE], seed, one=True), [IDLE])
        assert (called, arguments) == ("idle", {})


@pytest.mark.parametrize(
    ("name", "parameters", "reason"),
    [
        ("objects between tags", {"properties": {"a": {"not": {"const": 1}}}}, 'f: Unimplemented keys: ..not"]'),
        ("objects between tags", {"type": "string"}, "f: the parameters must be a schema of an object, not of string"),
        ("a name, then an object", {"properties": {"a": {"type": "nonsense"}}}, "f: Invalid type: nonsense"),
        ("key by key, in tags with names", {"anyOf": [{}]}, "f: .* key by key, which can't be held to anyOf"),
        ("key by key, in tags of two", {"properties": {"a": {"type": "string", "pattern": "b"}}}, "f.a: .* to pattern"),
        ("key by key, in tags of two", {"properties": {"a": {"$ref": "#/$defs/b"}}}, "f.a: .* to [$]ref"),
        ("key by key, in tags of two", {"properties": [1]}, "f: properties must be an object"),
        ("key by key, in tags of two", {"properties": {"a": 1}}, "f.a: must be a schema"),
        ("an object alone", {"properties": [1]}, "f: "),
        ("key by key, in tags of two", {"properties": {"a": {"enum": [1]}}}, "f.a: none of its values is a text"),
    ],
)
def test_what_arguments_can_not_be_held_to_is_named(name, parameters, reason):
    with pytest.raises(ValueError, match=reason) as refused:
        matcher(name, [SAYS, {"name": "f", "parameters": parameters}])
    assert "\n" not in str(refused.value)


SCHEMA_WORDS = [
    "type",
    "properties",
    "required",
    "enum",
    "const",
    "items",
    "$ref",
    "$defs",
    "anyOf",
    "additionalProperties",
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2) | st.sampled_from(["string", "a", "", "object"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from([*SCHEMA_WORDS, "a", ""]), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize(
    "name", ["objects between tags", "a name, its id, then an object", "key by key, in tags of two"]
)
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(parameters=st.dictionaries(st.sampled_from(SCHEMA_WORDS), JSON, max_size=3))
def test_whatever_the_parameters_are_they_are_taken_or_named(name, parameters):
    refused, follows = "f: ", None
    try:
        follows = matcher(name, [{"name": "f", "parameters": parameters}])
    except ValueError as error:
        refused = str(error)
    assert re.fullmatch("f[:.].*", refused)  # in one line, by its name
    if follows:
        follows.compute_bitmask()
        assert not follows.is_error()
