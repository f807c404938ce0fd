"""Records as people have them, in files as people have them: what each teaches, and after what context."""

import bz2
import csv
import gzip
import io
import json
import random
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.record_files import (
    ASK,
    END,
    TEMPLATE,
    USER,
    assistant,
    call,
    config,
    lines,
    rows_of,
    said,
    user,
)
from pyarrow import CompressedOutputStream

from ftray.cli import main
from ftray.config import DataConfig, config_from
from ftray.data import TokenizedData, prepare
from ftray.data.formats import read_chunk
from ftray.data.records import parse
from ftray.data.splits import find_sources
from ftray.errors import UserError
from ftray.models.load import load_tokenizer
from ftray.preprocess import run as run_preprocess
from ftray.reports.data import rendered
from ftray.task_spec import IGNORE, RAW, TaskSpec


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("template") / "tools.jinja"
    path.write_text(TEMPLATE)
    return str(path)


CALL = '{"name": "f", "arguments": {"a": 1}}'
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


# the record numbered n -> (context, what is learnt, context, ...) of record 0
PAIRS = {
    "instruction, context, response": (
        lambda n: {"instruction": f"q {n}", "context": "c", "response": "r"},
        "q 0\nc",
        "r",
    ),
    "instruction without its context": (
        lambda n: {"instruction": f"q {n}", "context": "", "response": "r"},
        "q 0",
        "r",
    ),
    "question, answer": (lambda n: {"question": f"q {n}", "answer": "#### 4"}, "q 0", "#### 4"),
    "question, passage, a boolean": (
        lambda n: {"question": f"q {n}", "passage": "p", "answer": True},
        "q 0\np",
        "true",
    ),
    "an answer that is a number": (lambda n: {"question": f"q {n}", "answer": 4}, "q 0", "4"),
    "question, context, answer": (lambda n: {"question": f"q {n}", "context": "c", "answer": "a"}, "q 0\nc", "a"),
    "query, response": (lambda n: {"query": f"q {n}", "response": "r"}, "q 0", "r"),
    "prompt, response": (lambda n: {"prompt": f"q {n}", "response": "r"}, "q 0", "r"),
    "problem, solution": (lambda n: {"problem": f"q {n}", "solution": "r"}, "q 0", "r"),
    "document, summary": (lambda n: {"document": f"q {n}", "summary": "r"}, "q 0", "r"),
    "article, highlights": (lambda n: {"article": f"q {n}", "highlights": "r", "id": "x"}, "q 0", "r"),
    "dialogue, summary": (lambda n: {"dialogue": f"q {n}", "summary": "r"}, "q 0", "r"),
    "inputs, targets": (lambda n: {"inputs": f"q {n}", "targets": "r"}, "q 0", "r"),
    "source, target": (lambda n: {"source": f"q {n}", "target": "r"}, "q 0", "r"),
    "translation": (lambda n: {"translation": {"en": f"q {n}", "fr": "r"}}, "q 0", "r"),
    "two languages": (lambda n: {"id": n, "en": f"q {n}", "de": "r"}, "q 0", "r"),
}
CHATS = {
    "openai with tools": (
        lambda n: {
            "messages": [
                user(f"q {n}"),
                assistant(None, tool_calls=call('{"a": 1}')),
                {"role": "tool", "tool_call_id": "c1", "content": "21C"},
                assistant(f"It is {n}."),
            ],
            "tools": [TOOL],
            "parallel_tool_calls": False,
        },
        [
            f"<|system|>{json.dumps([TOOL])}{END}{USER}q 0{ASK}",
            f"{CALL}{END}",
            f"<|tool|>21C{ASK}",
            f"It is 0.{END}",
        ],
    ),
    "openai as it was before tools": (
        lambda n: {
            "messages": [
                user(f"q {n}"),
                assistant(None, function_call={"name": "f", "arguments": '{"a": 1}'}),
                {"role": "function", "name": "f", "content": "21C"},
                assistant("yes"),
            ],
            "functions": [TOOL["function"]],
        },
        [f"<|system|>{json.dumps([TOOL])}{END}{USER}q 0{ASK}", f"{CALL}{END}", f"<|tool|>21C{ASK}", f"yes{END}"],
    ),
    "sharegpt with a call": (
        lambda n: {
            "conversations": [
                {"from": "human", "value": f"q {n}"},
                {"from": "function_call", "value": CALL},
                {"from": "observation", "value": "42"},
                {"from": "gpt", "value": "r"},
            ],
            "tools": "[]",
        },
        [f"{USER}q 0{ASK}", f"{CALL}{END}", f"<|tool|>42{ASK}", f"r{END}"],
    ),
    "weights": (
        lambda n: {"messages": [user(f"q {n}"), assistant("x", weight=0), user("sure?"), assistant("r", weight=1)]},
        [f"{USER}q 0{ASK}x{END}{USER}sure?{ASK}", f"r{END}"],
    ),
    "parts": (
        lambda n: {"messages": [{"role": "user", "content": [{"type": "text", "text": f"q {n}"}]}, assistant("r")]},
        [f"{USER}q 0{ASK}", f"r{END}"],
    ),
    "developer": (
        lambda n: {"messages": [{"role": "developer", "content": "S"}, user(f"q {n}"), assistant("r")]},
        [f"<|system|>S{END}{USER}q 0{ASK}", f"r{END}"],
    ),
    "a system text beside": (
        lambda n: {"system": "S", "conversation": [user(f"q {n}"), assistant("r")]},
        [f"<|system|>S{END}{USER}q 0{ASK}", f"r{END}"],
    ),
    "dialog": (lambda n: {"dialog": [user(f"q {n}"), assistant("r")]}, [f"{USER}q 0{ASK}", f"r{END}"]),
    "turns as JSON": (
        lambda n: {"messages": json.dumps([user(f"q {n}"), assistant("r")])},
        [f"{USER}q 0{ASK}", f"r{END}"],
    ),
    "prompt and completion as turns": (
        lambda n: {
            "prompt": [user("a"), assistant("b"), user(f"q {n}")],
            "completion": [assistant("r"), user("more"), assistant("s")],
        },
        [f"{USER}a{ASK}b{END}{USER}q 0{ASK}", f"r{END}", f"{USER}more{ASK}", f"s{END}"],
    ),
    "a pair with a system text and tools": (
        lambda n: {"system": "S", "instruction": f"q {n}", "output": "r", "tools": json.dumps([TOOL])},
        [f"<|system|>{json.dumps([TOOL])}{END}<|system|>S{END}{USER}q 0{ASK}", f"r{END}"],
    ),
}


