"""Infers the task, and the metric to search for, where the user names none."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import yaml

from ftray.config import KNEE, USER_METRIC, Config, Constraint, SearchConfig, metrics_named
from ftray.data.fields import as_typed
from ftray.data.formats import Located
from ftray.data.preference_shapes import PAIRS
from ftray.data.records import SHAPES, unknown
from ftray.data.refusals import kept, refuse_keys
from ftray.data.shapes import Shape, fitting, has_teacher, number, recognise
from ftray.data.unpaired_shapes import UNPAIRED
from ftray.errors import UserError, near
from ftray.models.chat_template import names, read_chat_template
from ftray.storage.location import parse_location
from ftray.storage.manifest import refuse_damaged
from ftray.task_spec import RAW, TASKS, TaskSpec

if TYPE_CHECKING:
    from ftray.tasks.task import Task

# keys of a record -> task; the first that fits
KEYS = [
    (("question", "context", "answers"), "QUESTION_ANS"),
    (("question", "context", "answer", "answer_start"), "QUESTION_ANS"),
    (("anchor", "positive"), "FEATURE_EXTRACTION"),
    (("sentence1", "sentence2", "score"), "FEATURE_EXTRACTION"),
]
# keys of what other tasks learn from, for messages
OTHERS = (
    ("prompt", "chosen", "rejected"),
    ("prompt", "completion", "label"),
    ("prompt", "completion", "logprobs"),
    ("prompt (--task GRPO)",),
    ("tokens", "tags"),
    ("text", "label"),
)
COSTS = ("adapter_bytes", "trainable_parameters", "latency")  # of an adapter of any task: the less the better
LABELLED = ("TOKEN_CLS", "SEQ_CLS")  # tasks whose shapes tell them from all others


def infer_task(cfg: Config, model_path: str, first: Located) -> Config:
    """`cfg` with `task`, `search.space`, `search.metric`, `search.direction` and the chat template's text filled in.

    Args:
        model_path: directory of the base model.
        first: training record, with its location.

    Raises:
        UserError: the task can't be inferred from the first record and the model, or has no such metric.
    """
    place, record = first
    name = cfg.task if cfg.task != "auto" else _infer(record, place, cfg, model_path)
    task = TaskSpec.named(name).load()
    search = _with_goals(cfg, task, *task.choices(record))
    if "space" not in cfg.search.model_fields_set:
        search = search.model_copy(update={"space": task.space})
    data = cfg.data
    if data.chat_template and data.chat_template not in names():  # a file is here, and perhaps not where it is used
        data = data.model_copy(update={"chat_template": read_chat_template(data.chat_template)})
    return cfg.model_copy(update={"task": name, "search": search, "data": data})


def _with_goals(cfg: Config, task: "Task", metrics: Mapping[str, str], usual: str) -> SearchConfig:
    """The search with its metrics by their keys in a report, and a direction each."""
    given, name = cfg.search.model_fields_set, task.spec.full_name
    goals: list[tuple[str, str | None]] = [(f"validation_{usual}", metrics[usual])]
    if "metric" in given:
        goals = [_goal(part, cfg, task, metrics) for part in metrics_named(cfg.search.metric)]
    directions = [direction for _, direction in goals]
    if "direction" in given:
        directions = list(cfg.search.direction.split(","))
        if len(directions) != len(goals):
            raise UserError(f"search.direction {cfg.search.direction}: give {len(goals)}, one a metric")
    for (metric, _), direction in zip(goals, directions, strict=True):
        if direction is None:
            raise UserError(f"search.metric {metric}: which is better? Give search.direction, max or min, one a metric")
    found = cfg.search.model_copy(
        update={"metric": ",".join(metric for metric, _ in goals), "direction": ",".join(map(str, directions))}
    )
    keys = [goal.metric for goal in found.goals]
    known = [f"validation_{metric}" for metric in metrics]
    for goal, (metric, _) in zip(found.goals, goals, strict=True):
        if keys.count(goal.metric) > 1 or (goal.metric != metric and goal.metric in known):
            raise UserError(f"search.metric {metric}: {name} has another metric {goal.metric}: rename one")
    if found.best == KNEE and len(goals) == 1:
        raise UserError("search.best knee: is that of several metrics: name them, comma-separated, in search.metric")
    held = [replace(one, metric=_constrained(one, keys, cfg, task, metrics)) for one in cfg.search.constraints]
    return found.model_copy(update={"best": ",".join(map(str, held))}) if held else found


def _constrained(one: Constraint, keys: list[str], cfg: Config, task: "Task", metrics: Mapping[str, str]) -> str:
    """The key in a report of what a constraint is about; a function is known by its name, as one of the goals."""
    own = f"validation_{one.metric.removeprefix('validation_')}"
    return own if own in keys else _goal(one.metric, cfg, task, metrics, "search.best")[0]


def _goal(
    given: str, cfg: Config, task: "Task", metrics: Mapping[str, str], field: str = "search.metric"
) -> tuple[str, str | None]:
    """The metric that a user names in `field`, and which way is better; None: who knows."""
    name, metric = task.spec.full_name, given.strip().removeprefix("validation_")
    function = re.fullmatch(USER_METRIC, given.strip())
    if function or metric in task.generated:
        if not task.generated:
            raise UserError(f"{field} {given}: judges generated text, and {name} generates none")
        if not cfg.evaluation.generate:
            raise UserError(f"{field} {metric}: is of generated text, and evaluation.generate is false")
    if function and field == "search.metric":
        return given.strip(), None
    if metric in COSTS:
        if metric == "latency" and not task.generated:
            raise UserError(f"{field} {metric}: is the time of an answer, and {name} generates none")
        return metric, "min"
    if metric not in metrics:
        split_path = field == "search.metric" and re.search(f",.*{USER_METRIC}", cfg.search.metric)
        hint = "; a path with a comma begins with ./" if split_path else near(metric, [*metrics, *COSTS])
        raise UserError(f"{field} {given}: {name} has no such metric{hint}")
    return f"validation_{metric}", metrics[metric]


def refuse_other_settings(cfg: Config) -> None:
    """Refuse settings of the training section that belong to other objectives than that of `cfg.task`.

    Raises:
        UserError: names the first.
    """
    TaskSpec.named(cfg.task).load().objective(cfg.training)


def as_begun(cfg: Config) -> Config:
    """`cfg` with the prompt template, the length and the scheduler of the output that it resumes, unless it gives them.

    A template of `auto` and halving are newer; a length that isn't given, or is `auto`, was settled when the output was
    begun.
    """
    stored, given = parse_location(cfg.output) / "config.yaml", cfg.data.model_fields_set
    if not cfg.resume or not stored.exists():
        return cfg
    with refuse_damaged(stored):
        sections = yaml.safe_load(stored.read_text(encoding="utf-8"))
        begun, searched = sections.get("data") or {}, sections.get("search") or {}
        update = {} if "template" in given else {"template": begun.get("template", RAW)}
        if "max_length" not in given or cfg.data.max_length == "auto":
            update["max_length"] = begun.get("max_length", cfg.data.max_length)
        newer = ("scheduler", "cohort", "reduction_factor", "rungs")
        kept = {k: searched[k] for k in newer if k in searched and k not in cfg.search.model_fields_set}
    data, search = cfg.data.model_copy(update=update), cfg.search.model_copy(update=kept)
    return cfg.model_copy(update={"data": data, "search": search})


def _refuse_two_tasks(record: dict[str, Any], labelled: Shape, place: object) -> None:
    """Raise the UserError about a record that holds a text and its label, and a question and its answer too."""
    asked = fitting(record, [shape for shape in SHAPES if not shape.is_alone])
    if asked is None or {*asked.required_keys} <= {*labelled.required_keys}:
        return
    label, answer = as_typed(kept(record, labelled)), as_typed(kept(record, asked))
    raise UserError(
        f"{place}: holds {' and '.join(labelled.required_keys)}, and {' and '.join(asked.required_keys)}: say which "
        f"are meant: {label} to learn the label, or {answer} to learn to answer"
    )


def _refuse_unclear_verdict(record: dict[str, Any], judged: Shape, place: object) -> None:
    """Raise the UserError about an answer with a `label` of 0 or 1, yes or no, which may be a class of it.

    Beside a `completion`, it is the verdict that TRL's records have there.
    """
    label = record.get("label")
    is_word = isinstance(label, str) and label.strip().lower() in ("positive", "negative", "yes", "no")
    is_class = is_word or (not isinstance(label, bool) and number(label) in (-1, 0, 1))
    if "completion" in record or "kto_tag" in record or not is_class:
        return
    asked = fitting({key: value for key, value in record.items() if key != "label"}, SHAPES)
    alone = f", or {as_typed(kept(record, asked))} to learn all answers" if asked else ""
    raise UserError(
        f"{place}: holds an answer and label {label}, which may say that the answer is good or be a class of it: give "
        f"--task KTO if {'positive, or yes,' if is_word else 1} is good and {'the other' if is_word else 0} bad{alone}"
    )


def _objective(record: dict[str, Any], place: object) -> str:
    """The objective of `OBJECTIVES` that a record tells by its keys; empty: none, it is a task's own record."""
    if fitting(record, PAIRS):
        return "DPO"
    if judged := fitting(record, UNPAIRED[:-1]):
        _refuse_unclear_verdict(record, judged, place)
        return "KTO"
    return "DISTILLATION" if has_teacher(record) else ""


