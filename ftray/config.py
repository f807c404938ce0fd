"""Every knob a user can set: one pydantic model a section, one :class:`Config` for all commands.

A value comes from the first of: the command line (``--section.key value``), the YAML file given with
``--config``, the default written here. Unknown keys are errors.
"""

import importlib
import io
import json
import math
import operator
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from ftray.errors import UserError, first_error, near


def metrics_named(text: str) -> list[str]:
    """The metrics that `search.metric` names: commas separate them, but those in a path, from its `/` on."""
    found: list[str] = re.findall(r"(?:^|,)([^,]*/.*?\.(?:py|pkl):[^\W\d]\w*(?=\s*(?:,|$))|[^,]*)", text)
    return found


def _comma_separated(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


def _listed(value: object) -> object:
    """A list that may also be written a,b,c, or as YAML."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(yaml.YAMLError):
            return yaml.safe_load(value)
    return _comma_separated(value)


def at_home(value: object) -> object:
    """A path, or several, or NAME=PATH, with `~` and `~user` at its start written out; whatever else, as it is."""
    if isinstance(value, list):
        return [at_home(part) for part in value]
    if not isinstance(value, str):
        return value
    if "\0" in value:
        raise ValueError("holds a NUL character, as no path can")
    name, path = re.fullmatch(r"([^=/~]+=)?(.*)", value, re.DOTALL).groups("")  # type: ignore[union-attr]
    return name + os.path.expanduser(path)


def _directions(value: str) -> str:
    parts = [part.strip() for part in value.split(",")]
    if {*parts} - {"min", "max"}:
        raise ValueError("must be min or max, one a metric, comma-separated")
    return ",".join(parts)


def _upper(value: object) -> object:
    if not isinstance(value, str):
        return value
    return "auto" if value.lower() == "auto" else value.upper()


def _off(value: object) -> object:
    return "off" if value is False else value  # as YAML 1.1 reads it


def _one_or_several(value: object) -> object:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _mapping(value: object) -> object:
    """A mapping that may be written without braces: `prompt: question, completion: answer`."""
    if not isinstance(value, str):
        return value
    with suppress(yaml.YAMLError):
        read = yaml.safe_load(f"{{{value}}}")
        if all(isinstance(text, str) and text for text in read.values()):
            return read
    raise ValueError("must be a mapping, as in 'prompt: question, completion: \"{{ answer }}\"'")


# the call that a configuration was made by, as Python takes it; empty: the command line of this process
PYTHON_CALL: ContextVar[str] = ContextVar("PYTHON_CALL", default="")
INPUTS = "inputs"  # directory of what a call held in memory, in its output
_KEPT_AS = r"(source|train|sources-\d+|validation|test|file)-[0-9a-f]{16}\.(?:jsonl|parquet)"
_HELD = re.compile(rf"""(?:[\w+.-]+:)?/[^'",\n]*?{INPUTS}/{_KEPT_AS}""")


def as_given(text: str) -> str:
    """A text with fields in place of the files that records were written to which a call held in memory."""

    def field(match: re.Match[str]) -> str:
        name, _, number = match[1].partition("-")
        special = {"file": "generation.file", "train": "data.source", "sources": f"data.sources[{number}]"}
        return special.get(name, f"data.{name}")

    return _HELD.sub(field, text)


COLDEST = 1e-5  # a lower temperature is taken as 0, as vLLM does: divided by it, logits could overflow

USER_METRIC = r"(.+\.(?:py|pkl)):([^\W\d]\w*)"  # a user's function, as `search.metric` names it; .pkl: a pickle of it
CommaSeparated = BeforeValidator(_comma_separated)  # a list that may also be written a,b,c
Sources = Annotated[str | list[str], BeforeValidator(_one_or_several)]
Fields = Annotated[dict[str, str], BeforeValidator(_mapping)]
Learn = Literal["all", "last", "generation"]
TaskName = Annotated[  # of `ftray.task_spec`, in letters of any case
    Literal[
        "auto",
        "CAUSAL_LM",
        "SEQ_2_SEQ_LM",
        "SEQ_CLS",
        "TOKEN_CLS",
        "QUESTION_ANS",
        "FEATURE_EXTRACTION",
        "SFT",
        "DPO",
        "SIMPO",
        "ORPO",
        "CPO",
        "KTO",
        "DISTILLATION",
        "GRPO",
        "REWARD",
    ],
    BeforeValidator(_upper),
]


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())


class ModelConfig(Section):
    """The frozen base model."""

    name: str = Field("smollm2-135m", description="directory, hub id, .gguf file, or a bundled name")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on a GPU or CPU with native bf16 arithmetic, else fp32"
    )
    quantization: Literal["none", "8bit", "4bit"] = Field("none", description="bitsandbytes storage of the base")
    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="of 4bit: normal quantiles, or floating point")
    double_quantization: bool = Field(True, description="of 4bit: quantise the scales too")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")

    _at_home = field_validator("name")(at_home)


