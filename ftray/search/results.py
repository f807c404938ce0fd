"""What a search leaves in its output: checkpoints of trials, leaderboard, the best adapter."""

import csv
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from ftray.adapters.methods import METHODS, parameters
from ftray.config import AdapterConfig, Config
from ftray.search.goals import Ranked, front, place
from ftray.search.trial_status import TrialStatus, journal_status
from ftray.storage.atomic import atomic_dir, atomic_write
from ftray.storage.location import Location, parse_location
from ftray.storage.manifest import check, find_corruption
from ftray.training.train_state import Report, best_report, metric_value, tie_breaker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXPERIMENT = "tune"  # directory of the trials
JOURNAL = "study.log"
TRAINED = "training.json"  # what a training run has reported
ANSWERS = "answers.jsonl"  # of base, default and best to each test record
PACKED_REPORT = "report.json"  # of a trial that trains in a pack, inside its checkpoint
LOSSES_SO_FAR = "losses"  # in it: the training loss of each step


class TrialRow(Ranked):
    """A trial of a search, as `summary.json` holds it.

    Attributes:
        trial: its number.
        value: the best of its reports; a failed trial keeps it. None: it was never validated.
        tie_breaker: see :func:`ftray.training.train_state.tie_breaker`.
        validated: validation records behind the value; None: all that the settings allow.
        metrics: all that the search goes by, of the report that has the value; empty: it made none.
        records, tokens, seconds: of its last report.
        config: its configuration, `adapter` and `training`.
        curve: of each report `records`, and what it has of the search's metric and `paired_loss`.
        checkpoint: path of the one written with the best report; None: there is none.
        reason: why it failed; None: it did not.
        seed_of: of a further run of a finalist, with another seed, the finalist's number; else None.
    """

    status: TrialStatus
    records: int
    tokens: int
    seconds: float
    config: dict[str, Any]
    curve: list[dict[str, Any]]
    checkpoint: str | None
    seed_of: int | None


def trial_name(number: int) -> str:
    """The name of a trial's directory and trainer; a trainer of the same name resumes where the last one stopped."""
    return f"trial-{number}"


def checkpoints(directory: Location) -> list[tuple[dict[str, Any], str]]:
    """The report and the path of every checkpoint that a trial still has, newest last; none if the list is damaged."""
    directory = directory.resolve()
    reports = directory.glob(f"checkpoint_*/{PACKED_REPORT}")
    packed = [(json.loads(path.read_text()), str(path.parent)) for path in reports]
    if packed:
        return sorted(packed, key=lambda kept: kept[0]["step"])
    from ray.train import Result  # here: what comes before Ray starts needs none of it

    from ftray.compat.ray_train import BrokenCheckpointList

    try:
        best = Result.from_path(directory.path, directory.filesystem).best_checkpoints
    except (RuntimeError, ValueError, BrokenCheckpointList):
        return []
    kept = [(m, str(directory / Path(c.path).name)) for c, m in best or [] if m and "step" in m]
    return sorted(kept, key=lambda pair: pair[0]["step"])


def places(directory: Location) -> Sequence[Location]:
    """The checkpoints of a trial in a pack, newest first."""
    return sorted(directory.resolve().published_dirs("checkpoint_*"), key=str, reverse=True)


def newest_whole(directory: Location) -> str | None:
    """The checkpoint that a trial in a pack resumes from; None: it starts from the beginning."""
    return next((str(place) for place in places(directory) if damage_of(place) is None), None)


def damage_of(place: Location) -> str | None:
    """As :func:`ftray.storage.manifest.find_corruption`, also for a checkpoint in an object store."""
    with place.as_local_dir() as directory:
        return find_corruption(directory)


def say_damaged(output: Location) -> None:
    """Print the checkpoints that a resumed search can't use because they are damaged."""
    from optuna.trial import TrialState  # here: a pack's processes need no Optuna

    from ftray.search.journal import past_trials

    for trial in past_trials(output / JOURNAL):
        if trial.state is TrialState.RUNNING:
            for place in reversed(places(output / EXPERIMENT / trial_name(trial.number))):
                if reason := damage_of(place):
                    print(
                        f"trial {trial.number}: {place} is damaged ({reason}): it resumes from before",
                        flush=True,
                    )


def trial_rows(cfg: Config, output: Location) -> list[TrialRow]:
    """The trials of the search in `output`, best first, see :func:`ftray.search.goals.place`."""
    return [row for row in all_rows(cfg, output) if row["seed_of"] is None]