@pytest.mark.parametrize("shape", PAIRS)
def test_pairs_of_texts(tmp_path, tiny_llama, tokenizer, shape):
    record, prompt, target = PAIRS[shape]
    (tmp_path / "r.jsonl").write_text(lines(record))
    task, rows = rows_of(config(tmp_path / "r.jsonl", tiny_llama, None))
    assert task == "CAUSAL_LM"
    assert len(rows) == 40
    assert said(rows[0][1], tokenizer) == [(f"{USER}{prompt}{ASK}", False), (f"{target}{END}", True)]
    assert rows[0][1].target == target
    # raw, for a model without a chat template
    _, rows = rows_of(config(tmp_path / "r.jsonl", tiny_llama, None, template="{prompt}\n"))
    assert said(rows[0][1], tokenizer) == [(f"{prompt}\n", False), (f"{target}{END}", True)]


@pytest.mark.parametrize("shape", CHATS)
def test_conversations(tmp_path, tiny_llama, tokenizer, template, shape):
    record, pieces = CHATS[shape]
    (tmp_path / "r.jsonl").write_text(lines(record))
    task, rows = rows_of(config(tmp_path / "r.jsonl", tiny_llama, template))
    assert task == "CAUSAL_LM"
    assert said(rows[0][1], tokenizer) == [(text, index % 2 == 1) for index, text in enumerate(pieces)]
    if shape == "parts":
        return  # no table has a list and a text in one column
    # what a table makes of it, where each key stands in every row
    table = pa.Table.from_pylist([record(n) for n in range(40)])
    pq.write_table(table, tmp_path / "r.parquet")
    _, again = rows_of(config(tmp_path / "r.parquet", tiny_llama, template))
    assert again[0][1].input_ids == rows[0][1].input_ids
    assert again[0][1].labels == rows[0][1].labels


LABELLED = {
    "sentence": (lambda n: {"sentence": f"good {n}", "label": n % 2, "idx": n}, "SEQ_CLS", "good 0", "0"),
    "text, labels": (lambda n: {"text": f"good {n}", "labels": ["pos", "neg"][n % 2]}, "SEQ_CLS", "good 0", "pos"),
    "one label in a list": (lambda n: {"text": f"good {n}", "labels": [n % 2]}, "SEQ_CLS", "good 0", "0"),
    "title beside": (lambda n: {"title": "t", "text": f"good {n}", "label": n % 2}, "SEQ_CLS", "good 0", "0"),
    "premise, hypothesis": (
        lambda n: {"premise": f"a {n}", "hypothesis": "b", "label": n % 3},
        "SEQ_CLS",
        "a 0\nb",
        "0",
    ),
    "two sentences": (lambda n: {"sentence1": f"a {n}", "sentence2": "b", "label": n % 2}, "SEQ_CLS", "a 0\nb", "0"),
    "tags as numbers": (
        lambda n: {"tokens": ["EU", f"n{n}"], "ner_tags": [3, 0], "pos_tags": [1, 1]},
        "TOKEN_CLS",
        "EU n0",
        "3 0",
    ),
    "tags as names": (lambda n: {"words": ["EU", f"n{n}"], "labels": ["B-ORG", "O"]}, "TOKEN_CLS", "EU n0", "B-ORG O"),
    "squad, flat": (
        lambda n: {"question": "q", "context": f"a b {n}", "answers": {"text": ["b"], "answer_start": [2]}},
        "QUESTION_ANS",
        "a b 0\nq",
        "b",
    ),
    "squad, in columns": (
        lambda n: {"question": "q", "context": f"a b {n}", "answer": "b", "answer_start": 2},
        "QUESTION_ANS",
        "a b 0\nq",
        "b",
    ),
}


