"""Records that a program holds: written exactly as they are, once, or refused in one line."""

import datetime
import decimal
import json
import math

import datasets
import numpy as np
import pandas as pd
import pytest

from ftray.arguments import config_of
from ftray.data import DataCheck
from ftray.data.formats import read_chunk
from ftray.data.in_memory import kind_of, write_records
from ftray.data.sources import find_chunks
from ftray.errors import UserError
from ftray.models.load import load_tokenizer
from ftray.storage.location import parse_location

NESTED = [
    {
        "messages": [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"a": 2, "b": 2}}]},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "four ☃\u2028"},
        ],
        "n": 2**53 + 1,
        "share": 0.1 + 0.2,
        "is_good": True,
        "nothing": None,
    },
    {"messages": [], "n": 1, "deep": {"a": [[1, 2.0], []]}},
]
ROWS = [{"input": f"q {n}", "output": "r"} for n in range(40)]


def written(value, tmp_path, field="data.source"):
    return write_records(value, field, parse_location(tmp_path))


def read(file):
    return [record for chunk in find_chunks(file) for _, record in read_chunk(chunk)]


def exactly(value):
    """Values that are equal and of the same types have equal texts."""
    return json.dumps(value, sort_keys=True)


def test_rows_come_back_as_they_are(tmp_path):
    files = written(NESTED, tmp_path)
    assert [exactly(record) for record in read(files["train"])] == [exactly(row) for row in NESTED]


def test_equal_records_are_one_file_and_others_another(tmp_path):
    first = written(NESTED, tmp_path)
    assert written([dict(row) for row in NESTED], tmp_path) == first
    assert written(NESTED[:1], tmp_path) != first
    assert len(list(tmp_path.iterdir())) == 2


def test_numbers_and_arrays_of_numpy_are_python_s(tmp_path):
    rows = [
        {"text": np.str_("a"), "n": np.int64(3), "x": np.float32(0.5), "ids": np.array([[1, 2], [3, 4]]), "t": (1, 2)}
    ]
    assert read(written(rows, tmp_path)["train"]) == [
        {"text": "a", "n": 3, "x": 0.5, "ids": [[1, 2], [3, 4]], "t": [1, 2]}
    ]


def test_columns_are_rows(tmp_path):
    columns = {"input": ["a", "b"], "output": ("A", None)}
    rows = [{"input": "a", "output": "A"}, {"input": "b", "output": None}]
    assert kind_of(columns) == "columns"
    assert written(columns, tmp_path) == written(rows, tmp_path)
    cfg = config_of("tune", {"data": columns, "output": str(tmp_path / "out")})
    assert read(cfg.data.source) == rows


@pytest.mark.parametrize(
    "value",
    [
        pd.DataFrame({"input": ["a", "b", "c"], "output": ["A", "B", float("nan")]}, index=[7, 3, 9]),
        {"input": ["a", "b", "c"], "output": ["A", "B", None]},
        [{"input": "a", "output": "A"}, {"input": "b", "output": "B"}, {"input": "c", "output": None}],
        [{"input": c, "output": c if c != "c" else None, "day": datetime.date.today()} for c in "abc"],
    ],
)
def test_a_record_is_named_by_its_place_in_what_was_given(value, tmp_path, tiny_llama):
    tmp_path = tmp_path / "a directory"
    cfg = config_of("tune", {"data": value, "output": str(tmp_path / "out")})
    with pytest.raises(UserError, match=r"^data\.source\[2\]: output"):
        DataCheck(cfg.data).run(load_tokenizer(tiny_llama), "CAUSAL_LM")
    mixed = config_of(
        "tune", {"data": {"sources": [{"source": ROWS}, {"source": value}]}, "output": str(tmp_path / "o")}
    )
    with pytest.raises(UserError, match=r"^data\.sources\[1\]\[2\]: output"):
        DataCheck(mixed.data).run(load_tokenizer(tiny_llama), "CAUSAL_LM")
    held_out = config_of("tune", {"data": {"source": ROWS, "test": value}, "output": str(tmp_path / "p")})
    with pytest.raises(UserError, match=r"^data\.test\[2\]: output"):
        DataCheck(held_out.data).run(load_tokenizer(tiny_llama), "CAUSAL_LM")


def test_records_in_memory_are_not_named_by_their_file(tmp_path, tiny_llama):
    cfg = config_of("tune", {"data": ROWS[:2], "output": str(tmp_path / "out")})
    with pytest.raises(UserError, match=r"^data in memory: the \w+ split of 2 record"):
        DataCheck(cfg.data).run(load_tokenizer(tiny_llama), "CAUSAL_LM")


def test_what_is_missing_in_a_frame_is_missing_and_not_text(tmp_path):
    frame = pd.DataFrame(
        {
            "prompt": ["a", None, "c"],
            "completion": ["A", "B", float("nan")],
            "score": [1.5, float("nan"), 2.0],
            "whole": pd.array([1, None, 2**53 + 1], dtype="Int64"),
            "flag": [True, False, True],
            "kind": pd.Categorical(["x", "y", "x"]),
        },
        index=[7, 3, 9],
    )
    assert read(written(frame, tmp_path)["train"]) == [
        {"prompt": "a", "completion": "A", "score": 1.5, "whole": 1, "flag": True, "kind": "x"},
        {"prompt": None, "completion": "B", "score": None, "whole": None, "flag": False, "kind": "y"},
        {"prompt": "c", "completion": None, "score": 2.0, "whole": 2**53 + 1, "flag": True, "kind": "x"},
    ]


