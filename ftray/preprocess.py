"""Tokenize a data set into cached shards and show what came of it."""

import sys
from itertools import groupby, islice, repeat
from typing import Any

from rich.console import Console
from rich.text import Text

from ftray.cli import run_command
from ftray.config import Config
from ftray.data import TokenizedData

MASKED, LEARNT = "cyan", "bold green"
ROWS = 8  # of a batch whose padding is told


def run(cfg: Config) -> int:
    """The command: statistics of every split, and one record as the model sees it, the masked part in its own colour.

    Raises:
        UserError: anything wrong with the data.
    """
    from ftray.runtime.cluster import connect, quiet

    if not cfg.verbose:
        quiet()
    from ftray.data import check, prepare
    from ftray.models.find import find
    from ftray.tasks.infer_task import infer_task

    model_path = find(cfg.model.name)
    cfg = infer_task(cfg, model_path)

    from ftray.models.load import load_tokenizer  # takes seconds: a name misspelt has been found by now

    tokenizer = load_tokenizer(model_path, cfg.model.trust_remote_code)
    check(cfg.data, tokenizer, cfg.task)
    connect(cfg)
    data = prepare(cfg.data, model_path, cfg.model.trust_remote_code, cfg.task)
    print(describe(data))
    console = Console()
    console.print(Text.assemble("a record, ", ("as context", MASKED), " and ", ("to be learnt", LEARNT), ":"))
    console.print(rendered(data.rows("train", 1)[0], tokenizer, data.task.name), soft_wrap=True)
    print(f"shards {data.directory}")
    return 0


def rendered(row: dict[str, Any], tokenizer: Any, task: str = "CAUSAL_LM") -> Text:
    """The tokens of a row as text: those without loss in one colour, those that bear it in another.

    Where labels aren't one a token of the text, the text is all context, and what is to be learnt follows it.
    """
    from ftray.task_spec import IGNORE

    text, one_a_token = Text(), task in ("CAUSAL_LM", "TOKEN_CLS")
    pairs = zip(row["input_ids"], row["labels"] if one_a_token else repeat(IGNORE), strict=one_a_token)
    for masked, part in groupby(pairs, key=lambda pair: pair[1] == IGNORE):  # a character may be several tokens
        text.append(tokenizer.decode([token for token, _ in part]), style=MASKED if masked else LEARNT)
    return text if task == "CAUSAL_LM" else text.append(f" -> {row['target']}", style=LEARNT)


def describe(data: TokenizedData) -> str:
    """A line a shape of records and one of ignored keys, of each source; a line a split: records, tokens, length
    percentiles, what was cut; and the share of padding in a batch.
    """
    lines = []
    for name, read in data.read.items():
        source = f" in data.{name}" if name != "train" else " in data.source" if len(data.read) > 1 else ""
        lines += [f"shape{source}: {shape}: {count} records" for shape, count in read.shapes.items()]
        lines += [f"ignored{source}: {', '.join(read.ignored)}"] if read.ignored else []
    for name, split in data.splits.items():
        percentiles = "/".join(map(str, split.lengths))
        lines.append(
            f"{name}: {split.records} records, {split.tokens} tokens ({split.supervised_tokens} supervised), "
            f"lengths at 0/50/90/99/100 %: {percentiles}, {split.dropped} dropped, {split.truncated} truncated"
        )
    if data.task.labels:
        lines.append(f"labels: {', '.join(data.task.labels)}")
    where = "records are packed into rows without any" if data.task.load().packed else f"in batches of {ROWS} records"
    return "\n".join([*lines, f"padding: {padding_share(data):.0%} ({where})"])


def padding_share(data: TokenizedData, rows: int = ROWS) -> float:
    """The share of padding in batches of `rows` records."""
    from ftray.data.loader import batches

    task = data.task.load()
    if task.packed:
        return 0.0
    taken = [*islice(batches(data, 0, 0, rows), 32)]
    return 1 - sum(task.tokens(b) for b in taken) / sum(b["input_ids"].numel() for b in taken)


if __name__ == "__main__":
    sys.exit(run_command("preprocess"))