@pytest.mark.parametrize("shape", LABELLED)
def test_labelled_records(tmp_path, tiny_bert, shape):
    record, task, prompt, target = LABELLED[shape]
    (tmp_path / "r.jsonl").write_text(lines(record))
    found, rows = rows_of(config(tmp_path / "r.jsonl", tiny_bert, None))
    assert (found, rows[0][1].prompt, rows[0][1].target) == (task, prompt, target)


def test_squad_as_it_is_published(tmp_path, tiny_bert):
    def paragraph(n):
        qas = [{"id": str(n), "question": q, "answers": [{"text": "b", "answer_start": 2}]} for q in ("q", "r")]
        return {"context": f"a b {n}", "qas": [*qas, {"question": "s", "answers": [], "is_impossible": True}]}

    squad = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [paragraph(n) for n in range(20)]}] * 2}
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    task, rows = rows_of(config(tmp_path / "squad.json", tiny_bert, None))
    assert (task, len(rows)) == ("QUESTION_ANS", 2 * 20 * 3)
    assert [(row.prompt, row.target) for _, row in rows[:3]] == [("a b 0\nq", "b"), ("a b 0\nr", "b"), ("a b 0\ns", "")]
    squad["data"][0]["paragraphs"][1]["qas"][1]["answers"] = [{"text": "z", "answer_start": 2}]
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    with pytest.raises(UserError, match=r"squad\.json\[0\]\.paragraphs\[1\]\.qas\[1\]: the answer 'z' is not in"):
        rows_of(config(tmp_path / "squad.json", tiny_bert, None))


REFUSED = {
    "an image among the parts": (
        lambda n: {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, assistant("r")]},
        r":1: messages\[0\]\.content\[0\] is no text but 'image_url'",
    ),
    "choices": (lambda n: {"question": "q", "choices": ["a", "b"], "answer": "a"}, ":1: choices would be lost"),
    "several labels": (lambda n: {"text": f"t {n}", "labels": [1, 2]}, ":1: labels holds 2 labels"),
    "another language": (
        lambda n: {"translation": {"en": "a", "fr": "b", "de": "c"}},
        ":1: translation holds en, fr, de",
    ),
    "keys of its own": (
        lambda n: {"titel": f"t {n}", "zusammenfassung": "z", "seiten": 3},
        r"keys titel, zusammenfassung, seiten; .* as in --data.fields 'prompt: titel, completion: zusammenfassung'$",
    ),
    "keys of its own, and a label": (
        lambda n: {"body": f"t {n}", "stars": 3},
        r" as in --data.fields 'text: body, label: stars'$",
    ),
    "turns by another name": (lambda n: {"log": [user("q"), assistant("r")]}, " as in --data.fields 'messages: log'$"),
}


@pytest.mark.parametrize("shape", REFUSED)
def test_what_is_refused_says_where_and_what_to_do(tmp_path, tiny_llama, template, shape):
    record, message = REFUSED[shape]
    (tmp_path / "r.jsonl").write_text(lines(record))
    with pytest.raises(UserError, match=message) as told:
        rows_of(config(tmp_path / "r.jsonl", tiny_llama, template))
    assert "\n" not in str(told.value)
    assert "r.jsonl:1:" in str(told.value)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (
            {"tools": [TOOL], "messages": [user("q"), assistant("r")]},
            "tools: the model's chat template leaves them out",
        ),
        (
            {"messages": [user("q"), assistant(None, tool_calls=call("{}"))]},
            "turn 1 calls a tool, which the model's chat",
        ),
        (
            {"messages": [user("q"), assistant("r", reasoning_content="hmm")]},
            "the chat template leaves out what the assistant thought in turn 1",
        ),
    ],
)
def test_what_a_chat_template_leaves_out_is_refused(tmp_path, tiny_llama, turns, message):
    (tmp_path / "r.jsonl").write_text(lines(lambda n: turns | {"id": n}))
    with pytest.raises(UserError, match=f":[0-9]+: {message}"):
        rows_of(config(tmp_path / "r.jsonl", tiny_llama, None))


def test_a_call_in_words_is_learnt_as_it_stands_where_the_template_knows_no_calls(tmp_path, tiny_llama, tokenizer):
    record, _ = CHATS["sharegpt with a call"]
    (tmp_path / "r.jsonl").write_text(lines(record))
    _, rows = rows_of(config(tmp_path / "r.jsonl", tiny_llama, None))
    assert [text for text, learnt in said(rows[0][1], tokenizer) if learnt] == [f"{CALL}{END}", f"r{END}"]


