"""Adapters to serve: a directory is checked before it is read, and nothing but tensors is loaded from it."""

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors import safe_open
from transformers import PreTrainedModel

from ftray.adapters.discovery import CONFIG, adapter_config, same_base
from ftray.errors import UserError
from ftray.multi_adapter.shared_model import share
from ftray.storage.manifest import MANIFEST, check
from ftray.task_spec import CAUSAL, FILE, TaskSpec

WEIGHTS = "adapter_model.safetensors"
REWRITES_BASE = ("pissa", "olora", "corda", "loftq")  # initialisations that change the base, which is shared here


@contextmanager
def local_adapter(source: str) -> Iterator[Path]:
    """The adapter in a directory or at a URI (of any store that pyarrow reads) as a local directory.

    Of a URI, only the files that serving needs are copied, and removed at the end.

    Raises:
        UserError: there is none.
    """
    if "://" not in source:
        yield Path(source)
        return
    with tempfile.TemporaryDirectory(prefix="ftray-adapter-") as directory:
        try:
            filesystem, root = pyarrow.fs.FileSystem.from_uri(source)
            there = {info.base_name for info in filesystem.get_file_info(pyarrow.fs.FileSelector(root))}
            for name in (CONFIG, WEIGHTS, *({FILE, f"{MANIFEST}.json"} & there)):
                pyarrow.fs.copy_files(f"{root}/{name}", f"{directory}/{name}", source_filesystem=filesystem)
        except (OSError, ValueError) as error:
            raise UserError(f"adapter {source}: can't be read: {str(error).splitlines()[0]}") from None
        check(Path(directory), f"adapter {source}", partly=True)
        Path(directory, f"{MANIFEST}.json").unlink(missing_ok=True)  # it names files that were not copied
        yield Path(directory)


def check_adapter(directory: Path, base_path: str, spec: TaskSpec = CAUSAL) -> PeftConfig:
    """The adapter's configuration.

    Raises:
        UserError: the adapter is damaged, holds no safetensors, or was not made for `base_path` and `spec`.
    """
    check(directory, f"adapter {directory}")
    if not (directory / CONFIG).is_file():
        raise UserError(f"adapter {directory}: no PEFT adapter: it has no {CONFIG}")
    config = adapter_config(directory)
    if not (directory / WEIGHTS).is_file():
        raise UserError(f"adapter {directory}: has no {WEIGHTS}; other formats can run code and are not read")
    if config.task_type != spec.name:
        raise UserError(f"adapter {directory}: its task is {config.task_type}, not {spec.name}")
    if spec.labels and (TaskSpec.read(directory) or spec).labels != spec.labels:
        raise UserError(f"adapter {directory}: it has other labels than {', '.join(spec.labels)}"[:300])
    init = str(getattr(config, "init_lora_weights", None)).lower()
    if init.startswith(REWRITES_BASE):
        raise UserError(f"adapter {directory}: {init} changes the base's own weights: merge it and serve that model")
    named = config.base_model_name_or_path or base_path
    if not same_base(named, base_path):
        raise UserError(
            f"adapter {directory}: made for the base model {named}, not for {base_path} "
            f"(if they are one model, mend base_model_name_or_path in its {CONFIG})"
        )
    return config


def load_adapter(base: PreTrainedModel, source: str, spec: TaskSpec = CAUSAL) -> tuple[PeftModel, TaskSpec | None]:
    """The adapter in `source` on a :func:`~ftray.multi_adapter.shared_model.share` of the frozen `base`, in float32.

    With it comes the task that was stored in its directory; None: none was.

    Raises:
        UserError: `source` holds no adapter of this base.
    """
    with local_adapter(source) as directory:
        config, trained_as = check_adapter(directory, base.name_or_path, spec), TaskSpec.read(directory)
        try:
            prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "prompt")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of keys that are missing: they are looked for below
                # as if to train it: only so does the model tell which of its parameters are the adapter's
                trained = not config.is_prompt_learning
                model = PeftModel.from_pretrained(
                    share(base), str(directory), config=config, is_trainable=trained, use_safetensors=True
                )
            model = model.to(base.device).eval()
            with torch.inference_mode():
                model(input_ids=torch.tensor([[0, 0]], device=base.device))  # some settings are only used here
        except Exception as error:  # PEFT raises many kinds for a directory that does not fit
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise UserError(
                f"adapter {source}: does not fit {base.name_or_path}: {' '.join(lines[:2])[:300]}"
            ) from None
        with safe_open(directory / WEIGHTS, "pt") as file:
            stored = {key for key in file.keys() if prefix in key}  # noqa: SIM118
    state = get_peft_model_state_dict(model)
    if stray := stored - state.keys():
        raise UserError(
            f"adapter {source}: does not fit {base.name_or_path}: the model has no place for {min(stray)}"[:400]
        )
    if missing := {key for key in state if prefix in key} - stored:
        raise UserError(f"adapter {source}: does not fit {base.name_or_path}: it lacks {min(missing)}"[:400])
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise UserError(f"adapter {source}: its weights are not finite: it has diverged")
    return model, trained_as
