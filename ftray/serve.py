"""Serve one base model and many adapters over HTTP, with OpenAI's API."""

import signal
import socket
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from ftray.cli import run_command
from ftray.config import Config
from ftray.errors import UserError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

NAME = "ftray"  # of the Serve application, and of what holds the cluster for it


def run(cfg: Config) -> int:
    """The command: starts Ray Serve, prints the URL, and serves until it is interrupted or terminated.

    Raises:
        UserError: anything the user can mend, before Ray starts; afterwards, that Serve is in use on the cluster.
    """
    from ftray.runtime.cluster import connect, cpus_each, gpus_per_worker, quiet, say_if_waiting

    if not cfg.verbose:
        quiet()
    from ftray.serving.app import application, check_catalog, key_digest
    from ftray.serving.catalog import model_of_run

    cfg = model_of_run(cfg)
    key, catalog = key_digest(cfg), check_catalog(cfg)
    _check_port(cfg.serving.host, cfg.serving.port)

    from ray import serve

    connect(cfg)
    held = _hold_cluster()  # for as long as this name is bound
    gpus = gpus_per_worker(cfg)
    cpus = cfg.scaling.cpus_per_worker or cpus_each(cfg.serving.max_replicas, gpus)
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": cfg.serving.host, "port": cfg.serving.port},
            logging_config={"log_level": "INFO" if cfg.verbose else "ERROR", "enable_access_log": cfg.verbose},
        )
        say_if_waiting(cfg.serving.min_replicas, {"CPU": cpus, "GPU": gpus})
        serve.run(application(cfg, catalog, key, cpus, gpus), name=NAME)
        stop = threading.Event()
        # only now: Ray installs handlers of its own
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        host = f"[{cfg.serving.host}]" if ":" in cfg.serving.host else cfg.serving.host
        print(f"serving {', '.join([catalog.base, *catalog.adapters])}")
        print(f"endpoint http://{host}:{cfg.serving.port}/v1", flush=True)
        stop.wait()
        print("draining", flush=True)
    finally:
        _end_application()
    del held
    return 0


def _hold_cluster() -> "ActorHandle":
    """An actor that lives as long as this process, and of which a cluster can have one: Serve has one HTTP port.

    Raises:
        UserError: another endpoint is there, or Serve is in use by somebody else.
    """
    import ray
    from ray import serve

    from ftray.compat.ray import serve_runs

    way_out = "stop it first, or serve on another Ray cluster: --scaling.address local begins one"

    class Holder:
        pass

    try:
        held = ray.remote(Holder).options(name=NAME, namespace=NAME, num_cpus=0).remote()
    except ValueError:  # the name is taken
        raise UserError(f"another `ftray serve` has the Ray Serve of this cluster: {way_out}") from None
    if serve_runs():
        there = ", ".join(sorted(serve.status().applications)) or "no application"
        raise UserError(f"Ray Serve is up on this cluster already, with {there} (`serve shutdown`): {way_out}")
    return held


def _end_application() -> None:
    """Let answers under way be given, then end the application, and Serve with it unless somebody else uses it too."""
    from ray import serve

    while NAME in serve.status().applications:
        with suppress(TimeoutError):
            serve.delete(NAME)
    if not serve.status().applications:
        serve.shutdown()


def _check_port(host: str, port: int) -> None:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UserError(f"can't listen on {host}:{port}: {error.strerror}: choose another --host or --port") from None


if __name__ == "__main__":
    sys.exit(run_command("serve"))
