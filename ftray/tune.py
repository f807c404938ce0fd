"""Search for the best adapter, prove it against the base model and merge it."""

import sys
import time
from pathlib import Path
from typing import Any

from ftray.cli import run_command
from ftray.config import AdapterConfig, Config
from ftray.errors import UserError
from ftray.reports.search import console, print_leaderboard, show
from ftray.storage.location import Location, Stored, as_local_dir, parse_location, reason, remove

PROOF_RECORDS = 1000  # base and best each generate an answer to all of them; the interval says what so many can tell


def run(cfg: Config) -> int:
    """The command, from first check to last line; the README lists what it leaves in `output`.

    A best adapter that can't be merged leaves its proof, the reason in `summary.json` and exit code 1, but for methods
    that are not there to be merged.

    With `--plan`, only what that would come to.

    Raises:
        UserError: anything the user can mend, before Ray starts.
    """
    from ftray.runtime.cluster import quiet

    if not cfg.verbose:
        quiet()
    cfg, space, model_path, tokenizer = check(cfg)
    if cfg.plan:
        return show_plan(cfg, space, model_path)
    from ftray.runtime.cluster import check_address, connect, end_with_ray
    from ftray.runtime.preemption import ending_on_sigterm
    from ftray.search.broker import SearchBroken
    from ftray.search.jobs import announce
    from ftray.search.results import JOURNAL
    from ftray.search.run_manifest import is_full, sole_driver, write_definition
    from ftray.search.sampler import mend

    check_address(cfg)
    output = parse_location(cfg.output)
    try:
        with sole_driver(output):
            if isinstance(output, Path):
                mend(output / JOURNAL)
            write_definition(cfg, space, output)
            announce(output)
            connect(cfg)
            end_with_ray("tune")
            with ending_on_sigterm():
                return drive(cfg, space, model_path, tokenizer, output)
    except UserError:
        raise
    except Exception as error:
        if is_full(output, error):
            why = f"output {output}: its disk is full: make room, then"
        elif isinstance(error, SearchBroken):
            why = f"{error};"
        elif isinstance(output, Stored) and isinstance(error, OSError):
            why = f"{output}: {reason(error)};"
        else:
            raise
        print(f"ftray tune: {why} the same command with --resume goes on", file=sys.stderr)
        return 1


def drive(cfg: Config, space: Any, model_path: str, tokenizer: Any, output: Location) -> int:
    """Search, prove and merge, as :func:`check` found it to be possible; returns the exit code.

    Raises:
        SearchBroken: see :func:`ftray.search.driver.search`.
    """
    from ray.exceptions import RayError

    from ftray.adapters.methods import METHODS
    from ftray.data import prepare
    from ftray.reports.data import describe, padding_share
    from ftray.runtime.cluster import gpus_per_worker, on_hardware
    from ftray.search.driver import search
    from ftray.search.metrics import Metrics
    from ftray.search.progress import Progress, last_line
    from ftray.search.results import (
        model_card,
        save_best_adapter,
        say_damaged,
        trial_rows,
        write_json,
        write_leaderboard,
    )
    from ftray.search.run_manifest import write_data
    from ftray.search.trackers import trackers
    from ftray.search.trial_worker import SearchContext

    started = time.monotonic()
    data = prepare(cfg.data, model_path, cfg.model.trust_remote_code, cfg.task)
    write_data(cfg, space, model_path, data, output)
    say_damaged(output)
    print(describe(data))
    print(f"searching {space.source} ({', '.join(space.methods)})", flush=True)
    job = SearchContext(cfg, model_path, data.directory, gpus_per_worker(cfg))
    budget = job.budget()
    past = trial_rows(cfg, output)
    progress = Progress(cfg.search.trials, budget, cfg.search.metric, cfg.search.direction, past)
    search(job, space, output, [progress, Metrics(cfg, padding_share(data)), *trackers(cfg, output)])

    rows = trial_rows(cfg, output)
    best = None
    while best is None and (best := next((r for r in rows if r["checkpoint"]), None)):
        try:
            save_best_adapter(best["checkpoint"], model_card(cfg, best, None), tokenizer, output / "best" / "adapter")
        except UserError as error:  # the next best, then
            print(f"trial {best['trial']}: {error}", flush=True)
            best["checkpoint"], best = None, None
    write_leaderboard(rows, output / "leaderboard.csv", cfg.search.metric)
    summary: dict[str, Any] = {
        "metric": cfg.search.metric,
        "direction": cfg.search.direction,
        "best": best,
        "base": None,
        "proof": None,
        "trials": rows,
        "tokens": sum(r["tokens"] for r in rows),
        "seconds": time.monotonic() - started,
    }
    write_json(summary, output / "summary.json")
    if best is None:
        print_leaderboard(rows, cfg)
        print("no trial gave a result: see the reasons above", file=sys.stderr)
        return 1
    where = output.absolute() if isinstance(output, Path) else output
    proof = _awaited(on_hardware(cfg, prove, job, where))
    summary |= {
        "proof": proof,
        "base": {name: metric["base"] for name, metric in proof["metrics"].items()},
        "seconds": time.monotonic() - started,
    }
    (output / "best" / "adapter" / "README.md").write_text(model_card(cfg, best, proof))
    write_json(summary, output / "summary.json")  # whatever becomes of the merged model
    try:
        # an attempt that ran out of memory would do so again, for ever
        proof["merged"] = _awaited(on_hardware(cfg, merge_best, job, where, max_retries=0))
    except RayError as error:
        proof["merged"] = {"reason": f"its process ended: {last_line(error)}"}
    summary["seconds"] = time.monotonic() - started
    write_json(summary, output / "summary.json")
    show(rows, proof, cfg, output)
    if "path" in proof["merged"] or METHODS[best["config"]["adapter"]["method"]].merge_tolerance is None:
        return 0
    print(f"ftray tune: {proof['merged']['reason']}; the same command with --resume tries again", file=sys.stderr)
    return 1


