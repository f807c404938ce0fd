"""What the endpoint sends to a replica that generates and what it gets back, whatever the engine; imports no torch."""

import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from ftray.data.chat import ChatTemplate, chat_template
from ftray.data.records import conversation
from ftray.data.tokens import beginning
from ftray.data.tool_calls import CallFormat
from ftray.errors import UserError
from ftray.models.chat_template import turn_end
from ftray.serving.errors import APIError, invalid
from ftray.task_spec import CHAT, TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and which of them are reported, as the OpenAI reference defines it.

    Attributes:
        temperature: below `COLDEST`, the likeliest token is taken.
        top_p: only the likeliest tokens that together have this probability are drawn from.
        seed: of the sequence's own generator; None: at random.
        stop: texts that end the answer and are not part of it.
        logprobs: number of likeliest alternatives reported with each token; None: no log-probabilities at all.
        echo: the answer begins with the prompt, with its log-probabilities if those are asked for.
        frequency_penalty: taken off a token's logit each time that the answer has it.
        presence_penalty: taken off once, if the answer has it.
        repetition_penalty: divides positive logits of tokens that prompt or answer have, and multiplies negative ones
            (CTRL, arXiv 1909.05858); None: as the model's own `generation_config.json` says.
        logit_bias: is added to the logit of each token.
        schema: JSON schema that the answer conforms to, as text; None: any answer will do.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: bool = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)
    schema: str | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """A request as a replica takes it.

    Attributes:
        prompts: text or token ids of each prompt; empty where `messages` holds one conversation, in OpenAI's words.
        n: answers to each prompt; answer i of prompt p is choice p * n + i.
        adapter: id of the adapter; None: the base model.
        source: directory or URI of the adapter.
        max_tokens: of each answer; None: as many as fit.
        stream: send deltas as they come, not all at the end.
        max_prompt_tokens: longer prompts are refused.
        max_output_tokens: more tokens than this, in all answers together, are refused.
        tools: that the conversation may call, as OpenAI has them.
        must_call: names of tools; the answer is calls of these, and no text; empty: the model decides.
        one_call: such an answer is a single call.
    """

    prompts: list[str] | list[list[int]]
    messages: list[dict[str, Any]] | None
    n: int
    adapter: str | None
    source: str | None
    max_tokens: int | None
    sampling: Sampling
    stream: bool
    max_prompt_tokens: int
    max_output_tokens: int
    tools: list[dict[str, Any]] = field(default_factory=list)
    must_call: tuple[str, ...] = ()
    one_call: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer.

    Attributes:
        data: the bytes of this token alone; a character may need those of several.
        logprob: its log-probability; None: it is the first of an echoed prompt.
        top: the likeliest tokens in its place, each with its log-probability.
    """

    data: bytes
    logprob: float | None = None
    top: list[tuple[bytes, float]] = field(default_factory=list)


@dataclass
class OutputDelta:
    """What is new of one answer; this shape leaves the engine and reaches the response writer.

    Attributes:
        choice: index of the answer.
        text: that is certain now.
        tokens: empty unless log-probabilities are asked for; an echoed prompt's come before the first of the answer.
        count: new tokens of the answer; an echoed prompt's don't count.
        finish: why the answer ends here; None: it continues.
        error: what ended it, where `finish` is "error".
    """

    choice: int
    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    count: int = 0
    finish: Literal["stop", "length", "error"] | None = None
    error: str | None = None


@dataclass
class OutputDeltas:
    """A message of a replica about one request.

    One says that the request has `begun`; then one holds `prompt_tokens`, and deltas follow.

    Attributes:
        deltas: what is new of the answers.
        begun: from here on a step may hold the request, or its adapter is loaded, which the process may not outlive;
            False: it only waits from here on; None: as before.
        prompt_tokens: of all prompts together; None in all messages but one.
        refused: why nothing follows.
        warning: for whoever asked; comes with `prompt_tokens`.
        calls: how an answer's calls are written; comes with `prompt_tokens`; None: they can't be told from text.
    """

    deltas: list[OutputDelta] = field(default_factory=list)
    begun: bool | None = None
    prompt_tokens: int | None = None
    refused: APIError | None = None
    warning: str | None = None
    calls: CallFormat | None = None


class Rendering:
    """How an adapter was trained to be asked.

    Args:
        tokenizer: the base model's.
        trained_as: the task that was stored with the adapter; None: none was.

    Attributes:
        tokenizer: with the chat template that it was trained with.
        ends: tokens that end a turn in this template.
        warning: for clients that send a conversation.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", trained_as: TaskSpec | None):
        self.tokenizer, self.ends = tokenizer, frozenset[int]()
        self.warning: str | None = None
        if trained_as and trained_as.chat_template:
            self.tokenizer = copy.deepcopy(tokenizer)
            self.tokenizer.chat_template = trained_as.chat_template
            self.ends = frozenset(end for end in [turn_end(self.tokenizer)] if end is not None)
        if trained_as and trained_as.template not in (None, CHAT):
            self.warning = (
                f"trained on prompts in the template {trained_as.template!r}, not on chats: ask /v1/completions"
            )

    @cached_property
    def chat(self) -> ChatTemplate:
        """The chat template, which training uses in the same way."""
        return chat_template(self.tokenizer)

    def warnings(self, request: GenerationRequest) -> str | None:
        """What to say to whoever sent `request`; None: nothing."""
        if request.messages is None:
            return None
        untold = "the chat template writes calls in a form that is not known: they are text in the answer"
        given = [self.warning, untold if request.tools and self.chat.call_format is None else None]
        return "; ".join(filter(None, given)) or None

    def calls(self, request: GenerationRequest) -> CallFormat | None:
        """How calls are written in answers to `request`; None: none may be made, or the form is not known."""
        return self.chat.call_format if request.tools else None