# --- mapping


@pytest.mark.parametrize(
    ("fields", "pieces"),
    [
        ("prompt: frage, completion: antwort", [f"{USER}f 0{ASK}", f"7{END}"]),
        ({"prompt": "{{ frage }}\n{{ more.hint }}", "completion": "antwort"}, [f"{USER}f 0\nh{ASK}", f"7{END}"]),
        ({"prompt": "more.hint", "completion": "{{ antwort + 1 }}"}, [f"{USER}h{ASK}", f"8{END}"]),
        ({"system": "more.list.1", "prompt": "frage", "completion": "antwort"}, None),
    ],
)
def test_a_mapping_says_what_is_what(tmp_path, tiny_llama, tokenizer, fields, pieces):
    record = {"antwort": 7, "label": False}
    more = {"more": {"hint": "h", "list": ["x", "y"]}}
    (tmp_path / "r.jsonl").write_text(
        lines(
            lambda n: (
                record | {"frage": f"f {n}"} | (more if n == 0 else {"more": {"hint": f"i {n}", "list": ["x", "z"]}})
            )
        )
    )
    _, rows = rows_of(config(tmp_path / "r.jsonl", tiny_llama, None, fields=fields))
    wanted = pieces or [f"<|system|>y{END}{USER}f 0{ASK}", f"7{END}"]
    assert said(rows[0][1], tokenizer) == [(wanted[0], False), (wanted[1], True)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "q", "completion": "antwort"}, r"r\.jsonl:1: data\.fields: prompt: the record has no key q"),
        ({"prompt": "frag", "completion": "antwort"}, r"has no key frag; did you mean frage\?"),
        (
            {"prompt": "{{ q }}", "completion": "antwort"},
            r":1: data\.fields: the template of prompt fails: 'q' is undef",
        ),
        ({"prompt": "{{ frage", "completion": "antwort"}, r"data\.fields: prompt: jinja can't read it"),
        ({"prompt": "{{ frage.__class__.__mro__ }}", "completion": "antwort"}, "the template of prompt fails"),
    ],
)
def test_a_mapping_that_does_not_fit(tmp_path, tiny_llama, fields, message):
    (tmp_path / "r.jsonl").write_text(lines(lambda n: {"frage": f"f {n}", "antwort": "a"}))
    with pytest.raises(UserError, match=message):
        rows_of(config(tmp_path / "r.jsonl", tiny_llama, None, fields=fields))


# --- files


def table(delimiter: str) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(["id", "input", "output"])
    writer.writerows([n, f"a, b; {n} \u2028ü", "b\nc"] for n in range(40))
    return text.getvalue()


def zstd(data: bytes) -> bytes:
    buffer = pa.BufferOutputStream()
    with CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(data)
    return buffer.getvalue().to_pybytes()


WHOLE = [{"id": n, "input": f"a, b; {n} \u2028ü", "output": "b\nc"} for n in range(40)]
JSONL = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in WHOLE)
FILES = {
    "r.jsonl": JSONL.encode(),
    "bom.jsonl": JSONL.encode("utf-8-sig"),
    "crlf.jsonl": JSONL.replace("\n", "\r\n").encode(),
    "utf16.jsonl": JSONL.encode("utf-16"),
    "r.ndjson": JSONL.encode(),
    "r.json": json.dumps(WHOLE).encode(),
    "held.json": json.dumps({"version": 1, "data": WHOLE}).encode(),
    "r.csv": table(",").encode(),
    "pandas.json": json.dumps({key: {str(n): r[key] for n, r in enumerate(WHOLE)} for key in WHOLE[0]}).encode(),
    "split.json": json.dumps(
        {"columns": [*WHOLE[0]], "index": [*range(40)], "data": [[*record.values()] for record in WHOLE]}
    ).encode(),
    "semicolon.csv": table(";").encode("utf-8-sig"),
    "utf16.csv": table(",").encode("utf-16"),
    "r.tsv": table("\t").encode(),
    "tab.csv": table("\t").encode(),
    "r.jsonl.gz": gzip.compress(JSONL.encode()),
    "r.csv.gz": gzip.compress(table(",").encode()),
    "r.jsonl.bz2": bz2.compress(JSONL.encode()),
    "r.jsonl.zst": zstd(JSONL.encode()),
    "r.json.zst": zstd(json.dumps(WHOLE).encode()),
}


def texts_of(chunks) -> list[tuple[str, str]]:
    return [(record["input"], record["output"]) for chunk in chunks for _, record in read_chunk(chunk)]


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path, tiny_llama, name):
    (tmp_path / name).write_bytes(FILES[name])
    sources = find_sources(config(tmp_path / name, tiny_llama, None).data)
    assert texts_of(sources["train"].chunks) == [(record["input"], record["output"]) for record in WHOLE]


