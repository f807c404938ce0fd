import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftray.data.loader import batches, batches_in_order
from ftray.data.row_groups import read_slice, row_group_order, row_groups_in_order
from ftray.data.shards import ROW_GROUP_ROWS, MixedRows, Split
from ftray.models.next_token import packed_row
from ftray.task_spec import IGNORE, TaskSpec


class InMemory:
    """Shards of one split whose record n is `lengths[n]` tokens of value n: what `read_slice` needs, without files."""

    task = TaskSpec()

    def __init__(self, sizes: list[int]):
        self.starts = np.cumsum([0, *sizes])
        self.read: list[int] = []  # row groups, in the order in which they were read
        self.splits = dict.fromkeys(("train", "validation"), Split(row_groups=sizes, records=sum(sizes)))

    def row_group(self, split: str, index: int, columns: list[str]) -> pa.Table:
        self.read.append(index)
        rows = [[n] * (2 + n % 3) for n in range(self.starts[index], self.starts[index + 1])]
        return pa.table(dict.fromkeys(columns, pa.array(rows, pa.list_(pa.int32()))))


def records_of(batch: dict[str, torch.Tensor]) -> list[int]:
    """Which records a packed batch of `InMemory` rows holds, in order."""
    return batch["input_ids"][0][batch["position_ids"][0] == 0].tolist()


def stream(data, count: int, seed=0, first=0, rank=0, world_size=1) -> list[int]:
    one_by_one = batches(data, seed, first, 1, rank, world_size)
    return [records_of(next(one_by_one))[0] for _ in range(count)]


sizes_of = st.builds(
    lambda full, size, last: [size] * full + [last], st.integers(0, 4), st.integers(1, 6), st.integers(1, 6)
)


@settings(deadline=None, max_examples=40)
@given(sizes=sizes_of, seed=st.integers(0, 2**32), first=st.integers(0, 70), world_size=st.sampled_from([1, 2, 4]))
def test_the_order_depends_on_seed_and_position_alone(sizes, seed, first, world_size):
    data, total = InMemory(sizes), sum(sizes)
    whole = stream(data, 120, seed)
    for epoch in range(120 // total):  # every epoch is all records once
        assert sorted(whole[epoch * total : (epoch + 1) * total]) == list(range(total))
    assert stream(data, 40, seed, first) == whole[first : first + 40]  # resuming
    by_rank = [stream(data, 10, seed, first - first % 4, rank, world_size) for rank in range(world_size)]
    together = [record for step in zip(*by_rank, strict=True) for record in step]
    start = first - first % 4
    assert together == whole[start : start + len(together)]


@settings(deadline=None, max_examples=60)
@given(
    sizes=sizes_of,
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 4),
    world_size=st.sampled_from([1, 2, 3]),
    accumulation=st.integers(1, 3),
    step=st.integers(0, 12),
)
def test_the_order_from_the_middle_is_the_tail_of_the_whole_and_reads_no_more(
    sizes, seed, rows, world_size, accumulation, step
):
    """Over several epochs, for each rank; what lies before the step is neither read nor collated."""
    batch_size, steps = rows * world_size * accumulation, 16
    for rank in range(world_size):
        replayed, resumed = InMemory(sizes), InMemory(sizes)
        whole = list(islice(batches(replayed, seed, 0, rows, rank, world_size), steps * accumulation))
        tail = batches(resumed, seed, step * batch_size, rows, rank, world_size)
        got = list(islice(tail, (steps - step) * accumulation))
        wanted = whole[step * accumulation :]
        assert len(got) == len(wanted)
        assert all(torch.equal(g[name], w[name]) for g, w in zip(got, wanted, strict=True) for name in w)
        # a replay reads each row group that it passes once: the resumed run reads the last of them, from that of `step`
        ends = np.cumsum(np.diff(replayed.starts)[replayed.read])
        passed = int(np.searchsorted(ends, step * batch_size, side="right"))
        assert resumed.read == replayed.read[passed:]


