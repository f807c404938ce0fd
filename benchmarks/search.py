"""A search of 16 trials on the demo data, beside the usual script: Ray Tune with a TorchTrainer and a Trainer a trial.

    python -m benchmarks.search [--quick]              # every trial to its end: wall-clock at equal budgets
    python -m benchmarks.search --to-loss [--quick]    # as users run both: wall-clock to the usual script's median best

Each run is a process of its own, timed from start to exit: Python, Ray, every trial. Both sides draw from the same
space with Optuna, train on the same tokenized records in the same precision and may use all of the machine.
The usual script has as many trials at once as are fastest for it: one a CPU.

With `--to-loss` the goal is the median, over the runs of the usual script, of its trials' best held-out loss. Ours
searches as it does by default, for at most four times as many trials, until one of its trials has a loss as good on all
held-out records. Each run draws its trials by a seed of its own. A run of the usual script that misses the goal counts
with all its time, as if it had reached it then.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import beside, busy, machine, parser, show, versions

SPACE = {
    "method": "lora",
    "learning_rate": {"log": [5e-4, 5e-3]},
    "lora": {
        "rank": {"choice": [8, 16, 32]},
        "alpha": {"times": "rank", "choice": [1, 2]},
        "dropout": {"float": [0.0, 0.05]},
        "target_modules": {"choice": ["attention", "mlp", "all-linear"]},
    },
}
GROUPS = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}
GROUPS["all-linear"] = GROUPS["attention"] + GROUPS["mlp"]
DATA = {"source": "cmudict", "limit": 500, "seed": 1}


def main() -> int:
    made = parser("search", __doc__)
    made.add_argument("--to-loss", action="store_true", help="time to the usual script's median best held-out loss")
    made.add_argument("--trials", type=int, default=16)
    made.add_argument("--steps", type=int, help="a trial's budget, of 8 records each (default: 48; quick: 4)")
    made.add_argument("--quick", action="store_true", help="a twelfth of the budget")
    made.add_argument("--side", choices=["ours", "peer"], help=argparse.SUPPRESS)
    made.add_argument("--runs", type=int, default=3, help="of each side")
    made.add_argument("--goal", type=float, help=argparse.SUPPRESS)
    made.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    made.add_argument("--output", help=argparse.SUPPRESS)
    made.add_argument("--cache", help=argparse.SUPPRESS)
    args = made.parse_args()
    args.steps = args.steps or (4 if args.quick else 48)
    if args.side:
        (run_ours if args.side == "ours" else run_peer)(args)
        return 0
    what = f"{args.trials} trials of {args.steps} steps of 8 records{beside(args.busy)}"
    print(f"{what} on {machine()} with {versions()}", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        prepare(cache, DATA["limit"])
        with busy(args.busy):
            return to_loss(args, cache) if args.to_loss else equal_budgets(args, cache)


def equal_budgets(args: argparse.Namespace, cache: str) -> int:
    """Both sides in turn, each trial to its end."""
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for turn in range(args.runs):
        for side in ("peer", "ours"):
            found[side].append(run(side, args.trials, args.steps, turn, None, cache))
    ours, theirs = (statistics.median(result["seconds"] for result in found[side]) for side in ("ours", "peer"))
    show("search", ours, theirs, theirs / ours, "s", best_losses(found), args.busy)
    return 0


def to_loss(args: argparse.Namespace, cache: str) -> int:
    """The usual script's runs, then ours to the median of their best losses; 1: one of ours did not get there."""
    peers = [run("peer", args.trials, args.steps, turn, None, cache) for turn in range(args.runs)]
    goal = statistics.median(result["best"] for result in peers)
    ours = [run("ours", args.trials, args.steps, turn, goal, cache) for turn in range(args.runs)]
    for result in ours:
        if result["best"] > goal:
            after = first_at(result, result["best"])
            print(f"{goal:.4f} was not reached; {result['best']:.4f} was, after {after:.1f} s", file=sys.stderr)
            return 1
    mine, theirs = (statistics.median(first_at(result, goal) for result in side) for side in (ours, peers))
    more: dict[str, Any] = {"goal": goal, "of_peers_reached": sum(result["best"] <= goal for result in peers)}
    more |= best_losses({"ours": ours, "peer": peers})
    show("search-to-loss", mine, theirs, theirs / mine, "s", more, args.busy)
    return 0


