"""Pairs a second of DPO trials that train in a pack, beside TRL's `DPOTrainer`, one run a trial, one after another.

    python -m benchmarks.preference            # 8 LoRA trials on SmolLM2-135M, in the precision that ftray picks here
    python -m benchmarks.preference --quick

Both sides have the same pairs in the same order and batches, the same base in the same precision, and adapters that
start from the same weights, and must come to the same training loss. Loading the model, tokenization, and making
adapters and trainers are not timed. Ours begins with what the base says of all answers, as a search does; TRL runs the
base in each step, with the adapter switched off.
"""

import json
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.measure import compare, parser
from benchmarks.side import Timed

RANKS = (4, 8, 16, 32)
BETAS = (0.1, 0.3)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH = 8  # pairs a step
RATE = 1e-4
NOISE = 0.03  # of the training loss: bfloat16 sums in another order
RECORDS = Path(__file__).parents[1] / "examples" / "preferences.py"


def main() -> int:
    made = parser("preference", __doc__)
    made.add_argument("--trials", type=int, default=8, metavar="K")
    made.add_argument("--steps", type=int, default=3, help=f"of each trial, {BATCH} pairs each")
    made.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto")
    made.add_argument("--quick", action="store_true", help="one run of each instead of two, and none to warm up")
    args = made.parse_args()
    print(f"{args.trials} trials of {args.steps} steps of {BATCH} pairs, LoRA of ranks {RANKS} on all linear layers")
    with tempfile.TemporaryDirectory() as directory:
        given = {"trials": args.trials, "steps": args.steps, "dtype": args.dtype, "directory": directory}
        work = args.trials * args.steps * BATCH
        runs = 0 if args.quick else 2
        ours, peer = compare("preference", given, work, "pairs/s", runs, args.busy)
    apart = max(abs(a / b - 1) for a, b in zip(ours["losses"], peer["losses"], strict=True))
    if apart > NOISE:
        print(f"the training losses differ by {apart:.1%}: not the same runs", file=sys.stderr)
        return 1
    return 0


def settings(trial: int) -> tuple[int, float]:
    """Rank and beta of a trial."""
    return RANKS[trial % len(RANKS)], BETAS[trial % len(BETAS)]


def tokenized(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that ftray makes of pairs."""
    from ftray.config import DataConfig
    from ftray.models.find import find
    from ftray.models.load import load_tokenizer
    from ftray.task_spec import TaskSpec

    task = TaskSpec.named("DPO").load()
    examples = [task.parse(pair, "pairs.jsonl") for pair in pairs]
    return [vars(row) for row in task.tokenize(examples, load_tokenizer(find("smollm2-135m")), DataConfig()) if row]


def ours(trials: int, steps: int, dtype: str, directory: str) -> Timed:
    """A pack; the weights from which its adapters start go into `directory`."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    from ftray.config import AdapterConfig, ModelConfig, TrainingConfig
    from ftray.data.shards import REFERENCE
    from ftray.models.find import find
    from ftray.search.reference import log_probabilities
    from ftray.task_spec import TaskSpec
    from ftray.training.pack_trainer import PackTrainer
    from ftray.training.run_spec import RunSpec

    path, model, spec = find("smollm2-135m"), ModelConfig(dtype=dtype), TaskSpec.named("DPO")
    task, rows, pack = spec.load(), tokenized(records(steps * BATCH)), PackTrainer(model, path, task=spec)
    names = [str(trial) for trial in range(trials)]
    losses: list[float] = []

    def start() -> None:
        for name in names:
            rank, beta = settings(int(name))
            adapter = AdapterConfig(method="lora", rank=rank, alpha=16, dropout=0.0, target_modules=TARGETS)
            training = TrainingConfig(batch_size=BATCH, learning_rate=RATE, beta=beta)
            pack.join(name, RunSpec(model, path, adapter, training, steps, task=spec))
            own = get_peft_model_state_dict(pack.pack.adapters[name].model)
            save_file({key: value.contiguous() for key, value in own.items()}, f"{directory}/{name}.safetensors")

    def train() -> None:
        known = log_probabilities(pack.pack, rows)
        compared = [row | {REFERENCE: own} for row, own in zip(rows, known, strict=True)]
        batches = [
            task.collate({column: [row[column] for row in compared[at : at + BATCH]] for column in task.columns})
            for at in range(0, len(compared), BATCH)
        ]
        for name in names:
            pack.trials[name].batches = iter(batches)
        for _ in range(steps):
            pack.step(names)

    def end() -> None:
        losses[:] = [sum(pack.trials[name].history.losses) / steps for name in names]
        for name in names:
            pack.leave(name)

    return Timed(train, start, end, lambda: {"losses": losses})


def peer(trials: int, steps: int, dtype: str, directory: str) -> Timed:
    """Trainers of TRL, whose adapters start from the weights that ours have left in `directory`."""
    import datasets
    import transformers
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    from benchmarks import usual
    from ftray.config import ModelConfig
    from ftray.models.find import find
    from ftray.models.load import choose_dtype, load_tokenizer
    from ftray.multi_adapter.shared_model import share

    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    path = find("smollm2-135m")
    base, tokenizer = usual.load(path, choose_dtype(ModelConfig(dtype=dtype))), load_tokenizer(path)
    pairs = records(steps * BATCH)
    rows = tokenized(pairs)
    trainers: list[Any] = []
    losses: list[float] = []

    def start() -> None:
        trainers.clear()
        for trial in range(trials):
            trainers.append(trainer(share(base), *settings(trial), pairs, tokenizer))
            set_peft_model_state_dict(trainers[-1].model, load_file(f"{directory}/{trial}.safetensors"))
        for row, own in zip(rows, trainers[0].train_dataset, strict=True):
            assert row["input_ids"] == own["prompt_ids"] + own["chosen_ids"] + own["prompt_ids"] + own["rejected_ids"]

    def train() -> None:
        losses[:] = [own.train().training_loss for own in trainers]

    return Timed(train, start, found=lambda: {"losses": losses})


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
        warmup_steps=usual.warmup(len(pairs)),
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
