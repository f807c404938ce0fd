"""Pairs a second of DPO trials that train in a pack, beside TRL's `DPOTrainer`, one run a trial, one after another.

    python -m benchmarks.preference            # 8 LoRA trials on SmolLM2-135M, in the precision that ftray picks here
    python -m benchmarks.preference --quick

Both sides have the same pairs in the same order and batches, the same base in the same precision, and adapters that
start from the same weights, and must come to the same training loss. Loading the model, tokenization, and making
adapters and trainers are not timed. Ours begins with what the base says of all answers, as a search does; TRL runs the
base in each step, with the adapter switched off.
"""

import argparse
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.measure import compare

RANKS = (4, 8, 16, 32)
BETAS = (0.1, 0.3)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH = 8  # pairs a step
RATE = 1e-4
NOISE = 0.03  # of the training loss: bfloat16 sums in another order
RECORDS = Path(__file__).parents[1] / "examples" / "preferences.py"


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.preference", description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=8, metavar="K")
    parser.add_argument("--steps", type=int, default=3, help=f"of each trial, {BATCH} pairs each")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--quick", action="store_true", help="one run of each instead of two")
    args = parser.parse_args()
    import datasets
    import torch
    import transformers
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    from benchmarks import usual
    from ftray.config import AdapterConfig, DataConfig, ModelConfig, TrainingConfig
    from ftray.data.shards import REFERENCE
    from ftray.models.find import find
    from ftray.models.load import choose_dtype, load_tokenizer
    from ftray.multi_adapter.shared_model import share
    from ftray.search.reference import log_probabilities
    from ftray.task_spec import TaskSpec
    from ftray.training.pack_trainer import PackTrainer
    from ftray.training.run_spec import RunSpec

    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    path, model, spec = find("smollm2-135m"), ModelConfig(dtype=args.dtype), TaskSpec.named("DPO")
    tokenizer, task = load_tokenizer(path), spec.load()
    pairs = records(args.steps * BATCH)
    examples = [task.parse(pair, "pairs.jsonl") for pair in pairs]
    rows = [vars(row) for row in task.tokenize(examples, tokenizer, DataConfig()) if row]
    pack, base = PackTrainer(model, path, task=spec), usual.load(path, choose_dtype(model))
    names = [str(i) for i in range(args.trials)]
    ranks, betas = ([values[i % len(values)] for i in range(args.trials)] for values in (RANKS, BETAS))
    print(
        f"{args.trials} trials of {args.steps} steps of {BATCH} pairs, {sum(len(row['input_ids']) for row in rows)} "
        f"tokens, LoRA of ranks {RANKS} on all linear layers, base {base.dtype}"
    )
    starts: dict[str, dict[str, torch.Tensor]] = {}
    losses: dict[str, list[float]] = {"ours": [], "peer": []}
    peers: list[Any] = []

    def start_ours() -> None:
        for name, rank, beta in zip(names, ranks, betas, strict=True):
            adapter = AdapterConfig(method="lora", rank=rank, alpha=16, dropout=0.0, target_modules=TARGETS)
            settings = TrainingConfig(batch_size=BATCH, learning_rate=RATE, beta=beta)
            pack.join(name, RunSpec(model, path, adapter, settings, args.steps, task=spec))
            own = get_peft_model_state_dict(pack.pack.adapters[name].model)
            starts[name] = {key: value.clone() for key, value in own.items()}

    def ours() -> None:
        known = log_probabilities(pack.pack, rows)
        compared = [row | {REFERENCE: own} for row, own in zip(rows, known, strict=True)]
        batches = [
            task.collate({column: [row[column] for row in compared[at : at + BATCH]] for column in task.columns})
            for at in range(0, len(compared), BATCH)
        ]
        for name in names:
            pack.trials[name].batches = iter(batches)
        for _ in range(args.steps):
            pack.step(names)

    def end_ours() -> None:
        losses["ours"] = [sum(pack.trials[name].history.losses) / args.steps for name in names]
        for name in names:
            pack.leave(name)

    def start_peer() -> None:
        peers.clear()
        launched = os.environ.pop("LOCAL_RANK")  # set for DeepSpeed; Accelerate would synchronise with no other process
        for name, rank, beta in zip(names, ranks, betas, strict=True):
            peers.append(trainer(share(base), rank, beta, pairs, tokenizer))
            set_peft_model_state_dict(peers[-1].model, starts[name])
        os.environ["LOCAL_RANK"] = launched
        for row, own in zip(rows, peers[0].train_dataset, strict=True):
            assert row["input_ids"] == own["prompt_ids"] + own["chosen_ids"] + own["prompt_ids"] + own["rejected_ids"]

    def peer() -> None:
        losses["peer"] = [own.train().training_loss for own in peers]

    compare(
        "preference",
        ours,
        peer,
        args.trials * args.steps * BATCH,
        "pairs/s",
        1 if args.quick else 2,
        around={"ours": (start_ours, end_ours), "peer": (start_peer, lambda: None)},
        also=lambda: {f"{side}_loss": sum(own) / len(own) for side, own in losses.items()},
    )
    apart = max(abs(a / b - 1) for a, b in zip(losses["ours"], losses["peer"], strict=True))
    if apart > NOISE:
        print(f"the training losses differ by {apart:.1%}: not the same runs", file=sys.stderr)
        return 1
    return 0


def records(number: int) -> list[dict[str, Any]]:
    """The first pairs that the example makes of the CMU Pronouncing Dictionary, as conversations."""
    with subprocess.Popen([sys.executable, str(RECORDS), "pairs"], stdout=subprocess.PIPE, text=True) as made:
        assert made.stdout is not None
        pairs = [json.loads(line) for line in islice(made.stdout, number)]
        made.kill()
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{key: [{"role": role, "content": pair[key]}] for key, role in roles.items()} for pair in pairs]


def trainer(base: Any, rank: int, beta: float, pairs: list[dict[str, Any]], tokenizer: Any) -> Any:
    """TRL's trainer as its documentation shows it, with settings like ours; it goes through `pairs` once, in order."""
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    from benchmarks import usual

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    arguments = DPOConfig(
        output_dir=str(Path("unused")),
        beta=beta,
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_length=None,
        bf16=False,  # as in benchmarks.usual
        gradient_checkpointing=False,  # memory is enough: it would compute every activation twice
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    lora = usual.lora({"rank": rank, "alpha": 16, "dropout": 0.0, "target_modules": TARGETS})
    data = Dataset.from_list(pairs)
    made = InOrder(model=base, args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=lora)
    made.remove_callback(PrinterCallback)
    return made


if __name__ == "__main__":
    sys.exit(main())
