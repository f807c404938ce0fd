"""What `ftray preprocess` tells about a new file, and how groups of records are split."""

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

import ftray
from ftray.cli import run_command
from ftray.config import Config, DataConfig, config_from
from ftray.data import DataCheck, TokenizedData, duplicates, pipeline
from ftray.data.formats import read_chunk
from ftray.data.pipeline import fingerprint_of
from ftray.data.splits import find_sources, split_of
from ftray.errors import UserError
from ftray.preprocess import run as run_preprocess
from ftray.search import reference
from ftray.task_spec import IGNORE

USERS, EACH = 40, 5


def write(path: Path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def of_users(key: str = "user_id") -> list[dict]:
    return [
        {"prompt": f"say {user} {n}", "completion": "x" * (n + 1), key: user}
        for user in range(USERS)
        for n in range(EACH)
    ]


def splits_by(cfg: DataConfig, user) -> dict[str, set[str]]:
    """The splits in which the records of each user are."""
    found = defaultdict(set)
    for source in find_sources(cfg).values():
        for chunk in source.chunks:
            for _, record in read_chunk(chunk):
                found[user(record)].add(split_of(record, source.cfg, "train"))
    return found


# --- the split by group


def test_records_of_one_group_share_a_split_and_groups_have_the_shares(tmp_path):
    source = write(tmp_path / "r.jsonl", [{"text": f"{user} {n}", "user": user} for user in range(900) for n in (0, 1)])
    shares = {"validation_fraction": 0.2, "test_fraction": 0.3}
    alone = splits_by(DataConfig(source=source, **shares), lambda record: record["user"])
    assert sum(len(splits) > 1 for splits in alone.values()) > 300  # what happens without a group: 62 % expected
    together = splits_by(DataConfig(source=source, group="user", **shares), lambda record: record["user"])
    assert {len(splits) for splits in together.values()} == {1}
    taken = [name for splits in together.values() for name in splits]
    assert [taken.count(name) / 900 for name in ("train", "validation", "test")] == pytest.approx(
        [0.5, 0.2, 0.3], abs=0.06
    )
    other = splits_by(DataConfig(source=source, group="user", seed=1, **shares), lambda record: record["user"])
    assert other != together


@pytest.mark.parametrize(
    ("group", "fields", "record"),
    [
        ("meta.user", {}, {"prompt": "a {n}", "completion": "b", "meta": {"user": "{user}"}}),
        ("meta.user", {}, {"prompt": "a {n}", "completion": "b", "meta.user": "{user}"}),
        ("user", {"prompt": "q", "completion": "a"}, {"q": "a {n}", "a": "{user}", "user": "{user}"}),
        ("prompt", {}, {"prompt": "{user}", "completion": "{n}"}),
    ],
)
def test_the_group_is_found_inside_beside_a_mapping_and_in_what_is_read(tmp_path, group, fields, record):
    written = json.dumps(record)
    filled = [written.replace("{user}", f"u{user}").replace("{n}", f"{n}") for user in range(30) for n in range(4)]
    source = tmp_path / "r.jsonl"
    source.write_text("\n".join(filled))
    cfg = DataConfig(source=str(source), group=group, fields=fields, validation_fraction=0.3, test_fraction=0.3)
    found = splits_by(cfg, lambda read: re.search(r"u\d+", json.dumps(read))[0])
    assert len(found) == 30
    assert {len(splits) for splits in found.values()} == {1}
    assert len(set.union(*found.values())) == 3


def test_one_user_as_text_and_as_number_in_files_of_two_kinds_is_one_group(tmp_path):
    (tmp_path / "all").mkdir()
    write(tmp_path / "all" / "a.jsonl", [{"text": f"{user}", "user": user} for user in range(100)])
    (tmp_path / "all" / "b.csv").write_text("text,user\n" + "".join(f"b {user},{user}\n" for user in range(100)))
    cfg = DataConfig(source=str(tmp_path / "all"), group="user", validation_fraction=0.3, test_fraction=0.3)
    assert {len(splits) for splits in splits_by(cfg, lambda record: str(record["user"])).values()} == {1}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "data.group: the record has no key user_id; it has prompt, completion"),
        (
            {"prompt": "a", "completion": "b", "userid": 1},
            "data.group: the record has no key user_id; did you mean userid?",
        ),
        (
            {"prompt": "a", "completion": "b", "user_id": None},
            "data.group: user_id is empty: give each record one, or leave",
        ),
        ({"prompt": "a", "completion": "b", "user_id": [1]}, "data.group: user_id must be text, not list"),
    ],
)
def test_a_record_without_its_group_is_refused_with_its_place(tmp_path, tiny_llama, capsys, bad, message):
    source = write(tmp_path / "r.jsonl", [*of_users(), bad])
    given = [
        "--data",
        source,
        "--model",
        tiny_llama,
        "--data.group",
        "user_id",
        "--data.cache",
        str(tmp_path / "cache"),
    ]
    assert run_command("preprocess", given) == 2
    said = capsys.readouterr().err
    assert f"r.jsonl:{USERS * EACH + 1}: {message}" in said
    assert said.count("\n") == 1


