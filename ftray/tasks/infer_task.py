"""Infers the task, and the metric to search for, where the user names none."""

from typing import Any

from ftray.config import Config
from ftray.data.records import KNOWN, SHAPES
from ftray.data.shapes import recognise, refuse
from ftray.data.sources import Located
from ftray.errors import UserError, near
from ftray.task_spec import TASKS, TaskSpec

# keys of a record -> task; the first that fits
KEYS = [
    (("question", "context", "answers"), "QUESTION_ANS"),
    (("tokens", "tags"), "TOKEN_CLS"),
    (("text", "label"), "SEQ_CLS"),
    (("anchor", "positive"), "FEATURE_EXTRACTION"),
    (("sentence1", "sentence2", "score"), "FEATURE_EXTRACTION"),
]


def infer_task(cfg: Config, model_path: str, first: Located) -> Config:
    """`cfg` with `task`, `search.metric` and `search.direction` filled in.

    Args:
        model_path: directory of the base model.
        first: training record, with its location.

    Raises:
        UserError: the task can't be inferred from the first record and the model, or has no such metric.
    """
    place, record = first
    name = cfg.task if cfg.task != "auto" else _infer(record, place, cfg, model_path)
    task = TaskSpec(name).load()
    metrics, usual = task.choices(record)
    given = cfg.search.model_fields_set
    metric = cfg.search.metric.removeprefix("validation_") if "metric" in given else usual
    if metric not in metrics:
        raise UserError(f"search.metric {cfg.search.metric}: {name} has no such metric{near(metric, metrics)}")
    if "metric" in given and metric in task.generated and not cfg.evaluation.generate:
        raise UserError(f"search.metric {metric}: is of generated text, and evaluation.generate is false")
    direction = cfg.search.direction if "direction" in given else metrics[metric]
    search = cfg.search.model_copy(update={"metric": f"validation_{metric}", "direction": direction})
    return cfg.model_copy(update={"task": name, "search": search})


def _infer(record: dict[str, Any], place: object, cfg: Config, model_path: str) -> str:
    from transformers import AutoConfig

    for keys, name in KEYS:
        if all(key in record for key in keys):
            return name
    shape = recognise(record, SHAPES)
    if not all(key in record for key in shape.required_keys):
        refuse(record, shape.refuses, place)
        others = ", ".join("/".join(keys) for keys, _ in KEYS)
        has = ", ".join(map(str, record)) or "(none)"
        raise UserError(f"{place}: record with keys {has}; known shapes: {KNOWN}, {others}")
    model = AutoConfig.from_pretrained(model_path, trust_remote_code=cfg.model.trust_remote_code)
    if model.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    kinds = model.architectures or []
    if not kinds or any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        return "CAUSAL_LM"
    raise UserError(
        f"task: can't be inferred from records with {', '.join(record)} and a {kinds[0]}: give --task, "
        f"one of {', '.join(TASKS)}, or a model that generates"
    )
