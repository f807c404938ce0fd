"""What is to be served: a base model, named adapters, and the search that they come from."""

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from ftray.adapters.discovery import MERGED_BASE
from ftray.config import Config
from ftray.errors import UserError
from ftray.serving import pooling
from ftray.serving.registry import AdapterEntry, Registry, adapter_in, check_name
from ftray.storage.location import Location, parse_location, reason
from ftray.storage.manifest import refuse_damaged
from ftray.task_spec import CAUSAL, CHAT, FILE, TaskSpec


@dataclass(frozen=True)
class Catalog:
    """What is served.

    Attributes:
        base: name of the base model.
        model_path: directory of the base model.
        adapters: directory or URI of each adapter, by name.
        task: of all models.
    """

    base: str
    model_path: str
    adapters: dict[str, str]
    task: TaskSpec = CAUSAL


def find_catalog(cfg: Config) -> Catalog:
    """Find and check all that is to be served, without reading weights.

    Raises:
        UserError: something is missing or does not fit.
    """
    from ftray.models.find import find
    from ftray.models.stored import as_stored

    run = parse_location(cfg.serving.run) if cfg.serving.run else None
    run = run and run.absolute()
    if run and not (run / "summary.json").is_file():
        raise UserError(f"serving.run {run}: no finished search: it has no summary.json")
    if cfg.serving.max_replicas < cfg.serving.min_replicas:
        raise UserError("serving.max_replicas: must not be below serving.min_replicas")
    if cfg.serving.merged:
        if run is None or cfg.adapters:
            raise UserError("serving.merged: serves the merged model of a run alone: name a --run, and no --adapter")
        merged = run / "best" / "merged"
        if merged.local_path is None:
            raise UserError(f"serving.merged: copy {merged} to a directory, and give that as --model")
        return Catalog("best", find(str(merged)), {}, _served(cfg, run, {}, ""))
    path = find(cfg.model.name)
    if cfg.serving.engine == "builtin":  # vLLM reads more formats
        as_stored(cfg.model, path)
    adapters = {} if run is None else _of_run(run)
    for given in cfg.adapters:
        name, equals, source = given.partition("=")
        if not equals or not source:
            raise UserError(f"--adapter {given!r}: must be NAME=DIRECTORY or NAME=URI")
        adapters[check_name(name)] = adapter_in(source if "://" in source else str(Path(source).absolute()))
    base = Path(cfg.model.name).name.removesuffix(".gguf")
    if base in adapters:
        raise UserError(f"adapter {base}: the base model has that name")
    task = _served(cfg, run, adapters, path)
    if local := [Path(source) for source in adapters.values() if "://" not in source]:
        from ftray.serving.adapters import check_adapter  # with PEFT and torch, which take seconds

        for directory in local:
            check_adapter(directory, path, task)
    Registry(cfg.serving, adapters)  # refuses a file that can't be read
    if cfg.serving.registry:
        parse_location(cfg.serving.registry).parent.check_writable("serving.registry")
    return Catalog(base, path, adapters, task)


def _served(cfg: Config, run: Location | None, adapters: dict[str, str], path: str) -> TaskSpec:
    """The task of the run's best adapter, else of the first given adapter, else of the model by itself.

    Raises:
        UserError: no route serves it.
    """
    places = [*([str(run / "best" / "adapter")] if run else []), *(s for s in adapters.values() if "://" not in s)]
    spec = next((found for place in places if (found := kept_task(place))), None)
    if spec is None:
        spec = TaskSpec.named(CAUSAL.name if cfg.task == "auto" else cfg.task)
        if spec != CAUSAL and path:
            from ftray.models.load import own_labels

            spec = replace(spec, labels=own_labels(path, spec))
    kind, _ = spec.kind  # scores of a reward model are no classes
    if kind not in ("CAUSAL_LM", *pooling.ROUTES):
        raise UserError(f"serve: no route answers {kind}; the merged model is a plain transformers directory")
    return spec


def kept_task(source: str) -> TaskSpec | None:
    """The task that was kept beside the adapter in `source`, a directory or URI; None: none was.

    Raises:
        UserError: it can't be read.
    """
    file = parse_location(source) / FILE
    try:
        return TaskSpec.of(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
    except OSError as error:
        raise UserError(f"adapter {source}: can't be read: {error.strerror or reason(error)}") from None


@lru_cache(maxsize=1024)
def how_to_ask(entry: AdapterEntry) -> dict[str, str | None]:
    """The template by which prompts of an adapter were rendered, by its name; None: its chat template.

    Empty where it is not known.
    """
    try:
        spec = kept_task(entry.source)
    except UserError:
        return {}
    if spec is None or spec.template is None:
        return {}
    return {entry.id.partition("@")[0]: None if spec.template == CHAT else spec.template}


def _of_run(run: Location) -> dict[str, str]:
    """The best adapter of a search, and that of every trial that has a checkpoint."""
    with refuse_damaged(run / "summary.json"):
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        trials = {f"trial-{row['trial']}": str(row["checkpoint"]) for row in summary["trials"] if row["checkpoint"]}
    best = run / "best" / "adapter"
    found = {"best": str(best)} if (best / "adapter_config.json").is_file() else {}
    kept = {name: str(parse_location(checkpoint) / "adapter") for name, checkpoint in trials.items()}
    return found | {name: source for name, source in kept.items() if "://" in source or Path(source).is_dir()}


def model_of_run(cfg: Config) -> Config:
    """`cfg` with the base model of the run, where a run is served."""
    if not cfg.serving.run:
        return cfg
    path = parse_location(cfg.serving.run) / "config.yaml"
    try:
        with refuse_damaged(path):
            written = yaml.safe_load(path.read_text(encoding="utf-8"))
            model = type(cfg.model).model_validate(written["model"])
        merged = (path.parent / MERGED_BASE).local_path  # the base that the run's adapters are for, if there is one
        if (written.get("start") or {}).get("adapter") and merged and merged.is_dir():
            model = model.model_copy(update={"name": str(merged.resolve())})
        return cfg.model_copy(update={"model": model})
    except OSError as error:
        why = error.strerror or reason(error)
        raise UserError(f"serving.run {cfg.serving.run}: config.yaml: {why}") from None


def leaderboard(run: str | None) -> dict[str, Any]:
    """What the page shows of a search: its metric, its trials, the template of plain prompts; empty without one.

    A template of None: the chat template renders plain prompts.
    """
    from ftray.search.progress import describe

    if run is None:
        return {"metric": None, "template": None, "trials": []}
    summary = json.loads((parse_location(run) / "summary.json").read_text(encoding="utf-8"))
    written = yaml.safe_load((parse_location(run) / "config.yaml").read_text(encoding="utf-8"))
    trials = [
        {**{name: row[name] for name in ("trial", "value", "status")}, "configuration": describe(row["config"])}
        for row in summary["trials"]
    ]
    template = written["data"]["template"]
    if template == "auto":
        spec = kept_task(str(parse_location(run) / "best" / "adapter")) or CAUSAL
        template = None if spec.template == CHAT else spec.template
    return {"metric": summary["metric"], "template": template, "trials": trials}
