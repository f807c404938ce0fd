"""Wall-clock of commands that hardly compute: `ftray --help`, and `ftray tune` on a tiny model, from command to exit.

    python -m benchmarks.start [--quick]

The model is a random Llama of two layers; the search has two trials of eight steps, everything else is as by default:
Ray, pack, finalists, proof, merged model and report. By the second in which its lines come, it says where the time is.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import beside, busy, machine, parser, show, versions

FTRAY = Path(sys.executable).with_name("ftray")
TRIALS, STEPS, RECORDS = 2, 8, 120
STAGES = {  # how the first line begins that is printed after it
    "checks": "output ",
    "data": "searching ",
    "Ray": "[",
    "pack": "packed:",
    "training": "report ",
    "proof": "summary ",
}


def main() -> int:
    made = parser("start", __doc__)
    made.add_argument("--quick", action="store_true", help="one search instead of three")
    args = made.parse_args()
    print(f"start{beside(args.busy)} on {machine()} with {versions()}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        write_model_and_records(Path(directory))
        with busy(args.busy):
            helped = statistics.median(seconds(["--help"])["end"] for _ in range(7))
            print(f"  ftray --help {helped:.3f} s", flush=True)
            runs = [tune(Path(directory), run) for run in range(1 if args.quick else 3)]
    tuned = sorted(runs, key=lambda stages: stages["end"])[len(runs) // 2]
    show("start", tuned["end"], None, None, "s", {"help_seconds": helped, "until": tuned}, args.busy)
    return 0


def write_model_and_records(directory: Path) -> None:
    """A tiny model, and spelt-out words with the same letters in capitals."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.tiny_models import tiny_config, tokenizer

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("llama", "CAUSAL_LM")).save_pretrained(directory / "model")
    tokenizer().save_pretrained(directory / "model")
    draw = random.Random(0)
    words = (" ".join(draw.choices("abcdefgh", k=draw.randint(2, 9))) for _ in range(RECORDS))
    lines = [json.dumps({"input": word, "output": word.upper()}) for word in words]
    (directory / "records.jsonl").write_text("\n".join(lines) + "\n")


def tune(directory: Path, run: int) -> dict[str, float]:
    """Seconds from the start of a search until each of its stages is over; nothing of an earlier one is used again."""
    flags = {
        "--data": directory / "records.jsonl",
        "--model": directory / "model",
        "--output": directory / f"run-{run}",
        "--data.cache": directory / f"shards-{run}",
        "--search.trials": TRIALS,
        "--training.steps": STEPS,
    }
    found = seconds(["tune", *(str(part) for flag in flags.items() for part in flag)])
    listed = ", ".join(f"{stage} {second:.1f}" for stage, second in found.items())
    print(f"  ftray tune {found['end']:.1f} s; until {listed}", flush=True)
    return found


def seconds(arguments: list[str]) -> dict[str, float]:
    """Seconds from a command's start until each of `STAGES` that it prints is over, and until its `end`."""
    found: dict[str, float] = {}
    started = time.perf_counter()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([FTRAY, *arguments], stdout=subprocess.PIPE, env=environment, text=True) as process:
        for line in process.stdout:  # type: ignore[union-attr]  # it is a pipe
            for stage, words in STAGES.items():
                if line.startswith(words):
                    found.setdefault(stage, time.perf_counter() - started)
    found["end"] = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"ftray {' '.join(arguments)} ended with {process.returncode}")
    return found


if __name__ == "__main__":
    sys.exit(main())