def test_too_few_groups_are_told_from_too_few_records(tmp_path, tokenizer):
    source = write(tmp_path / "r.jsonl", [record | {"user_id": 1} for record in of_users()])
    with pytest.raises(UserError, match=r"split of 200 record.* is empty: .*; records of one user_id stay together"):
        DataCheck(DataConfig(source=source, group="user_id")).run(tokenizer)


def test_shards_made_before_groups_are_found_again_and_those_by_group_are_others(tmp_path, tokenizer, monkeypatch):
    source = write(tmp_path / "r.jsonl", of_users())

    def fingerprint(**data) -> str:
        cfg = DataConfig(source=source, **data)
        return fingerprint_of(cfg, find_sources(cfg), tokenizer, "CAUSAL_LM")

    assert len({fingerprint(), fingerprint(group="user_id"), fingerprint(group="prompt")}) == 3
    monkeypatch.setattr(DataConfig, "model_dump", lambda self, exclude: settings.append(exclude) or {})
    settings: list[set[str]] = []
    fingerprint()
    fingerprint(group="user_id")
    assert settings == [
        {"cache", "group", "sources"},
        {"cache", "sources"},
    ]  # the first is what was hashed when there was no such field


# --- the command


@pytest.fixture(scope="module")
def told(cluster, tiny_llama, tmp_path_factory):
    """A run on 200 records by 40 users, 2 of each asking the same but for letter case and blanks."""
    root = tmp_path_factory.mktemp("told")
    records = of_users()
    for record in records:
        record["prompt"] = record["prompt"].replace("say", "Say ") if record["user_id"] % 2 else record["prompt"]
        record["prompt"] = f"{record['prompt'][:4]} {record['user_id'] // 2} {record['prompt'].split()[-1]}"
    data = {"source": write(root / "r.jsonl", records), "cache": str(root / "cache"), "group": "user_id"}
    data |= {"max_length": 128, "validation_fraction": 0.2, "test_fraction": 0.2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ftray.data.shards.ROW_GROUP_ROWS", 16)
        yield config_from({"data": data, "model": {"name": tiny_llama}, "show": 10}), records


def run(cfg: Config, capsys) -> tuple[str, TokenizedData]:
    assert run_preprocess(cfg) == 0
    shown = capsys.readouterr().out
    return shown, TokenizedData.load(shown.splitlines()[-1].removeprefix("shards "))


def test_all_records_of_a_user_are_in_one_split_of_the_shards(told, capsys):
    cfg, records = told
    shown, data = run(cfg, capsys)
    asked = {name: [row["prompt"] for row in data.rows(name)] for name in data.splits}
    assert sorted(len(prompts) for prompts in asked.values())[0] > 0
    users = defaultdict(set)
    for record in records:
        rendered = f"<|user|>{record['prompt']}<|end|><|assistant|>"
        users[record["user_id"]].update(name for name, prompts in asked.items() if rendered in prompts)
    assert len(users) == USERS
    assert {len(splits) for splits in users.values()} == {1}
    assert "ignored" not in shown


def test_ten_records_are_shown_as_the_model_sees_them(told, capsys, tokenizer, monkeypatch):
    cfg, _ = told
    shown, data = run(cfg, capsys)
    for number, row in enumerate(data.rows("train", 10), 1):
        learnt = tokenizer.decode([label for label in row["labels"] if label != IGNORE])
        whole = tokenizer.decode(row["input_ids"])
        assert whole == row["prompt"] + learnt
        assert f"record {number}, what is learnt in [[ ]]:\n{row['prompt']}[[{learnt}]]\n" in shown
    assert "record 11" not in shown
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    styled, _ = run(cfg.model_copy(update={"show": 1}), capsys)
    row = data.rows("train", 1)[0]
    assert f"\x1b[2m{row['prompt']}\x1b[0m\x1b[1;32m{learnt_of(row, tokenizer)}\x1b[0m\n" in styled
    assert "[[" not in styled
    none, _ = run(cfg.model_copy(update={"show": 0}), capsys)
    assert "record 1," not in none


def learnt_of(row, tokenizer) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != IGNORE])


