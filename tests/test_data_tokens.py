import copy

import pytest
from tokenizers.processors import TemplateProcessing

from ftray.config import DataConfig
from ftray.data.records import Example, parse
from ftray.data.tokens import spread, tokenize
from ftray.data.turns import Turn
from ftray.errors import UserError
from ftray.task_spec import IGNORE, RAW

PLAIN = Example("the cat", "sat on")
CHAT = parse(
    {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "the cat"},
            {"role": "assistant", "content": "sat"},
            {"role": "user", "content": "on"},
            {"role": "assistant", "content": "the mat"},
        ]
    },
    "f:1",
)


@pytest.fixture
def bos_tokenizer(tokenizer):
    """The same with a beginning-of-sequence token that it puts before every text."""
    other = copy.deepcopy(tokenizer)
    other.bos_token = "<|system|>"
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", other.bos_token_id)]
    )
    return other


def one(example, tokenizer, **settings):
    return tokenize([example], tokenizer, DataConfig(**{"template": RAW} | settings))[0]


def learned(tokens, tokenizer) -> str:
    return tokenizer.decode([label for label in tokens.labels if label != IGNORE])


def test_plain_records_are_template_target_end(tokenizer):
    tokens = one(PLAIN, tokenizer, template="Q: {prompt} A: ")
    assert tokenizer.decode(tokens.input_ids) == "Q: the cat A: sat on<|end|>"
    assert learned(tokens, tokenizer) == "sat on<|end|>"
    assert tokens.prompt == tokenizer.decode(tokens.input_ids[: tokens.prompt_tokens]) == "Q: the cat A: "
    assert tokens.target == "sat on"
    assert not tokens.truncated
    assert all(label in (IGNORE, token) for label, token in zip(tokens.labels, tokens.input_ids, strict=True))


def test_braces_in_a_prompt_are_left_alone(tokenizer):
    assert one(Example("{0} {prompt} {", "x"), tokenizer).prompt == "{0} {prompt} {\n"


def test_text_bears_loss_everywhere(tokenizer):
    tokens = one(Example("", "the mat"), tokenizer)
    assert (tokens.prompt, tokens.prompt_tokens) == ("", 0)
    assert tokens.labels == tokens.input_ids
    assert tokenizer.decode(tokens.input_ids) == "the mat<|end|>"


def test_train_on_prompt(tokenizer):
    tokens = one(PLAIN, tokenizer, train_on_prompt=True)
    assert tokens.labels == tokens.input_ids
    assert tokens.input_ids == one(PLAIN, tokenizer).input_ids
    assert tokens.prompt_tokens == one(PLAIN, tokenizer).prompt_tokens


def test_a_beginning_token_only_where_the_tokenizer_puts_one(tokenizer, bos_tokenizer):
    without, tokens = one(PLAIN, tokenizer), one(PLAIN, bos_tokenizer)
    assert tokens.input_ids == [bos_tokenizer.bos_token_id, *without.input_ids]
    assert tokens.labels == [IGNORE, *without.labels]
    assert tokens.prompt_tokens == without.prompt_tokens + 1
    assert one(CHAT, bos_tokenizer).input_ids == one(CHAT, tokenizer).input_ids  # a chat is as its template says


