"""Find saved adapters, and check that they fit a base model, without loading its weights or a GPU."""

import atexit
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from ftray.adapters.peft_config import wrong_field
from ftray.config import Config, DataConfig
from ftray.errors import UserError, near
from ftray.models.find import find, is_hub_id
from ftray.models.stored import as_stored
from ftray.storage.location import parse_location, reason
from ftray.storage.manifest import check
from ftray.task_spec import CAUSAL, CHAT, FILE, RAW, TaskSpec

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase

INSIDE = ("best/adapter", "adapter")  # where a search, a training run and a checkpoint have it
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model."
MERGED_BASE, START = "base", "start"  # in an output: the base that its adapters are for, and what was merged into it
SAMPLE = 2**20  # bytes at the end of a weight file that identify a model


def find_adapter(name: str, with_weights: bool = True) -> Path:
    """The adapter directory `name`, or the one inside it if `name` is an output of `tune` or `train`.

    An adapter at a URI is copied to a temporary directory, which is removed when this process ends.

    Args:
        name: path or URI.
        with_weights: whether it must hold weights.

    Raises:
        UserError: there is no adapter, it is damaged, or it has no weights.
    """
    if "://" in name:
        return _copied(name)
    path = Path(name)
    for place in (path, *(path / inside for inside in INSIDE)):
        if (place / CONFIG).is_file():
            check(place, f"adapter {place}")
            if with_weights and not _weights(place):
                raise UserError(f"adapter {place}: holds no weights ({WEIGHTS}safetensors)")
            return place
    if path.is_dir():
        if (path / "config.json").is_file():
            raise UserError(f"adapter {name}: is a whole model, not an adapter: give it as --model")
        raise UserError(f"adapter {name}: the directory holds no {CONFIG}, nor does {' or '.join(INSIDE)} in it")
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    hint = near(path.name, siblings, otherwise="", likeness=0.6, shown=lambda sibling: path.parent / sibling)
    raise UserError(f"adapter {name}: no such directory{hint}")


def _settings_above(uri: str) -> bytes | None:
    """The `config.yaml` of the output at `uri`, or of the one that an adapter there lies in."""
    store, _, inside = uri.partition("://")
    steps = inside.rstrip("/").split("/")
    for up in range(min(5, len(steps))):
        try:
            settings = parse_location(f"{store}://{'/'.join(steps[: len(steps) - up])}") / "config.yaml"
            if settings.is_file() and (found := settings.read_bytes()) and (not up or b"\ntraining:" in found):
                return found
        except (OSError, UserError):  # of a directory above, which may be another's
            if not up:
                raise
            break
    return None


@lru_cache
def _copied(uri: str) -> Path:
    for inside in ("", *INSIDE):
        source = parse_location(uri) / inside
        try:
            if not (source / CONFIG).is_file():
                continue
            directory = Path(tempfile.mkdtemp(prefix="ftray-adapter-"))
            atexit.register(shutil.rmtree, directory, ignore_errors=True)
            if settings := _settings_above(uri):  # see data_settings
                (directory / "config.yaml").write_bytes(settings)
            with source.as_local_dir() as local:
                return Path(shutil.copytree(local, directory / (inside or "adapter")))
        except OSError as error:
            raise UserError(f"adapter {uri}: can't be read ({reason(error)})") from None
    raise UserError(f"adapter {uri}: holds no {CONFIG}, nor does {' or '.join(INSIDE)} in it")