def _refuse_bad_reading(data: "DataConfig | MixedSource") -> None:
    """Raise the ValueError about a template without a place for the prompt, or an encoding that isn't known."""
    if data.template not in (None, "auto") and "{prompt}" not in data.template:
        raise ValueError("template must hold {prompt}, or be auto")
    if data.encoding:
        try:
            io.TextIOWrapper(io.BytesIO(), data.encoding)  # refuses codecs that are not of text, too, as base64
        except LookupError:
            raise ValueError(f"encoding {data.encoding}: Python knows no encoding of text of that name") from None


class MixedSource(Section):
    """One of several sources; what it doesn't say is as the section says."""

    source: str = Field(description="as `data.source`, one alone")
    weight: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="how often an epoch draws each of its training records: 2 is twice, 0.5 in every other epoch",
    )
    fields: Fields | None = Field(None, description="as `data.fields`")
    delimiter: str | None = Field(None, min_length=1, max_length=1, description="as `data.delimiter`")
    encoding: str | None = Field(None, description="as `data.encoding`")
    template: str | None = Field(None, description="as `data.template`")
    learn: Learn | None = Field(None, description="as `data.learn`")
    train_on_prompt: bool | None = Field(None, description="as `data.train_on_prompt`")
    validation_fraction: float | None = Field(None, ge=0, lt=1, description="as `data.validation_fraction`")
    test_fraction: float | None = Field(None, ge=0, lt=1, description="as `data.test_fraction`")

    _at_home = field_validator("source")(at_home)

    @model_validator(mode="before")
    @classmethod
    def _may_be_a_name(cls, given: object) -> object:
        return {"source": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _can_be_read(self) -> "MixedSource":
        _refuse_bad_reading(self)
        return self


class DataConfig(Section):
    """Records, how they become tokens, and how they are split."""

    source: Sources = Field(
        "cmudict",
        description="file, folder, glob, hub id[:config][@split], s3:// or gs:// URI, or a bundled name; or several",
    )
    sources: list[MixedSource] = Field(
        [],
        description="in place of `source`: several to mix, each a name, or with a weight and what it is read by",
    )
    validation: Sources | None = Field(None, description="source of validation records; wins over validation_fraction")
    test: Sources | None = Field(None, description="source of test records; wins over test_fraction")
    fields: Fields = Field({}, description="what a record's fields are made of: keys, or jinja templates over them")
    delimiter: str | None = Field(
        None, min_length=1, max_length=1, description="a character, of CSV (default: detected)"
    )
    encoding: str | None = Field(None, description="of files of text (default: UTF-8, or UTF-16 by its mark)")
    limit: PositiveInt | None = Field(None, description="use this many records, chosen by seeded hash")
    group: str | None = Field(
        None, min_length=1, description="key of the records, dots lead into it: those with one value share a split"
    )
    validation_fraction: float = Field(0.1, ge=0, lt=1, description="share of records the search optimises on")
    test_fraction: float = Field(0.1, ge=0, lt=1, description="share of records the search never sees")
    max_length: Annotated[int, Field(ge=2)] | Literal["auto"] = Field(
        512,
        description="tokens a record may have; auto: as many as 99.9 % of the records have, if the model takes as many",
    )
    overlong: Literal["truncate", "drop"] = Field("truncate", description="what happens to longer records")
    train_on_prompt: bool = Field(False, description="let prompt tokens bear loss too")
    learn: Learn = Field(
        "all",
        description="assistant turns that bear loss: all but those marked otherwise, of these the last, "
        "or of all what the chat template has in {% generation %}",
    )
    template: str = Field(
        "auto",
        description="how a plain prompt is rendered, a text with {prompt}; auto: by the chat template, "
        "or as a line where there is none",
    )
    chat_template: str | None = Field(
        None, description="chatml, gemma, llama3, mistral, zephyr or a .jinja file (default: the model's own)"
    )
    seed: int = Field(0, description="of the split and of the choice under limit")
    cache: str | None = Field(
        None, description="where tokenized shards are kept: a directory or URI (default: ~/.cache/ftray/data)"
    )

    _at_home = field_validator("source", "validation", "test", "cache", "chat_template")(at_home)

    @model_validator(mode="after")
    def _leave_something_to_train_on(self) -> "DataConfig":
        for part in self.parts.values():
            if part.validation_fraction + part.test_fraction >= 1:
                of = f"of {part.names} " if self.sources else ""
                raise ValueError(
                    f"{of}validation_fraction + test_fraction must be below 1: nothing is left to train on"
                )
        _refuse_bad_reading(self)
        return self

    @model_validator(mode="after")
    def _name_sources_once(self) -> "DataConfig":
        """Of a mixture, `source` names the sources too: so files that were written say it, and so they may be read."""
        names = [mixed.source for mixed in self.sources]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"sources: {twice} stands twice: give it one weight")
        if names:
            if "source" in self.model_fields_set and _one_or_several(names) != self.source:
                raise ValueError("source and sources both say what is trained on: give one of them")
            self.__dict__["source"] = _one_or_several(names)  # not assigned, which would validate again
        return self

    @property
    def names(self) -> str:
        """The source, or all of them, for messages."""
        names = self.source if isinstance(self.source, str) else ", ".join(self.source)
        return "in memory" if as_given(names) == "data.source" else as_given(names)

    @property
    def longest(self) -> int:
        """Tokens that a record may have; any number as long as `auto` has not come to one."""
        return sys.maxsize if self.max_length == "auto" else self.max_length

    @property
    def parts(self) -> "dict[str, DataConfig]":
        """How each of the mixed `sources` is read, by its name; where there are none, this under the name ''."""
        if not self.sources:
            return {"": self}
        own = [mixed.model_dump(exclude={"weight"}, exclude_none=True) for mixed in self.sources]
        return {fields["source"]: self.model_copy(update={"sources": [], **fields}) for fields in own}


