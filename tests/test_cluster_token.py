"""A cluster with token authentication: Ray's own head, and commands with the right token, a wrong one or none."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.ports import free_port

pytestmark = pytest.mark.slow
RAY = str(Path(sys.executable).parent / "ray")
TOKEN, OTHER = "0123456789abcdef" * 2, "fedcba9876543210" * 2
PLAIN = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[str, str]]:
    """The addresses of a head and of its dashboard."""
    port, dashboard = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as directory:
        flags = {
            "--port": port,
            "--num-cpus": 2,
            "--num-gpus": 0,
            "--min-worker-port": 0,  # any that is free: Ray would refuse a head whose port is among its workers'
            "--max-worker-port": 0,
            "--dashboard-host": "127.0.0.1",
            "--dashboard-port": dashboard,
            "--ray-client-server-port": free_port(),
            "--temp-dir": Path(directory) / "ray",
            "--object-store-memory": 100_000_000,
        }
        start = [RAY, "start", "--head", "--block", *(f"{flag}={value}" for flag, value in flags.items())]
        environment = PLAIN | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
        with open(Path(directory) / "log", "w") as log:
            process = subprocess.Popen(start, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            for place in (port, dashboard):
                deadline = time.monotonic() + 120
                while True:
                    with socket.socket() as probe:
                        if not probe.connect_ex(("127.0.0.1", place)):
                            break
                    assert process.poll() is None, (Path(directory) / "log").read_text()
                    assert time.monotonic() < deadline
                    time.sleep(0.5)
            yield f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        finally:
            process.terminate()
            process.wait(60)


def ran(command: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    flags = [sys.executable, "-m", f"ftray.{command}", *arguments]
    return subprocess.run(flags, capture_output=True, text=True, env=PLAIN | environment, check=False, timeout=300)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "needs a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN": TOKEN}, "needs a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": OTHER}, "refuses the token of RAY_AUTH_TOKEN: ask who runs it"),
        ({"RAY_AUTH_MODE": "token", "file": OTHER}, "refuses the token of ~/.ray/auth_token: ask who runs it"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}, None),
        ({"RAY_AUTH_MODE": "token", "file": TOKEN}, None),
    ],
)
def test_a_command_joins_with_the_right_token_alone(head, tmp_path, words, tiny_llama, given, said):
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    if token := given.get("file"):
        (home / ".ray" / "auth_token").write_text(token)
    environment = {name: value for name, value in given.items() if name != "file"} | {"HOME": str(home)}
    where = ["--scaling.address", head[0], "--data.cache", str(tmp_path / "cache")]
    done = ran("preprocess", "--data", words, "--model", tiny_llama, *where, **environment)
    if said is None:
        assert (done.returncode, done.stderr) == (0, "")
        assert "shards" in done.stdout
    else:
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert said in done.stderr


@pytest.mark.parametrize("given", [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": OTHER}])
def test_a_job_is_not_looked_up_without_the_token(head, tmp_path, given):
    done = ran("status", "--run", "raysubmit_x", "--scaling.address", head[1], HOME=str(tmp_path), **given)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "the cluster refuses the token, or there is none" in done.stderr


def test_another_program_at_the_address_is_told(tmp_path, words, tiny_llama):
    with socket.create_server(("", 0)) as other:  # Ray takes this machine's own address for 127.0.0.1
        where = ["--scaling.address", f"127.0.0.1:{other.getsockname()[1]}", "--data.cache", str(tmp_path / "cache")]
        done = ran("preprocess", "--data", words, "--model", tiny_llama, *where)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "is no Ray head" in done.stderr
