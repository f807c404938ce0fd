"""K LoRA adapters of mixed ranks, one record of 64 tokens each: packed, beside the same PEFT models in turn.

    python -m benchmarks.pack                     # K = 8 on SmolLM2-135M, in the precision that ftray picks here
    python -m benchmarks.pack --trials 32 --size 1b      # random weights: needs only torch, transformers and peft

The peer is what one writes by hand: for each adapter a PEFT model (all of them in memory already), the model's own
loss, gradient clipping and torch's fused AdamW. The first half of each record bears no loss, as a prompt does not.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import compare, parser
from benchmarks.side import Timed
from ftray.multi_adapter.shared_model import share, trainable
from ftray.task_spec import CAUSAL
from ftray.training.optimizer import TorchOptimizer
from ftray.training.pack import Pack

RANKS = (4, 8, 16, 32)
TOKENS = 64
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(size: str, dtype: str) -> Any:
    """The frozen base: the bundled model, or a random Llama of about `size` parameters."""
    if size == "135m":
        from ftray.config import ModelConfig
        from ftray.models.find import find
        from ftray.models.load import load_base

        base = load_base(ModelConfig(dtype=dtype), find("smollm2-135m")).model
    else:
        config = LlamaConfig(
            vocab_size=32000,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
        )
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            base = LlamaForCausalLM(config).to({"fp32": torch.float32}.get(dtype, torch.bfloat16))
        base.set_attn_implementation("sdpa")
    base = base.cuda() if torch.cuda.is_available() else base
    return base.requires_grad_(False)


def adapter(
    base: Any, index: int, optimizer: Callable[..., Any] | None = None, rate: float = 1e-4
) -> tuple[Any, TorchOptimizer]:
    """A LoRA of one of the ranks over the shared base, in float32, and what makes its steps (default: fused AdamW)."""
    torch.manual_seed(index)
    config = LoraConfig(task_type="CAUSAL_LM", r=RANKS[index % len(RANKS)], lora_alpha=16, target_modules=TARGETS)
    model = get_peft_model(share(base), config)
    for parameter in trainable(model):
        parameter.data = parameter.data.float()
    own = optimizer or partial(torch.optim.AdamW, fused=True)
    return model, TorchOptimizer(model, own(trainable(model), lr=rate), None, 1.0)


def record(
    index: int, device: torch.device, length: int = TOKENS, vocabulary: int = 30000, rows: int = 1
) -> dict[str, torch.Tensor]:
    """`rows` records of `length` tokens, loss on the second half of each."""
    draw = torch.Generator().manual_seed(index)
    ids = torch.randint(0, vocabulary, (rows, length), generator=draw)
    labels = ids.clone()
    labels[:, : length // 2] = -100
    batch = {"input_ids": ids, "labels": labels, "position_ids": torch.arange(length).expand(rows, -1)}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def step_alone(model: Any, optimizer: TorchOptimizer, batch: dict[str, torch.Tensor], step: int) -> None:
    """One step as one writes it by hand."""
    model.train()
    model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
    optimizer.apply([p.grad for p in trainable(model)], step)


def arguments(name: str, description: str) -> argparse.Namespace:
    """What the command line says of a pack."""
    made = parser(name, description)
    made.add_argument("--trials", type=int, default=8, metavar="K")
    made.add_argument("--size", choices=["135m", "1b"], default="135m")
    made.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto")
    made.add_argument("--quick", action="store_true", help="three runs of each instead of seven")
    return made.parse_args()


def packed(base: Any, trials: int) -> tuple[Pack, dict[str, list[dict[str, torch.Tensor]]]]:
    """A pack of that many adapters, and a micro-batch for each."""
    pack, batches = Pack(base, CAUSAL), {}
    for index in range(trials):
        pack.add(str(index), *adapter(base, index))
        batches[str(index)] = [record(index, base.device)]
    return pack, batches


def ours(trials: int, size: str, dtype: str) -> Timed:
    """A step of the pack."""
    pack, batches = packed(load(size, dtype), trials)
    return Timed(lambda: pack.step(batches))


def peer(trials: int, size: str, dtype: str) -> Timed:
    """A step of each adapter by itself."""
    base = load(size, dtype)
    alone = [(adapter(base, index), record(index, base.device)) for index in range(trials)]

    def one_after_another() -> None:
        for own, batch in alone:
            step_alone(*own, batch, 0)

    return Timed(one_after_another)


def main() -> None:
    args = arguments("pack", __doc__)
    print(f"{args.trials} adapters of ranks {RANKS} on all linear layers, {TOKENS} tokens each")
    given = {"trials": args.trials, "size": args.size, "dtype": args.dtype}
    compare("pack", given, args.trials * TOKENS, "tokens/s", 3 if args.quick else 7, args.busy)


if __name__ == "__main__":
    main()
