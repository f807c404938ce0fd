"""How many threads there are, and how they wait."""

import os
import subprocess
import sys

import pytest
import torch

from ftray.config import ModelConfig
from ftray.models.load import load_base
from ftray.runtime import threads

HELP = """
import os
from ftray.cli import main
try:
    main(["status", "--help"])
except SystemExit:
    print(os.environ.get("GOMP_SPINCOUNT"))
"""
# the cluster is there before ftray is, or is begun by it; Ray takes no variable twice, the job's and ftray's
CONNECT = """
import os, sys
import ray
usual = os.nice(0)
from ray.cluster_utils import Cluster
address, cluster = "local", None
if sys.argv[1] == "joined":
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    address = cluster.address
from ftray.config import Config
from ftray.runtime.cluster import connect
connect(Config.model_validate({"scaling": {"address": address}}), dashboard=False)
see = ray.remote(lambda: (os.environ.get("GOMP_SPINCOUNT"), os.nice(0) - usual))
print(*ray.get(see.remote()))
ray.shutdown()
if cluster:
    cluster.shutdown()
"""


def run(code: str, *arguments: str, **given: str) -> str:
    """The last line that a process prints in whose environment nothing but `given` says how threads wait."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_WAIT", "GOMP", "RAY_"))}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=clean | given, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "waits"), [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "None")]
)
def test_threads_sleep_soon_unless_the_user_says_how_they_wait(given, waits):
    assert run(HELP, **given) == waits


@pytest.mark.parametrize(("cluster", "given", "seen"), [
    ("own", {}, "3000 0"),
    ("own", {"GOMP_SPINCOUNT": "7", "RAY_worker_niceness": "3"}, "7 3"),
    ("joined", {}, "3000 15"),
])  # fmt: skip
def test_ray_s_workers_wait_as_the_command_does_and_give_way_only_where_the_cluster_says_so(cluster, given, seen):
    assert run(CONNECT, cluster, **given) == seen


@pytest.mark.parametrize(
    ("files", "processors"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({}, 64),
    ],
)
def test_a_container_s_quota_bounds_the_threads(tmp_path, monkeypatch, files, processors):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert threads.share_of_processors() == processors


def test_a_model_is_loaded_with_no_more_threads_than_may_run(tiny_llama, monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        monkeypatch.setattr("ftray.models.load.share_of_processors", lambda: 3)
        load_base(ModelConfig(), tiny_llama)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
