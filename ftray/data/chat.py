"""Conversations as a chat template renders them: what stands before each answer, and the answer itself.

Templates differ in what they can render, and hardly any says so: a call, a tool or a thought that it leaves out would
be lost without a word. So each template is tried once on small conversations.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ftray.data.fast_tokenizer import AnyTokenizer, FastTokenizer, Tools
from ftray.data.records import Example
from ftray.data.tool_calls import CallFormat, find_call_format
from ftray.data.turns import Turn
from ftray.errors import UserError

if TYPE_CHECKING:
    from ftray.compat.chat_template import Pieces

_MARK = "zqxj"  # a word that stands in no template
_TAIL = 20  # characters at the end of a text by which it is found again: templates may word its beginning anew
_USER = {"role": "user", "content": "?"}
_GIVE = "take a model whose chat template does, or give one, as in --data.chat_template chatml"


@dataclass(frozen=True)
class Answer:
    """One learnt turn as it is rendered.

    Attributes:
        before: all that stands before it, which generation is given.
        text: the turn itself, with what ends it.
        spans: the characters of `text` that bear loss.
        said: what the turn says, without what the template puts around it.
    """

    before: str
    text: str
    spans: tuple[tuple[int, int], ...]
    said: str


def chat_template(tokenizer: AnyTokenizer) -> "ChatTemplate":
    """The tokenizer's chat template, tried once."""
    return _tried_once(tokenizer, _source(tokenizer))


@lru_cache(maxsize=8)
def _tried_once(tokenizer: AnyTokenizer, source: str) -> "ChatTemplate":
    return ChatTemplate(tokenizer, source)


def _source(tokenizer: AnyTokenizer) -> str:
    template = tokenizer.chat_template
    return json.dumps(template) if isinstance(template, dict | list) else template or ""


