"""How the next token is chosen, and how chosen tokens become text that ends at a stop string."""

import re
from functools import lru_cache

import torch
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase, TopPLogitsWarper

from ftray.config import COLDEST
from ftray.models.stops import framing
from ftray.serving.generation_request import Sampling, TokenLogprob


def choose(
    logits: torch.Tensor, samplings: list[Sampling], generators: list[torch.Generator | None]
) -> list[int | Exception]:
    """The next token of each row of float32 `logits` [N, vocabulary], or why none can be drawn for it.

    Rows of like settings are warped together.
    """
    chosen: list[int | Exception] = logits.argmax(-1).tolist()
    groups: dict[tuple[float, float], list[int]] = {}
    for row, sampling in enumerate(samplings):
        if sampling.temperature >= COLDEST:
            groups.setdefault((sampling.temperature, sampling.top_p), []).append(row)
    for (temperature, top_p), rows in groups.items():
        try:
            probabilities = list(_probabilities(logits[rows], temperature, top_p))
        except Exception as error:
            chosen = [error if row in rows else own for row, own in enumerate(chosen)]
            continue
        for row, p in zip(rows, probabilities, strict=True):
            try:
                chosen[row] = int(torch.multinomial(p, 1, generator=generators[row]))
            except Exception as error:  # its row alone is lost
                chosen[row] = error
    return chosen


def _probabilities(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the greatest stays finite
    return torch.softmax(TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits, -1)


def token_logprobs(
    logits: torch.Tensor, ids: list[int], alternatives: int, tokenizer: PreTrainedTokenizerBase
) -> list[TokenLogprob]:
    """Each token of `ids` with its log-probability before temperature and top-p.

    Args:
        logits: float32 [N, vocabulary], a row for each of `ids`.
        alternatives: number of likeliest tokens given with each.
        tokenizer: decodes tokens one by one.
    """
    logprobs = torch.log_softmax(logits, -1)
    own = logprobs.gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0].tolist()
    values, places = logprobs.topk(min(alternatives, logprobs.shape[1]))
    tops = [
        [(token_bytes(tokenizer, token), value) for token, value in zip(*row, strict=True)]
        for row in zip(places.tolist(), values.tolist(), strict=True)
    ]
    return [TokenLogprob(token_bytes(tokenizer, token), *rest) for token, *rest in zip(ids, own, tops, strict=True)]


@lru_cache(maxsize=2**16)
def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """The bytes that a token adds to a text: a blank before a word too, and a part of a character as it is."""
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][
        -1:
    ]  # some tokenizers drop the first blank of a text
    before, text = str(tokenizer.decode(anchor)), str(tokenizer.decode([*anchor, token]))
    text = text.removeprefix(before) if text.startswith(before) else str(tokenizer.decode([token]))
    if "\ufffd" not in text:
        return text.encode()
    name = str(tokenizer.convert_ids_to_tokens(token))
    if re.fullmatch("<0x[0-9A-F]{2}>", name):  # how SentencePiece writes a byte
        return bytes.fromhex(name[3:5])
    return bytes(map(_BYTES.__getitem__, name)) if set(name) <= _BYTES.keys() else text.encode()


def _letters() -> dict[str, int]:
    """The letter by which a byte-level tokenizer writes each byte: itself, where it can be seen, else one of others."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(unseen)}


_BYTES = _letters()


class Text:
    """The growing text of one answer.

    Args:
        tokenizer: a fast one.
        prompt: token ids before the answer; some tokenizers decode a token by those before it.
        stop: texts to stop at.

    Attributes:
        stopped: a stop string was met.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: list[int], stop: tuple[str, ...]):
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self._stream, self._frame = DecodeStream(ids=prompt[-8:], skip_special_tokens=False), framing(tokenizer)
        self._held = ""  # may be the start of a stop string
        self._waiting: list[int] = []  # tokens that are no whole character yet

    def add(self, token: int) -> str:
        """The text that is certain now."""
        if token in self._frame:
            return ""
        self._waiting.append(token)
        new = self._stream.step(self.tokenizer.backend_tokenizer, token)
        if new is None:
            return ""
        self._waiting = []
        return self._release(self._held + new, last=False)

    def end(self) -> str:
        """What was held back; half a character becomes U+FFFD."""
        if self.stopped:
            return ""
        rest = self.tokenizer.decode(self._waiting) if self._waiting else ""
        return self._release(self._held + rest, last=True)

    def _release(self, text: str, last: bool) -> str:
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0
        if not last:
            for stop in self.stop:
                lengths = (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n]))
                keep = max(keep, next(lengths, 0))
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
