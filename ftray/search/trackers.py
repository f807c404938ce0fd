"""Experiment trackers: Ray's callbacks for TensorBoard, MLflow, Weights & Biases."""

import netrc
import os
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlparse

from ftray.config import Config
from ftray.errors import UserError
from ftray.storage.location import Location, parse_location

PROJECT = "ftray"  # of Weights & Biases, unless WANDB_PROJECT names another


def check_trackers(cfg: Config) -> None:
    """Check the trackers, as far as that needs no Ray.

    Raises:
        UserError: a tracker isn't installed, or has nowhere to write to.
    """
    for name in set(cfg.search.trackers) - {"tensorboard"}:
        if find_spec(name) is None:
            raise UserError(f"search.trackers {name}: not installed: pip install 'ftray[{name}]'")
    if "mlflow" in cfg.search.trackers and not _tracking_uri(parse_location(cfg.output)):
        raise UserError(f"search.trackers mlflow: set MLFLOW_TRACKING_URI: its database can't be in {cfg.output}")
    keyless = os.environ.get("WANDB_MODE") in ("offline", "disabled") or "wandb" not in cfg.search.trackers
    if not keyless and not os.environ.get("WANDB_API_KEY") and not _logged_in():
        raise UserError("search.trackers wandb: no key: wandb login, WANDB_API_KEY, or WANDB_MODE=offline")


def trackers(cfg: Config, output: Location) -> list[Any]:
    """The Tune callbacks that `search.trackers` names; each keeps a run a trial."""
    from ray.tune.logger import JsonLoggerCallback, TBXLoggerCallback  # slow: a check needs none of it

    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # else TensorBoard's could not be left out
    made: list[Any] = [JsonLoggerCallback()]  # Tune reads it when all is over
    if "tensorboard" in cfg.search.trackers:
        made.append(TBXLoggerCallback())
    if "mlflow" in cfg.search.trackers:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        made.append(MLflowLoggerCallback(tracking_uri=_tracking_uri(output), experiment_name=cfg.output))
    if "wandb" in cfg.search.trackers:
        from ray.air.integrations.wandb import WandbLoggerCallback

        made.append(WandbLoggerCallback(project=os.environ.get("WANDB_PROJECT", PROJECT), group=cfg.output))
    return made


def _logged_in() -> bool:
    """Whether `wandb login` has left a key."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _tracking_uri(output: Location) -> str | None:
    if given := os.environ.get("MLFLOW_TRACKING_URI"):
        return given
    database = (output.resolve() / "mlflow.db").local_path
    return f"sqlite:///{database}" if database else None
