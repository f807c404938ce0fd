"""What the endpoint asks of a replica that generates, and what it gets: plain data, whatever the engine."""

import copy
from dataclasses import dataclass, field
from typing import Any

from ftray.errors import UserError
from ftray.models.chat_template import turn_end
from ftray.task_spec import CHAT, TaskSpec


@dataclass(frozen=True)
class GenerationRequest:
    """A request as a replica takes it.

    Attributes:
        prompts: text or tokens of each prompt; or one conversation.
        n: answers to each prompt; answer i of prompt p is choice p * n + i.
        adapter, source: id and place of the adapter; None: the base model.
        sampling: as :class:`ftray.serving.sampling.Sampling`; `max_tokens` None: as many as may be.
        stream: give parts as they come, not all at the end.
        max_prompt_tokens, max_output_tokens: what is more is refused.
    """

    prompts: list[str] | list[list[int]]
    messages: list[dict[str, str]] | None
    n: int
    adapter: str | None
    source: str | None
    sampling: dict[str, Any]
    stream: bool
    max_prompt_tokens: int
    max_output_tokens: int


@dataclass
class OutputDelta:
    """What is new of one choice. Tokens are (text, log-probability, likeliest (text, log-probability))."""

    choice: int
    text: str = ""
    tokens: list[tuple[str, float | None, list[tuple[str, float]]]] = field(default_factory=list)
    count: int = 0  # tokens of the answer
    finish: str | None = None


@dataclass
class OutputDeltas:
    """What a replica sends: first nothing, to say that it is there, then the prompts' tokens, then parts.

    Or why there is nothing to expect. Where parts come all at the end, it says when it is `answering`. With the
    prompts' tokens may come a `warning` for whoever asked.
    """

    parts: list[OutputDelta] = field(default_factory=list)
    prompt_tokens: int | None = None
    answering: bool = False
    refused: tuple[int, str, str | None] | None = None  # status, reason, field
    warning: str | None = None


class Rendering:
    """How an adapter was trained to be asked.

    Args:
        tokenizer: the base model's.
        trained_as: what was kept beside the adapter; None: nothing.

    Attributes:
        tokenizer: with the chat template that it was trained with.
        ends: tokens that end a turn in this template.
        warning: what to say to whoever asks it in a conversation.
    """

    def __init__(self, tokenizer: Any, trained_as: TaskSpec | None):
        self.tokenizer, self.ends, self.warning = tokenizer, frozenset[int](), None
        if trained_as and trained_as.chat_template:
            self.tokenizer = copy.deepcopy(tokenizer)
            self.tokenizer.chat_template = trained_as.chat_template
            self.ends = frozenset(end for end in [turn_end(self.tokenizer)] if end is not None)
        if trained_as and trained_as.template not in (None, CHAT):
            self.warning = (
                f"trained on prompts in the template {trained_as.template!r}, not on chats: ask /v1/completions"
            )


def prompt_tokens(job: GenerationRequest, tokenizer: Any, words: int) -> list[list[int]]:
    """Each prompt as tokens, for a model that knows `words` of them; a conversation by the model's chat template.

    Raises:
        UserError: with the field at fault; there are none, or such as the model doesn't know.
    """
    if job.messages is not None:
        if not tokenizer.chat_template:
            raise UserError("the model has no chat template: use /v1/completions", "messages")
        try:
            rendered = tokenizer.apply_chat_template(job.messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program, and raises whatever it likes
            raise UserError(f"the model's chat template refuses these messages: {error}", "messages") from None
        result = [list(tokenizer(rendered, add_special_tokens=False)["input_ids"])]
    else:
        result = [list(tokenizer(p)["input_ids"]) if isinstance(p, str) else p for p in job.prompts]
    where = "prompt" if job.messages is None else "messages"
    for ids in result:
        if not ids:
            raise UserError("a prompt has no tokens", where)
        if any(not 0 <= token < words for token in ids):
            raise UserError(f"prompt tokens must be from 0 to {words - 1}", where)
    return result


def output_tokens(job: GenerationRequest, prompts: list[list[int]], max_length: int) -> int:
    """How many tokens each answer may have, of a model that takes `max_length` in all.

    Raises:
        UserError: with the field at fault; more than there may be.
    """
    where = "prompt" if job.messages is None else "messages"
    longest, answers = max(map(len, prompts)), len(prompts) * job.n
    allowed = min(job.max_prompt_tokens, max_length)
    if longest > allowed:
        raise UserError(f"the prompt has {longest} tokens; {allowed} are allowed", where)
    room, share = max_length - longest, job.max_output_tokens // answers
    most: int | None = job.sampling["max_tokens"]
    if most is None:
        most = min(room, share)
    if most > share:
        raise UserError(
            f"max_tokens {most} for each of {answers} answers: {job.max_output_tokens} are allowed in all", "max_tokens"
        )
    if most > room:
        raise UserError(
            f"{longest} prompt tokens and {most} of the answer are more than the model's {max_length}", "max_tokens"
        )
    return most