class StartConfig(Section):
    """What training starts from; without an adapter, from the base."""

    adapter: str | None = Field(None, description="adapter directory or URI, or what `train` or `tune` left")
    form: Literal["merged", "kept"] = Field(
        "merged",
        description="merged: into its base, which is then the base; kept: training goes on from its weights",
    )

    _at_home = field_validator("adapter")(at_home)


class AdapterConfig(BaseModel):
    """What is trained. The fields beside `method` are the method's own (see `ftray.adapters.methods`)."""

    model_config = ConfigDict(extra="allow")

    method: str = Field("lora", description="see docs/methods.md; its parameters stand beside it")

    @model_validator(mode="before")
    @classmethod
    def _read_peft_config(cls, values: object) -> object:
        """Of `method: peft`, what lies in the named file, or in the directory of an adapter: workers may not see it."""
        if not isinstance(values, dict) or values.get("method") != "peft" or not isinstance(values.get("config"), str):
            return values
        path = Path(str(at_home(values["config"])))
        try:
            path = path / "adapter_config.json" if path.is_dir() else path
            return values | {"config": json.loads(path.read_text(encoding="utf-8"))}
        except OSError as error:
            raise ValueError(f"config: can't read {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"config: {path} is not valid JSON: {error}") from None

    @property
    def parameters(self) -> dict[str, Any]:
        """The method's own parameters, as given."""
        return dict(self.model_extra or {})


class TrainingConfig(Section):
    """Optimisation of one adapter."""

    epochs: float = Field(1.0, gt=0, description="passes over the training split; ignored if steps is set")
    steps: PositiveInt | None = Field(None, description="optimiser steps")
    batch_size: PositiveInt = Field(8, description="records per optimiser step, over all workers")
    micro_batch: PositiveInt | None = Field(
        None, description="records per forward pass and worker (default: no accumulation)"
    )
    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    clip_norm: float = Field(1.0, ge=0, description="gradient norm above which gradients are scaled down; 0: never")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="after warm-up, down to zero")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of steps in which the learning rate rises")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field("adamw", description="8-bit: GPU only")
    evaluations: PositiveInt = Field(4, description="validations (and checkpoints), evenly spaced over the steps")
    validation_records: PositiveInt = Field(
        1000, description="validation records that a validation reads at most, the same ones each time"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations to save memory")
    liger: bool = Field(
        False, description="fused kernels of the package liger-kernel for the base's norms and feed-forward: GPU only"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="what DeepSpeed ZeRO partitions over workers")
    shard_base: bool = Field(
        False, description="share the frozen base out over the workers of a trial or pack, by PyTorch's FSDP2"
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="keep optimiser states (and with stage 3 or shard_base the base's layers) in CPU memory"
    )
    seed: int = Field(0, description="of initialisation, data order and dropout")
    beta: float | None = Field(
        None,
        ge=0,
        description="of preferences: how little an adapter may leave the base (default: 0.1; SimPO: 2); "
        "of ORPO the weight of the odds ratio, its lambda (0.1); of GRPO that of the divergence from the base (0.04; "
        "0: none)",
    )
    loss: Literal["sigmoid", "hinge", "ipo", "robust"] | None = Field(
        None, description="of DPO and CPO: how a pair's margin is judged (default: sigmoid)"
    )
    label_smoothing: float | None = Field(
        None,
        ge=0,
        lt=0.5,
        description="of DPO, CPO and SimPO: share of pairs that are the wrong way round (default: 0)",
    )
    gamma: float | None = Field(
        None, ge=0, description="of SimPO: the margin that is wanted, in units of its rewards (default: 1)"
    )
    sft_weight: float | None = Field(
        None, ge=0, description="of pairs: weight of the chosen answer's own loss (default: 0; CPO, ORPO: 1)"
    )
    desirable_weight: float | None = Field(None, ge=0, description="of KTO: weight of good answers (default: 1)")
    undesirable_weight: float | None = Field(None, ge=0, description="of KTO: weight of bad answers (default: 1)")
    reward: str | None = Field(
        None,
        description="of GRPO: FILE.py:FUNCTION, which takes records and answers and gives a number an answer, the more "
        "the better",
    )
    group: int | None = Field(
        None, ge=2, description="of GRPO: answers that are drawn to a prompt, and held against each other (default: 8)"
    )
    temperature: float | None = Field(
        None, ge=COLDEST, allow_inf_nan=False, description="of GRPO: at which answers are drawn (default: 1)"
    )
    clip: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="of GRPO: how far from 1 the ratio of a token's probability to the one with which it was drawn "
        "counts (default: 0.2)",
    )
    clip_high: float | None = Field(None, gt=0, description="the same above 1, where it is another (default: clip)")
    advantage: Literal["grpo", "dr_grpo"] | None = Field(
        None,
        description="of GRPO: rewards by the group's deviation and losses by the answer's length; dr_grpo: by neither, "
        "which favours no prompt and no length (default: grpo)",
    )

    @field_validator("reward")
    @classmethod
    def _names_a_function(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(USER_METRIC, value):
            raise ValueError("must be FILE.py:FUNCTION")
        return value

    @model_validator(mode="after")
    def _offload_needs_a_stage(self) -> "TrainingConfig":
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload: optimizer needs zero_stage 1, 2 or 3")
        if self.offload == "all" and self.zero_stage != 3 and not self.shard_base:
            raise ValueError("offload: all needs zero_stage 3 or shard_base")
        return self


class ScalingConfig(Section):
    """Where and how widely it runs."""

    workers: PositiveInt = Field(1, description="data-parallel training workers a trial")
    packs: PositiveInt | None = Field(
        None, description="packs at once, each with a base model (default: as many as fit now); more let a cluster grow"
    )
    cpus_per_worker: float | None = Field(None, gt=0, description="default: 1 a trial; in a pack, all of its share")
    gpus_per_worker: float | None = Field(None, ge=0, description="default: 1 if the cluster has a GPU, else 0")
    address: str | None = Field(None, description="Ray cluster to join (default: the one we are in, else a local one)")
    price_per_hour: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="of all machines together; with it `report.html` says what was spent",
    )


