"""Several endpoints and applications of others on one cluster: the real command, in processes that join this one's."""

import os
import signal
import subprocess
import sys
import time

import httpx
import pytest
import ray
from conftest import llama
from helpers.ports import free_port
from helpers.searches import run_here
from ray import serve
from starlette.requests import Request

from ftray.serving.app import build


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    """Two models of different names."""
    root = tmp_path_factory.mktemp("models")
    for name in ("first", "second"):
        llama().save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: str(root / name) for name in ("first", "second")}


class Serving:
    """`python -m ftray.serve` on the cluster of this process."""

    def __init__(self, model, log):
        self.log, port = log, free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "ftray.serve", "--model", model, "--port", str(port), "--model.dtype", "fp32"]
        command += ["--scaling.address", ray.get_runtime_context().gcs_address, "--serving.max_replicas", "1"]
        environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "FTRAY_API_KEY")}
        with open(log, "w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)

    def begun(self):
        """Whether it answers; else it has ended."""
        for _ in range(1200):
            if "endpoint http" in self.log.read_text():
                return True
            if self.process.poll() is not None:
                return False
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def refusal(self):
        """The one line that it ended with."""
        assert self.process.wait(120) == 2
        (line,) = self.log.read_text().splitlines()
        return line

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(120) == 0, self.log.read_text()

    def kill(self):
        self.process.kill()
        self.process.wait()


def models_at(url):
    return [model["id"] for model in httpx.get(f"{url}/v1/models", timeout=60).json()["data"]]


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Other:
    """Somebody else's application."""

    async def __call__(self, request: Request) -> str:
        return "other"


@pytest.fixture
def idle(cluster):
    """The cluster, without Serve before and after."""
    serve.shutdown()
    yield
    serve.shutdown()


def test_a_second_endpoint_on_a_cluster_is_refused_and_harms_nothing(idle, models, tmp_path):
    first = Serving(models["first"], tmp_path / "first")
    try:
        assert first.begun()
        second = Serving(models["second"], tmp_path / "second")
        assert "another `ftray serve` has the Ray Serve of this cluster: stop it first" in second.refusal()
        assert models_at(first.url) == ["first"]
        serve.run(Other.bind(), name="other", route_prefix="/other")
        assert httpx.get(f"{first.url}/other", timeout=60).text == "other"
        assert models_at(first.url) == ["first"]
        first.end()
        assert list(serve.status().applications) == ["other"]
        assert httpx.get(f"{first.url}/other", timeout=60).text == "other"
        beside = run_here(
            [sys.executable, "-m", "ftray.serve", "--model", models["second"], "--port", str(free_port())]
        )
        assert beside.returncode == 2
        (line,) = beside.stderr.splitlines()
        assert "Ray Serve is up on this cluster already, with other" in line
        assert httpx.get(f"{first.url}/other", timeout=60).text == "other"
    finally:
        first.kill()


@pytest.mark.slow
def test_of_two_that_begin_at_once_one_serves_and_its_end_leaves_nothing(idle, models, tmp_path):
    both = [Serving(models[name], tmp_path / name) for name in models]
    try:
        begun = [one.begun() for one in both]
        assert sorted(begun) == [False, True]
        winner, loser = (both[begun.index(which)] for which in (True, False))
        assert "another `ftray serve`" in loser.refusal()
        assert models_at(winner.url) == [winner.log.name]
        winner.end()
        assert not serve.status().applications
        again = Serving(models["first"], tmp_path / "again")
        both.append(again)
        assert again.begun()
        again.kill()  # what is left of it is named
        after = Serving(models["second"], tmp_path / "after")
        assert "Ray Serve is up on this cluster already, with ftray" in after.refusal()
    finally:
        for one in both:
            one.kill()


def test_applications_of_serve_deploy_stand_side_by_side(idle, models):
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    for name, model in models.items():
        args = {"model": {"name": model, "dtype": "fp32"}, "serving": {"max_replicas": 1}}
        serve.run(build(args), name=name, route_prefix=f"/{name}")
    for name in models:
        assert models_at(f"http://127.0.0.1:{port}/{name}") == [name]
    serve.delete("first")
    assert models_at(f"http://127.0.0.1:{port}/second") == ["second"]
