"""Supervised tokens a second of one LoRA run on real records of varying length, beside `transformers.Trainer` + PEFT.

    python -m benchmarks.step [--quick]

Both start from the same base and adapter weights in the same precision, see the same records of the CMU Pronouncing
Dictionary in the same order and batches, and must come to the same held-out loss. Loading the model, and scoring it
at the end, are not timed.
"""

import sys
import tempfile
from collections.abc import Callable
from itertools import islice
from typing import Any

from benchmarks.measure import compare, parser
from benchmarks.search import prepare, shards
from benchmarks.side import Timed

LORA = {"rank": 16, "alpha": 32, "dropout": 0.0, "learning_rate": 1e-3}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NOISE = 0.02  # of the held-out loss: bfloat16 sums in another order


def main() -> int:
    made = parser("step", __doc__)
    made.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto")
    made.add_argument("--records", type=int, default=300, help="of which a tenth each is for validation and test")
    made.add_argument("--runs", type=int, default=7, help="of each side, after one to warm up")
    made.add_argument("--quick", action="store_true", help="100 records, two runs of each")
    args = made.parse_args()
    records, runs = (100, 2) if args.quick else (args.records, args.runs)
    with tempfile.TemporaryDirectory() as cache:
        prepare(cache, records)
        directory = shards(cache)
        batches, supervised = micro_batches(directory)
        print(f"{supervised} supervised tokens, {len(batches)} steps", flush=True)
        given = {"directory": directory, "dtype": args.dtype}
        ours, peer = compare("step", given, supervised, "supervised tokens/s", runs, args.busy)
    if abs(ours["loss"] / peer["loss"] - 1) > NOISE:
        print("the held-out losses differ by more than noise: not the same run", file=sys.stderr)
        return 1
    return 0


def micro_batches(directory: str) -> tuple[list[dict[str, Any]], int]:
    """Those of an epoch, but for what fills no batch, and how many supervised tokens they have."""
    from benchmarks import usual
    from ftray.data import TokenizedData
    from ftray.data.loader import batches

    data = TokenizedData.load(directory)
    found = list(islice(batches(data, 0, 0, usual.BATCH), data.splits["train"].records // usual.BATCH))
    return found, sum(int((batch["labels"] != -100).sum()) for batch in found)


def peer_trainer(directory: str, dtype: str) -> Callable[[], Any]:
    """A function that makes the usual trainer anew, for the records of ours in their order."""
    import torch
    import transformers

    from benchmarks import usual
    from ftray.config import ModelConfig
    from ftray.data import TokenizedData
    from ftray.models.find import find
    from ftray.models.load import choose_dtype, load_tokenizer
    from ftray.multi_adapter.shared_model import share

    transformers.logging.set_verbosity_error()
    path = find("smollm2-135m")
    base, tokenizer = usual.load(path, choose_dtype(ModelConfig(dtype=dtype))), load_tokenizer(path)
    columns = ("input_ids", "labels")
    held = [{k: row[k] for k in columns} for row in TokenizedData.load(directory).rows("validation")]
    rows = [row for batch in micro_batches(directory)[0] for row in _records(batch)]

    def make() -> Any:
        torch.manual_seed(0)
        return usual.trainer(share(base), LORA | {"target_modules": TARGETS}, rows, held, tokenizer)

    return make


def ours(directory: str, dtype: str) -> Timed:
    """A pack of one trial."""
    from benchmarks import usual
    from ftray.config import AdapterConfig, ModelConfig, TrainingConfig
    from ftray.models.find import find
    from ftray.training.pack_trainer import PackTrainer
    from ftray.training.run_spec import RunSpec

    path, model = find("smollm2-135m"), ModelConfig(dtype=dtype)
    pack, batches, scorer = PackTrainer(model, path), micro_batches(directory)[0], peer_trainer(directory, dtype)
    settings = TrainingConfig(batch_size=usual.BATCH, learning_rate=LORA["learning_rate"])
    adapter = {k: LORA[k] for k in ("rank", "alpha", "dropout")} | {"target_modules": TARGETS}
    run = RunSpec(model, path, AdapterConfig(method="lora", **adapter), settings, len(batches))
    losses: list[float] = []

    def start() -> None:
        pack.join("run", run)
        pack.trials["run"].batches = iter(batches)

    def train() -> None:
        for _ in batches:
            pack.step(["run"])

    def end() -> None:
        trainer = scorer()
        trainer.model = pack.pack.adapters["run"].model
        losses.append(usual.held_out_loss(trainer))
        pack.leave("run")

    return Timed(train, start, end, lambda: {"loss": losses[-1]})


def peer(directory: str, dtype: str) -> Timed:
    """The usual trainer."""
    from benchmarks import usual

    make, losses = peer_trainer(directory, dtype), list[float]()
    trainer = None

    def start() -> None:
        nonlocal trainer
        trainer = make()

    def end() -> None:
        losses.append(usual.held_out_loss(trainer))

    return Timed(lambda: trainer.train(), start, end, lambda: {"loss": losses[-1]})


def _records(batch: dict[str, Any]) -> list[dict[str, list[int]]]:
    """The records that lie one after another in a packed row."""
    starts = (batch["position_ids"][0] == 0).nonzero().squeeze(1).tolist()
    ends = [*starts[1:], batch["labels"].shape[1]]
    columns = ("input_ids", "labels")
    return [{k: batch[k][0, a:b].tolist() for k in columns} for a, b in zip(starts, ends, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
