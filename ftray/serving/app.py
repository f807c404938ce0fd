"""The Ray Serve application: an endpoint in front of replicas, made from the configuration."""

from typing import Any

from ray import serve

from ftray.config import Config, config_from
from ftray.errors import UserError
from ftray.serving.catalog import Catalog, find_catalog, model_of_run
from ftray.serving.key import LOOPBACK, digest_of, find_key


def key_digest(cfg: Config) -> str | None:
    """SHA-256 of the API key, hexadecimal, so that the key itself is not passed on; None: no key is needed.

    Raises:
        UserError: its file can't be read or is empty, or there is no key where other machines can connect.
    """
    if key := find_key(cfg.serving.api_key_file, "serving.api_key_file"):
        return digest_of(key)
    if cfg.serving.host not in LOOPBACK and not cfg.serving.anonymous:
        raise UserError(
            f"serving.host {cfg.serving.host}: others could ask without a key: set FTRAY_API_KEY or "
            "--serving.api_key_file, or say --serving.anonymous true"
        )
    return None


def application(cfg: Config, catalog: Catalog, key: str | None, cpus: float, gpus: float) -> serve.Application:
    """The application.

    Args:
        key: SHA-256 of the API key; None: no key is needed.
        cpus: that each replica reserves.
        gpus: that each replica reserves.
    """
    from ftray.serving.pooling import PoolingReplica
    from ftray.serving.replica import Replica

    s = cfg.serving
    options = {
        "max_ongoing_requests": max(4 * s.slots, s.max_queue),  # the engine has a queue of its own
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
    replicas: serve.Application
    if s.engine == "vllm":
        from ftray.serving import vllm

        replicas = vllm.vllm_replica(cfg, catalog, options)
    else:
        generates = catalog.task.name == "CAUSAL_LM"
        actor = {"num_cpus": cpus, "num_gpus": gpus}
        deployment: Any = serve.deployment(
            Replica if generates else PoolingReplica, name="replica", ray_actor_options=actor, **options
        )
        task = () if generates else (catalog.task,)
        replicas = deployment.bind(cfg.model_dump(), catalog.model_path, max(1, int(cpus)), *task)
    return endpoint(cfg, catalog, key, replicas)


def endpoint(cfg: Config, catalog: Catalog, key: str | None, replicas: serve.Application) -> serve.Application:
    """The HTTP endpoint in front of `replicas`."""
    from ftray.serving.api.app import create_app
    from ftray.serving.api.endpoint import Endpoint

    s = cfg.serving
    deployment: Any = serve.deployment(
        serve.ingress(lambda: create_app(key, s.max_body_bytes))(Endpoint),  # made in the replica
        name="endpoint",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=4 * s.max_queue,  # more are refused by the router, with 429
        graceful_shutdown_timeout_s=s.drain_seconds,
    )
    return deployment.bind(cfg.model_dump(), catalog.base, catalog.adapters, replicas, catalog.task.name)


def check_catalog(cfg: Config) -> Catalog:
    """What is to be served.

    Raises:
        UserError: something is missing or does not fit, or the engine can't serve it.
    """
    catalog = find_catalog(cfg)
    if cfg.serving.engine == "vllm":
        from ftray.serving import vllm  # imports PEFT and torch, as no other engine needs here

        vllm.check(cfg, catalog)
    return catalog


def build(args: dict[str, Any]) -> serve.Application:
    """For `serve deploy`: `args` are the configuration's sections (see docs/configuration.md)."""
    from ftray.runtime.cluster import gpus_per_worker

    cfg = model_of_run(config_from(args))
    cpus, gpus = cfg.scaling.cpus_per_worker or 1, gpus_per_worker(cfg)
    return application(cfg, check_catalog(cfg), key_digest(cfg), cpus, gpus)
