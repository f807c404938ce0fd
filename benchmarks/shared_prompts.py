"""What it saves that answers to one prompt share its tokens in a packed row, beside the same pack without that.

    python -m benchmarks.shared_prompts            # pairs (DPO) after prompts of 32, 128 and 512 tokens
    python -m benchmarks.shared_prompts --quick    # of 128 alone, one run of each

Both sides make the same steps of 4 LoRA trials on SmolLM2-135M, over random tokens, and come to the same loss.
"""

import sys
from typing import Any

from benchmarks.measure import compare, parser
from benchmarks.side import Timed

TRIALS, PAIRS, ANSWER = 4, 2, 32  # pairs a step of each trial; tokens of an answer
NOISE = 0.01  # of the loss: bfloat16 sums in another order


def main() -> int:
    made = parser("shared_prompts", __doc__)
    made.add_argument("--quick", action="store_true", help="one length, one run of each instead of three")
    args = made.parse_args()
    lengths, runs = ([128], 1) if args.quick else ([32, 128, 512], 3)
    return max(measure(length, runs, args.busy) for length in lengths)


def measure(prompt: int, runs: int, spinning: int) -> int:
    """One length of prompt, tokens; 1 if the two sides did not come to one loss."""
    tokens = PAIRS * (prompt + 2 * ANSWER), PAIRS * 2 * (prompt + ANSWER)
    print(f"{PAIRS} pairs a trial, prompts of {prompt} tokens, answers of {ANSWER}: {tokens[0]} tokens for {tokens[1]}")
    also = {"prompt_tokens": prompt, "fewer_tokens": tokens[1] / tokens[0]}
    work = TRIALS * PAIRS
    sides = compare("shared_prompts", {"prompt": prompt}, work, "pairs/s", runs, spinning, alike=True, also=also)
    apart = abs(sides[0]["loss"] / sides[1]["loss"] - 1)
    if apart > NOISE:
        print(f"the losses differ by {apart:.1%}: not the same step", file=sys.stderr)
        return 1
    return 0


def ours(prompt: int, shares: bool = True) -> Timed:
    """A step of a pack of trials, whose answers to one prompt share its tokens."""
    from ftray.config import AdapterConfig, ModelConfig, TrainingConfig
    from ftray.models.find import find
    from ftray.task_spec import TaskSpec
    from ftray.training.pack_trainer import PackTrainer
    from ftray.training.run_spec import RunSpec

    path, model, spec = find("smollm2-135m"), ModelConfig(), TaskSpec.named("DPO")
    trainer, names = PackTrainer(model, path, task=spec), [str(i) for i in range(TRIALS)]
    trainer.pack.shares_prefixes = shares
    batch = spec.load().collate(pairs(prompt))
    adapter = AdapterConfig(method="lora", rank=16, alpha=16, dropout=0.0, target_modules="all-linear")
    losses: list[float] = []

    def start() -> None:
        for name in names:
            settings = TrainingConfig(batch_size=PAIRS, learning_rate=1e-4)
            trainer.join(name, RunSpec(model, path, adapter, settings, 1, task=spec))
            trainer.trials[name].batches = iter([batch])

    def end() -> None:
        losses.append(sum(trainer.trials[name].history.losses[0] for name in names) / TRIALS)
        for name in names:
            trainer.leave(name)

    return Timed(lambda: trainer.step(names), start, end, lambda: {"loss": losses[-1]})


def peer(prompt: int) -> Timed:
    """The same without that."""
    return ours(prompt, shares=False)


def pairs(prompt: int) -> dict[str, list[Any]]:
    """Columns of `PAIRS` pairs of answers to prompts of random tokens, as `tasks.dpo` collates them."""
    import torch

    draw = torch.Generator().manual_seed(0)
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "lengths": [], "reference": []}
    for _ in range(PAIRS):
        question, *answers = (
            torch.randint(100, 40_000, (n,), generator=draw).tolist() for n in (prompt, ANSWER, ANSWER)
        )
        columns["input_ids"].append([token for answer in answers for token in question + answer])
        columns["labels"].append([label for answer in answers for label in [-100] * prompt + answer])
        columns["lengths"].append([prompt + ANSWER] * 2)
        columns["reference"].append([-300.0, -300.0])
    return columns


if __name__ == "__main__":
    sys.exit(main())