def test_a_file_in_another_encoding_is_read_if_that_is_named(tmp_path, tiny_llama):
    (tmp_path / "r.csv").write_bytes("input,output\na,\xe9\n".encode("latin-1") * 1)
    (tmp_path / "r.jsonl").write_bytes('{"input": "a", "output": "\xe9"}\n'.encode("latin-1"))
    for name in ("r.csv", "r.jsonl"):
        cfg = config(tmp_path / name, tiny_llama, None, encoding="latin-1")
        assert texts_of(find_sources(cfg.data)["train"].chunks) == [("a", "é")]
    with pytest.raises(UserError, match=r"r\.csv:1: not utf-8: name the file's encoding by data\.encoding"):
        texts_of(find_sources(config(tmp_path / "r.csv", tiny_llama, None).data)["train"].chunks)
    with pytest.raises(UserError, match="encoding latin-one: Python knows no encoding of text"):
        config(tmp_path / "r.csv", tiny_llama, None, encoding="latin-one")
    with pytest.raises(UserError, match="encoding base64: Python knows no encoding of text"):
        config(tmp_path / "r.csv", tiny_llama, None, encoding="base64")


@pytest.mark.parametrize("name", ["r.csv", "r.jsonl", "r.json", "r.txt"])
@pytest.mark.parametrize("encoding", ["utf-16", "punycode"])  # whose errors don't say of which encoding they are
def test_a_file_that_is_not_in_the_named_encoding_is_refused(tmp_path, tiny_llama, name, encoding):
    (tmp_path / name).write_bytes(b'{"input": "a", "output": "b"}\n-{\n')
    with pytest.raises(UserError, match=rf"{name}(:1)?: not {encoding}: name the file's encoding by data\.encoding"):
        texts_of(find_sources(config(tmp_path / name, tiny_llama, None, encoding=encoding).data)["train"].chunks)


def test_a_number_of_thousands_of_digits_is_refused(tmp_path, tiny_llama):
    record = '{"input": "a", "output": ' + "1" * 5000 + "}"
    (tmp_path / "r.jsonl").write_text(record)
    (tmp_path / "r.json").write_text(f"[{record}]")
    for name, place in (("r.jsonl", r"r\.jsonl:1"), ("r.json", r"r\.json")):
        with pytest.raises(UserError, match=place + ": not valid JSON: Exceeds the limit"):
            texts_of(find_sources(config(tmp_path / name, tiny_llama, None).data)["train"].chunks)


def test_a_weight_in_a_csv_file_is_a_number_as_in_others(tmp_path, tiny_llama, capsys):
    rows = "".join(f"q{n},a{n},{'1' if n % 2 else '1.0'}\n" for n in range(60))
    (tmp_path / "r.csv").write_text("input,output,weight\n" + rows)
    cfg = config(tmp_path / "r.csv", tiny_llama, None)
    _, learnt = rows_of(cfg)
    assert len(learnt) == 60
    for unlearnt, message in (
        ("0", "marked as one that isn't learnt: leave the record out"),
        ("0.25", "weight is 0.25: a turn or record is learnt or not"),
    ):
        (tmp_path / "r.csv").write_text("input,output,weight\n" + rows + f"q,a,{unlearnt}\n")
        assert main(["preprocess", "--data", str(tmp_path / "r.csv"), "--model", tiny_llama]) == 2
        assert f"r.csv:62: {message}" in capsys.readouterr().err


