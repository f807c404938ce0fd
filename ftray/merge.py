"""Turn an adapter, several, or a sharded ZeRO checkpoint into a plain model or one adapter."""

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ftray.arguments import Settings, StrPath, command, config_of
from ftray.cli import run_command
from ftray.config import Config
from ftray.errors import UserError
from ftray.storage.location import parse_location


@dataclass(frozen=True)
class Merged(os.PathLike[str]):
    """What was made of adapters; it stands for its directory.

    Attributes:
        output: the directory.
        form: `model` or `adapter`.
        difference: between its outputs and the adapter's, as a share of the greatest; None: not compared.
        rounding: what storing it adds to that; None: as above.
    """

    output: Path
    form: str
    difference: float | None = None
    rounding: float | None = None

    def __fspath__(self) -> str:
        return str(self.output)


@command
def merge(
    adapter: StrPath | Sequence[StrPath] | None = None,
    output: StrPath | None = None,
    *,
    model: StrPath | Settings | None = None,
    task: str | None = None,
    weights: Sequence[float] | None = None,
    combination: str | None = None,
    density: float | None = None,
    form: str | None = None,
    merge: Settings | None = None,
    config: Config | StrPath | Settings | None = None,
    verbose: bool | None = None,
) -> Merged:
    """Turn an adapter, several, or a sharded ZeRO checkpoint into a plain model or one adapter.

    Args:
        adapter: directories, or what `train` and `tune` return; one or several.
        output: a directory that is not there yet.
        weights, combination, density, form: of docs/configuration.md; `merge` has the other fields of that section.

    Raises:
        UserError: anything the user can mend, before weights are read.
    """
    return _merge(config_of("merge", locals()))


def _merge(cfg: Config) -> Merged:
    from ftray.adapters.discovery import base_of, find_adapter, saved_task

    output = _output(cfg)
    if not cfg.adapters:
        raise UserError("merge: give --adapter DIR, once or several times")

    # these take seconds to import
    from ftray.adapters.combine import check_combination, combine
    from ftray.adapters.merge import save_merged, save_model
    from ftray.models.find import find
    from ftray.models.load import load_tokenizer
    from ftray.models.stored import as_stored
    from ftray.storage.atomic import atomic_dir
    from ftray.training.checkpoint import adapter_from, is_checkpoint, model_from

    if [name for name in cfg.adapters if is_checkpoint(name) and not _has_adapter(name)]:
        if len(cfg.adapters) > 1 or cfg.merge.form == "adapter" or "name" not in cfg.model.model_fields_set:
            raise UserError(
                f"{cfg.adapters[0]}: a checkpoint without adapter_config.json holds a whole model: "
                "give it alone, with --model and --form model"
            )
        base = find(cfg.model.name)
        as_stored(cfg.model, base)
        tokenizer, task = load_tokenizer(base, cfg.model.trust_remote_code), saved_task(cfg, [])
        save_model(model_from(cfg.model, base, cfg.adapters[0], task), tokenizer, cfg.model, output, task)
        return Merged(output, "model")
    adapters = [find_adapter(name, with_weights=not is_checkpoint(name)) for name in cfg.adapters]
    base, task = base_of(cfg, adapters), saved_task(cfg, adapters)
    if len(adapters) > 1:
        check_combination(cfg, base, adapters, task)
    elif cfg.merge.weights:
        raise UserError("merge.weights: are for several adapters: give --adapter again")

    with tempfile.TemporaryDirectory(prefix=".ftray-merge.", dir=output.parent) as scratch:
        for i, name in enumerate(cfg.adapters):
            if is_checkpoint(name):
                adapters[i] = adapter_from(cfg.model, base, name, adapters[i], task, Path(scratch, str(i)))
        one = combine(cfg, base, adapters, task, Path(scratch, "combined")) if len(adapters) > 1 else adapters[0]
        if cfg.merge.form == "model":
            found = save_merged(cfg.model, base, one, output, task)
            return Merged(output, "model", found["difference"], found["rounding"])
        with atomic_dir(output) as made:
            shutil.copytree(one, made, dirs_exist_ok=True)
            load_tokenizer(base, cfg.model.trust_remote_code, task.chat_template).save_pretrained(made)
        return Merged(output, "adapter")


def run(cfg: Config) -> int:
    """The command: leaves a plain transformers directory in `output`, or, by `--form adapter`, a PEFT directory.

    `--adapter` is a PEFT directory, what `train` or `tune` left, or a checkpoint with DeepSpeed's shards, which are put
    together in one process. The base is `--model`, else the one that the first adapter names; it is read in full
    precision. The model is read again and held against the adapter before it is left: one that does something else is
    refused. Several adapters (LoRA, or IA3 by linear) are combined by PEFT; `--combination cat` is exact.

    Raises:
        UserError: anything the user can mend, before weights are read.
    """
    made = merge(config=cfg)
    if made.difference is not None:
        stored = f", {made.rounding:.2g} more as it is stored" if made.rounding else ""
        print(f"merge: its outputs differ from the adapter's by {made.difference:.2g} of the greatest{stored}")
    print(f"{made.form} {made.output}")
    return 0


def _output(cfg: Config) -> Path:
    if "output" not in cfg.model_fields_set:
        raise UserError("merge: give --output DIR")
    if "://" in cfg.output:
        raise UserError(f"output {cfg.output}: merge writes to a directory: name one, and copy it from there")
    output = Path(cfg.output).absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output {cfg.output}: exists: name another")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output {cfg.output}: can't write there ({error.strerror})") from None
    parse_location(output.parent).check_writable()
    return output


def _has_adapter(name: str) -> bool:
    from ftray.adapters.discovery import find_adapter

    try:
        return bool(find_adapter(name, with_weights=False))
    except UserError:
        return False


if __name__ == "__main__":
    sys.exit(run_command("merge"))
