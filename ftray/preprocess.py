"""Tokenize a data set into cached shards and show what came of it."""

import sys
from itertools import islice

from rich.console import Console
from rich.text import Text

from ftray.cli import run_command
from ftray.config import Config
from ftray.data import TokenizedData, stream


def run(cfg: Config) -> int:
    """The command: statistics of every split, and one record as the model sees it, the masked part dimmed.

    Raises:
        UserError: anything wrong with the data.
    """
    from ftray.search.cluster import connect, quiet

    if not cfg.verbose:
        quiet()
    from ftray.data import check, prepare
    from ftray.data.tokens import IGNORE
    from ftray.models.find import find
    from ftray.models.load import load_tokenizer
    from ftray.tasks.choose import resolve

    model_path = find(cfg.model.name)
    tokenizer = load_tokenizer(model_path, cfg.model.trust_remote_code)
    cfg = resolve(cfg, model_path)
    check(cfg.data, tokenizer, cfg.task)
    connect(cfg)
    data = prepare(cfg.data, model_path, cfg.model.trust_remote_code, cfg.task)
    print(describe(data))
    row = data.rows("train", 1)[0]
    sample = Text("sample: ")
    if data.task.name in ("CAUSAL_LM", "TOKEN_CLS"):  # a label a token
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            sample.append(tokenizer.decode([token]), style="dim" if label == IGNORE else "bold green")
    else:
        sample.append(tokenizer.decode(row["input_ids"]), style="dim")
    if data.task.name != "CAUSAL_LM":
        sample.append(f" -> {row['target']}", style="bold green")
    Console().print(sample)
    print(f"shards {data.directory}")
    return 0


def describe(data: TokenizedData) -> str:
    """A line a split: records, tokens, length percentiles, what was cut; and the share of padding in a batch."""
    lines = []
    for name, split in data.splits.items():
        percentiles = "/".join(map(str, split.lengths))
        lines.append(
            f"{name}: {split.records} records, {split.tokens} tokens ({split.supervised_tokens} supervised), "
            f"lengths at 0/50/90/99/100 %: {percentiles}, {split.dropped} dropped, {split.truncated} truncated"
        )
    if data.task.labels:
        lines.append(f"labels: {', '.join(data.task.labels)}")
    return "\n".join([*lines, _padding(data)])


def _padding(data: TokenizedData, rows: int = 8) -> str:
    """The share of padding in batches of `rows` records."""
    task = data.task.load()
    if task.packed:
        return "padding: 0 % (records are packed into rows without any)"
    batches = [*islice(stream.batches(data, 0, 0, rows), 32)]
    share = 1 - sum(task.tokens(b) for b in batches) / sum(b["input_ids"].numel() for b in batches)
    return f"padding: {share:.0%} in batches of {rows} records"


if __name__ == "__main__":
    sys.exit(run_command("preprocess"))
