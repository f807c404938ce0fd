"""What a search writes: leaderboard, summary, the best adapter and its model card."""

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from optuna.trial import TrialState
from ray.train import Result

from ftray.compat.ray_train import BrokenCheckpointList
from ftray.config import Config
from ftray.data.sources import hub_dataset
from ftray.search.progress import describe
from ftray.search.sampler import past_trials
from ftray.storage.atomic import atomic_dir, atomic_write
from ftray.storage.location import Location, Stored, as_local_dir, parse_location
from ftray.storage.manifest import MANIFEST, check, find_corruption
from ftray.task_spec import TaskSpec

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

EXPERIMENT = "tune"  # directory of the trials
JOURNAL = "study.log"
PACKED_REPORT = "report.json"  # of a trial that trains in a pack, inside its checkpoint
STATUS = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "stopped early",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "unfinished",
}


def trial_name(number: int) -> str:
    """The name of a trial's directory and trainer; a trainer of the same name resumes where the last one stopped."""
    return f"trial-{number}"


def checkpoints(directory: Location) -> list[tuple[dict[str, Any], str]]:
    """The report and the path of every checkpoint that a trial still has, newest last; none if the list is damaged."""
    directory = directory if isinstance(directory, Stored) else directory.resolve()
    reports = directory.glob(f"checkpoint_*/{PACKED_REPORT}")
    packed = [(json.loads(path.read_text()), str(path.parent)) for path in reports]
    if packed:
        return sorted(packed, key=lambda kept: kept[0]["step"])
    try:
        if isinstance(directory, Stored):
            best = Result.from_path(directory.path, directory.filesystem).best_checkpoints
        else:
            best = Result.from_path(str(directory)).best_checkpoints
    except (RuntimeError, ValueError, BrokenCheckpointList):
        return []
    kept = [(m, str(directory / Path(c.path).name)) for c, m in best or [] if m and "step" in m]
    return sorted(kept, key=lambda pair: pair[0]["step"])


def places(directory: Location) -> Sequence[Location]:
    """The checkpoints of a trial in a pack, newest first."""
    if isinstance(directory, Path):
        return sorted(directory.resolve().glob("checkpoint_*"), reverse=True)
    return sorted((file.parent for file in directory.glob(f"checkpoint_*/{MANIFEST}.json")), key=str, reverse=True)


def newest_whole(directory: Location) -> str | None:
    """The checkpoint that a trial in a pack resumes from; None: it starts from the beginning."""
    return next((str(place) for place in places(directory) if damage_of(place) is None), None)


def damage_of(place: Location) -> str | None:
    """As :func:`ftray.storage.manifest.find_corruption`, also for a checkpoint in an object store."""
    with as_local_dir(place) as directory:
        return find_corruption(directory)


def say_damaged(output: Location) -> None:
    """Print the checkpoints that a resumed search can't use because they are damaged."""
    for trial in past_trials(output / JOURNAL):
        if trial.state is TrialState.RUNNING:
            for place in reversed(places(output / EXPERIMENT / trial_name(trial.number))):
                if reason := damage_of(place):
                    print(f"trial {trial.number}: {place} is damaged ({reason}): it goes on from before", flush=True)


def trial_rows(cfg: Config, output: Location) -> list[dict[str, Any]]:
    """One dict a trial, best first: trial, status, value, records, tokens, seconds, config, checkpoint, reason.

    `value` is the best of the trial's reports and `checkpoint` the one written with it. A failed trial keeps its value,
    but ranks after all trials that did not fail.
    """
    metric, sign = cfg.search.metric, 1 if cfg.search.direction == "min" else -1
    rows = []
    for trial in past_trials(output / JOURNAL):
        if "config" not in trial.user_attrs:  # the driver died before it could begin
            continue
        kept = checkpoints(output / EXPERIMENT / trial_name(trial.number))
        # a checkpoint may be newer than what the journal heard before the trial was stopped
        heard = [report for report, _ in kept] + trial.user_attrs.get("reports", [])
        reports = [report for _, report in sorted({report["step"]: report for report in heard}.items())]
        best: dict[str, Any] = min(reports, key=lambda r: sign * r[metric], default={})
        last = reports[-1] if reports else {}
        rows.append(
            {
                "trial": trial.number,
                "status": STATUS[trial.state],
                "value": best.get(metric),
                "records": last.get("records", 0),
                "tokens": last.get("tokens", 0),
                "seconds": last.get("seconds", 0.0),
                "config": trial.user_attrs["config"],
                "curve": [{"records": r["records"], metric: r[metric]} for r in reports],
                "checkpoint": next((path for report, path in kept if report["step"] == best["step"]), None),
                "reason": trial.user_attrs.get("reason"),
            }
        )
    worst = float("inf")
    return sorted(rows, key=lambda r: (r["status"] == "failed", worst if r["value"] is None else sign * r["value"]))


