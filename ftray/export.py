"""Take an adapter to other tools, and prove it again on what was written."""

import sys
from typing import TYPE_CHECKING, Any

from ftray.cli import run_command
from ftray.config import Config
from ftray.errors import UserError

if TYPE_CHECKING:
    from ftray.exports.proof import Proof

PROOF_RECORDS = 1000  # as the proof of a search


def run(cfg: Config) -> int:
    """The command: leaves the export in `output` (default: export/FORMAT in the output of its run), or on the hub.

    What was written is asked the test records, and its answers and losses are held against those of the adapter itself
    in float32. Full precision must answer in the adapter's words; what a coarser one loses is shown, and written to
    `proof.json`. Where the proof fails, nothing is left, and the exit code is 1.

    Raises:
        UserError: anything the user can mend, before weights are read.
    """
    from ftray.runtime.cluster import quiet

    if not cfg.verbose:
        quiet()
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

    connect(cfg, dashboard=False)
    task, settings = source.task, source.cfg
    data = prepare(settings.data, source.base, settings.model.trust_remote_code, task.full_name, task.labels)
    rows = test_rows(source, data, PROOF_RECORDS)
    try:
        proof = export(source, rows, output)
    except ExportFailed as error:
        print(f"ftray export: nothing is left: what was written {error}", file=sys.stderr)
        return 1
    show(proof)
    print(f"export   {output}", flush=True)
    return 0


def show(proof: "Proof") -> None:
    """A row a metric: the adapter, what was exported, and the interval of the difference."""
    from rich.table import Table

    from ftray.reports.search import console

    table = Table("metric", "adapter", "export", "difference, 95 % interval", title=f"{proof.records} test records")
    for name, metric in proof.metrics.items():
        table.add_row(name, f"{metric['base']:.4g}", f"{metric['best']:.4g}", _interval(metric))
    console().print(table)
    told = f", {proof.tied} more depart where it held two tokens for equally likely" if proof.tied else ""
    print(f"answers  {proof.equal} of {proof.records} are the adapter's, token for token{told}", flush=True)


def _interval(metric: dict[str, Any]) -> str:
    low, high = metric["interval"]
    return f"{low:+.4g} to {high:+.4g}"


if __name__ == "__main__":
    sys.exit(run_command("export"))
