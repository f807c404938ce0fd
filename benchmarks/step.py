"""Supervised tokens a second of one LoRA run on real records of varying length, beside `transformers.Trainer` + PEFT.

    python -m benchmarks.step [--quick]

Both start from the same base and adapter weights in the same precision, see the same records of the CMU Pronouncing
Dictionary in the same order and batches, and must come to the same held-out loss. Loading the model, and scoring it
at the end, are not timed.
"""

import argparse
import sys
import tempfile
from itertools import islice
from typing import Any

from benchmarks.measure import compare

LORA = {"rank": 16, "alpha": 32, "dropout": 0.0, "learning_rate": 1e-3}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NOISE = 0.02  # of the held-out loss: bfloat16 sums in another order


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.step", description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--quick", action="store_true", help="three runs of each instead of seven")
    args = parser.parse_args()
    import ray
    import torch
    import transformers

    from benchmarks import usual
    from ftray.config import AdapterConfig, DataConfig, ModelConfig, TrainingConfig
    from ftray.data import prepare
    from ftray.data.loader import batches
    from ftray.models.find import find
    from ftray.models.load import choose_dtype, load_tokenizer
    from ftray.multi_adapter.shared_model import share
    from ftray.training.pack_trainer import PackTrainer
    from ftray.training.run_spec import RunSpec

    transformers.logging.set_verbosity_error()
    path, model = find("smollm2-135m"), ModelConfig(dtype=args.dtype)
    tokenizer = load_tokenizer(path)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as cache:
        data = prepare(DataConfig(source="cmudict", limit=300, seed=1, cache=cache), path)
        ray.shutdown()
        steps = data.splits["train"].records // usual.BATCH
        micro_batches = list(islice(batches(data, 0, 0, usual.BATCH), steps))
        held = [{k: row[k] for k in ("input_ids", "labels")} for row in data.rows("validation")]
    rows = [row for batch in micro_batches for row in _records(batch)]
    supervised = sum(int((batch["labels"] != -100).sum()) for batch in micro_batches)
    pack = PackTrainer(model, path)
    settings = TrainingConfig(batch_size=usual.BATCH, learning_rate=LORA["learning_rate"])
    adapter = {k: LORA[k] for k in ("rank", "alpha", "dropout")} | {"target_modules": TARGETS}
    run = RunSpec(model, path, AdapterConfig(method="lora", **adapter), settings, steps)
    base = usual.load(path, choose_dtype(model))
    print(f"{len(rows)} records, {supervised} supervised tokens, {steps} steps, base {base.dtype}")
    losses: dict[str, list[float]] = {"ours": [], "peer": []}

    def start_ours() -> Any:
        pack.join("run", run)
        pack.trials["run"].batches = iter(micro_batches)

    def ours() -> None:
        for _ in range(steps):
            pack.step(["run"])

    def end_ours() -> None:
        start_peer()
        current[0].model = pack.pack.adapters["run"].model
        losses["ours"].append(usual.held_out_loss(current[0]))
        pack.leave("run")

    current: list[Any] = []

    def start_peer() -> None:
        torch.manual_seed(0)
        current[:] = [usual.trainer(share(base), LORA | {"target_modules": TARGETS}, rows, held, tokenizer)]

    def end_peer() -> None:
        losses["peer"].append(usual.held_out_loss(current[0]))

    compare(
        "step",
        ours,
        lambda: current[0].train(),
        supervised,
        "supervised tokens/s",
        3 if args.quick else 7,
        around={"ours": (start_ours, end_ours), "peer": (start_peer, end_peer)},
        also=lambda: {"ours_loss": losses["ours"][-1], "peer_loss": losses["peer"][-1]},
    )
    if abs(losses["ours"][-1] / losses["peer"][-1] - 1) > NOISE:
        print("the held-out losses differ by more than noise: not the same run", file=sys.stderr)
        return 1
    return 0


def _records(batch: dict[str, Any]) -> list[dict[str, list[int]]]:
    """The records that lie one after another in a packed row."""
    starts = (batch["position_ids"][0] == 0).nonzero().squeeze(1).tolist()
    ends = [*starts[1:], batch["labels"].shape[1]]
    columns = ("input_ids", "labels")
    return [{k: batch[k][0, a:b].tolist() for k in columns} for a, b in zip(starts, ends, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
