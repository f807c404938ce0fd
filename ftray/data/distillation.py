"""Answers with a teacher's stored log-probabilities of its most likely tokens. Imports no torch."""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar

from ftray.config import DataConfig
from ftray.data.fast_tokenizer import AnyTokenizer, FastTokenizer
from ftray.data.record_task import RecordTask
from ftray.data.records import REFUSED, SHAPES, Example
from ftray.data.shapes import Record, Shape, has_teacher, is_empty
from ftray.data.tokens import Tokens, fit, rendering, tokenize
from ftray.data.unpaired_shapes import last_alone
from ftray.errors import UserError
from ftray.task_spec import IGNORE

NEEDS = (
    "a prompt and its answer, or messages, with logprobs (content[].top_logprobs, as OpenAI and vLLM give them), or "
    "with teacher_tokens and teacher_logprobs (a list of ids and one of numbers for each token of the answer)"
)
KEYS = ("logprobs", "teacher_tokens", "teacher_logprobs", "completion_ids")
ABSENT = -1e4  # log-probability that fills up a position with fewer tokens than others of its row: none at all
LEAST = -100.0  # of the likeliest token: that of none is shown, where all others are less likely still
MOST = 1.05  # that probabilities may add up to, which were rounded
_TOKEN_ID = "token_id:"  # how vLLM writes tokens with `return_tokens_as_token_ids`
_UNKNOWN = "\ufffd".encode()  # what is shown of a token that holds a part of a character
_SAME = "teacher and base need the same tokenizer"

Name = int | bytes  # of a token: its id, or what it stands for


