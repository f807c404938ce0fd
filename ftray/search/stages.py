"""Several trainings by one command, each of which starts from the adapter of the one before: SFT, then DPO."""

import json
from collections.abc import Callable
from typing import Any

from ftray.adapters.discovery import find_adapter
from ftray.adapters.methods import named
from ftray.config import AdapterConfig, Config, StartConfig, config_from
from ftray.errors import UserError
from ftray.search.starting_point import refuse_merged_elsewhere
from ftray.storage.location import parse_location
from ftray.storage.manifest import MANIFEST, refuse_damaged


def run_stages(cfg: Config, check: Callable[[Config], object], run: Callable[[Config], int], result: str) -> int:
    """Run a command once a stage, in `1-sft`, `2-dpo`, ... of its output; returns its exit code.

    All stages are checked before the first one begins. With `resume`, those that are over stay as they are.

    Args:
        check: what the command checks before anything expensive.
        result: where it leaves its adapter, in its output.

    Raises:
        UserError: as the command; names the stage.
    """
    stages = stage_configs(cfg)
    first, *later = stages.items()
    plans = "plan" in cfg.model_fields_set and cfg.plan  # only a search does
    for name, stage in later:
        _check_later(name, stage, first[1], check)
    for number, (name, stage) in enumerate(stages.items(), 1):
        if stage.resume and is_over(stage, result):
            print(f"stage {number} of {len(stages)}, {name}: is over, see {stage.output}", flush=True)
            continue
        print(f"stage {number} of {len(stages)}, {name}: {stage.output}", flush=True)
        # what a later stage starts from is not there yet, and has the size of what the first one does
        if plans and number > 1:
            stage = _from_base_of(first[1], stage)
        if code := run(stage):
            return code
    if not plans:
        for stage in stages.values():
            print(f"stage    {find_adapter(stage.output)}", flush=True)
    return 0


def stage_configs(cfg: Config) -> dict[str, Config]:
    """The configuration of each stage, by the name of its directory.

    Raises:
        UserError: one is not valid, or `task` says what stages say.
    """
    if cfg.task != "auto":
        raise UserError(f"task {cfg.task}: stages say what is learnt: leave it out")
    common = cfg.model_dump(exclude_unset=True, exclude={"stages"})
    found: dict[str, Config] = {}
    before = ""
    for number, stage in enumerate(cfg.stages, 1):
        name = f"{number}-{stage.task.lower()}"
        values = _over(common, stage.model_dump(exclude_unset=True))
        values["output"] = str(parse_location(cfg.output) / name)
        if before:
            values["start"] = values.get("start", {}) | {"adapter": before}
            # the base is what the adapter was made for
            values["model"] = {key: value for key, value in values.get("model", {}).items() if key != "name"}
        try:
            found[name] = config_from(values)
        except UserError as error:
            raise UserError(f"stages[{number - 1}], {stage.task.lower()}: {error}") from None
        before = values["output"]
    return found


def last_output(cfg: Config) -> str:
    """Where the last stage leaves its result."""
    return list(stage_configs(cfg).values())[-1].output


def _over(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`common` with what `own` says of single fields."""
    both = {key: _over(common[key], own[key]) for key in common.keys() & own if isinstance(common[key], dict)}
    return {**common, **own, **both}


def is_over(stage: Config, result: str) -> bool:
    """Whether a stage has come to its end: its adapter is there, and of a search its proof."""
    output = parse_location(stage.output)
    if not (output / result / f"{MANIFEST}.json").is_file():
        return False
    summary = output / "summary.json"
    if not summary.is_file():  # of `train`, where the adapter comes last
        return not (output / "space.yaml").is_file()
    with refuse_damaged(summary):
        found = json.loads(summary.read_text(encoding="utf-8"))
        is_merged = bool(found["proof"]) and "path" in found["proof"]["merged"]
        adapter = AdapterConfig(**found["best"]["config"]["adapter"])
    return is_merged or (bool(found["proof"]) and named(adapter)[1].merge_tolerance is None)


def _check_later(name: str, stage: Config, first: Config, check: Callable[[Config], object]) -> None:
    """Check a stage before the one that it starts from has begun; if it has begun itself, it is checked in its turn."""
    if (parse_location(stage.output) / "config.yaml").exists():
        return
    try:
        refuse_merged_elsewhere(stage)
        check(_from_base_of(first, stage))
    except UserError as error:
        raise UserError(f"stage {name}: {error}") from None


def _from_base_of(first: Config, stage: Config) -> Config:
    """A stage from what the first one starts from, which has the size and templates of what it will start from."""
    start = StartConfig(adapter=first.start.adapter)
    return stage.model_copy(update={"model": first.model, "start": start, "resume": False})