def _special_tokens(model_path: str) -> set[str]:
    """The special tokens of a model; none where its tokenizer can't be read, which is told later."""
    from transformers import AutoTokenizer

    try:
        return {*AutoTokenizer.from_pretrained(model_path).get_added_vocab()}
    except (OSError, ValueError):
        return set()


def _infer(record: dict[str, Any], place: object, cfg: Config, model_path: str) -> str:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for keys, name in KEYS:
        if all(key in record for key in keys):
            return name
    for name in LABELLED:
        if labelled := fitting(record, TaskSpec(name).load().shapes):
            _refuse_two_tasks(record, labelled, place)
            return name
    objective = _objective(record, place)
    shape = recognise(record, SHAPES)
    if not objective and not all(key in record for key in shape.required_keys):
        refuse_keys(record, shape, place)
        others = ", ".join("/".join(keys) for keys in (*OTHERS, *(k for k, _ in KEYS)))
        raise UserError(unknown(record, place, f", {others}", _special_tokens(model_path)))
    model = AutoConfig.from_pretrained(model_path, trust_remote_code=cfg.model.trust_remote_code)
    kinds = model.architectures or []
    if objective and model.is_encoder_decoder:
        raise UserError(
            f"{place}: {objective}: learnt by a model that continues texts, and {(kinds or ['this'])[0]} is none: take "
            f"another model, or --data.fields to read the good answers alone"
        )
    if model.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    generate = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())  # Gemma 3's is a Gemma3ForConditionalGeneration
    if not kinds or any(kind.endswith(("ForCausalLM", "LMHeadModel")) or kind in generate for kind in kinds):
        return objective or "CAUSAL_LM"
    if objective == "DPO":
        raise UserError(
            f"{place}: preference pairs and a {kinds[0]}: give --task REWARD to learn which answer is better, or a "
            "model that generates"
        )
    raise UserError(
        f"task: can't be inferred from records with {', '.join(record)} and a {kinds[0]}: give --task, "
        f"one of {', '.join(TASKS)}, or a model that generates"
    )