@dataclass(frozen=True)
class Goal:
    """What a search is to make small or great.

    Attributes:
        metric: its key in a report.
        direction: `min` or `max`.
    """

    metric: str
    direction: str

    @property
    def optuna_direction(self) -> Literal["minimize", "maximize"]:
        """As Optuna names it."""
        return "minimize" if self.direction == "min" else "maximize"

    @property
    def sign(self) -> int:
        """1 where less is better, else -1."""
        return 1 if self.direction == "min" else -1


@dataclass(frozen=True)
class Constraint:
    """What a trial must hold to be the best.

    Attributes:
        metric: its key in a report.
        sign: `<`, `<=`, `>` or `>=`.
    """

    metric: str
    sign: str
    limit: float

    def __str__(self) -> str:
        return f"{self.metric} {self.sign} {self.limit:g}"

    def holds(self, metrics: Mapping[str, float]) -> bool:
        """Whether a trial with these metrics holds it; one that lacks the metric does not."""
        return bool(SIGNS[self.sign](metrics.get(self.metric, math.nan), self.limit))


SIGNS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
KNEE = "knee"


def constraints_of(rule: str) -> tuple[Constraint, ...]:
    """The constraints of `search.best`; none of a rule that has no sign in it.

    Raises:
        ValueError: it can't be read.
    """
    if not re.search("[<>]", rule):
        return ()
    found = []
    for part in rule.split(","):
        try:
            metric, sign, limit = re.fullmatch(r"\s*(\S+?)\s*(<=|>=|<|>)\s*(\S+)\s*", part).groups()  # type: ignore[union-attr]
            found.append(Constraint(metric, sign, float(limit)))
        except (AttributeError, ValueError):
            raise ValueError("must be like 'adapter_bytes < 5e6', several comma-separated") from None
    return tuple(found)


