"""Conversations in chat templates: what is rendered in pieces is what the template renders as a whole."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ftray.config import DataConfig, config_from
from ftray.data.records import parse
from ftray.data.tokens import spread, tokenize
from ftray.errors import UserError
from ftray.models.chat_template import give_chat_template, names, turn_end
from ftray.models.load import load_tokenizer
from ftray.task_spec import IGNORE
from ftray.tasks.infer_task import as_begun

MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"]


def make(*special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE that joins ends of lines, spaces and letters over the borders of turns."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=["</s>", "<s>", *special], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(
        ["\n\n", "\n\n\n", "a b", "assistant\n", "user\na", "\n a", " [/INST] a"] * 9, trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")


PLAIN, MARKED = make(), make(*MARKS, "<end_of_turn>")
QUIET = (  # a reasoning model's: what was thought is shown in the last answer alone
    "{% for m in messages %}<s>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>\n{% endif %}"
    "{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
JOINED = (  # one without any mark between turns, so that tokens reach over them
    "{% for m in messages %}{{ m.role }}\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
TEMPLATES = [*names(), QUIET, JOINED]
TEXTS = st.text(alphabet="ab \n<é", min_size=1, max_size=6).filter(str.strip)


def given_template(tokenizer, template):
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", bos_token="<s>")
    give_chat_template(other, template)
    return other


@st.composite
def conversations(draw):
    """Turns of a conversation, some answers with thoughts, and whether a template should show these."""
    turns = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        turns.append({"role": "user", "content": draw(TEXTS)})
        turns.append({"role": "assistant", "content": draw(TEXTS), "weight": draw(st.sampled_from([0, 1, 1]))})
    turns[-1]["weight"] = 1
    return turns


@pytest.mark.parametrize("tokenizer", [PLAIN, MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t if len(t) < 9 else "joined" if t is JOINED else "quiet")
@given(turns=conversations(), thoughts=st.lists(TEXTS, min_size=9, max_size=9))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_each_answer_is_learnt_once_after_the_very_tokens_that_generation_is_given(
    tokenizer, template, turns, thoughts
):
    tokenizer = given_template(tokenizer, template)
    if template is QUIET:
        for turn, thought in zip(turns, thoughts, strict=False):
            if turn["role"] == "assistant":
                turn["reasoning_content"] = thought
    rows = [
        row for _, row in spread(tokenize([parse({"messages": turns}, "f:1")], tokenizer, DataConfig(max_length=9999)))
    ]
    plain = [{key: value for key, value in turn.items() if key != "weight"} for turn in turns]

    def whole(end, ask):
        return tokenizer.apply_chat_template(plain[:end], tokenize=False, add_generation_prompt=ask)

    learnt = []
    for row in rows:
        assert tokenizer.decode(row.input_ids[: row.prompt_tokens]) == row.prompt
        spans, before = [], 0  # where the loss of a row begins and ends
        for at, label in enumerate([*row.labels, IGNORE]):
            if (label == IGNORE) != (before == IGNORE or at == 0):
                spans.append(at)
            before = label
        for start, end in zip(spans[::2], spans[1::2], strict=True):
            learnt.append((row.input_ids[:start], row.input_ids[start:end]))
    wanted = []
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant" and turn["weight"]:
            asked, answered = whole(i, True), whole(i + 1, False)
            if not answered.startswith(asked):
                asked = answered[: answered.rfind(turn["content"].strip())]
            pieces = [
                tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, answered[len(asked) :])
            ]
            wanted.append(tuple(pieces))
    assert learnt == wanted


@pytest.mark.parametrize("tokenizer", [PLAIN, MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize("template", names())
def test_what_a_template_marks_as_generation_can_be_all_that_is_learnt(tokenizer, template):
    tokenizer = given_template(tokenizer, template)
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "ab b"},
    ]
    row = tokenize([parse({"messages": turns}, "")], tokenizer, DataConfig(learn="generation"))[0]
    assert tokenizer.decode(row.input_ids) == tokenizer.apply_chat_template(turns, tokenize=False)
    own = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}.get(template, "</s>")
    end = "</s>" if tokenizer.convert_tokens_to_ids(own) is None else own
    space = " " if template == "mistral" else ""
    learnt = tokenizer.decode([label for label in row.labels if label != IGNORE])
    assert learnt == f"{space}b a{end}{space}ab b{end}"
    assert row.target == "ab b"


def test_a_template_without_generation_marks_can_not_be_learnt_by_them():
    tokenizer = given_template(PLAIN, JOINED)
    record = {"prompt": "a", "completion": "b"}
    with pytest.raises(UserError, match=r"^data\.learn generation: the model's chat template has no {% generation %}"):
        tokenize([parse(record, "")], tokenizer, DataConfig(learn="generation"))


@pytest.mark.parametrize("template", names())
def test_answers_in_a_given_template_end_with_one_token_which_ends_generation(template):
    marked, plain = given_template(MARKED, template), given_template(PLAIN, template)
    own = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}.get(template, "</s>")
    assert marked.decode([turn_end(marked)]) == own
    assert plain.decode([turn_end(plain)]) == "</s>"  # its vocabulary has none of these
    for tokenizer in (marked, plain):
        row = tokenize([parse({"prompt": "a", "completion": "b"}, "")], tokenizer, DataConfig())[0]
        learnt = [label for label in row.labels if label != IGNORE]
        ended = tokenizer.decode(learnt[: learnt.index(turn_end(tokenizer))])
        assert ended.strip() == "b"


def test_a_given_template_goes_where_the_tokenizer_goes(tiny_llama, tmp_path):
    tokenizer = load_tokenizer(tiny_llama, chat_template="chatml")
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.chat_template == tokenizer.chat_template != load_tokenizer(tiny_llama).chat_template
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}")
    assert (
        load_tokenizer(tiny_llama, chat_template=f"{tmp_path}/own.jinja").chat_template == "{{ messages[0].content }}"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("chatlm", r"^data\.chat_template chatlm: no such template, and no \.jinja file; did you mean chatml\?"),
        ("none.jinja", r"^data\.chat_template none\.jinja: can't be read: No such file"),
        ("{% for %}", r"^data\.chat_template: refuses a question and its answer: "),
    ],
)
def test_a_template_that_is_none(tiny_llama, given, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(tiny_llama, chat_template=given)


def test_what_is_resumed_keeps_the_template_that_it_began_with(tmp_path, tiny_llama, words):
    (tmp_path / "config.yaml").write_text('data: {template: "say {prompt}:"}\n')

    def template(**more):
        given = {"source": words, **more.pop("data", {})}
        cfg = config_from({"data": given, "model": {"name": tiny_llama}, "output": str(tmp_path), **more})
        return as_begun(cfg).data.template

    assert template(resume=True) == "say {prompt}:"
    assert template(resume=True, data={"template": "{prompt}"}) == "{prompt}"
    assert template() == "auto"
    (tmp_path / "config.yaml").write_text("data: {}\n")
    assert template(resume=True) == "{prompt}\n"  # of before there was the field


# --- calls, by the ways in which templates take them

HEAD = "{% for m in messages %}<s>{{ m.role }}\n"
TAIL = "</s>{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
CALLING = {
    "arguments as JSON": HEAD
    + "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    + TAIL,
    "arguments as they are": HEAD
    + "{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    + '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments }}}{% endfor %}'
    + TAIL,
    "content printed": HEAD
    + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    + TAIL,
}


@pytest.mark.parametrize("way", CALLING)
def test_a_call_is_rendered_as_the_template_takes_it(way):
    tokenizer = given_template(PLAIN, CALLING[way])
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}}]
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "b", "tool_call_id": "c"},
        {"role": "assistant", "content": "ab"},
    ]
    row = tokenize([parse({"messages": turns}, "f:1")], tokenizer, DataConfig())[0]
    text = tokenizer.decode(row.input_ids)
    assert text == (
        "<s>user\na</s><s>assistant\n" + json.dumps({"name": "f", "arguments": {"a": "b"}}) + "</s>"
        "<s>tool\nb</s><s>assistant\nab</s>"
    )


def test_a_template_that_leaves_a_role_out_refuses_it():
    tokenizer = given_template(PLAIN, "{% for m in messages if m.role != 'system' %}{{ m.content }}</s>{% endfor %}")
    turns = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "a"), ("assistant", "b"))]
    with pytest.raises(UserError, match=r"^f:1: the model's chat template leaves out turns of system"):
        tokenize([parse({"messages": turns}, "f:1")], tokenizer, DataConfig())
