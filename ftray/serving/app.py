"""The Serve application: an endpoint in front of replicas, made from the configuration."""

import hashlib
import os
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from ftray.config import Config
from ftray.errors import UserError
from ftray.serving.catalog import Catalog, find_catalog, model_of_run


def key_digest(cfg: Config) -> str | None:
    """SHA-256 of the bearer token, which itself goes nowhere; None: there is none.

    Raises:
        UserError: the file can't be read or is empty, or none is given and others than this machine could ask.
    """
    key = os.environ.get("FTRAY_API_KEY", "")
    if cfg.serving.api_key_file:
        try:
            key = Path(cfg.serving.api_key_file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise UserError(f"serving.api_key_file {cfg.serving.api_key_file}: {error.strerror}") from None
        if not key:
            raise UserError(f"serving.api_key_file {cfg.serving.api_key_file}: is empty")
    if key:
        return hashlib.sha256(key.encode()).hexdigest()
    if cfg.serving.host not in ("127.0.0.1", "localhost", "::1") and not cfg.serving.anonymous:
        raise UserError(
            f"serving.host {cfg.serving.host}: others could ask without a key: set FTRAY_API_KEY or "
            "--serving.api_key_file, or say --serving.anonymous true"
        )
    return None


def application(cfg: Config, what: Catalog, key: str | None, cpus: float, gpus: float) -> serve.Application:
    """The application; each replica reserves `cpus` and `gpus`."""
    from ftray.serving import vllm
    from ftray.serving.api.routes import Endpoint
    from ftray.serving.pooling import PoolingReplica
    from ftray.serving.replica import Replica

    s = cfg.serving
    options = {
        "max_ongoing_requests": max(4 * s.slots, s.max_queue),  # the engine keeps its own line
        "autoscaling_config": {
            "min_replicas": s.min_replicas,
            "max_replicas": s.max_replicas,
            "target_ongoing_requests": s.target_ongoing,
            "upscale_delay_s": s.scale_up_seconds,
            "downscale_delay_s": s.scale_down_seconds,
        },
        "graceful_shutdown_timeout_s": s.drain_seconds,
        "health_check_period_s": 5,
    }
    handle: DeploymentHandle
    if s.engine == "vllm":
        handle = vllm.server(cfg, what, options)
    else:
        generates = what.task.name == "CAUSAL_LM"
        actor = {"num_cpus": cpus, "num_gpus": gpus}
        replicas: Any = serve.deployment(
            Replica if generates else PoolingReplica, name="replica", ray_actor_options=actor, **options
        )
        own = () if generates else (what.task,)
        handle = replicas.bind(cfg.model_dump(), what.model_path, max(1, int(cpus)), *own)
    endpoint: Any = serve.deployment(
        Endpoint,
        name="endpoint",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=4 * s.max_queue,  # it refuses what is too much itself, with 429
        graceful_shutdown_timeout_s=s.drain_seconds,
    )
    return endpoint.bind(cfg.model_dump(), what.base, what.adapters, key, handle, what.task.name)


def checked(cfg: Config) -> Catalog:
    """What is to be served, if the engine can.

    Raises:
        UserError: it can't, or something is missing or does not fit.
    """
    from ftray.serving import vllm

    what = find_catalog(cfg)
    if cfg.serving.engine == "vllm":
        vllm.check(cfg, what)
    return what


def build(args: dict[str, Any]) -> serve.Application:
    """For `serve deploy`: `args` are the configuration's sections (see docs/configuration.md)."""
    from ftray import cli
    from ftray.runtime.cluster import gpus_per_worker

    cfg = model_of_run(cli.build(args))
    return application(cfg, checked(cfg), key_digest(cfg), cfg.scaling.cpus_per_worker or 1, gpus_per_worker(cfg))
