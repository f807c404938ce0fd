"""Train one adapter."""

import sys
from pathlib import Path

from ftray.cli import run_command
from ftray.config import Config
from ftray.errors import UserError
from ftray.storage.location import Stored, parse_location, refuse_unreachable


def run(cfg: Config) -> int:
    """The command: leaves `adapter/` and `config.yaml` in `output`; `--resume` goes on from the last checkpoint.

    Raises:
        UserError: anything the user can mend, before Ray starts.
    """
    from ftray.runtime.cluster import check_address, connect, end_with_ray, gpus_per_worker, quiet

    if not cfg.verbose:
        quiet()
    from ftray.models.find import find
    from ftray.tasks.infer_task import infer_task

    output = parse_location(cfg.output)
    if isinstance(output, Stored):
        refuse_unreachable(output)
    if (output / "train").exists() and not cfg.resume:
        raise UserError(f"output {output} already holds a run: add --resume to go on, or name another")
    model_path = find(cfg.model.name)
    cfg = infer_task(cfg, model_path)

    # these take seconds to import: a name misspelt has been found by now
    from ftray.adapters.compatibility import dry_run
    from ftray.data import check, prepare
    from ftray.models.load import load_skeleton, load_tokenizer
    from ftray.training.run_spec import accumulation_steps

    tokenizer = load_tokenizer(model_path, cfg.model.trust_remote_code)
    task = check(cfg.data, tokenizer, cfg.task)
    dry_run(cfg.adapter, load_skeleton(cfg.model, model_path, task), cfg.model, cfg.training)
    accumulation_steps(cfg.training, cfg.scaling.workers)

    from ray.train import TrainingFailedError

    from ftray.runtime.preemption import ending_on_sigterm, notice
    from ftray.search.progress import last_line
    from ftray.search.results import save_best_adapter, write_config
    from ftray.search.trial_worker import CUT_OFF, SearchContext, trainer

    # no rungs here: validations are spaced evenly
    cfg = cfg.model_copy(update={"search": cfg.search.model_copy(update={"scheduler": "none"})})
    check_address(cfg)
    write_config(cfg, output)
    connect(cfg)
    end_with_ray("train")
    data = prepare(cfg.data, model_path, cfg.model.trust_remote_code, cfg.task)
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
