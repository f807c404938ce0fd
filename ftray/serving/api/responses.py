"""How the parts that a replica sends become an answer in OpenAI's words, whole or as a stream."""

import json
import time
import uuid
from typing import Any

from ftray.serving.api.requests import APIError, GenerationParameters
from ftray.serving.generation_request import OutputDelta


def usage(prompt: int, completion: int) -> dict[str, int]:
    """The tokens of an answer."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def event(value: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


class Response:
    """How parts become an answer in OpenAI's words."""

    prefix, kind, chunk_kind = "", "", ""

    def __init__(self, asked: GenerationParameters):
        self.asked, self.id, self.created = asked, f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.asked.model}
        return {**head, "choices": choices}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """One event of a stream."""
        return self._frame(self.chunk_kind, choices)

    def whole(self, parts: list[OutputDelta], count: int) -> dict[str, Any]:
        """The answer with its `count` choices.

        Raises:
            APIError: the engine could not finish one.
        """
        joined = [OutputDelta(choice) for choice in range(count)]
        for part in parts:
            own = joined[part.choice]
            own.text += part.text
            own.tokens += part.tokens
            own.finish = part.finish or own.finish
        for part in joined:
            if (part.finish or "").startswith("error"):
                raise APIError(500, part.finish or "", code="model_error")
        return self._frame(self.kind, [self.choice(part) for part in joined])

    def choice(self, part: OutputDelta) -> dict[str, Any]:
        """A whole choice."""
        raise NotImplementedError


class CompletionResponse(Response):
    """Of /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, asked: GenerationParameters):
        super().__init__(asked)
        self.offsets: dict[int, int] = {}  # characters given of each choice

    def choice(self, part: OutputDelta) -> dict[str, Any]:
        logprobs = None
        if part.tokens:
            offsets, at = [], self.offsets.get(part.choice, 0)
            for text, *_ in part.tokens:
                offsets.append(at)
                at += len(text)
            self.offsets[part.choice] = at
            tops = [None if own is None else {**dict(top), text: own} for text, own, top in part.tokens]
            logprobs = {
                "tokens": [text for text, *_ in part.tokens],
                "token_logprobs": [own for _, own, _ in part.tokens],
                "top_logprobs": tops,
                "text_offset": offsets,
            }
        return {"index": part.choice, "text": part.text, "logprobs": logprobs, "finish_reason": part.finish}

    def chunks(self, parts: list[OutputDelta]) -> list[dict[str, Any]]:
        """The events of a stream that `parts` make."""
        return [self.chunk([self.choice(part)]) for part in parts if part.text or part.tokens or part.finish]


class ChatCompletionResponse(Response):
    """Of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, asked: GenerationParameters):
        super().__init__(asked)
        self.begun: set[int] = set()

    def _logprobs(self, part: OutputDelta) -> dict[str, Any] | None:
        def entry(text: str, logprob: float | None) -> dict[str, Any]:
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        if not part.tokens:
            return None
        content = [{**entry(t, own), "top_logprobs": [entry(*e) for e in top]} for t, own, top in part.tokens]
        return {"content": content, "refusal": None}

    def choice(self, part: OutputDelta) -> dict[str, Any]:
        message = {"role": "assistant", "content": part.text, "refusal": None}
        choice = {"index": part.choice, "message": message, "logprobs": self._logprobs(part)}
        return {**choice, "finish_reason": part.finish}

    def chunks(self, parts: list[OutputDelta]) -> list[dict[str, Any]]:
        """The events of a stream that `parts` make."""
        result = []
        for part in parts:
            delta: dict[str, Any] = {"content": part.text} if part.text else {}
            if part.choice not in self.begun:
                self.begun.add(part.choice)
                delta = {"role": "assistant", "content": part.text}
            if delta or part.tokens or part.finish:
                choice = {"index": part.choice, "delta": delta, "logprobs": self._logprobs(part)}
                result.append(self.chunk([{**choice, "finish_reason": part.finish}]))
        return result
