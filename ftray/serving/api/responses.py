"""Writes the deltas of a replica as an answer in OpenAI's shape, whole or as a stream."""

import json
import time
import uuid
from codecs import IncrementalDecoder, getincrementaldecoder
from typing import Any

from ftray.data.tool_calls import CallFormat, CallReader, ToolCall
from ftray.serving.api.chat_requests import ChatCompletionRequest
from ftray.serving.api.requests import CompletionRequest, GenerationParameters
from ftray.serving.errors import model_error
from ftray.serving.generation_request import OutputDelta


def usage(prompt: int, completion: int) -> dict[str, int]:
    """The tokens of an answer."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def event(value: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


class ResponseWriter:
    """Writes the deltas of one request.

    Attributes:
        calls: how calls of tools are written in the answers; None: they hold none, or it is not known.
    """

    prefix, kind, chunk_kind = "", "", ""
    calls: CallFormat | None = None

    def __init__(self, body: GenerationParameters):
        self.model, self.id, self.created = body.model, f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def whole(self, deltas: list[OutputDelta], count: int) -> dict[str, Any]:
        """The answer with its `count` choices, without usage.

        Raises:
            APIError: the engine could not finish one.
        """
        joined = [OutputDelta(choice) for choice in range(count)]
        for delta in deltas:
            refuse_failed(delta)
            own = joined[delta.choice]
            own.text += delta.text
            own.tokens += delta.tokens
            own.finish = delta.finish or own.finish
        return self._frame(self.kind, [self.choice(delta) for delta in joined])

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """One event of a stream."""
        return self._frame(self.chunk_kind, choices)

    def chunks(self, deltas: list[OutputDelta]) -> list[dict[str, Any]]:
        """The events of a stream that `deltas` make.

        Raises:
            APIError: the engine could not finish an answer.
        """
        raise NotImplementedError

    def choice(self, delta: OutputDelta) -> dict[str, Any]:
        """A whole choice."""
        raise NotImplementedError

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


class CompletionWriter(ResponseWriter):
    """Of /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, body: CompletionRequest):
        super().__init__(body)
        self._decoders: dict[int, IncrementalDecoder] = {}  # of the tokens of each choice
        self._offsets: dict[int, int] = {}  # characters of the tokens of each choice so far

    def choice(self, delta: OutputDelta) -> dict[str, Any]:
        logprobs = self._logprobs(delta) if delta.tokens else None
        return {"index": delta.choice, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish}

    def chunks(self, deltas: list[OutputDelta]) -> list[dict[str, Any]]:
        result = []
        for delta in deltas:
            refuse_failed(delta)
            if delta.text or delta.tokens or delta.finish:
                result.append(self.chunk([self.choice(delta)]))
        return result

    def _logprobs(self, delta: OutputDelta) -> dict[str, Any]:
        offsets, at = [], self._offsets.get(delta.choice, 0)
        decoder = self._decoders.setdefault(delta.choice, getincrementaldecoder("utf-8")("replace"))
        for token in delta.tokens:
            offsets.append(at)
            at += len(decoder.decode(token.data))
        self._offsets[delta.choice] = at
        return {
            "tokens": [_shown(token.data) for token in delta.tokens],
            "token_logprobs": [token.logprob for token in delta.tokens],
            "top_logprobs": [
                None
                if token.logprob is None
                else {_shown(data): value for data, value in (*token.top, (token.data, token.logprob))}
                for token in delta.tokens
            ],
            "text_offset": offsets,
        }


class ChatCompletionWriter(ResponseWriter):
    """Of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, body: ChatCompletionRequest):
        super().__init__(body)
        self.tools, self.most_calls = body.offered, 1 if body.one_call else None
        self._never_without = bool(body.must_call) and not body.stops  # calls, in an answer that is whole
        self._begun: set[int] = set()  # choices whose first event has been written
        self._readers: dict[int, CallReader] = {}  # of each choice, where answers may hold calls

    def choice(self, delta: OutputDelta) -> dict[str, Any]:
        text, calls = self._read(delta)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        choice = {"index": delta.choice, "message": message, "logprobs": self._logprobs(delta)}
        return {**choice, "finish_reason": _finish(delta, calls)}

    def chunks(self, deltas: list[OutputDelta]) -> list[dict[str, Any]]:
        result = []
        for delta in deltas:
            refuse_failed(delta)
            text, calls = self._read(delta)
            content: dict[str, Any] = {"content": text} if text else {}
            if delta.choice not in self._begun:
                self._begun.add(delta.choice)
                content = {"role": "assistant", "content": text}
            if calls:
                content["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
            if content or delta.tokens or delta.finish:
                choice = {"index": delta.choice, "delta": content, "logprobs": self._logprobs(delta)}
                result.append(self.chunk([{**choice, "finish_reason": _finish(delta, calls)}]))
        return result

    def _read(self, delta: OutputDelta) -> tuple[str, list[dict[str, Any]]]:
        """The text of a delta that is certain not to be part of a call, and, with the last one, the calls."""
        if self.calls is None:
            return delta.text, []
        reader = self._readers.setdefault(delta.choice, CallReader(self.calls, self.tools))
        text = reader.add(delta.text)
        if delta.finish is None:
            return text, []
        rest, calls = reader.end()
        if self._never_without and delta.finish == "stop" and not calls:
            raise model_error("it wrote a call that can't be read back")
        return text + rest, [_call(call) for call in calls[: self.most_calls]]

    def _logprobs(self, delta: OutputDelta) -> dict[str, Any] | None:
        def entry(data: bytes, logprob: float | None) -> dict[str, Any]:
            return {"token": _shown(data), "logprob": logprob, "bytes": list(data)}

        if not delta.tokens:
            return None
        content = [
            {**entry(token.data, token.logprob), "top_logprobs": [entry(*top) for top in token.top]}
            for token in delta.tokens
        ]
        return {"content": content, "refusal": None}


def _shown(data: bytes) -> str:
    r"""The text of a token; what is no whole character in it as OpenAI writes it: \xe2\x82."""
    return data.decode("utf-8", "backslashreplace")


def _call(call: ToolCall) -> dict[str, Any]:
    """A call in OpenAI's shape; some chat templates take ids of nine letters and digits alone."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id or uuid.uuid4().hex[:9], "type": "function", "function": function}


def _finish(delta: OutputDelta, calls: list[dict[str, Any]]) -> str | None:
    return "tool_calls" if calls and delta.finish == "stop" else delta.finish


def refuse_failed(delta: OutputDelta) -> None:
    """End the response with an error where the engine did.

    Raises:
        APIError: says what failed.
    """
    if delta.finish == "error":
        raise model_error(delta.error or "no reason given")