def write_leaderboard(rows: list[dict[str, Any]], path: Location, metric: str) -> None:
    """Write a CSV file with one line per trial, best first, and a column for every setting that any trial has."""
    flat = [{**r["config"]["adapter"], **r["config"]["training"]} for r in rows]
    settings = list(dict.fromkeys(key for f in flat for key in f))
    columns = ["rank_in_search", "trial", "status", metric, "records", "tokens", "seconds", *settings, "reason"]

    with atomic_write(path) as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for place, (row, config) in enumerate(zip(rows, flat, strict=True), 1):
            shown = {k: row[k] for k in ("trial", "status", "records", "tokens", "seconds", "reason")}
            plain = {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in config.items()}
            writer.writerow({"rank_in_search": place, metric: row["value"], **shown, **plain})


def write_json(value: Any, path: Location) -> None:
    """Pretty JSON, whole or not at all."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=2, default=str)


def write_yaml(value: Any, path: Location) -> None:
    """Write YAML atomically."""
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        yaml.safe_dump(value, file, sort_keys=False)


def save_best_adapter(checkpoint: str, card: str, tokenizer: Any, directory: Location) -> None:
    """Copy the adapter of a checkpoint (a path or URI), with tokenizer and model card, atomically.

    Raises:
        UserError: the adapter is damaged.
    """
    with as_local_dir(parse_location(checkpoint) / "adapter") as adapter, atomic_dir(directory) as made:
        check(adapter, f"adapter {checkpoint}/adapter")
        shutil.copytree(adapter, made, dirs_exist_ok=True)
        tokenizer.save_pretrained(made)
        (made / "README.md").write_text(card)


def model_card(cfg: Config, best: dict[str, Any], proof: dict[str, Any] | None) -> str:
    """The README.md of the best adapter: a model card of the hub, with what it scored as its model index."""
    from huggingface_hub import ModelCard

    header = _card_data(cfg, best, proof).to_yaml()
    return str(ModelCard(f"---\n{header}\n---\n{_card_text(cfg, best, proof)}"))


def _card_data(cfg: Config, best: dict[str, Any], proof: dict[str, Any] | None) -> "ModelCardData":
    """`best` as validated; with a `proof`, what the test split gave."""
    from huggingface_hub import EvalResult, ModelCardData

    task, method = TaskSpec(cfg.task).load(), best["config"]["adapter"]["method"]
    dataset = hub_dataset(cfg.data.names)
    found = {cfg.search.metric.removeprefix("validation_"): best["value"]}
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
        datasets=[dataset] if dataset else None,
        eval_results=results,
        library_name="peft",
        metrics=list(found),
        model_name=_card_title(cfg, best),
        pipeline_tag=task.pipeline_tag,
        tags=["ftray", method],
    )


def _card_title(cfg: Config, best: dict[str, Any]) -> str:
    return f"{best['config']['adapter']['method']} adapter for {cfg.model.name}"


def _card_text(cfg: Config, best: dict[str, Any], proof: dict[str, Any] | None) -> str:
    lines = [
        f"# {_card_title(cfg, best)}",
        "",
        f"Trained on `{cfg.data.names}`; the best of a search over {cfg.search.trials} configurations.",
        "",
        f"Configuration: `{describe(best['config'])}`",
        "",
        f"{cfg.search.metric}: {best['value']:.4f} after {best['records']} records ({best['tokens']} tokens).",
    ]
    if proof:
        lines += ["", "On a test split that the search never saw:", "", "| metric | base | adapter | 95 % interval |"]
        lines += ["| --- | --- | --- | --- |"]
        for name, m in proof["metrics"].items():
            low, high = m["interval"]
            lines.append(f"| {name} | {m['base']:.4f} | {m['best']:.4f} | difference {low:.4f} to {high:.4f} |")
        if proof["new_modules"]:
            lines += ["", f"The base came without {', '.join(proof['new_modules'])}: above, its head is untrained."]
    task = TaskSpec(cfg.task).load()
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
