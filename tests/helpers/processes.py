"""Helpers that run in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

HELPERS = Path(__file__).parent


def torchrun(script: str, *arguments: str, workers: int = 2) -> str:
    """Run a helper in so many processes; returns what they print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(workers)]
    path = os.pathsep.join([str(HELPERS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(HELPERS / script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
