"""Benchmarks that others keep: lm-eval's tasks, on the base and on each adapter over it, to tell what was forgotten.

https://github.com/EleutherAI/lm-evaluation-harness
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ftray.config import SuiteConfig
from ftray.errors import UserError, near
from ftray.evaluation.intervals import Told, judged, said
from ftray.evaluation.metrics import Scores, compare, ratio

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

TWO_SIDED = 1.96  # standard errors on each side of a 95 % interval of a normal distribution


@dataclass(frozen=True)
class TaskScores:
    """A metric of a task, of one model.

    Attributes:
        stderr: standard error of the value; None: the task tells none.
        records: that the model was asked.
        each: the metric of each of them, float64 [records]; empty where the value is no mean over records.
        less: whether less of it is better.
    """

    value: float
    stderr: float | None
    records: int
    each: np.ndarray
    less: bool


def check_suite(suite: SuiteConfig) -> None:
    """Load the tasks with their records, in this process, before anything expensive runs.

    Raises:
        UserError: lm-eval is not installed, it has no such task, or a task's records can't be had.
    """
    if suite.names:
        _load(suite)


def score_suite(
    suite: SuiteConfig, model: "nn.Module", tokenizer: "PreTrainedTokenizerBase", batch_size: int
) -> dict[str, TaskScores]:
    """Ask a model all of the suite; returns the scores by `TASK METRIC`, groups of tasks with their means among them.

    Args:
        model: as it is on its device; it stays as it is.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    tasks = _load(suite)
    # lm-eval ties weights anew, which an adapter on the embeddings would not survive, and may add a token for padding
    model.__dict__["tie_weights"] = lambda: None
    try:
        asked = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    finally:
        del model.__dict__["tie_weights"]
    found = lm_eval.simple_evaluate(asked, tasks=tasks, num_fewshot=suite.fewshot, limit=suite.limit, log_samples=True)
    return {
        f"{task} {_shown(key)}": _scores(found, task, key, float(value))
        for task, metrics in found["results"].items()
        for key, value in metrics.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }


def compare_suite(
    base: Mapping[str, TaskScores], adapters: Mapping[str, Mapping[str, TaskScores]], resamples: int
) -> dict[str, dict[str, Any]]:
    """Each metric of a suite for the base and the adapters over it, with 95 % intervals of the differences.

    Where the metric is a mean over records, they are resampled in pairs, as :func:`ftray.evaluation.metrics.compare`
    does; else the interval follows from the two standard errors, as if both models had been asked different records,
    and is wider.

    Returns:
        By `TASK METRIC`: `records`, `less`, `base`, `stderr` (None: not known), and `adapters`: by name the entries of
        :func:`ftray.evaluation.metrics.compare`, with `stderr`.
    """
    return {
        name: {
            "records": own.records,
            "less": own.less,
            "base": own.value,
            "stderr": own.stderr,
            "adapters": {
                adapter: _difference(own, tables[name], resamples) | {"stderr": tables[name].stderr}
                for adapter, tables in adapters.items()
            },
        }
        for name, own in base.items()
    }


def _difference(base: TaskScores, best: TaskScores, resamples: int) -> dict[str, Any]:
    if len(base.each):
        nothing, ones = np.zeros(len(base.each)), np.ones(len(base.each))
        before, after = (Scores(nothing, nothing, metrics={"it": ratio(own.each, ones)}) for own in (base, best))
        return compare(before, after, resamples)["it"]
    difference = best.value - base.value
    told: Told = {"interval": None, "shown": False, "reason": "its error is not known"}
    if base.stderr is not None and best.stderr is not None:
        reach = TWO_SIDED * math.hypot(base.stderr, best.stderr)
        told = judged(difference - reach, difference + reach, difference, base.records)
    return {"base": base.value, "best": best.value, "difference": difference, **told}


def _shown(key: str) -> str:
    """`acc` of lm-eval's `acc,none`; with the filter where answers go through one."""
    metric, _, filtered = key.partition(",")
    return metric if filtered == "none" else f"{metric} ({filtered})"


