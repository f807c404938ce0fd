"""What training starts from: the base, or an adapter that was trained before, merged into its base or kept.

Merged, the sum is a base as any other, and lies in the output. Kept, trials begin with that adapter's weights, in its
configuration, and what they are compared with is the base with that adapter.
"""

import shutil
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftray.adapters.discovery import (
    CONFIG,
    MERGED_BASE,
    START,
    adapter_config,
    base_of,
    check_chat_template,
    data_settings,
    find_adapter,
    samples,
    saved_task,
)
from ftray.adapters.methods import METHODS, NO_SETTINGS
from ftray.config import AdapterConfig, Config, ModelConfig, TrainingConfig
from ftray.errors import UserError
from ftray.models.find import find
from ftray.runtime.cluster import on_hardware
from ftray.search.held_out import refuse_seen, trained_by
from ftray.search.space import Space, space_from
from ftray.storage.atomic import atomic_dir
from ftray.storage.location import Location, parse_location
from ftray.storage.manifest import check
from ftray.task_spec import TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# of a configuration of PEFT, how weights begin: they are there
_BEGINNINGS = ("init_lora_weights", "eva_config", "loftq_config", "corda_config", "lora_ga_config")
RATES = {"log": [1e-5, 1e-3]}  # of a kept adapter, where no space says others: it has left its beginning behind

_NO_STAGE_3 = "a trial can't begin with the weights of an adapter there: take --from-as merged, or stage 2"


@dataclass(frozen=True)
class StartingPoint:
    """An adapter that training starts from.

    Attributes:
        adapter: its directory.
        base: directory or hub id of the model that it was made for.
        task: that it was trained for.
        kept: whether training goes on from its weights; else it is merged into its base.
    """

    adapter: Path
    base: str
    task: TaskSpec
    kept: bool

    @property
    def kind(self) -> str:
        """Its method, by the name that the registry gives it."""
        return str(adapter_config(self.adapter).peft_type.value).lower()


def find_start(cfg: Config) -> StartingPoint | None:
    """The adapter that `start.adapter` names, found to fit its base; None: training starts from the base.

    Raises:
        UserError: there is none, it is damaged or for another base than `model.name`, or can't be merged, or kept.
    """
    if cfg.start.adapter is None:
        if cfg.start.form == "kept":
            raise UserError("start.form kept: of which adapter? Name it by --from")
        return None
    adapter = find_adapter(cfg.start.adapter)
    task = saved_task(cfg.model_copy(update={"task": "auto"}), [adapter])
    if cfg.task != "auto":
        _refuse_other_task(adapter, task, cfg.task)
    start = StartingPoint(adapter, base_of(cfg, [adapter]), task, cfg.start.form == "kept")
    refuse_seen(cfg.data, "test", trained_by(adapter), f"adapter {adapter}", cfg.task)
    if start.kept:
        refuse_stage_3(cfg)
    else:
        refuse_merged_elsewhere(cfg)
    has_encoder = bool(getattr(adapter_config(adapter), "prefix_projection", False))
    refuse_method(start.kind, has_encoder, cfg.start.form, f"adapter {adapter}")
    return start


def refuse_merged_elsewhere(cfg: Config) -> None:
    """Refuse an output without directories of this machine, if a merged base is to lie in it.

    Raises:
        UserError: it is one.
    """
    if cfg.start.form == "merged" and parse_location(cfg.output).local_path is None:
        raise UserError(
            f"output {cfg.output}: the merged base would lie there, and models are read from directories: take "
            "--from-as kept, or ftray merge, and the merged model as --model"
        )