def test_epochs_and_seeds_differ():
    data = InMemory([16, 16, 9])
    epochs = stream(data, 82, seed=3)
    assert epochs[:41] != epochs[41:]
    assert stream(data, 41, seed=4) != epochs[:41]
    assert epochs[:41] != list(range(41))
    groups = [part.row_group for part in row_group_order(InMemory([4] * 10), 3, 0, 80)]
    assert sorted(groups[:10]) == sorted(groups[10:]) == list(range(10))
    assert groups[:10] != groups[10:]


def test_an_order_leaves_out_what_lies_before_and_after():
    data = InMemory([8] * 10)
    every = list(row_group_order(data, 0, 0, 240))
    assert len(every) == 30
    part = list(row_group_order(data, 0, 100, 130))
    assert [(r.row_group, r.epoch, r.position) for r in part] == [
        (r.row_group, r.epoch, r.position) for r in every[12:17]
    ]
    assert [(r.start, r.stop) for r in part] == [(4, 8), (0, 8), (0, 8), (0, 8), (0, 2)]


@settings(deadline=None, max_examples=40)
@given(sizes=sizes_of, rows=st.integers(1, 7), world_size=st.integers(1, 4), most=st.none() | st.integers(1, 60))
def test_validation_is_every_record_once_in_stored_order_or_the_first_ones(sizes, rows, world_size, most):
    data = InMemory(sizes)
    for rank in range(world_size):
        found = [records_of(b) for b in batches_in_order(data, "validation", rows, rank, world_size, most)]
        assert [n for batch in found for n in batch] == list(range(sum(sizes)))[:most][rank::world_size]
        assert all(len(batch) == rows for batch in found[:-1])


def test_micro_batches_are_cut_across_row_groups():
    data = InMemory([5, 5, 2])
    one = stream(data, 24)
    by_four = batches(data, 0, 0, 4)
    assert [n for _ in range(6) for n in records_of(next(by_four))] == one


def test_collate_lays_records_in_a_row_without_padding():
    batch = packed_row({"input_ids": [[5, 6, 7], [8], [9, 10]], "labels": [[5, IGNORE, 7], [8], [IGNORE, 10]]})
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9, 10]],
        "position_ids": [[0, 1, 2, 0, 0, 1]],
        "labels": [[IGNORE, IGNORE, 7, IGNORE, IGNORE, 10]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_collate_leaves_its_input_alone():
    labels = np.array([1, 2, 3])
    packed_row({"input_ids": [labels], "labels": [labels]})
    assert labels.tolist() == [1, 2, 3]


def test_packed_records_do_not_see_each_other(tiny_llama):
    from ftray.config import ModelConfig
    from ftray.models.load import load_base

    model = load_base(ModelConfig(dtype="fp32"), tiny_llama).model.eval()
    draw = torch.Generator().manual_seed(0)
    records = [torch.randint(5, 200, (n,), generator=draw).tolist() for n in (7, 3, 12, 1)]
    batch = packed_row({"input_ids": records, "labels": records})
    with torch.inference_mode():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=torch.tensor([r]), use_cache=False).logits[0] for r in records])
        mixed = model(input_ids=batch["input_ids"], use_cache=False).logits[0]
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    assert (mixed - alone).abs().max() > 1e-2  # without position ids they would


def test_no_token_of_real_shards_is_padding(data):
    """The share of padding is 0: a batch has as many tokens as its records."""
    first = list(islice(batches(data, 0, 0, 8), 10))
    rows = {tuple(row["input_ids"]) for row in data.rows("train")}
    for batch in first:
        starts = (batch["position_ids"][0] == 0).nonzero().squeeze(1).tolist()
        ends = [*starts[1:], batch["input_ids"].shape[1]]
        records = [tuple(batch["input_ids"][0, a:b].tolist()) for a, b in zip(starts, ends, strict=True)]
        assert len(records) == 8
        assert set(records) <= rows


# --- through Ray Train

WORKERS, MICRO_BATCH, STEPS, RESUMED_AT, SEED = 2, 3, 40, 23, 7


