"""Tasks that learn from preferences: pairs of answers, and answers that were judged one by one. Imports no torch."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace

from ftray.config import DataConfig
from ftray.data import preference_shapes, unpaired_shapes
from ftray.data.fast_tokenizer import AnyTokenizer
from ftray.data.preference_shapes import PAIRS, Pair, prompt_of
from ftray.data.record_task import RecordTask
from ftray.data.records import Example
from ftray.data.tokens import Tokens, rendering, tokenize
from ftray.data.unpaired_shapes import UNPAIRED, Judged, with_answer_of
from ftray.errors import UserError
from ftray.task_spec import AS_IT_IS, IGNORE


class PairTask(RecordTask):
    """Pairs of answers to one prompt, of which one is preferred.

    A pair is one row: the prompt with the preferred answer, then the prompt with the other one. `lengths` are the
    tokens of these two texts, `prompt_tokens` those of the prompt in each, `target` is the preferred answer, and
    `extra` holds the other one, as JSON under `rejected`. The labels of the answers alone bear loss.
    """

    shapes = PAIRS
    record_keys = preference_shapes.NEEDS
    grouped_by = "prompt"

    def shape(self, example: Pair) -> str:
        """A text that is cut where another one parts from it stands beside no answer to a prompt."""
        return "two whole texts, without a prompt" if example.is_text else "two answers to a prompt"

    def group(self, example: Pair) -> object:
        """Pairs of one prompt share a split."""
        return prompt_of(example.chosen)

    def rendering(self, example: Pair, tokenizer: AnyTokenizer, cfg: DataConfig) -> str | None:
        """As that of its answers."""
        return rendering(example.chosen, tokenizer, _as_text(cfg) if example.is_text else cfg)

    def tokenize(self, examples: list[Pair], tokenizer: AnyTokenizer, cfg: DataConfig) -> list[Tokens | None]:
        """As :func:`ftray.data.tokens.tokenize`, but for records over `max_length`: of both texts, the start of the
        prompt is cut by the same tokens, as far as needed, then the ends of the answers.

        Raises:
            UserError: as there; or the chat template renders the prompt of the two answers differently.
        """
        _refuse_train_on_prompt(cfg)
        ends = _special_ends(tokenizer) if self.spec.name == "SEQ_CLS" else ([], [])
        rows: list[Tokens | None] = [None] * len(examples)
        for is_text in (False, True):
            at = [i for i, pair in enumerate(examples) if pair.is_text == is_text]
            texts = [text for i in at for text in (examples[i].chosen, examples[i].rejected)]
            whole = _whole_rows(texts, tokenizer, _as_text(cfg) if is_text else cfg, ends)
            for n, i in enumerate(at):
                chosen, rejected = whole[2 * n : 2 * n + 2]
                row = _fitted(_joined(chosen, rejected, examples[i].where), tokenizer.bos_token_id, cfg)
                rows[i] = row and replace(row, extra=json.dumps({"rejected": rejected.target}, ensure_ascii=False))
        return rows


class UnpairedTask(RecordTask):
    """Answers that were judged one by one (KTO, arXiv 2402.01306).

    A record is one row of two texts: its prompt with its answer, and its prompt with the answer to another one, by
    which the KL divergence from the base is estimated, and which is never learnt. `lengths` are the tokens of the two
    texts, `prompt_tokens` those of the prompt in each; `score` is 1 for a good answer and 0 for a bad one.
    """

    shapes = UNPAIRED
    record_keys = unpaired_shapes.NEEDS
    grouped_by = "prompt"
    learns_first = True

    def group(self, example: Judged) -> object:
        """Answers to one prompt share a split."""
        return prompt_of(example.example)

    def rendering(self, example: Judged, tokenizer: AnyTokenizer, cfg: DataConfig) -> str | None:
        """As that of any answer."""
        return rendering(example.example, tokenizer, cfg)

    def in_batch(self, examples: list[Judged], splits: Sequence[str]) -> list[Judged]:
        """Each record with the answer to the next one of its split; to any other one where its split has no more."""
        own: dict[str, list[int]] = {}
        for i, split in enumerate(splits):
            own.setdefault(split, []).append(i)
        result = list(examples)
        for at in own.values():
            among = at if len(at) > 1 else range(len(examples))
            following = dict(zip(among, [*among[1:], among[0]], strict=True))
            for i in at:
                result[i] = with_answer_of(examples[i], examples[following[i]])
        return result

    def tokenize(self, examples: list[Judged], tokenizer: AnyTokenizer, cfg: DataConfig) -> list[Tokens | None]:
        """As :func:`ftray.data.tokens.tokenize`; of a record over `max_length`, the other answer loses its end."""
        _refuse_train_on_prompt(cfg)
        texts = [text for judged in examples for text in (judged.example, judged.mismatched or judged.example)]
        whole = _whole_rows(texts, tokenizer, cfg)
        rows: list[Tokens | None] = []
        for n, judged in enumerate(examples):
            both = _joined(whole[2 * n], whole[2 * n + 1], judged.where)
            row = _fitted(both, tokenizer.bos_token_id, cfg, first_alone=True)
            rows.append(row and replace(row, score=float(judged.desirable)))
        return rows


def _refuse_train_on_prompt(cfg: DataConfig) -> None:
    if cfg.train_on_prompt:
        raise UserError("data.train_on_prompt: preferences are about answers, which alone bear loss: leave it out")


def _as_text(cfg: DataConfig) -> DataConfig:
    return cfg.model_copy(update={"template": AS_IT_IS})


def _special_ends(tokenizer: AnyTokenizer) -> tuple[list[int], list[int]]:
    """What an encoder without an end-of-sequence token has before and after a text, as BERT's [CLS] and [SEP]."""
    first, last = getattr(tokenizer, "cls_token_id", None), getattr(tokenizer, "sep_token_id", None)
    if tokenizer.eos_token_id is not None or first is None or last is None:
        return [], []
    return [first], [last]