def refuse_method(kind: str, has_encoder: bool, form: str, of: str) -> None:
    """Refuse to start from an adapter whose method doesn't allow it.

    Args:
        kind: its method, by the name that the registry gives it.
        has_encoder: whether a prefix came from an encoder.
        form: `merged` or `kept`.
        of: the adapter, for the message.

    Raises:
        UserError: it can't be merged, or kept.
    """
    if form == "merged":
        if kind in METHODS and METHODS[kind].merge_tolerance is None:
            raise UserError(f"{of}: {kind} can't be merged into the base: take --from-as kept")
    elif kind == "adalora":
        raise UserError(
            f"{of}: the ranks of adalora are allotted, and training would allot them anew: take --from-as merged"
        )
    elif kind in ("p_tuning", "cpt") or has_encoder:
        raise UserError(f"{of}: {kind} saves what its encoder gave, not the encoder that was trained: train anew")


def refuse_stage_3(cfg: Config) -> None:
    """Raise a UserError if ZeRO 3 is to train an adapter that is kept."""
    if cfg.training.zero_stage == 3:
        raise UserError(f"training.zero_stage 3: {_NO_STAGE_3}")


def starts_at(cfg: Config, start: StartingPoint | None) -> Config:
    """`cfg` with the base and the prompt templates of the starting point, unless it gives others."""
    if start is None:
        return cfg
    model = cfg.model if "name" in cfg.model.model_fields_set else cfg.model.model_copy(update={"name": start.base})
    return cfg.model_copy(update={"model": model, "data": data_settings(cfg, start.adapter)})


def labels_of(start: StartingPoint | None) -> tuple[str, ...]:
    """The classes that the starting point tells apart, by index; empty: those of the records count."""
    return start.task.labels if start else ()


