"""Score a base model and any number of adapters on the same records."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ftray.arguments import Data, Settings, StrPath, command, config_of
from ftray.cli import run_command
from ftray.config import Config
from ftray.errors import UserError
from ftray.reports.page import EVALUATION, leave_report
from ftray.storage.location import Location, parse_location

if TYPE_CHECKING:
    from ftray.data import TokenizedData
    from ftray.evaluation.metrics import Scores
    from ftray.evaluation.user_metric import UserMetric
    from ftray.reports.result import Evaluation


@command
def evaluate(
    data: "Data | None" = None,
    *,
    validation_data: "Data | None" = None,
    test_data: "Data | None" = None,
    model: StrPath | Settings | None = None,
    task: str | None = None,
    adapter: StrPath | Sequence[StrPath] | None = None,
    split: str | None = None,
    suite: str | Settings | None = None,
    output: StrPath | None = None,
    evaluation: Settings | None = None,
    training: Settings | None = None,
    scaling: Settings | None = None,
    config: Config | StrPath | Settings | None = None,
    verbose: bool | None = None,
) -> "Evaluation":
    """Score a base model and any number of adapters on the same records.

    Args:
        data: records: a list of mappings, a frame, a data set or a path; or the section, with `source` one of these.
        model: the base: directory, hub id or .gguf file, or the section; not given: the one that an adapter names.
        adapter: directories, URIs, or what `train` and `tune` return; one or several.
        split: `test`, `validation`, `train`, or `all` records of a source that was held out as a whole.
        suite: `lm-eval:TASK,TASK`, or the section: benchmarks on which base and adapters are scored too.
        output: a .json file or a directory for the result and its report; not given: nothing is written.
        config: YAML file or mapping of sections, over which the other arguments win.

    Raises:
        UserError: anything the user can mend, before Ray starts or weights are read.
    """
    return _evaluate(config_of("evaluate", locals()))


def _evaluate(cfg: Config) -> "Evaluation":
    from ftray.adapters.discovery import base_of, data_settings, find_adapter, saved_task
    from ftray.data import DataCheck, prepare
    from ftray.data.splits import require
    from ftray.evaluation.suite import check_suite
    from ftray.evaluation.user_metric import UserMetricError, reward
    from ftray.search.held_out import refuse_seen, said_of_split, split_as_trained, trained_by
    from ftray.task_spec import CAUSAL, TaskSpec
    from ftray.task_spec import FILE as FILE_OF_TASK
    from ftray.tasks.infer_task import infer_task

    adapters = [find_adapter(name) for name in cfg.adapters]
    model_path = base_of(cfg, adapters)
    split = cfg.evaluation.split
    given = data_cfg = data_settings(cfg, adapters[0] if adapters else Path(model_path))
    merged = [Path(model_path)] if (Path(model_path) / FILE_OF_TASK).is_file() else []
    trained = {path: trained_by(path) for path in (*adapters, *merged)}
    task = saved_task(cfg, adapters)
    if split != "all":
        data_cfg = split_as_trained(given, [run for runs in trained.values() for run in runs])
        if taken := said_of_split(given, data_cfg):
            print(f"split    as in training: {taken}", flush=True)
        for path, runs in trained.items():
            what = f"{'adapter' if path in adapters else 'model'} {path}"
            refuse_seen(data_cfg, split, runs, what, task.full_name if adapters else cfg.task)
        require(split, data_cfg, f"there is no {split} split to score")
    for adapter in adapters[1:] if task.name == CAUSAL.name else ():  # other tasks have no template
        if data_settings(cfg, adapter) != given:
            raise UserError(
                f"adapter {adapter}: was trained with another template than {adapters[0]} (see their {FILE_OF_TASK}): "
                "evaluate them apart, or say by --data.template what both are to be given"
            )
    if split == "all":  # which are not split, then: no part of them can be empty
        whole = {"validation_fraction": 0.0, "test_fraction": 0.0}
        mixed = [one.model_copy(update=whole) for one in data_cfg.sources]
        data_cfg = data_cfg.model_copy(update={"sources": mixed, **whole})
    cfg = cfg.model_copy(update={"data": data_cfg})
    check = DataCheck(data_cfg)
    cfg = infer_task(cfg.model_copy(update={"task": task.full_name}) if adapters else cfg, model_path, check.first)
    data_cfg = cfg.data

    # these take seconds to import: a name misspelt has been found by now
    from ftray.adapters.discovery import added_by, check_chat_template
    from ftray.data.limits import check_special_tokens, refuse_beyond, within_positions
    from ftray.models.load import load_skeleton, load_tokenizer, own_labels

    labels = task.labels or own_labels(model_path, TaskSpec.named(cfg.task), cfg.model.trust_remote_code)
    tokenizer = load_tokenizer(model_path, cfg.model.trust_remote_code, data_cfg.chat_template)
    for adapter in adapters or [Path(model_path)]:
        check_chat_template(adapter, data_cfg, tokenizer)
    spec, judge = check.run(tokenizer, cfg.task, labels), reward(cfg.training)
    if judge:
        judge.try_on(check.shown)
    skeleton, added = load_skeleton(cfg.model, model_path, spec).model, max(map(added_by, adapters), default=0)
    check_special_tokens(cfg.model.name, skeleton, tokenizer)
    data_cfg = within_positions(data_cfg, skeleton, added, check.lengths)
    if cfg.suite.names and spec.name != CAUSAL.name:
        raise UserError(f"suite.tasks: are asked of models that continue texts, and this is for {spec.name}")
    check_suite(cfg.suite)
    place = output_file(cfg)

    import ray
    from ray.exceptions import RayTaskError

    from ftray.reports.result import Evaluation
    from ftray.runtime.cluster import connect, hardware, on_hardware, say_if_waiting
    from ftray.search.provenance import this_command
    from ftray.search.results import ANSWERS, beside, write_json, write_lines

    connect(cfg, dashboard=False)
    data = prepare(data_cfg, model_path, cfg.model.trust_remote_code, cfg.task, labels)
    refuse_beyond(data, data_cfg, skeleton, tokenizer, added)
    if split != "all" and not data.splits[split].records:
        raise UserError(f"data {data_cfg.names}: the {split} split is empty: take another --split, or all")
    where = [name if "://" in name else str(at.resolve()) for name, at in zip(cfg.adapters, adapters, strict=True)]
    named = dict(zip(cfg.adapters, where, strict=True))
    say_if_waiting(1, hardware(cfg))
    try:
        result = ray.get(on_hardware(cfg, score, cfg, model_path, data, named, judge))
    except RayTaskError as error:
        if isinstance(error.cause, UserMetricError):
            raise UserError(str(error.cause)) from None
        raise error.cause if isinstance(error.cause, UserError) else error from None
    answers = result.pop("answers")
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(result | {"made_by": this_command()}, place)
        write_lines(answers, beside(place, f".{ANSWERS}"))
        leave_report(place)
    return Evaluation(result, answers, place)


def run(cfg: Config) -> int:
    """The command: a table, with 95 % intervals of each adapter's difference to the base.

    A source that an adapter's run has read is split as it was there, in what is not given; a split that holds records
    which the adapter was trained on is refused. Fewer than six records bear no interval.

    The result as JSON goes to `output` (a .json file, or `evaluation.json` in a directory), a report beside it; where
    none is given, the result is the last line. The base is `--model`, else the one that the first adapter names; what
    `train` or `tune` left stands for the adapter in it. `--split all` scores every record of a file that was held out
    as a whole.

    `--suite lm-eval:TASK,TASK` asks base and adapters these tasks of lm-eval too (`pip install "ftray[lm-eval]"`), so
    that what was forgotten stands beside what was gained. Without a network, `--suite.data DIR` names copies of their
    data sets: `DIR/allenai/ai2_arc` is a clone of the hub's repository, or holds a folder a configuration, as
    `ARC-Easy`, with files that are called by their split. Task files of yours in it are known by their names.

    Raises:
        UserError: anything the user can mend, before Ray starts or weights are read.
    """
    found = evaluate(config=cfg)
    show(found.result)
    print(json.dumps(found.result) if found.file is None else f"evaluation {found.file}", flush=True)
    return 0


def output_file(cfg: Config) -> Location | None:
    """Where the JSON goes: `output` if it ends in .json, else `evaluation.json` in it; None where it isn't given."""
    if "output" not in cfg.model_fields_set:
        return None
    output, named = parse_location(cfg.output), Path(cfg.output).suffix == ".json"
    if not named and output.is_file():
        raise UserError(f"output {output}: is a file: name one that ends in .json, or a directory")
    (output.parent if named else output).check_writable()
    return output if named else output / EVALUATION