@dataclass(frozen=True)
class Position:
    """What a teacher said of one token.

    Attributes:
        token: that follows; None: the record doesn't say it here.
        names, logprobs: of the tokens that it found most likely.
    """

    token: Name | None
    names: tuple[Name, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Distilled:
    """An answer, and what a teacher said of each of its tokens."""

    example: Example
    positions: tuple[Position, ...]
    where: object = field(default="", compare=False)


def _distilled(shape: Shape) -> Shape:
    """The shape of an answer with a teacher's log-probabilities beside."""

    def parse(record: Record, where: object) -> Distilled:
        example = shape.parse({key: value for key, value in record.items() if key not in KEYS}, where)
        positions = tuple(_positions(record, where))
        if not positions:
            raise UserError(f"{where}: logprobs holds no token")
        return Distilled(last_alone(example, len(shape.turns) == 2, where), positions, where)

    def fits(record: Record) -> bool:
        return has_teacher(record) and (shape.fits is None or bool(shape.fits(record)))

    return replace(shape, parse=parse, fits=fits, honours=(*shape.honours, *KEYS), refuses=REFUSED)


def _positions(record: Record, where: object) -> Iterator[Position]:
    """What the teacher said of each token of an answer, in order."""
    if is_empty(record.get("logprobs")):
        yield from _positions_of_ids(record, where)
        return
    given = _parsed(record["logprobs"])
    content = given.get("content") if isinstance(given, dict) else given
    if not isinstance(content, list):
        raise UserError(f"{where}: logprobs must hold a list of tokens as content, as OpenAI and vLLM give them")
    for index, entry in enumerate(content):
        at = f"logprobs.content[{index}]"
        token, own = _named(entry, at, where)
        top = entry.get("top_logprobs")
        if not isinstance(top, list) or not top:
            raise UserError(f"{where}: {at} has no top_logprobs: ask the teacher for them, as by top_logprobs 20")
        likely = dict(_named(other, f"{at}.top_logprobs[{n}]", where) for n, other in enumerate(top))
        likely.setdefault(token, own)
        yield _position(token, likely, at, where)


def _position(token: Name | None, likely: dict[Name, float], at: str, where: object) -> Position:
    if max(likely.values()) < LEAST:
        raise UserError(
            f"{where}: {at}: the teacher finds none of these tokens likely, the best {max(likely.values()):g}"
        )
    if (total := sum(map(math.exp, likely.values()))) > MOST:
        raise UserError(
            f"{where}: {at}: the teacher's probabilities add up to {total:.3g}, more than 1: give log-probabilities by "
            "the natural logarithm"
        )
    return Position(token, (*likely,), (*likely.values(),))


def _named(entry: Any, at: str, where: object) -> tuple[Name, float]:
    """A token and its log-probability."""
    token = entry.get("token") if isinstance(entry, dict) else None
    if not isinstance(token, str):
        raise UserError(f"{where}: {at} must be an object with token and logprob")
    if token.startswith(_TOKEN_ID) and token[len(_TOKEN_ID) :].isdecimal():
        return int(token[len(_TOKEN_ID) :]), _logprob(entry.get("logprob"), at, where)
    given = entry.get("bytes")
    is_bytes = isinstance(given, list) and all(isinstance(byte, int) and 0 <= byte < 256 for byte in given)
    return bytes(given) if is_bytes and given else token.encode(), _logprob(entry.get("logprob"), at, where)


def _positions_of_ids(record: Record, where: object) -> Iterator[Position]:
    """The same of token ids."""
    ids, logprobs, follows = (
        _parsed(record.get(key)) for key in ("teacher_tokens", "teacher_logprobs", "completion_ids")
    )
    if not all(isinstance(given, list) and given for given in (ids, logprobs)) or len(ids) != len(logprobs):
        raise UserError(f"{where}: teacher_tokens and teacher_logprobs must be lists, an entry a token of the answer")
    if not is_empty(follows) and (not isinstance(follows, list) or len(follows) != len(ids)):
        raise UserError(f"{where}: completion_ids must be a list of {len(ids)} ids, as many as teacher_tokens has")
    for index, (own, said) in enumerate(zip(ids, logprobs, strict=True)):
        at = f"teacher_logprobs[{index}]"
        if not isinstance(own, list) or not isinstance(said, list) or not own or len(own) != len(said):
            raise UserError(f"{where}: teacher_tokens[{index}] and {at} must be lists of the same length")
        token = follows[index] if follows else None
        for id in (*own, *([token] if follows else [])):
            if not isinstance(id, int) or isinstance(id, bool):
                raise UserError(f"{where}: teacher_tokens[{index}] holds {id!r:.40}, which is no token id")
        likely = dict(zip(own, (_logprob(value, at, where) for value in said), strict=True))
        yield _position(token, likely, at, where)


def _logprob(value: Any, at: str, where: object) -> float:
    """A log-probability.

    Raises:
        UserError: it is none; rounding may have made it a little more than 0.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value > 1e-3:
        raise UserError(f"{where}: {at}: {value!r:.40} is no log-probability, a number that is 0 or less")
    return max(float(value), ABSENT)


def _parsed(value: Any) -> Any:
    """A list or object, which may be written as JSON; anything else as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _unknown(record: Record, where: object) -> Distilled:
    raise UserError(
        f"{where}: record with keys {', '.join(map(str, record)) or '(none)'}; known shapes of answers with a "
        f"teacher's log-probabilities: {NEEDS}; answers alone are learnt by --task CAUSAL_LM"
    )


class DistillationTask(RecordTask):
    """Answers with a teacher's log-probabilities of its most likely tokens.

    A row is that of the answer, in the teacher's tokens; `lengths` is [k]; `teacher_ids` and `teacher_logprobs` hold
    k tokens for each label that bears loss, one after another. Where a teacher gave fewer, `ABSENT` fills up. Of what
    ends an answer, where the teacher's list does not, that token alone is likely, since the teacher ended there.
    """

    shapes: ClassVar[Sequence[Shape]] = (
        *(_distilled(shape) for shape in SHAPES if shape.required_keys and not shape.is_alone),
        Shape("distilled answer", ("completion", "logprobs"), _unknown, refuses={}, compares=True),
    )
    record_keys = NEEDS

    def rendering(self, example: Distilled, tokenizer: AnyTokenizer, cfg: DataConfig) -> str | None:
        """As that of an answer alone."""
        return rendering(example.example, tokenizer, cfg)

    def tokenize(self, examples: list[Distilled], tokenizer: AnyTokenizer, cfg: DataConfig) -> list[Tokens | None]:
        """As :func:`ftray.data.tokens.tokenize`, but in the teacher's tokens, which must be those of `tokenizer`.

        Raises:
            UserError: as there; or the teacher's tokens are no tokens of `tokenizer`, or are not those of the answer.
        """
        if cfg.train_on_prompt:
            raise UserError("data.train_on_prompt: a teacher says nothing of prompts: leave it out")
        unlimited = cfg.model_copy(update={"max_length": sys.maxsize, "overlong": "truncate"})
        whole = tokenize([distilled.example for distilled in examples], tokenizer, unlimited)
        vocabulary, rows = _vocabulary(tokenizer), list[Tokens | None]()
        for distilled, row in zip(examples, whole, strict=True):
            if row is None:
                raise UserError(f"{distilled.where}: the answer has no tokens")
            rows.append(_cut(_taught(row, distilled, tokenizer, vocabulary), tokenizer.bos_token_id, cfg))
        return rows


def _taught(row: Tokens, distilled: Distilled, tokenizer: AnyTokenizer, vocabulary: "_Vocabulary") -> Tokens:
    """A row in the teacher's tokens, with what it said of each."""
    where, positions = distilled.where, distilled.positions
    ids = _followed(row, distilled, tokenizer, vocabulary)
    k = max(len(place.names) for place in positions)
    likely = []
    for token, place in zip(ids, positions, strict=False):  # what follows, the answer itself tells too
        named = [token if name == place.token else vocabulary.id_of(name, where) for name in place.names]
        likely.append(_filled(named, list(place.logprobs), k))
    likely += [_filled([token], [0.0], k) for token in ids[len(positions) :]]
    prompt = row.input_ids[: row.prompt_tokens]
    labels = [IGNORE] * len(prompt) + ids
    if not prompt:  # nothing comes before the first token, by which it could be predicted
        labels[0], likely = IGNORE, likely[1:]
    return replace(
        row,
        input_ids=prompt + ids,
        labels=labels,
        lengths=[k],
        teacher_ids=[id for own, _ in likely for id in own],
        teacher_logprobs=[value for _, own in likely for value in own],
    )


def _followed(row: Tokens, distilled: Distilled, tokenizer: AnyTokenizer, vocabulary: "_Vocabulary") -> list[int]:
    """The tokens of the answer as the teacher had them, with what ends it.

    Raises:
        UserError: they are not those of the answer.
    """
    where, answer = distilled.where, row.input_ids[row.prompt_tokens :]
    said: list[int] = tokenizer([row.target], add_special_tokens=False)["input_ids"][0]
    is_plain = answer[: len(said)] == said
    given = [None if at.token is None else vocabulary.id_of(at.token, where) for at in distilled.positions]
    fits = len(said) <= len(given) <= len(answer) and is_plain
    if fits and all(token in (None, own) for token, own in zip(given, answer, strict=False)):
        return answer
    ids = [token for token in given if token is not None]
    if len(ids) == len(given) and is_plain:  # the same text in other tokens, as a teacher may draw them
        end = answer[len(said) :]
        text = ids[:-1] if end and ids[-1] == end[0] else ids
        if str(tokenizer.decode(text)) == row.target:
            return text + end
    raise UserError(
        f"{where}: log-probabilities of {len(given)} tokens, {str(tokenizer.decode(ids))!r:.60}, stand beside an "
        f"answer of {len(said)}, {row.target!r:.60}: {_SAME}, and give those of the answer as it stands"
    )


def _filled(ids: Sequence[int | None], logprobs: list[float], k: int) -> tuple[list[int], list[float]]:
    """Tokens and their log-probabilities without those that have no name, and filled up to k."""
    known = [(id, value) for id, value in zip(ids, logprobs, strict=True) if id is not None]
    fill = k - len(known)
    first = known[0][0]
    return [id for id, _ in known] + [first] * fill, [value for _, value in known] + [ABSENT] * fill


def _cut(row: Tokens, bos: int | None, cfg: DataConfig) -> Tokens | None:
    """A row cut to `max_length`, and what the teacher said with it."""
    fitted = fit(row, bos, cfg)
    if fitted is None:
        return None
    count = sum(label != IGNORE for label in fitted.labels) * row.lengths[0]  # an answer only ever loses its end
    return replace(fitted, teacher_ids=row.teacher_ids[:count], teacher_logprobs=row.teacher_logprobs[:count])


class _Vocabulary:
    """The tokens of a tokenizer by what they stand for, where that can be told from them.

    Args:
        backend: JSON of the tokenizer.
    """

    def __init__(self, backend: str):
        state, tokens = json.loads(backend), dict[str, int]()
        given = state["model"].get("vocab", {})
        tokens |= given if isinstance(given, dict) else {token: id for id, (token, _) in enumerate(given)}
        added = {token["content"]: token["id"] for token in state["added_tokens"]}
        self.is_by_bytes = '"ByteLevel"' in json.dumps(state["decoder"])
        self.size = max([*tokens.values(), *added.values()], default=-1) + 1
        letters = {letter: byte for byte, letter in _letters().items()} if self.is_by_bytes else {}
        written = {token: id for token, id in tokens.items() if token not in added and {*token} <= letters.keys()}
        self._ids = {bytes(letters[letter] for letter in token): id for token, id in written.items()}
        self._ids |= {content.encode(): id for content, id in added.items()}

    def id_of(self, name: Name, where: object) -> int | None:
        """The id of a token; None: it holds a part of a character, and the teacher did not say which.

        Raises:
            UserError: there is no such token.
        """
        if isinstance(name, int):
            if not 0 <= name < self.size:
                raise UserError(f"{where}: the teacher's token {name} is none of the base's {self.size}: {_SAME}")
            return name
        found = self._ids.get(name)
        if found is not None:
            return found
        if not self.is_by_bytes:
            raise UserError(
                f"{where}: the base's tokens can't be told from their texts: give the teacher's as ids, by vLLM's "
                "return_tokens_as_token_ids, or as teacher_tokens and teacher_logprobs"
            )
        if _UNKNOWN in name:
            return None
        raise UserError(
            f"{where}: the teacher's token {name.decode(errors='replace')!r:.40} is none of the base's: {_SAME}"
        )


def _letters() -> dict[int, str]:
    """The letter by which byte-level BPE writes each byte: itself where it can be seen, else one from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + n) for n, byte in enumerate(others)}


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: AnyTokenizer) -> _Vocabulary:
    if isinstance(tokenizer, FastTokenizer):
        return _Vocabulary(tokenizer.stored)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("task DISTILLATION: the base's tokenizer is a slow one, whose tokens can't be read")
    return _Vocabulary(backend.to_str())
