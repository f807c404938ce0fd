"""Files as other tools leave them, what preprocess shows of them, and prompts out of any of them."""

import json
import re
from dataclasses import asdict

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import gpt2, make_tokenizer
from pyarrow import CompressedOutputStream
from tokenizers.processors import TemplateProcessing

from ftray.cli import main
from ftray.config import DataConfig, config_from
from ftray.data import DataCheck, prepare
from ftray.data.formats import read_chunk
from ftray.data.inference import read_records
from ftray.data.limits import within_positions
from ftray.data.sources import find_chunks
from ftray.errors import UserError
from ftray.reports.data import marked, rendered
from ftray.task_spec import TaskSpec
from ftray.tasks.infer_task import infer_task

ROWS = [{"prompt": "a b", "completion": "x", "n": 1}, {"prompt": "c", "completion": None, "n": 2}]


def records_of(source) -> list[dict]:
    return [record for chunk in find_chunks(str(source)) for _, record in read_chunk(chunk)]


@pytest.mark.parametrize("orient", ["columns", "index", "split", "table", "records"])
def test_every_json_that_pandas_writes_is_its_rows(tmp_path, orient):
    pd.DataFrame(ROWS).to_json(tmp_path / "r.json", orient=orient)
    assert records_of(tmp_path / "r.json") == ROWS


def test_objects_that_only_look_like_a_table_are_records(tmp_path):
    for record in ({"translation": {"en": "a", "fr": "b"}}, {"meta": {}, "text": "a"}, {"columns": "a", "data": "b"}):
        (tmp_path / "r.json").write_text(json.dumps(record))
        assert records_of(tmp_path / "r.json") == [record]


def test_files_that_tell_of_others_are_no_records(tmp_path):
    for name in ("dataset_info.json", "state.json", "dataset_infos.json"):
        (tmp_path / name).write_text(json.dumps({"features": {}, "splits": {"train": {}}}))
    (tmp_path / "README.md").write_text("# what it is")
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    for source in (tmp_path, f"{tmp_path}/*"):
        assert records_of(source) == ROWS[:1]
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "b.txt").write_text("a book")
    assert records_of(tmp_path) == [{"text": "a book"}]
    (tmp_path / "b.txt").unlink()
    (tmp_path / "guide.md").write_text("a guide")
    assert sorted(record["text"] for record in records_of(tmp_path)) == ["# what it is", "a guide"]


def test_a_name_among_the_sources_is_one_of_weight_one():
    named, whole = (config_from({"data": {"sources": given}}).data for given in (["a"], [{"source": "a"}]))
    assert named == whole
    assert named.source == "a"


def similar(tmp_path, records) -> str:
    path = tmp_path / "stsb.csv"
    pd.DataFrame(records).to_csv(path, index=False)
    return str(path)


def test_scores_of_pairs_are_no_classes_and_the_line_that_is_proposed_reads_them(tmp_path, tiny_bert, tokenizer):
    records = [{"sentence1": f"a {n}", "sentence2": f"b {n}", "label": n / 8} for n in range(40)]
    table = tmp_path / "stsb.parquet"
    pq.write_table(pa.Table.from_pylist(records), table)
    for source in (str(table), similar(tmp_path, records)):
        cfg = config_from({"data": {"source": source}, "model": {"name": tiny_bert}})
        check = DataCheck(cfg.data)
        with pytest.raises(UserError, match=r"label is 0.125, a score and no class: .*--data.fields") as refused:
            check.run(tokenizer, infer_task(cfg, tiny_bert, check.first).task)
        (fields,) = re.findall(r"--data.fields '(.*)'", str(refused.value))
        read = cfg.model_copy(update={"data": DataConfig(source=source, fields=fields, cache=str(tmp_path / "cache"))})
        check = DataCheck(read.data)
        task = infer_task(read, tiny_bert, check.first).task
        assert task == "FEATURE_EXTRACTION"
        check.run(tokenizer, task)
        data = prepare(read.data, tiny_bert, task=task)
        scores = {row["prompt"]: row["score"] for split in data.splits for row in data.rows(split)}
        assert scores == pytest.approx({f"a {n}": n / 40 for n in range(40)})


def test_a_length_beyond_what_the_model_takes_is_said(capsys):
    given = DataConfig(max_length=600)
    assert within_positions(given, gpt2(), 12) is given
    assert capsys.readouterr().out == (
        "data.max_length 600: the model takes 512 tokens, 12 of them for the adapter's own: a record that is longer is "
        "refused: take 500, which cuts it\n"
    )
    within_positions(DataConfig(max_length=500), gpt2(), 12)
    assert capsys.readouterr().out == ""