def test_a_tokenizer_without_an_end_token(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.eos_token = None
    assert learned(one(PLAIN, other), other) == "sat on"


def test_every_assistant_turn_of_a_chat_bears_loss_and_nothing_else(tokenizer):
    tokens = one(CHAT, tokenizer)
    assert tokenizer.decode(tokens.input_ids) == (
        "<|system|>be brief<|end|><|user|>the cat<|end|><|assistant|>sat<|end|>"
        "<|user|>on<|end|><|assistant|>the mat<|end|>"
    )
    assert learned(tokens, tokenizer) == "sat<|end|>the mat<|end|>"
    assert tokens.target == "the mat"
    assert tokens.prompt == tokenizer.decode(tokens.input_ids[: tokens.prompt_tokens])
    assert tokens.prompt.endswith("<|user|>on<|end|><|assistant|>")
    asked = [{"role": turn.role, "content": turn.text} for turn in CHAT.messages[:-1]]
    generation = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert tokens.input_ids[: tokens.prompt_tokens] == generation


def chat(*turns, **more):
    """Turns of (role, text, their further keys) in one record."""
    return parse({"messages": [{"role": r, "content": c} | (k[0] if k else {}) for r, c, *k in turns], **more}, "f:1")


def test_a_turn_of_weight_0_is_context(tokenizer):
    example = chat(
        ("user", "the cat"),
        ("assistant", "sat", {"weight": 0}),
        ("user", "on"),
        ("assistant", "the mat", {"weight": 1}),
        ("user", "a"),
        ("assistant", "b"),
        system="be brief",
    )
    tokens = one(example, tokenizer)
    before = (
        "<|system|>be brief<|end|><|user|>the cat<|end|><|assistant|>sat<|end|><|user|>on<|end|><|assistant|>"
        "the mat<|end|><|user|>a<|end|><|assistant|>"
    )
    assert tokenizer.decode(tokens.input_ids) == before + "b<|end|>"
    assert learned(tokens, tokenizer) == "the mat<|end|>b<|end|>"
    assert (tokens.prompt, tokens.target) == (before, "b")
    assert tokenizer.decode(tokens.input_ids[: tokens.prompt_tokens]) == before


def test_what_is_scored_is_the_last_turn_that_bears_loss(tokenizer):
    example = chat(
        ("user", "the cat"),
        ("assistant", "sat"),
        ("user", "on"),
        ("assistant", "the mat", {"weight": 0}),
        ("user", "a"),
    )
    tokens = one(example, tokenizer)
    assert tokenizer.decode(tokens.input_ids) == "<|user|>the cat<|end|><|assistant|>sat<|end|>"
    assert learned(tokens, tokenizer) == "sat<|end|>"
    assert (tokens.prompt, tokens.target) == ("<|user|>the cat<|end|><|assistant|>", "sat")


def test_turns_without_loss_and_a_loss_of_all_do_not_go_together(tokenizer):
    example = chat(("user", "a"), ("assistant", "b", {"weight": 0}), ("user", "a"), ("assistant", "c"))
    with pytest.raises(
        UserError, match=r"^f:1: has turns that bear no loss: data\.train_on_prompt can't be set for it$"
    ):
        one(example, tokenizer, train_on_prompt=True)


def test_system_and_history_are_rendered_by_the_chat_template(tokenizer):
    record = {"instruction": "add", "input": "a b", "output": "c", "system": "be brief", "history": [["on", "sat"]]}
    tokens = one(parse(record, "f:1"), tokenizer, template="Q: {prompt} A: ")
    assert tokenizer.decode(tokens.input_ids) == (
        "<|system|>be brief<|end|><|user|>on<|end|><|assistant|>sat<|end|><|user|>add\na b<|end|><|assistant|>c<|end|>"
    )
    assert learned(tokens, tokenizer) == "sat<|end|>c<|end|>"
    empty = one(parse(record | {"system": "", "history": []}, "f:1"), tokenizer, template="Q: {prompt} A: ")
    assert tokenizer.decode(empty.input_ids) == "<|user|>add\na b<|end|><|assistant|>c<|end|>"
    assert learned(empty, tokenizer) == "c<|end|>"
    with pytest.raises(UserError, match=r"^f:1: a chat, but .* no chat template: .* without system and history$"):
        one(parse(record, "f:1"), with_template(tokenizer, None))


def with_template(tokenizer, template: str):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


TURN = "<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>"


def test_where_a_template_rewrites_earlier_turns_each_answer_is_learnt_as_it_was_asked_for(tokenizer):
    # as reasoning models do: earlier turns change when a later one comes
    other = with_template(
        tokenizer,
        "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}<|assistant|>...<|end|>"
        "{% else %}" + TURN + "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    )
    first = one(CHAT, other)
    (second,) = first.further
    before = "<|system|>be brief<|end|><|user|>the cat<|end|><|assistant|>"
    assert other.decode(first.input_ids) == before + "sat<|end|>"
    assert (learned(first, other), first.target) == ("sat<|end|>", "sat")
    assert other.decode(second.input_ids) == before + "...<|end|><|user|>on<|end|><|assistant|>the mat<|end|>"
    assert (learned(second, other), second.target) == ("the mat<|end|>", "the mat")
    for row in (first, second):
        assert other.decode(row.input_ids[: row.prompt_tokens]) == row.prompt
    assert spread([None, first]) == [(0, None), (1, first), (1, second)]
    assert one(CHAT, other, learn="last").further == ()
    assert learned(one(CHAT, other, learn="last"), other) == "the mat<|end|>"
    # what is too long of it is left out alone
    assert one(CHAT, other, max_length=len(first.input_ids), overlong="drop").further == ()


def test_a_template_whose_generation_prompt_is_not_in_the_answer(tokenizer):
    other = with_template(
        tokenizer,
        "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}<|assistant|>think{% endif %}",
    )
    spaced = Example(messages=(Turn("user", "the cat"), Turn("assistant", " sat ")))  # which the template trims
    tokens = one(spaced, other)
    assert other.decode(tokens.input_ids) == "<|user|>the cat<|end|><|assistant|>sat<|end|>"
    assert learned(tokens, other) == "sat<|end|>"


def test_a_chat_that_the_assistant_begins(tokenizer):
    other = with_template(
        tokenizer,
        "<|system|>be brief<|end|>{% for m in messages %}"
        + TURN
        + "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    )
    tokens = one(Example(messages=(Turn("assistant", "sat"), Turn("user", "on"))), other)
    assert learned(tokens, other) == "sat<|end|>"
    assert tokens.prompt == "<|system|>be brief<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "^f:1: a chat, but the model's tokenizer has no chat template"),
        (
            "{{ raise_exception('no system turns here') }}",
            "^f:1: the model's chat template refuses.*no system turns here",
        ),
        (
            "{% for m in messages %}{{ m['role'] }}{% endfor %}{% if add_generation_prompt %}?{% endif %}",
            "^f:1: the model's chat template leaves out turns of system",
        ),
    ],
)
def test_chats_the_template_cannot_render(tokenizer, template, message):
    with pytest.raises(UserError, match=message):
        one(CHAT, with_template(tokenizer, template))


def test_truncation_takes_the_start_of_the_prompt_then_the_end_of_the_target(tokenizer, bos_tokenizer):
    long = Example("z y x w v u t s r q p o n m", "a b c d")
    whole = one(long, tokenizer)
    target = [label for label in whole.labels if label != IGNORE]
    for length in range(2, len(whole.input_ids)):
        tokens = one(long, tokenizer, max_length=length)
        assert len(tokens.input_ids) == length
        assert tokens.truncated
        kept = [label for label in tokens.labels if label != IGNORE]
        assert kept == target[: length - 1]
        assert (
            tokens.input_ids[: tokens.prompt_tokens]
            == whole.input_ids[-len(target) - (length - len(kept)) : -len(target)]
        )
        with_bos = one(long, bos_tokenizer, max_length=length)
        assert with_bos.input_ids[0] == bos_tokenizer.bos_token_id
        assert [label for label in with_bos.labels if label != IGNORE] == kept
        # the target survives first, also when the prompt bears loss
        trained = one(long, tokenizer, max_length=length, train_on_prompt=True)
        assert trained.input_ids == trained.labels == tokens.input_ids
    assert not one(long, tokenizer, max_length=len(whole.input_ids)).truncated


def test_a_long_chat_keeps_the_end_of_its_first_prompt(tokenizer):
    whole = one(CHAT, tokenizer)
    length = len(whole.input_ids) - 3
    tokens = one(CHAT, tokenizer, max_length=length)
    assert tokens.input_ids == whole.input_ids[3:]
    assert tokens.prompt_tokens == whole.prompt_tokens - 3


def test_dropping(tokenizer):
    length = len(one(PLAIN, tokenizer).input_ids)
    assert one(PLAIN, tokenizer, max_length=length, overlong="drop")
    assert one(PLAIN, tokenizer, max_length=length - 1, overlong="drop") is None
    # a lone label on the first token has nothing that predicts it
    other = copy.deepcopy(tokenizer)
    other.eos_token = None
    assert one(Example("", "a"), other) is None


def test_a_batch_equals_its_records_one_by_one(tokenizer):
    examples = [PLAIN, CHAT, Example("", "mat"), CHAT, PLAIN]
    cfg = DataConfig(max_length=20, template=RAW)
    assert tokenize(examples, tokenizer, cfg) == [tokenize([e], tokenizer, cfg)[0] for e in examples]
    assert tokenize([], tokenizer, cfg) == []
