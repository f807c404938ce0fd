"""Records as prompts, to which the model itself draws answers (GRPO). Imports no torch."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ftray.config import DataConfig
from ftray.data import meanings
from ftray.data.chat import chat_template
from ftray.data.fast_tokenizer import AnyTokenizer
from ftray.data.preference_shapes import ASKS, beside_prompt, prompt_of, read_prompt
from ftray.data.reading import Seen
from ftray.data.record_task import RecordTask
from ftray.data.records import CONVERSATION, REFUSED, Example, answered, as_chat, as_conversation
from ftray.data.respelt import respelt
from ftray.data.shapes import ADDED, Record, Shape, as_text, is_empty, listed, number, object_of
from ftray.data.tokens import Tokens, beginning, rendering
from ftray.data.turns import IN_PART, IN_TURN, TURNS, Turn, are_known, are_turns, read_turns
from ftray.errors import UserError
from ftray.task_spec import CHAT, IGNORE

NEEDS = "prompt (a text or turns), question, problem, instruction/input or messages, also with an answer"
# keys of an answer that a reward may go by, the first one that a record has
_REFERENCES = ("completion", "response", "answer", "answers", "ground_truth", "solution", "output", "target", "summary")
_FINAL = ("answer", "answers", "ground_truth")  # what an answer comes to, also beside one that is written out
# what is asked in some records, and would be lost beside another of these
_ASKED = (
    "inputs",
    *(key for key in meanings.ASKED if key not in meanings.THOUGHTS),
    *(key for ask, more in ASKS for key in (ask, *more)),
)
_PLACEHOLDER = "."  # in place of an answer, as long as a record is read
_TEXTS = tuple(ask for ask in ASKS if ask[0] not in TURNS)
_MAY_BE_ABOUT = ("source", "src", "user", "human")  # keys that may also say where a record is from
_FURTHER_ASKS = tuple((key, ()) for key in ("inputs", "source", "src", "document", "article", "user", "human"))


@dataclass(frozen=True)
class Asked:
    """A prompt.

    Attributes:
        example: what is asked; its target is empty, or its last turn is none of the assistant's.
        reference: an answer that the record has, or empty.
        fields: JSON of the record as it is, for a reward to go by.
        where: the record stands.
    """

    example: Example
    reference: str = ""
    fields: str = "{}"
    where: object = field(default="", compare=False)


def _asked_in(ask: str, further: tuple[str, ...] = ()) -> Shape:
    """A shape of a prompt by its key, and those of what belongs to it."""

    def fits(record: Record) -> bool:
        if ask in TURNS:
            return not isinstance(number(record[ask]), int | float)
        is_compared = ask in _MAY_BE_ABOUT and not is_empty(record.get("chosen"))  # whose turns say what is asked
        return not is_compared and not any(_asked_by_turns(record, *texts) for texts in _TEXTS)

    def parse(record: Record, where: object) -> Asked:
        if is_empty(record.get(ask)):
            raise UserError(
                f"{where}: record with keys {', '.join(map(str, record)) or '(none)'}; known shapes of prompts: {NEEDS}"
            )
        prompt, beside = read_prompt(record, ask, further, where), beside_prompt(record)
        reference = ""
        if isinstance(prompt, str):
            example = answered(prompt, _PLACEHOLDER, beside, where)
        else:
            if prompt[-1].role == "assistant":
                *prompt, answer = prompt
                reference = answer.text
            if not prompt:
                raise UserError(f"{where}: {ask} holds an answer alone: there is nothing to ask")
            context = {index for index, turn in enumerate(prompt) if turn.role == "assistant"}
            example = as_conversation([*prompt, Turn("assistant", _PLACEHOLDER)], context, beside, ask, where)
        final = _reference(record, (ask, *further), where, _FINAL if reference else _REFERENCES)
        return Asked(_unanswered(example), final or reference, where=where)

    return Shape(
        ask,
        (ask,),
        parse,
        (*further, *CONVERSATION),
        {key: why for key, why in REFUSED.items() if why != meanings.PREFERENCE},
        tuple(key for key in dict.fromkeys(_ASKED) if key not in (ask, *further)),
        fits,
        turns=(ask,),
        in_turn=IN_TURN,
        in_part=IN_PART,
        teaches=True,
        compares=True,
        keeps=True,
    )


def _asked_by_turns(record: Record, ask: str, further: tuple[str, ...]) -> bool:
    """Whether turns of a record end, but for their answer, with what stands under `ask`: they are what it asks."""
    if is_empty(record.get(ask)) or not any(are_turns(record.get(key)) for key in TURNS if key != ask):
        return False
    with suppress(UserError):  # of what can't be read, which is refused where it is read
        own = _without_answer(_as_turns(read_prompt(record, ask, further, "")))
        for key in TURNS:
            if key != ask and are_turns(record.get(key)):
                asked = _without_answer(read_turns(record, key, "")[0])
                if own and [*map(_said, asked[-len(own) :])] == [*map(_said, own)]:
                    return True
    return False


def _as_turns(prompt: str | list[Turn]) -> list[Turn]:
    return [Turn("user", prompt)] if isinstance(prompt, str) else prompt


def _without_answer(turns: list[Turn]) -> list[Turn]:
    return turns[:-1] if turns and turns[-1].role == "assistant" else turns


def _said(turn: Turn) -> object:
    return turn.role, turn.text.strip(), turn.calls


def _unanswered(example: Example) -> Example:
    """An example without its last answer."""
    if example.messages is None:
        return replace(example, target="")
    return replace(example, messages=example.messages[:-1])


def _reference(record: Record, asked: Sequence[str], where: object, keys: Sequence[str]) -> str:
    """The text of the answer that stands beside a prompt, of several that are accepted the first; empty: none does."""
    key = next((key for key in keys if key not in asked and not is_empty(record.get(key))), None)
    if key is None:
        return ""
    value = object_of(record[key])
    is_squad = isinstance(value, dict) and (value is record[key] or "answer_start" in value)
    value = value.get("text", value) if is_squad else record[key]  # beside where they begin
    given = listed(value)
    if isinstance(given, list) and given and isinstance(given[0], dict):
        if isinstance(given[0].get("text"), str) and not any(given[0].get(role) for role in meanings.ROLE_KEYS):
            return str(given[0]["text"])
        if not are_known(given):  # what an answer is to be, as calls of tools, or answers with what is said of them
            return value if isinstance(value, str) else ""
        answers = [turn.text for turn in read_turns({key: given}, key, where)[0] if turn.role == "assistant"]
        return answers[-1] if answers else ""
    if isinstance(given, list) and given and (given is value or all(isinstance(text, str) for text in given)):
        value = given[0]
    return "" if isinstance(value, list | dict) or value is None else as_text(value, key, where)


_PROMPTS = [_asked_in(*ask) for ask in (*ASKS, *_FURTHER_ASKS)]


class PromptTask(RecordTask):
    """Prompts, whose answers the model draws itself.

    A row holds the tokens that generation is given, none of which bears loss; `target` is the answer that the record
    has, or empty, and `extra` holds the record, as JSON.
    """

    shapes: ClassVar[Sequence[Shape]] = (*_PROMPTS, respelt(_PROMPTS, _REFERENCES), _asked_in("prompt"))
    record_keys = NEEDS
    grouped_by = "prompt"

    def parse_and_see(self, record: dict[str, Any], where: object) -> tuple[Any, Seen]:
        """As any task does; of a record's keys none is ignored, since a reward is given them."""
        example, seen = super().parse_and_see(record, where)
        held = {key: value for key, value in record.items() if key not in ADDED}
        example = replace(example, fields=json.dumps(held, ensure_ascii=False, default=str))
        return example, Seen(seen.shape, tuple(key for key in seen.ignored if "[]" in key))

    def group(self, example: Asked) -> object:
        """Equal prompts share a split."""
        return prompt_of(example.example)

    def rendering(self, example: Asked, tokenizer: AnyTokenizer, cfg: DataConfig) -> str | None:
        """As that of an answered prompt."""
        return rendering(example.example, tokenizer, cfg)

    def tokenize(self, examples: list[Asked], tokenizer: AnyTokenizer, cfg: DataConfig) -> list[Tokens | None]:
        """The tokens of each prompt; one over `max_length` loses its start, but for a beginning-of-sequence token."""
        texts, starts = [], []
        for asked in examples:
            example, template = asked.example, rendering(asked.example, tokenizer, cfg)
            is_chat = template == CHAT
            if is_chat:
                chat = _unanswered(as_chat(example)) if example.messages is None else example
                texts.append(chat_template(tokenizer).asked(chat))
            else:
                texts.append(template.replace("{prompt}", example.prompt))
            starts.append([] if is_chat else beginning(tokenizer))
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        rows = zip(examples, texts, starts, ids, strict=True)
        return [_fitted(asked, text, [*start, *own], tokenizer.bos_token_id, cfg) for asked, text, start, own in rows]


def _fitted(asked: Asked, text: str, ids: list[int], bos: int | None, cfg: DataConfig) -> Tokens | None:
    over = len(ids) - cfg.longest
    if not ids or (over > 0 and cfg.overlong == "drop"):
        return None
    head = int(ids[0] == bos)
    kept = ids[:head] + ids[head + over :] if over > 0 else ids
    labels = [IGNORE] * len(kept)
    return Tokens(kept, labels, text, asked.reference, len(kept), max(over, 0) and len(ids), extra=asked.fields)
