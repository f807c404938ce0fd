"""Serve one base model and many adapters over HTTP, with OpenAI's API."""

import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from ftray.arguments import Settings, StrPath, command, config_of
from ftray.cli import run_command
from ftray.config import Config
from ftray.errors import TERMINATED, UserError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

NAME = "ftray"  # of the Serve application, and of what holds the cluster for it


class Server:
    """An endpoint that is up, until :meth:`stop` or the end of a `with` block.

    Attributes:
        url: what clients of OpenAI's API take as `base_url`.
        models: names of the base and of the adapters.
    """

    def __init__(self, url: str, models: list[str], held: "ActorHandle"):
        self.url, self.models = url, models
        self._held: ActorHandle | None = held

    def stop(self) -> None:
        """Let answers under way be given, then end."""
        if self._held is not None:
            _end_application()
            self._held = None  # another one can have the cluster's Serve

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *raised: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<Server {self.url}: {', '.join(self.models)}>"


@command
def serve(
    run: StrPath | None = None,
    *,
    adapter: Mapping[str, StrPath] | StrPath | Sequence[StrPath] | None = None,
    merged: bool | None = None,
    engine: str | None = None,
    model: StrPath | Settings | None = None,
    task: str | None = None,
    host: str | None = None,
    port: int | None = None,
    serving: Settings | None = None,
    evaluation: Settings | None = None,
    scaling: Settings | None = None,
    config: Config | StrPath | Settings | None = None,
    verbose: bool | None = None,
) -> Server:
    """Answer over HTTP as OpenAI does, in the background: one base model, many adapters.

    Args:
        run: output of a search, or its result: its base, its best adapter and its trials are served.
        adapter: directories by the names that requests give.
        merged: serve the merged model of `run` alone.

    Others are the fields and sections of docs/configuration.md.

    Raises:
        UserError: anything the user can mend, before Ray starts; afterwards, that Serve is in use on the cluster.
    """
    return _serve(config_of("serve", locals()))


def _serve(cfg: Config) -> Server:
    from ftray.runtime.cluster import connect, cpus_each, gpus_per_worker, say_if_waiting
    from ftray.serving.app import application, check_catalog, key_digest
    from ftray.serving.catalog import model_of_run

    cfg = model_of_run(cfg)
    key, catalog = key_digest(cfg), check_catalog(cfg)
    _check_port(cfg.serving.host, cfg.serving.port)

    from ray import serve as ray_serve

    connect(cfg)
    held = _hold_cluster()  # for as long as this name is bound
    gpus = gpus_per_worker(cfg)
    cpus = cfg.scaling.cpus_per_worker or cpus_each(cfg.serving.max_replicas, gpus)
    try:
        ray_serve.start(
            proxy_location="HeadOnly",
            http_options={"host": cfg.serving.host, "port": cfg.serving.port},
            logging_config={"log_level": "INFO" if cfg.verbose else "ERROR", "enable_access_log": cfg.verbose},
        )
        say_if_waiting(cfg.serving.min_replicas, {"CPU": cpus, "GPU": gpus})
        ray_serve.run(application(cfg, catalog, key, cpus, gpus), name=NAME)
    except BaseException:
        _end_application()
        raise
    host = f"[{cfg.serving.host}]" if ":" in cfg.serving.host else cfg.serving.host
    return Server(f"http://{host}:{cfg.serving.port}/v1", [catalog.base, *catalog.adapters], held)


def run(cfg: Config) -> int:
    """The command: starts Ray Serve, prints the URL, and serves until it is interrupted or terminated, then drains: 0.

    Raises:
        UserError: anything the user can mend, before Ray starts; afterwards, that Serve is in use on the cluster.
    """
    try:
        server = serve(config=cfg)
    except SystemExit as ended:  # by Ray's handler, with the number of the signal: nothing is served yet
        if ended.code != signal.SIGTERM:
            raise
        return TERMINATED
    with server:
        stop = threading.Event()
        # only now: Ray installs handlers of its own
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        print(f"serving {', '.join(server.models)}")
        print(f"endpoint {server.url}", flush=True)
        stop.wait()
        print("draining", flush=True)
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
