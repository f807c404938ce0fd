"""Shows tokenized data: counts of each split, a record as the model sees it."""

import json
import math
from itertools import accumulate, groupby, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute
from rich.text import Text

from ftray.data import Split, TokenizedData
from ftray.data.duplicates import shared_prompts
from ftray.data.shards import MixedRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASKED, LEARNT = "dim", "bold green"
OPEN, CLOSE = "[[", "]]"  # around what is learnt, where there are no styles
BETWEEN = " | "  # words that are tagged, and texts
PREFERENCES = ("DPO", "SIMPO", "ORPO", "CPO", "KTO", "REWARD")  # whose rows hold two texts
CONTINUING = ("CAUSAL_LM", "DISTILLATION", "GRPO", *PREFERENCES)  # whose rows have a label for each token of text
BARS, WIDTH = 10, 40  # of a histogram; of its longest bar, in characters
ROWS = 8  # of a batch whose padding is shown


def rendered(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", task: str = "CAUSAL_LM") -> Text:
    """The tokens of a row as text: those without loss dimmed, those with loss in a colour.

    For a task without a label for each token, the text is all context, and the target follows it. Words that are
    tagged, and the texts of a record that has several, stand apart.
    """
    from ftray.task_spec import IGNORE

    text, one_a_token = Text(_begins(row, task)), task in ("TOKEN_CLS", *CONTINUING)
    starts = _starts(row, tokenizer, task)
    learnt = [one_a_token and label != IGNORE for label in (row["labels"] if one_a_token else row["input_ids"])]
    parts = np.searchsorted(starts, range(len(row["input_ids"])), "right").tolist()
    if task == "KTO":  # the second text is none of the record's own
        learnt = [is_learnt and part == 0 for is_learnt, part in zip(learnt, parts, strict=True)]
    tokens = zip(row["input_ids"], learnt, parts, strict=True)
    at = 0
    for (is_learnt, part), own in groupby(tokens, key=lambda token: token[1:]):  # a character may be several tokens
        text.append(_between(task) if part != at else "", style=MASKED)
        text.append(tokenizer.decode([token for token, *_ in own]), style=LEARNT if is_learnt else MASKED)
        at = part
    if task in CONTINUING:
        return text
    if task == "FEATURE_EXTRACTION":  # all texts have been shown
        return text if math.isnan(row["score"]) else text.append(f" -> {row['score']:g}", style=LEARNT)
    return text.append(f" -> {row['target']}", style=LEARNT)


def _begins(row: dict[str, Any], task: str) -> str:
    """What stands before the first text of a record of preferences."""
    if task == "KTO":
        return "good answer: " if row["score"] else "bad answer: "
    return "chosen: " if task in PREFERENCES else ""


def _between(task: str) -> str:
    """What stands between two texts of a record."""
    if task == "KTO":
        return "\nwith another record's answer, to estimate the divergence from the base: "
    return "\nrejected: " if task in PREFERENCES else BETWEEN


def _starts(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", task: str) -> list[int]:
    """The tokens at which a further word that is tagged, or a further text, begins."""
    from ftray.task_spec import IGNORE

    ids = row["input_ids"]
    if task == "TOKEN_CLS":
        return [at for at, label in enumerate(row["labels"]) if label != IGNORE][1:]
    if task in ("FEATURE_EXTRACTION", *PREFERENCES):
        return [*accumulate(row["lengths"])][:-1]
    if task == "QUESTION_ANS":
        extra = json.loads(row["extra"])
        pairs = [(extra["question"], extra["context"])]
    elif task == "SEQ_CLS":
        lines = row["prompt"].split("\n")
        pairs = [("\n".join(lines[:at]), "\n".join(lines[at:])) for at in range(1, len(lines))]
    else:
        pairs = []
    for pair in pairs if tokenizer.is_fast else []:
        cut = "only_second" if task == "QUESTION_ANS" else "longest_first"
        encoded = tokenizer(*pair, truncation=cut, max_length=len(ids))
        second = next((at for at, sequence in enumerate(encoded.sequence_ids(0)) if sequence == 1), len(ids))
        whole = second if task == "QUESTION_ANS" else len(ids)  # of a context, this may be a later part
        if second < len(ids) and encoded["input_ids"][:whole] == ids[:whole]:
            return [second]
    return []


def marked(text: Text) -> str:
    """What :func:`rendered` gave, without styles: what is learnt stands in double brackets."""
    parts, at = [], 0
    for span in text.spans:
        if span.style == LEARNT:
            parts += [text.plain[at : span.start], OPEN, text.plain[span.start : span.end], CLOSE]
            at = span.end
    return "".join([*parts, text.plain[at:]])


def histogram(data: TokenizedData, split: str) -> str:
    """A line for each range of lengths, in tokens: its bar, and how many records of the split it holds."""
    longest = max(data.splits[split].lengths, default=0)
    step = max(1, math.ceil(longest / BARS))
    counts = np.zeros(math.ceil(longest / step), np.int64)
    for index in range(len(data.splits[split].row_groups)):
        lengths = pyarrow.compute.list_value_length(data.row_group(split, index, ["input_ids"])["input_ids"])
        counts += np.bincount((lengths.to_numpy() - 1) // step, minlength=len(counts))
    digits = len(str(longest))
    lines = [f"lengths of {split} in tokens:"]
    for place, count in enumerate(counts):
        bar = "#" * math.ceil(WIDTH * count / counts.max())
        lines.append(f"  {place * step + 1:>{digits}}-{min((place + 1) * step, longest):<{digits}} {bar} {count}")
    return "\n".join(lines)


def duplicates(data: TokenizedData) -> list[str]:
    """A line for each held-out split that has prompts of the training split."""
    lines = []
    for name in ("validation", "test"):
        records = data.splits[name].records
        if records:
            shared = shared_prompts(data, name) or "none"
            lines.append(
                f"near-duplicates: {shared} of {records} {name} records ask what a training record asks, "
                "but for letter case and blanks"
            )
    return lines


def describe(data: TokenizedData) -> str:
    """Several lines: for each source its record shapes and ignored keys; for each split its records, tokens, length
    percentiles and truncated records; the share of padding in a batch.
    """
    lines = []
    for name, summary in data.sources.items():
        given_for, _, part = name.partition(" ")
        source = f" in data.{name}" if name != "train" else " in data.source" if len(data.sources) > 1 else ""
        source = f" in {part}{'' if given_for == 'train' else f', {given_for}'}" if part else source
        lines += [f"shape{source}: {shape}: {count} records" for shape, count in summary.shapes.items()]
        lines += [f"ignored{source}: {', '.join(summary.ignored)}"] if summary.ignored else []
    for name, split in data.splits.items():
        percentiles = "/".join(map(str, split.lengths))
        lines.append(
            f"{name}: {split.records} records, {split.tokens} tokens ({split.supervised_tokens} supervised), "
            f"lengths at 0/50/90/99/100 %: {percentiles}, {split.dropped} dropped, {_truncated(split)}"
        )
        lines += [f"  of {source}: {_mixed(mixed, name, split)}" for source, mixed in split.sources.items()]
    if data.task.labels:
        lines.append(f"labels: {', '.join(data.task.labels)}")
    where = "records are packed into rows without any" if data.task.load().packed else f"in batches of {ROWS} records"
    return "\n".join([*lines, f"padding: {padding_share(data):.0%} ({where})"])


def _truncated(split: Split) -> str:
    """How many records were cut to fit, which share of all, and the longest of them."""
    said = f"{split.truncated} truncated"
    if not split.truncated:
        return said
    longest = f"; the longest, {split.longest_cut_at}, has {split.longest_cut} tokens" if split.longest_cut else ""
    return f"{said} ({100 * split.truncated / split.records:.3g} %{longest})"


def _mixed(mixed: MixedRows, name: str, split: Split) -> str:
    """What a split holds of a source of a mixture, and what an epoch draws of it."""
    drawn = f"; weight {mixed.weight:g}: an epoch draws {mixed.drawn}, {mixed.drawn / split.drawn:.0%} of its records"
    counts = f"{mixed.rows} records, {mixed.tokens} tokens ({mixed.supervised_tokens} supervised)"
    return counts + (drawn if name == "train" else "")


def padding_share(data: TokenizedData, rows: int = ROWS) -> float:
    """The share of padding in batches of `rows` records."""
    from ftray.data.loader import batches

    task = data.task.load()
    if task.packed:
        return 0.0
    taken = [*islice(batches(data, 0, 0, rows), 32)]
    return 1 - sum(task.tokens(b) for b in taken) / sum(b["input_ids"].numel() for b in taken)