BAD = {
    "a key twice": (b'{"input": "a", "output": "b"}\n{"input": "a", "input": "b"}\n', r":2: key 'input' stands twice"),
    "a key twice inside": (b'{"messages": [{"role": "user", "role": "system"}]}\n', r":1: key 'role' stands twice"),
    "half a surrogate": (b'{"input": "\\ud83d", "output": "b"}\n', r":1: input holds \\ud83d, half of a surrogate"),
    "half a surrogate in bytes": (
        b'{"input": "\xed\xa0\xbd", "output": "b"}\n',
        r":1: not valid JSON: not utf-8: name the file's encoding by data.encoding",
    ),
    "NaN": (b'{"input": "a", "output": NaN}\n', r":1: output is nan, which is no text"),
    "a raw NUL": (b'{"input": "a\x00", "output": "b"}\n', r":1: not valid JSON: Invalid control character"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_lines_are_one_line_with_the_place(tmp_path, tiny_llama, case):
    content, message = BAD[case]
    (tmp_path / "r.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"r\.jsonl" + message) as told:
        rows_of(config(tmp_path / "r.jsonl", tiny_llama, None))
    assert "\n" not in str(told.value)


def test_a_column_twice_is_refused(tmp_path, tiny_llama):
    (tmp_path / "r.csv").write_text("input,output,input\na,b,c\n")
    with pytest.raises(UserError, match=r"r\.csv:1: column 'input' stands twice"):
        rows_of(config(tmp_path / "r.csv", tiny_llama, None))


def test_an_escaped_nul_is_text_like_any_other(tmp_path, tiny_llama, tokenizer):
    (tmp_path / "r.jsonl").write_text(lines(lambda n: {"input": f"a\x00{n}", "output": "b"}))
    _, rows = rows_of(config(tmp_path / "r.jsonl", tiny_llama, None))
    assert said(rows[0][1], tokenizer)[0] == (f"{USER}a\x000{ASK}", False)


def test_globs_and_several_sources(tmp_path, tiny_llama):
    for name in ("a1", "a2", "b1"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"input": name, "output": "x"}) + "\n")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a3.jsonl").write_text(json.dumps({"input": "a3", "output": "x"}) + "\n")

    def inputs(source):
        return [text for text, _ in texts_of(find_sources(config(source, tiny_llama, None).data)["train"].chunks)]

    assert inputs(f"{tmp_path}/a*.jsonl") == ["a1", "a2"]
    assert inputs(f"{tmp_path}/[ab]1.jsonl") == ["a1", "b1"]
    assert inputs(f"{tmp_path}/**/a*.jsonl") == ["a1", "a2", "a3"]
    assert inputs(f"{tmp_path.as_uri()}/a*.jsonl") == ["a1", "a2"]
    assert inputs([f"{tmp_path}/b1.jsonl", f"{tmp_path}/a?.jsonl"]) == ["b1", "a1", "a2"]
    with pytest.raises(UserError, match=r"c\*\.jsonl: no file fits"):
        inputs(f"{tmp_path}/c*.jsonl")


def split_counts(source, model: str) -> dict[str, int]:
    sources = find_sources(config(source, model, None).data)
    return {name: len(texts_of(found.chunks)) for name, found in sources.items()}


def test_files_named_by_splits_are_these(tmp_path, tiny_llama):
    for name, count in (("train-00", 5), ("train-01", 4), ("val", 3), ("my_test", 2), ("latest", 1)):
        (tmp_path / f"{name}.jsonl").write_text(lines(lambda n: {"input": f"a {n}", "output": "b"}, count))
    assert split_counts(tmp_path, tiny_llama) == {"train": 10, "validation": 3, "test": 2}
    assert split_counts(f"{tmp_path}@test", tiny_llama) == {"train": 2}
    assert split_counts(f"{tmp_path}/my_test.jsonl", tiny_llama) == {"train": 2}
    with pytest.raises(UserError, match="has no split tests; did you mean test"):
        split_counts(f"{tmp_path}@tests", tiny_llama)


def test_files_that_are_held_out_by_their_names_are_named(tmp_path, tiny_llama, capsys):
    for name, count in (("train", 40), ("dev_team", 5)):
        (tmp_path / f"{name}.jsonl").write_text(lines(lambda n: {"input": f"a {n}", "output": "b"}, count))
    (tmp_path / "dataset_info.json").write_text('{"description": "about the records", "features": {}}')
    _, rows = rows_of(config(tmp_path, tiny_llama, None, test_fraction=0))
    assert len(rows) == 40
    assert f"by their names, validation is {tmp_path}/dev_team.jsonl\n" in capsys.readouterr().out
    rows_of(config(tmp_path / "dev_team.jsonl", tiny_llama, None, validation_fraction=0, test_fraction=0))
    assert "by their names" not in capsys.readouterr().out


def test_a_source_of_a_mixture_may_be_named_alone():
    mixed = config_from({"data": {"sources": ["a.jsonl", {"source": "b.jsonl", "weight": 2}]}}).data.sources
    assert [(one.source, one.weight) for one in mixed] == [("a.jsonl", 1), ("b.jsonl", 2)]


def test_texts_with_labels_are_not_learnt_as_texts_beside_prompts(tmp_path, tiny_llama):
    kinds = [{"prompt": "q", "completion": "a"}, {"text": "nice", "label": 1}]
    (tmp_path / "r.jsonl").write_text(lines(lambda n: {key: f"{v} {n}" for key, v in kinds[n % 2].items()}))
    with pytest.raises(UserError, match=r"r\.jsonl:2: has a label, which isn't learnt, beside its text"):
        rows_of(config(tmp_path / "r.jsonl", tiny_llama, None))


def test_what_datasets_saved_keeps_its_splits_and_the_names_of_classes(tmp_path, tiny_llama, tiny_bert):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})

    def data(count, shift=0):
        rows = {"text": [f"t {n}" for n in range(shift, shift + count)], "label": [n % 2 for n in range(count)]}
        return datasets.Dataset.from_dict(rows, features=features)

    datasets.DatasetDict(train=data(30), test=data(6, 30)).save_to_disk(tmp_path / "dict")
    task, rows = rows_of(config(tmp_path / "dict", tiny_bert, None, validation_fraction=0.3))
    assert (task, [row.target for _, row in rows[:3]]) == ("SEQ_CLS", ["neg", "pos", "neg"])
    assert {split for split, _ in rows} == {"train", "validation"}
    _, rows = rows_of(config(tmp_path / "dict", tiny_bert, None, validation_fraction=0.3), "test")
    assert [(split, row.prompt) for split, row in rows] == [("test", f"t {n}") for n in range(30, 36)]
    data(30).to_parquet(tmp_path / "r.parquet")  # which keeps the names too
    for source in (tmp_path / "dict" / "train", f"{tmp_path}/dict@train", tmp_path / "r.parquet"):
        _, rows = rows_of(config(source, tiny_bert, None, validation_fraction=0.3))
        assert [(row.prompt, row.target) for _, row in rows[:2]] == [("t 0", "neg"), ("t 1", "pos")]
    datasets.DatasetDict(train_sft=data(30)).save_to_disk(tmp_path / "odd")
    with pytest.raises(UserError, match=r"has no split train: say which: .*odd@train_sft"):
        rows_of(config(tmp_path / "odd", tiny_bert, None))
    unknown = datasets.Dataset.from_dict({"text": ["t"] * 9, "label": [0, 1] * 4 + [-1]}, features=features)
    unknown.save_to_disk(tmp_path / "unknown")
    with pytest.raises(UserError, match=r"data-00000-of-00001\.arrow\[8\]: label is missing"):
        rows_of(config(tmp_path / "unknown", tiny_bert, None))


