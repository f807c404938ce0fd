"""A tokenizer without transformers' classes, which import torch: seconds and hundreds of megabytes of each process."""

import json
import re
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ftray.compat.chat_template import Pieces

AnyTokenizer: TypeAlias = "PreTrainedTokenizerBase | FastTokenizer"
Tools: TypeAlias = list[dict[str, Any]] | None  # that a conversation may call, as JSON schemas

MOST_WORDS, LONGEST_WORD = 2**17, 40  # that are kept; characters of one
# A token ends before a blank, and after a line's end, that follow a letter, digit or sign of ASCII, where a
# pre-tokenizer is one of those below: none of their patterns takes a blank after anything but a blank, or such a sign
# after a line's end, or looks beyond a letter, digit or sign.
_WORD_BORDER = re.compile(r"(?<=[!-~])(?= )|(?<=[!-~]\n)(?=[!-~])")
_SIGNS = np.array([ord("!") <= byte <= ord("~") for byte in range(256)])
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = (_LLAMA3, _LLAMA3.replace("{1,3}", ""))  # the other one is Qwen 2's; ByteLevel has its own
# of transformers' tokenizers over a Tokenizer; whose class has others, may do something else
_AS_USUAL = ("__call__", "_encode_plus", "apply_chat_template", "get_chat_template", "decode", "_decode")