def test_preprocess_refuses_what_the_model_has_no_positions_for(cluster, tmp_path, tiny_gpt2, capsys):
    (tmp_path / "r.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n} " * 700, "completion": "b"}) + "\n" for n in range(5))
    )
    given = ["--data", str(tmp_path / "r.jsonl"), "--model", tiny_gpt2, "--data.cache", str(tmp_path / "cache")]
    assert main(["preprocess", *given, "--data.max_length", "4000"]) == 2
    printed = capsys.readouterr()
    assert "data.max_length 4000: the model takes 512 tokens" in printed.out
    assert "but the model has 512 positions: take 512" in printed.err
    assert main(["preprocess", *given, "--data.max_length", "512", "--show", "0"]) == 0


# --- what preprocess shows

WITH_TYPES = TemplateProcessing(
    single="<|user|> $A <|end|>",
    pair="<|user|> $A <|end|> $B:1 <|end|>:1",
    special_tokens=[("<|user|>", 2), ("<|end|>", 0)],
)
# task, record, what is shown of it without special tokens, and with them
SHOWN = {
    "words": (
        "TOKEN_CLS",
        {"tokens": ["the", "cat9", "sat"], "tags": ["O", "B", "O"]},
        "[[the]] | [[c]]at9 | [[sat]][[ -> O B O]]",
        "<|user|>[[the]] | [[c]]at9 | [[sat]]<|end|>[[ -> O B O]]",
    ),
    "pair": (
        "SEQ_CLS",
        {"premise": "the\ncat", "hypothesis": "a mat", "label": "B"},
        "the\ncat | a mat[[ -> B]]",
        "<|user|>the\ncat<|end|> | a mat<|end|>[[ -> B]]",
    ),
    "one text of two lines": ("SEQ_CLS", {"text": "the\ncat", "label": "B"}, "the\ncat[[ -> B]]", None),
    "answer": (
        "QUESTION_ANS",
        {"question": "who", "context": "the cat sat", "answers": ["cat"]},
        "who | the cat sat[[ -> cat]]",
        "<|user|>who<|end|> | the cat sat<|end|>[[ -> cat]]",
    ),
    "triplet": (
        "FEATURE_EXTRACTION",
        {"anchor": "a", "positive": "b", "negative": "c"},
        "a | b | c",
        "<|user|>a<|end|> | <|user|>b<|end|> | <|user|>c<|end|>",
    ),
    "score": (
        "FEATURE_EXTRACTION",
        {"sentence1": "a", "sentence2": "b", "score": 0.5},
        "a | b[[ -> 0.5]]",
        "<|user|>a<|end|> | <|user|>b<|end|>[[ -> 0.5]]",
    ),
}


@pytest.mark.parametrize("kind", SHOWN)
def test_words_and_texts_of_a_record_are_shown_apart(kind):
    name, record, *wanted = SHOWN[kind]
    task = TaskSpec(name, ("B", "O")).load()
    for shown, processor in zip(wanted, (None, WITH_TYPES), strict=True):
        tokenizer = make_tokenizer()
        if processor:
            tokenizer.backend_tokenizer.post_processor = processor
        (tokens,) = task.tokenize([task.parse(record, "here")], tokenizer, DataConfig(max_length=64))
        assert shown in (marked(rendered(asdict(tokens), tokenizer, name)), None)


def test_a_context_in_parts_is_shown_beside_its_question():
    task, tokenizer = TaskSpec("QUESTION_ANS").load(), make_tokenizer()
    record = {"question": "who", "context": "a b c d e f g " * 9 + "the cat", "answers": ["the cat"]}
    (tokens,) = task.tokenize([task.parse(record, "here")], tokenizer, DataConfig(max_length=30))
    shown = marked(rendered(asdict(tokens), tokenizer, "QUESTION_ANS"))
    assert re.fullmatch(r"who \| [a-g ]+ the cat\[\[ -> the cat\]\]", shown)


# --- prompts


def test_prompts_come_from_every_file_that_training_takes(tmp_path):
    prompts = [{"prompt": f"a {n}"} for n in range(3)]
    lines = "".join(json.dumps(record) + "\n" for record in prompts)
    pq.write_table(pa.Table.from_pylist(prompts), tmp_path / "p.parquet")
    pd.DataFrame(prompts).to_csv(tmp_path / "p.csv", index=False)
    (tmp_path / "p.json").write_text(json.dumps(prompts))
    (tmp_path / "p.ndjson").write_text(lines)
    for name, text in (("p.jsonl.gz", lines), ("q.txt.zst", "a 0\n\na 1\na 2")):
        with CompressedOutputStream(
            str(tmp_path / name), name.rpartition(".")[2].replace("gz", "gzip").replace("zst", "zstd")
        ) as file:
            file.write(text.encode())
    for name in ("p.parquet", "p.csv", "p.json", "p.ndjson", "p.jsonl.gz", "q.txt.zst"):
        assert [record for _, record in read_records(str(tmp_path / name))] == prompts, name
    (tmp_path / "s.csv").write_bytes("prompt;x\n\xe4;1\n".encode("cp1252"))
    assert [record for _, record in read_records(str(tmp_path / "s.csv"), DataConfig(encoding="cp1252"))] == [
        {"prompt": "ä", "x": "1"}
    ]
