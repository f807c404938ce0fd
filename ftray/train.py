"""Train one adapter."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftray.arguments import Data, Metric, Settings, StrPath, command, config_of
from ftray.cli import run_command
from ftray.config import Config, SearchConfig
from ftray.errors import RunFailed
from ftray.reports.page import leave_report
from ftray.storage.location import Location, parse_location

if TYPE_CHECKING:
    from ray.train import Result
    from transformers import PreTrainedTokenizerBase

    from ftray.reports.result import TrainResult
    from ftray.search.trial_worker import SearchContext


@command
def train(
    data: "Data | None" = None,
    *,
    validation_data: "Data | None" = None,
    test_data: "Data | None" = None,
    model: StrPath | Settings | None = None,
    task: str | None = None,
    start: StrPath | Settings | None = None,
    stages: str | Sequence[str | Settings] | None = None,
    method: str | None = None,
    adapter: Settings | None = None,
    metric: Metric | None = None,
    direction: str | None = None,
    output: StrPath | None = None,
    resume: bool | None = None,
    training: Settings | None = None,
    scaling: Settings | None = None,
    search: Settings | None = None,
    evaluation: Settings | None = None,
    config: Config | StrPath | Settings | None = None,
    verbose: bool | None = None,
) -> "TrainResult":
    """Train one adapter.

    Args:
        data: records: a list of mappings, a frame, a data set or a path; or the section, with `source` one of these.
        model: directory, hub id or .gguf file; or the section.
        adapter: the method with its parameters, as `{"method": "lora", "rank": 8}`.
        metric: which checkpoint is the best: a name, or a function of records and answers; with `direction`.
        start: what training starts from: an adapter, or the result of an earlier call.
        resume: continue what is in `output`; start, if nothing is.
        config: YAML file or mapping of sections, over which the other arguments win.

    Others are the fields and sections of docs/configuration.md. Of several `stages`, the last one's result is returned.

    Raises:
        UserError: anything the user can mend, before Ray starts.
        RunFailed: it diverged, or its processes died too often; `resume=True` continues it.
    """
    return _train(config_of("train", locals()))


def _train(cfg: Config) -> "TrainResult":
    from ftray.reports.result import TrainResult

    if cfg.stages:
        from ftray.search.stages import last_output, run_stages

        def one(stage: Config) -> int:
            train(config=stage)
            return 0

        run_stages(cfg, check, one, "adapter")
        return TrainResult(last_output(cfg))
    cfg, model_path, tokenizer = check(cfg)
    from ftray.runtime.cluster import check_address
    from ftray.search.run_manifest import RUN, sole_driver, write_definition

    check_address(cfg)
    output = parse_location(cfg.output)
    with sole_driver(output, RUN):
        write_definition(cfg, None, output)
        drive(cfg, model_path, tokenizer, output)
    return TrainResult(output)


def run(cfg: Config) -> int:
    """The command: leaves `adapter/`, `config.yaml` and `report.html` in `output`; `--resume` continues from the last
    checkpoint.

    What continues is what began: other settings, data or another base than in `config.yaml` are refused. With
    `--stages`, a run each, in directories of `output`.

    Raises:
        UserError: anything the user can mend, before Ray starts.
    """
    if cfg.stages:
        from ftray.search.stages import run_stages

        return run_stages(cfg, check, run, "adapter")
    try:
        result = train(config=cfg)
    except RunFailed as failure:
        raise RunFailed(f"failed: {failure}") from None
    print_reports(result.trained["reports"], result.trained["metric"])
    print(f"adapter {result.adapter}")
    return 0


def check(cfg: Config) -> tuple[Config, str, "PreTrainedTokenizerBase"]:
    """All that can be found wrong without Ray, weights or a GPU.

    Returns:
        The configuration as it will run, the model's directory and its tokenizer.
    """
    from ftray.data import DataCheck
    from ftray.data.splits import require
    from ftray.models.find import find
    from ftray.models.stored import as_stored
    from ftray.search.run_manifest import RUN, refuse_held
    from ftray.search.starting_point import find_start, labels_of, refuse_unfit, starts_at, with_kept
    from ftray.tasks.infer_task import as_begun, infer_task, refuse_other_settings

    require("validation", cfg.data, "which checkpoint is the best is decided by records that are not trained on")
    output = parse_location(cfg.output)
    output.check_writable()
    refuse_held(output, RUN)
    start = find_start(cfg)
    model_path = start.base if start else find(cfg.model.name)
    cfg = as_begun(with_kept(starts_at(cfg, start), start))
    data = DataCheck(cfg.data)
    cfg = infer_task(cfg.model_copy(update={"model": as_stored(cfg.model, model_path)}), model_path, data.first)
    refuse_other_settings(cfg)

    # these take seconds to import: a name misspelt has been found by now
    from ftray.adapters.compatibility import dry_run
    from ftray.adapters.methods import added_tokens
    from ftray.data.limits import check_special_tokens, within_positions
    from ftray.evaluation.user_metric import check_reward, user_metrics
    from ftray.models.load import load_skeleton, load_tokenizer
    from ftray.search.run_manifest import check_output
    from ftray.training.run_spec import accumulation_steps, check_workers

    check_output(cfg, None)
    tokenizer = load_tokenizer(model_path, cfg.model.trust_remote_code, cfg.data.chat_template)
    refuse_unfit(start, cfg, tokenizer)
    task = data.run(tokenizer, cfg.task, labels_of(start))
    for function in user_metrics(cfg.search):
        function.try_on(data.shown)
    check_reward(cfg, data.shown)
    skeleton = load_skeleton(cfg.model, model_path, task)
    check_special_tokens(cfg.model.name, skeleton.model, tokenizer)
    settled = within_positions(cfg.data, skeleton.model, added_tokens(cfg.adapter), data.lengths)
    cfg = cfg.model_copy(update={"data": settled})
    dry_run(cfg.adapter, skeleton, cfg.model, cfg.training)
    accumulation_steps(cfg.training, cfg.scaling.workers)
    check_workers(cfg.training, cfg.scaling.workers)
    # no rungs here: validations are spaced evenly
    return cfg.model_copy(update={"search": cfg.search.model_copy(update={"scheduler": "none"})}), model_path, tokenizer


def drive(cfg: Config, model_path: str, tokenizer: "PreTrainedTokenizerBase", output: Location) -> None:
    """Train as :func:`check` found it to be possible, and save the best checkpoint's adapter.

    Raises:
        RunFailed: see :func:`fit`.
    """
    from ftray.adapters.methods import added_tokens
    from ftray.data import prepare
    from ftray.data.limits import refuse_beyond
    from ftray.evaluation.user_metric import reward, user_metrics
    from ftray.models.load import load_skeleton
    from ftray.reports.data import describe
    from ftray.runtime.cluster import connect, ends_with_ray, gpus_per_worker, say_if_waiting
    from ftray.search.reference import with_reference
    from ftray.search.results import TRAINED, save_best_adapter, write_json
    from ftray.search.run_manifest import write_data
    from ftray.search.starting_point import begin, find_start, labels_of
    from ftray.search.trial_worker import SearchContext
    from ftray.training.run_spec import check_workers

    connect(cfg)
    gpus = gpus_per_worker(cfg)
    check_workers(cfg.training, cfg.scaling.workers, gpus)
    start_at = find_start(cfg)
    data = prepare(cfg.data, model_path, cfg.model.trust_remote_code, cfg.task, labels_of(start_at))
    model_path, start = begin(cfg, start_at, model_path, output)
    skeleton = load_skeleton(cfg.model, model_path, data.task).model
    refuse_beyond(data, cfg.data, skeleton, tokenizer, added_tokens(cfg.adapter))
    write_data(cfg, None, model_path, data, output)
    print(describe(data), flush=True)
    say_if_waiting(cfg.scaling.workers, {"CPU": cfg.scaling.cpus_per_worker or 1, "GPU": gpus})
    reference = with_reference(cfg, model_path, data, start).reference
    functions, learnt = user_metrics(cfg.search), reward(cfg.training)
    context = SearchContext(cfg, model_path, data.directory, gpus, None, functions, reference, learnt, start)
    with ends_with_ray("train"):
        result = fit(context, output)
    reports, goal = result.return_value["reports"], cfg.search.goal
    write_json({"metric": goal.metric, "direction": goal.direction, "reports": reports}, output / TRAINED)
    best = output / "train" / best_checkpoint(result, cfg.search)
    save_best_adapter(str(best), "", tokenizer, output / "adapter")
    leave_report(output)


def fit(context: "SearchContext", output: Location) -> "Result":
    """Train to the last step; where a node that goes away cuts training off, it resumes on another.

    Raises:
        RunFailed: it can't be finished; the message says why.
    """
    from ray.train import TrainingFailedError

    from ftray.runtime.preemption import ending_on_sigterm, notice
    from ftray.search.failures import last_line
    from ftray.search.trial_worker import CUT_OFF, trainer

    run = context.run(context.config.adapter.model_dump(), {}, context.start or None)
    try:
        with ending_on_sigterm(), notice():
            result = trainer(context, run, "train", output).fit()
            while result.return_value[CUT_OFF]:
                result = trainer(context, run, "train", output).fit()
    except TrainingFailedError as error:
        raise RunFailed(last_line(error)) from None
    if failure := result.return_value["failure"]:
        raise RunFailed(failure)
    return result


def print_reports(reports: list[dict[str, Any]], metric: str) -> None:
    """One line a validation."""
    names = dict.fromkeys(["train_loss", "train_reward", "kl", "answer_tokens", "validation_loss", metric])
    for report in reports:
        shown = [f"{name} {report[name]:.4f}" for name in names if name in report]
        print(f"step {report['step']}: {', '.join(shown)}, {report['tokens_per_second']:.0f} tokens/s")


def best_checkpoint(result: "Result", search: SearchConfig) -> str:
    """The directory name of the checkpoint with the best metric."""
    reported = [pair for pair in result.best_checkpoints if search.goal.metric in pair[1]]
    best, _ = min(reported, key=lambda pair: search.goal.sign * pair[1][search.goal.metric])
    return Path(best.path).name


if __name__ == "__main__":
    sys.exit(run_command("train"))