class _Words:
    """The token ids of words that were seen, one after another in one row."""

    def __init__(self) -> None:
        self.places = dict[str, int]()
        self._ids, self._ends = np.empty(0, np.int32), np.zeros(1, np.int64)

    def of(self, words: list[str], backend: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A row of token ids, and where in it those of each word begin and end."""
        if len(self.places) > MOST_WORDS:
            self.places, self._ids, self._ends = {}, self._ids[:0], self._ends[:1]
        known = len(self.places)
        new = sorted((word for word in words if word not in self.places), key=len)
        encoded = [encoding.ids for encoding in backend.encode_batch_fast(new, add_special_tokens=False)]
        counts = np.fromiter(map(len, encoded), np.int64, len(new))
        ids = np.concatenate([self._ids, np.fromiter(chain.from_iterable(encoded), np.int32, counts.sum())])
        ends = np.concatenate([self._ends, self._ends[-1] + np.cumsum(counts)])
        self.places |= zip(new, range(known, known + len(new)), strict=True)
        at = np.fromiter(map(self.places.__getitem__, words), np.int64, len(words))
        long = [word for word in new if len(word) > LONGEST_WORD]  # the last of them
        for word in long:
            del self.places[word]
        self._ids, self._ends = ids[: ends[len(self.places)]], ends[: len(self.places) + 1]
        return ids, ends[at], ends[at + 1]


class FastTokenizer:
    """What :mod:`ftray.data.tokens` and :mod:`ftray.data.chat` ask of a tokenizer, with the same answers.

    Args:
        state: from :func:`state_of`.

    Attributes:
        stored: JSON of the tokenizer, as it was.
    """

    def __init__(self, state: str):
        known = json.loads(state)
        self.state, self.stored = state, known["backend"]
        self._backend = Tokenizer.from_str(known["backend"])
        self._backend.no_truncation()
        self._backend.no_padding()
        self.chat_template: str | None = known["chat_template"]
        self.special_tokens_map: dict[str, str] = known["special_tokens"]
        self.bos_token_id: int | None = known["bos"]
        self.eos_token_id: int | None = known["eos"]
        self.pad_token_id: int | None = known["pad"]
        backend = json.loads(known["backend"])
        self.borders, self.cuts_words = _borders(backend), _cuts_words(backend)
        self.words = _Words()
        self._first_bytes = np.zeros(256, bool)  # of special tokens
        self._first_bytes[[token["content"].encode()[0] for token in backend["added_tokens"]]] = True

    def __call__(self, text: str | list[str], add_special_tokens: bool = True) -> dict[str, Any]:
        """Token ids of one text, or of each of several."""
        if isinstance(text, str):
            return {"input_ids": self._backend.encode(text, add_special_tokens=add_special_tokens).ids}
        if add_special_tokens:
            return {"input_ids": [encoding.ids for encoding in self._backend.encode_batch_fast(text)]}
        ids, ends = self.flat(text)
        whole, cuts = ids.tolist(), ends.tolist()
        return {"input_ids": [whole[start:end] for start, end in pairwise([0, *cuts])]}

    def flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of several texts without special tokens around them, one after another, and where each text ends.

        Each text is cut at special tokens, which are borders of tokens anyway, and at words where tokens end with them;
        equal pieces are tokenized once.

        Returns:
            int32 of shape [tokens]; int64 of shape [texts].
        """
        held = pa.array(texts, pa.large_string())
        _, ends, content = held.buffers()
        ends = np.frombuffer(ends, np.int64, len(texts) + 1)
        data = np.frombuffer(content, np.uint8, ends[-1]) if content else np.empty(0, np.uint8)
        starts_piece = np.zeros(len(data) + 1, bool)
        starts_piece[ends] = True
        for at in self._special_tokens(data, ends):
            starts_piece[at] = True
        if self.cuts_words:
            sign = _SIGNS[data]
            starts_piece[1:-1] |= (data[1:] == ord(" ")) & sign[:-1]
            starts_piece[2:-1] |= sign[2:] & (data[1:-1] == ord("\n")) & sign[:-2]
        cuts = np.flatnonzero(starts_piece)
        pieces = pa.LargeStringArray.from_buffers(len(cuts) - 1, pa.py_buffer(cuts), content).dictionary_encode()
        ids, first, last = self.words.of(pieces.dictionary.to_pylist(), self._backend)
        piece = pieces.indices.to_numpy()
        first, counts = first[piece], (last - first)[piece]
        stops = np.cumsum(counts)
        taken = np.repeat(first - (stops - counts), counts) + np.arange(stops[-1] if len(stops) else 0)
        stops = np.concatenate([[0], stops])
        return ids[taken], stops[np.searchsorted(cuts, ends[1:])]

    def _special_tokens(self, data: np.ndarray, ends: np.ndarray) -> list[int]:
        """Where special tokens begin and end in texts that lie one after another."""
        if not self.borders:
            return []
        begin = np.flatnonzero(self._first_bytes[data])
        found, done, whole = list[int](), 0, data.tobytes()
        text_ends = ends[np.searchsorted(ends, begin, "right")]
        for at, end in zip(begin.tolist(), text_ends.tolist(), strict=True):
            if at >= done and (match := self.borders.match(whole, at, end)):
                done = match.end()
                found += (at, done)
        return found

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        tools: Tools = None,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
    ) -> str:
        """The rendered text, as that is all that is asked for here."""
        from ftray.compat.chat_template import render  # takes a second, and texts need none of it

        return render(self.get_chat_template(), messages, tools, add_generation_prompt, self.special_tokens_map)

    def render_pieces(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> "Pieces | None":
        """All that :meth:`apply_chat_template` makes of the first turns, cut at turns; None: not with this template."""
        from ftray.compat.chat_template import render_pieces

        return render_pieces(self.get_chat_template(), messages, tools, self.special_tokens_map)

    def get_chat_template(self, tools: Tools = None) -> str:
        """The only one."""
        return self.chat_template or ""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The text of tokens."""
        return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))


def _borders(backend: dict[str, Any]) -> re.Pattern[bytes] | None:
    """A pattern of the added tokens, which the tokenizer finds in a text before all else; what stands between two of
    them is then tokenized by itself. None: not in this tokenizer, be it that a token takes the blanks around it.
    """
    tokens = [token for token in backend["added_tokens"] if not token["normalized"]]
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in tokens):
        return None
    if '"prepend_scheme": "first"' in json.dumps(backend["pre_tokenizer"]):  # where a text begins matters
        return None
    longest_first = sorted((token["content"].encode() for token in tokens), key=len, reverse=True)
    return re.compile(b"|".join(map(re.escape, longest_first))) if longest_first else None


def _cuts_words(backend: dict[str, Any]) -> bool:
    """Whether a tokenizer makes tokens of each word alone, so that those of a text are those of its words."""
    tokens, model, normalizer = backend["added_tokens"], backend["model"], backend["normalizer"]
    if any(token["lstrip"] or token["rstrip"] or _WORD_BORDER.search(token["content"]) for token in tokens):
        return False
    if model["type"] != "BPE" or model["dropout"] or (normalizer and normalizer["type"] != "NFC"):
        return False
    steps = [backend["pre_tokenizer"] or {"type": ""}]
    if steps[0]["type"] == "Sequence":
        steps = steps[0]["pretokenizers"]
    known = [_is_known(step) for step in steps]
    return None not in known and any(known)


def _is_known(step: dict[str, Any]) -> bool | None:
    """Whether a pre-tokenizer cuts words apart; None: it may do something else."""
    if step["type"] == "Digits":
        return False
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return bool(step["use_regex"])
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return True if step["pattern"].get("Regex") in _PATTERNS else None
    return None


def state_of(tokenizer: AnyTokenizer) -> str | None:
    """What a :class:`FastTokenizer` needs to stand in for a tokenizer of transformers; None: it couldn't."""
    if isinstance(tokenizer, FastTokenizer):
        return tokenizer.state
    from transformers import PreTrainedTokenizerFast

    kind, template = type(tokenizer), tokenizer.chat_template
    usual = all(getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name) for name in _AS_USUAL)
    if not usual or not isinstance(template, str | None):
        return None
    if tokenizer.split_special_tokens or tokenizer.clean_up_tokenization_spaces:
        return None
    state = {
        "backend": tokenizer.backend_tokenizer.to_str(),
        "chat_template": template,
        "special_tokens": tokenizer.special_tokens_map,
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
    }
    return json.dumps(state)
