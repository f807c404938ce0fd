"""From examples to token ids and labels."""

from dataclasses import dataclass, field, replace

from ftray.config import DataConfig
from ftray.data.chat import Answer, chat_template
from ftray.data.fast_tokenizer import AnyTokenizer
from ftray.data.records import Example, as_chat
from ftray.errors import UserError
from ftray.task_spec import CHAT, IGNORE, RAW


@dataclass(frozen=True)
class Tokens:
    """One row: a tokenized example, or one of several rows of it.

    Attributes:
        input_ids: token ids.
        labels: the same, -100 where no loss is due.
        prompt: rendered prompt.
        prompt_tokens: how many tokens come before the (last) target: what generation must be given.
        target: the text that should follow.
        truncated: how many tokens it had before it was cut to fit; 0: nothing was cut off.
        token_type_ids: as the tokenizer gives them, for tasks that hand them on.
        lengths: of the texts that lie one after another in `input_ids`, where there are several.
        score: that a model is to give, where a task has one.
        extra: JSON of what else scoring needs.
        teacher_ids, teacher_logprobs: a teacher's most likely tokens at each supervised position, one after
            another, and their log-probabilities.
        further: more rows of the same example.
    """

    input_ids: list[int]
    labels: list[int]
    prompt: str
    target: str
    prompt_tokens: int
    truncated: int = 0
    token_type_ids: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    score: float = 0.0
    extra: str = ""
    teacher_ids: list[int] = field(default_factory=list)
    teacher_logprobs: list[float] = field(default_factory=list)
    further: tuple["Tokens", ...] = ()


def tokenize(examples: list[Example], tokenizer: AnyTokenizer, cfg: DataConfig) -> list[Tokens | None]:
    """Tokenize; None where an example is too long (`overlong: drop`) or has no supervised token left.

    Prompt and target are tokenized apart, so that the border between them is a token border in training as in
    generation. Raw records get the tokenizer's beginning-of-sequence token, if it puts one, and end with its
    end-of-sequence token; chats are as their template says, in one row as long as that leaves earlier turns and their
    tokens as they were. Where it does not, each answer is learnt in the rendering in which it was asked for, in a row
    of its own, and what it came with before is context.

    A record over `max_length` loses the *start* of its first prompt, as far as needed, then its own end: what is left
    ends that prompt and begins the target. A beginning-of-sequence token stays. A text without a prompt is cut into
    rows of that length instead.

    Raises:
        UserError: a chat, and the tokenizer has no chat template, or one that refuses it; turns that are marked to bear
            no loss, and `train_on_prompt`.
    """
    raw, chats = _Raw(tokenizer), {}
    for i, example in enumerate(examples):
        if example.context and cfg.train_on_prompt:
            raise UserError(f"{example.where}: has turns that bear no loss: data.train_on_prompt can't be set for it")
        if rendering(example, tokenizer, cfg) == CHAT:
            chat = as_chat(example) if example.messages is None else example
            chats[i] = [*chat_template(tokenizer).answers(chat, cfg.learn)]
        else:
            raw.add(i, example, cfg)
    rows = raw.rows() | _chat_rows(chats, tokenizer)
    bos = tokenizer.bos_token_id
    result: list[Tokens | None] = []
    for i, example in enumerate(examples):
        parts = [part for row in rows[i] for part in (_cut(row, bos, cfg) if not example.asks else [row])]
        kept = [fitted for row in parts if (fitted := fit(row, bos, cfg))]
        result.append(replace(kept[0], further=tuple(kept[1:])) if kept else None)
    return result


def beginning(tokenizer: AnyTokenizer) -> list[int]:
    """The beginning-of-sequence token, if the tokenizer puts one before a text."""
    first = list(tokenizer("")["input_ids"][:1])
    return first if first == [tokenizer.bos_token_id] else []


def spread(tokens: list[Tokens | None]) -> list[tuple[int, Tokens | None]]:
    """All rows of what :func:`tokenize` gave, each with the index of its example."""
    return [(i, row) for i, first in enumerate(tokens) for row in (first, *(first.further if first else ()))]


def longest_text(ids: int, labels: int, lengths: list[int]) -> int:
    """The most tokens of a row that a model reads, or writes, at once.

    Args:
        ids, labels: how many of them the row has.
        lengths: of its texts, as in :class:`Tokens`; other tasks keep other numbers there.
    """
    if sum(lengths) != ids:
        return max(ids, labels)
    return max(*lengths, labels if labels != ids else 0)


def rendering(example: Example, tokenizer: AnyTokenizer, cfg: DataConfig) -> str:
    """How a record is rendered: `CHAT`, by the chat template, or else by this template; empty: it is text alone."""
    if example.messages is not None:
        return CHAT
    return prompt_template(tokenizer, cfg) if example.prompt else ""


def prompt_template(tokenizer: AnyTokenizer, cfg: DataConfig) -> str:
    """What `data.template` comes to: `CHAT`, or a text that holds {prompt}."""
    if cfg.template != "auto":
        return cfg.template
    return CHAT if tokenizer.chat_template else RAW


