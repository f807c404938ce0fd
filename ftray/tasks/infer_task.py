"""Infers the task, and the metric to search for, where the user names none."""

from typing import Any

import yaml

from ftray.config import Config
from ftray.data.fields import as_typed
from ftray.data.formats import Located
from ftray.data.records import SHAPES, unknown
from ftray.data.refusals import kept, refuse_keys
from ftray.data.shapes import Shape, fitting, recognise
from ftray.errors import UserError, near
from ftray.models.chat_template import names, read_chat_template
from ftray.storage.location import parse_location
from ftray.storage.manifest import refuse_damaged
from ftray.task_spec import RAW, TASKS, TaskSpec

# keys of a record -> task; the first that fits
KEYS = [
    (("question", "context", "answers"), "QUESTION_ANS"),
    (("question", "context", "answer", "answer_start"), "QUESTION_ANS"),
    (("anchor", "positive"), "FEATURE_EXTRACTION"),
    (("sentence1", "sentence2", "score"), "FEATURE_EXTRACTION"),
]
LABELLED = ("TOKEN_CLS", "SEQ_CLS")  # tasks whose shapes tell them from all others


def infer_task(cfg: Config, model_path: str, first: Located) -> Config:
    """`cfg` with `task`, `search.metric`, `search.direction` and the text of the chat template filled in.

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
    data = cfg.data
    if data.chat_template and data.chat_template not in names():  # a file is here, and perhaps not where it is used
        data = data.model_copy(update={"chat_template": read_chat_template(data.chat_template)})
    return cfg.model_copy(update={"task": name, "search": search, "data": data})


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
    shape = recognise(record, SHAPES)
    if not all(key in record for key in shape.required_keys):
        refuse_keys(record, shape, place)
        others = ", ".join("/".join(keys) for keys in (("tokens", "tags"), ("text", "label"), *(k for k, _ in KEYS)))
        raise UserError(unknown(record, place, f", {others}", _special_tokens(model_path)))
    model = AutoConfig.from_pretrained(model_path, trust_remote_code=cfg.model.trust_remote_code)
    if model.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    kinds = model.architectures or []
    generate = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())  # Gemma 3's is a Gemma3ForConditionalGeneration
    if not kinds or any(kind.endswith(("ForCausalLM", "LMHeadModel")) or kind in generate for kind in kinds):
        return "CAUSAL_LM"
    raise UserError(
        f"task: can't be inferred from records with {', '.join(record)} and a {kinds[0]}: give --task, "
        f"one of {', '.join(TASKS)}, or a model that generates"
    )
