"""What an output holds, of this version or of an earlier one, as a report needs it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
import yaml
from optuna.trial import FrozenTrial

from ftray.config import Config, Goal, config_from
from ftray.data.shards import Split
from ftray.errors import UserError
from ftray.evaluation.answers import Answered
from ftray.reports.page import EVALUATION
from ftray.search.driver_notes import is_searching
from ftray.search.journal import past_trials
from ftray.search.live import POINTS, Curve, curves_so_far, thinned
from ftray.search.provenance import CommandRun, commands_run
from ftray.search.reliability import RungReliability
from ftray.search.results import ANSWERS, EXPERIMENT, JOURNAL, TRAINED, TrialRow, all_rows, beside, checkpoints
from ftray.search.run_manifest import CONFIG, DATA, SPACE
from ftray.storage.location import Location, reason
from ftray.storage.manifest import refuse_damaged

SUMMARY, CURVES = "summary.json", "curves.parquet"
ALL_POINTS = 24_000  # of all curves, which have fewer points each where they are many


@dataclass
class SearchFiles:
    """What a search has left.

    Attributes:
        goals: what it was for; the first one ranks the trials.
        measured: metrics that its trials have, the first goal's first.
        front: numbers of the trials that no other beats in all of several goals.
        rule: by which the best was chosen; None: it has the best value.
        best: number of the best trial; None: there is none, or the search is not over.
        rows: the trials, best first.
        further: runs of finalists with other seeds.
        proof: base, default and best on test records; None: there was no proof.
        rungs, finalists: as in `summary.json`.
        seconds: of the command that ended the search; None: it has not ended.
        trials: of the journal, by number, with Optuna's parameters and the reports.
        curves: training loss of each trial, by number.
    """

    goals: list[Goal]
    measured: list[str]
    front: list[int]
    rule: str | None
    best: int | None
    rows: list[TrialRow]
    further: list[TrialRow]
    proof: dict[str, Any] | None
    rungs: list[RungReliability]
    finalists: dict[str, Any] | None
    seconds: float | None
    trials: dict[int, FrozenTrial]
    curves: dict[int, Curve]


@dataclass
class RunFiles:
    """What an output holds.

    Attributes:
        name: of the output, for the title.
        output: the directory.
        cfg: of the search or training run; None: there is an evaluation alone.
        search, training, evaluation: what was done there; None: that was not.
        data: the splits, by name; empty where the output doesn't say.
        answers: of the models of the proof or the evaluation to each record; empty where the output has none.
        commands: that have run there, oldest first.
    """

    name: str
    output: Location
    cfg: Config | None = None
    search: SearchFiles | None = None
    training: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    data: dict[str, Split] = field(default_factory=dict)
    answers: list[Answered] = field(default_factory=list)
    commands: list[CommandRun] = field(default_factory=list)


def read_run(place: Location) -> RunFiles:
    """Read an output, or the file of an evaluation.

    Raises:
        UserError: it holds neither a search nor a training run nor an evaluation, or a file in it is damaged.
    """
    try:
        if place.is_file():
            found = RunFiles(Path(place.path).stem, place.parent)
            _read_evaluation(place, found)
        else:
            found = RunFiles(Path(place.absolute().path).name, place)
            _read_output(found)
    except OSError as error:
        raise UserError(f"output {place}: can't be read ({reason(error)})") from None
    if not (found.search or found.training or found.evaluation):
        raise UserError(f"output {place}: holds no search, training run or evaluation: name one by --run")
    return found


def _read_output(found: RunFiles) -> None:
    output = found.output
    if (output / CONFIG).exists():
        with refuse_damaged(output / CONFIG):
            found.cfg = config_from(yaml.safe_load((output / CONFIG).read_text()))
    if found.cfg and (output / SPACE).exists() and (output / JOURNAL).exists():
        found.search = _search(found.cfg, output)
    elif found.cfg:
        found.training = _training(found.cfg, output)
    if (output / DATA).exists():
        with refuse_damaged(output / DATA):
            known = json.loads((output / DATA).read_text())
            found.data = {name: Split.from_json(split) for name, split in known.items() if name != "base"}
    found.answers = _lines(output / ANSWERS)
    found.commands = commands_run(output)
    if (output / EVALUATION).exists():
        _read_evaluation(output / EVALUATION, found)


def _read_evaluation(file: Location, found: RunFiles) -> None:
    with refuse_damaged(file):
        evaluation: dict[str, Any] = json.loads(file.read_text())
        if missing := [key for key in ("records", "split", "base", "adapters") if key not in evaluation]:
            raise ValueError(f"it lacks {missing[0]}")
    found.evaluation = evaluation
    if not found.answers:
        found.answers = _lines(beside(file, f".{ANSWERS}"))
    if "made_by" in evaluation:
        found.commands = [*found.commands, evaluation["made_by"]]


def _lines(path: Location) -> list[Answered]:
    if not path.exists():
        return []
    with refuse_damaged(path):
        return [json.loads(line) for line in path.read_text().splitlines()]


def _search(cfg: Config, output: Location) -> SearchFiles:
    """Of a search that is not over, what its journal says."""
    searches = is_searching(output)
    if (output / SUMMARY).exists() and not searches:
        with refuse_damaged(output / SUMMARY):
            summary: dict[str, Any] = json.loads((output / SUMMARY).read_text())
            metric = cfg.search.goal.metric
            rows = [_filled(row, metric) for row in summary.get("trials", [])]
            further = [_filled(row, metric) for row in summary.get("further_runs", [])]
    else:
        known = all_rows(cfg, output)
        rows, further = ([row for row in known if (row["seed_of"] is None) is own] for own in (True, False))
        summary = {}
    goals = cfg.search.goals
    measured = [name for name in cfg.search.measured if any(name in row["metrics"] for row in rows)]
    return SearchFiles(
        goals=list(goals),
        measured=measured,
        front=summary.get("front", []),
        rule=summary.get("rule"),
        best=summary["best"]["trial"] if summary.get("best") else None,
        rows=rows,
        further=further,
        proof=summary.get("proof"),
        rungs=summary.get("rungs", []),
        finalists=summary.get("finalists"),
        seconds=summary.get("seconds"),
        trials={trial.number: trial for trial in past_trials(output / JOURNAL)},
        curves=curves_so_far(output, [row["trial"] for row in (*rows, *further)], output / EXPERIMENT)
        if searches
        else _curves(output / CURVES),
    )


def _filled(row: dict[str, Any], metric: str) -> TrialRow:
    """A row with what rows of older versions lack."""
    metrics = {} if row["value"] is None else {metric: row["value"]}
    return cast(
        TrialRow, {"seed_of": None, "validated": None, "tie_breaker": 0.0, "metrics": metrics, "reason": None} | row
    )


def _curves(path: Location) -> dict[int, Curve]:
    """The training loss of each trial: the means of stretches of equal length."""
    if not path.exists():
        return {}
    with refuse_damaged(path):
        table = pq.read_table(path.path, filesystem=path.filesystem)
        columns = [table[name].to_pylist() for name in ("trial", "records", "train_loss")]
    by_trial: dict[int, Curve] = {}
    for number, records, loss in zip(*columns, strict=True):
        by_trial.setdefault(number, []).append((records, loss))
    points = max(2, min(POINTS, ALL_POINTS // max(1, len(by_trial))))
    return {number: thinned(curve, points) for number, curve in by_trial.items()}


def _training(cfg: Config, output: Location) -> dict[str, Any] | None:
    """The reports of a training run; of one of an older version, those of the checkpoints that it has kept."""
    if (output / TRAINED).exists():
        with refuse_damaged(output / TRAINED):
            trained: dict[str, Any] = json.loads((output / TRAINED).read_text())
            return trained
    goal, reports = cfg.search.goal, [report for report, _ in checkpoints(output / "train")]
    reports = [report for report in reports if goal.metric in report]
    return {"metric": goal.metric, "direction": goal.direction, "reports": reports, "kept": True} if reports else None
