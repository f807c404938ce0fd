"""Several sources with weights, through the commands."""

import json
import random
import re
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from helpers import searches
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ftray.cli import main
from ftray.config import Config, DataConfig
from ftray.data import TokenizedData, pipeline, prepare, shards
from ftray.data.loader import batches
from ftray.data.ray_loader import training_batches
from ftray.evaluate import score, show
from ftray.reports import search as reports
from ftray.search.trial_worker import SearchContext
from ftray.storage.location import parse_location
from ftray.task_spec import IGNORE
from ftray.tune import prove


def write(path: Path, records: list[dict]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def spelt(n: int, seed: int) -> list[dict]:
    draw = random.Random(seed)
    words = [" ".join(draw.choices("abcdefgh", k=draw.randint(2, 9))) for _ in range(n)]
    return [{"input": word, "output": word.upper()} for word in words]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Pairs; a CSV of other names and two shapes of conversations in a folder with a test split of its own."""
    root = tmp_path_factory.mktemp("sources")
    (root / "b.csv").write_text("q;a;id\n" + "".join(f"what is {n};it is {n};{n}\n" for n in range(40)))
    turns = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}"}]}
        for n in range(25)
    ]
    turns += [{"instruction": f"tell {n}", "output": f"told {n}", "system": "be brief"} for n in range(25)]
    write(root / "c" / "train.jsonl", turns)
    write(root / "c" / "test.jsonl", [turns[0] | {"messages": [*turns[0]["messages"], *turns[1]["messages"]]}] * 3)
    return {"a": write(root / "a.jsonl", spelt(60, 1)), "b": str(root / "b.csv"), "c": str(root / "c")}


def mixture(files: dict[str, str]) -> list[dict]:
    return [
        {"source": files["a"], "weight": 2, "template": "{prompt} =\n", "validation_fraction": 0.3},
        {"source": files["b"], "weight": 0.5, "fields": {"prompt": "{{ q }}?", "completion": "a"}, "test_fraction": 0},
        {"source": files["c"]},
    ]


@pytest.fixture(scope="module")
def mixed(cluster, files, tiny_llama, tmp_path_factory) -> TokenizedData:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "ROW_GROUP_ROWS", 16)
        cfg = DataConfig(sources=mixture(files), max_length=64, cache=str(tmp_path_factory.mktemp("cache")))
        return prepare(cfg, tiny_llama)


def test_each_source_is_read_split_and_rendered_as_it_would_be_alone(mixed, files, tiny_llama, tmp_path):
    for one in mixture(files):
        alone = {name: value for name, value in one.items() if name != "weight"}
        data = prepare(DataConfig(**alone, max_length=64, cache=str(tmp_path)), tiny_llama)
        for split in data.splits:
            own = [row for row in mixed.rows(split) if row["source"] == one["source"]]
            assert len(own) == data.splits[split].records
            columns = ("input_ids", "labels", "prompt", "target")
            found, wanted = (
                [{name: row[name] for name in columns} for row in rows] for rows in (own, data.rows(split))
            )
            assert sorted(found, key=str) == sorted(wanted, key=str)
            of_split = mixed.splits[split].sources.get(one["source"])
            assert (of_split.tokens if of_split else 0) == data.splits[split].tokens
            assert (of_split.supervised_tokens if of_split else 0) == data.splits[split].supervised_tokens
    rows = mixed.rows("train")
    assert [row["key"] for row in rows] == sorted(row["key"] for row in rows)  # one random order of all
    assert {row["source"] for row in mixed.rows("test")} == {files["a"], files["c"]}
    assert TokenizedData.load(mixed.directory) == mixed


def test_other_weights_take_the_tokens_that_are_there(mixed, files, tiny_llama, monkeypatch):
    given = [one | {"weight": n + 0.5} for n, one in enumerate(mixture(files))]
    cache = str(Path(mixed.directory).parent)
    afresh = prepare(DataConfig(sources=given, max_length=64, cache=f"{cache}/afresh"), tiny_llama)
    monkeypatch.setattr(pipeline, "_write", None)  # nothing is tokenized
    other = prepare(DataConfig(sources=given, max_length=64, cache=cache), tiny_llama)
    assert other.fingerprint == afresh.fingerprint != mixed.fingerprint
    weights = {one["source"]: one["weight"] for one in given}
    assert {name: rows.weight for name, rows in other.splits["train"].sources.items()} == weights
    assert [other.rows(split) for split in other.splits] == [afresh.rows(split) for split in afresh.splits]
    assert mixed == TokenizedData.load(mixed.directory)
    monkeypatch.undo()
    cfg = DataConfig(sources=given, max_length=63, cache=cache)
    assert prepare(cfg, tiny_llama).tokens not in ("", mixed.tokens)


def test_ray_streams_the_order_of_a_mixture_and_goes_on_where_it_stood(mixed):
    """Each record as often as its source's weight says; two ranks, three epochs, resumed in the second."""
    train, rows, ranks, seed = mixed.splits["train"], 2, 2, 5
    sizes = {name: source.rows for name, source in train.sources.items()}
    a, b, c = (next(n for name, n in sizes.items() if name.endswith(end)) for end in ("a.jsonl", "b.csv", "c"))
    assert train.drawn == 2 * a + round(0.5 * b) + c
    last = 3 * train.drawn // (rows * ranks) * rows * ranks
    middle = last // (2 * rows * ranks) * rows * ranks

    def streamed(first: int, rank: int) -> list[list[int]]:
        stream = training_batches(mixed, seed, first, last, rows, rank, ranks)
        return [batch["input_ids"][0].tolist() for batch in stream]

    for rank in range(ranks):
        whole = streamed(0, rank)
        assert whole == [
            batch["input_ids"][0].tolist()
            for batch in islice(batches(mixed, seed, 0, rows, rank, ranks), last // (rows * ranks))
        ]
        assert streamed(middle, rank) == whole[middle // (rows * ranks) :]


def preprocessed(capsys, *flags: str) -> tuple[int, str, str]:
    code = main(["preprocess", *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_preprocess_tells_what_each_source_holds_and_how_often_it_is_drawn(
    cluster, files, tiny_llama, tmp_path, capsys
):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"data": {"sources": mixture(files), "cache": str(tmp_path / "cache")}}))
    code, out, _ = preprocessed(capsys, "--config", str(path), "--model", tiny_llama)
    assert code == 0
    data = TokenizedData.load(out.rsplit("shards ", 1)[1].strip())
    train = data.splits["train"]
    for name, weight in (("a", 2), ("b", 0.5), ("c", 1)):
        of_train = [row for row in data.rows("train") if row["source"] == files[name]]
        tokens = sum(len(row["input_ids"]) for row in of_train)
        learnt = sum(label != IGNORE for row in of_train for label in row["labels"])
        drawn = round(weight * len(of_train))
        assert (
            f"  of {files[name]}: {len(of_train)} records, {tokens} tokens ({learnt} supervised); weight {weight:g}: "
            f"an epoch draws {drawn}, {drawn / train.drawn:.0%} of its records"
        ) in out
    assert f"shape in {files['a']}: input/output (input, output): 60 records" in out
    assert f"shape in {files['b']}: prompt/completion (prompt, completion): 40 records" in out
    assert f"ignored in {files['b']}: id" in out
    assert f"shape in {files['c']}: messages (messages): 25 records" in out
    assert f"shape in {files['c']}: instruction (instruction, output, system): 25 records" in out
    assert f"shape in {files['c']}, test: messages (messages): 3 records" in out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[{source: A, weigth: 2}]", "unknown key data.sources[0].weigth; did you mean weight?"),
        ("[{source: A, weight: 0}]", "data.sources[0].weight: must be greater than 0 (got 0)"),
        (
            "[{source: B}, {source: A, weight: .nan}]",
            "data.sources[1].weight: must be a finite number (got nan)",
        ),
        ("[{weight: 1}]", "data.sources[0].source: is missing"),
        ("[{source: A}, {source: A}]", "data: sources: A stands twice: give it one weight"),
        ("[{source: A, template: hi}]", "data.sources[0]: template must hold {prompt}, or be auto"),
        (
            "[{source: A, encoding: latin-one}]",
            "data.sources[0]: encoding latin-one: Python knows no encoding of text of that name",
        ),
        ("[3]", "data.sources[0]: must be a mapping of names to values (got 3)"),
        ("[{source: A}, {source: C/empty.jsonl}]", "data C/empty.jsonl: empty"),
        ("[{source: A}, {source: C/blank.jsonl}]", "data C/blank.jsonl: holds no record"),
        ("[{source: A}, {source: C/none.jsonl}]", "data C/none.jsonl: no such file or folder"),
        ("[{source: A}, {source: B}]", "B:2: record with keys q, a, id; known shapes:"),
    ],
)
def test_mixtures_that_are_refused(given, message, files, tiny_llama, tmp_path, capsys):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n \n")

    def named(text: str) -> str:
        paths = {"A": files["a"], "B": files["b"], "C": str(tmp_path)}
        return re.sub(r"\b[ABC]\b", lambda letter: paths[letter[0]], text)

    code, _, error = preprocessed(capsys, "--data.sources", named(given), "--model", tiny_llama)
    assert code == 2
    assert named(message) in error
    assert error.count("\n") == 1