def _best(value: str | None) -> str | None:
    if value is not None and value != KNEE and not constraints_of(value):
        raise ValueError(f"must be {KNEE} or constraints, as 'adapter_bytes < 5e6'")
    return value


class SearchConfig(Section):
    """How the space is searched."""

    space: str | dict[str, Any] = Field(
        "quick",
        description="YAML file, the name of one in search_spaces/, or what such a file holds "
        "(not given: the one for the task, as kto)",
    )
    trials: PositiveInt = Field(16, description="configurations to try, the default one included")
    time_budget: float | None = Field(
        None, gt=0, description="seconds of training, and at least a first result, after which no trial continues"
    )
    pack: Annotated[PositiveInt | Literal["auto", "off"], BeforeValidator(_off)] = Field(
        "auto", description="trials that train together over one base model; off: each has workers of its own"
    )
    concurrency: PositiveInt | None = Field(None, description="trials at once (default: as many as fit)")
    max_failures: int = Field(1, ge=0, description="restarts of a trial whose worker died")
    metric: str = Field(
        "validation_loss",
        description="any metric of the task, adapter_bytes, trainable_parameters, latency, or FILE.py:FUNCTION, which "
        "takes records and answers and gives a number a record; several, comma-separated, make a Pareto front "
        "(not given: what the task is judged by)",
    )
    direction: Annotated[str, AfterValidator(_directions)] = Field(
        "min", description="min or max, one a metric, comma-separated (not given: what is better in the metric)"
    )
    best: Annotated[str | None, AfterValidator(_best)] = Field(
        None,
        description="which trial is the best: knee, of several metrics' front, or constraints on any metric, as "
        "'adapter_bytes < 5e6', under which it is the best of the first (default: knee, where there are several)",
    )
    scheduler: Literal["halving", "asha", "hyperband", "none"] = Field(
        "halving",
        description="what stops weak trials early; halving compares whole cohorts, asha whoever has come so far",
    )
    cohort: PositiveInt | None = Field(
        None, description="trials that halving compares with each other (default: as many as fit, 16 at most)"
    )
    reduction_factor: int | None = Field(
        None, ge=2, description="one in this many trials continues from each rung (default: 3; halving: 4, then 2)"
    )
    rungs: PositiveInt | None = Field(
        None, description="rungs, the last one at the full budget (default: 3; halving: from an eighth of the budget)"
    )
    finalist_seeds: PositiveInt = Field(
        3,
        description="seeds with which each finalist of halving is trained, beside its own that of initialisation, "
        "data order and dropout in one; 1: no further runs",
    )
    warm_start: Annotated[list[str], CommaSeparated] = Field(
        [], description="outputs of earlier searches, comma-separated, whose trials say where to look first"
    )
    seed: int = Field(0, description="of the sampler")
    trackers: Annotated[list[Literal["tensorboard", "mlflow", "wandb"]], CommaSeparated] = Field(
        ["tensorboard"], description="what the trials' curves are shown to, comma-separated; mlflow, wandb: extras"
    )

    _at_home = field_validator("space", "warm_start")(at_home)

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """What `best` demands, once the task is known; none if it is no constraint."""
        return constraints_of(self.best or "")

    @property
    def measured(self) -> tuple[str, ...]:
        """The metrics that goals and constraints are about, by their keys in a report; the first goal's comes first."""
        goals, constraints = [goal.metric for goal in self.goals], [one.metric for one in self.constraints]
        return tuple(dict.fromkeys([*goals, *constraints]))

    @property
    def further_seeds(self) -> int:
        """Further runs of each finalist; none where a rule of `best` chooses, or what counts is no matter of seeds."""
        chosen_by_runs = len(self.goals) == 1 and not self.best and self.goal.metric.startswith("validation_")
        return self.finalist_seeds - 1 if chosen_by_runs else 0

    @property
    def goals(self) -> tuple[Goal, ...]:
        """What `metric` and `direction` name, once the task is known: see :func:`ftray.tasks.infer_task.infer_task`."""
        names, directions = metrics_named(self.metric), self.direction.split(",")
        keys = [f"validation_{own[2]}" if (own := re.fullmatch(USER_METRIC, name)) else name for name in names]
        return tuple(Goal(key, direction) for key, direction in zip(keys, directions, strict=True))

    @property
    def goal(self) -> Goal:
        """The first of the goals, which counts where only one can."""
        return self.goals[0]