def report_batches():
    """The function of a worker that trains nothing, but notes which tokens it was given."""

    def worker(config):  # nested, so that it travels by value: the workers can't import a test
        import json
        from pathlib import Path

        from ray import train

        from ftray.data import ray_loader

        def plain(stream):
            return [{k: v.tolist() for k, v in batch.items()} for batch in stream]

        rank, workers, rows = train.get_context().get_world_rank(), config["workers"], config["micro_batch"]
        last = config["steps"] * workers * rows
        seen, data = {"validation": []}, config["data"]
        ray_loader.FEW_ROW_GROUPS = config["few"]
        for name, step in (("train", 0), ("resumed", config["resumed_at"]), ("over", config["steps"])):
            stream = ray_loader.training_batches(data, config["seed"], step * workers * rows, last, rows, rank, workers)
            seen[name] = plain(stream)
        for _ in range(2):  # it must be streamed anew each time
            records = data.splits["validation"].records
            seen["validation"].append(plain(ray_loader.validation_batches(data, records, rows, rank, workers)))
        (Path(config["directory"]) / f"{rank}.json").write_text(json.dumps(seen))

    return worker


def plain_batches(iterator) -> list[dict]:
    return [{name: tensor.tolist() for name, tensor in batch.items()} for batch in iterator]


@pytest.mark.parametrize("few", [0, 4])
def test_ray_train_workers_stream_the_batches_of_the_plain_iterator(data, tmp_path, few):
    """By Ray Data, and where there are few row groups by themselves."""
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    assert 2 * data.splits["train"].records < STEPS * WORKERS * MICRO_BATCH
    order = {"data": data, "seed": SEED, "steps": STEPS, "resumed_at": RESUMED_AT, "few": few}
    TorchTrainer(
        report_batches(),
        train_loop_config={"directory": str(tmp_path), "micro_batch": MICRO_BATCH, "workers": WORKERS, **order},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=train.ScalingConfig(num_workers=WORKERS),
        run_config=train.RunConfig(name="stream", storage_path=str(tmp_path / "ray")),
    ).fit()
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORKERS)]
    for rank in range(WORKERS):
        plain = islice(batches(data, SEED, 0, MICRO_BATCH, rank, WORKERS), STEPS)
        assert seen[rank]["train"] == plain_batches(plain)
        assert seen[rank]["resumed"] == seen[rank]["train"][RESUMED_AT:]
        assert seen[rank]["over"] == []
        validation = plain_batches(batches_in_order(data, "validation", MICRO_BATCH, rank, WORKERS))
        assert seen[rank]["validation"] == [validation, validation]

    def rows(step_batches: list[dict]) -> Counter:
        found: Counter = Counter()
        for batch in step_batches:
            starts = [i for i, p in enumerate(batch["position_ids"][0]) if p == 0]
            ends = [*starts[1:], len(batch["position_ids"][0])]
            found.update(tuple(batch["input_ids"][0][a:b]) for a, b in zip(starts, ends, strict=True))
        return found

    single = plain_batches(islice(batches(data, SEED, 0, MICRO_BATCH * WORKERS), STEPS))
    for step in range(STEPS):  # the union of both workers' rows is the global batch of one process
        assert rows([seen[rank]["train"][step] for rank in range(WORKERS)]) == rows([single[step]])
    whole = rows(plain_batches(batches_in_order(data, "validation", 8)))
    assert sum((rows(seen[rank]["validation"][0]) for rank in range(WORKERS)), Counter()) == whole


def test_a_rank_without_validation_records_gets_none():
    data = InMemory([1])
    assert list(batches_in_order(data, "validation", 4, 1, 2)) == []
    part = next(row_groups_in_order(data, "validation"))
    assert read_slice(data, "validation", part, 0, 1, 2, ["input_ids"]).num_rows == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_take_turns_within_a_row_group(rank):
    data = InMemory([7])
    part = next(row_groups_in_order(data, "validation"))
    table = read_slice(data, "validation", part, 0, rank, 2, ["input_ids"])
    assert [row[0] for row in table["input_ids"].to_pylist()] == list(range(7))[rank::2]


