"""Prompts for inference: read from any source of records, with or without answers, rendered as in training."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ftray.config import DataConfig
from ftray.data.fields import Fields
from ftray.data.formats import lines_of_text, read_chunk
from ftray.data.meanings import ANSWERED, ROLE_KEYS, ROLES, is_verdict, marks_learnt
from ftray.data.records import SHAPES, as_chat, begun_by, parse
from ftray.data.shapes import fitting
from ftray.data.sources import TEXT, find_splits
from ftray.data.tokens import rendering, tokenize
from ftray.data.turns import EXCHANGES, TURNS, turn_list
from ftray.errors import UserError
from ftray.task_spec import CHAT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Renderer:
    """Renders prompts to token ids, by the same rules as training records."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", data: DataConfig, system: str | None, raw: bool = False):
        self.tokenizer, self.system = tokenizer, system
        self.data = data.model_copy(update={"max_length": sys.maxsize, "train_on_prompt": False, "learn": "last"})
        self.raw = raw

    def plain(self, prompt: str) -> list[int]:
        """A prompt in the data template."""
        return self.record("prompt", {"prompt": prompt}, False)

    def turns(self, turns: list[tuple[str, str]]) -> list[int]:
        """A conversation in the tokenizer's chat template, up to the start of the assistant's turn."""
        return self.record("prompt", {"messages": [{"role": role, "content": text} for role, text in turns]}, True)

    def record(self, where: object, record: dict[str, Any], chat: bool) -> list[int]:
        """A record of any shape that training takes, with or without an answer, which is ignored.

        Raises:
            UserError: it has no such shape; says where.
        """
        example = parse(_with_answer(record), where)
        if example.messages is None and not example.prompt and "text" in record:  # to be continued, not answered
            ids = tokenize([example], self.tokenizer, self.data)[0].input_ids  # type: ignore[union-attr]
            return ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids
        if example.messages is None and (chat or rendering(example, self.tokenizer, self.data) == CHAT):
            example = as_chat(example)
        if self.system and example.messages is not None and example.messages[0].role not in ("system", "developer"):
            example = begun_by(self.system, example)
        tokens = tokenize([example], self.tokenizer, self.data)[0]
        assert tokens is not None  # it has an answer and no limit of length
        if not tokens.prompt_tokens:
            raise UserError(f"{where}: has no tokens: say something")
        return tokens.input_ids[: tokens.prompt_tokens]


def _with_answer(record: dict[str, Any]) -> dict[str, Any]:
    """The record with a placeholder for an answer, so that it parses as a training record."""
    # what is said of its answer
    record = {key: value for key, value in record.items() if marks_learnt(key) is None and not is_verdict(key)}
    last = {"role": "assistant", "content": "."}
    for key in TURNS:
        turns = turn_list(record.get(key))
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            *before, end = turns
            asked = next((ask for ask, _ in EXCHANGES if isinstance(end.get(ask), str)), None)
            if asked and not any(end.get(role) for role in ROLE_KEYS):
                end = {"role": "user", "content": end[asked]}
            answers = any(ROLES.get(str(end.get(role)).lower()) == "assistant" for role in ROLE_KEYS)
            return {**record, key: [*before, *([] if answers else [end]), last]}
    for asked, answer in (("prompt", "completion"), ("input", "output")):
        if isinstance(record.get(asked), list):
            return {**record, answer: [last]}
    pairs = [shape for shape in SHAPES if len(shape.required_keys) == 2]
    shape = fitting(record, pairs)
    if shape is None and "text" not in record:
        shape = next((pair for pair in pairs if record.get(pair.required_keys[0]) is not None), None)
    return {**record, shape.required_keys[1]: "."} if shape else record


def read_records(name: str, data: DataConfig | None = None) -> Iterator[tuple[object, dict[str, Any]]]:
    """Where each prompt stands, and its record; a line of a text file is a plain prompt.

    Args:
        name: what training takes as a source.
        data: its delimiter and encoding, if they are given.

    Raises:
        UserError: it can't be read, holds no prompt, or something that is not a record.
    """
    own = DataConfig(delimiter=data.delimiter, encoding=data.encoding) if data else DataConfig()  # fields: see `mapped`
    found = False
    for chunk in (chunk for split in find_splits(name, own).values() for chunk in split):
        plain = f".{chunk.kind}" in TEXT
        records = ((where, {"prompt": line}) for where, line in lines_of_text(chunk)) if plain else read_chunk(chunk)
        for where, record in records:
            found = True
            yield where, record
    if not found:
        raise UserError(f"file {name}: holds no prompt")


def mapped(records: list[tuple[object, dict[str, Any]]], data: DataConfig) -> Iterator[tuple[object, dict[str, Any]]]:
    """The records as `data.fields` has them, but for an answer, which prompts lack.

    Raises:
        UserError: a key is missing, or a template fails.
    """
    fields = Fields({field: made_of for field, made_of in data.fields.items() if field not in ANSWERED})
    for where, record in records:
        yield where, fields(record, where) if data.fields else record
