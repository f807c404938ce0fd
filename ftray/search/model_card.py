"""The model card of the best adapter: what it was trained on, what it scored and how to load it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftray.config import Config
from ftray.data.sources import hub_dataset
from ftray.evaluation.intervals import said
from ftray.search.progress import describe
from ftray.search.results import TrialRow
from ftray.search.starting_point import described
from ftray.task_spec import TaskSpec

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData


def model_card(cfg: Config, best: TrialRow, proof: dict[str, Any] | None) -> str:
    """The README.md of the best adapter: a model card of the hub, with what it scored as its model index."""
    from huggingface_hub import ModelCard

    header = _card_data(cfg, best, proof).to_yaml()
    return str(ModelCard(f"---\n{header}\n---\n{_card_text(cfg, best, proof)}"))


def _card_data(cfg: Config, best: TrialRow, proof: dict[str, Any] | None) -> "ModelCardData":
    """`best` as validated; with a `proof`, what the test split gave."""
    from huggingface_hub import EvalResult, ModelCardData

    task, method = TaskSpec.named(cfg.task).load(), best["config"]["adapter"]["method"]
    dataset = hub_dataset(cfg.data.names)
    sources = [cfg.data.source] if isinstance(cfg.data.source, str) else cfg.data.source
    datasets = [hub_id for source in sources if (hub_id := hub_dataset(source))]
    found = {cfg.search.goal.metric.removeprefix("validation_"): best["value"]}
    if proof:
        found = {name: metric["best"] for name, metric in proof["metrics"].items()}
    results = [
        EvalResult(
            task_type=task.pipeline_tag,
            dataset_type=dataset or Path(cfg.data.names).name,
            dataset_name=dataset or Path(cfg.data.names).name,
            dataset_split="test" if proof else "validation",
            metric_type=name,
            metric_value=value,
        )
        for name, value in found.items()
    ]
    return ModelCardData(
        base_model=cfg.model.name,
        datasets=datasets or None,
        eval_results=results,
        library_name="peft",
        metrics=list(found),
        model_name=_card_title(cfg, best),
        pipeline_tag=task.pipeline_tag,
        tags=["ftray", method],
    )


def _card_title(cfg: Config, best: TrialRow) -> str:
    return f"{best['config']['adapter']['method']} adapter for {cfg.model.name}"


def _card_text(cfg: Config, best: TrialRow, proof: dict[str, Any] | None) -> str:
    lines = [
        f"# {_card_title(cfg, best)}",
        "",
        f"Trained on `{cfg.data.names}`; the best of a search over {cfg.search.trials} configurations.",
        "",
        *([f"Trained from {start}, which is the base below.", ""] if (start := described(cfg)) else []),
        f"Configuration: `{describe(best['config'])}`",
        "",
        f"{cfg.search.goal.metric}: {best['value']:.4f} after {best['records']} records ({best['tokens']} tokens).",
    ]
    if proof:
        records = f"{proof['records']} record" + ("" if proof["records"] == 1 else "s")
        lines += [
            "",
            f"On {records} of a test split that the search never saw:",
            "",
            "| metric | base | adapter | 95 % interval |",
        ]
        lines += ["| --- | --- | --- | --- |"]
        for name, m in proof["metrics"].items():
            lines.append(f"| {name} | {m['base']:.4f} | {m['best']:.4f} | {_difference(m)} |")
        for source, m in proof["sources"].items():
            of = f"loss, {m['records']} records of {source}"
            lines.append(f"| {of} | {m['base']:.4f} | {m['best']:.4f} | {_difference(m)} |")
        for name, m in (proof.get("over_default") or {}).items():
            of = f"{name}, over the default configuration"
            lines.append(f"| {of} | {m['base']:.4f} | {m['best']:.4f} | {_difference(m)} |")
        if proof["new_modules"]:
            lines += ["", f"The base came without {', '.join(proof['new_modules'])}: above, its head is untrained."]
    task = TaskSpec.named(cfg.task).load()
    labels = ", id2label=dict(enumerate(labels))" if task.has_labels else ""
    lines += [
        "",
        "```python",
        *(["import json", ""] if labels else []),
        "from peft import PeftConfig, PeftModel",
        f"from transformers import {task.auto_class}",
        "",
        *(['labels = json.load(open("task.json"))["labels"]'] if labels else []),
        'path = PeftConfig.from_pretrained(".").base_model_name_or_path  # in this directory',
        f"base = {task.auto_class}.from_pretrained(path{labels})",
        'model = PeftModel.from_pretrained(base, ".")',
        "```",
    ]
    return "\n".join(lines) + "\n"


def _difference(metric: dict[str, Any]) -> str:
    return ("difference " if metric["interval"] else "") + said(metric, "{:.4f}".format)
