"""Searches as a user runs them: the command, its environment, and what it left."""

import io
import json
import logging
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import optuna
import ray
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from ftray.cli import main

SPACE = """
method: {choice: [lora, ia3, oft]}
lora:
  rank: {choice: [2, 4]}
  alpha: {times: rank, choice: [1, 2]}
  learning_rate: {log: [1.0e-3, 1.0e-2]}
ia3:
  learning_rate: {log: [1.0e-2, 1.0e-1]}
oft:
  block_size: 16
  learning_rate: {log: [1.0e-3, 1.0e-2]}
"""


def command(output: Path, words: str, model: str, *more: str, space: str = SPACE, steps: int = 18) -> list[str]:
    path = output.parent / "space.yaml"
    path.write_text(space)
    flags = {
        "--data": words,
        "--model": model,
        "--space": str(path),
        "--output": os.path.relpath(output),
        "--data.max_length": "64",
        "--data.cache": str(output.parent / "shards"),
        "--evaluation.max_new_tokens": "12",
        "--training.steps": str(steps),
        "--model.dtype": "fp32",
        "--search.finalist_seeds": "1",  # test_finalists.py has the others
    }
    return [sys.executable, "-m", "ftray.tune", *(part for pair in flags.items() for part in pair), *more]


def run(arguments: list[str], timeout: float = 300) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=timeout, env=environment())


def run_here(arguments: list[str]) -> subprocess.CompletedProcess:
    """As `run`, in this process and on its `cluster`: nothing is imported again, no Ray is started."""
    _, _, module, *flags = arguments
    out, error = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(error):
            code = main([module.removeprefix("ftray."), *flags])
    finally:
        logging.disable(logging.NOTSET)  # commands keep the logs of the libraries quiet
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), error.getvalue())


def environment(joined: bool = False) -> dict[str, str]:
    """Of a command that starts Ray, or that joins this process's `cluster`."""
    by_themselves = ("RAY_ADDRESS", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER")
    own = {k: v for k, v in os.environ.items() if k not in by_themselves}
    return own | ({"RAY_ADDRESS": ray.get_runtime_context().gcs_address} if joined else {})


def study(output: Path) -> optuna.Study:
    return optuna.load_study(study_name="ftray", storage=JournalStorage(JournalFileBackend(str(output / "study.log"))))


def finished(output: Path) -> dict[str, tuple[str, int]]:
    """What the trials that are over have written last, and when."""
    found = {}
    for pattern in ("outcome.json", "checkpoint_*/report.json"):
        for path in (output / "tune").glob(f"trial-*/{pattern}"):
            with suppress(FileNotFoundError):  # a search that runs removes older checkpoints
                text = path.read_text()
                # or the schedule is at its end
                if path.name == "outcome.json" or json.loads(text)["learning_rate"] == 0:
                    found[str(path)] = text, path.stat().st_mtime_ns
    return found
