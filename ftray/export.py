"""Take an adapter to other tools, and prove it again on what was written."""

import os
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ftray.arguments import Data, Settings, StrPath, command, config_of
from ftray.cli import run_command
from ftray.config import Config
from ftray.errors import RunFailed, UserError

if TYPE_CHECKING:
    from ftray.exports.proof import Proof
    from ftray.storage.location import Location

PROOF_RECORDS = 1000  # as the proof of a search


@dataclass(frozen=True)
class Exported(os.PathLike[str]):
    """What was made of an adapter; it stands for its directory.

    Attributes:
        output: the directory.
        proof: what its answers to the test records have shown.
    """

    output: "Location"
    proof: "Proof"

    def __fspath__(self) -> str:
        return str(self.output)


@command
def export(
    run: StrPath | None = None,
    to: str | None = None,
    *,
    trial: int | None = None,
    adapter: StrPath | None = None,
    precision: str | None = None,
    repo: str | None = None,
    form: str | None = None,
    dry_run: bool | None = None,
    data: "Data | None" = None,
    validation_data: "Data | None" = None,
    test_data: "Data | None" = None,
    model: StrPath | Settings | None = None,
    task: str | None = None,
    split: str | None = None,
    output: StrPath | None = None,
    evaluation: Settings | None = None,
    export: Settings | None = None,
    scaling: Settings | None = None,
    config: Config | StrPath | Settings | None = None,
    verbose: bool | None = None,
) -> Exported:
    """Take an adapter to another tool, and prove it again on what was written.

    Args:
        run: output of a search or training run; its best adapter, or that of `trial`.
        to: `gguf`, `ollama`, `hub`, `vllm`, `mlx-adapter` or `onnx`.
        adapter: a directory, in place of a run.
        data: records for the proof: as of `evaluate`; not given: the test records of the run.
        precision, repo, form, dry_run: of docs/configuration.md; `export` has the other fields of that section.
        output: a directory that is not there yet; not given: `export/` and the format in that of the run.

    Raises:
        UserError: anything the user can mend, before weights are read.
        RunFailed: what was written answers in other words than the adapter, or worse than allowed; nothing is left.
    """
    return _export(config_of("export", locals()))


def _export(cfg: Config) -> Exported:
    from ftray.exports.source import find_source

    if cfg.export.to is None:
        raise UserError("export: give --to gguf, ollama, hub, vllm, mlx-adapter or onnx")
    source = find_source(cfg)
    from ftray.exports.formats import check, output_of

    output = output_of(source, cfg)
    check(source)

    from ftray.data import prepare
    from ftray.exports.formats import export
    from ftray.exports.proof import ExportFailed
    from ftray.exports.source import test_rows
    from ftray.runtime.cluster import connect

    task, settings, begin_ray = source.task, source.cfg, partial(connect, cfg, dashboard=False)
    data = prepare(settings.data, source.base, settings.model.trust_remote_code, task.full_name, task.labels, begin_ray)
    rows = test_rows(source, data, PROOF_RECORDS)
    try:
        proof = export(source, rows, output)
    except ExportFailed as error:
        raise RunFailed(f"nothing is left: {error}") from None
    return Exported(output, proof)


def run(cfg: Config) -> int:
    """The command: leaves the export in `output` (default: export/FORMAT in the output of its run), or on the hub.

    What was written is asked the test records, and its answers and losses are held against those of the adapter itself
    in float32. Full precision must answer in the adapter's words; what a coarser one loses is shown, and written to
    `proof.json`. Where the proof fails, nothing is left, and the exit code is 1.

    Raises:
        UserError: anything the user can mend, before weights are read.
    """
    made = export(config=cfg)
    show(made.proof)
    print(f"export   {made.output}", flush=True)
    return 0


def show(proof: "Proof") -> None:
    """A row a metric: the adapter, what was exported, and the interval of the difference."""
    from rich.table import Table

    from ftray.reports.search import console
    from ftray.reports.words import counted

    table = Table(
        "metric", "adapter", "export", "difference, 95 % interval", title=counted(proof.records, "test record")
    )
    for name, metric in proof.metrics.items():
        table.add_row(name, f"{metric['base']:.4g}", f"{metric['best']:.4g}", _interval(metric))
    console().print(table)
    told = f", {proof.tied} more depart where it held two tokens for equally likely" if proof.tied else ""
    print(f"answers  {proof.equal} of {proof.records} are the adapter's, token for token{told}", flush=True)


def _interval(metric: dict[str, Any]) -> str:
    from ftray.evaluation.intervals import said

    return said(metric, "{:+.4g}".format)


if __name__ == "__main__":
    sys.exit(run_command("export"))