class EvaluationConfig(Section):
    """How adapters are held against the base model."""

    split: Literal["test", "validation", "train", "all"] = Field("test", description="which records `evaluate` scores")
    records: PositiveInt | None = Field(None, description="test records to score (default: all; tune: 1000)")
    generate: bool = Field(True, description="also generate, for exact match and error rates")
    max_new_tokens: PositiveInt = Field(64)
    batch_size: PositiveInt = Field(32, description="records decoded at once")
    bootstrap: PositiveInt = Field(1000, description="resamples behind the 95 % interval")
    samples: int = Field(5, ge=0, description="before/after examples shown")


class SuiteConfig(Section):
    """Benchmarks that others keep, on which `evaluate` scores base and adapters too: they show what was forgotten."""

    tasks: str | None = Field(
        None,
        pattern=r"^lm-eval:[^,\s]+(,[^,\s]+)*$",
        description="lm-eval:TASK,TASK: tasks, groups and tags of lm-eval, as lm-eval:arc_easy,hellaswag",
    )
    data: str | None = Field(
        None,
        description="directory with a copy of each task's data set, as DIR/allenai/ai2_arc, and of task files of yours "
        "(default: from the hub)",
    )
    limit: PositiveInt | None = Field(None, description="records of each task (default: all)")
    fewshot: int | None = Field(None, ge=0, description="answered examples before each question (default: the task's)")

    _at_home = field_validator("data")(at_home)

    @property
    def names(self) -> list[str]:
        """Of tasks, groups and tags; none: there is no suite."""
        return self.tasks.removeprefix("lm-eval:").split(",") if self.tasks else []


class GenerationConfig(Section):
    """What `infer` asks, and how it draws the answer."""

    prompt: str | None = Field(None, description="the one prompt to answer")
    file: str | None = Field(
        None, description="prompts: records in any file that `data.source` takes, or one a line in .txt"
    )
    chat: bool | None = Field(
        None, description="render by the tokenizer's chat template (default: in a conversation, and records of turns)"
    )
    system: str | None = Field(None, description="system turn of a conversation")
    max_new_tokens: PositiveInt = Field(256)
    temperature: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="below 1e-5, as 0: the likeliest token each time"
    )
    top_p: float = Field(1.0, gt=0, le=1, description="draw from the likeliest tokens that have this share")
    top_k: int = Field(0, ge=0, description="draw from this many tokens; 0: from all")
    repetition_penalty: float | None = Field(
        None, gt=0, description="above 1: what was said is less likely to be said again (default: the model's own)"
    )
    seed: int = Field(0, description="of the draws")

    _at_home = field_validator("file")(at_home)


class MergeConfig(Section):
    """What `merge` makes of one adapter or of several."""

    weights: Annotated[list[float] | None, CommaSeparated] = Field(
        None, description="one an adapter, comma-separated (default: equal, summing to 1)"
    )
    combination: Literal[
        "cat",
        "linear",
        "svd",
        "ties",
        "ties_svd",
        "dare_linear",
        "dare_linear_svd",
        "dare_ties",
        "dare_ties_svd",
        "magnitude_prune",
        "magnitude_prune_svd",
    ] = Field("cat", description="PEFT's combination_type of several LoRAs; cat is their exact weighted sum")
    density: float | None = Field(None, gt=0, le=1, description="share of values that ties, dare and pruning keep")
    rank: PositiveInt | None = Field(None, description="of the result of svd (default: the highest of the adapters)")
    seed: int = Field(0, description="of what dare drops")
    form: Literal["model", "adapter"] = Field("model", description="a plain model directory, or an adapter")


