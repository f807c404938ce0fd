"""What is exported: an adapter, the base that it is for, and the test records that its exports are proven on."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ftray.adapters.discovery import base_of, data_settings, find_adapter, saved_task
from ftray.config import Config, DataConfig, ModelConfig, config_from
from ftray.errors import UserError
from ftray.search.held_out import Trained, refuse_seen, run_of, split_as_trained, trained_by
from ftray.search.results import all_rows
from ftray.search.run_manifest import CONFIG
from ftray.storage.location import Location, parse_location
from ftray.storage.manifest import refuse_damaged
from ftray.task_spec import TaskSpec

if TYPE_CHECKING:
    from ftray.data import TokenizedData


# settings of the data that the adapter was trained by, whatever the records
OF_THE_MODEL = ("max_length", "overlong", "train_on_prompt", "learn", "template", "chat_template", "cache")


@dataclass(frozen=True)
class Source:
    """An adapter that is to be exported.

    Attributes:
        cfg: of its run where it has one, with what the command line says.
        run: the output of that run; None: it has none.
        adapter: its directory.
        base: directory or hub id of the base.
        task: of the adapter.
    """

    cfg: Config
    run: Location | None
    adapter: Path
    base: str
    task: TaskSpec


def find_source(cfg: Config) -> Source:
    """Find what `export.run`, `export.trial` or `adapters` name, without reading weights.

    Raises:
        UserError: there is no such run, trial or adapter, its base is gone, or there are no records to prove it on.
    """
    if bool(cfg.export.run) == bool(cfg.adapters):
        raise UserError("export: give --run OUTPUT or --adapter DIR")
    if len(cfg.adapters) > 1:
        raise UserError("export: takes one adapter: make one of several with ftray merge --form adapter")
    if cfg.export.trial is not None and not cfg.export.run:
        raise UserError("export.trial: is one of a search: name that by --run")
    given = find_adapter(cfg.adapters[0]) if cfg.adapters else None
    run = run_of(given) if given else parse_location(str(cfg.export.run)).absolute()
    if run and not (run / CONFIG).is_file():
        raise UserError(f"export.run {run}: no output of tune or train: it has no {CONFIG}")
    stored = _settings(run) if run else None
    adapter = given or find_adapter(_named(cfg.export.trial, stored, run))
    task = saved_task(cfg, [adapter])
    merged = cfg if stored is None else _with(stored, cfg)
    merged = merged.model_copy(update={"data": data_settings(merged, adapter), "task": task.full_name})
    refuse_seen(merged.data, cfg.evaluation.split, trained_by(adapter), f"adapter {adapter}", task.full_name)
    if stored is None and "source" not in cfg.data.model_fields_set and not cfg.data.sources:
        raise UserError(
            f"export: {adapter} lies in no output of tune or train, whose test records it could be proven on: give "
            "--data RECORDS, with the --split to take"
        )
    return Source(merged, run, adapter, base_of(merged, [adapter]), task)


def test_rows(source: Source, data: "TokenizedData", most: int) -> list[dict[str, Any]]:
    """The records that exports are proven on: at most `most`, those that the run itself was proven on.

    Raises:
        UserError: there are none.
    """
    split = source.cfg.evaluation.split
    names = [n for n in data.splits if data.splits[n].records] if split == "all" else [split]
    limit = source.cfg.evaluation.records or most
    task = data.task.load()
    rows = [task.as_shown(row) for name in names for row in data.rows(name, limit)][:limit]
    if not rows:
        raise UserError(
            f"data {source.cfg.data.names}: the {split} split is empty: an export is proven on records: take another "
            "--split, or all"
        )
    return rows


def _settings(run: Location) -> Config:
    with refuse_damaged(run / CONFIG):
        return config_from(yaml.safe_load((run / CONFIG).read_text()))


def _named(trial: int | None, stored: Config | None, run: Location | None) -> str:
    """The adapter of `run`, or of one of its trials."""
    if trial is None or stored is None or run is None:
        return str(run)
    rows = {row["trial"]: row["checkpoint"] for row in all_rows(stored, run)}
    if not (kept := rows.get(trial)):
        known = ", ".join(str(number) for number, checkpoint in sorted(rows.items()) if checkpoint)
        raise UserError(f"export.trial {trial}: has no checkpoint in {run}; those that have: {known}")
    return str(parse_location(kept) / "adapter")


def _with(stored: Config, cfg: Config) -> Config:
    """`stored` with what the command line gives; the base is the adapter's own, unless it is given."""
    sections = {}
    for name in ("model", "data", "evaluation", "export"):
        given, kept = getattr(cfg, name), getattr(stored, name)
        if name == "model":
            kept = ModelConfig(**kept.model_dump(exclude={"name"}))
        fields = {field: getattr(given, field) for field in given.model_fields_set}
        if name == "data" and fields.keys() & {"source", "sources"}:  # other records have other keys and splits
            own = split_as_trained(given, [Trained(kept)])
            kept = DataConfig(**{field: getattr(kept, field) for field in OF_THE_MODEL})
            fields = {field: getattr(own, field) for field in own.model_fields_set}
        sections[name] = type(kept)(**kept.model_dump(exclude_unset=True) | fields)
    return stored.model_copy(update=sections)
