import hashlib
import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.file_reads import opens

from ftray.config import Config, DataConfig, config_from
from ftray.data import DataCheck, TokenizedData, pipeline, prepare, shards, sources
from ftray.data.records import Example
from ftray.data.splits import needed, order_key, require, split_of
from ftray.data.tokens import tokenize
from ftray.errors import UserError
from ftray.preprocess import run as run_preprocess
from ftray.reports.data import describe
from ftray.search.run_manifest import write_data
from ftray.search.space import load_space
from ftray.task_spec import IGNORE, RAW


@pytest.fixture(scope="module", autouse=True)
def on_ray():
    """All tests here go through Ray Data, as many records would; those that compare the two say so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "LOCAL_BYTES", -1)
        yield


def write(path: Path, records) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def some_records(n: int, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)
    letters = [draw.choices("abcdefgh", k=draw.randint(2, 9)) for _ in range(n)]
    return [{"input": " ".join(word), "output": "".join(word).upper()} for word in letters]


def settings(tmp_path, source: str, **changes) -> DataConfig:
    return DataConfig(
        **{"source": source, "cache": str(tmp_path / "cache"), "max_length": 64, "template": RAW} | changes
    )


def inputs(data: TokenizedData, split: str) -> list[str]:
    return [row["prompt"].removesuffix("\n") for row in data.rows(split)]


def bytes_of(data: TokenizedData) -> dict[str, str]:
    root = Path(data.directory)
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*.parquet")}


# --- which record goes where


def test_the_split_follows_the_content_not_the_position():
    cfg = DataConfig(validation_fraction=0.2, test_fraction=0.3)
    records = [{"text": str(n)} for n in range(4000)]
    splits = {r["text"]: split_of(r, cfg, "train") for r in records}
    shares = {name: sum(s == name for s in splits.values()) / 4000 for name in ("train", "validation", "test")}
    assert shares == pytest.approx({"train": 0.5, "validation": 0.2, "test": 0.3}, abs=0.03)  # 4 standard deviations
    assert split_of({"b": 1, "a": 2}, cfg, "train") == split_of({"a": 2, "b": 1}, cfg, "train")
    other = DataConfig(validation_fraction=0.2, test_fraction=0.3, seed=1)
    assert {split_of(r, other, "train") == splits[r["text"]] for r in records} == {True, False}
    # what `limit` takes has the shares of the whole
    limited = sorted(records, key=lambda r: order_key(r, 0))[:1000]
    assert sum(splits[r["text"]] == "train" for r in limited) / 1000 == pytest.approx(0.5, abs=0.07)


def test_text_with_lone_surrogates_has_a_key():
    assert order_key(json.loads('{"text": "\\ud800"}'), 0) != order_key({"text": "?"}, 0)


# --- the check before Ray starts


def test_check_passes_good_data_and_imports_no_ray(tmp_path, tiny_llama):
    source = write(tmp_path / "r.jsonl", some_records(60))
    code = (
        "import sys; from transformers import AutoTokenizer; from ftray.config import DataConfig\n"
        "from ftray.data import DataCheck; import ftray.data.loader\n"
        f"DataCheck(DataConfig(source={source!r})).run(AutoTokenizer.from_pretrained({tiny_llama!r}))\n"
        "assert 'ray' not in sys.modules; print('checked')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == "checked\n", result.stderr


def test_who_parses_records_imports_no_models():
    """A task of Ray Data, that is: it would take seconds to begin."""
    code = (
        "import sys; from ftray.task_spec import TASKS, TaskSpec; [TaskSpec(name).load() for name in TASKS]\n"
        "print({'transformers', 'peft', 'ray'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == "set()\n", result.stderr


GOOD = some_records(60)
WRONG = {
    "shape in line 61": ([*GOOD, {"foo": 1}], {}, r"r\.jsonl:61: record with keys foo"),
    "no record": ([], {}, "empty"),
    "validation empty": (
        GOOD[:1],
        {"test_fraction": 0},
        "validation split of 1 record.* is empty: raise data.validation_",
    ),
    "validation of almost nothing": (GOOD, {"validation_fraction": 1e-9}, "validation split of 60 .* is empty"),
    "test empty": (GOOD, {"test_fraction": 1e-9}, "test split of 60 .* is empty: raise data.test_fraction"),
    "all alike": (
        GOOD[:1] * 1001,
        {},
        r"of 1001 record\(s\), only 1 of them different, is empty: equal ones share a split: give more that differ, or",
    ),
    "limit too small": (GOOD, {"limit": 1}, "is left for training|split of 1 record.* is empty"),
    "nothing fits": (
        GOOD,
        {"max_length": 3, "overlong": "drop"},
        "no supervised token is left within max_length 3: raise",
    ),
    "chat": ([{"messages": [{"role": "a", "content": "b"}]}], {}, r"messages\[0\]\.role is 'a'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_check_refuses(tmp_path, tokenizer, case):
    records, changes, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        DataCheck(settings(tmp_path, write(tmp_path / "r.jsonl", records), **changes)).run(tokenizer)


def test_a_split_that_was_not_asked_for_is_missed_by_the_commands_that_need_it():
    """Training and searching do; to tokenize or to score all records needs none."""
    for split in ("validation", "test"):
        cfg = DataConfig(**{f"{split}_fraction": 0})
        assert split not in needed(cfg)
        with pytest.raises(UserError, match=rf"data\.{split}_fraction 0: why: raise it, or give data\.{split}"):
            require(split, cfg, "why")
        require(split, DataConfig(**{f"{split}_fraction": 0, split: "other.jsonl"}), "why")


def test_check_looks_at_explicit_validation_and_test_sources(tmp_path, tokenizer):
    source = write(tmp_path / "r.jsonl", GOOD)
    bad = write(tmp_path / "bad.jsonl", [{"x": 1}])
    good = write(tmp_path / "good.jsonl", GOOD[:1])
    blank = tmp_path / "blank.jsonl"
    blank.write_text("\n \n")
    for name in ("validation", "test"):
        with pytest.raises(UserError, match=r"bad\.jsonl:1: record with keys x"):
            DataCheck(settings(tmp_path, source, **{name: bad})).run(tokenizer)
        with pytest.raises(UserError, match=r"blank\.jsonl: holds no record"):
            DataCheck(settings(tmp_path, source, **{name: str(blank)})).run(tokenizer)
    fractions = {"validation_fraction": 0, "test_fraction": 0}
    DataCheck(settings(tmp_path, source, validation=good, test=good, **fractions)).run(tokenizer)


def test_check_of_a_part_does_not_conclude_about_the_whole(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "CHECKED_BYTES", 1000)
    monkeypatch.setattr(sources, "CHECKED_RECORDS", 20)
    source = write(tmp_path / "r.jsonl", some_records(300))
    DataCheck(settings(tmp_path, source, validation_fraction=0.002, test_fraction=0.002)).run(tokenizer)
    monkeypatch.undo()
    with pytest.raises(UserError, match="split of 300 record"):
        DataCheck(settings(tmp_path, source, validation_fraction=1e-9)).run(tokenizer)


# --- the pipeline


@pytest.fixture(scope="module")
def prepared(cluster, tiny_llama, tmp_path_factory):
    """300 records (7 of them twice) through the real pipeline, in several chunks and row groups."""
    root = tmp_path_factory.mktemp("prepared")
    records = some_records(293)
    records += records[:7]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "CHUNK_BYTES", 3000)
        patch.setattr(shards, "ROW_GROUP_ROWS", 16)
        patch.setattr(shards, "ROW_GROUPS_PER_FILE", 4)
        cfg = settings(root, write(root / "r.jsonl", records), validation_fraction=0.2, test_fraction=0.2)
        data = prepare(cfg, tiny_llama)
        yield cfg, records, data


def test_every_record_is_in_its_split_once_and_tokenized_as_alone(prepared, tokenizer):
    cfg, records, data = prepared
    for name, split in data.splits.items():
        expected = [r for r in records if split_of(r, cfg, "train") == name]
        expected.sort(key=lambda r: order_key(r, cfg.seed))
        rows = data.rows(name)
        assert [row["key"] for row in rows] == [order_key(r, cfg.seed) for r in expected]
        assert inputs(data, name) == [r["input"] for r in expected]
        alone = tokenize([Example(r["input"], r["output"]) for r in expected], tokenizer, cfg)
        for row, tokens in zip(rows, alone, strict=True):
            assert {k: row[k] for k in ("input_ids", "labels", "prompt", "target", "prompt_tokens")} == {
                k: getattr(tokens, k) for k in ("input_ids", "labels", "prompt", "target", "prompt_tokens")
            }
        lengths = sorted(len(t.input_ids) for t in alone)
        assert (split.records, split.tokens) == (len(expected), sum(lengths))
        assert split.supervised_tokens == sum(label != IGNORE for t in alone for label in t.labels)
        assert (split.lengths[0], split.lengths[-1]) == (lengths[0], lengths[-1])
        assert split.lengths[1] == pytest.approx(lengths[len(lengths) // 2], abs=1)
    assert sum(s.records for s in data.splits.values()) == 300


def test_row_groups_are_as_the_manifest_says(prepared):
    _, _, data = prepared
    for split in data.splits.values():
        files = [pq.ParquetFile(Path(data.directory) / name).metadata for name in split.files]
        groups = [f.row_group(g).num_rows for f in files for g in range(f.num_row_groups)]
        assert groups == split.row_groups
        assert set(split.row_groups[:-1]) <= {16}
    train = data.splits["train"]
    assert len(train.files) > 1
    assert data.row_group("train", 5, ["key"])["key"].to_pylist() == [r["key"] for r in data.rows("train")[80:96]]
    assert TokenizedData.load(data.directory) == data
    assert data.rows("train", 3) == data.rows("train")[:3]


def test_a_second_run_reuses_the_shards(prepared, tiny_llama, caplog, monkeypatch):
    cfg, _, data = prepared
    monkeypatch.setattr(pipeline, "_read", None)  # calling it would fail
    with caplog.at_level(logging.INFO, "ftray.data.pipeline"):
        assert prepare(cfg, tiny_llama) == data
    assert f"reusing the tokenized shards in {data.directory}" in caplog.text
    assert [p.name for p in Path(cfg.cache).iterdir()] == [data.fingerprint]  # nothing half-written is left


def test_the_fingerprint_follows_all_that_makes_the_tokens(prepared, tiny_llama, tokenizer, tmp_path):
    cfg, records, data = prepared

    def fingerprint(tok=tokenizer, **changes) -> str:
        changed = cfg.model_copy(update=changes)
        return pipeline.fingerprint_of(changed, pipeline.find_sources(changed), tok, "CAUSAL_LM")

    from ftray.models.load import load_tokenizer

    own = load_tokenizer(tiny_llama)
    assert fingerprint(own) == fingerprint(own, cache="elsewhere") == data.fingerprint
    other = load_tokenizer(tiny_llama)
    other.chat_template = "{{ messages }}"
    grown = load_tokenizer(tiny_llama)
    grown.add_tokens(["xyz"])
    changes = [
        {"max_length": 63},
        {"template": "{prompt} "},
        {"limit": 7},
        {"seed": 1},
        {"overlong": "drop"},
        {"train_on_prompt": True},
        {"test_fraction": 0.1},
        {"validation": cfg.source},
        {"source": write(tmp_path / "r.jsonl", records[1:])},
    ]
    found = [data.fingerprint, fingerprint(other), fingerprint(grown), *(fingerprint(own, **c) for c in changes)]
    assert len(set(found)) == len(found)


def test_shards_are_the_same_bytes_from_other_chunks_and_cluster_sizes(prepared, tiny_llama, tmp_path):
    """The same records in another order, in one chunk, on a cluster of another size."""
    _, records, data = prepared
    other = settings(
        tmp_path,
        write(tmp_path / "r.jsonl", random.Random(1).sample(records, len(records))),
        validation_fraction=0.2,
        test_fraction=0.2,
    )
    code = (
        "import ray; from ftray.config import DataConfig; from ftray.data import pipeline, prepare, shards\n"
        "shards.ROW_GROUP_ROWS, shards.ROW_GROUPS_PER_FILE, pipeline.LOCAL_BYTES = 16, 4, -1\n"
        "ray.init(address='local', num_cpus=1, include_dashboard=False, log_to_driver=False)\n"
        f"print(prepare(DataConfig.model_validate_json({other.model_dump_json()!r}), {tiny_llama!r}).directory)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    again = TokenizedData.load(result.stdout.splitlines()[-1])
    assert again.directory != data.directory
    assert bytes_of(again) == bytes_of(data)


@pytest.mark.parametrize(
    ("task", "changes"),
    [("CAUSAL_LM", {}), ("CAUSAL_LM", {"limit": 100}), ("SEQ_CLS", {}), ("CAUSAL_LM", {"validation": "v.jsonl"})],
    ids=str,
)
def test_few_records_give_the_same_in_this_process(cluster, tiny_llama, tmp_path, monkeypatch, task, changes):
    import ray.data

    monkeypatch.setattr(sources, "CHUNK_BYTES", 3000)
    records = some_records(200)
    if task == "SEQ_CLS":
        records = [{"text": record["input"], "label": n % 3} for n, record in enumerate(records)]
    cfg = settings(tmp_path, write(tmp_path / "r.jsonl", records), **changes | {"cache": str(tmp_path / "ray")})
    if "validation" in changes:
        cfg.validation = write(tmp_path / "v.jsonl", some_records(30, seed=1))
    by_ray = prepare(cfg, tiny_llama, task=task)
    monkeypatch.setattr(pipeline, "LOCAL_BYTES", sum(path.stat().st_size for path in tmp_path.glob("*.jsonl")))
    monkeypatch.setattr(ray.data, "from_items", None)  # calling it would fail
    here = prepare(cfg.model_copy(update={"cache": str(tmp_path / "here")}), tiny_llama, task=task)
    assert (here.splits, here.sources, here.task) == (by_ray.splits, by_ray.sources, by_ray.task)
    assert bytes_of(here) == bytes_of(by_ray)


def test_limit_takes_the_smallest_keys_and_explicit_sources_win(cluster, tiny_llama, tmp_path):
    records, held_out, last = some_records(80), some_records(9, seed=1), some_records(5, seed=2)
    data = prepare(
        settings(
            tmp_path,
            write(tmp_path / "r.jsonl", records),
            limit=30,
            validation=write(tmp_path / "v.jsonl", held_out),
            test=write(tmp_path / "t.jsonl", last),
        ),
        tiny_llama,
    )
    smallest = sorted(records, key=lambda r: order_key(r, 0))[:30]
    assert inputs(data, "train") == [r["input"] for r in smallest]
    assert sorted(inputs(data, "validation")) == sorted(r["input"] for r in held_out)
    assert sorted(inputs(data, "test")) == sorted(r["input"] for r in last)


def test_what_was_recognised_in_all_records_is_told(cluster, tiny_llama, tokenizer, tmp_path, monkeypatch):
    """Of each source: also what lies beyond the part that is checked, and beyond the first row group."""
    monkeypatch.setattr(shards, "ROW_GROUP_ROWS", 16)
    plain = [record | {"id": n, "kind": None, "system": None} for n, record in enumerate(some_records(50))]
    answer = {"role": "assistant", "content": "no", "weight": 0}
    turns = [{"role": "user", "content": "a", "name": "Al"}, answer, {"role": "assistant", "content": "b"}]
    chats = [{"messages": turns, "system": f"{n}", "kind": "k"} for n in range(7)]
    (tmp_path / "mixed").mkdir()
    for name, records in (("a.jsonl", plain), ("b.jsonl", chats)):
        write(tmp_path / "mixed" / name, records)
    pq.write_table(pa.Table.from_pylist(some_records(3, 1)), tmp_path / "held.parquet")
    cfg = settings(tmp_path, str(tmp_path / "mixed"), validation=str(tmp_path / "held.parquet"))
    data = prepare(cfg, tiny_llama)
    assert data == TokenizedData.load(data.directory)
    shown = describe(data).splitlines()
    assert [line for line in shown if line.startswith(("shape", "ignored"))] == [
        "shape in data.source: input/output (input, output): 50 records",
        "shape in data.source: messages (messages, system, messages[].weight): 7 records",
        "ignored in data.source: id, kind, messages[].name",
        "shape in data.validation: input/output (input, output): 3 records",
    ]
    rows = [row for split in data.splits for row in data.rows(split) if row["prompt"].startswith("<|system|>")]
    assert len(rows) == 7
    for row in rows:
        assert row["prompt"].endswith("<|user|>a<|end|><|assistant|>no<|end|><|assistant|>")
        assert tokenizer.decode([label for label in row["labels"] if label != IGNORE]) == "b<|end|>"


def test_one_source_of_one_shape_has_one_line_and_no_ignored_keys_none(prepared):
    _, _, data = prepared
    shown = [line for line in describe(data).splitlines() if line.startswith(("shape", "ignored"))]
    assert shown == ["shape: input/output (input, output): 300 records"]


def test_a_search_from_before_shapes_were_counted_goes_on(prepared, tmp_path, tiny_llama):
    """Its data.json holds these counts alone."""
    space, arguments = load_space("quick"), (tiny_llama, prepared[2], tmp_path)
    (tmp_path / "tune").mkdir()
    _, _, data = prepared
    fields = ("windows", "records", "tokens", "supervised_tokens", "lengths", "dropped", "truncated")
    old = {name: {field: split.to_json()[field] for field in fields} for name, split in data.splits.items()}
    (tmp_path / "data.json").write_text(json.dumps(old))
    write_data(Config(), space, *arguments)
    old["train"]["records"] += 1
    (tmp_path / "data.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="not what the search in"):
        write_data(Config(), space, *arguments)


def test_a_manifest_of_the_first_version_is_read_and_written_as_it_was(tmp_path):
    counts = {"records": 5, "tokens": 40, "supervised_tokens": 20, "lengths": [2, 8, 9, 9, 9]}
    train = {"files": ["train/00000.parquet"], "windows": [4, 1], **counts, "dropped": 1, "truncated": 2, "digest": "a"}
    read = {"train": {"shapes": {"text (text)": 5}, "ignored": ["id"]}}
    task = {"name": "CAUSAL_LM", "labels": [], "pad": 3}
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"fingerprint": "f", "task": task, "splits": {"train": train}, "read": read}))
    data = TokenizedData.load(tmp_path)
    assert data.splits["train"].row_groups == [4, 1]
    assert (data.sources["train"].shapes, data.sources["train"].ignored) == ({"text (text)": 5}, ["id"])
    path.unlink()
    data.save()
    written = json.loads(path.read_text())
    assert (written["splits"], written["read"]) == ({"train": train}, read)


def test_shards_say_how_many_row_groups_a_file_has(prepared, monkeypatch, tmp_path):
    """They were written with 4: another default since then changes nothing."""
    _, _, data = prepared
    rows = data.rows("train")
    monkeypatch.setattr(shards, "ROW_GROUPS_PER_FILE", 64)
    assert TokenizedData.load(data.directory).rows("train") == rows
    manifest = json.loads((Path(data.directory) / "manifest.json").read_text())
    assert manifest.pop("row_groups_per_file") == 4
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert TokenizedData.load(tmp_path).row_groups_per_file == 64  # as in all manifests that don't say


def test_dropped_and_truncated_records_are_counted(cluster, tiny_llama, tokenizer, tmp_path):
    records = some_records(80)
    source = write(tmp_path / "r.jsonl", records)
    lengths = [
        len(t.input_ids)
        for t in tokenize([Example(r["input"], r["output"]) for r in records], tokenizer, DataConfig(template=RAW))
    ]
    limit = sorted(lengths)[40]
    long = sum(n > limit for n in lengths)
    for overlong, field in (("drop", "dropped"), ("truncate", "truncated")):
        data = prepare(settings(tmp_path, source, max_length=limit, overlong=overlong), tiny_llama)
        counts = {f: sum(getattr(s, f) for s in data.splits.values()) for f in ("dropped", "truncated", "records")}
        assert counts[field] == long
        assert counts["records"] == 80 - counts["dropped"]
        assert max(s.lengths[-1] for s in data.splits.values()) == limit


@pytest.mark.parametrize("local", [-1, 2**22])
def test_errors_beyond_the_checked_part_come_out_as_user_errors(cluster, tiny_llama, tmp_path, monkeypatch, local):
    monkeypatch.setattr(pipeline, "LOCAL_BYTES", local)
    broken = tmp_path / "r.jsonl"
    broken.write_text(Path(write(tmp_path / "good.jsonl", GOOD)).read_text() + "{oops\n")
    cases = [
        (str(broken), {}, r"r\.jsonl:61: not valid JSON"),
        (write(tmp_path / "s.jsonl", [*GOOD, {"foo": 1}]), {}, r"s\.jsonl:61: record with keys foo"),
        (
            write(tmp_path / "k.jsonl", [*GOOD, GOOD[0] | {"label": False}]),
            {},
            r"k\.jsonl:61: label: .*--task KTO learns",
        ),
        (write(tmp_path / "g.jsonl", GOOD), {"max_length": 3, "overlong": "drop"}, "no supervised token is left"),
        (write(tmp_path / "g.jsonl", GOOD), {"validation_fraction": 1e-9}, "validation split of 60 record.* is empty"),
    ]
    for source, changes, message in cases:
        with pytest.raises(UserError, match=message) as raised:
            prepare(settings(tmp_path, source, **changes), tiny_llama)
        assert "\n" not in str(raised.value)
    assert list((tmp_path / "cache").iterdir()) == []


# --- how often a source is read


@pytest.mark.skipif(sys.platform != "linux", reason="inotify")
@pytest.mark.parametrize("checked", [2**26, 100])
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_preprocess_reads_a_source_once_to_check_and_once_to_tokenize(
    cluster, tiny_llama, tmp_path, monkeypatch, capsys, task, checked
):
    """In all processes together; also where the first pass ends before it has seen all classes."""
    monkeypatch.setattr(sources, "CHECKED_BYTES", checked)
    monkeypatch.setattr(sources, "CHECKED_RECORDS", 20)
    records = some_records(60)
    if task == "SEQ_CLS":
        records = [{"text": record["input"], "label": n // 20} for n, record in enumerate(records)]
    source = write(tmp_path / "r.jsonl", records)
    data = {"source": source, "cache": str(tmp_path), "max_length": 64}
    cfg = config_from({"data": data, "model": {"name": tiny_llama}})
    with opens(source) as count:
        assert run_preprocess(cfg) == 0
    assert count == [2]
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line.startswith("labels")] == (["labels: 0, 1, 2"] if task == "SEQ_CLS" else [])