def _awaited(task: Any) -> Any:
    """What a task on the hardware returns."""
    import ray

    from ftray.search.trial_worker import release

    while not ray.wait([task], timeout=1)[0]:
        release(everything=True)  # trials that were stopped a moment ago
    return ray.get(task)


def show_plan(cfg: Config, space: Any, model_path: str) -> int:
    """What `--plan` prints; nothing is left in `output`."""
    import json

    import yaml

    from ftray.data import prepare
    from ftray.reports.data import describe
    from ftray.runtime.cluster import connect, gpus_per_worker
    from ftray.search.estimate import estimate
    from ftray.search.estimate import show as show_estimates
    from ftray.search.trial_worker import SearchContext

    connect(cfg)
    data = prepare(cfg.data, model_path, cfg.model.trust_remote_code, cfg.task)
    print(yaml.safe_dump(cfg.model_dump(exclude={"resume", "plan", "verbose"}), sort_keys=False))
    print(describe(data), flush=True)
    result = estimate(SearchContext(cfg, model_path, data.directory, gpus_per_worker(cfg)), space)
    show_estimates(result, console())
    print(f"plan     {json.dumps(result)}")
    return 0


def check(cfg: Config) -> tuple[Config, Any, str, Any]:
    """All that can be found wrong without Ray, weights or a GPU.

    Returns:
        The configuration with the space's own model settings, the space, the model's directory and its tokenizer.
    """
    from ftray.models.find import find
    from ftray.models.stored import as_stored
    from ftray.search.space import load_space
    from ftray.search.trackers import check_trackers
    from ftray.tasks.infer_task import infer_task

    space = load_space(cfg.search.space)
    cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update=space.model)})
    check_trackers(cfg)
    model_path = find(cfg.model.name)
    cfg = infer_task(cfg.model_copy(update={"model": as_stored(cfg.model, model_path)}), model_path)

    # these take seconds to import: a name misspelt has been found by now
    from ftray.adapters.compatibility import dry_run, refuse
    from ftray.data import check as check_data
    from ftray.models.load import load_skeleton, load_tokenizer
    from ftray.search.run_manifest import check_output, packable
    from ftray.search.sampler import BASELINE
    from ftray.training.run_spec import accumulation_steps

    packable(cfg, space)
    check_output(cfg, space)
    tokenizer = load_tokenizer(model_path, cfg.model.trust_remote_code, cfg.data.chat_template)
    task = check_data(cfg.data, tokenizer, cfg.task)
    skeleton = load_skeleton(cfg.model, model_path, task)
    tried: list[Any] = []
    for corner in [{"adapter": BASELINE, "training": {}}, *space.corners()]:
        adapter, settings = AdapterConfig(**corner["adapter"]), cfg.training.model_copy(update=corner["training"])
        if adapter in tried:  # corners may differ in their training settings alone: PEFT knows the adapter already
            refuse(adapter, cfg.model, settings)
        else:
            dry_run(adapter, skeleton, cfg.model, settings)
            tried.append(adapter)
        accumulation_steps(settings, cfg.scaling.workers)
    return cfg, space, model_path, tokenizer


