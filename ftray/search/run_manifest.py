"""What defines a search: written into its output when it begins, compared when it goes on."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import yaml
from filelock import FileLock, Timeout

from ftray.config import Config
from ftray.data import TokenizedData
from ftray.errors import UserError
from ftray.search.results import write_config, write_json, write_yaml
from ftray.search.space import Space
from ftray.storage.lease import held, since
from ftray.storage.location import Location, Stored, parse_location, refuse_unreachable

STATE = ("tune", "study.log", "summary.json")  # any of these shows that a directory holds a search
CONFIG, SPACE, DATA, LOCK = "config.yaml", "space.yaml", "data.json", ".lock"
# what may change when a search goes on: how long and where it runs, and how its best is proven
FREE = {
    "data.cache",
    "search.space",  # by content, not by name
    "search.trials",
    "search.time_budget",
    "search.concurrency",
    "search.max_failures",
    "search.trackers",
    "scaling.packs",
    "scaling.cpus_per_worker",
    "scaling.gpus_per_worker",
    "scaling.address",
}
FREE_SECTIONS = {
    "evaluation",
    "adapter",
    "generation",
    "merge",
    "serving",
    "request",
}  # the space says what the adapters are
FULL = (errno.ENOSPC, errno.EDQUOT)
SPARE = 2**25  # bytes: a disk with less holds no more checkpoints
_AGAIN = "take that, or name another --output"


def packable(cfg: Config, space: Space) -> bool:
    """Whether every worker can hold the whole base model; where ZeRO 3 shares it out, each trial has its own.

    Raises:
        UserError: it can't, and a pack is asked for by its size.
    """
    stages = {cfg.training.zero_stage, *(corner["training"].get("zero_stage", 0) for corner in space.corners())}
    if 3 in stages and isinstance(cfg.search.pack, int):
        raise UserError(
            f"search.pack {cfg.search.pack}: ZeRO 3 shares the base model out over the workers of one trial; "
            "take zero_stage 0, 1 or 2, or pack off"
        )
    return 3 not in stages


@contextmanager
def sole_driver(output: Location) -> Iterator[None]:
    """Hold the output; the system lets go of a directory when this process ends, however it ends.

    Raises:
        UserError: a search that runs holds it.
    """
    if isinstance(output, Stored):
        with held(output / LOCK):
            yield
        return
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / LOCK)
    try:
        lock.acquire(timeout=1)  # longer than a `status` looks at it
    except Timeout:
        raise UserError(f"output {output}: a search is running there; see ftray status --run {output}") from None
    try:
        os.utime(output / LOCK)  # since when it runs, for whoever asks
        yield
    finally:
        lock.release()


def running_since(output: Location) -> float | None:
    """When the driver that holds the output directory began, in seconds since 1970; None: nobody holds it."""
    if isinstance(output, Stored):
        return since(output / LOCK)
    if not (output / LOCK).exists():
        return None
    lock = FileLock(output / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return (output / LOCK).stat().st_mtime
    lock.release()
    return None


def check_output(cfg: Config, space: Space) -> None:
    """Refuse a directory that holds another search, can't be written or has no room.

    With `--resume`, where there is none yet one begins: a job that is submitted again by itself has one command.

    Raises:
        UserError: one of these; for `--resume`, also a configuration or space that would make it another search.
    """
    output = parse_location(cfg.output)
    if isinstance(output, Stored):
        refuse_unreachable(output)
    there = [name for name in STATE if (output / name).exists()]
    if there and not cfg.resume:
        raise UserError(f"output {output} already holds a search ({there[0]}): add --resume to go on, or name another")
    if there:
        if lost := [name for name in (CONFIG, SPACE) if not (output / name).exists()]:
            raise UserError(f"output {output}: the search there can't be resumed without its {lost[0]}")
        _refuse_another(cfg, space, output)
    elif cfg.resume:
        print(f"output {output} holds no search yet: it begins", flush=True)
    if isinstance(output, Stored):
        return
    nearest = next(place for place in (output, *output.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(f"output {output}: can't write there ({error.strerror})") from None
    free = shutil.disk_usage(nearest).free
    if free < 2**30:
        raise UserError(f"output {output}: {free / 2**30:.1f} GiB free, a search needs at least 1 GiB")


def is_full(output: Location, error: BaseException) -> bool:
    """Whether `error` came of a disk, or a quota, that holds no more; it may have passed through any library."""
    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    if any((isinstance(e, OSError) and e.errno in FULL) or os.strerror(errno.ENOSPC) in str(e) for e in chain):
        return True
    if isinstance(output, Stored):
        return False
    try:
        if shutil.disk_usage(output).free < SPARE:
            return True
        with tempfile.TemporaryFile(dir=output) as probe:
            probe.write(bytes(2**20))
            os.fsync(probe.fileno())
    except OSError as refused:
        return refused.errno in FULL
    return False


def write_definition(cfg: Config, space: Space, output: Location) -> None:
    """Print and keep the configuration, and keep the space."""
    write_config(cfg, output)
    write_yaml(space.content, output / SPACE)


def write_data(data: TokenizedData, output: Location) -> None:
    """Keep each split's counts of records and tokens.

    Raises:
        UserError: the search goes on, and they are not what they were: trials could not be compared any more.
    """
    counts = {name: {k: v for k, v in asdict(split).items() if k != "files"} for name, split in data.splits.items()}
    path = output / DATA
    if path.exists() and json.loads(path.read_text()) != counts:
        raise UserError(f"data: not what the search in {output} was trained on (see its {DATA}); {_AGAIN}")
    write_json(counts, path)


def _refuse_another(cfg: Config, space: Space, output: Location) -> None:
    given = _fields(cfg.model_dump(mode="json"))
    # a search that is older than a field has its default
    stored = _fields(Config().model_dump(mode="json")) | _fields(_read(output / CONFIG))
    for field in given:
        if field not in FREE and stored[field] != given[field]:
            raise UserError(f"{field} {given[field]}: the search in {output} has {stored[field]}; {_AGAIN}")
    if _read(output / SPACE) != space.content:
        raise UserError(f"{space.source}: not the space of the search in {output} (see its {SPACE}); {_AGAIN}")


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    sections = {k: v for k, v in config.items() if isinstance(v, dict) and k not in FREE_SECTIONS}
    fields = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    return {"task": config.get("task", "CAUSAL_LM"), **fields}


def _read(path: Location) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))