def test_a_task_that_reads_row_groups_imports_no_torch():
    code = "import sys, ftray.data.ray_loader; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# --- mixtures


class Mixture(InMemory):
    """As `InMemory`, of records of several sources, in the order in which they are stored."""

    def __init__(self, sources: list[str], weights: dict[str, float], size: int):
        whole, rest = divmod(len(sources), size)
        super().__init__([size] * whole + [rest] * bool(rest))
        self.sources = sources
        groups = [sources[at : at + size] for at in range(0, len(sources), size)]
        mixed = {name: MixedRows(weights[name], [group.count(name) for group in groups]) for name in weights}
        self.splits["train"] = replace(self.splits["train"], sources=mixed)

    def row_group(self, split: str, index: int, columns: list[str]) -> pa.Table:
        table = super().row_group(split, index, columns)
        own = self.sources[self.starts[index] : self.starts[index + 1]]
        at = columns.index("source") if "source" in columns else None
        return table if at is None else table.set_column(at, "source", pa.array(own))


mixtures = st.builds(
    Mixture,
    st.lists(st.sampled_from("abc"), min_size=3, max_size=40).map(lambda names: [*names, *"abc"]),
    st.fixed_dictionaries(dict.fromkeys("abc", st.sampled_from([0.01, 0.3, 0.5, 1, 1.7, 2, 5]))),
    st.integers(1, 7),
)


@settings(deadline=None, max_examples=60)
@given(data=mixtures, seed=st.integers(0, 2**32))
def test_a_weight_is_how_often_each_record_of_a_source_comes_up_in_an_epoch(data, seed):
    epochs = 4
    sizes = {name: data.sources.count(name) for name in "abc"}
    wanted = {name: max(1, round(mixed.weight * sizes[name])) for name, mixed in data.splits["train"].sources.items()}
    total = sum(wanted.values())
    whole = stream(data, epochs * total, seed)
    seen = Counter[int]()
    for epoch in range(epochs):
        own = whole[epoch * total : (epoch + 1) * total]
        assert Counter(data.sources[record] for record in own) == wanted
        seen.update(own)
        for record, source in enumerate(data.sources):  # none comes up twice more often than another
            share = (epoch + 1) * wanted[source] / sizes[source]
            assert math.floor(share) <= seen[record] <= math.ceil(share)


@settings(deadline=None, max_examples=60)
@given(data=mixtures, seed=st.integers(0, 2**32), first=st.integers(0, 90), world_size=st.sampled_from([1, 2, 4]))
def test_the_order_of_a_mixture_goes_on_exactly_where_it_stood(data, seed, first, world_size):
    whole = stream(data, 140, seed)
    assert stream(data, 40, seed, first) == whole[first : first + 40]
    start = first - first % 4
    by_rank = [stream(data, 10, seed, start, rank, world_size) for rank in range(world_size)]
    together = [record for step in zip(*by_rank, strict=True) for record in step]
    assert together == whole[start : start + len(together)]


def test_weights_of_one_leave_the_order_as_it_is_without_any():
    sources = [*"abbacab"] * 5
    mixed = Mixture(sources, dict.fromkeys("abc", 1.0), 8)
    assert stream(mixed, 100, 3) == stream(InMemory([8] * 4 + [3]), 100, 3)


def test_a_row_group_that_weights_lengthen_is_read_in_parts():
    data = Mixture([*"ab"] * 8, {"a": 700.0, "b": 1.0}, 16)
    parts = list(row_group_order(data, 0, 0, 8 * 701))
    assert max(part.stop - part.start for part in parts) == ROW_GROUP_ROWS
    assert sum(part.stop - part.start for part in parts) == 8 * 701
    assert Counter(stream(data, 8 * 701)) == {n: 1 if n % 2 else 700 for n in range(16)}
