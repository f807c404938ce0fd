"""Answer over HTTP as OpenAI does: one base model, many adapters."""

import signal
import socket
import sys
import threading

from ftray.cli import run_command
from ftray.config import Config
from ftray.errors import UserError


def run(cfg: Config) -> int:
    """The command: starts Ray Serve, prints where, and goes on until it is interrupted or terminated.

    Raises:
        UserError: anything the user can mend, before Ray starts.
    """
    from ftray.runtime.cluster import connect, cpus_each, gpus_per_worker, quiet

    if not cfg.verbose:
        quiet()
    from ftray.serving.app import application, checked, key_digest
    from ftray.serving.catalog import model_of_run

    cfg = model_of_run(cfg)
    key, what = key_digest(cfg), checked(cfg)
    _check_port(cfg.serving.host, cfg.serving.port)

    from ray import serve

    connect(cfg)
    gpus = gpus_per_worker(cfg)
    cpus = cfg.scaling.cpus_per_worker or cpus_each(cfg.serving.max_replicas, gpus)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": cfg.serving.host, "port": cfg.serving.port},
        logging_config={"log_level": "INFO" if cfg.verbose else "ERROR", "enable_access_log": cfg.verbose},
    )
    serve.run(application(cfg, what, key, cpus, gpus), name="ftray")
    stop = threading.Event()
    # only now: Ray puts a handler of its own
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    host = f"[{cfg.serving.host}]" if ":" in cfg.serving.host else cfg.serving.host
    print(f"serving {', '.join([what.base, *what.adapters])}")
    print(f"endpoint http://{host}:{cfg.serving.port}/v1", flush=True)
    stop.wait()
    print("draining", flush=True)
    serve.shutdown()
    return 0


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
