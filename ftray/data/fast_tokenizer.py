"""A tokenizer without transformers' classes, which import torch: seconds and hundreds of megabytes of each process."""

import json
import re
from collections.abc import Callable
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from ftray.compat.chat_template import Pieces

MOST_WORDS, LONGEST_WORD = 2**17, 40  # that are kept
# A word after a blank is never one token with what is before it, where a pre-tokenizer is one of those below: none of
# their patterns takes a blank after anything but a blank, or looks beyond a letter, digit or sign.
_WORD_BORDER = re.compile(r" (?<=[!-~] )(?=[A-Za-z])")
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = (_LLAMA3, _LLAMA3.replace("{1,3}", ""))  # the other one is Qwen 2's; ByteLevel has its own
# of transformers' tokenizers over a Tokenizer; whose class has others, may do something else
_AS_USUAL = ("__call__", "_encode_plus", "apply_chat_template", "get_chat_template", "decode", "_decode")


class _Words:
    """The token ids of words that were seen, each after the same blank."""

    def __init__(self, blank: str):
        self._blank, self.known = blank, dict[str, list[int]]()

    def of(self, words: set[str], encoded: Callable[[list[str]], list[list[int]]]) -> dict[str, list[int]]:
        """A mapping in which all `words` are."""
        if len(self.known) > MOST_WORDS:
            self.known = {}
        new = list(words.difference(self.known))
        found = dict(zip(new, encoded([self._blank + word for word in new]), strict=True))
        self.known |= {word: ids for word, ids in found.items() if len(word) <= LONGEST_WORD}
        return self.known | found if found else self.known


class FastTokenizer:
    """What :mod:`ftray.data.tokens` and :mod:`ftray.data.chat` ask of a tokenizer, with the same answers.

    Args:
        state: from :func:`state_of`.
    """

    def __init__(self, state: str):
        known = json.loads(state)
        self._backend = Tokenizer.from_str(known["backend"])
        self._backend.no_truncation()
        self._backend.no_padding()
        self.chat_template: str | None = known["chat_template"]
        self.special_tokens_map: dict[str, str] = known["special_tokens"]
        self.bos_token_id: int | None = known["bos"]
        self.eos_token_id: int | None = known["eos"]
        backend = json.loads(known["backend"])
        self.borders, self.cuts_words = _borders(backend), _cuts_words(backend)
        self.first, self.further = _Words(""), _Words(" ")

    def __call__(self, text: str | list[str], add_special_tokens: bool = True) -> dict[str, Any]:
        """Token ids of one text, or of each of several."""
        if isinstance(text, str):
            return {"input_ids": self._backend.encode(text, add_special_tokens=add_special_tokens).ids}
        if add_special_tokens:
            return {"input_ids": [encoding.ids for encoding in self._backend.encode_batch_fast(text)]}
        return {"input_ids": self._in_sections(text)}

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
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

    def get_chat_template(self, tools: Any = None) -> str:
        """The only one."""
        return self.chat_template or ""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The text of tokens."""
        return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))

    def _in_sections(self, texts: list[str]) -> list[list[int]]:
        """Each text cut at special tokens, which are borders of tokens anyway; equal sections are tokenized once."""
        cut = [self.borders.split(text) if self.borders else [text] for text in texts]
        sections = list(dict.fromkeys(section for parts in cut for section in parts))
        ids = dict(zip(sections, self._by_words(sections) if self.cuts_words else self._encoded(sections), strict=True))
        return [list(chain.from_iterable(map(ids.__getitem__, parts))) for parts in cut]

    def _by_words(self, texts: list[str]) -> list[list[int]]:
        """Each text cut where one word ends and another begins; most words have been seen before."""
        cut = [_WORD_BORDER.split(text) for text in texts]
        first = self.first.of({parts[0] for parts in cut}, self._encoded)
        further = self.further.of(set(chain.from_iterable(parts[1:] for parts in cut)), self._encoded)
        return [
            [*first[parts[0]], *chain.from_iterable(map(further.__getitem__, islice(parts, 1, None)))] for parts in cut
        ]

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def _borders(backend: dict[str, Any]) -> re.Pattern[str] | None:
    """A pattern of the added tokens, which the tokenizer finds in a text before all else; what stands between two of
    them is then tokenized by itself. None: not in this tokenizer, be it that a token takes the blanks around it.
    """
    tokens = [token for token in backend["added_tokens"] if not token["normalized"]]
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in tokens):
        return None
    if '"prepend_scheme": "first"' in json.dumps(backend["pre_tokenizer"]):  # where a text begins matters
        return None
    longest_first = sorted((token["content"] for token in tokens), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None


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


def state_of(tokenizer: Any) -> str | None:
    """What a :class:`FastTokenizer` needs to stand in for a tokenizer of transformers; None: it couldn't."""
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
    }
    return json.dumps(state)
