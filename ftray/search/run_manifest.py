"""What defines a search or a training run: written to its output at the start, compared when it is resumed."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import CategoricalDistribution

from ftray.adapters.discovery import samples
from ftray.adapters.methods import parameters
from ftray.config import PYTHON_CALL, AdapterConfig, Config, SearchConfig, as_given
from ftray.data import TokenizedData
from ftray.errors import UserError
from ftray.search.journal import past_trials
from ftray.search.provenance import note_command
from ftray.search.results import JOURNAL, write_json, write_yaml
from ftray.search.space import Space
from ftray.storage.location import FULL, Location, parse_location
from ftray.storage.manifest import refuse_damaged

CONFIG, SPACE, DATA, LOCK = "config.yaml", "space.yaml", "data.json", ".lock"


@dataclass(frozen=True)
class Kind:
    """A kind of output: a search or a training run.

    Attributes:
        name: for messages.
        state: files; if any of them exists, the output holds one.
        parts: files without which it can't be resumed.
        free: fields and sections that may change when it is resumed: how long and where it runs, what follows it.
    """

    name: str
    state: tuple[str, ...]
    parts: tuple[str, ...]
    free: set[str]


_ANYWHERE = {
    "data.cache",
    "search.max_failures",
    "scaling.packs",
    "scaling.cpus_per_worker",
    "scaling.gpus_per_worker",
    "scaling.address",
    "scaling.price_per_hour",
    "evaluation",
    "suite",
    "generation",
    "merge",
    "export",
    "serving",
    "request",
    "ui",
}
SEARCH = Kind(
    "search",
    ("tune", "study.log", "summary.json"),
    (CONFIG, SPACE),
    _ANYWHERE
    | {
        "adapter",  # the space defines the adapters
        "search.space",  # by content, not by name
        "search.trials",
        "search.best",  # what it is about must have been measured
        "search.time_budget",
        "search.concurrency",
        "search.trackers",
        "search.finalist_seeds",
        "search.warm_start",  # the trials that it has shaped are in the journal
    },
)
RUN = Kind(
    "run",
    ("train",),
    (CONFIG,),
    # of the search section only what decides which checkpoint is the best matters
    _ANYWHERE | {f"search.{name}" for name in SearchConfig.model_fields if name not in ("metric", "direction")},
)
_AGAIN = "take that, or name another --output"


def packable(cfg: Config, space: Space) -> bool:
    """Whether trials can train in packs: not where ZeRO 3 shards the base model over the workers of one trial.

    Raises:
        UserError: they can't, and `search.pack` is a number.
    """
    stages = {cfg.training.zero_stage, *(corner["training"].get("zero_stage", 0) for corner in space.corners())}
    if 3 in stages and isinstance(cfg.search.pack, int):
        raise UserError(
            f"search.pack {cfg.search.pack}: ZeRO 3 shards the base model over the workers of one trial; "
            "take zero_stage 0, 1 or 2, or pack off"
        )
    return 3 not in stages


def trains_in_packs(cfg: Config, space: Space) -> bool:
    """Whether the trials of a search train together; else each has workers of its own.

    Raises:
        UserError: as :func:`packable`.
    """
    return cfg.search.pack != "off" and packable(cfg, space)


@contextmanager
def sole_driver(output: Location, kind: Kind = SEARCH) -> Iterator[None]:
    """Hold the output; it is released when this process ends, however it ends.

    Raises:
        UserError: another driver holds it.
    """
    with (output / LOCK).hold(lambda: _under_way(output, kind)):
        yield


def refuse_held(output: Location, kind: Kind = SEARCH) -> None:
    """Find out that :func:`sole_driver` would refuse the output, before anything that takes long.

    Raises:
        UserError: another driver holds it.
    """
    if (output / LOCK).is_held():
        raise _under_way(output, kind)


def _under_way(output: Location, kind: Kind) -> UserError:
    if kind is RUN and not (output / SPACE).exists():
        return UserError(f"output {output}: a run is under way there; wait for its end, or name another --output")
    return UserError(f"output {output}: a search is running there; see ftray status --run {output}")


def running_since(output: Location) -> float | None:
    """When the driver that holds the output directory began, in seconds since 1970; None: nobody holds it."""
    return (output / LOCK).held_since()


def check_output(cfg: Config, space: Space | None) -> None:
    """Refuse an output that holds another search or run, can't be written to or has no free space.

    With `--resume` and nothing to resume, a new one starts: a job that is resubmitted automatically has one command.

    Args:
        cfg: configuration, with the output.
        space: of a search; None: it is a training run.

    Raises:
        UserError: one of these; with `--resume`, also a configuration or space that differs from the stored one.
    """
    output, kind = parse_location(cfg.output), RUN if space is None else SEARCH
    output.check_writable()
    refuse_occupied(output, kind, cfg.resume)
    there = _state(output, kind)
    if there:
        if lost := [name for name in kind.parts if not (output / name).exists()]:
            raise UserError(f"output {output}: the {kind.name} there can't be resumed without its {lost[0]}")
        _refuse_another(cfg, kind, output)
        if space is not None:
            _refuse_other_space(space, output)
    elif cfg.resume:
        print(f"output {output} holds no {kind.name} yet: it begins", flush=True)
    free = output.free_bytes()
    if free < 2**30:
        raise UserError(f"output {output}: {free / 2**30:.1f} GiB free, a {kind.name} needs at least 1 GiB")


def refuse_occupied(output: Location, kind: Kind, resume: bool) -> None:
    """Refuse an output that holds another search or run.

    Args:
        resume: whether one of this `kind` is to be continued.

    Raises:
        UserError: it does.
    """
    other = SEARCH if kind is RUN else RUN
    if there := _state(output, other):
        raise UserError(f"output {output} holds a {other.name} ({there}), not a {kind.name}: name another --output")
    there = _state(output, kind)
    if there and not resume:
        raise UserError(
            f"output {output} already holds a {kind.name} ({there}): add --resume to continue it, or name another"
        )


def is_full(output: Location, error: BaseException | None) -> bool:
    """Whether the disk of `output` is full, or its quota exhausted, or `error` was caused by that.

    Libraries wrap such an error, and Ray passes the text of what a worker raised on without its cause: the text counts.
    """
    chain: list[BaseException] = []
    while error:
        chain.append(error)
        error = error.__cause__ or error.__context__
    if any((isinstance(e, OSError) and e.errno in FULL) or os.strerror(errno.ENOSPC) in str(e) for e in chain):
        return True
    return output.is_full()


def write_definition(cfg: Config, space: Space | None, output: Location) -> None:
    """Write the configuration and the space, unless this resumes: then :func:`write_data` does.

    The log of a command, which may be all that is left of a job, begins with the configuration.
    """
    if not PYTHON_CALL.get():
        print(yaml.safe_dump(_resolved(cfg), sort_keys=False), flush=True)
    if not _state(output, RUN if space is None else SEARCH):
        _keep(cfg, space, output)
        if (output / DATA).exists():  # of one that ended before its search or run began
            (output / DATA).unlink()


def write_data(cfg: Config, space: Space | None, base: str, data: TokenizedData, output: Location) -> None:
    """Write what is trained on: each split's counts and digest, and digests that identify the base model.

    Only then is the stored configuration replaced, so that the output never holds one that was not run.

    Raises:
        UserError: this resumes, and data or base model have changed: trials could not be compared.
    """
    kind, path = RUN if space is None else SEARCH, output / DATA
    places = ("files", "longest_cut_at")  # where they lie says nothing of what they are
    splits = {
        name: {k: v for k, v in split.to_json().items() if k not in places} for name, split in data.splits.items()
    }
    found: dict[str, Any] = {**splits, "base": [list(sample) for sample in samples(Path(base))]}
    with refuse_damaged(path):
        known = json.loads(path.read_text()) if path.exists() and _state(output, kind) else {}
        changed = [name for name, before in known.items() if not _alike(before, found[name])]
    for name in changed:
        what = f"model {cfg.model.name}" if name == "base" else "data"
        raise UserError(f"{what}: not what the {kind.name} in {output} was trained on (see its {DATA}); {_AGAIN}")
    write_json(found, path)
    _keep(cfg, space, output)
    note_command(output)


def _state(output: Location, kind: Kind) -> str | None:
    return next((name for name in kind.state if (output / name).exists()), None)


def _resolved(cfg: Config) -> dict[str, Any]:
    return cfg.model_dump(exclude={"resume", "plan", "show", "png", "verbose", "ui"})


def _keep(cfg: Config, space: Space | None, output: Location) -> None:
    write_yaml(_resolved(cfg), output / CONFIG)
    if space is not None:
        write_yaml(space.content, output / SPACE)


def _alike(before: object, now: object) -> bool:
    """Whether they are equal in the fields that both have; files of older versions lack some."""
    if isinstance(before, dict) and isinstance(now, dict):
        return all(_alike(value, now.get(name)) for name, value in before.items())
    return before == now or "" in (before, now)


def _refuse_another(cfg: Config, kind: Kind, output: Location) -> None:
    given = _fields(cfg.model_dump(mode="json"), kind)
    # files of older versions lack some fields: those had their defaults
    stored = _fields(Config().model_dump(mode="json"), kind)
    with refuse_damaged(output / CONFIG):
        stored |= _fields(_read(output / CONFIG), kind)
    for field in given:
        if stored.get(field) == given[field]:
            continue
        said = [as_given(str(value)) for value in (given[field], stored.get(field))]
        now, before = ("records in memory" if one == field else one for one in said)
        if now == before:
            raise UserError(f"{field}: other records than those of the {kind.name} in {output}; {_AGAIN}")
        raise UserError(f"{field} {now}: the {kind.name} in {output} has {before}; {_AGAIN}")


def _refuse_other_space(space: Space, output: Location) -> None:
    if _read(output / SPACE) != space.content:
        raise UserError(f"{space.source}: not the space of the search in {output} (see its {SPACE}); {_AGAIN}")
    _refuse_other_choices(space, output)


def _refuse_other_choices(space: Space, output: Location) -> None:
    """Refuse choices that differ from the stored ones, for which Optuna would end with a traceback."""
    choices = space.choices()
    for trial in past_trials(output / JOURNAL):
        for name, known in trial.distributions.items():
            if isinstance(known, CategoricalDistribution) and choices.get(name, known.choices) != known.choices:
                raise UserError(
                    f"output {output}: the search there is of an older ftray, which stored the choices of {name} "
                    "in another way: name another --output"
                )


def _fields(config: dict[str, Any], kind: Kind) -> dict[str, Any]:
    """The fields that define a search or run, by dotted name; for an adapter, every parameter of its method."""
    sections = {k: v for k, v in config.items() if isinstance(v, dict) and k not in kind.free}
    if adapter := sections.get("adapter"):
        own = parameters(AdapterConfig(**adapter)).model_dump(mode="json")
        sections["adapter"] = {"method": adapter.get("method", AdapterConfig().method), **own}
    fields = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    kept = {name: value for name, value in fields.items() if name not in kind.free}
    return {"task": config.get("task", "CAUSAL_LM"), **kept}


def _read(path: Location) -> dict[str, Any]:
    with refuse_damaged(path):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"holds a {type(content).__name__}")
    return content
