"""Compares data with the positions and embeddings of a model, before training would end in an index error."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow.compute

from ftray.config import DataConfig
from ftray.data.shards import TokenizedData
from ftray.data.tokens import longest_text
from ftray.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARE = 0.999  # of the records that `max_length: auto` leaves whole


def within_positions(
    cfg: DataConfig, model: "PreTrainedModel", added: int = 0, lengths: Sequence[int] = ()
) -> DataConfig:
    """`cfg` with a `max_length` that the model has positions for, unless it was given; says so.

    `auto` becomes the length that `SHARE` of the records don't exceed, or the most that the model takes.

    Args:
        model: with or without weights.
        added: tokens that an adapter puts before a record.
        lengths: tokens of records, for `auto`.
    """
    from ftray.models.limits import context_length, positions, record_length

    most = record_length(model)
    if cfg.max_length == "auto":
        most = min((limit for limit in (context_length(model), most) if limit is not None), default=None)
        return _settled(cfg, None if most is None else most - added, sorted(lengths))
    if "max_length" in cfg.model_fields_set:
        _say_if_beyond(cfg.max_length, model, added)
        return cfg
    if most is None or cfg.max_length <= most - added:
        return cfg
    beside = f", {added} of them for the adapter's own tokens" if added else ""
    has = f"the model has {most} positions" if most == positions(model) else _depends_beyond(most)
    print(f"data.max_length {most - added}: {has}{beside}", flush=True)
    return cfg.model_copy(update={"max_length": most - added})


def _depends_beyond(most: int) -> str:
    return f"beyond {most} tokens the model's rotary positions depend on the longest record of a pass"


def _say_if_beyond(given: int, model: "PreTrainedModel", added: int) -> None:
    """Print a line if a length is more than the model takes."""
    from ftray.models.limits import context_length, record_length

    most = min((n for n in (context_length(model), record_length(model)) if n is not None), default=None)
    if most is None or given + added <= most:
        return
    then = "is refused" if record_length(model) else "is more than it was made for"
    beside = f", {added} of them for the adapter's own" if added else ""
    print(
        f"data.max_length {given}: the model takes {most} tokens{beside}: a record that is longer {then}: "
        f"take {most - added}, which cuts it",
        flush=True,
    )


def _settled(cfg: DataConfig, most: int | None, lengths: list[int]) -> DataConfig:
    """`auto` as a number.

    Args:
        most: tokens that the model takes beside an adapter's own; None: any number.
        lengths: tokens of records, sorted.
    """
    wanted = max(2, lengths[math.ceil(SHARE * len(lengths)) - 1])
    taken = wanted if most is None else min(wanted, most)
    limit = "" if most is None else f", and the model takes {most}"
    print(
        f"data.max_length {taken}: of {len(lengths)} records {SHARE:.1%} have at most {wanted} tokens, the longest "
        f"has {lengths[-1]}{limit}",
        flush=True,
    )
    return cfg.model_copy(update={"max_length": taken})


def refuse_beyond(
    data: TokenizedData, cfg: DataConfig, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", added: int = 0
) -> None:
    """Refuse tokens that the model has no embedding for, and records that it has no positions for.

    Args:
        model: with or without weights.
        added: tokens that an adapter puts before a record.

    Raises:
        UserError: there are some.
    """
    from ftray.models.limits import embedded_tokens, positions, record_length

    rows, most = embedded_tokens(model), record_length(model)
    highest = max(split.highest for split in data.splits.values())
    if highest >= rows:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise UserError(
            f"data {cfg.names}: has the token {token!r} of id {highest}, but the model has embeddings for {rows} "
            "tokens: take its own tokenizer, or a model that was resized for the token"
        )
    if most is None or cfg.longest + added <= most:
        return
    longest = longest_record(data)
    if longest + added > most:
        but = (
            f"the model has {most} positions: take {most - added}, or a model without a learnt table of them"
            if positions(model) == most
            else f"{_depends_beyond(most)}: take {most - added}"
        )
        raise UserError(
            f"data.max_length {cfg.max_length}: the longest record has {longest} tokens"
            f"{f' and the adapter puts {added} before it' if added else ''}, but {but}"
        )


def check_special_tokens(name: str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a padding token that the model has no embedding for; say if no token ends an answer.

    Args:
        name: of the model, for the message.

    Raises:
        UserError: the model has no embedding for it.
    """
    from ftray.models.limits import embedded_tokens

    rows, pad = embedded_tokens(model), tokenizer.pad_token_id
    if pad is not None and pad >= rows:
        raise UserError(
            f"model {name}: its tokenizer's padding token {tokenizer.pad_token!r} has id {pad}, but the model has "
            f"embeddings for {rows} tokens: name another pad_token in tokenizer_config.json"
        )
    if tokenizer.eos_token_id is None and model.can_generate():
        print(f"model {name}: its tokenizer has no eos_token: what is learnt has no end, answers run on", flush=True)


def longest_record(data: TokenizedData) -> int:
    """The most tokens that a model reads, or writes, of one record at once."""
    longest = 0
    for name, split in data.splits.items():
        for index in range(len(split.row_groups)):
            table = data.row_group(name, index, ["input_ids", "labels", "lengths"])
            counts = [pyarrow.compute.list_value_length(table[name]) for name in ("input_ids", "labels")]
            if not len(pyarrow.compute.list_flatten(table["lengths"])):  # as for most tasks
                longest = max(longest, *(pyarrow.compute.max(own).as_py() or 0 for own in counts))
                continue
            rows = zip(*(own.to_pylist() for own in (*counts, table["lengths"])), strict=True)
            longest = max(longest, *(longest_text(*row) for row in rows))
    return longest