class _Raw:
    """Records that no chat template renders, tokenized together: that is where fast tokenizers use their threads."""

    def __init__(self, tokenizer: AnyTokenizer):
        self.tokenizer, self.texts = tokenizer, list[str]()
        self.examples: dict[int, tuple[Example, str]] = {}

    def add(self, i: int, example: Example, cfg: DataConfig) -> None:
        template = rendering(example, self.tokenizer, cfg)
        prompt = template.replace("{prompt}", example.prompt)
        self.examples[i] = example, prompt
        self.texts += [prompt, example.target]

    def rows(self) -> dict[int, list[Tokens]]:
        tokenizer = self.tokenizer
        ids = iter(tokenizer(self.texts, add_special_tokens=False)["input_ids"] if self.texts else [])
        start = beginning(tokenizer)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        result = {}
        for i, (example, prompt) in self.examples.items():
            before = [*(start if example.begins else []), *next(ids)]
            target = [*next(ids), *(end if example.ends else [])]
            labels = [IGNORE] * len(before) + target
            result[i] = [Tokens(before + target, labels, prompt, example.target, len(before))]
        return result


def _chat_rows(chats: dict[int, list[Answer]], tokenizer: AnyTokenizer) -> dict[int, list[Tokens]]:
    """The rows of conversations, of which all texts are tokenized together."""
    groups = {i: _by_rendering(answers) for i, answers in chats.items()}
    texts = list(dict.fromkeys(text for own in groups.values() for group in own for text in _texts(group)))
    ids = dict(zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True)) if texts else {}
    return {i: [row for group in own for row in _rows(group, ids, tokenizer)] for i, own in groups.items()}


def _by_rendering(answers: list[Answer]) -> list[list[Answer]]:
    """Answers that stand in one rendering, which the later ones only lengthen."""
    groups: list[list[Answer]] = []
    text = None
    for answer in answers:
        if text is not None and answer.before.startswith(text):
            groups[-1].append(answer)
        else:
            groups.append([answer])
        text = answer.before + answer.text
    return groups


def _segments(answer: Answer) -> list[tuple[str, bool]]:
    """An answer's text, cut where its loss begins and ends."""
    segments, at = [], 0
    for start, end in answer.spans:
        segments += [(answer.text[at:start], False), (answer.text[start:end], True)]
        at = end
    return [(text, learnt) for text, learnt in [*segments, (answer.text[at:], False)] if text]


def _texts(group: list[Answer]) -> list[str]:
    """What must be tokenized of answers in one rendering: what is before the first, what comes between, the answers."""
    found, text = [group[-1].before], ""
    for answer in group:
        found += [answer.before[len(text) :], *(segment for segment, _ in _segments(answer))]
        text = answer.before + answer.text
    return found


def _rows(group: list[Answer], ids: dict[str, list[int]], tokenizer: AnyTokenizer) -> list[Tokens]:
    """Answers in one rendering as one row; as several, where tokens reach over the borders of segments."""
    row: list[int] = []
    labels: list[int] = []
    text, prompt_tokens = "", 0
    for answer in group:
        between = ids[answer.before[len(text) :]]
        row += between
        labels += [IGNORE] * len(between)
        prompt_tokens = len(row)
        for segment, learnt in _segments(answer):
            row += ids[segment]
            labels += ids[segment] if learnt else [IGNORE] * len(ids[segment])
        text = answer.before + answer.text
    last = group[-1]
    if row[:prompt_tokens] != ids[last.before]:  # tokens reach over a border: generation would be given others
        whole = {last.before: ids[last.before]} | {
            text: list(tokenizer(text, add_special_tokens=False)["input_ids"])
            for answer in group
            for text in (answer.before, *(segment for segment, _ in _segments(answer)))
        }
        return [_rows([answer], whole, tokenizer)[0] for answer in group]
    return [Tokens(row, labels, last.before, last.said, prompt_tokens)]


def _cut(tokens: Tokens, bos: int | None, cfg: DataConfig) -> list[Tokens]:
    """A text in rows of at most `max_length` tokens; each begins with the last token of the one before."""
    ids, step = tokens.input_ids, cfg.longest - 1
    if len(ids) <= cfg.longest or cfg.overlong == "drop":
        return [tokens]
    starts = range(0, len(ids) - 1, step)
    parts = [(ids[at : at + cfg.longest], tokens.labels[at : at + cfg.longest]) for at in starts]
    return [replace(tokens, input_ids=own, labels=labels, prompt_tokens=0) for own, labels in parts]


def fit(tokens: Tokens, bos: int | None, cfg: DataConfig) -> Tokens | None:
    """A row cut to `max_length` as :func:`tokenize` says; None: it is left out, or has nothing left to learn."""
    over = len(tokens.input_ids) - cfg.longest
    if over > 0:
        if cfg.overlong == "drop":
            return None
        first = next((i for i, label in enumerate(tokens.labels) if label != IGNORE), 0)
        cut = min(over, max(0, first - 1))  # one token before the target stays: it predicts the target's first
        head = int(tokens.input_ids[0] == bos)
        tokens = replace(
            tokens,
            input_ids=(tokens.input_ids[:head] + tokens.input_ids[head + cut :])[: cfg.longest],
            labels=(tokens.labels[:head] + tokens.labels[head + cut :])[: cfg.longest],
            prompt_tokens=min(tokens.prompt_tokens - cut, cfg.longest),
            truncated=len(tokens.input_ids),
        )
    if tokens.labels[1:].count(IGNORE) == len(tokens.labels[1:]):  # what predicts the first token isn't in the record
        return None
    return replace(tokens, labels=list(tokens.input_ids)) if cfg.train_on_prompt else tokens