def score(
    cfg: Config,
    model_path: str,
    shards: "TokenizedData",
    adapters: dict[str, str],
    judge: "UserMetric | None" = None,
) -> dict[str, Any]:
    """Score the base, then each adapter over it; runs where the hardware is.

    Args:
        shards: the tokenized records.
        adapters: name -> directory or URI.
        judge: a function of the user's that judges answers; None: there is none.

    Returns:
        `model`, `split`, `task`, `records`, `base` (metric -> value), `adapters` (name -> metrics, see
        :func:`ftray.evaluation.metrics.compare`), of a mixture the loss by `sources`, `samples` of generated text,
        `suite` (see :func:`ftray.evaluation.suite.compare_suite`; empty: none was asked), and `answers` (see
        :func:`ftray.evaluation.answers.side_by_side`).
    """
    from peft import PeftModel

    from ftray.adapters.discovery import find_adapter, refuse_settings
    from ftray.evaluation.answers import UNDESIRABLE, side_by_side
    from ftray.evaluation.metrics import compare, compare_sources
    from ftray.evaluation.suite import TaskScores, compare_suite, score_suite
    from ftray.models.load import load_on_device, load_tokenizer
    from ftray.multi_adapter.shared_model import share

    split = cfg.evaluation.split
    task, base = shards.task.load(), load_on_device(cfg.model, model_path, shards.task).model
    tokenizer = load_tokenizer(model_path, cfg.model.trust_remote_code, cfg.data.chat_template)
    splits = [name for name in shards.splits if shards.splits[name].records] if split == "all" else [split]
    rows = [row for name in splits for row in shards.rows(name, cfg.evaluation.records)][: cfg.evaluation.records]
    rows = task.compared_with(base, rows, cfg.evaluation)
    before = task.score(base, tokenizer, rows, cfg.evaluation)
    if judge:
        judge.add_to(before, rows)
    after: dict[str, Scores] = {}
    asked, suites = cfg.suite.names, dict[str, dict[str, TaskScores]]()
    of_base = score_suite(cfg.suite, base, tokenizer, cfg.evaluation.batch_size) if asked else {}
    for name, directory in adapters.items():
        # a structure of its own over the one resident base: any two methods go side by side
        found = find_adapter(directory)
        with refuse_settings(found):
            model = PeftModel.from_pretrained(share(base), str(found))
        after[name] = task.score(model, tokenizer, rows, cfg.evaluation)
        if judge:
            judge.add_to(after[name], rows)
        if asked:
            suites[name] = score_suite(cfg.suite, model, tokenizer, cfg.evaluation.batch_size)
    texts = {"base": before.generated} | {name: scores.generated for name, scores in after.items()}
    samples = [
        {k: row[k] for k in ("prompt", "target", UNDESIRABLE) if k in row}
        | {name: own[i] for name, own in texts.items() if own}
        for i, row in enumerate(rows[: cfg.evaluation.samples if before.generated else 0])
    ]
    sources, resamples = [row.get("source") for row in rows], cfg.evaluation.bootstrap
    by_source = {name: compare_sources(sources, before, scores, resamples) for name, scores in after.items()}
    return {
        "model": cfg.model.name if "name" in cfg.model.model_fields_set else model_path,
        "data": cfg.data.names,
        "split": split,
        "task": shards.task.full_name,
        "records": len(rows),
        "base": {name: m["base"] for name, m in compare(before, before, 1).items()},
        "adapters": {name: compare(before, scores, resamples) for name, scores in after.items()},
        "sources": {
            source: {key: of_base[key] for key in ("records", "base")}
            | {"adapters": {name: own[source] for name, own in by_source.items()}}
            for source, of_base in compare_sources(sources, before, before, 1).items()
        },
        "suite": compare_suite(of_base, suites, resamples),
        "samples": samples,
        "answers": side_by_side(rows, {"base": before} | after),
    }