def _whole_rows(
    examples: list[Example],
    tokenizer: AnyTokenizer,
    cfg: DataConfig,
    ends: tuple[list[int], list[int]] = ([], []),
) -> list[Tokens]:
    """A row for each example, whatever its length.

    Args:
        ends: special tokens before and after each text.

    Raises:
        UserError: a conversation whose answers the chat template renders each in another way.
    """
    rows = []
    for example, row in zip(examples, tokenize(examples, tokenizer, _unlimited(cfg)), strict=True):
        if row is None:
            raise UserError(f"{example.where}: an answer has no tokens")
        if row.further:
            raise UserError(
                f"{example.where}: the chat template renders an earlier answer otherwise once a later one has come: "
                "give answers of one turn"
            )
        before, after = ends
        ids, labels = [*before, *row.input_ids, *after], [IGNORE] * len(before) + row.labels + after
        rows.append(replace(row, input_ids=ids, labels=labels, prompt_tokens=row.prompt_tokens + len(before)))
    return rows


def _unlimited(cfg: DataConfig) -> DataConfig:
    return cfg.model_copy(update={"max_length": sys.maxsize, "overlong": "truncate"})


def _joined(first: Tokens, second: Tokens, where: object) -> Tokens:
    """Two texts that begin with one prompt as a row.

    Raises:
        UserError: they don't, as they are rendered.
    """
    prompt = min(_prompt_tokens(first), _prompt_tokens(second))
    if first.input_ids[:prompt] != second.input_ids[:prompt]:
        raise UserError(
            f"{where}: the chat template renders the prompt otherwise before another answer: give another one"
        )
    ids, labels = first.input_ids + second.input_ids, first.labels + second.labels
    lengths = [len(first.input_ids), len(second.input_ids)]
    return replace(first, input_ids=ids, labels=labels, prompt_tokens=prompt, lengths=lengths)


def _prompt_tokens(row: Tokens) -> int:
    """Tokens before the first one that bears loss; an answer of several turns begins before the last of these."""
    before = row.labels[: row.prompt_tokens]
    if before.count(IGNORE) == len(before):
        return row.prompt_tokens
    return next(i for i, label in enumerate(before) if label != IGNORE)


def _fitted(row: Tokens, bos: int | None, cfg: DataConfig, first_alone: bool = False) -> Tokens | None:
    """A row of two texts, each cut to `max_length`; None: it is left out, or nothing is left to tell apart.

    Both lose the same tokens from the start of the prompt, but for a beginning-of-sequence token.

    Args:
        first_alone: the prompt is cut as the first text needs it, and only the end of the second one.
    """
    split = row.lengths[0]
    over = (split if first_alone else max(row.lengths)) - cfg.longest
    if over > 0 and cfg.overlong == "drop":
        return None
    cut = max(0, min(over, row.prompt_tokens - 1))  # one token before the answer stays: it predicts the answer's first
    head = int(row.input_ids[0] == bos)

    def fit(part: list[int]) -> list[int]:
        return (part[:head] + part[head + cut :])[: cfg.longest]

    ids = [fit(row.input_ids[:split]), fit(row.input_ids[split:])]
    labels = [fit(row.labels[:split]), fit(row.labels[split:])]
    is_empty = any(own[1:].count(IGNORE) == len(own[1:]) for own in labels)
    if is_empty or (not first_alone and ids[0] == ids[1]):
        return None
    return replace(
        row,
        input_ids=ids[0] + ids[1],
        labels=labels[0] + labels[1],
        prompt_tokens=row.prompt_tokens - cut,
        lengths=[len(own) for own in ids],
        truncated=max(row.lengths[: 1 if first_alone else 2]) if over > 0 else 0,
    )
