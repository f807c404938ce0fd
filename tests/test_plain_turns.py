"""The plainest conversations, read without the checks that only other keys need: the same as with them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftray.data.meanings import ROLES
from ftray.data.plain_turns import read_plain_turns
from ftray.data.reading import read
from ftray.data.records import SHAPES
from ftray.errors import UserError

VALUES = st.sampled_from(["", " ", "a", "[]", "1", "no", '{"name": "f"}', "[1", None, 0, 1, True, ["a"], {"a": 1}, []])
ROLE = st.sampled_from([*ROLES, "User", "nobody"])
KEYS = st.sampled_from(["role", "from", "speaker", "content", "value", "text", "weight", "name", "id", "thinking"])
PLAIN = st.builds(lambda role, text: {"role": role, "content": text}, ROLE, VALUES)
TURN = PLAIN | st.builds(lambda role, text: {"from": role, "value": text}, ROLE, VALUES)
TURN |= st.dictionaries(KEYS, VALUES | ROLE, max_size=3) | st.just("text")
NAMES = st.sampled_from(["messages", "conversations", "dialog", "prompt", "tools", "system", "id", "label"])
RECORD = st.dictionaries(NAMES, st.lists(TURN, max_size=4) | VALUES, max_size=2) | st.builds(
    lambda name, turns: {name: turns}, NAMES, st.lists(PLAIN, max_size=4)
)


@given(RECORD)
def test_whatever_is_read_is_read_as_any_record_is(record):
    found = read_plain_turns(record, "f:1")
    if found is not None:
        wanted = read(record, SHAPES, "f:1")
        assert found == wanted
        assert found[0].where == wanted[0].where == "f:1"


@pytest.mark.parametrize(("key", "who", "what"), [("messages", "role", "content"), ("conversations", "from", "value")])
def test_plain_ones_are_read(key, who, what):
    turns = [{who: role, what: text} for role, text in (("system", ""), ("user", "1+1?"), ("assistant", "2"))]
    assert read_plain_turns({key: turns}, "f:1") == read({key: turns}, SHAPES, "f:1")
    for wrong in ([], turns[:2], [*turns, {who: "gpt2", what: "2"}]):
        assert read_plain_turns({key: wrong}, "f:1") is None
        with pytest.raises(UserError):
            read({key: wrong}, SHAPES, "f:1")
