"""Tokenization that was killed: the next run takes what is whole, and ends in the same bytes."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from test_data_shards import bytes_of, inputs, settings, some_records, write

from ftray.data import TokenizedData, parts, pipeline, prepare, sources
from ftray.data.splits import order_key
from ftray.errors import UserError
from ftray.storage.location import parse_location

SIZES = {"sources.CHUNK_BYTES": 1000, "parts.BIN_BYTES": 3000}
RECORDS = 1200
DRIVER = """
import os, signal
import ray
from ftray.config import DataConfig
from ftray.data import parts, pipeline, prepare, sources
{sizes}
whole, seen = pipeline.{name}, []
def killed_at_the_third(*args, **kwargs):
    seen.append(args)
    if len(seen) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*args, **kwargs)
pipeline.{name} = killed_at_the_third
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
prepare(DataConfig.model_validate_json({cfg!r}), {model!r})
"""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Many chunks, parts and bins of a small file."""
    for name, value in SIZES.items():
        monkeypatch.setattr(f"ftray.data.{name}", value)


def garble(source: Path, length: int | None = None) -> None:
    """Make the beginning of a file, or all of it, something that nobody can read, and leave its size and time."""
    before, content = source.stat(), source.read_bytes()
    source.write_bytes(b"?" * len(content[:length]) + content[len(content[:length]) :])
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("stage", ["reading", "tokenizing"])
def test_a_killed_run_goes_on_with_what_is_whole(cluster, tiny_llama, tmp_path, stage):
    records = some_records(RECORDS)
    source = Path(write(tmp_path / "r.jsonl", records))
    cfg = settings(tmp_path, str(source))
    undisturbed = prepare(cfg.model_copy(update={"cache": str(tmp_path / "undisturbed")}), tiny_llama)
    sizes = "\n".join(f"{name} = {value}" for name, value in SIZES.items())
    name = {"reading": "Sorted", "tokenizing": "read_tables"}[stage]
    code = DRIVER.format(sizes=sizes, name=name, cfg=cfg.model_dump_json(), model=tiny_llama)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr
    (work,) = Path(cfg.cache).glob(f"*{pipeline.PARTS}")
    assert not (work.parent / undisturbed.fingerprint).exists()
    read, chunks = len([*work.glob("train-*.json")]), len(sources.find_chunks(str(source), cfg))
    if stage == "reading":
        assert 2 <= read < chunks
        garble(source, 900)  # the first chunk is not needed again
    else:
        assert read == chunks > 20
        garble(source)  # nor any
        poison(cfg.cache, tmp_path / "poisoned", tiny_llama, cfg)
    data = prepare(cfg, tiny_llama)
    assert data.fingerprint == undisturbed.fingerprint
    assert bytes_of(data) == bytes_of(undisturbed)
    assert [path.name for path in Path(cfg.cache).iterdir()] == [data.fingerprint]


def poison(cache: str, copy: Path, model: str, cfg) -> None:
    """Where a file of tokens is there, its records are not tokenized again: what was put into it comes out."""
    shutil.copytree(cache, copy)
    (work,) = copy.glob(f"*{pipeline.PARTS}")
    first = parse_location(str(work)) / sorted(path.name for path in work.glob("train-tokens-*.arrow"))[0]
    tables = [
        table.set_column(table.schema.get_field_index("prompt"), "prompt", pa.array(["poison"] * table.num_rows))
        for table in parts.read_tables(first)
    ]
    parts.write_tables(first, tables, tables[0].schema)
    data = prepare(cfg.model_copy(update={"cache": str(copy)}), model)
    found = sum(inputs(data, split).count("poison") for split in data.splits)
    assert 0 < found == sum(table.num_rows for table in tables) < RECORDS


def test_many_bins_and_parts_hold_every_record_once_in_order(tmp_path, monkeypatch):
    """Without Ray: chunks of several parts each, against one sort of all records."""
    monkeypatch.setattr(parts, "PART_BYTES", 2000)
    draw = np.random.default_rng(0)
    keys = draw.integers(-(2**63), 2**63 - 1, 5000, np.int64, endpoint=True)
    keys[:3] = [-(2**63), 2**63 - 1, 0]
    keys[7:900:9] = keys[6:899:9]  # equal records
    values = np.arange(5000)
    place = parse_location(str(tmp_path))
    for bins in (1, 2, 7, 64):
        found, taken = [], []
        for chunk in range(4):
            own = slice(chunk * 1250, (chunk + 1) * 1250)
            columns = {"key": keys[own], "classes": [["a"]] * 1250, "value": values[own]}
            tables = [pa.table(columns)[at : at + 100] for at in range(0, 1250, 100)]
            found.append(parts.write_sorted(tables, place, f"{bins}-{chunk}", bins, None))
            assert len(found[-1].parts) > 2
            assert parts.write_sorted([], place, f"{bins}-{chunk}", bins, None) == found[-1]  # it has been done
        names = [name for part in found for name in part.parts]
        for number in range(bins):
            table = parts.read_bin(place, names, number)
            assert table.num_rows == sum(part.counts[number] for part in found)
            taken += zip(table["key"].to_pylist(), table["value"].to_pylist(), strict=True)
        assert taken == sorted(zip(keys.tolist(), values.tolist(), strict=True))
        assert {label for part in found for label in part.classes} == {"a"}


def test_limit_over_several_bins_takes_the_smallest_keys(cluster, tiny_llama, tmp_path):
    records = some_records(600)
    data = prepare(settings(tmp_path, write(tmp_path / "r.jsonl", records), limit=310), tiny_llama)
    assert parts.bins_of(sources.find_chunks(str(tmp_path / "r.jsonl"))) > 5
    rows = [row for split in data.splits for row in data.rows(split)]
    smallest = sorted(records, key=lambda record: order_key(record, 0))[:310]
    assert sorted(row["key"] for row in rows) == [order_key(record, 0) for record in smallest]
    assert sorted(row["target"] for row in rows) == sorted(record["output"] for record in smallest)


def test_a_mistake_leaves_nothing_and_what_another_process_made_meanwhile_is_taken(
    cluster, tiny_llama, tmp_path, monkeypatch
):
    source = write(tmp_path / "r.jsonl", [*some_records(60), {"foo": 1}])
    with pytest.raises(UserError, match=r"r\.jsonl:61: record with keys foo"):
        prepare(settings(tmp_path, source), tiny_llama)
    assert list((tmp_path / "cache").iterdir()) == []
    cfg = settings(tmp_path, write(tmp_path / "good.jsonl", some_records(60)))
    other = prepare(cfg.model_copy(update={"cache": str(tmp_path / "other")}), tiny_llama)

    def overtaken(data: TokenizedData, *_):
        shutil.copytree(other.directory, Path(cfg.cache) / other.fingerprint)
        raise FileNotFoundError("parts that the other process took away")

    monkeypatch.setattr(pipeline, "_write", overtaken)
    data = prepare(cfg, tiny_llama)
    assert (data.fingerprint, bytes_of(data)) == (other.fingerprint, bytes_of(other))
    assert [path.name for path in Path(cfg.cache).iterdir()] == [data.fingerprint]
