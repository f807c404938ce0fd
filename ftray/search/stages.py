"""Several trainings by one command, each of which starts from the adapter of the one before: SFT, then DPO."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from ftray.adapters.discovery import find_adapter
from ftray.adapters.methods import named, parameters
from ftray.config import AdapterConfig, Config, StageConfig, StartConfig, config_from
from ftray.errors import UserError
from ftray.search.held_out import Trained, refuse_seen
from ftray.search.space import Space, load_space
from ftray.search.starting_point import (
    find_start,
    refuse_adapters,
    refuse_merged_elsewhere,
    refuse_method,
    refuse_stage_3,
    starts_at,
)
from ftray.storage.location import parse_location
from ftray.storage.manifest import MANIFEST, refuse_damaged
from ftray.task_spec import TaskSpec


def run_stages(cfg: Config, check: Callable[[Config], Sequence[Any]], run: Callable[[Config], int], result: str) -> int:
    """Run a command once a stage, in `1-sft`, `2-dpo`, ... of its output; returns its exit code.

    All stages are checked before the first one begins. With `resume`, those that are over stay as they are.

    Args:
        check: what the command checks before anything expensive.
        result: where it leaves its adapter, in its output.

    Raises:
        UserError: as the command; names the stage.
    """
    stages = stage_configs(cfg)
    first, *_ = stages.items()
    plans = "plan" in cfg.model_fields_set and cfg.plan  # only a search does
    _check_all(stages, check)
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
        values["training"] = _read_by(stage, values.get("training", {}), cfg)
        if before:
            values["start"] = values.get("start", {}) | {"adapter": before}
            if values["start"].get("form") == "kept":  # what all stages are given is for those that make an adapter
                values["adapter"] = stage.adapter
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


def _read_by(stage: StageConfig, training: dict[str, Any], cfg: Config) -> dict[str, Any]:
    """`training` without what all stages were given and only others have a use for, as DPO for `beta`."""
    objectives = {one.task: TaskSpec.named(one.task).load().objective.settings for one in cfg.stages}
    others = {name for settings in objectives.values() for name in settings} - {*objectives[stage.task]}
    return {name: value for name, value in training.items() if name not in others or name in stage.training}


def _check_all(stages: dict[str, Config], check: Callable[[Config], Sequence[Any]]) -> None:
    """Check stages that have not begun, each by what the one before may leave; others are checked in their turn."""
    first = next(iter(stages.values()))
    adapters: list[AdapterConfig] = []  # those that the stage before may leave; none: they are not known
    before: tuple[str, Config] | None = None
    trained: list[Trained] = []
    for name, stage in stages.items():
        if (parse_location(stage.output) / "config.yaml").exists():
            adapters = []
        else:
            try:
                own = _may_leave(check(_from_base_of(first, stage) if before else stage))
                if before:
                    refuse_seen(stage.data, "test", trained[::-1], "the adapter of an earlier stage", stage.task)
                    _refuse_start(stage, *before, adapters)
            except UserError as error:
                raise UserError(f"stage {name}: {error}" if before else str(error)) from None
            adapters = adapters if before and stage.start.form == "kept" else own
        before = name, stage
        trained.append(Trained(stage.data, stage.task))


def _may_leave(checked: Sequence[Any]) -> list[AdapterConfig]:
    """The adapters that a stage may end with, of what its command has checked: one, or those of its space."""
    cfg, space = checked[:2]
    if not isinstance(space, Space):
        return [cfg.adapter]
    return [AdapterConfig(**adapter) for adapter in (space.default, *(corner["adapter"] for corner in space.corners()))]


def _refuse_start(stage: Config, name: str, before: Config, adapters: Sequence[AdapterConfig]) -> None:
    """Refuse what the end of the stage before would show, hours later.

    Raises:
        UserError: the stage can't start from an adapter that the one before, `name`, may leave.
    """
    kinds = [TaskSpec.named(one.task).kind[0] for one in (before, stage)]
    if kinds[0] != kinds[1]:
        raise UserError(f"starts from the adapter of {name}, which is for {kinds[0]}, and {stage.task} is to be learnt")
    if stage.start.form == "merged":
        refuse_merged_elsewhere(stage)
    else:
        refuse_stage_3(stage)
        if set_ := stage.adapter.model_fields_set:
            raise UserError(
                f"adapter.{min(set_)}: the adapter of {name} is kept, and stays as it is: say it of {name} alone"
            )
    methods = dict.fromkeys(named(adapter)[0] for adapter in adapters)
    for adapter in adapters:
        own = parameters(adapter).model_dump(by_alias=True)
        has_encoder = bool({**own, **own.get("config", {})}.get("prefix_projection"))
        refuse_method(named(adapter)[0], has_encoder, stage.start.form, f"the adapter that {name} may leave")
    if stage.start.form == "kept" and "space" in stage.search.model_fields_set:
        space = load_space(stage.search.space)
        refuse_adapters(space)
        (method,) = space.methods
        if {*methods} - {method} and method != "peft":
            raise UserError(
                f"{space.source}: method {method}: {name} may leave an adapter of {', '.join(methods)}, which stays as "
                "it is: name that, or take --from-as merged"
            )


def _from_base_of(first: Config, stage: Config) -> Config:
    """A stage from what the first one starts from, which has the size and templates of what it will start from."""
    begun = starts_at(first, find_start(first))
    data = stage.data
    if "template" not in data.model_fields_set:
        data = data.model_copy(update={name: getattr(begun.data, name) for name in ("template", "chat_template")})
    return stage.model_copy(update={"model": begun.model, "data": data, "start": StartConfig(), "resume": False})
