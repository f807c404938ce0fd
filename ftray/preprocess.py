"""Tokenize a data set into cached shards and show what came of it."""

import sys

from rich.console import Console
from rich.text import Text

from ftray.cli import run_command
from ftray.config import Config
from ftray.data import TokenizedData


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

    model_path = find(cfg.model.name)
    tokenizer = load_tokenizer(model_path, cfg.model.trust_remote_code)
    check(cfg.data, tokenizer)
    connect(cfg)
    data = prepare(cfg.data, model_path, cfg.model.trust_remote_code)
    print(describe(data))
    row = data.rows("train", 1)[0]
    sample = Text("sample: ")
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        sample.append(tokenizer.decode([token]), style="dim" if label == IGNORE else "bold green")
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
    return "\n".join([*lines, "padding: 0 % (records are packed into rows without any)"])


if __name__ == "__main__":
    sys.exit(run_command("preprocess"))