class ChatTemplate:
    """A tokenizer's chat template, and what it can render.

    Attributes:
        source: its text; empty: there is none.
    """

    def __init__(self, tokenizer: AnyTokenizer, source: str):
        self._tokenizer, self.source = tokenizer, source
        self._roles: dict[str, bool] = {}

    def answers(self, example: Example, learn: str) -> Iterator[Answer]:
        """The turns of a conversation that bear loss, each in the rendering in which it was asked for.

        Args:
            learn: which of them: see `data.learn`.

        Raises:
            UserError: the template can't render them, or leaves something out; says where the record stands.
        """
        if not self.source:
            raise UserError(
                f"{example.where}: a chat, but the model's tokenizer has no chat template: take an instruction-tuned "
                "model, give one, as in --data.chat_template chatml, or give prompt/completion records, without "
                "system and history"
            )
        messages = self.messages(example)
        tools = [*example.tools] or None
        turns = example.messages or ()
        learnt = example.learnt[-1:] if learn == "last" else example.learnt
        pieces = self._pieces(messages[: learnt[-1] + 1], tools) if learnt and learn != "generation" else None
        for index in learnt:
            yield self._answer(messages, turns[index], index, tools, learn == "generation", pieces, example.where)

    def asked(self, example: Example) -> str:
        """The rendering in which an answer to all turns of a conversation is asked for.

        Raises:
            UserError: the template can't render them, or leaves something out.
        """
        return self._rendered(self.messages(example), [*example.tools] or None, True, example.where)

    def _answer(
        self,
        messages: list[dict[str, Any]],
        turn: Turn,
        index: int,
        tools: Tools,
        tagged: bool,
        pieces: "Pieces | None",
        where: object,
    ) -> Answer:
        spans: list[tuple[int, int]] = []
        if tagged:
            answered, spans = self._tagged(messages[: index + 1], tools, where)
        elif pieces:
            answered = pieces.begun[index + 1] + pieces.end
        else:
            answered = self._rendered(messages[: index + 1], tools, False, where)
        if pieces and index:
            asked = pieces.begun[index] + pieces.ask
        else:
            asked = self._rendered(messages[:index], tools, True, where) if index else ""
        said = messages[index]["content"] or ""
        if not asked or not answered.startswith(asked):  # nothing was asked, or the template renders it otherwise later
            answer_at = answered.rfind(said.strip()) if said.strip() else -1
            if answer_at < 0:
                raise UserError(f"{where}: the chat template leaves out the assistant's turn {index}")
            asked = answered[:answer_at]
        text = answered[len(asked) :]
        self._check_whole(turn, text, index, where)
        if not said.strip():
            said = self._without_special(text)
        cut = [(max(0, start - len(asked)), end - len(asked)) for start, end in spans if end > len(asked)]
        return Answer(asked, text, tuple(cut) if tagged else ((0, len(text)),), said)

    def _check_whole(self, turn: Turn, text: str, index: int, where: object) -> None:
        """Refuse a rendering that lacks a part of the turn."""
        if turn.text.strip()[-_TAIL:] not in text:
            raise UserError(f"{where}: the chat template leaves out the assistant's turn {index}")
        if turn.thoughts.strip()[-_TAIL:] not in text:
            raise UserError(
                f"{where}: the chat template leaves out what the assistant thought in turn {index}: {_GIVE}, or put it "
                "into the answer"
            )

    def _without_special(self, text: str) -> str:
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def messages(self, example: Example) -> list[dict[str, Any]]:
        """The turns as the template takes them.

        Raises:
            UserError: they hold what it leaves out.
        """
        if example.tools and not self.renders_tools:
            raise UserError(f"{example.where}: tools: the model's chat template leaves them out: {_GIVE}")
        messages = [self._message(turn, index, example.where) for index, turn in enumerate(example.messages or ())]
        for role in {message["role"] for message in messages} - {"user", "assistant"}:
            if not self._renders_role(role):
                raise UserError(f"{example.where}: the model's chat template leaves out turns of {role}: {_GIVE}")
        return messages

    def _message(self, turn: Turn, index: int, where: object) -> dict[str, Any]:
        role = "system" if turn.role == "developer" and "developer" not in self.source else turn.role
        message: dict[str, Any] = {"role": role, "content": turn.text, **turn.more}
        if turn.thoughts:
            message |= {"reasoning_content": turn.thoughts, "thinking": turn.thoughts}
        if not turn.calls:
            return message
        if self.call_form is None:
            if not turn.words:
                raise UserError(
                    f"{where}: turn {index} calls a tool, which the model's chat template leaves out: {_GIVE}"
                )
            return message | {"content": turn.words}
        content, as_text = self.call_form
        return message | {"content": turn.text or content, "tool_calls": [_call(call, as_text) for call in turn.calls]}

    @cached_property
    def renders_tools(self) -> bool:
        """Whether the tools that there are stand in a rendering."""
        function = {"name": _MARK, "description": "", "parameters": {"type": "object", "properties": {}}}
        return _MARK in self._tried([_USER], [{"type": "function", "function": function}])

    @cached_property
    def call_form(self) -> tuple[str | None, bool] | None:
        """The content of a turn that only calls, and whether arguments are text; None: calls are left out.

        Some templates look for `content: null`, others print it; some write arguments as JSON, others take them as
        they are, and fail on an object.
        """
        call = {"type": "function", "id": "call00001", "function": {"name": _MARK, "arguments": {"zqkey": "zqvalue"}}}
        for as_text in (False, True):
            shown = {
                content: self._tried(
                    [_USER, {"role": "assistant", "content": content, "tool_calls": [_call(call, as_text)]}]
                )
                for content in (None, "")
            }
            whole = {content for content, text in shown.items() if _MARK in text and "zqvalue" in text}
            spoilt = {content for content in whole if '\\"' in shown[content] or "{'zqkey'" in shown[content]}
            fit = [content for content in shown if content in whole - spoilt]
            if len(fit) == 2 and "None" in shown[None] and "None" not in shown[""]:
                fit = [""]
            if fit:
                return fit[0], as_text
        return None

    @cached_property
    def call_format(self) -> CallFormat | None:
        """How calls are written; None: they are left out, or written in no known way."""
        if self.call_form is None:
            return None
        content, as_text = self.call_form

        def written(calls: list[dict[str, Any]]) -> str:
            wrapped = [{"id": call["id"], "type": "function", "function": _function(call)} for call in calls]
            turn = {"role": "assistant", "content": content, "tool_calls": [_call(call, as_text) for call in wrapped]}
            return self._tried([_USER, turn])

        return find_call_format(written, self._tried([_USER, {"role": "assistant", "content": _MARK.upper()}]))

    def _renders_role(self, role: str) -> bool:
        """Whether a turn of that role stands in a rendering, or is refused with one."""
        if role not in self._roles:
            turn = {"role": role, "content": _MARK, "name": "f", "tool_call_id": "call00001"}
            asks = [_USER, {"role": "assistant", "content": "!"}] if role == "tool" else []
            text = self._tried([*asks, turn] if asks else [turn, _USER])
            self._roles[role] = not text or _MARK in text
        return self._roles[role]

    @cached_property
    def marks_generation(self) -> bool:
        """Whether it says what the assistant's part is."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None

    def _tried(self, messages: list[dict[str, Any]], tools: Tools = None) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
        except Exception:  # a template is a program, and raises whatever it likes
            return ""

    def _pieces(self, messages: list[dict[str, Any]], tools: Tools) -> "Pieces | None":
        """The renderings of the first turns, if they can be had at once."""
        if not isinstance(self._tokenizer, FastTokenizer):
            return None
        try:
            return self._tokenizer.render_pieces(messages, tools)
        except Exception:  # a template is a program, and raises whatever it likes: of which turns, one by one will tell
            return None

    def _rendered(self, messages: list[dict[str, Any]], tools: Tools, ask: bool, where: object) -> str:
        with _refusals(where):
            return str(
                self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask)
            )

    def _tagged(self, messages: list[dict[str, Any]], tools: Tools, where: object) -> tuple[str, list[tuple[int, int]]]:
        from ftray.compat.chat_template import with_generation_spans  # takes a second, and most need none of it

        if not self.marks_generation:
            raise UserError("data.learn generation: the model's chat template has no {% generation %} in it")
        with _refusals(where):
            template = self._tokenizer.get_chat_template(tools=tools)
            return with_generation_spans(template, messages, tools, self._tokenizer.special_tokens_map)


class _refusals:
    """What a template raises, as a UserError about the record."""

    def __init__(self, where: object):
        self.where = where

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):  # a template is a program, and raises whatever it likes
            raise UserError(f"{self.where}: the model's chat template refuses these turns: {error}") from None


def _function(call: dict[str, Any]) -> dict[str, Any]:
    return {"name": call["name"], "arguments": call["arguments"]}


def _call(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}