@pytest.mark.parametrize("name", ["book.txt", "book.md", "book.txt.gz"])
def test_a_text_is_cut_into_records_and_nothing_is_lost(tmp_path, tiny_llama, tokenizer, name):
    draw = random.Random(0)
    words = ["the", "cat", "sat", "on", "mat", "a", "é"]
    text = "".join(" ".join(draw.choices(words, k=draw.randint(1, 40))) + "\n" * draw.randint(1, 3) for _ in range(300))
    content = text.replace("\n", "\r\n" if name.endswith("md") else "\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    task, rows = rows_of(config(tmp_path / name, tiny_llama, None, max_length=30))
    assert task == "CAUSAL_LM"
    assert max(len(row.input_ids) for _, row in rows) <= 30
    learnt: list[int] = []
    for _, row in rows:  # the first token of a row is learnt where it is not the last of the one before
        again = bool(learnt) and learnt[-1] == row.input_ids[0] and len(learnt) % 29 == 0
        learnt += row.input_ids[1:] if again else row.input_ids
    whole = "".join(record["text"] for _, record in read_all(tmp_path / name, tiny_llama))
    assert whole == text
    assert {split for split, _ in rows} == {"train", "validation", "test"}


def read_all(path: Path, model: str):
    return [
        pair for chunk in find_sources(config(path, model, None).data)["train"].chunks for pair in read_chunk(chunk)
    ]


def test_a_long_text_is_learnt_to_its_end(tmp_path, tiny_llama, tokenizer):
    texts = [" ".join(random.Random(n).choices("abcdefg", k=100)) for n in range(40)]
    (tmp_path / "r.jsonl").write_text(lines(lambda n: {"text": texts[n]}))
    cfg = config(tmp_path / "r.jsonl", tiny_llama, None, max_length=16)
    _, rows = rows_of(cfg)
    ids = [row.input_ids for _, row in rows]
    first = ids[0] + [token for row in ids[1:] for token in row[1:]]
    wanted = tokenizer(texts[0] + END)["input_ids"]
    assert first[: len(wanted)] == wanted  # each row begins with the last token of the one before
    assert all(row.labels == row.input_ids for _, row in rows)
    assert not any(row.truncated for _, row in rows)


def test_words_and_texts_that_are_shown_have_something_between_them(tmp_path, tiny_llama, tiny_bert):
    kinds = {
        "words": ({"tokens": ["EU", "calls"], "tags": ["B", "O"]}, "EU | calls -> B O"),
        "pair": ({"premise": "a b", "hypothesis": "c", "label": "x"}, "a b | c -> x"),
        "texts": ({"anchor": "a b", "positive": "c"}, "a b | c"),
    }
    for name, (record, wanted) in kinds.items():
        others = [record | ({"label": "y"} if "label" in record and n % 2 else {}) for n in range(4)]
        (tmp_path / f"{name}.jsonl").write_text(lines(lambda n, others=others: others[n] | {"id": n}, 4))
        given = {"validation_fraction": 0, "test_fraction": 0}
        task, rows = rows_of(config(tmp_path / f"{name}.jsonl", tiny_llama, None, **given))
        tokenizer = load_tokenizer(tiny_llama, False, None)
        text = rendered(vars(rows[0][1]), tokenizer, task).plain
        assert text.replace(tokenizer.eos_token or "", "").replace(tokenizer.bos_token or "", "") == wanted


# --- the command itself


def test_the_command_on_files_of_several_shapes(cluster, tmp_path, tiny_llama, tokenizer, template, capsys):
    datasets.DatasetDict(
        train=datasets.Dataset.from_list([CHATS["openai with tools"][0](n) for n in range(30)]),
        test=datasets.Dataset.from_list([CHATS["openai with tools"][0](n) for n in range(30, 36)]),
    ).save_to_disk(tmp_path / "saved")
    (tmp_path / "dolly.jsonl.gz").write_bytes(gzip.compress(lines(PAIRS["instruction, context, response"][0]).encode()))
    source = [str(tmp_path / "saved"), str(tmp_path / "dolly.jsonl.gz")]
    cfg = config(source, tiny_llama, template, cache=str(tmp_path / "cache"))
    assert run_preprocess(cfg) == 0
    printed = capsys.readouterr().out
    assert "shape in data.source: messages (messages, tools): 30 records" in printed
    assert "shape in data.source: instruction/response (instruction, response, context): 40 records" in printed
    assert "ignored in data.source: parallel_tool_calls" in printed
    data = TokenizedData.load(printed.split("shards ")[1].strip())
    assert (data.splits["test"].records, data.task.template) == (6, "chat")
    assert data.task.chat_template == TEMPLATE
    learnt = {tokenizer.decode([label for label in row["labels"] if label != IGNORE]) for row in data.rows("train")}
    assert learnt <= {f"r{END}", *(f"{CALL}{END}It is {n}.{END}" for n in range(30))}
    assert TaskSpec.of(json.loads((Path(data.directory) / "manifest.json").read_text())["task"]) == data.task


def test_what_is_written_down_of_a_template_is_what_the_records_got(cluster, tiny_llama, tmp_path):
    """Texts alone are continued as they are and turns go by the chat template, whatever was to become of prompts."""
    turns = [{"role": "user", "content": "{}"}, {"role": "assistant", "content": "a"}]
    kinds = {
        "text": ("auto", {"text": "the cat {} sat"}, "{prompt}"),
        "turns": ("Q {prompt}", {"messages": turns}, "chat"),
        "prompts": ("Q {prompt}", {"prompt": "{}", "completion": "a"}, "Q {prompt}"),
    }
    for name, (template, record, wanted) in kinds.items():
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps(record).replace("{}", str(i)) + "\n" for i in range(60)))
        cfg = DataConfig(source=str(source), template=template, cache=str(tmp_path / "shards"))
        assert prepare(cfg, tiny_llama).task.template == wanted