def adapter_config(adapter: Path) -> "PeftConfig":
    """The adapter's `peft.PeftConfig`.

    Raises:
        UserError: the installed PEFT can't read it, or a value in it is of a wrong type.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig

    try:
        given = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
        kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(given.get("peft_type"))
        if kind and (wrong := wrong_field(kind, given)):
            raise UserError(f"adapter {adapter}: {CONFIG}: {wrong}")
        return PeftConfig.from_pretrained(str(adapter))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"adapter {adapter}: PEFT can't read its {CONFIG}: {reason(error)}") from None


@contextmanager
def refuse_settings(adapter: str | Path) -> Iterator[None]:
    """Inside, PEFT loads `adapter`: it checks some settings, as how weights begin, only with the base's at hand.

    Raises:
        UserError: it can't apply them.
    """
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, NotImplementedError) as error:
        raise UserError(f"adapter {adapter}: PEFT can't apply its {CONFIG}: {reason(error)}") from None


def added_by(adapter: Path) -> int:
    """Tokens that an adapter puts before a text."""
    return getattr(adapter_config(adapter), "num_virtual_tokens", None) or 0


def weightless_config(adapter: Path) -> "PeftConfig":
    """As :func:`adapter_config`, for a new adapter on a base without weights, with its parameters trainable."""
    config = adapter_config(adapter)
    config.inference_mode = False
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = False  # some initialisations would decompose the missing weights
    return config


def base_of(cfg: Config, adapters: list[Path]) -> str:
    """The base model's directory or hub id: `model.name` if it is given, else the base that the first adapter names.

    Raises:
        UserError: there is no such model, :func:`ftray.models.stored.as_stored` refuses it, or an adapter was made for
            another one.
    """
    if "name" in cfg.model.model_fields_set or not adapters:
        base = find(cfg.model.name)
    else:
        named = adapter_config(adapters[0]).base_model_name_or_path
        try:
            base = find(_moved(adapters[0], named or ""))
        except UserError as error:
            raise UserError(f"adapter {adapters[0]}: its base can't be found ({error}): give --model") from None
    as_stored(cfg.model, base)
    for adapter in adapters:
        _check_base(cfg, adapter, base)
    return base


def _moved(adapter: Path, named: str) -> str:
    """The base `named`; if that is gone, the one that lies in the adapter's output, which was moved."""
    if not named or Path(named).exists() or Path(named).name != MERGED_BASE:
        return named
    outputs = list(adapter.resolve().parents)[:4]  # OUT/adapter, OUT/best/adapter, OUT/tune/trial/checkpoint/adapter
    return next((str(out / MERGED_BASE) for out in outputs if (out / START / CONFIG).is_file()), named)


def saved_task(cfg: Config, adapters: list[Path]) -> TaskSpec:
    """The task of all `adapters`, with the objective of `cfg.task` where it names one; without adapters, `cfg.task`.

    Raises:
        UserError: they are for different tasks, for another one than `cfg.task`, or one lacks its labels.
    """
    specs = [_task(adapter) for adapter in adapters]
    for adapter, spec in zip(adapters, specs, strict=True):
        if cfg.task != "auto" and TaskSpec.named(cfg.task).name != spec.name:
            raise UserError(f"task {cfg.task}: the adapter {adapter} is for {spec.full_name}")
        if spec.kind != specs[0].kind:
            raise UserError(f"adapter {adapter}: is for another task or other labels than {adapters[0]}")
    if cfg.task == "auto":
        return specs[0] if specs else CAUSAL
    named = TaskSpec.named(cfg.task)
    return replace(specs[0], objective=named.objective) if specs else named


def _task(adapter: Path) -> TaskSpec:
    spec = TaskSpec.read(adapter)
    if spec is None and (name := adapter_config(adapter).task_type or CAUSAL.name) != CAUSAL.name:
        raise UserError(f"adapter {adapter}: is for {name}, but holds no {FILE} as ftray writes it, with its labels")
    return spec or CAUSAL


def data_settings(cfg: Config, trained: Path | None) -> DataConfig:
    """`cfg.data`, with the templates that `trained` was trained with, unless `cfg.data` gives one.

    Args:
        trained: an adapter's directory, or that of a model that one was merged into; None: there is none.

    Raises:
        UserError: its run's `config.yaml` can't be read.
    """
    if trained is None or "template" in cfg.data.model_fields_set:
        return cfg.data
    spec = TaskSpec.read(trained)
    if spec and spec.template is not None:
        template = "auto" if spec.template == CHAT else spec.template
        chat_template = cfg.data.chat_template or spec.chat_template
        return cfg.data.model_copy(update={"template": template, "chat_template": chat_template})
    if not (trained / CONFIG).is_file() and trained.name != "merged":
        return cfg.data  # a model as it came
    for parent in list(trained.resolve().parents)[:3]:  # OUT/adapter, OUT/best/adapter, OUT/train/checkpoint/adapter
        path = parent / "config.yaml"
        if path.is_file():
            try:
                return cfg.data.model_copy(update={"template": yaml.safe_load(path.read_text())["data"]["template"]})
            except (yaml.YAMLError, ValueError, KeyError, TypeError):
                raise UserError(f"{path}: not the config.yaml of a run: give --data.template") from None
    return cfg.data.model_copy(update={"template": RAW})  # of before there was another one


