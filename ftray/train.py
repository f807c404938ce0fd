"""Train one adapter."""

import sys
from pathlib import Path
from typing import Any

from ftray.cli import run_command
from ftray.config import Config
from ftray.storage.location import Location, parse_location


def run(cfg: Config) -> int:
    """The command: leaves `adapter/` and `config.yaml` in `output`; `--resume` goes on from the last checkpoint.

    What goes on is what began: other settings, data or another base than in `config.yaml` are refused.

    Raises:
        UserError: anything the user can mend, before Ray starts.
    """
    from ftray.runtime.cluster import check_address, quiet

    if not cfg.verbose:
        quiet()
    from ftray.models.find import find
    from ftray.models.stored import as_stored
    from ftray.tasks.infer_task import infer_task

    model_path = find(cfg.model.name)
    cfg = infer_task(cfg.model_copy(update={"model": as_stored(cfg.model, model_path)}), model_path)

    # these take seconds to import: a name misspelt has been found by now
    from ftray.adapters.compatibility import dry_run
    from ftray.data import check
    from ftray.models.load import load_skeleton, load_tokenizer
    from ftray.search.run_manifest import RUN, check_output, sole_driver, write_definition
    from ftray.training.run_spec import accumulation_steps

    check_output(cfg, None)
    tokenizer = load_tokenizer(model_path, cfg.model.trust_remote_code, cfg.data.chat_template)
    task = check(cfg.data, tokenizer, cfg.task)
    dry_run(cfg.adapter, load_skeleton(cfg.model, model_path, task), cfg.model, cfg.training)
    accumulation_steps(cfg.training, cfg.scaling.workers)
    # no rungs here: validations are spaced evenly
    cfg = cfg.model_copy(update={"search": cfg.search.model_copy(update={"scheduler": "none"})})
    check_address(cfg)
    output = parse_location(cfg.output)
    with sole_driver(output, RUN):
        write_definition(cfg, None, output)
        return drive(cfg, model_path, tokenizer, output)


def drive(cfg: Config, model_path: str, tokenizer: Any, output: Location) -> int:
    """Train as :func:`run` found it to be possible; returns the exit code."""
    from ray.train import TrainingFailedError

    from ftray.data import prepare
    from ftray.reports.data import describe
    from ftray.runtime.cluster import connect, end_with_ray, gpus_per_worker
    from ftray.runtime.preemption import ending_on_sigterm, notice
    from ftray.search.progress import last_line
    from ftray.search.results import save_best_adapter
    from ftray.search.run_manifest import write_data
    from ftray.search.trial_worker import CUT_OFF, SearchContext, trainer

    connect(cfg)
    end_with_ray("train")
    data = prepare(cfg.data, model_path, cfg.model.trust_remote_code, cfg.task)
    write_data(cfg, None, model_path, data, output)
    print(describe(data), flush=True)
    job = SearchContext(cfg, model_path, data.directory, gpus_per_worker(cfg))
    try:
        with ending_on_sigterm(), notice():
            cut_off = True
            while cut_off:
                result = trainer(job, job.run(cfg.adapter.model_dump(), {}), "train", output).fit()
                cut_off = result.return_value[CUT_OFF]
        failure = result.return_value["failure"]
    except TrainingFailedError as error:
        failure = last_line(error)
    if failure:
        print(f"ftray train: failed: {failure}", file=sys.stderr)
        return 1
    metric, sign = cfg.search.metric, 1 if cfg.search.direction == "min" else -1
    for report in result.return_value["reports"]:
        shown = [f"{name} {report[name]:.4f}" for name in dict.fromkeys(["train_loss", "validation_loss", metric])]
        print(f"step {report['step']}: {', '.join(shown)}, {report['tokens_per_second']:.0f} tokens/s")
    reported = [pair for pair in result.best_checkpoints if metric in pair[1]]
    best, _ = min(reported, key=lambda pair: sign * pair[1][metric])
    save_best_adapter(str(output / "train" / Path(best.path).name), "", tokenizer, output / "adapter")
    print(f"adapter {output / 'adapter'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("train"))
