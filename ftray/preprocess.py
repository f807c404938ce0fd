"""Tokenize a data set into cached shards and show what came of it."""

import sys
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from ftray.cli import run_command
from ftray.config import Config
from ftray.data import TokenizedData

MASKED, LEARNT = "cyan", "bold green"


def run(cfg: Config) -> int:
    """The command: statistics of every split, and one record as the model sees it, the masked part in its own colour.

    Raises:
        UserError: anything wrong with the data.
    """
    from ftray.search.cluster import connect, quiet

    if not cfg.verbose:
        quiet()
    from ftray.data import check, prepare
    from ftray.models.find import find
    from ftray.models.load import load_tokenizer

    model_path = find(cfg.model.name)
    tokenizer = load_tokenizer(model_path, cfg.model.trust_remote_code)
    check(cfg.data, tokenizer)
    connect(cfg)
    data = prepare(cfg.data, model_path, cfg.model.trust_remote_code)
    print(describe(data))
    console = Console()
    console.print(Text.assemble("a record, ", ("as context", MASKED), " and ", ("to be learnt", LEARNT), ":"))
    console.print(rendered(data.rows("train", 1)[0], tokenizer), soft_wrap=True)
    print(f"shards {data.directory}")
    return 0


def rendered(row: dict[str, Any], tokenizer: Any) -> Text:
    """The tokens of a row as text: those without loss in one colour, those that bear it in another."""
    from ftray.data.tokens import IGNORE

    text = Text()
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    for masked, part in groupby(pairs, key=lambda pair: pair[1] == IGNORE):  # a character may be several tokens
        text.append(tokenizer.decode([token for token, _ in part]), style=MASKED if masked else LEARNT)
    return text


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
