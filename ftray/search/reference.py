"""What the model says of the answers before it is trained: computed once, kept beside the shards for every search.

Objectives that compare with the base (DPO, KTO) would else run a second model, or every pass twice, in each trial.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ftray.adapters.discovery import START
from ftray.config import Config, ModelConfig
from ftray.data.parts import write_tables
from ftray.data.shards import REFERENCE, TokenizedData, reference_file
from ftray.runtime.cluster import hardware, node_resources, workers_that_fit
from ftray.search.starting_point import kept_adapter
from ftray.storage.location import parse_location

if TYPE_CHECKING:
    from ftray.models.load import LoadedModel
    from ftray.training.pack import Pack

PASS_TOKENS = 8192  # of a pass: its rows are of like length
SCHEMA = pa.schema({REFERENCE: pa.list_(pa.float32())})


def with_reference(
    cfg: Config, model_path: str, data: TokenizedData, start: str = "", connect: Callable[[], None] | None = None
) -> TokenizedData:
    """`data` with the log-probabilities of its answers, where its task needs them.

    Ray must be initialised, or `connect` do it.

    Row groups of which they are known are not computed again, whoever computed them.

    Args:
        cfg: of the model, and what it runs on.
        start: adapter, a directory or URI, that training begins with, so that the model is the base with it.
        connect: initialises Ray; it is called only if something is to be computed.
    """
    if REFERENCE not in data.task.load().columns:
        return data
    directory = f"{data.directory}/reference-{fingerprint(cfg.model, model_path, start)}"
    made = TokenizedData.load(data.directory, directory)
    groups = [(name, i) for name, split in data.splits.items() for i in range(len(split.row_groups))]
    missing = [{"split": name, "index": i} for name, i in groups if not reference_file(directory, name, i).exists()]
    if missing:
        parse_location(directory).mkdir(parents=True, exist_ok=True)
        rows = sum(data.splits[name].row_groups[i] for name, i in groups)
        print(f"reference: what the model says of {rows:,} records before training, once", file=sys.stderr, flush=True)
        if connect:
            connect()
        _compute(cfg, model_path, made, missing, start)
    return made


def fingerprint(cfg: ModelConfig, path: str, start: str = "") -> str:
    """Equal for models that say the same: settings, configuration, and names, sizes and times of the weight files.

    Of an adapter that training begins with, which is small, its content.
    """
    files = sorted(file for file in Path(path).iterdir() if file.is_file())
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    settings = cfg.model_dump(exclude={"name", "trust_remote_code"})
    whole = hashlib.sha256(json.dumps([settings, stats]).encode())
    if start:
        with parse_location(start).as_local_dir() as adapter:
            for file in sorted(file for file in adapter.iterdir() if file.suffix in (".json", ".safetensors", ".bin")):
                whole.update(hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest()[:16]


def _compute(cfg: Config, model_path: str, data: TokenizedData, missing: list[dict[str, Any]], start: str) -> None:
    """Write the files of the row groups that are missing, on all nodes that have room for the model."""
    import ray.data

    needed = hardware(cfg)
    workers = min(len(missing), workers_that_fit(needed["CPU"], needed["GPU"], node_resources()))
    groups = ray.data.from_items(missing, override_num_blocks=len(missing))
    own = {"model": cfg.model.model_dump(), "path": model_path, "directory": data.directory}
    written = groups.map_batches(
        _write,
        batch_size=1,
        fn_kwargs=own | {"reference": data.reference, "longest": cfg.data.longest, "start": start},
        num_cpus=needed["CPU"],
        num_gpus=needed["GPU"],
        concurrency=max(1, workers),
    )
    written.materialize()


def _write(
    batch: dict[str, Any], model: dict[str, Any], path: str, directory: str, reference: str, longest: int, start: str
) -> dict[str, Any]:
    """Write the file of each row group of `batch`."""
    data = TokenizedData.load(directory, reference)
    pack = _pack(json.dumps(model), path, directory, longest, start)
    for split, index in zip(batch["split"], batch["index"], strict=True):
        rows = data.row_group(split, int(index), ["input_ids", "labels", "lengths"]).to_pylist()
        found = pa.table({REFERENCE: pa.array(log_probabilities(pack, rows), SCHEMA.field(REFERENCE).type)})
        write_tables(reference_file(reference, split, int(index)), [found], SCHEMA)
    return batch


@lru_cache(maxsize=1)
def _pack(model: str, path: str, directory: str, longest: int, start: str) -> "Pack":
    """The model of this process, in which Ray runs one task after another."""
    from ftray.models.load import load_on_device
    from ftray.training.pack import Pack

    task = TokenizedData.load(directory).task
    base = load_on_device(ModelConfig(**json.loads(model)), path, task)
    pack = Pack(base.model.requires_grad_(False), task, longest=longest)
    if start:
        add_start(pack, base, start)
    return pack


def add_start(pack: "Pack", base: "LoadedModel", start: str) -> None:
    """Add the adapter that training begins with, as a trial adds it before its first step, by the name of `START`."""
    import torch

    from ftray.adapters.methods import attach
    from ftray.multi_adapter.shared_model import share, trainable
    from ftray.training.checkpoint import start_from
    from ftray.training.optimizer import TorchOptimizer

    with parse_location(start).as_local_dir() as adapter:
        model = attach(replace(base, model=share(base.model)), kept_adapter(adapter), 1, 0)
        start_from(model, adapter)
    pack.add(START, model, TorchOptimizer(model, torch.optim.SGD(trainable(model), 0.0)))


def log_probabilities(pack: "Pack", rows: list[dict[str, Any]]) -> list[list[float]]:
    """The log-probability that the base of `pack` gives to each answer of each row, nats; with its adapter, if any.

    Args:
        rows: of the shards, which hold several texts each.
    """
    from ftray.tasks.preference import texts_of

    texts = [text for row in rows for text in texts_of(row)]
    lengths = [len(text["input_ids"]) for text in texts]
    flat, name = [0.0] * len(texts), next(iter(pack.adapters), "")
    for part in _passes(lengths):
        for at, value in zip(part, pack.log_probabilities([texts[at] for at in part], name), strict=True):
            flat[at] = value
    values = iter(flat)
    return [[next(values) for _ in row["lengths"]] for row in rows]


def _passes(lengths: list[int]) -> Iterator[list[int]]:
    """The places of texts of like length that share a pass: at most PASS_TOKENS, or one text."""
    part: list[int] = []
    for at in sorted(range(len(lengths)), key=lengths.__getitem__):
        if part and sum(lengths[i] for i in part) + lengths[at] > PASS_TOKENS:
            yield part
            part = []
        part.append(at)
    if part:
        yield part