def test_the_histogram_counts_every_record_once(told, capsys):
    shown, data = run(told[0], capsys)
    lengths = [len(row["input_ids"]) for row in data.rows("train")]
    bars = re.findall(r"^ +(\d+)-(\d+) +(#*) (\d+)$", shown, re.MULTILINE)
    assert "lengths of train in tokens:" in shown
    assert 2 <= len(bars) <= 10
    for first, last, bar, count in bars:
        assert int(count) == sum(int(first) <= length <= int(last) for length in lengths)
        assert bool(bar) == bool(int(count))
    assert sum(int(count) for *_, count in bars) == len(lengths)
    assert max(len(bar) for _, _, bar, _ in bars) == 40


def test_near_duplicates_between_the_splits_are_counted(told, capsys):
    shown, data = run(told[0], capsys)

    def plain(split: str) -> list[str]:
        return [re.sub(r"\s+", "", row["prompt"].lower()) for row in data.rows(split)]  # here, blanks never matter

    for name in ("validation", "test"):
        shared = sum(prompt in plain("train") for prompt in plain(name))
        assert shared > 0
        wanted = (
            f"near-duplicates: {shared} of {data.splits[name].records} {name} records ask what a training record asks"
        )
        assert wanted in shown
        for at_once in (1, 7, 10**6):
            assert duplicates.shared_prompts(data, name, at_once=at_once) == shared


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is  IT?", "what is it?\n", True),
        ("ﬁne", "fine", True),
        ("STRASSE", "straße", True),
        ("a\u00a0b", "a b", True),
        ("ab", "a b", False),
        ("x+1", "x-1", False),
    ],
)
def test_what_counts_as_the_same_prompt(one, other, same):
    assert (duplicates.normalised(one) == duplicates.normalised(other)) == same


@pytest.mark.parametrize("task", ["DPO", "KTO"])
def test_the_statistics_stand_there_before_the_pass_over_the_model(
    cluster, tmp_path, tiny_llama, capsys, monkeypatch, task
):
    """Of all objectives that have one: it may take hours, and whoever waits sees what is wrong with the records."""
    pair = {"chosen": "a b", "rejected": "b a"} if task == "DPO" else {"completion": "a b"}
    judged = [{} if task == "DPO" else {"label": bool(n % 3)} for n in range(60)]
    rows = [{"prompt": f"say {n}"} | pair | own for n, own in enumerate(judged)]
    passes, seen = reference.with_reference, []

    def watched(*given, **more):
        seen.append(capsys.readouterr().out)
        return passes(*given, **more)

    monkeypatch.setattr(reference, "with_reference", watched)
    flags = ["--model", tiny_llama, "--data.cache", str(tmp_path / "shards"), "--task", task]
    assert run_command("preprocess", ["--data", write(tmp_path / "r.jsonl", rows), "--show", "1", *flags]) == 0
    (before,) = seen
    assert re.search(r"^train: \d+ records, ", before, re.MULTILINE)
    assert "say " in before
    shards, after = before.splitlines()[-1].split()[-1], capsys.readouterr().out
    assert re.fullmatch(rf"reference {re.escape(shards)}/reference-\w+\n", after)
    found = ftray.preprocess(rows, model=tiny_llama, task=task, config={"data": {"cache": str(tmp_path / "shards")}})
    assert re.search(r"/reference-\w+$", found.reference)


def test_ray_begins_only_for_what_its_tasks_have_to_do(tmp_path, tiny_llama, monkeypatch):
    """Not for few records, nor for shards and references that are there."""
    began: list[str] = []
    monkeypatch.setattr("ftray.runtime.cluster.connect", lambda cfg, dashboard: began.append("ray"))
    monkeypatch.setattr(reference, "_compute", lambda *given: began.append("reference"))
    pairs = [{"prompt": f"say {n}", "chosen": "a b", "rejected": "b a"} for n in range(60)]

    def begun(source) -> list[str]:
        began.clear()
        given = ["--data", source, "--model", tiny_llama, "--show", "0", "--data.cache", str(tmp_path / "shards")]
        assert run_command("preprocess", given) == 0
        return list(began)

    few, preferences = write(tmp_path / "few.jsonl", of_users()), write(tmp_path / "pairs.jsonl", pairs)
    assert begun(few) == []
    assert begun(preferences) == ["ray", "reference"]
    monkeypatch.setattr(pipeline, "LOCAL_BYTES", 10)  # from now on tasks would read the records
    monkeypatch.setattr(reference, "reference_file", lambda *given: tmp_path / "pairs.jsonl")  # a file that is there
    assert begun(few) == []
    assert begun(preferences) == []
