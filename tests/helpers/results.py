"""What a search of many trials leaves in its output, made in a second: Optuna's journal, and losses that are drawn."""

import json
import math
import random
from pathlib import Path

import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from ftray.config import Config

METHODS = {"lora": {"rank": [4, 8, 16]}, "ia3": {}, "oft": {"block_size": [16, 32]}, "adalora": {"rank": [4, 8, 16]}}
RUNGS, BATCH, TOKENS = (48, 96, 384), 8, 17  # records at the rungs, in a step, tokens of a record
METRIC = "validation_loss"
HOSTILE = (
    '</script><script>window.pwned = 1</script><img src=x onerror="window.pwned = 2"> & \'quoted\' "twice" {{ 7 * 7 }}'
)


def write_search(output: Path, trials: int = 64, goals: str = METRIC, answers: int = 200, seed: int = 0) -> dict:
    """Fill `output`; returns the summary.

    The best rate of each method is 1e-3 times its place; everything else is noise. A quarter of the trials train on
    after the first rung, an eighth after the second; two have two further runs each. One trial fails, and one diverges.
    """
    draw, output = random.Random(seed), output
    output.mkdir(parents=True)
    directions = ",".join("min" for _ in goals.split(","))
    cfg = Config.model_validate({
        "search": {"trials": trials, "metric": goals, "direction": directions, "space": "space.yaml"},
        "data": {"source": "records.jsonl"}, "model": {"name": "model"}, "task": "CAUSAL_LM", "output": str(output),
        "training": {"batch_size": BATCH},
    })  # fmt: skip
    stored = cfg.model_dump(exclude={"resume", "plan", "show", "png", "verbose"})
    (output / "config.yaml").write_text(yaml.safe_dump(stored))
    (output / "space.yaml").write_text(
        yaml.safe_dump({"method": {"choice": [*METHODS]}, "learning_rate": {"log": [1e-4, 1e-1]}})
    )
    rows = [_row(number, draw, goals.split(",")) for number in range(trials)]
    order = sorted(rows[1:], key=lambda row: row["curve"][0]["paired_loss"])
    for place, row in enumerate(order):
        _cut(row, 3 if place < trials // 8 else 2 if place < trials // 4 else 1)
    order[-1] |= {"status": "failed", "reason": f"diverged: {HOSTILE}"}
    rows.sort(key=lambda row: (row["status"] == "failed", row["value"] is None, -row["records"], row["value"] or 0.0))
    finalists = [row for row in rows if row["trial"]][:2]
    rows.sort(key=lambda row: row["trial"] != finalists[0]["trial"])
    further = []
    for row in finalists:
        for again in (1, 2):
            config = {**row["config"], "training": {**row["config"]["training"], "seed": again}}
            further.append({**row, "trial": trials + len(further), "config": config, "seed_of": row["trial"]})
    losses = _curves([*rows, *further], draw)
    pq.write_table(pa.table(losses), output / "curves.parquet")
    _journal(output / "study.log", [*rows, *further], goals.split(","))
    best = rows[0]
    summary = {
        "metric": METRIC, "direction": "min", "best": best, "seconds": 754.0, "trials": rows, "further_runs": further,
        "goals": [{"metric": name, "direction": "min"} for name in goals.split(",")],
        "front": [row["trial"] for row in _front(rows)] if "," in goals else [best["trial"]],
        "rule": "knee" if "," in goals else None, "finalists": None, "base": {"loss": 4.25, "exact_match": 0.05},
        "rungs": [{"records": records, "signal": "training loss", "finished": 8, "stopped": 16, "rank_correlation": 0.9,
                   "missed": 0.02} for records in RUNGS[:2]],
        "tokens": sum(row["tokens"] for row in [*rows, *further]),
        "proof": {
            "records": answers, "candidates": 2, "new_modules": [], "merged": {"path": str(output / "best" / "merged")},
            "metrics": {
                "loss": {"base": 4.25, "best": 1.0625, "difference": -3.1875, "interval": [-3.5, -3.0]},
                "exact_match": {"base": 0.05, "best": 0.625, "difference": 0.575, "interval": [0.5, 0.65]},
                "chrf": {"base": 20.5, "best": 20.25, "difference": -0.25, "interval": [-2.0, 1.5]},
            },
            "over_default": {
                "loss": {"base": 1.75, "best": 1.0625, "difference": -0.6875, "interval": [-0.75, -0.5]},
                "exact_match": {"base": 0.5, "best": 0.625, "difference": 0.125, "interval": [-0.01, 0.2]},
                "chrf": {"base": 20.0, "best": 20.25, "difference": 0.25, "interval": [-1.0, 1.5]},
            },
            "sources": {}, "samples": [],
        },
    }  # fmt: skip
    (output / "summary.json").write_text(json.dumps(summary))
    split = {
        "windows": [1000],
        "records": 1000,
        "tokens": 17000,
        "supervised_tokens": 6000,
        "dropped": 2,
        "truncated": 3,
    }
    split |= {"lengths": [5, 16, 25, 30, 64], "digest": "0123456789abcdef"}
    data = {"train": split, "validation": split | {"records": 100}, "test": split | {"records": answers}}
    (output / "data.json").write_text(json.dumps(data | {"base": [["model.safetensors", "aa"]]}))
    lines = [_answered(i, draw) for i in range(answers)]
    (output / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return summary


def _row(number: int, draw: random.Random, goals: list[str]) -> dict:
    method = "lora" if number == 0 else draw.choice([*METHODS])
    place = [*METHODS].index(method)
    rate = 10 ** draw.uniform(-4, -1)
    adapter = {"method": method, **{name: draw.choice(values) for name, values in METHODS[method].items()}}
    adapter |= {"target_modules": draw.choice(["all-linear", "attention"])}
    away = abs(math.log10(rate) + 3 - 0.3 * place)
    values = [5 / (1 + records / 40) + 0.8 * away + draw.gauss(0, 0.05) for records in RUNGS]
    curve = [{"records": RUNGS[0], "paired_loss": values[0]}]
    curve += [{"records": records, METRIC: value} for records, value in zip(RUNGS[1:], values[1:], strict=True)]
    size = {"adapter_bytes": 4000.0 * (1 + place) * adapter.get("rank", 6)} if len(goals) > 1 else {}
    return {
        "trial": number, "status": "finished", "value": values[-1], "validated": None, "records": RUNGS[-1],
        "tokens": RUNGS[-1] * TOKENS, "seconds": 10.0,
        "config": {"adapter": adapter, "training": {"learning_rate": rate}},
        "metrics": {METRIC: values[-1], **size}, "curve": curve, "checkpoint": None, "reason": None, "seed_of": None,
    }  # fmt: skip


def _cut(row: dict, reached: int) -> None:
    """End a trial at the rung that it has reached."""
    if reached < len(RUNGS):
        row |= {"status": "stopped early", "curve": row["curve"][:reached], "records": RUNGS[reached - 1]}
        row["tokens"] = row["records"] * TOKENS
        row["value"] = row["curve"][-1].get(METRIC)
        row["metrics"] = {} if row["value"] is None else {**row["metrics"], METRIC: row["value"]}


def _front(rows: list[dict]) -> list[dict]:
    points = {row["trial"]: (row["value"], row["metrics"]["adapter_bytes"]) for row in rows if row["metrics"]}
    whole = [row for row in rows if row["trial"] in points]
    return [
        row for row in whole
        if not any(a <= points[row["trial"]][0] and b <= points[row["trial"]][1] for n, (a, b) in points.items()
                   if n != row["trial"])
    ]  # fmt: skip


def _curves(rows: list[dict], draw: random.Random) -> dict[str, list]:
    columns: dict[str, list] = {"trial": [], "step": [], "records": [], "train_loss": []}
    for row in rows:
        for step in range(1, row["records"] // BATCH + 1):
            loss = 6 / (1 + step / 6) + draw.gauss(0, 0.1)
            for name, value in zip(columns, (row["trial"], step, step * BATCH, loss), strict=True):
                columns[name].append(value)
    return columns


def _journal(path: Path, rows: list[dict], goals: list[str]) -> None:
    storage = JournalStorage(JournalFileBackend(str(path)))
    study = optuna.create_study(study_name="ftray", storage=storage, directions=["minimize"] * len(goals))
    states = {"finished": TrialState.COMPLETE, "stopped early": TrialState.PRUNED, "failed": TrialState.FAIL}
    rate = FloatDistribution(1e-4, 1e-1, log=True)
    for row in sorted(rows, key=lambda row: row["trial"]):
        method, state = row["config"]["adapter"]["method"], states[row["status"]]
        params = {"method": method, "learning_rate": row["config"]["training"]["learning_rate"]}
        distributions = {"method": CategoricalDistribution([*METHODS]), "learning_rate": rate}
        for name, values in METHODS[method].items():
            params[f"{method}/{name}"] = row["config"]["adapter"][name]
            distributions[f"{method}/{name}"] = CategoricalDistribution(values)
        attributes = {"config": row["config"], "reports": [_report(point) for point in row["curve"]]}
        attributes |= {"seed_of": row["seed_of"]} if row["seed_of"] is not None else {}
        if row["seed_of"] is not None:
            params, distributions = {}, {}
        values = [row["metrics"][name] for name in goals] if state is TrialState.COMPLETE else None
        study.add_trial(create_trial(state=state, values=values, params=params, distributions=distributions,
                                     user_attrs=attributes))  # fmt: skip


def _report(point: dict) -> dict:
    tokens = point["records"] * TOKENS
    return {"step": point["records"] // BATCH, "tokens": tokens, "seconds": 1.0, "tokens_per_second": tokens, **point}


def _answered(i: int, draw: random.Random) -> dict:
    word = " ".join(draw.choices("abcdefgh", k=6))
    target, base = word.upper(), draw.choice([word, word[::-1], word.upper()])
    best = draw.choice([target, target, word[:4].upper()])
    if i == 0:  # wholly wrong before, right now: the greatest change
        word, target, base, best = f"needle {HOSTILE}", f"T {HOSTILE}", "zzz", f"T {HOSTILE}"
    texts = {"base": base, "default": word, "best": best}
    return {
        "prompt": f"say {word}", "target": target,
        "answers": {name: {"text": text, "loss": 1.0 + (text != target)} for name, text in texts.items()},
    }  # fmt: skip