class ExportConfig(Section):
    """What `export` makes of an adapter, and of what."""

    run: str | None = Field(None, description="output of a search or training run: export its best adapter")
    trial: int | None = Field(None, ge=0, description="number of a trial of `run`, in place of the best")
    to: Literal["gguf", "ollama", "hub", "vllm", "mlx-adapter", "onnx"] | None = Field(
        None, description="gguf: a file for llama.cpp; ollama: with a Modelfile; hub: a repository"
    )
    precision: Literal["f32", "f16", "q8_0", "q4_k_m", "int8", "int4"] | None = Field(
        None,
        description="gguf, ollama: f16 (default), q8_0, q4_k_m; onnx: f32 (default), int8, int4; vllm: "
        "int8, int4 of the merged model (default: the adapter)",
    )
    max_loss_increase: float = Field(
        0.1, ge=0, allow_inf_nan=False, description="of the loss, in nats a token, that a coarser precision may cost"
    )
    form: Literal["adapter", "model"] = Field("adapter", description="hub: the adapter, or the merged model")
    repo: str | None = Field(None, pattern=r"^[\w-][\w.-]*/[\w-][\w.-]*$", description="hub: OWNER/NAME")
    private: bool = Field(False, description="hub: a repository that others don't see")
    dry_run: bool = Field(False, description="hub: leave in `output` what would be pushed, and push nothing")
    base_model: str | None = Field(
        None, pattern=r"^[\w-][\w.-]*/[\w-][\w.-]*$", description="hub id of the base (default: as it was named)"
    )
    licence: str | None = Field(
        None, min_length=1, description="of the base, as apache-2.0 (default: what its model card says)"
    )

    _at_home = field_validator("run")(at_home)


class ServingConfig(Section):
    """The endpoint: what it offers, to whom, and how much of it."""

    run: str | None = Field(None, description="output of a search: serve its base, its best adapter and its trials")
    merged: bool = Field(False, description="serve the merged model of `run` alone")
    engine: Literal["builtin", "vllm"] = Field(
        "builtin", description="vllm: Ray Serve LLM with vLLM, for LoRA adapters and merged models"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=1, le=65535)
    api_key_file: str | None = Field(None, description="file with the bearer token (default: $FTRAY_API_KEY)")
    anonymous: bool = Field(False, description="listen beyond this machine without a token")
    adapter_sources: list[str] = Field(
        [], description="directories and URI prefixes that POST /v1/adapters may name (default: `run`)"
    )
    registry: str | None = Field(
        None, description="file that keeps what was added and removed over HTTP (default: serving.json in `run`)"
    )
    max_adapters: PositiveInt = Field(16, description="adapters a replica holds; the least recently used goes first")
    slots: PositiveInt = Field(16, description="answers that a replica gives at once")
    max_queue: PositiveInt = Field(128, description="requests under way; above, 429")
    max_prompt_tokens: PositiveInt = Field(8192)
    max_output_tokens: PositiveInt = Field(2048, description="of one request, over all its answers")
    max_body_bytes: PositiveInt = Field(2**20)
    request_seconds: float = Field(300, gt=0, description="a request that takes longer is given up")
    min_replicas: PositiveInt = Field(1)
    max_replicas: PositiveInt = Field(1, description="copies of base model and engine, by load")
    target_ongoing: float = Field(16, gt=0, description="requests a replica; more add replicas, fewer take them away")
    scale_up_seconds: float = Field(30, ge=0, description="how long there must be more before replicas come")
    scale_down_seconds: float = Field(600, ge=0, description="how long there must be fewer before replicas go")
    drain_seconds: float = Field(30, gt=0, description="time for answers under way when a replica goes")

    _at_home = field_validator("run", "api_key_file", "adapter_sources", "registry")(at_home)


class UiConfig(Section):
    """The live page: where it is, and what it shows."""

    serve: bool = Field(False, description="serve the live page for as long as `tune` runs")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8700, ge=0, le=65535, description="0: any that is free")
    api_key_file: str | None = Field(
        None, description="file with the bearer token (default: $FTRAY_API_KEY, else a new one, which is printed)"
    )
    endpoint: str = Field(
        "http://127.0.0.1:8000", description="URL of `ftray serve`, whose models the page asks where it answers"
    )
    beside: bool = Field(False, description="end with the process that has begun it, as `tune` does with its page")
    samples: int = Field(3, ge=0, description="validation records that each trial answers at its reports, with `serve`")

    _at_home = field_validator("api_key_file")(at_home)


class RequestConfig(Section):
    """What is asked of a search that runs."""

    trial: int | None = Field(None, ge=0, description="number of the trial that `stop` or `clone` is about")
    prove: bool = Field(False, description="`stop`: end the search now, and prove the best of what it has reached")
    off: bool = Field(False, description="`pause`: let the search train on")
    watch: bool = Field(False, description="`status`: stay, and show it anew every two seconds")
    configuration: str | None = Field(
        None, description="YAML or JSON of adapter and training, as summary.json has them, that `add` is about"
    )