def _scores(found: Mapping[str, Any], task: str, key: str, value: float) -> TaskScores:
    metric, _, filtered = key.partition(",")
    stderr = found["results"][task].get(f"{metric}_stderr,{filtered}")
    samples = [sample for sample in found["samples"].get(task, ()) if sample["filter"] == filtered]
    samples.sort(key=lambda sample: sample["doc_id"])
    each = [sample[metric] for sample in samples if isinstance(sample.get(metric), int | float | np.number)]
    is_mean = len(each) == len(samples) > 0 and math.isclose(float(np.mean(each)), value, abs_tol=1e-9)
    better = found.get("higher_is_better", {}).get(task, {}).get(metric)
    records = sum(found["n-samples"][name]["effective"] for name in _leaves(found, task))
    return TaskScores(
        value=value,
        stderr=float(stderr) if isinstance(stderr, int | float | np.number) and math.isfinite(stderr) else None,
        records=records,
        each=np.array(each if is_mean else [], float),
        less=better is False,
    )


def _leaves(found: Mapping[str, Any], task: str) -> list[str]:
    """The tasks of a group; a task itself."""
    children = found.get("group_subtasks", {}).get(task) or []
    return [leaf for child in children for leaf in _leaves(found, child)] if children else [task]


def _load(suite: SuiteConfig) -> list[Any]:
    """The tasks and groups, with their records.

    Raises:
        UserError: see :func:`check_suite`.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError('suite.tasks: needs lm-eval: pip install "ftray[lm-eval]"') from None
    if suite.data and not Path(suite.data).is_dir():
        raise UserError(f"suite.data {suite.data}: no such directory")
    manager = TaskManager(include_path=suite.data)
    if unknown := next((name for name in suite.names if name not in manager.all_tasks), None):
        raise UserError(f"suite.tasks: lm-eval has no task {unknown}{near(unknown, manager.all_tasks, otherwise='')}")
    with _records_from(suite.data):
        return [one for name in suite.names for one in _loaded(manager, name, suite)]


def _loaded(manager: Any, name: str, suite: SuiteConfig) -> list[Any]:
    """A task or a group of tasks; of a tag, all its tasks."""
    try:
        found = manager.load([name])
    except UserError:
        raise
    except Exception as error:  # of the hub, of a data set, of a task file: whatever they raise
        way_out = "" if suite.data else ": where there is no network, give --suite.data DIR with a copy of its data set"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"suite.tasks: {name} can't be loaded ({reason}){way_out}") from None
    return [found["groups"][name]] if name in found["groups"] else [*found["tasks"].values()]


@contextmanager
def _records_from(directory: str | None) -> Iterator[None]:
    """Inside, data sets are read from copies in `directory`: `DIRECTORY/owner/name`, a clone of the hub's repository.

    A copy may also be folders of files by configuration, or just files, which are called by the names of splits.

    Raises:
        UserError: there is no copy of one that is asked for.
    """
    import datasets

    if directory is None:
        yield
        return
    load = datasets.load_dataset

    def load_copy(path: str, name: str | None = None, **kwargs: object) -> object:
        place = Path(directory, path)
        if not place.is_dir():
            raise UserError(f"suite.data {directory}: holds no copy of the data set {path}: {place} is no directory")
        if name and not (place / "README.md").is_file() and (place / name).is_dir():
            place, name = place / name, None
        return load(str(place), name, **kwargs)

    datasets.load_dataset = load_copy  # which lm-eval's tasks call, each in its own way
    try:
        yield
    finally:
        datasets.load_dataset = load


def rows_of(suite: Mapping[str, Mapping[str, Any]], adapters: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """What a table shows of the result of :func:`compare_suite`: the metric, the base's value, each adapter's."""
    rows = []
    for name, own in suite.items():
        error = f" ± {own['stderr']:.2g}" if own["stderr"] is not None else ""
        cells = []
        for adapter in adapters:
            one = own["adapters"][adapter]
            cells.append(f"{one['best']:.4g}  ({said(one, '{:+.4g}'.format)})")
        rows.append((f"{name}, {own['records']} records", f"{own['base']:.4g}{error}", cells))
    return rows