def best_losses(found: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """By side, the median of its runs' best losses."""
    return {f"{side}_best": statistics.median(result["best"] for result in results) for side, results in found.items()}


def first_at(result: dict[str, Any], loss: float) -> float:
    """Seconds after which a run had reached `loss`; if it never did, all that it took."""
    return next((at for at, value in result["curve"] if value <= loss), result["seconds"])


def run(side: str, trials: int, steps: int, seed: int, goal: float | None, cache: str) -> dict[str, Any]:
    """One process of one side; `seconds` of it all, `best` loss, and `curve` of (seconds since its start, loss)."""
    output = f"{cache}/{side}-{trials}x{steps}-{seed}"
    command = [sys.executable, "-m", "benchmarks.search", "--side", side, "--trials", str(trials)]
    command += ["--steps", str(steps), "--cache", cache, "--output", output, "--seed", str(seed)]
    command += [] if goal is None else ["--goal", repr(goal)]
    started = time.time()
    with open(f"{output}.log", "w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    seconds = time.time() - started
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{Path(f'{output}.log').read_text()[-4000:]}")
    curve = [(at - started, loss) for at, loss in json.loads(Path(f"{output}.json").read_text())]
    best = min(loss for _, loss in curve)
    print(f"  {side} {seconds:.1f} s, best held-out loss {best:.4f}", flush=True)
    return {"seconds": seconds, "best": best, "curve": curve}


def prepare(cache: str, limit: int) -> None:
    """Tokenize once, for both sides, in a process of its own."""
    flags = {"--data.source": DATA["source"], "--data.limit": limit, "--data.seed": DATA["seed"], "--data.cache": cache}
    arguments = [str(part) for pair in flags.items() for part in pair]
    command = [sys.executable, "-m", "ftray.preprocess", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def listener(heard: list[tuple[float, float]], goal: float | None = None) -> Any:
    """A Tune callback that notes when each held-out loss was reported, and ends the search with the first at `goal`."""
    from ray import tune

    class Listener(tune.Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            loss = result.get("validation_loss")
            if loss is None or "validated" in result:  # at a rung: on some of the held-out records
                return
            if goal is not None and loss <= goal and all(other > goal for _, other in heard):
                os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does
            heard.append((time.time(), loss))

    return Listener()


def run_ours(args: argparse.Namespace) -> None:
    """The search as `ftray tune` runs it, up to the last trial's end."""
    import yaml

    from ftray.runtime.cluster import quiet
    from ftray.runtime.threads import wait_briefly

    wait_briefly()
    quiet()

    from ftray.config import Config
    from ftray.data import TokenizedData
    from ftray.models.find import find
    from ftray.runtime.cluster import connect, gpus_per_worker
    from ftray.search.driver import search
    from ftray.search.signals import paired_training
    from ftray.search.space import load_space
    from ftray.search.trial_worker import SearchContext
    from ftray.storage.location import parse_location

    as_users_do, output = args.goal is not None, Path(args.output)
    output.mkdir()
    (output / "space.yaml").write_text(yaml.safe_dump(SPACE, sort_keys=False))
    cfg = Config.model_validate(
        {
            "data": DATA,
            "task": "CAUSAL_LM",
            "training": {"steps": args.steps, **({} if as_users_do else {"evaluations": 1})},
            "search": {
                "seed": args.seed,
                "trials": args.trials * (4 if as_users_do else 1),
                "scheduler": "halving" if as_users_do else "none",
            },
        }
    )
    heard: list[tuple[float, float]] = []
    path = find(cfg.model.name)
    connect(cfg)
    space, data = load_space(str(output / "space.yaml")), TokenizedData.load(shards(args.cache))
    gpus, paired = gpus_per_worker(cfg), paired_training(cfg, space, data)
    prepared = SearchContext(cfg, path, data.directory, gpus, paired), [listener(heard, args.goal)]
    with search(cfg, space, parse_location(args.output), gpus, lambda: prepared):
        pass  # no proof: that of the other side is its user's own
    Path(f"{output}.json").write_text(json.dumps(heard))


def shards(cache: str) -> str:
    """The directory that :func:`prepare` made."""
    (manifest,) = Path(cache).glob("*/manifest.json")
    return str(manifest.parent)


def train_one(config: dict[str, Any]) -> None:
    """What the usual script runs in each trial's worker."""
    import ray.train
    import torch

    from benchmarks import usual
    from ftray.data import TokenizedData
    from ftray.models.load import load_tokenizer

    torch.manual_seed(0)
    data = TokenizedData.load(config["data"])
    rows = [{k: row[k] for k in ("input_ids", "labels")} for row in data.rows("train")]
    rows = (rows * (1 + config["steps"] * usual.BATCH // len(rows)))[: config["steps"] * usual.BATCH]
    held = [{k: row[k] for k in ("input_ids", "labels")} for row in data.rows("validation")]
    base = usual.load(config["path"], getattr(torch, config["dtype"]))
    trainer = usual.trainer(base, config, rows, held, load_tokenizer(config["path"]))
    trainer.train()
    ray.train.report({"validation_loss": usual.held_out_loss(trainer)})


def peer_space(trial: Any) -> None:
    """SPACE, as Optuna's users write it."""
    trial.suggest_categorical("rank", [8, 16, 32])
    trial.suggest_categorical("multiple", [1, 2])
    trial.suggest_categorical("target_modules", list(GROUPS))
    trial.suggest_float("learning_rate", 5e-4, 5e-3, log=True)
    trial.suggest_float("dropout", 0.0, 0.05)


def run_peer(args: argparse.Namespace) -> None:
    """Ray Tune over trials, each a TorchTrainer of one worker, as Ray's documentation shows."""
    import ray
    import ray.train
    from ray import tune
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback
    from ray.tune.search.optuna import OptunaSearch

    from ftray.config import ModelConfig
    from ftray.models.find import find
    from ftray.models.load import choose_dtype

    ray.init(log_to_driver=False)
    path, dtype = find("smollm2-135m"), str(choose_dtype(ModelConfig())).removeprefix("torch.")
    fixed = {"path": path, "dtype": dtype, "data": shards(args.cache), "steps": args.steps}
    cpus = int(ray.cluster_resources()["CPU"])

    def driver(config: dict[str, Any]) -> None:
        settings = config | {
            "alpha": config["rank"] * config["multiple"],
            "target_modules": GROUPS[config["target_modules"]],
        }
        trainer = TorchTrainer(
            train_one,
            train_loop_config=settings | fixed,
            scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(
                name=f"trial-{tune.get_context().get_trial_id()}",
                storage_path=os.path.abspath(args.output),
                callbacks=[TuneReportCallback()],
            ),
        )
        trainer.fit()

    heard: list[tuple[float, float]] = []
    tuner = tune.Tuner(
        tune.with_resources(driver, {"memory": 1}),  # the CPUs belong to the training workers
        tune_config=tune.TuneConfig(
            metric="validation_loss",
            mode="min",
            search_alg=OptunaSearch(peer_space, metric="validation_loss", mode="min", seed=args.seed),
            num_samples=args.trials,
            max_concurrent_trials=cpus,
        ),
        run_config=tune.RunConfig(storage_path=os.path.abspath(args.output), name="tune", callbacks=[listener(heard)]),
    )
    tuner.fit()
    Path(f"{args.output}.json").write_text(json.dumps(heard))


if __name__ == "__main__":
    sys.exit(main())