def test_nested_values_in_a_frame_get_no_keys_of_their_neighbours(tmp_path):
    frame = pd.DataFrame({"messages": [row["messages"] for row in NESTED]})
    assert [exactly(r) for r in read(written(frame, tmp_path)["train"])] == [
        exactly({"messages": row["messages"]}) for row in NESTED
    ]


def test_dates_decimals_and_bytes_stay_what_they_are(tmp_path):
    when = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901)
    rows = [
        {"prompt": "a", "when": when, "day": when.date(), "cost": decimal.Decimal("1.10"), "raw": b"\xff"},
        {"prompt": "b", "when": None, "day": when.date(), "cost": decimal.Decimal("2.25"), "raw": b""},
    ]
    files = written(rows, tmp_path)
    assert files["train"].endswith(".parquet")
    assert read(files["train"]) == rows
    assert written(rows, tmp_path) == files
    frame = pd.DataFrame({"prompt": ["a", "b"], "when": pd.to_datetime(["2026-01-02", None])})
    assert read(written(frame, tmp_path)["train"]) == [
        {"prompt": "a", "when": datetime.datetime(2026, 1, 2)},
        {"prompt": "b", "when": None},
    ]


def test_a_data_set_keeps_its_rows_its_order_and_the_names_of_its_classes(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    assert read(written(data, tmp_path)["train"]) == [
        {"text": "a", "label": "yes"},
        {"text": "b", "label": "no"},
        {"text": "c", "label": None},
    ]
    chosen = data.select([2, 0]).with_format("numpy")
    assert [record["text"] for record in read(written(chosen, tmp_path)["train"])] == ["c", "a"]


def test_the_splits_of_a_data_set_are_kept_apart(tmp_path):
    parts = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "dev", "test", "other")}
    files = written(datasets.DatasetDict(parts), tmp_path)
    assert {split: read(file) for split, file in files.items()} == {
        "train": [{"text": "train"}],
        "validation": [{"text": "dev"}],
        "test": [{"text": "test"}],
    }
    with pytest.raises(UserError, match=r"data.source: has no split train, but dev: give one of them"):
        written(datasets.DatasetDict(dev=parts["dev"]), tmp_path)


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ([], "data.source: holds no records"),
        ({"a": ["b"], "c": []}, "data.source: columns of different lengths: a has 1, c has 0: give as many"),
        (["a", 3], "data.source[0]: a record is a mapping of names to values, not str"),
        ([{"a": "b"}, {"a": {"b": [math.inf]}}], "data.source[1].a.b[0]: is inf: put a number, or None where it is m"),
        ([{"a": math.nan}], "data.source[0].a: is nan: put a number"),
        ([{0: "b"}], "data.source[0]: key 0 is no text"),
        ([{"a": "\ud83d"}], "data.source[0].a: '\\ud83d' holds half of a surrogate pair"),
        ([{"a": {1, 2}}], "data.source[0].a: no file holds a set as it is"),
        (
            [{"a": datetime.date.today()}, {"a": "x"}],
            "data.source: dates, decimals or bytes among values that fit no ta",
        ),
        (
            [{"d": datetime.date.today(), "m": {"a": 1}}, {"m": {"b": 2}}],
            "data.source[0].m: beside dates, decimals or bytes it would be stored as something else",
        ),
        (
            [{"d": b"", "n": 1}, {"n": 2.5}],
            "data.source[0].n: beside dates, decimals or bytes it would be stored as som",
        ),
        (pd.DataFrame({0: ["a"]}), "data.source: column 0 is called by no text: rename it"),
        (pd.DataFrame([["a", "b"]], columns=["x", "x"]), "data.source: column 'x' stands twice"),
        (pd.DataFrame({"a": []}), "data.source: holds no records"),
        (datasets.Dataset.from_dict({"a": []}), "data.source: holds no records"),
        (
            datasets.Dataset.from_dict({"a": ["b"]}).with_transform(lambda batch: batch),
            "data.source: makes its records as they are read (set_transform)",
        ),
        (
            datasets.Dataset.from_dict({"a": ["b"]}).to_iterable_dataset(),
            "data.source: a stream of records is read once, and training reads them often",
        ),
    ],
)
def test_what_no_file_can_hold_is_one_line(value, line, tmp_path):
    with pytest.raises(UserError) as told:
        written(value, tmp_path)
    assert str(told.value).startswith(line)
    assert len(str(told.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["a.jsonl", ["a.jsonl", "b.jsonl"], {"source": "a.jsonl"}, None, 3])
def test_a_path_and_what_is_no_record_at_all_is_left_to_the_configuration(value):
    assert kind_of(value) == ""