@pytest.mark.parametrize("key", ["weights", "sample_weight", "loss_weights", "response"])
def test_what_would_change_what_is_learnt_is_not_left_out(key):
    record = {"instruction": "a", "output": "b", key: [0, 1] if key.endswith("s") else "0"}
    with pytest.raises(UserError, match=key):
        parse(record, "here")


def test_a_second_conversation_is_not_left_out_but_the_same_in_other_words_is():
    said = ["hi", "hello"]
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
    other = [{"from": role, "value": text} for role, text in zip(("human", "gpt"), said, strict=True)]
    assert parse({"messages": turns, "conversations": other, "turns": 2}, "here").messages[1].text == "hello"
    with pytest.raises(UserError, match="conversations would be lost"):
        parse({"messages": turns, "conversations": [*other[:1], {"from": "gpt", "value": "go away"}]}, "here")


def test_what_is_cut_is_told_with_its_share_and_the_longest_of_all(cluster, tiny_llama, tokenizer, tmp_path, capsys):
    """By the lengths that the tokenizer gives for whole records, of several tasks."""
    draw = random.Random(4)
    texts = [" ".join(draw.choices("abcdef", k=draw.randint(3, 12))) for _ in range(60)]
    texts[37] = " ".join("abcdef" * 9)
    kinds = {
        "pairs": (lambda text: {"prompt": text, "completion": "z"}, lambda text: f"{text}\nz{END}"),
        "labels": (lambda text: {"text": text, "label": "ab"["f" in text]}, str),
    }
    for name, (record, whole) in kinds.items():
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps(record(text)) + "\n" for text in texts))
        lengths = [len(tokenizer(whole(text))["input_ids"]) for text in texts]
        flags = {"--data": source, "--model": tiny_llama, "--data.max_length": 17, "--data.test_fraction": 0}
        flags |= {"--data.validation_fraction": 0, "--data.template": RAW, "--data.cache": tmp_path / "cache"}
        assert main(["preprocess", *(str(part) for pair in flags.items() for part in pair)]) == 0
        cut = [length for length in lengths if length > 17]
        assert (
            f"{len(cut)} truncated ({100 * len(cut) / 60:.3g} %; the longest, {source}:38, has {max(lengths)} tokens)"
        ) in capsys.readouterr().out
    assert (
        main(["preprocess", *(str(p) for pair in (flags | {"--data.max_length": "auto"}).items() for p in pair)]) == 0
    )
    printed = capsys.readouterr().out
    assert f"data.max_length {max(lengths)}: of 60 records 99.9% have at most {max(lengths)} tokens" in printed
    assert "0 truncated\n" in printed
