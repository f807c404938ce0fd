"""Whether records that an adapter is to be judged by are among those that its run trained on, or chose it by."""

import heapq
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from ftray.config import DataConfig, as_given
from ftray.data.formats import read_chunk
from ftray.data.record_task import record_task
from ftray.data.sources import is_small, read_for_check
from ftray.data.splits import find_sources, key_place_and_split, order_key
from ftray.errors import UserError
from ftray.search.provenance import commands_run
from ftray.search.run_manifest import CONFIG, DATA
from ftray.storage.location import Location, parse_location
from ftray.storage.manifest import refuse_damaged
from ftray.task_spec import TaskSpec

CONTENT = ("seed", "group", "fields", "delimiter", "encoding")  # what a record's place in the split is a hash of
SHARES = ("test_fraction", "validation_fraction", "test", "validation")  # which places are in which split
TIE = 1e-12  # that sums of shares are off by


def run_of(adapter: Path) -> Location | None:
    """The output that an adapter lies in: OUT/adapter, OUT/best/adapter, OUT/tune/trial-0/checkpoint_0/adapter."""
    for parent in list(adapter.resolve().parents)[:4]:
        if (parent / CONFIG).is_file():
            with refuse_damaged(parse_location(parent / CONFIG)):
                try:
                    written = yaml.safe_load((parent / CONFIG).read_text(encoding="utf-8"))
                except (yaml.YAMLError, UnicodeDecodeError):
                    if (parent / DATA).is_file():
                        raise
                    continue  # of another program, which has YAML of its own
            if isinstance(written, dict) and {"model", "data", "training"} <= written.keys():  # not of another program
                return parse_location(parent)
    return None


@dataclass(frozen=True)
class Trained:
    """What an adapter was trained by.

    Attributes:
        data: section of the run's configuration; sources are named as they are found from here.
        task: by which they were read.
    """

    data: DataConfig
    task: str = "auto"


def trained_by(adapter: Path) -> list[Trained]:
    """The run that made an adapter, or a merged model, then those that it started from; none: it lies in no output.

    Raises:
        UserError: what an output says of it is damaged.
    """
    found: dict[str, Trained] = {}
    run = run_of(adapter)
    while run is not None and str(run) not in found:
        began_in = [Path(command["directory"]) for command in commands_run(run)]
        with refuse_damaged(run / CONFIG):
            whole = yaml.safe_load((run / CONFIG).read_text())
            known = {name: whole["data"][name] for name in DataConfig.model_fields if name in whole["data"]}
            data = DataConfig.model_validate(_from_here(known, began_in))
            found[str(run)] = Trained(data, whole.get("task") or "auto")
            before = (whole.get("start") or {}).get("adapter")
        run = run_of(Path(_there(before, began_in)) / "adapter") if before and "://" not in before else None
    return [*found.values()]


def _from_here(data: dict[str, Any], began_in: list[Path]) -> dict[str, Any]:
    """A data section, its files as they are called from any directory."""
    named = {name: data[name] for name in ("source", "validation", "test") if data.get(name)}
    for name, given in named.items():
        named[name] = _there(given, began_in) if isinstance(given, str) else [_there(one, began_in) for one in given]
    if data.get("sources"):
        named["sources"] = [one | {"source": _there(one["source"], began_in)} for one in data["sources"]]
    return data | named


def _there(name: str, began_in: list[Path]) -> str:
    """A path that was given in one of these directories; as it was given if nothing is there."""
    there = [own / name for own in began_in if "://" not in name and not Path(name).is_absolute()]
    return next((str(path) for path in there if path.exists()), name)


def split_as_trained(data: DataConfig, runs: Iterable[Trained]) -> DataConfig:
    """`data` split as for training in what it doesn't say itself, by the first run whose source it names."""
    known = ((run.data, _common(_by_name(data), run.data)) for run in runs)
    trained, common = next(((one, common) for one, common in known if common), (data, []))
    if not common:
        return data
    kept = _by_name(trained)[common[0]] if len(_by_name(data)) == 1 else trained
    unsaid = [name for name in (*CONTENT, *SHARES) if name not in data.model_fields_set]
    return data.model_copy(update={name: getattr(kept, name) for name in unsaid})


def said_of_split(given: DataConfig, taken: DataConfig) -> str:
    """The settings that :func:`split_as_trained` has changed, with their values; empty: none."""
    changed = [name for name in (*CONTENT, *SHARES) if getattr(given, name) != getattr(taken, name)]
    return ", ".join(f"data.{name} {as_given(str(getattr(taken, name)))}" for name in changed)


def refuse_seen(data: DataConfig, split: str, runs: Iterable[Trained], what: str, task: str = "auto") -> None:
    """Refuse a validation or test split that holds records of a run's training, by the hash of their content.

    Args:
        split: any other is what its name says.
        runs: those by which it was trained; none: nothing is known of it.
        what: was trained, for the message.
        task: by which `data` is read; auto: it is not known.

    Raises:
        UserError: it holds some, or, of the test split, some by which the adapter was chosen.
    """
    for run in runs if split in ("validation", "test") else ():
        _refuse_seen(data, split, run, what, task)


