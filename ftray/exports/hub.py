"""A repository on the hub: the adapter or the merged model, with a model card, read back from where it was pushed."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftray.adapters.discovery import CONFIG, adapter_config
from ftray.config import Config
from ftray.data.sources import hub_dataset
from ftray.errors import UserError
from ftray.exports.proof import ExportFailed, Proof
from ftray.exports.source import Source
from ftray.models.find import bundled_at, is_hub_id
from ftray.storage.location import reason
from ftray.storage.manifest import MANIFEST

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

CARD, LICENCE_FILES = "README.md", ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")


def check(source: Source) -> None:
    """Find what the card needs, and, unless it is a dry run, whether the hub knows who pushes.

    Raises:
        UserError: the base has no name or licence, there is no repository's name, or the hub says no.
    """
    export = source.cfg.export
    if export.repo is None:
        raise UserError("export: --to hub needs --repo OWNER/NAME")
    if export.form == "adapter" and base_id(source) is None:
        raise UserError(
            f"export: the base {source.base} lies on this machine alone: name its hub id by --export.base_model "
            "OWNER/NAME, or push the merged model: --form model"
        )
    licence(source)
    if not export.dry_run:
        from huggingface_hub import HfApi

        with _hub_errors():
            HfApi().whoami()


def base_id(source: Source) -> str | None:
    """The hub id of the base; None: it has none that is known."""
    if given := source.cfg.export.base_model or (source.base if is_hub_id(source.base) else None):
        return given
    bundled = bundled_at(source.base)
    return bundled.hub_id if bundled and source.cfg.export.form == "model" else None


def licence(source: Source) -> str:
    """The licence of the base: as given, as its model card says, or as that of the hub does.

    Raises:
        UserError: nobody says.
    """
    export, card = source.cfg.export, Path(source.base) / CARD
    if export.licence:
        return export.licence
    found: object = None
    if bundled := bundled_at(source.base):
        found = bundled.licence
    elif card.is_file():
        from huggingface_hub import metadata_load

        found = (metadata_load(card) or {}).get("license")
    elif name := base_id(source):
        from huggingface_hub import HfApi

        with _hub_errors():
            data: Any = HfApi().model_info(name).card_data
        found = data and data.get("license")
    if not isinstance(found, str):
        raise UserError(
            f"export: the base {source.base} says nothing of its licence, which what is made of it is under: give "
            "--export.licence, as apache-2.0"
        )
    return found


def write(source: Source, target: Path) -> None:
    """Copy the adapter, for whoever has its base from the hub, to the directory `target`."""
    ignored = shutil.ignore_patterns(f"{MANIFEST}*", CARD)
    shutil.copytree(source.adapter, target, ignore=ignored, dirs_exist_ok=True)
    config = json.loads((target / CONFIG).read_text(encoding="utf-8")) | {"base_model_name_or_path": base_id(source)}
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_licence(source: Source, target: Path) -> None:
    """Copy the texts that the base's licence may ask to be passed on."""
    for name in LICENCE_FILES:
        if (file := Path(source.base) / name).is_file():
            shutil.copy(file, target / name)


def card(source: Source, proof: Proof) -> str:
    """The README.md: a model card of the hub, with what was measured on what is pushed as its model index."""
    from huggingface_hub import ModelCard

    cfg, task = source.cfg, source.task.load()
    kind = "adapter" if cfg.export.form == "adapter" else "model"
    base = base_id(source)
    lines = [
        f"# {_title(source)}",
        "",
        f"A fine-tuned {kind}" + (f" of [{base}](https://huggingface.co/{base})" if base else "") + ", made by ftray "
        f"with {_method(source)}, trained on `{_data(cfg)}`.",
        "",
        f"On {proof.records} records that training never saw, measured on the files in this repository:",
        "",
        "| metric | value |",
        "| --- | --- |",
        *(f"| {name} | {metric['best']:.4f} |" for name, metric in proof.metrics.items()),
        "",
        "```python",
        *_usage(source, task.auto_class),
        "```",
    ]
    header = _card_data(source, proof).to_yaml()
    return str(ModelCard(f"---\n{header}\n---\n" + "\n".join(lines) + "\n"))


def push(directory: Path, source: Source) -> str:
    """Push `directory` as one commit, and read it back; returns the address of the repository.

    Raises:
        UserError: the hub says no.
        ExportFailed: it returns something else than what was pushed.
    """
    from huggingface_hub import HfApi, snapshot_download

    export, api = source.cfg.export, HfApi()
    assert export.repo is not None  # checked
    with _hub_errors():
        url = api.create_repo(export.repo, private=export.private, exist_ok=True)
        commit = api.upload_folder(repo_id=export.repo, folder_path=directory, commit_message="Export by ftray")
        with tempfile.TemporaryDirectory(prefix="ftray-hub-") as scratch:
            again = Path(snapshot_download(export.repo, revision=commit.oid, cache_dir=scratch))
            for file in sorted(path for path in directory.rglob("*") if path.is_file()):
                name = file.relative_to(directory)
                if not (again / name).is_file() or (again / name).read_bytes() != file.read_bytes():
                    raise ExportFailed(f"what was written to {url} is not what the hub returns: {name} differs")
    return str(url)


@contextmanager
def _hub_errors() -> Iterator[None]:
    """Inside, what the hub refuses is said in one line.

    Raises:
        UserError: instead of an error of huggingface_hub or of the connection.
    """
    from httpx import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LocalTokenNotFoundError:
        raise UserError("export: the hub needs a token: hf auth login, or $HF_TOKEN; or --dry-run") from None
    except OfflineModeIsEnabled:
        raise UserError("export: $HF_HUB_OFFLINE is set: unset it, or --dry-run") from None
    except (HfHubHTTPError, HTTPError) as error:
        raise UserError(f"export: the hub: {reason(error)}") from None


def _card_data(source: Source, proof: Proof) -> "ModelCardData":
    from huggingface_hub import EvalResult, ModelCardData

    cfg, task, adapter = source.cfg, source.task.load(), source.cfg.export.form == "adapter"
    name = hub_dataset(cfg.data.names)
    results = [
        EvalResult(
            task_type=task.pipeline_tag,
            dataset_type=name or _data(cfg),
            dataset_name=name or _data(cfg),
            dataset_split=cfg.evaluation.split,
            metric_type=metric,
            metric_value=values["best"],
        )
        for metric, values in proof.metrics.items()
    ]
    return ModelCardData(
        base_model=base_id(source),
        license=licence(source),
        datasets=[name] if name else None,
        eval_results=results,
        library_name="peft" if adapter else "transformers",
        metrics=list(proof.metrics),
        model_name=_title(source),
        pipeline_tag=task.pipeline_tag,
        tags=["ftray", _method(source)],
    )


def _title(source: Source) -> str:
    return str(source.cfg.export.repo).rpartition("/")[2]


def _method(source: Source) -> str:
    kind = adapter_config(source.adapter).peft_type
    return str(getattr(kind, "value", kind)).lower()


def _data(cfg: Config) -> str:
    return Path(cfg.data.names).name


def _usage(source: Source, kind: str) -> list[str]:
    repo, labels = source.cfg.export.repo, ""
    if source.task.labels:
        labels = f", num_labels={len(source.task.labels)}"
    if source.cfg.export.form == "model":
        return [f"from transformers import {kind}", "", f'model = {kind}.from_pretrained("{repo}")']
    return [
        "from peft import PeftModel",
        f"from transformers import {kind}",
        "",
        f'base = {kind}.from_pretrained("{base_id(source)}"{labels})',
        f'model = PeftModel.from_pretrained(base, "{repo}")',
    ]