class StageConfig(Section):
    """One of several trainings, each of which starts from the one before; what it doesn't say is as all say it."""

    task: TaskName = Field(description="as `task`, but for auto")
    start: dict[str, Any] = Field({}, description="fields of that section")
    data: dict[str, Any] = Field({}, description="fields of that section")
    adapter: dict[str, Any] = Field({}, description="fields of that section")
    training: dict[str, Any] = Field({}, description="fields of that section")
    search: dict[str, Any] = Field({}, description="fields of that section")
    evaluation: dict[str, Any] = Field({}, description="fields of that section")

    @model_validator(mode="before")
    @classmethod
    def _may_be_a_task(cls, given: object) -> object:
        return {"task": given} if isinstance(given, str) else given

    @field_validator("task")
    @classmethod
    def _says_what_is_learnt(cls, task: str) -> str:
        if task == "auto":
            raise ValueError("must say what is learnt, as sft or dpo")
        return task


class Config(Section):
    """All sections, and what belongs to none."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    start: StartConfig = Field(default_factory=StartConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    scaling: ScalingConfig = Field(default_factory=ScalingConfig)
    search: SearchConfig = Field(default_factory=SearchConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    suite: SuiteConfig = Field(default_factory=SuiteConfig)
    generation: GenerationConfig = Field(default_factory=GenerationConfig)
    merge: MergeConfig = Field(default_factory=MergeConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)
    serving: ServingConfig = Field(default_factory=ServingConfig)
    ui: UiConfig = Field(default_factory=UiConfig)
    request: RequestConfig = Field(default_factory=RequestConfig)
    task: TaskName = Field("auto", description="what is learnt; auto: inferred from the first record and the model")
    stages: Annotated[list[StageConfig], BeforeValidator(_listed)] = Field(
        [],
        description="several trainings, each of which starts from the one before: tasks, comma-separated, as sft,dpo, "
        "or mappings, as {task: sft, training: {epochs: 1}}",
    )
    adapters: Annotated[list[str], CommaSeparated] = Field(
        [], description="adapter directories, or what a run left; `serve`: NAME=DIRECTORY or NAME=URI"
    )
    output: str = Field(
        "runs/latest", description="where a command leaves what it makes; `tune`, `train`: a directory or URI"
    )
    resume: bool = Field(False, description="continue what is in output; start, if nothing is")
    plan: bool = Field(False, description="print what `tune` would run, and stop")
    show: int = Field(1, ge=0, description="records that `preprocess` shows as the model sees them")
    png: bool = Field(False, description="leave the figures of `report` as PNG files too, in figures/")
    verbose: bool = Field(False, description="show the logs of Ray and DeepSpeed too")

    _at_home = field_validator("adapters", "output")(at_home)


def config_from(values: dict[str, Any]) -> Config:
    """Validate `values`; the first error becomes one line that names the field and near names.

    Raises:
        UserError: unknown key or bad value.
    """
    refuse_half_characters(values)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = first_error(error)
        field = re.sub(r"^(data\.sources|stages)\.(\d+)", r"\1[\2]", ".".join(first.path))
        if first.unknown:
            model = section_at(first.path[:-1])
            raise UserError(f"unknown key {field}{near(first.path[-1], model.model_fields)}") from None
        raise UserError(f"{field or 'configuration'}: {first.reason}") from None


def refuse_half_characters(value: object, *path: str) -> None:
    r"""Refuse text such as "\ud83d", in YAML or as the shell's bytes that are not UTF-8: no tokenizer takes it.

    Raises:
        UserError: names the field.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            refuse_half_characters(key, *path)
            refuse_half_characters(inner, *path, str(key))
    elif isinstance(value, list):
        for inner in value:
            refuse_half_characters(inner, *path)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            where = ".".join(path) or "configuration"
            raise UserError(f"{where}: {value!r} holds half of a surrogate pair, or bytes that are not UTF-8") from None


def parse_yaml(text: str, where: object) -> object:
    """What YAML says; `str(where)` is its place, for messages.

    Raises:
        UserError: it is not valid YAML; with the line.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line, reason = f":{mark.line + 1}" if mark else "", str(error).splitlines()[0]
        raise UserError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', None) or reason}") from None
    except (ValueError, RecursionError) as error:  # what looks like a date and is none; thousands of brackets
        raise UserError(f"{where}: not valid YAML: {error}") from None


def section_at(path: Sequence[str]) -> type[BaseModel]:
    """The section at a path of keys; an index leads to a section in a list of them."""
    model: type[BaseModel] = Config
    for part in path:
        if not part.isdecimal():
            annotation = model.model_fields[part].annotation
            model = cast("type[BaseModel]", get_args(annotation)[0] if get_args(annotation) else annotation)
    return model


if __name__ == "__main__":  # a room imports no command, but `python -m ftray.config` is one
    sys.exit(importlib.import_module("ftray.cli").run_command("config"))
