"""What ftray claims of its speed, the bar of each claim, and the quick run that `python -m benchmarks` holds it by."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """One row of the table.

    Attributes:
        says: in the table's first column.
        bar: what the value must come to; None: there is none.
        value: key of the benchmark's last line; "ratio" is how many times better than the peer ours is.
        at_most: the bar is the greatest value allowed, not the least.
        unit: of the value.
        peer: key of the peer's value, where that isn't in the ratio.
    """

    says: str
    bar: float | None
    value: str = "ratio"
    at_most: bool = False
    unit: str = ""
    peer: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A module of this folder, and what its quick run shows.

    Attributes:
        command: module and arguments.
        limit: seconds, on two quiet cores, after which it counts as failed: some three times what it takes.
        claims: rows of the table.
        spins: whether it takes `--busy`.
    """

    command: tuple[str, ...]
    limit: float
    claims: tuple[Claim, ...]
    spins: bool = True


BENCHMARKS = {
    "start": Benchmark(
        ("benchmarks.start", "--quick"),
        180,
        (
            Claim("`ftray --help`", 0.3, "help_seconds", at_most=True, unit="s"),
            Claim("`ftray tune`, tiny model, from command to exit", 25, "ours", at_most=True, unit="s"),
        ),
    ),
    "pack": Benchmark(
        ("benchmarks.pack", "--quick"), 150, (Claim("pack: 8 adapters, beside the same PEFT models in turn", 3),)
    ),
    "floor": Benchmark(
        ("benchmarks.floor", "--quick"), 120, (Claim("floor: that pack, beside the base's matrix products alone", 0.6),)
    ),
    "step": Benchmark(
        ("benchmarks.step", "--quick"),
        360,
        (Claim("step: one run, beside transformers.Trainer + PEFT (100 records)", 2),),
    ),
    "preference": Benchmark(
        ("benchmarks.preference", "--steps", "2", "--quick"),
        480,
        (Claim("preference: 8 DPO trials, beside TRL's DPOTrainer (2 steps)", 3),),
    ),
    "shared_prompts": Benchmark(
        ("benchmarks.shared_prompts", "--quick"),
        150,
        (Claim("shared prompts: 1.67 times fewer tokens, beside the pack without", None),),
    ),
    "serve": Benchmark(
        ("benchmarks.serve", "--quick"),
        420,
        (
            Claim("serve: 16 clients over 4 adapters, beside generate for each request", 10),
            Claim(
                "serve: first text, 95th percentile", 1, "p95_first_ours", at_most=True, unit="s", peer="p95_first_peer"
            ),
            Claim("serve: endpoint ready", 15, "ready_seconds", at_most=True, unit="s"),
            Claim("serve: memory with 4 adapters, over that with one", 1.2, "memory_4_over_1", at_most=True),
        ),
    ),
    "tokenize": Benchmark(
        ("benchmarks.tokenize", "--gb", "0.1"),
        300,
        (
            Claim("tokenize: JSONL to shards, beside datasets.map (0.1 GB: starts weigh more)", 1.5),
            Claim(
                "tokenize: memory of all processes (0.1 GB)",
                2,
                "ours_peak_gb",
                at_most=True,
                unit="GB",
                peer="peer_peak_gb",
            ),
        ),
    ),
    "policy": Benchmark(
        ("benchmarks.policy", "--seeds", "100"),
        240,
        (
            Claim(
                "full budgets to the median best of 16, by validation, worst of three sets",
                3.4,
                "ours",
                at_most=True,
                peer="peer",
            ),
            Claim(
                "full budgets to the median best of 16, by training losses, worst of three sets",
                3.4,
                "paired",
                at_most=True,
                peer="peer",
            ),
        ),
        spins=False,
    ),
    "overhead": Benchmark(
        ("benchmarks.overhead", "--ours", "--quick"),
        600,
        (Claim("overhead: what a trial costs beyond its tokens", 0.5, "ours", at_most=True, unit="s"),),
    ),
    "search": Benchmark(
        ("benchmarks.search", "--quick", "--runs", "1", "--trials", "8"),
        800,
        (Claim("search: 8 trials of 4 steps (the bar is for 16), beside Ray Tune + Trainer", 4),),
    ),
}

# claims that take too long for the table: their commands, and what is to know of each
LEFT_OUT = {
    "python -m benchmarks.search --quick --runs 1": "all 16 trials: 8 minutes",
    "python -m benchmarks.search --to-loss": "at least 8 times as fast to the usual script's loss: hours",
    "python -m benchmarks.overhead --quick": "with the usual script: 8 minutes",
    "python -m benchmarks.tokenize": "2 GB of conversations: 20 minutes",
    "python -m benchmarks.scaling": "no bar; what thousands of trials cost their driver: half an hour",
    "python -m benchmarks.gpu": "on a GPU: 6 minutes",
}