def prove(job: Any, output: Location) -> dict[str, Any]:
    """Score base and best adapter on the test split; runs where the hardware is.

    Returns:
        `metrics` (see :func:`ftray.evaluation.metrics.compare`), `new_modules` that the base came without, `samples` of
        generated text, and `merged`, for the time being with the `reason` that it comes later.
    """
    from peft import PeftModel

    from ftray.data import TokenizedData
    from ftray.evaluation.metrics import compare
    from ftray.models.load import load_on_device, load_tokenizer

    cfg: Config = job.config
    data = TokenizedData.load(job.data)
    task, base = data.task.load(), load_on_device(cfg.model, job.model_path, data.task)
    with as_local_dir(output / "best" / "adapter") as adapter:
        model = PeftModel.from_pretrained(base, str(adapter))
    tokenizer = load_tokenizer(job.model_path, cfg.model.trust_remote_code, cfg.data.chat_template)
    rows = data.rows("test", cfg.evaluation.records or PROOF_RECORDS)
    with model.disable_adapter():
        before = task.score(model, tokenizer, rows, cfg.evaluation)
    after = task.score(model, tokenizer, rows, cfg.evaluation)
    samples = [
        {"prompt": row["prompt"], "target": row["target"], "base": b, "best": a}
        for row, b, a in zip(rows, before.generated, after.generated, strict=False)
    ]
    return {
        "records": len(rows),
        "new_modules": base.new_modules,
        "merged": {"reason": "not made yet"},
        "metrics": compare(before, after, cfg.evaluation.bootstrap),
        "samples": samples[: cfg.evaluation.samples],
    }


def merge_best(job: Any, output: Location) -> dict[str, Any]:
    """Write the merged model, compared with the adapter on test records; runs where the hardware is.

    Returns:
        Its `path`, what :func:`ftray.adapters.merge.save_merged` says of it, and, where the base was quantised and it
        is not, its own `loss`; or the `reason` why there is none.
    """
    from ftray.adapters.merge import save_merged
    from ftray.data import TokenizedData
    from ftray.models.load import load_on_device, load_tokenizer

    cfg: Config = job.config
    data, place = TokenizedData.load(job.data), output / "best" / "merged"
    rows = data.rows("test", cfg.evaluation.records or PROOF_RECORDS)
    merged: dict[str, Any] = {"path": str(place)}
    try:
        with as_local_dir(output / "best" / "adapter") as adapter:
            records = [row["input_ids"] for row in rows]
            merged |= save_merged(cfg.model, job.model_path, adapter, place, data.task, records)
        if cfg.model.quantization != "none":
            with as_local_dir(place) as made:
                whole = load_on_device(cfg.model.model_copy(update={"quantization": "none"}), str(made), data.task)
            quick = cfg.evaluation.model_copy(update={"generate": False})
            tokenizer = load_tokenizer(job.model_path, cfg.model.trust_remote_code, cfg.data.chat_template)
            merged["loss"] = data.task.load().score(whole, tokenizer, rows, quick).values()["loss"]
    except Exception as error:  # whatever it is, the search and its proof stand
        remove(place)  # one of another best, from before
        return {
            "reason": str(error) if isinstance(error, UserError) else f"merge: {type(error).__name__}: {reason(error)}"
        }
    return merged


if __name__ == "__main__":
    sys.exit(run_command("tune"))
