"""Splits of few records: none that was asked for is empty by chance; and files that are held out by their names."""

import pytest
from test_data_shards import settings, some_records, write

from ftray.config import Config
from ftray.data import DataCheck, parts, pipeline, prepare
from ftray.data.shapes import GROUP
from ftray.data.splits import find_sources, order_key, split_of
from ftray.search.driver import is_prepared_here


def split_rows(data) -> dict[str, list[int]]:
    return {name: [row["key"] for row in data.rows(name)] for name in data.splits}


@pytest.mark.parametrize("count", [3, 4, 7, 12])
@pytest.mark.parametrize("seed", range(4))
def test_few_records_leave_no_split_empty_whatever_their_order(tmp_path, tiny_llama, tokenizer, count, seed):
    records = some_records(count)
    found = []
    for name, written in (("a", records), ("b", records[::-1])):
        cfg = settings(tmp_path, write(tmp_path / f"{name}.jsonl", written), seed=seed)
        DataCheck(cfg).run(tokenizer)
        found.append(split_rows(prepare(cfg, tiny_llama)))
    assert found[0] == found[1]
    assert all(found[0].values())
    assert sorted(key for keys in found[0].values() for key in keys) == sorted(order_key(r, seed) for r in records)
    by_hash = {name: {order_key(r, seed) for r in records if split_of(r, cfg, "train") == name} for name in found[0]}
    if all(by_hash.values()):  # then nothing is moved
        assert {name: {*keys} for name, keys in found[0].items()} == by_hash


def test_records_of_a_group_move_together_to_an_empty_split(tmp_path, tiny_llama):
    records = [record | {"user": n // 5} for n, record in enumerate(some_records(20))]
    for seed in range(8):
        cfg = settings(tmp_path, write(tmp_path / "r.jsonl", records), seed=seed, group="user")
        data = prepare(cfg, tiny_llama)
        users = {order_key(r | {GROUP: ["user", str(r["user"])]}, seed): r["user"] for r in records}
        held = {name: {users[key] for key in keys} for name, keys in split_rows(data).items()}
        assert all(held.values())
        assert sum(map(len, held.values())) == 4


def test_equal_records_are_parted_where_too_few_differ_and_that_is_said(tmp_path, tiny_llama, tokenizer, capsys):
    source = write(tmp_path / "r.jsonl", some_records(1) * 40)
    cfg = settings(tmp_path, source)
    DataCheck(cfg).run(tokenizer)
    said = capsys.readouterr().out
    assert said == (
        f"data {source}: too few records differ: equal ones are trained on and held out, and what is held out "
        "proves nothing\n"
    )
    counts = {name: split.records for name, split in prepare(cfg, tiny_llama).splits.items()}
    assert counts == {"train": 32, "validation": 4, "test": 4}


def test_the_limit_leaves_no_split_empty_and_many_bins_agree_with_one(tmp_path, tiny_llama, monkeypatch):
    source = write(tmp_path / "r.jsonl", some_records(1300))
    cfg = settings(tmp_path, source, limit=5, seed=3)
    one = split_rows(prepare(cfg, tiny_llama))
    monkeypatch.setattr(parts, "BIN_BYTES", 3000)
    many = split_rows(prepare(cfg.model_copy(update={"cache": str(tmp_path / "many")}), tiny_llama))
    assert one == many
    assert all(one.values())


def test_files_that_are_held_out_by_their_names_are_named(tmp_path, tokenizer, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    team, _, _, _ = (write(folder / f"{name}.jsonl", some_records(9, n)) for n, name in enumerate(["dev_team", *"xyz"]))
    more = tmp_path / "m"
    more.mkdir()
    tests = [write(more / f"test-{n}.jsonl", some_records(9, 10 + n)) for n in range(5)]
    write(more / "train.jsonl", some_records(9, 20))
    said = f"by their names, validation is {team}"
    five = f"test is {', '.join(tests[:3])} and 2 more"
    cases = [
        (str(folder), {}, f"{said}\n"),
        (f"{folder}/*.jsonl", {}, f"{said}\n"),
        ([str(folder), str(more)], {}, f"{said}; {five}\n"),
        (str(folder / "x.jsonl"), {}, ""),
        (str(folder / "x.jsonl"), {"validation": team}, ""),
        (str(folder / "x.jsonl"), {"validation": str(folder)}, f"{said}\n"),
    ]
    for source, changes, printed in cases:
        DataCheck(settings(tmp_path, source, **changes)).run(tokenizer)
        assert capsys.readouterr().out == printed


def test_sources_that_a_search_has_listed_are_not_listed_once_more(tmp_path, tiny_llama, monkeypatch):
    """At an object store a listing takes requests: one says where the data is made, and is what it is made of."""
    monkeypatch.setattr(pipeline, "find_sources", lambda cfg: pytest.fail("listed once more"))
    data = settings(tmp_path, write(tmp_path / "records.jsonl", some_records(40)))
    cfg = Config(data=data, task="CAUSAL_LM")
    listed = find_sources(data)
    assert is_prepared_here(cfg, listed)
    made = prepare(data, tiny_llama, sources=listed)
    assert sum(len(made.rows(name)) for name in made.splits) == 40
    monkeypatch.setattr(pipeline, "LOCAL_BYTES", 10)
    assert not is_prepared_here(cfg, listed)
