import pytest

from ftray.data.records import Example, parse
from ftray.errors import UserError

TURNS = (("system", "Be brief."), ("user", "1+1?"), ("assistant", "2"))
SHAPES = [
    ({"input": "a", "output": "b"}, Example("a", "b")),
    ({"input": "", "output": "b"}, Example("", "b")),
    ({"instruction": "Add", "input": "1 1", "output": "2"}, Example("Add\n1 1", "2")),
    ({"instruction": "Add", "input": "", "output": "2"}, Example("Add", "2")),
    ({"instruction": "Add", "input": None, "output": "2"}, Example("Add", "2")),
    ({"instruction": "Add", "output": "2"}, Example("Add", "2")),
    ({"prompt": "a", "completion": "b", "id": 3}, Example("a", "b")),
    ({"text": "once upon"}, Example("", "once upon")),
    ({"messages": [{"role": r, "content": c} for r, c in TURNS]}, Example(messages=TURNS)),
    (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "1+1?"},
                {"from": "gpt", "value": "2"},
            ]
        },
        Example(messages=TURNS),
    ),
]


@pytest.mark.parametrize(("record", "example"), SHAPES)
def test_shapes(record, example):
    parsed = parse(record, "f:1")
    assert parsed == example
    assert parsed.where == "f:1"


USER = {"role": "user", "content": "a"}
REFUSED = [
    ({"foo": 1, "bar": 2}, "record with keys foo, bar; known shapes: input/output, .*messages.*text"),
    ({}, r"record with keys \(none\)"),
    ({"input": "a"}, "record with keys input; known"),
    ({"input": "a", "output": 5}, "output must be text, not int"),
    ({"input": None, "output": "a"}, "input must be text, not NoneType"),
    ({"input": "a", "output": " "}, "output is empty"),
    ({"instruction": "", "output": "a"}, "instruction is empty"),
    ({"text": ["a"]}, "text must be text, not list"),
    ({"messages": []}, "messages must be a list of turns, at least one"),
    ({"messages": "a"}, "messages must be a list of turns"),
    ({"messages": [USER]}, "messages has no assistant turn: nothing to learn"),
    ({"messages": [USER, "b"]}, r"messages\[1\] must have role and content"),
    ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\] must have role and content"),
    ({"messages": [{"role": "robot", "content": "a"}]}, r"messages\[0\]\.role is 'robot'; known: human"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, r"messages\[0\]\.role is \['user'\]"),
    ({"conversations": [{"role": "user", "content": "a"}]}, r"conversations\[0\] must have from and value"),
]


@pytest.mark.parametrize(("record", "message"), REFUSED)
def test_refused(record, message):
    with pytest.raises(UserError, match=f"^f.jsonl:7: {message}"):
        parse(record, "f.jsonl:7")
