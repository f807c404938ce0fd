import json
import re
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftray.config import DataConfig
from ftray.data import json_records, sources
from ftray.data.formats import Chunk, read_chunk
from ftray.data.sources import content_stamp, find_chunks, is_small, read_for_check
from ftray.errors import UserError

RECORDS = [{"input": f"{n} ü", "output": str(n * n)} for n in range(7)]


def read_all(source) -> list[tuple[str, dict]]:
    return [(str(place), record) for chunk in find_chunks(str(source)) for place, record in read_chunk(chunk)]


def jsonl(records) -> str:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


def test_every_file_format_gives_the_same_records(tmp_path):
    files = {name: tmp_path / f"r.{name}" for name in ("jsonl", "json", "csv", "parquet")}
    files["jsonl"].write_text("\n" + jsonl(RECORDS))  # blank lines are none of the data
    files["json"].write_text(json.dumps(RECORDS))
    files["csv"].write_text("input,output\n" + "".join(f"{r['input']},{r['output']}\n" for r in RECORDS))
    pq.write_table(pa.Table.from_pylist(RECORDS), files["parquet"], row_group_size=3)
    for path in files.values():
        assert [record for _, record in read_all(path)] == RECORDS, path
    assert len(find_chunks(str(files["parquet"]))) == 3
    assert [place for place, _ in read_all(files["jsonl"])] == [f"{files['jsonl']}:{n + 2}" for n in range(7)]
    assert [place for place, _ in read_all(files["csv"])] == [f"{files['csv']}:{n + 2}" for n in range(7)]
    assert [place for place, _ in read_all(files["parquet"])] == [f"{files['parquet']}[{n}]" for n in range(7)]


@pytest.mark.parametrize(
    ("text", "records"),
    [
        (json.dumps({"data": RECORDS}), RECORDS),
        (jsonl(RECORDS), RECORDS),
        (
            json.dumps({"messages": [{"role": "user", "content": "a"}]}),
            [{"messages": [{"role": "user", "content": "a"}]}],
        ),
    ],
)
def test_json_files_hold_a_list_under_data_or_lines_or_one_record(tmp_path, text, records):
    (tmp_path / "r.json").write_text(text)
    assert [record for _, record in read_all(tmp_path / "r.json")] == records


def test_a_folder_is_read_in_the_order_of_its_names_without_hidden_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "b" / "x y.JSONL").write_text(jsonl(RECORDS[3:]))
    (tmp_path / "a.json").write_text(json.dumps(RECORDS[:3]))
    (tmp_path / ".cache" / "z.jsonl").write_text("{broken")
    (tmp_path / "readme.txt").write_text("not data")
    assert [record for _, record in read_all(tmp_path)] == RECORDS
    # the same folder as a URI, as s3:// and gs:// are read
    assert [record for _, record in read_all(tmp_path.as_uri())] == RECORDS
    assert read_all(tmp_path.as_uri())[3][0] == f"{tmp_path.as_uri()}/b/x%20y.JSONL:1"


@given(
    lines=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), min_size=1, max_size=12),
    size=st.integers(1, 60),
    last_newline=st.booleans(),
)
def test_chunks_of_any_size_give_every_line_once_with_its_number(lines, size, last_newline):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "r.jsonl"
        text = "\n\n".join(json.dumps({"text": line}, ensure_ascii=False) for line in lines)
        path.write_bytes((text + "\n" * last_newline).encode())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sources, "CHUNK_BYTES", size)
            chunks = find_chunks(str(path))
        assert sum(c.bytes for c in chunks) == path.stat().st_size
        found = [(str(place), record["text"]) for chunk in chunks for place, record in read_chunk(chunk)]
        assert found == [(f"{path}:{2 * n + 1}", line) for n, line in enumerate(lines)]