def show(result: dict[str, Any]) -> None:
    """A row a metric, a column for the base and one for each adapter with the interval of its difference to it."""
    from ftray.evaluation.intervals import any_interval
    from ftray.evaluation.suite import rows_of
    from ftray.reports.search import console
    from ftray.reports.words import counted

    title = counted(result["records"], f"{result['split']} record")
    table = Table("metric", "base", *result["adapters"], title=title)
    for name, value in result["base"].items():
        table.add_row(name, f"{value:.4g}", *(_cell(metrics[name]) for metrics in result["adapters"].values()))
    for source, own in result["sources"].items():
        cells = map(_cell, own["adapters"].values())
        table.add_row(f"loss, {own['records']} of {source}", f"{own['base']:.4g}", *cells)
    table.add_section()
    for name, shown, each in rows_of(result["suite"], [*result["adapters"]]):
        table.add_row(name, shown, *each)
    console().print(table)
    if any_interval([*result["adapters"].values(), *(own["adapters"] for own in result["sources"].values())]):
        print("in brackets: 95 % interval of the difference to the base")
    if result["suite"]:
        print("under the line: the suite, where what was forgotten shows; ±: one standard error")
    for sample in result["samples"]:
        print("  " + ", ".join(f"{name} {' '.join(text.split())[:80]!r}" for name, text in sample.items()))


def _cell(metric: dict[str, Any]) -> str:
    from ftray.evaluation.intervals import said

    return f"{metric['best']:.4g}  ({said(metric, '{:+.4g}'.format)})"


if __name__ == "__main__":
    sys.exit(run_command("evaluate"))