def test_a_source_and_a_mixture_do_not_go_together_but_a_flag_takes_the_place_of_a_file(files, tmp_path, capsys):
    both = ("--data", files["a"], "--data.sources", f"[{{source: {files['c']}}}]")
    code, _, error = preprocessed(capsys, *both)
    assert code == 2
    assert "data: source and sources both say what is trained on: give one of them" in error

    def config(*flags: str) -> DataConfig:
        assert main(["config", *flags]) == 0
        (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
        return DataConfig(**yaml.safe_load((tmp_path / "run.yaml").read_text())["data"])

    written = config(*both[2:])
    again = config("--config", str(tmp_path / "run.yaml"))
    assert again == written
    assert (again.source, again.names, [one.source for one in again.sources]) == (files["c"], files["c"], [files["c"]])
    other = config("--config", str(tmp_path / "run.yaml"), "--data", files["a"])
    assert (other.source, other.sources) == (files["a"], [])
    back = config("--config", str(tmp_path / "run.yaml"), *both[2:])
    assert (back.source, [one.source for one in back.sources]) == (files["c"], [files["c"]])


def test_the_fingerprint_of_one_source_is_that_of_before_there_were_mixtures(files, tokenizer, monkeypatch):
    cfg = DataConfig(source=files["a"])
    kept: list[dict] = []
    monkeypatch.setattr(pipeline.json, "dumps", lambda parts, **_: kept.append(parts) or "")
    pipeline.fingerprint_of(cfg, pipeline.find_sources(cfg), tokenizer, "CAUSAL_LM")
    monkeypatch.undo()
    assert "sources" not in kept[0]["settings"]


def loss_of(model, rows: list[dict]) -> float:
    """Mean loss of the supervised tokens of some rows, one row a forward pass."""
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum").item()
        count += int((labels != IGNORE).sum())
    return total / count


def test_the_proof_and_evaluate_tell_the_loss_of_each_source(mixed, files, tiny_llama, tmp_path, capsys):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    rows = {name: [row for row in mixed.rows("test") if row["source"] == name] for name in (files["a"], files["c"])}
    before = {name: loss_of(model, own) for name, own in rows.items()}
    adapter = tmp_path / "best" / "adapter"
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    adapted.save_pretrained(adapter)
    after = {name: loss_of(adapted, own) for name, own in rows.items()}

    told = {"model": {"name": tiny_llama, "dtype": "fp32"}, "data": {"sources": mixture(files)}, "task": "CAUSAL_LM"}
    cfg = Config.model_validate({**told, "evaluation": {"generate": False}})
    context = SearchContext(cfg, tiny_llama, mixed.directory, 0.0)
    proof = prove(context, parse_location(str(tmp_path)))
    assert context.budget() == mixed.splits["train"].drawn
    assert {name: found["records"] for name, found in proof["sources"].items()} == {n: len(o) for n, o in rows.items()}
    reports.show([], proof, cfg, parse_location(str(tmp_path)))
    printed = capsys.readouterr().out
    result = score(cfg, tiny_llama, mixed, {"one": str(adapter)})
    show(result)
    shown = capsys.readouterr().out
    for name, own in rows.items():
        assert proof["sources"][name]["base"] == pytest.approx(before[name], rel=1e-4)
        assert proof["sources"][name]["best"] == pytest.approx(after[name], rel=1e-4)
        assert result["sources"][name]["base"] == pytest.approx(before[name], rel=1e-4)
        assert result["sources"][name]["adapters"]["one"]["best"] == pytest.approx(after[name], rel=1e-4)
        for said in (printed, shown):
            assert f"loss, {len(own)} of" in said
            assert f"{before[name]:.4g}" in said


@pytest.mark.slow
def test_a_search_over_a_mixture_leaves_the_loss_of_each_source(cluster, files, tiny_llama, tmp_path):
    output, given = tmp_path / "out", json.dumps(mixture(files))
    command = searches.command(output, "", tiny_llama, "--data.sources", given, "--trials", "2", steps=8)
    at = command.index("--data")
    done = searches.run_here([*command[:at], *command[at + 2 :]])
    assert done.returncode == 0, done.stderr
    by_source = json.loads((output / "summary.json").read_text())["proof"]["sources"]
    card = (output / "best" / "adapter" / "README.md").read_text()
    for name in (files["a"], files["c"]):
        assert f"| loss, {by_source[name]['records']} records of {name} |" in card
    kept = json.loads((output / "data.json").read_text())["train"]["sources"]
    assert [source["weight"] for source in kept.values()] == [2, 0.5, 1]
    assert [*kept] == [*files.values()]