def check_chat_template(trained: Path, data: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse to ask in plain words what was trained by a chat template.

    Args:
        trained: as for :func:`data_settings`, which gave `data`.
        tokenizer: with the template that `data` names.

    Raises:
        UserError: that template is gone.
    """
    spec = TaskSpec.read(trained)
    if spec and spec.template == CHAT and data.template == "auto" and not tokenizer.chat_template:
        raise UserError(
            f"adapter {trained}: by a chat template, which the tokenizer of {tokenizer.name_or_path} lacks, it was "
            "trained: give it by --data.chat_template, or --data.template"
        )


def _check_base(cfg: Config, adapter: Path, base: str) -> None:
    named = adapter_config(adapter).base_model_name_or_path or base
    if _known_to_differ(named, base):
        raise UserError(f"adapter {adapter}: was made for another base, {named}, not for {base}")
    if _weights(adapter) and (mismatch := _mismatch(cfg, adapter, base)):
        raise UserError(f"adapter {adapter}: was made for another base than {base}: {mismatch}")


def _weights(adapter: Path) -> bool:
    return any(adapter.glob(f"{WEIGHTS}*"))


def same_base(named: str, base: str) -> bool:
    """Whether `named` and `base` are the same model: by their weights if both are directories here, else by name."""
    here, there = Path(base), Path(named)
    if here.is_dir() and there.is_dir():
        return samples(here) == samples(there)
    return here.name == there.name


def _known_to_differ(named: str, base: str) -> bool:
    """Whether the weights surely differ; a base that was moved or renamed may be the same one."""
    if Path(base).is_dir() and Path(named).is_dir():
        return not same_base(named, base)
    return is_hub_id(named) and not Path(base).exists() and named != base


def samples(model: Path) -> list[tuple[int, str]]:
    """Size and digest of the end of each weight file, which quickly tell models of equal shape apart."""
    found = []
    for path in sorted([*model.glob("*.safetensors"), *model.glob("*.bin")]):
        size = path.stat().st_size
        with open(path, "rb") as file:
            file.seek(max(0, size - SAMPLE))
            found.append((size, hashlib.sha256(file.read()).hexdigest()))
    return found


def _mismatch(cfg: Config, adapter: Path, base: str) -> str | None:
    """Why PEFT can't load the adapter into the base's architecture, on the meta device; None: it can."""
    import torch
    from peft import get_peft_model, load_peft_weights, set_peft_model_state_dict

    from ftray.models.load import load_skeleton

    config, skeleton = weightless_config(adapter), load_skeleton(cfg.model, base, _task(adapter)).model
    config.inference_mode = config.is_prompt_learning  # what a prompt's encoder gave is saved, not the encoder
    try:
        with torch.device("meta"):
            model = get_peft_model(skeleton, config)
    except Exception as error:  # PEFT does not check the settings, and raises whatever a wrong one leads to
        return f"PEFT can't apply its {CONFIG} there: {type(error).__name__}: {reason(error)}"
    try:
        result = set_peft_model_state_dict(model, load_peft_weights(str(adapter), device="cpu"))
    except Exception as error:  # a KeyError, of tensors that are not there
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return next((line for line in lines if "size mismatch" in line), lines[0])
    if config.is_prompt_learning:  # PEFT has raised if it lacked one, and names its parts by other words
        given, wanted = getattr(config, "num_transformer_submodules", None), 1 + (_task(adapter).name == "SEQ_2_SEQ_LM")
        return None if given in (None, wanted) else f"num_transformer_submodules is {given}, and not {wanted}"
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    missing = [name for name in result.missing_keys if name in trained]
    for names, what in ((missing, "it has nothing for"), (result.unexpected_keys, "the base has no place for")):
        if names:
            return f"{what} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    return None