def _refuse_seen(data: DataConfig, split: str, run: Trained, what: str, task: str) -> None:
    """As :func:`refuse_seen`, of one run."""
    trained = run.data
    chose = _listed(trained.validation) if split == "test" else []
    if given := _listed(getattr(data, split)):
        if same := _common(given, trained):
            raise UserError(f"data.{split} {as_given(same[0])}: {what} was trained on it: give other records")
        if same := _alike(chose, given):
            raise UserError(f"data.{split} {as_given(same[0])}: {what} was chosen by it: give other records")
        return
    if same := _alike(chose, [name for name, own in _by_name(data).items() if own.test_fraction]):
        raise UserError(
            f"data.source {as_given(same[0])}: {what} was chosen by it, and its test split would be part of it: give "
            "data.test"
        )
    for name, own in _by_name(data).items():
        for common in _common([name], trained):
            of_run = Trained(_by_name(trained)[common], run.task)
            refusal = _refusal(own, split, of_run, task, as_given(common), what)
            alone = not (data.sources or trained.sources) and len(_by_name(data)) == len(_by_name(trained)) == 1
            if refusal and not (alone and _is_apart(own, split, of_run, task)):
                raise UserError(refusal)


def _refusal(own: DataConfig, split: str, of_run: Trained, task: str, name: str, what: str) -> str:
    """Why a split of one source would hold what a run has seen of it; empty: it can't."""
    run = of_run.data
    (first, second), (tested, validated) = _shares(own), _shares(run)
    end, held_out = (first, tested) if split == "test" else (first + second, tested + validated)
    moved = [field for field in CONTENT if getattr(own, field) != getattr(run, field)]
    grouped = own.group is not None and own.group == run.group
    if grouped:  # by values of the record as it was read, whatever is made of it
        moved = [field for field in moved if field != "fields"]
    regrouped = bool(end) and not moved and not grouped and _is_regrouped(own, task, of_run.task)
    if not end or (not moved and not regrouped and end <= held_out + TIE):
        return ""
    seen = "trained on" if moved or regrouped or end > tested + validated + TIE else "chosen by"
    if regrouped:
        return (
            f"task {task}: {what} was trained by {of_run.task}, under which other records share a split, so that the "
            f"{split} split of {name} would hold records that it was {seen}: give both the same data.group, or take "
            "other records"
        )
    field = [*moved, *(field for field in SHARES if getattr(own, field) != getattr(run, field))][0]
    return (
        f"data.{field} {getattr(own, field)}: {what} was trained with {getattr(run, field)}, so that the {split} split "
        f"of {name} would hold records that it was {seen}: take that, or other records"
    )


def _is_regrouped(own: DataConfig, task: str, other: str) -> bool:
    """Whether two tasks find the split of a record by different parts of it, as it is with a prompt and all of it."""
    if "auto" in (task, other) or task == other or own.group is not None:
        return False
    of = [record_task(TaskSpec.named(name)) for name in (task, other)]
    if of[0].grouped_by == of[1].grouped_by == "":
        return False
    with suppress(UserError):  # of a record that one of them can't read
        for place, record in read_for_check(find_sources(own)["train"].chunks):
            one, two = (each.group(each.parse(record, place)) is None for each in of)
            return one is not two
    return False


def _is_apart(own: DataConfig, split: str, run: Trained, task: str) -> bool:
    """Whether a split holds none of the records that a run took, where these are few enough for that.

    Which ones it took, and which are in the split, is told by their hashes, where the source can be read in a moment.
    """
    limit, read_by = run.data.limit, ("fields", "delimiter", "encoding", "group")
    if limit is None or any(getattr(own, name) != getattr(run.data, name) for name in read_by):
        return False
    return _apart(own.model_dump_json(exclude={"cache"}), split, limit, run.data.seed, task)


@lru_cache
def _apart(data: str, split: str, limit: int, seed: int, task: str) -> bool:
    own = DataConfig.model_validate_json(data)
    source = find_sources(own)["train"]
    if not is_small(source.chunks):
        return False
    records = [located for chunk in source.chunks for located in read_chunk(chunk)]
    keys = ((order_key(record, seed), number) for number, (_, record) in enumerate(records))
    taken = {number for _, number in heapq.nsmallest(limit, keys)}
    own_keys = ((order_key(record, own.seed), number) for number, (_, record) in enumerate(records))
    judged = {number for _, number in heapq.nsmallest(own.limit or len(records), own_keys)} & taken
    if task == "auto":
        return not judged
    of = record_task(TaskSpec.named(task))

    def split_of_record(number: int) -> str:
        place, record = records[number]
        return key_place_and_split(record, source.cfg, "train", group=of.group(of.parse(record, place)))[2]

    return all(split_of_record(number) != split for number in judged)


def _shares(data: DataConfig) -> tuple[float, float]:
    """Of a source's records, those that are cut off for test and for validation."""
    return 0.0 if data.test else data.test_fraction, 0.0 if data.validation else data.validation_fraction


def _by_name(data: DataConfig) -> dict[str, DataConfig]:
    """How each source is read."""
    return data.parts if data.sources else dict.fromkeys(_listed(data.source), data)


def _listed(sources: str | list[str] | None) -> list[str]:
    return [sources] if isinstance(sources, str) else sources or []


def _common(sources: Iterable[str], trained: DataConfig) -> list[str]:
    """Sources of the run that are among these, as the run calls them."""
    return _alike(_by_name(trained), sources)


def _alike(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Those names whose records are among the others'."""
    places = {*map(_place, others)}
    return [name for name in names if _place(name) in places]


def _place(source: str) -> str:
    """The same for all names of one source; of records that a call held in memory, the digest of their content."""
    if as_given(source) != source:
        return Path(source).name.rpartition("-")[2]
    return str(Path(source).resolve()) if "://" not in source and Path(source).exists() else source