def refuse_unfit(start: StartingPoint | None, cfg: Config, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse an adapter of another kind of task than is learnt, whose template is gone, or which has changed.

    Args:
        cfg: with the task, as it was inferred.

    Raises:
        UserError: it is one.
    """
    if start is None:
        return
    _refuse_other_task(start.adapter, start.task, cfg.task)
    check_chat_template(start.adapter, cfg.data, tokenizer)
    kept = (parse_location(cfg.output) / START).local_path
    if cfg.resume and kept and kept.is_dir() and samples(kept) != samples(start.adapter):
        raise UserError(
            f"adapter {start.adapter}: has changed since output {cfg.output} began (see {kept}): name another --output"
        )


def _refuse_other_task(adapter: Path, task: TaskSpec, wanted: str) -> None:
    if TaskSpec.named(wanted).kind[0] != task.kind[0]:
        raise UserError(
            f"adapter {adapter}: is for {task.full_name}, and {wanted} is to be learnt: start from the base, or give "
            "another --task"
        )


def kept_adapter(adapter: Path) -> AdapterConfig:
    """The configuration of a saved adapter, which its weights fit: what differs from PEFT's defaults."""
    config = adapter_config(adapter)
    given = config.to_dict()
    found: dict[str, Any] = {"peft_type": config.peft_type.value}
    for field in fields(config):
        value = given.get(field.name)
        usual = field.default_factory() if callable(field.default_factory) else field.default
        if field.name in (*NO_SETTINGS, *_BEGINNINGS, "peft_type", "fan_in_fan_out") or value in (None, usual):
            continue
        found[field.name] = sorted(value) if isinstance(value, set | list | tuple) else value
    return AdapterConfig(method="peft", config=found)


def with_kept(cfg: Config, start: StartingPoint | None) -> Config:
    """`cfg` with the configuration of the adapter that is kept, if there is one.

    Raises:
        UserError: it asks for another one.
    """
    if start is None or not start.kept:
        return cfg
    own = kept_adapter(start.adapter)
    if cfg.adapter.model_fields_set and cfg.adapter != own:
        name = next(iter([*cfg.adapter.parameters, "method"]))
        raise UserError(
            f"adapter.{name}: the adapter {start.adapter} is kept, and stays as it is: leave it out, or take "
            "--from-as merged"
        )
    return cfg.model_copy(update={"adapter": own})


def kept_space(space: Space, start: StartingPoint, is_given: bool) -> Space:
    """The space of training settings in which trials go on from the adapter.

    Args:
        space: its method is that of the adapter, and it says nothing of its parameters.
        is_given: whether it is the user's; else what it says of training alone counts.

    Raises:
        UserError: it varies adapters.
    """
    own = kept_adapter(start.adapter)
    shared = {key: value for key, value in space.content.items() if key in TrainingConfig.model_fields}
    content: dict[str, Any] = {"learning_rate": RATES} | shared
    if is_given:
        refuse_adapters(space)
        (method,) = space.methods
        if method not in (start.kind, "peft"):
            raise UserError(
                f"{space.source}: method {method}: the adapter {start.adapter} is of {start.kind}, and stays as it is: "
                "name that, or take --from-as merged"
            )
        content = {key: value for key, value in space.content.items() if key not in ("method", method)}
        content |= space.content.get(method) or {}
    whole = {"method": "peft", **content, "peft": {"config": own.parameters["config"]}}
    made = space_from(whole, space.source, {"method": "peft", **own.parameters})
    if any(corner["training"].get("zero_stage") == 3 for corner in made.corners()):
        raise UserError(f"{space.source}: zero_stage 3: {_NO_STAGE_3}")
    return made


def refuse_added(cfg: Config, space: Space, adapter: dict[str, Any]) -> None:
    """Refuse to add a configuration with another adapter than the one that a search has kept.

    Args:
        cfg, space: of the search.

    Raises:
        UserError: it is another one.
    """
    if cfg.start.adapter is None or cfg.start.form == "merged":
        return
    if adapter.get("config") != space.content["peft"]["config"]:
        raise UserError(
            f"adapter: the search has kept the adapter {cfg.start.adapter}, and tries no other: ftray clone takes "
            "training settings, and the weights of a trial"
        )


def refuse_adapters(space: Space) -> None:
    """Refuse a space that is about adapters, where one is kept.

    Raises:
        UserError: it has several methods, or parameters of one.
    """
    told = "a kept adapter stays as it is, and a space varies training settings alone: take --from-as merged"
    if len(space.methods) > 1:
        raise UserError(f"{space.source}: method {', '.join(space.methods)}: {told}")
    (method,) = space.methods
    for name in space.own.get(method, {}):
        if name not in TrainingConfig.model_fields:
            raise UserError(f"{space.source}: {method}.{name}: {told}")


def begin(cfg: Config, start: StartingPoint | None, model_path: str, output: Location) -> tuple[str, str]:
    """Put into `output` what training starts from, unless it is there; Ray must be initialised.

    Returns:
        Directory (or hub id) of the base, and of the adapter that trials begin with, or an empty text.

    Raises:
        UserError: the adapter can't be merged, or what is there is damaged.
    """
    if start is None:
        return model_path, ""
    kept = output.absolute() / START
    if not (kept / CONFIG).is_file():
        output.mkdir(parents=True, exist_ok=True)
        with atomic_dir(kept) as made:
            shutil.copytree(start.adapter, made, dirs_exist_ok=True)
    if start.kept:
        with kept.as_local_dir() as directory:
            check(directory, f"adapter {kept}")
        return model_path, str(kept)
    place = output.absolute() / MERGED_BASE
    if not place.exists():
        print(f"base: {start.adapter} is merged into {start.base}, once", file=sys.stderr, flush=True)
        _merged_on_hardware(cfg, start, place)
    return find(str(place)), ""


def _merged_on_hardware(cfg: Config, start: StartingPoint, place: Location) -> None:
    import ray
    from ray.exceptions import RayTaskError

    try:
        ray.get(on_hardware(cfg, _merge, cfg.model, start, place))
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None


def _merge(model: ModelConfig, start: StartingPoint, place: Location) -> None:
    from ftray.adapters.merge import save_merged

    with (place.parent / START).as_local_dir() as adapter:
        save_merged(model, start.base, adapter, place, start.task)


def described(cfg: Config) -> str | None:
    """What results are compared with, where that is not the base as it came; None: it is."""
    if cfg.start.adapter is None:
        return None
    how = "with {}, kept" if cfg.start.form == "kept" else "with {} merged into it"
    return f"{cfg.model.name} {how.format(cfg.start.adapter)}"