def prompt_tokens(request: GenerationRequest, rendering: Rendering, vocab_size: int) -> list[list[int]]:
    """The token ids of each prompt; a conversation is rendered as the model's training renders it.

    Raises:
        APIError: with the field at fault: a prompt has no tokens, or a field some that the model doesn't know.
    """
    tokenizer = rendering.tokenizer
    if request.messages is not None:
        text = _asked(request.messages, request.tools, rendering.chat)
        result = [list(tokenizer(text, add_special_tokens=False)["input_ids"])]
    else:
        first = beginning(tokenizer)  # without the end token that some tokenizers add: the text continues

        def ids_of(text: str) -> list[int]:
            return [*first, *tokenizer(text, add_special_tokens=False)["input_ids"]]

        result = [ids_of(prompt) if isinstance(prompt, str) else prompt for prompt in request.prompts]
    param = _prompt_field(request)
    for ids in result:
        if not ids:
            raise invalid("a prompt has no tokens", param)
        if any(not 0 <= token < vocab_size for token in ids):
            raise invalid(f"prompt tokens must be from 0 to {vocab_size - 1}", param)
    if unknown := [token for token in request.sampling.logit_bias if token >= vocab_size]:
        raise invalid(f"logit_bias: tokens are from 0 to {vocab_size - 1}, not {unknown[0]}", "logit_bias")
    return result


def _asked(messages: list[dict[str, Any]], tools: list[dict[str, Any]], chat: ChatTemplate) -> str:
    """A conversation up to where the model's turn begins.

    Raises:
        APIError: the template refuses it, or leaves a part of it out.
    """
    if not chat.source:
        raise invalid("the model has no chat template: use /v1/completions", "messages")
    if tools and not chat.renders_tools:
        raise invalid("the model's chat template has no place for tools: leave them out", "tools")
    try:
        return chat.asked(conversation(messages, tools, "the request"))
    except UserError as error:
        raise invalid(str(error), "messages") from None


def output_tokens(request: GenerationRequest, prompts: list[list[int]], max_length: int) -> int:
    """The most tokens that each answer may have, of a model that takes `max_length` in all.

    Raises:
        APIError: with the field at fault: the prompt is too long, or more tokens are asked for than are allowed.
    """
    longest, answers = max(map(len, prompts)), len(prompts) * request.n
    allowed = min(request.max_prompt_tokens, max_length)
    if longest > allowed:
        raise invalid(f"the prompt has {longest} tokens; {allowed} are allowed", _prompt_field(request))
    room, share = max_length - longest, request.max_output_tokens // answers
    most = min(room, share) if request.max_tokens is None else request.max_tokens
    if most > share:
        raise invalid(
            f"max_tokens {most} for each of {answers} answers: {request.max_output_tokens} are allowed in all",
            "max_tokens",
        )
    if most > room:
        raise invalid(
            f"{longest} prompt tokens and {most} of the answer are more than the model's {max_length}", "max_tokens"
        )
    return most


def _prompt_field(request: GenerationRequest) -> str:
    return "prompt" if request.messages is None else "messages"
