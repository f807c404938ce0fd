"""Packs on a GPU: the same results as each adapter alone, and how fast, beside what else one could run.

    python -m benchmarks.gpu --output figures.json      # about six minutes on an H100
    python -m benchmarks.gpu --smoke                    # tiny models, any machine: does each part run?

Needs CUDA PyTorch, transformers and peft; flash-attn and bitsandbytes where they are installed. Random Llama weights.
A part that fails says why and the others run; parts that no time is left for are named. Exits with 1 if results of a
pack differ from those alone, or if a part fails.

What the speed of K adapters is compared with:

- in turn: the same PEFT models one after another, by their own loss, with fused AdamW and gradient clipping;
- ceiling: one such adapter on K times the records;
- products: the base's matrix products alone for the same tokens, forward and back to the inputs.

MFU counts 4 FLOPs a token and frozen parameter (forward, and backward to the inputs alone), against the dense bf16
rate of the data sheet.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.measure import beside, busy, machine, parser, versions
from benchmarks.pack import TARGETS, adapter, record, step_alone
from benchmarks.side import seconds
from ftray.multi_adapter.shared_model import trainable
from ftray.task_spec import CAUSAL
from ftray.training.pack import Pack

SHAPES = {  # hidden size, intermediate size, layers, heads, key-value heads
    "tiny": (64, 128, 2, 4, 2),
    "1b": (2048, 8192, 16, 32, 8),
    "8b": (4096, 14336, 32, 32, 8),
}
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}  # dense bf16, data sheets
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 5e-2}  # of what the weights changed; sums in another order
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Run:
    """The parts that ran, their figures, and the time that is left.

    Attributes:
        figures: what goes into the JSON, by part.
    """

    def __init__(self, minutes: float):
        self.deadline = time.monotonic() + 60 * minutes
        self.figures: dict[str, Any] = {"machine": machine(), "versions": versions()}
        self.failed: list[str] = []

    def part(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Run one part; print its figures, or why there are none."""
        if time.monotonic() > self.deadline:
            self.figures[name] = {"skipped": "no time left"}
        else:
            started = time.monotonic()
            try:
                self.figures[name] = measure() | {"part_seconds": round(time.monotonic() - started, 1)}
            except Exception as error:  # the next part runs all the same
                self.failed.append(name)
                self.figures[name] = {"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.figures[name].items())
        print(f"{name}: {', '.join(shown)}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def llama(size: str, dtype: torch.dtype, attention: str = "sdpa", quantised: bool = False) -> Any:
    """A frozen Llama of random weights on the device."""
    hidden, intermediate, layers, heads, groups = SHAPES[size]
    config = LlamaConfig(
        vocab_size=384 if size == "tiny" else 128256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=size == "1b",
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.set_attn_implementation(attention)
    if quantised:
        _quantise(model)
    return model.requires_grad_(False)


def _quantise(model: nn.Module) -> None:
    """Store the linear layers of the blocks as 4-bit NormalFloat (QLoRA, arXiv 2305.14314)."""
    import bitsandbytes as bnb

    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and path.rpartition(".")[2] in TARGETS:
            new = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            new.weight = bnb.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            model.set_submodule(path, new.to(DEVICE))


def equality(dtype: torch.dtype, size: str, trials: int = 8, steps: int = 3) -> dict[str, Any]:
    """Weights after a few packed steps, records of several lengths, against the same steps alone.

    By gradient descent: Adam would make as much of a gradient that is rounding alone as of any other.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    base = llama(size, dtype)
    pack, worst = Pack(base, CAUSAL), 0.0
    batches = {i: [record(100 * i + s, DEVICE, 24 + 9 * i, 384) for s in range(steps)] for i in range(trials)}
    alone = {i: adapter(base, i, torch.optim.SGD, 1.0) for i in range(trials)}
    for i in range(trials):
        pack.add(str(i), *adapter(base, i, torch.optim.SGD, 1.0))
    for step in range(steps):
        pack.step({str(i): [batches[i][step]] for i in range(trials)})
        for i, own in alone.items():
            step_alone(*own, batches[i][step], step)
    for i, (model, _) in alone.items():
        models = adapter(base, i)[0], model, pack.adapters[str(i)].model
        start, theirs, ours = (torch.cat([p.detach().flatten() for p in trainable(m)]) for m in models)
        worst = max(worst, ((ours - theirs).norm() / (theirs - start).norm()).item())
    if worst > ALLOWED[dtype]:
        raise AssertionError(f"weights differ by {worst:.3g} of what they changed")
    return {"largest_relative_difference": worst, "verdict": pack.verdict}


def throughput(size: str, trials: int, length: int, runs: int, **how: Any) -> dict[str, Any]:
    """Tokens a second of a packed step, and of what it is compared with."""
    base = llama(size, torch.bfloat16, quantised=how.get("quantised", False))
    parameters = sum(p.numel() for n, p in base.named_parameters() if "embed_tokens" not in n)
    vocabulary, tokens = base.config.vocab_size, trials * length
    batches = {str(i): [record(i, DEVICE, length, vocabulary)] for i in range(trials)}
    pack = Pack(base, CAUSAL)
    for i in range(trials):
        pack.add(str(i), *adapter(base, i, how.get("optimizer")))
    if how.get("compile"):
        pack.shared.base_model.compile(mode=how["compile"])
    with _peak_memory() as memory:
        found = {"tokens_per_second": tokens / timed(lambda: pack.step(batches), runs)}
    found["peak_gib"] = memory[0]
    peak = next((rate for name, rate in PEAK_FLOPS.items() if name in machine()), None)
    if peak and not how.get("quantised"):
        found["mfu"] = found["tokens_per_second"] * 4 * parameters / peak
    return found if how else found | peers(base, batches, runs, found["tokens_per_second"])


def peers(base: Any, batches: dict[str, Any], runs: int, ours: float) -> dict[str, Any]:
    """What a pack of these batches is compared with, and how many times as fast it is."""
    trials, length, vocabulary = len(batches), batches["0"][0]["input_ids"].shape[1], base.config.vocab_size
    tokens, found = trials * length, {}
    attentions = ["sdpa", *(["flash_attention_2"] if find_spec("flash_attn") else [])]
    own = [adapter(base, i) for i in range(trials)]
    for attention in attentions:
        for model, _ in own:
            model.get_base_model().set_attn_implementation(attention)

        def in_turn() -> None:
            for (model, optimizer), (batch,) in zip(own, batches.values(), strict=True):
                step_alone(model, optimizer, batch, 0)

        found[f"in_turn_{attention}"] = tokens / timed(in_turn, max(1, runs // 2))
    wide = record(0, DEVICE, length, vocabulary, trials)
    found["ceiling"] = tokens / timed(lambda: step_alone(*own[0], wide, 0), runs)
    found["products"] = tokens / timed(lambda: products(base, tokens), runs)
    found["times_in_turn"] = ours / max(found[f"in_turn_{a}"] for a in attentions)
    return found | {"of_ceiling": ours / found["ceiling"], "of_products": ours / found["products"]}


def products(base: Any, tokens: int) -> None:
    """The matrix products of every linear layer, forward and to the inputs; half the tokens reach the head."""
    for path, layer in base.named_modules():
        if isinstance(layer, nn.Linear):
            rows = tokens // 2 if path == "lm_head" else tokens
            x = torch.zeros(rows, layer.in_features, device=DEVICE, dtype=layer.weight.dtype)
            layer(x) @ layer.weight


def timed(run: Callable[[], Any], runs: int) -> float:
    """Median seconds of a call, after two that are not counted."""
    run()
    run()
    taken = sorted(seconds(run) for _ in range(runs))
    return taken[len(taken) // 2]


@contextmanager
def _peak_memory() -> Iterator[list[float]]:
    """GiB that the device held at most; 0 on a CPU."""
    found = [0.0]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    yield found
    if torch.cuda.is_available():
        found[0] = torch.cuda.max_memory_allocated() / 2**30


def decode(size: str, adapters: int, new: int) -> dict[str, Any]:
    """Output tokens a second of one sequence for each of the adapters, together, beside `generate` in turn."""
    from ftray.serving.engine import Engine, Sequence
    from ftray.serving.generation_request import Sampling

    base = llama(size, torch.bfloat16)
    words = {f" w{i}": i for i in range(base.config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, " w0")), eos_token=" w0")
    engine, left = Engine(base, tokenizer, slots=adapters, prompt_tokens=4096), [0]
    engine.ends = set()
    models = [adapter(base, i)[0].eval() for i in range(adapters)]
    for i, model in enumerate(models):
        engine.add(str(i), engine.prepare(model))
    prompt = list(range(5, 37))

    def together() -> None:
        left[0] = adapters

        def emit(piece: Any) -> None:
            left[0] -= piece.finish is not None

        for i in range(adapters):
            engine.submit(Sequence(prompt, new, Sampling(temperature=0.0), emit, str(i)))
        while left[0]:
            engine.step()

    ids = torch.tensor([prompt], device=DEVICE)
    some = models[: max(1, adapters // 8)]

    def in_turn() -> None:
        for model in some:
            model.generate(input_ids=ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)

    ours, peer = adapters * new / timed(together, 3), len(some) * new / timed(in_turn, 1)
    return {
        "tokens_per_second": ours,
        "generate_in_turn": peer,
        "times": ours / peer,
        "isolation_reason": engine.isolation_reason,
    }


def profile(size: str, trials: int, length: int) -> dict[str, Any]:
    """Where the time of a packed step goes: the kernels that take most, and how long the GPU waits."""
    base = llama(size, torch.bfloat16)
    pack = Pack(base, CAUSAL)
    for i in range(trials):
        pack.add(str(i), *adapter(base, i))
    batches = {str(i): [record(i, DEVICE, length, base.config.vocab_size)] for i in range(trials)}
    timed(lambda: pack.step(batches), 1)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        wall = seconds(lambda: pack.step(batches))

    def own(event: Any) -> float:
        return event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total

    events = sorted(profiler.key_averages(), key=own, reverse=True)
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA] or events
    busy = sum(own(event) for event in kernels) / 1e6
    top = {event.key[:70]: round(own(event) / 1e3, 3) for event in kernels[:12]}
    return {"wall_ms": 1e3 * wall, "busy_ms": 1e3 * busy, "launches": sum(e.count for e in kernels), "top_ms": top}


def main() -> int:
    made = parser("gpu", __doc__)
    made.add_argument("--output", type=Path, help="where the figures go as JSON, after each part")
    made.add_argument("--minutes", type=float, default=6.0, help="no part starts later than this")
    made.add_argument("--tokens", type=int, default=64, help="of a trial in a step")
    made.add_argument("--smoke", action="store_true", help="tiny models, any machine")
    args = made.parse_args()
    with busy(args.busy):
        return measure(args)


def measure(args: argparse.Namespace) -> int:
    """All parts; 1 if one failed."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    run, length = Run(args.minutes), args.tokens
    small, size, runs, many = ("tiny", "tiny", 2, 4) if args.smoke else ("tiny", "1b", 5, 32)
    run.figures["busy"] = args.busy
    print(f"{run.figures['machine']}{beside(args.busy)}, {run.figures['versions']}", flush=True)

    def part(name: str, figures: Callable[[], dict[str, Any]]) -> None:
        run.part(name, figures)
        if args.output:
            aside = args.output.with_name(f".{args.output.name}")
            aside.write_text(json.dumps(run.figures, indent=1) + "\n")
            aside.replace(args.output)

    part("equality fp32", lambda: equality(torch.float32, small))
    part("equality bf16", lambda: equality(torch.bfloat16, small))
    for trials in (1, 8, 32) if not args.smoke else (1, many):
        part(f"{size} K={trials}", lambda trials=trials: throughput(size, trials, length, runs))
    part("profile", lambda: profile(size, many, length))
    part("decode", lambda: decode(size, many, 8 if args.smoke else 64))
    for mode in () if args.smoke else ("default", "reduce-overhead"):
        part(f"compile {mode}", lambda mode=mode: throughput(size, many, length, runs, compile=mode))
    if find_spec("bitsandbytes"):
        import bitsandbytes as bnb

        part("4-bit base", lambda: throughput(size, many, length, runs, quantised=True))
        if torch.cuda.is_available():
            eight, paged = bnb.optim.AdamW8bit, bnb.optim.PagedAdamW
            part("8-bit AdamW", lambda: throughput(size, many, length, runs, optimizer=eight))
            part("paged AdamW", lambda: throughput(size, many, length, runs, optimizer=paged))
    if torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > 60 * 2**30:
        for trials in (8, 32):
            part(f"8b K={trials}", lambda trials=trials: throughput("8b", trials, length, 3))
    print(json.dumps(run.figures))
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
