"""Search for the best adapter, prove it against the base model and merge it."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ftray.arguments import Data, Metric, Settings, StrPath, arguments_of, command, config_of
from ftray.cli import run_command
from ftray.config import KNEE, AdapterConfig, Config, UiConfig
from ftray.errors import RunFailed, UserError
from ftray.reports.page import leave_report
from ftray.reports.search import console, print_leaderboard, show
from ftray.storage.location import Location, parse_location, reason

if TYPE_CHECKING:
    from ray.tune import Callback
    from transformers import PreTrainedTokenizerBase

    from ftray.data.splits import Sources
    from ftray.models.load import LoadedModel
    from ftray.reports.plan import Plan
    from ftray.reports.result import SearchResult
    from ftray.search.final_calls import Hardware
    from ftray.search.results import TrialRow
    from ftray.search.space import Space
    from ftray.search.trial_worker import SearchContext

PROOF_RECORDS = 1000  # base and best each generate an answer to all of them; the interval says what so many can tell


@command
def tune(
    data: "Data | None" = None,
    *,
    validation_data: "Data | None" = None,
    test_data: "Data | None" = None,
    model: StrPath | Settings | None = None,
    task: str | None = None,
    start: StrPath | Settings | None = None,
    stages: str | Sequence[str | Settings] | None = None,
    space: str | Settings | None = None,
    metric: Metric | Sequence[Metric] | None = None,
    direction: str | None = None,
    trials: int | None = None,
    pack: int | str | None = None,
    time_budget: float | None = None,
    concurrency: int | None = None,
    max_failures: int | None = None,
    warm_start: StrPath | Sequence[StrPath] | None = None,
    output: StrPath | None = None,
    resume: bool | None = None,
    training: Settings | None = None,
    scaling: Settings | None = None,
    search: Settings | None = None,
    evaluation: Settings | None = None,
    ui: bool | Settings | None = None,
    config: Config | StrPath | Settings | None = None,
    verbose: bool | None = None,
) -> "SearchResult":
    """Search for the best adapter, prove it against the base model and merge it.

    Args:
        data: records: a list of mappings, a frame, a data set or a path; or the section, with `source` one of these.
        model: directory, hub id or .gguf file; or the section.
        space: a name, a YAML file, or a mapping as such a file holds it.
        metric: name, or a function of records and answers, two lists, that gives a number a record; with `direction`.
        start: what training starts from: an adapter, or the result of an earlier call.
        resume: continue what is in `output`; start, if nothing is.
        config: YAML file or mapping of sections, over which the other arguments win.

    Others are the fields and sections of docs/configuration.md. Of several `stages`, the last one's result is returned.

    Raises:
        UserError: anything the user can mend, before anything is trained.
        RunFailed: the search can't continue, or no trial gave a result; `resume=True` continues it.
    """
    return _tune(config_of("tune", locals()))


def _tune(cfg: Config) -> "SearchResult":
    from ftray.reports.result import SearchResult

    if cfg.plan:
        raise UserError("plan: ftray.plan takes the arguments of ftray.tune, and returns the plan")
    if cfg.stages:
        from ftray.search.stages import last_output, run_stages

        def one(stage: Config) -> int:
            tune(config=stage)
            return 0

        run_stages(cfg, check, one, "best/adapter")
        return SearchResult(last_output(cfg))
    from ftray.runtime.cluster import check_address, connect, ends_with_ray, importing, undone_if_refused
    from ftray.search.run_manifest import refuse_held, sole_driver, write_definition

    def begin(cfg: Config) -> None:
        refuse_held(parse_location(cfg.output))
        with importing("peft", "ftray.adapters.compatibility", "ftray.models.load"):  # which the checks then need
            check_address(cfg)
            connect(cfg)

    with undone_if_refused():
        cfg, space, model_path, tokenizer = check(cfg, begin)
    from ftray.runtime.preemption import ending_on_sigterm
    from ftray.search.jobs import announce
    from ftray.search.live import OVER, note
    from ftray.search.results import JOURNAL

    output = parse_location(cfg.output)
    try:
        with sole_driver(output):
            (output / JOURNAL).drop_cut_line()
            write_definition(cfg, space, output)
            announce(output)
            with shown_live(cfg, output):
                with ends_with_ray("tune"), ending_on_sigterm():
                    failure = drive(cfg, space, model_path, tokenizer, output)
                note(output, OVER)
    except (UserError, RunFailed):
        raise
    except Exception as error:
        why = why_it_stopped(error, output)
        if why is None:
            raise
        raise RunFailed(f"{why} the same command with --resume continues") from None
    if failure:
        raise RunFailed(failure)
    return SearchResult(output)


@command
@arguments_of(tune)
def plan(given: dict[str, Any]) -> "Plan":
    """What `tune` with the same arguments would come to: memory, time and trials; nothing is trained or left.

    Raises:
        UserError: anything the user can mend, before Ray starts.
    """
    is_whole = isinstance(given["config"], Config)
    return _plan(config_of("tune", given if is_whole else given | {"plan": True}))


def _plan(cfg: Config) -> "Plan":
    from ftray.reports.plan import Plan
    from ftray.search.estimate import estimate

    if not cfg.stages:
        context, space = plan_context(cfg)
        return Plan(context.config, context.tokenized, estimate(context, space))
    from ftray.search.stages import run_stages

    plans: list[Plan] = []

    def one(stage: Config) -> int:
        plans.append(_plan(stage))
        return 0

    run_stages(cfg.model_copy(update={"plan": True}), check, one, "best/adapter")
    return replace(plans[0], later=tuple(plans[1:]))


def run(cfg: Config) -> int:
    """The command, from first check to last line; docs/search.md lists what it leaves in `output`.

    A best adapter that can't be merged leaves its proof, the reason in `summary.json` and exit code 1, but for methods
    that are not there to be merged.

    With `--plan`, only what that would come to. With `--stages`, a search each, in directories of `output`.

    Raises:
        UserError: anything the user can mend, before anything is trained.
    """
    if cfg.stages:
        from ftray.search.stages import run_stages

        return run_stages(cfg, check, run, "best/adapter")
    if cfg.plan:
        return show_plan(cfg)
    result = tune(config=cfg)
    summary = result.summary
    show(summary["trials"], summary["proof"], result.config, result.output)
    if summary["start"]:
        print(f"base     in these tables: {summary['start']}")
    from ftray.search.reliability import described

    for line in described(summary["rungs"]):
        print(line)
    return exit_code(summary["best"], summary["proof"]["merged"])


def shown_live(cfg: Config, output: Location) -> AbstractContextManager[None]:
    """Serves the live page as long as it is open, if that was asked for.

    Raises:
        UserError: it can't be served.
    """
    if not cfg.ui.serve:
        usual = UiConfig()
        if (cfg.ui.host, cfg.ui.port) != (usual.host, usual.port):
            print("page     none: --ui serves it", flush=True)
        return nullcontext()
    try:
        from ftray.serving.live import page_beside
    except ModuleNotFoundError as error:
        raise UserError(f'--ui needs {error.name}: pip install "ftray[serve]"') from None
    return page_beside(cfg, output)


def why_it_stopped(error: Exception, output: Location) -> str | None:
    """What the search can resume from once it is mended; None: an error of ftray itself."""
    from ftray.evaluation.user_metric import UserMetricError
    from ftray.search.failures import SearchBroken
    from ftray.search.run_manifest import is_full

    if is_full(output, error):
        return f"output {output}: its disk is full: make room, then"
    if isinstance(error, SearchBroken):
        return f"{error};"
    if isinstance(error, UserMetricError):  # of the proof
        return f"{getattr(error, 'cause', error)};"
    said = output.why_unreachable(error)
    return said and f"{output}: {said};"


def drive(
    cfg: Config, space: "Space", model_path: str, tokenizer: "PreTrainedTokenizerBase", output: Location
) -> str | None:
    """Search, prove and merge, as :func:`check` found it to be possible.

    Returns:
        Why there is no best trial; None: there is one.

    Raises:
        SearchBroken: see :func:`ftray.search.driver.search`.
    """
    from ftray.data.splits import find_sources
    from ftray.runtime.cluster import gpus_per_worker
    from ftray.search.driver import is_prepared_here, search
    from ftray.training.run_spec import check_workers

    started, gpus = time.monotonic(), gpus_per_worker(cfg)
    check_workers(cfg.training, cfg.scaling.workers, gpus)
    sources = find_sources(cfg.data)
    prepare = partial(prepare_search, cfg, space, model_path, tokenizer, output, gpus, sources)
    with search(cfg, space, output, gpus, prepare, is_prepared_here(cfg, sources)) as (context, hardware):
        failure = conclude(context, hardware, tokenizer, output, started)
        hardware.end()
        leave_report(output)
    return failure


def conclude(
    context: "SearchContext",
    hardware: "Hardware",
    tokenizer: "PreTrainedTokenizerBase",
    output: Location,
    started: float,
) -> str | None:
    """Choose among the finalists, prove the best and merge it.

    Args:
        started: when the search began, by `time.monotonic`.

    Returns:
        As :func:`drive`.
    """
    from ftray.search.cohorts import BASELINE_TRIAL
    from ftray.search.finalists import choose_finalist, final_runs, verdict
    from ftray.search.goals import front
    from ftray.search.live import CHOOSING, MERGING, PROVING, note
    from ftray.search.model_card import model_card
    from ftray.search.reliability import reliability
    from ftray.search.results import (
        ANSWERS,
        EXPERIMENT,
        all_rows,
        write_curves,
        write_json,
        write_leaderboard,
        write_lines,
    )
    from ftray.search.starting_point import described as start_of

    cfg = context.config
    note(output, CHOOSING)
    known = all_rows(cfg, output)
    rows, further = ([row for row in known if (row["seed_of"] is None) is own] for own in (True, False))
    choice = None
    if candidates := final_runs(rows, further, cfg):
        choice = hardware.run(choose_finalist, context, candidates, reads_base=True)
        rows.sort(key=lambda row: row["trial"] != choice["winner"])
        print("\n".join(verdict(choice, cfg.search.goal.metric)), flush=True)
    best = save_best(cfg, rows, tokenizer, output)
    write_leaderboard(rows, output / "leaderboard.csv", cfg)
    write_curves(known, output / EXPERIMENT, output / "curves.parquet")
    summary: dict[str, Any] = {
        "metric": cfg.search.goal.metric,
        "direction": cfg.search.goal.direction,
        "goals": [asdict(goal) for goal in cfg.search.goals],
        "front": [row["trial"] for row in front(rows, cfg)],
        "rule": cfg.search.best or (KNEE if len(cfg.search.goals) > 1 else None),
        "best": best,
        "start": start_of(cfg),
        "base": None,
        "proof": None,
        "rungs": reliability(rows, context.rungs(), cfg),
        "finalists": choice,
        "trials": rows,
        "further_runs": further,
        "tokens": sum(r["tokens"] for r in known),
    }

    def keep_summary() -> None:
        summary["seconds"] = time.monotonic() - started
        write_json(summary, output / "summary.json")

    keep_summary()
    if best is None:
        print_leaderboard(rows, cfg)
        if cfg.search.constraints and any(row["checkpoint"] for row in rows):
            return f"search.best {cfg.search.best}: no trial holds that; another with --resume"
        return "no trial gave a result: see the reasons above"
    default = next((row["checkpoint"] for row in rows if row["trial"] == BASELINE_TRIAL != best["trial"]), None)
    chosen_of = max(1, len(candidates))
    note(output, PROVING)
    proof = hardware.run(prove, context, output.absolute(), default, chosen_of, reads_base=True)
    write_lines(proof.pop("answers"), output / ANSWERS)
    proof["default_is_best"] = best["trial"] == BASELINE_TRIAL
    (output / "best" / "adapter" / "README.md").write_text(model_card(cfg, best, proof))
    summary |= {"proof": proof, "base": {name: metric["base"] for name, metric in proof["metrics"].items()}}
    keep_summary()  # whatever becomes of the merged model
    note(output, MERGING)
    proof["merged"] = merged_on(hardware, context, output)
    keep_summary()
    return None


def prepare_search(
    cfg: Config,
    space: "Space",
    model_path: str,
    tokenizer: "PreTrainedTokenizerBase",
    output: Location,
    gpus: float,
    sources: "Sources",
) -> "tuple[SearchContext, list[Callback]]":
    """Tokenize the data; returns what all trials of the search share, and who hears of their reports."""
    from ftray.data import prepare
    from ftray.data.limits import refuse_beyond
    from ftray.evaluation.user_metric import reward, user_metrics
    from ftray.models.load import load_skeleton
    from ftray.reports.data import describe, padding_share
    from ftray.search.driver_notes import DriverNotes
    from ftray.search.metrics import Metrics
    from ftray.search.progress import Progress
    from ftray.search.reference import with_reference
    from ftray.search.results import all_rows, say_damaged
    from ftray.search.run_manifest import write_data
    from ftray.search.signals import paired_training
    from ftray.search.starting_point import begin, find_start, labels_of
    from ftray.search.trackers import trackers
    from ftray.search.trial_worker import SearchContext

    start_at = find_start(cfg)
    code = cfg.model.trust_remote_code
    data = prepare(cfg.data, model_path, code, cfg.task, labels_of(start_at), sources=sources)
    model_path, start = begin(cfg, start_at, model_path, output)
    refuse_beyond(data, cfg.data, load_skeleton(cfg.model, model_path, data.task).model, tokenizer, most_added(space))
    write_data(cfg, space, model_path, data, output)
    say_damaged(output)
    print(describe(data))
    print(f"searching {space.source} ({', '.join(space.methods)})", flush=True)
    paired = None if start else paired_training(cfg, space, data)
    reference = with_reference(cfg, model_path, data, start).reference
    functions, learnt = user_metrics(cfg.search), reward(cfg.training)
    context = SearchContext(cfg, model_path, data.directory, gpus, paired, functions, reference, learnt, start)
    past = all_rows(cfg, output)
    notes = DriverNotes(cfg, output, context.budget(), past)
    progress = Progress(cfg, context.budget(), past, notes)
    return context, [notes, progress, Metrics(cfg, padding_share(data)), *trackers(cfg, output)]


def save_best(
    cfg: Config, rows: "list[TrialRow]", tokenizer: "PreTrainedTokenizerBase", output: Location
) -> "TrialRow | None":
    """Copy the adapter of the best trial whose checkpoint is whole to `best/adapter`; returns that trial's row.

    The best by `search.best`: see :func:`ftray.search.goals.preferred`.
    """
    from ftray.search.goals import preferred
    from ftray.search.model_card import model_card
    from ftray.search.results import save_best_adapter

    for row in preferred(rows, cfg):
        if row["checkpoint"]:
            try:
                card, directory = model_card(cfg, row, None), output / "best" / "adapter"
                save_best_adapter(str(row["checkpoint"]), card, tokenizer, directory)
                return row
            except UserError as error:  # the next best, then
                print(f"trial {row['trial']}: {error}", flush=True)
                row["checkpoint"] = None
    return None


def merged_on(hardware: "Hardware", context: "SearchContext", output: Location) -> dict[str, Any]:
    """What :func:`merge_best` returns; the `reason` if its process did not survive."""
    from ray.exceptions import RayError

    from ftray.search.failures import last_line

    try:
        # an attempt that ran out of memory would do so again, for ever
        return hardware.run(merge_best, context, output.absolute(), max_retries=0)
    except RayError as error:
        return {"reason": f"its process ended: {last_line(error)}"}


def exit_code(best: "TrialRow", merged: dict[str, Any]) -> int:
    """0, unless there is no merged model of a method that can be merged; then says why."""
    from ftray.adapters.methods import named

    if "path" in merged or named(AdapterConfig(**best["config"]["adapter"]))[1].merge_tolerance is None:
        return 0
    print(f"ftray tune: {merged['reason']}; the same command with --resume tries again", file=sys.stderr)
    return 1


def show_plan(cfg: Config) -> int:
    """What `--plan` prints: what is known before the probe, then what that has found."""
    from ftray.reports.data import describe
    from ftray.reports.plan import settings, show_estimate
    from ftray.search.estimate import estimate

    context, space = plan_context(cfg)
    print(settings(context.config))
    print(describe(context.tokenized), flush=True)
    show_estimate(estimate(context, space), console())
    return 0


def plan_context(cfg: Config) -> "tuple[SearchContext, Space]":
    """What the probe of a plan runs in, with the records tokenized; nothing is left in `output`."""
    from ftray.data import prepare
    from ftray.data.shards import NO_REFERENCE
    from ftray.evaluation.user_metric import reward
    from ftray.runtime.cluster import connect, gpus_per_worker
    from ftray.search.signals import paired_training
    from ftray.search.starting_point import find_start, labels_of
    from ftray.search.trial_worker import SearchContext
    from ftray.training.run_spec import check_workers

    cfg, space, model_path, _ = check(cfg)
    connect(cfg, dashboard=False)
    gpus = gpus_per_worker(cfg)
    check_workers(cfg.training, cfg.scaling.workers, gpus)
    data = prepare(cfg.data, model_path, cfg.model.trust_remote_code, cfg.task, labels_of(find_start(cfg)))
    paired, learnt = paired_training(cfg, space, data), reward(cfg.training)
    context = SearchContext(cfg, model_path, data.directory, gpus, paired, reference=NO_REFERENCE, reward=learnt)
    return context, space


def check(
    cfg: Config, begin: Callable[[Config], None] = lambda cfg: None
) -> tuple[Config, "Space", str, "PreTrainedTokenizerBase"]:
    """All that can be found wrong without Ray, weights or a GPU.

    Args:
        begin: called once nothing is wrong that is found in a moment: the model's classes take seconds to import.

    Returns:
        The configuration with the space's own model settings, the space, the model's directory and its tokenizer.
    """
    from ftray.data import DataCheck
    from ftray.data.splits import require
    from ftray.models.find import find
    from ftray.models.stored import as_stored
    from ftray.search.run_manifest import SEARCH, check_output, packable, refuse_occupied
    from ftray.search.space import load_space
    from ftray.search.starting_point import find_start, kept_space, labels_of, refuse_unfit, starts_at
    from ftray.search.trackers import check_trackers
    from ftray.tasks.infer_task import as_begun, infer_task, refuse_other_settings

    space, named = load_space(cfg.search.space), cfg.search.space
    cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update=space.model)})
    check_trackers(cfg)
    require("validation", cfg.data, "a search goes by records that are not trained on")
    require("test", cfg.data, "the proof needs records that the search never sees")
    start = find_start(cfg)
    model_path = start.base if start else find(cfg.model.name)
    is_given = "space" in cfg.search.model_fields_set
    cfg = as_begun(starts_at(cfg, start))
    data = DataCheck(cfg.data)
    cfg = cfg.model_copy(update={"model": as_stored(cfg.model, model_path)})
    output = parse_location(cfg.output)
    output.check_writable()
    refuse_occupied(output, SEARCH, cfg.resume)
    begin(cfg)

    cfg = infer_task(cfg, model_path, data.first)
    refuse_other_settings(cfg)
    space = space if cfg.search.space == named else load_space(cfg.search.space)
    if start and start.kept:
        space = kept_space(space, start, is_given)
    refuse_unknown_settings(cfg, space)
    packable(cfg, space)
    check_output(cfg, space)

    from ftray.adapters.compatibility import dry_run, refuse
    from ftray.data.limits import check_special_tokens, within_positions
    from ftray.evaluation.user_metric import check_reward, user_metrics
    from ftray.models.load import load_skeleton, load_tokenizer
    from ftray.search.warm_start import earlier_trials
    from ftray.training.run_spec import accumulation_steps, check_workers

    earlier_trials(cfg, space)
    tokenizer = load_tokenizer(model_path, cfg.model.trust_remote_code, cfg.data.chat_template)
    refuse_unfit(start, cfg, tokenizer)
    task = data.run(tokenizer, cfg.task, labels_of(start))
    for function in user_metrics(cfg.search):
        function.try_on(data.shown)
    check_reward(cfg, data.shown)
    skeleton = load_skeleton(cfg.model, model_path, task)
    check_special_tokens(cfg.model.name, skeleton.model, tokenizer)
    cfg = cfg.model_copy(update={"data": within_positions(cfg.data, skeleton.model, most_added(space), data.lengths)})
    tried: list[Any] = []
    for corner in [{"adapter": space.default, "training": {}}, *space.corners()]:
        adapter, settings = AdapterConfig(**corner["adapter"]), cfg.training.model_copy(update=corner["training"])
        if adapter in tried:  # corners may differ in their training settings alone: PEFT knows the adapter already
            refuse(adapter, cfg.model, settings)
        else:
            dry_run(adapter, skeleton, cfg.model, settings)
            tried.append(adapter)
        accumulation_steps(settings, cfg.scaling.workers)
        check_workers(settings, cfg.scaling.workers)
    return cfg, space, model_path, tokenizer


def refuse_unknown_settings(cfg: Config, space: "Space") -> None:
    """Refuse a space that holds a setting of other objectives than that of `cfg`.

    Raises:
        UserError: names the setting.
    """
    from ftray.task_spec import TaskSpec

    objective = TaskSpec.named(cfg.task).load().objective
    for corner in space.corners():
        try:
            objective(cfg.training.model_copy(update=corner["training"]))
        except UserError as error:
            raise UserError(f"{space.source}: {str(error).removeprefix('training.')}") from None


def most_added(space: "Space") -> int:
    """The most tokens that an adapter of the space puts before a record."""
    from ftray.adapters.methods import added_tokens

    return max(added_tokens(AdapterConfig(**corner["adapter"])) for corner in space.corners())


def prove(
    context: "SearchContext",
    output: Location,
    default: str | None = None,
    candidates: int = 1,
    base: "LoadedModel | None" = None,
) -> dict[str, Any]:
    """Score base, default and best adapter on the test split; runs where the hardware is.

    The base is what training started from, see :mod:`ftray.search.starting_point`.

    Args:
        default: the checkpoint of the default configuration; None: there is none, or it is the best itself.
        candidates: of which the best was chosen in the end: the intervals allow for it.
        base: the model, where it is in memory; it stays as it is.

    Returns:
        `metrics` (see :func:`ftray.evaluation.metrics.compare`), `over_default` (the same, of the default configuration
        in the place of the base; None where there is no `default`), of a mixture the loss by `sources`, of preferences
        the `lengths` of answers (see :func:`ftray.evaluation.metrics.lengths`), `new_modules` that the base came
        without, `samples` of generated text, `answers` (see :func:`ftray.evaluation.answers.side_by_side`), and
        `merged`, for the time being with the `reason` that it comes later.
    """
    from ftray.evaluation.answers import UNDESIRABLE, side_by_side
    from ftray.evaluation.metrics import compare, compare_sources, lengths
    from ftray.models.load import load_on_device, load_tokenizer
    from ftray.search.finalists import adapted, untrained

    cfg = context.config
    data = context.tokenized
    base, usual = base or load_on_device(cfg.model, context.model_path, data.task), None
    tokenizer = load_tokenizer(context.model_path, cfg.model.trust_remote_code, cfg.data.chat_template)
    rows = data.rows("test", cfg.evaluation.records or PROOF_RECORDS)
    start = untrained(context, base.model)
    rows = data.task.load().compared_with(start, rows, cfg.evaluation)
    before = context.score(start, tokenizer, rows)
    if default:
        usual = context.score(adapted(base.model, parse_location(default) / "adapter"), tokenizer, rows)
    model = adapted(base.model, output / "best" / "adapter")
    after = context.score(model, tokenizer, rows)
    resamples = cfg.evaluation.bootstrap
    samples = [
        {k: row[k] for k in ("prompt", "target", UNDESIRABLE) if k in row} | {"base": b, "best": a}
        for row, b, a in zip(rows, before.generated, after.generated, strict=False)
    ]
    return {
        "records": len(rows),
        "new_modules": list(base.new_modules),
        "merged": {"reason": "not made yet"},
        "candidates": candidates,
        "metrics": compare(before, after, resamples, candidates=candidates),
        "over_default": usual and compare(usual, after, resamples, candidates=candidates),
        "sources": compare_sources([row.get("source") for row in rows], before, after, resamples, candidates),
        "lengths": lengths({"base": before, "default": usual, "best": after}, resamples),
        "samples": samples[: cfg.evaluation.samples],
        "answers": side_by_side(rows, {"base": before, "default": usual, "best": after}),
    }


def merge_best(context: "SearchContext", output: Location) -> dict[str, Any]:
    """Write the merged model, compared with the adapter on test records; runs where the hardware is.

    Returns:
        Its `path`, what :func:`ftray.adapters.merge.save_merged` says of it, and, where the base was quantised and it
        is not, its own `loss`; or the `reason` why there is none.
    """
    from ftray.adapters.merge import save_merged
    from ftray.models.load import load_on_device, load_tokenizer

    cfg = context.config
    data, place = context.tokenized, output / "best" / "merged"
    rows = data.rows("test", cfg.evaluation.records or PROOF_RECORDS)
    merged: dict[str, Any] = {"path": str(place)}
    try:
        with (output / "best" / "adapter").as_local_dir() as adapter:
            records = [row["input_ids"] for row in rows]
            merged |= save_merged(cfg.model, context.model_path, adapter, place, data.task, records)
        if cfg.model.quantization != "none":
            with place.as_local_dir() as made:
                unquantized = cfg.model.model_copy(update={"quantization": "none"})
                whole = load_on_device(unquantized, str(made), data.task).model
            quick = cfg.evaluation.model_copy(update={"generate": False})
            tokenizer = load_tokenizer(context.model_path, cfg.model.trust_remote_code, cfg.data.chat_template)
            values = data.task.load().score(whole, tokenizer, rows, quick).values()
            merged |= {"loss": values["loss"]} if "loss" in values else {}
    except Exception as error:  # whatever it is, the search and its proof stand
        place.remove()  # one of another best, from before
        return {
            "reason": str(error) if isinstance(error, UserError) else f"merge: {type(error).__name__}: {reason(error)}"
        }
    return merged


if __name__ == "__main__":
    sys.exit(run_command("tune"))