def test_large_sources_are_checked_in_part(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    path.write_text(jsonl([{"text": str(n)} for n in range(1500)]))
    assert len(list(read_for_check(find_chunks(str(path))))) == 1500
    monkeypatch.setattr(sources, "CHECKED_BYTES", 1000)
    assert len(list(read_for_check(find_chunks(str(path))))) == 1000
    assert not is_small([Chunk("hub", "a/b", bytes=None)])


def test_cmudict_is_words_spelt_out_to_phonemes():
    records = {record["input"]: record["output"] for _, record in read_all("cmudict")}
    assert records["f r i s b i e"] == "F R IH1 S B IY0"
    assert records["t o m a t o"] == "T AH0 M EY1 T OW2"  # the first of two pronunciations
    assert len(records) == len(read_all("cmudict")) > 100_000
    assert all(set(word) <= set("abcdefghijklmnopqrstuvwxyz ") for word in records)


def test_hub_data_sets_are_read_in_shards(tmp_path):
    # what `datasets` takes for a hub id it takes for a directory too, and that needs no network
    for n in range(3):
        (tmp_path / f"train-{n}.jsonl").write_text(jsonl(RECORDS[n * 2 : n * 2 + 2]))
    chunks = sources.hub_splits(str(tmp_path))["train"]
    assert [(c.kind, c.start, c.end) for c in chunks] == [("hub", n, 3) for n in range(3)]
    assert [record for chunk in chunks for _, record in read_chunk(chunk)] == RECORDS[:6]
    assert content_stamp([replace(chunks[0], revision="a")]) != content_stamp([replace(chunks[0], revision="b")])


def test_the_stamp_follows_the_content(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(jsonl(RECORDS))
    before = content_stamp(find_chunks(str(path)))
    assert content_stamp(find_chunks(str(path))) == before
    path.write_text(jsonl(RECORDS[1:]))
    assert content_stamp(find_chunks(str(path))) != before


PLAIN = json.dumps(RECORDS[0]) + "\n"
BROKEN = {
    "json line": ("r.jsonl", PLAIN + "\n{'input': 1}\n", r"r\.jsonl:3: not valid JSON: Expecting property name"),
    "not an object": ("r.jsonl", PLAIN + "[1]\n", r"r\.jsonl:2: a record must be a JSON object, not list"),
    "not UTF-8": (
        "r.jsonl",
        PLAIN.encode() + b'{"a": "\xff"}\n',
        r"r\.jsonl:2: not valid JSON: not utf-8: name .* data\.encoding",
    ),
    "json file": ("r.json", "[\n{},\n{]", r"r\.json:3: not valid JSON"),
    "json of numbers": ("r.json", "[1]", r"r\.json\[0\]: a record must be a JSON object, not int"),
    "json scalar": ("r.json", '"x"', r"must hold a list of records, not str"),
    "csv with a field too many": ("r.csv", "input,output\na,b\nc,d,e\n", r"r\.csv:3: not as many fields"),
    "csv with a field too few": ("r.csv", "input,output\na\n", r"r\.csv:2: not as many fields"),
    "csv with an open quote": ("r.csv", 'input,output\n"a,b\n', r"not valid CSV"),
    "parquet": ("r.parquet", "PAR1 but not really", r"r\.parquet: can't be read"),
    "empty": ("r.jsonl", "", r"r\.jsonl: empty"),
    "no known suffix": ("r.docx", "hello", r"unknown format \.docx; known: \.jsonl, \.ndjson, \.json, \.csv"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named_with_the_line(tmp_path, case):
    name, content, message = BROKEN[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_all(path)


def test_broken_json_in_a_later_chunk_has_the_right_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 100)
    path = tmp_path / "r.jsonl"
    path.write_text(PLAIN * 40 + "{oops\n" + PLAIN * 40)
    assert len(find_chunks(str(path))) > 10
    with pytest.raises(UserError, match=r"r\.jsonl:41: not valid JSON"):
        read_all(path)


def test_missing_sources_name_what_is_near(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(PLAIN)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such file or folder; did you mean train\.jsonl\?"):
        find_chunks("data/trian.jsonl")
    with pytest.raises(UserError, match=r"no such file or folder; did you mean train\.jsonl\?"):
        find_chunks("data/train")  # might be a hub id, were there no such folder
    with pytest.raises(UserError, match=r"did you mean cmudict\?"):
        find_chunks("cmudit")
    with pytest.raises(UserError, match="no such file or folder"):
        find_chunks(f"file://{tmp_path}/nothing.jsonl")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(UserError, match=r"the folder holds no \.jsonl"):
        find_chunks("hollow")


def test_unreadable_sources_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="can't be read"):
        find_chunks("nosuch://bucket/data.jsonl")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match="data someone/something: no such file or folder, and can't be read from the hub"
    ):
        find_chunks("someone/something")
    gone = tmp_path / "r.jsonl"
    gone.write_text(PLAIN)
    chunks = find_chunks(str(gone))
    gone.unlink()  # as when rights or a network mount fail between check and reading
    with pytest.raises(UserError, match=r"r\.jsonl: can't be read"):
        list(read_chunk(chunks[0]))


# --- a JSON file, which is read piece by piece


def read_json(path) -> list:
    return [record for _, record in read_chunk(Chunk("json", str(path)))]


JSON_VALUES = st.recursive(
    st.none() | st.integers() | st.text(alphabet='ab"\\{}[],: é\u2028\n', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='a"}', max_size=2), inner, max_size=3),
    max_leaves=6,
)


@given(
    # but for `qas`, which holds records of its own
    records=st.lists(st.dictionaries(st.text(max_size=3).filter("qas".__ne__), JSON_VALUES, max_size=3), max_size=5),
    at_once=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    around=st.sampled_from(["", " \r\n\t"]),
    spoil=st.none() | st.tuples(st.integers(0, 200), st.sampled_from(["", "]", "[", "{", "}", ",", '"', "1", "\\"])),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_json_list_read_in_pieces_is_what_the_whole_says(
    tmp_path, monkeypatch, records, at_once, indent, ascii_only, around, spoil
):
    text = around + json.dumps(records, indent=indent, ensure_ascii=ascii_only) + around
    if spoil:
        place, sign = spoil
        text = text[:place] + sign + text[place + 1 :]
    path = tmp_path / "r.json"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(json_records, "CHARACTERS", at_once)
    pieces = outcome(path)
    monkeypatch.setattr(json_records, "CHARACTERS", 10**6)
    assert pieces == outcome(path)
    try:
        known = json.loads(text)
    except ValueError as error:
        known = error
    if isinstance(pieces, list) and isinstance(known, list):
        assert pieces == known
    elif isinstance(known, list):  # what Python takes and ftray doesn't
        assert re.search(r"must be a JSON object|stands twice|half of a surrogate", pieces)
    elif isinstance(known, json.JSONDecodeError) and "Extra data" not in str(known):
        assert f"r.json:{known.lineno}: not valid JSON: {known.msg}" in pieces


def outcome(path):
    try:
        return read_json(path)
    except UserError as error:
        return str(error)


def test_json_is_read_without_its_whole_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "CHARACTERS", 2**14)
    records = [{"text": f"{n} " + "x" * 990} for n in range(6000)]
    (tmp_path / "list.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, records)))
    for name in ("list.json", "lines.json"):
        tracemalloc.start()
        count = sum(1 for _ in read_chunk(Chunk("json", str(tmp_path / name))))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 6000
        assert peak < 2**20  # the file has 6 MB
    (tmp_path / "list.json").write_text(json.dumps(records)[:-1] + ",\n {oops}]")
    with pytest.raises(UserError, match=r"list\.json:2: not valid JSON: Expecting property name"):
        read_json(tmp_path / "list.json")


def test_documents_of_a_folder_are_whole_where_there_are_enough(tmp_path):
    """One text file is cut so that some of it is left for validation; many are not."""
    documents = [f"Document {n}\nsays {n * n}.\nIt ends here.\n" for n in range(30)]
    for n, text in enumerate(documents):
        (tmp_path / f"{n:02}.txt").write_text(text)
    read = [record["text"] for chunk in find_chunks(str(tmp_path)) for _, record in read_chunk(chunk)]
    assert read == documents
    (tmp_path / "book.md").write_text("".join(documents) * 8)
    book = [record["text"] for chunk in find_chunks(str(tmp_path / "book.md")) for _, record in read_chunk(chunk)]
    assert 40 <= len(book) <= 60
    assert "".join(book) == "".join(documents) * 8


@pytest.mark.parametrize("source", ["", "/**/*.jsonl", "/*/*.jsonl"])
def test_splits_are_named_by_folders_too_and_found_by_a_glob(tmp_path, source):
    base = tmp_path / "test"  # what is above the source says nothing
    for split in ("train", "test"):
        (base / split).mkdir(parents=True)
        (base / split / "a.jsonl").write_text(jsonl([{"input": split, "output": "x"}]))
    found = sources.find_splits(f"{base}{source}", DataConfig())
    read = {split: [r["input"] for c in chunks for _, r in read_chunk(c)] for split, chunks in found.items()}
    assert read == {"train": ["train"], "test": ["test"]}


def test_a_glob_of_one_split_is_trained_on(tmp_path):
    for name in ("test-0", "test-1"):
        (tmp_path / f"{name}.jsonl").write_text(jsonl(RECORDS[:2]))
    assert set(sources.find_splits(f"{tmp_path}/test*.jsonl", DataConfig())) == {"train"}
