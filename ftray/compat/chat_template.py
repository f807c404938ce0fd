"""Private names of `transformers.utils.chat_template_utils`, which imports no torch; seen in transformers 5.22.2
(not in 5.22.1) to 5.23.0."""

from typing import Any

from transformers.utils.chat_template_utils import (
    _alias_reasoning_fields,
    _compile_jinja_template,
    _plain_template_data,
    render_jinja_template,
)

Messages = list[dict[str, Any]]


def render(
    template: str, messages: Messages, tools: list[dict[str, Any]] | None, ask: bool, special_tokens: dict[str, str]
) -> str:
    """What `apply_chat_template` renders of messages, without its copies of what is plain text already.

    Args:
        ask: it ends with the beginning of an answer.
        special_tokens: `special_tokens_map` of the tokenizer.
    """
    said = [message if _is_plain(message) else _plain_template_data(message) for message in _without_nulls(messages)]
    return str(
        _compile_jinja_template(template).render(
            messages=_alias_reasoning_fields(said),
            tools=_plain_template_data(tools),
            documents=None,
            add_generation_prompt=ask,
            **special_tokens,
        )
    )


def with_generation_spans(
    template: str, messages: Messages, tools: list[dict[str, Any]] | None, special_tokens: dict[str, str]
) -> tuple[str, list[tuple[int, int]]]:
    """What a chat template renders, and the characters that it puts between {% generation %} tags.

    The public `apply_chat_template` gives a mask of tokens alone, of the whole text tokenized at once.
    """
    rendered, spans = render_jinja_template(
        [_without_nulls(messages)],
        chat_template=template,
        return_assistant_tokens_mask=True,
        tools=tools,
        **special_tokens,
    )
    return rendered[0], [(start, end) for start, end in spans[0]]


def _without_nulls(messages: Messages) -> Messages:
    """As `apply_chat_template` has them."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _is_plain(message: dict[str, Any]) -> bool:
    return all(type(value) is str for value in message.values())
