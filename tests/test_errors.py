"""What is said of a wrong value: plain words, the field, what was given and what was meant; never pydantic's."""

import json
import re
from typing import Any, get_origin

import pytest
from pydantic import BaseModel

from ftray.adapters.methods import METHODS, parameters
from ftray.config import Config, config_from
from ftray.errors import UserError
from ftray.serving.api.chat_requests import ChatCompletionRequest
from ftray.serving.api.requests import (
    AddAdapterRequest,
    ClassificationRequest,
    CompletionRequest,
    EmbeddingRequest,
)
from ftray.serving.errors import APIError
from ftray.serving.request_body import parse

FOREIGN = re.compile(
    r"Input should|should (be|have|match)|required$|Extra inputs|Value error|valid \w+|constrained-|\[str"
)
WRONG: list[Any] = [5, -1, 1e300, 1.5, True, "x!", "", [[]], ["a", 1], {"a": 1}, None, float("nan"), "y" * 500]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": {"max_length": "long"}}, "data.max_length: must be a whole number, or 'auto' (got 'long')"),
        ({"data": {"max_length": 1}}, "data.max_length: must be at least 2, or 'auto' (got 1)"),
        ({"model": {"dtype": "f32"}}, "did you mean fp32?"),
        ({"adapters": 5}, "adapters: must be a list (got 5)"),
        ({"data": 5}, "data: must be a mapping of names to values (got 5)"),
        ({"resume": "perhaps"}, "resume: must be true or false (got 'perhaps')"),
    ],
)
def test_a_wrong_setting(values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        config_from(values)


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ({"stop": 5}, "stop", "stop: must be a list, or a text (got 5)"),
        ({"stop": ["a"] * 5}, "stop", "stop: must be a list of at most 4, not of 5"),
        ({"temprature": 1}, "temprature", "unsupported field 'temprature'; did you mean temperature?"),
        ({"temperature": 3}, "temperature", "temperature: must be at most 2 (got 3)"),
        ({"best_of": 2}, "best_of", "best_of: must be 1 (got 2)"),
        ({"prompt": None}, "prompt", "prompt: is missing"),
    ],
)
def test_a_wrong_field_of_a_request(given, param, message):
    with pytest.raises(APIError) as refused:
        parse(CompletionRequest, json.dumps({"model": "m", "prompt": "a"} | given).encode())
    assert (refused.value.status, refused.value.param) == (400, param)
    assert message in refused.value.message


def leaves(model: type[BaseModel]):
    """The path of each field of the sections below `model`."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from ((name, *path) for path in leaves(kind))
        yield (name,)


def nested(path: tuple[str, ...], value: object) -> object:
    for name in reversed(path):
        value = {name: value}
    return value


def test_no_setting_is_refused_in_pydantics_words():
    told = []
    for path in leaves(Config):
        for value in WRONG:
            try:
                config_from(nested(path, value))
            except UserError as error:
                told.append(str(error))
    assert len(told) > 300
    assert [line for line in told if FOREIGN.search(line) or "\n" in line] == []


def test_no_parameter_of_a_method_is_refused_in_pydantics_words():
    told = []
    for method, entry in METHODS.items():
        for name in entry.parameters.model_fields:
            for value in WRONG:
                try:
                    parameters(config_from({"adapter": {"method": method, name: value}}).adapter)
                except UserError as error:
                    told.append(str(error))
    assert len(told) > 100
    assert [line for line in told if FOREIGN.search(line) or "\n" in line] == []


@pytest.mark.parametrize(
    "kind", [CompletionRequest, ChatCompletionRequest, EmbeddingRequest, ClassificationRequest, AddAdapterRequest]
)
def test_no_request_is_refused_in_pydantics_words(kind):
    whole = {"model": "m", "prompt": "a", "input": "a", "messages": [{"role": "user", "content": "a"}], "name": "a"}
    whole = {name: value for name, value in (whole | {"source": "s"}).items() if name in kind.model_fields}
    told = []
    for name in kind.model_fields:
        for value in [*WRONG, [{"role": 5}], [{"role": "user", "content": 5}], [{"type": 5}]]:
            try:
                parse(kind, json.dumps(whole | {name: value}).encode())
            except APIError as error:
                told.append(error.message)
    assert told
    assert [line for line in told if FOREIGN.search(line) or "\n" in line or len(line) > 400] == []