def all_rows(cfg: Config, output: Location) -> list[TrialRow]:
    """As :func:`trial_rows`, the further runs of finalists among them."""
    from ftray.search.journal import SEED_OF, past_trials  # here: as above

    goal = cfg.search.goal
    rows: list[TrialRow] = []
    for trial in past_trials(output / JOURNAL):
        if "config" not in trial.user_attrs:  # the driver died before it could begin
            continue
        kept = checkpoints(output / EXPERIMENT / trial_name(trial.number))
        # a checkpoint may be newer than the last report in the journal, if the trial was stopped in between
        found = [report for report, _ in kept] + trial.user_attrs.get("reports", [])
        reports: list[Report] = [report for _, report in sorted({report["step"]: report for report in found}.items())]
        best, last = best_report(reports, goal.metric, goal.direction), reports[-1] if reports else None
        rows.append(
            {
                "trial": trial.number,
                "status": journal_status(trial),
                "value": metric_value(best, goal.metric) if best else None,
                "tie_breaker": tie_breaker(best) if best else 0.0,
                "validated": best.get("validated") if best else None,
                "metrics": {k: metric_value(best, k) for k in cfg.search.measured if k in best} if best else {},
                "records": last["records"] if last else 0,
                "tokens": last.get("tokens", 0) if last else 0,
                "seconds": last.get("seconds", 0.0) if last else 0.0,
                "config": trial.user_attrs["config"],
                "curve": [
                    {k: v for k, v in r.items() if k in ("records", goal.metric, "paired_loss")} for r in reports
                ],
                "checkpoint": next((path for report, path in kept if best and report["step"] == best["step"]), None),
                "reason": trial.user_attrs.get("reason"),
                "seed_of": trial.user_attrs.get(SEED_OF),
            }
        )
    return sorted(rows, key=lambda row: place(row, goal, row["status"] is TrialStatus.FAILED))


def write_leaderboard(rows: list[TrialRow], path: Location, cfg: Config) -> None:
    """Write a CSV file with one line per trial, best first, and a column for every setting that any trial has.

    What a trial's configuration leaves open is as it was trained: by the method's default, or the training section.

    Where the search goes by several metrics, each has a column, and `front` is 1 for the trials that none beats in all.
    """
    metric, *further = cfg.search.measured
    if len(cfg.search.goals) > 1:
        further.append("front")
    given = [{**r["config"]["adapter"], **r["config"]["training"]} for r in rows]
    settings = list(dict.fromkeys(key for own in given for key in own))
    flat = [
        {key: value for key, value in (_whole(r["config"], cfg) | own).items() if key in settings}
        for r, own in zip(rows, given, strict=True)
    ]
    known = ["rank_in_search", "trial", "status", metric, *further, "records", "tokens", "seconds"]
    columns = [*known, *settings, "reason"]

    shown_front = front(rows, cfg)
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for rank, (row, config) in enumerate(zip(rows, flat, strict=True), 1):
            shown = {k: v for k, v in row.items() if k in columns}
            plain = {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in config.items()}
            own = row["metrics"] | ({"front": int(row in shown_front)} if "front" in further else {})
            writer.writerow({"rank_in_search": rank, **own, **shown, **plain})


def _whole(configuration: dict[str, Any], cfg: Config) -> dict[str, Any]:
    """Every setting of a trial: the parameters of its method, and the training section."""
    adapter = AdapterConfig(**configuration["adapter"])
    own = parameters(adapter).model_dump() if adapter.method in METHODS else {}  # those that are kept may be of others
    return own | cfg.training.model_dump()


def write_curves(rows: list[TrialRow], experiment: Location, path: Location) -> None:
    """Write a Parquet file with the training loss of every step of the trials that trained in packs.

    Its columns are `trial` and `step` (int64, from 1), `records` (int64, seen by then) and `train_loss` (float64, nats
    per supervised token).
    """
    columns: dict[str, list[float]] = {"trial": [], "step": [], "records": [], "train_loss": []}
    for row in sorted(rows, key=lambda row: row["trial"]):
        kept = checkpoints(experiment / trial_name(row["trial"]))
        for step, loss in enumerate(kept[-1][0].get(LOSSES_SO_FAR, []) if kept else [], 1):
            batch = kept[-1][0]["records"] // kept[-1][0]["step"]
            for name, value in zip(columns, (row["trial"], step, step * batch, loss), strict=True):
                columns[name].append(value)
    kinds = {"trial": pa.int64(), "step": pa.int64(), "records": pa.int64(), "train_loss": pa.float64()}
    table, file = pa.table({name: pa.array(columns[name], kind) for name, kind in kinds.items()}), io.BytesIO()
    pq.write_table(table, file)
    path.write_bytes(file.getvalue())


def write_json(value: object, path: Path | Location) -> None:
    """Pretty JSON, whole or not at all."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=2, default=str)


def beside(path: Location, ending: str) -> Location:
    """The file whose name is that of `path` up to its last dot, with another ending."""
    return path.parent / f"{Path(path.path).stem}{ending}"


def write_lines(values: Sequence[object], path: Location) -> None:
    """JSON lines, whole or not at all."""
    with atomic_write(path) as file:
        file.writelines(json.dumps(value) + "\n" for value in values)


def write_yaml(value: object, path: Location) -> None:
    """Write YAML atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        yaml.safe_dump(value, file, sort_keys=False)


def save_best_adapter(checkpoint: str, card: str, tokenizer: "PreTrainedTokenizerBase", directory: Location) -> None:
    """Copy the adapter of a checkpoint (a path or URI), with tokenizer and model card, atomically.

    Raises:
        UserError: the adapter is damaged.
    """
    with (parse_location(checkpoint) / "adapter").as_local_dir() as adapter, atomic_dir(directory) as made:
        check(adapter, f"adapter {checkpoint}/adapter")
        shutil.copytree(adapter, made, dirs_exist_ok=True)
        tokenizer.save_pretrained(made)
        (made / "README.md").write_text(card)
