"""From examples to token ids and labels."""

from dataclasses import dataclass, field, replace
from typing import Any

from ftray.config import DataConfig
from ftray.data.records import Example
from ftray.errors import UserError
from ftray.task_spec import IGNORE

Segment = tuple[str, bool]  # text, and whether it bears loss


@dataclass(frozen=True)
class Tokens:
    """One tokenized example.

    Attributes:
        input_ids: token ids.
        labels: the same, -100 where no loss is due.
        prompt: rendered prompt.
        prompt_tokens: how many tokens come before the (last) target: what generation must be given.
        target: the text that should follow.
        truncated: tokens were cut off.
        token_type_ids: as the tokenizer gives them, for tasks that hand them on.
        lengths: of the texts that lie one after another in `input_ids`, where there are several.
        score: that a model is to give, where a task has one.
        extra: JSON of what else scoring needs.
    """

    input_ids: list[int]
    labels: list[int]
    prompt: str
    target: str
    prompt_tokens: int
    truncated: bool = False
    token_type_ids: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    score: float = 0.0
    extra: str = ""


def tokenize(examples: list[Example], tokenizer: Any, cfg: DataConfig) -> list[Tokens | None]:
    """Tokenize; None where a record is too long (`overlong: drop`) or has no supervised token left.

    Prompt and target are tokenized apart, so that the border between them is a token border in training as in
    generation. Plain records get the tokenizer's beginning-of-sequence token, if it puts one, and end with its
    end-of-sequence token; chats are as their template says.

    A record over `max_length` loses the *start* of its first prompt, as far as needed, then its own end: what is left
    ends that prompt and begins the target. A beginning-of-sequence token stays.

    Raises:
        UserError: a chat, and the tokenizer has no chat template, or one that refuses it; turns that are marked to bear
            no loss, and `train_on_prompt`.
    """
    all_segments = [segments(example, tokenizer, cfg) for example in examples]
    texts = [text for part in all_segments for text, _ in part]
    # the whole batch at once: that is where the fast tokenizers use their threads
    pieces = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
    start = beginning(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    result = []
    for example, part in zip(examples, all_segments, strict=True):
        plain = example.messages is None
        ids = list(start) if plain else []
        labels, prompt_tokens = [IGNORE] * len(ids), 0
        for _, bears_loss in part:
            piece = list(next(pieces))
            if bears_loss:
                prompt_tokens = len(ids)
                piece += end if plain else []
            ids += piece
            labels += piece if bears_loss else [IGNORE] * len(piece)
        prompt = "".join(text for text, _ in part[:-1])
        target = example.target if example.messages is None else example.messages[example.learnt[-1]][1]
        result.append(_fit(Tokens(ids, labels, prompt, target, prompt_tokens), tokenizer.bos_token_id, cfg))
    return result


def beginning(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token, if the tokenizer puts one before a text."""
    first = list(tokenizer("")["input_ids"][:1])
    return first if first == [tokenizer.bos_token_id] else []


def segments(example: Example, tokenizer: Any, cfg: DataConfig) -> list[Segment]:
    """The rendered text of an example, cut where the loss begins and ends; the last segment is the (last) target.

    Plain records: `template` with the prompt (nothing if that is empty), then the target. Chats: the tokenizer's own
    chat template, of which ever longer beginnings are rendered; what a learnt turn adds bears loss, and what comes
    after the last one is left out.
    """
    if example.context and cfg.train_on_prompt:
        raise UserError(f"{example.where}: has turns that bear no loss: data.train_on_prompt can't be set for it")
    if example.messages is not None:
        return _chat_segments(example, tokenizer)
    prompt = [(cfg.template.replace("{prompt}", example.prompt), False)] if example.prompt else []
    return [*prompt, (example.target, True)]


def _chat_segments(example: Example, tokenizer: Any) -> list[Segment]:
    messages = [{"role": role, "content": text} for role, text in example.messages or ()]
    result: list[Segment] = []
    text = ""
    for index in example.learnt:
        answered = _render_chat(messages[: index + 1], tokenizer, False, example.where)
        asked = _render_chat(messages[:index], tokenizer, True, example.where) if index else ""
        if not asked or not answered.startswith(asked):  # nothing was asked, or the template renders it otherwise later
            answer_at = answered.rfind(messages[index]["content"].strip())
            if answer_at < 0:
                raise UserError(f"{example.where}: the chat template leaves out the assistant's turn {index}")
            asked = answered[:answer_at]
        if not asked.startswith(text):
            result, text = [], ""  # the template changed earlier turns: of those, only the last rendering is true
        result += [(asked[len(text) :], False), (answered[len(asked) :], True)]
        text = answered
    return result


def _render_chat(messages: list[dict[str, str]], tokenizer: Any, add_generation_prompt: bool, where: object) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UserError(
            f"{where}: a chat, but the model's tokenizer has no chat template: "
            "take an instruction-tuned model, or give prompt/completion records, without system and history"
        )
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise UserError(f"{where}: the model's chat template refuses these turns: {error}") from None
    return text


def _fit(tokens: Tokens, bos: int | None, cfg: DataConfig) -> Tokens | None:
    over = len(tokens.input_ids) - cfg.max_length
    if over > 0:
        if cfg.overlong == "drop":
            return None
        first = next((i for i, label in enumerate(tokens.labels) if label != IGNORE), 0)
        cut = min(over, max(0, first - 1))  # one token before the target stays: it predicts the target's first
        head = int(tokens.input_ids[0] == bos)
        tokens = replace(
            tokens,
            input_ids=(tokens.input_ids[:head] + tokens.input_ids[head + cut :])[: cfg.max_length],
            labels=(tokens.labels[:head] + tokens.labels[head + cut :])[: cfg.max_length],
            prompt_tokens=min(tokens.prompt_tokens - cut, cfg.max_length),
            truncated=True,
        )
    if all(label == IGNORE for label in tokens.labels[1:]):  # what predicts the first token isn't in the record
        return None
    return replace(tokens, labels=list(tokens.input_ids)) if cfg.train_on_prompt else tokens
