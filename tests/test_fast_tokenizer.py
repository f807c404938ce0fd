"""Tokens and rendered chats without transformers' classes: the same as with them."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Template, TemplateError
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ftray.compat.chat_template import render, render_pieces
from ftray.config import DataConfig
from ftray.data import fast_tokenizer
from ftray.data.fast_tokenizer import FastTokenizer, state_of
from ftray.data.load_apart import load_apart
from ftray.data.pipeline import fingerprint_of
from ftray.data.records import parse
from ftray.data.splits import find_sources
from ftray.data.tokens import tokenize
from ftray.errors import UserError
from ftray.models.chat_template import names, read_chat_template
from ftray.models.tokenizer import load_tokenizer

CORPUS = [
    "cat sat cat sat. The mat's a 12 b 123",
    "it's IT'S o'clock, x. y? z! (a b) c",
    "the cat sat on the mat",
    "a b c d e f g",
    "Ünïcode ﬁne 12 345",
    "<|user|> hi",
]
SPECIAL = ["<|end|>", "<|user|>", "<|user|><|end|>", "[UNK]"]


def metaspace(scheme: str):
    def change(tokenizer: Tokenizer) -> None:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)

    return change


def spaced(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def lowered(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


def prepended(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")


def split_digits(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def gpt2(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split_by(digits: str, behavior: str = "isolated"):
    """The pre-tokenizer of Llama 3, with digits by threes, or of Qwen 2, with single ones."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def change(tokenizer: Tokenizer) -> None:
        split = pre_tokenizers.Split(Regex(pattern.replace("DIGITS", digits)), behavior)
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, rest])

    return change


def whole(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


KINDS = {
    "gpt2": gpt2,
    "llama3": split_by("{1,3}"),
    "qwen2": split_by(""),
    "qwen2, merged": split_by("", "merged_with_next"),
    "tokens over blanks": whole,
    "metaspace first": metaspace("first"),
    "metaspace always": metaspace("always"),
    "prefix space": spaced,
    "normalised": lowered,
    "prepended": prepended,
    "digits": split_digits,
}
ADDED = {
    "plain": [],
    "takes blanks": [AddedToken("<|eats|>", lstrip=True, rstrip=True, special=True)],
    "single word": [AddedToken("cat", single_word=True, normalized=False)],
    "holds a blank": [AddedToken("cat sat", normalized=True)],
    "normalised": [AddedToken("Sat On", normalized=True), AddedToken("<|tool|>", normalized=False)],
}


def made(kind: str, added: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    KINDS[kind](tokenizer)
    tokenizer.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A <|end|>", special_tokens=[("<|user|>", 1), ("<|end|>", 0)]
    )
    tokenizer.add_tokens(ADDED[added])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|user|>")


PIECES = [
    *SPECIAL,
    "<|eats|>",
    "<|tool|>",
    "Sat On",
    "cat",
    "the mat",
    " ",
    "\n",
    "12",
    "▁",
    "ﬁ",
    "é",
    "<|user",
    "e\u0301",
]
PIECES += [
    " cat",
    "cat sat",
    ". The",
    "'s",
    "'S ",
    " a b",
    "1 c",
    "123 d",
    "\n e",
    "\t f",
    "é g",
    ".\nH",
    "x\n\n",
    "\n(",
    "1 2",
    "z  ",
    "\u0301 h",
    "  i",
    "j ",
    "😀 k",
    "— l",
]
TEXTS = st.lists(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=8).map("".join), max_size=5)


@pytest.mark.parametrize(
    ("kind", "added"), [*((kind, "plain") for kind in KINDS), *(("gpt2", added) for added in [*ADDED][1:])]
)
def test_texts_have_the_tokens_that_transformers_gives_them(kind, added):
    tokenizer = made(kind, added)
    fast = FastTokenizer(state_of(tokenizer))
    assert (fast.bos_token_id, fast.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)

    @settings(max_examples=30, deadline=None)
    @given(TEXTS)
    def holds(texts):
        for special in (True, False) if texts else ():
            wanted = tokenizer(texts, add_special_tokens=special)["input_ids"]
            assert fast(texts, add_special_tokens=special)["input_ids"] == wanted
            assert fast(texts[0], add_special_tokens=special)["input_ids"] == wanted[0]
        for ids in (tokenizer(text)["input_ids"] for text in texts):
            assert fast.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)

    holds()


def test_most_tokenizers_are_cut_at_special_tokens_and_those_where_it_matters_are_not():
    def cut(kind: str, added: str = "plain") -> bool:
        return FastTokenizer(state_of(made(kind, added))).borders is not None

    def words(kind: str, added: str = "plain") -> bool:
        return FastTokenizer(state_of(made(kind, added))).cuts_words

    assert {kind for kind in KINDS if words(kind)} == {"gpt2", "llama3", "qwen2", "digits"}
    assert {added for added in ADDED if not words("gpt2", added)} == {"takes blanks", "holds a blank", "normalised"}
    assert {kind for kind in KINDS if not cut(kind)} == {"metaspace first"}
    assert {added for added in ADDED if not cut("digits", added)} == {"takes blanks", "single word"}


def test_words_are_forgotten_before_they_fill_the_memory_and_long_ones_at_once(monkeypatch):
    monkeypatch.setattr(fast_tokenizer, "MOST_WORDS", 50)
    tokenizer = made("gpt2", "plain")
    fast = FastTokenizer(state_of(tokenizer))
    for start in range(0, 400, 20):
        texts = [f"n{n} is n{n + 1} {'ab' * n} {'ä' * n} end" for n in range(start, start + 20)]
        assert (
            fast(texts, add_special_tokens=False)["input_ids"]
            == tokenizer(texts, add_special_tokens=False)["input_ids"]
        )
        assert len(fast.words.places) <= 50 + 80
        assert max(map(len, fast.words.places)) <= fast_tokenizer.LONGEST_WORD


def test_a_tokenizer_that_does_something_of_its_own_is_left_to_transformers(tokenizer):
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, *args, **kwargs):
            return super()._encode_plus(*args, **kwargs)

    assert state_of(tokenizer) is not None
    assert state_of(Own(tokenizer_object=tokenizer.backend_tokenizer)) is None
    several = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    several.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    assert state_of(several) is None


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": [1, None, "é"]}}}
TURNS = [
    {"role": "user", "content": " hi <|end|>"},
    {"role": "assistant", "content": "Let me see", "reasoning_content": "hm", "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "name": "f"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "and\nnow?"},
    {"role": "assistant", "content": "  4 "},
]
PLAIN = [
    {"role": "system", "content": "be kind"},
    *(turn for turn in TURNS if turn["role"] == "user" or turn["content"] in ("It is 3.", "  4 ")),
]
OWN = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|user|>{{ m.role }}{{ m.thinking }}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant{% else %}{{ eos_token }}{% endif %}"
)


@pytest.mark.parametrize("template", [*names(), "own", "own, with tags"])
def test_chats_are_rendered_and_tokenized_as_with_transformers(template):
    tokenizer = made("digits", "normalised")
    tagged = OWN.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    tokenizer.chat_template = {"own": OWN, "own, with tags": tagged}.get(template) or read_chat_template(template)
    fast = FastTokenizer(state_of(tokenizer))
    tools = [{"type": "function", "function": {"name": "f", "description": "ö", "parameters": {}}}]
    own = template.startswith("own")
    for turns in [PLAIN[1:], TURNS] if own else [PLAIN[1:]]:
        for end in range(1, len(turns) + 1):
            for ask in (True, False):
                given_tools = tools if own else None
                wanted = tokenizer.apply_chat_template(
                    turns[:end], tools=given_tools, tokenize=False, add_generation_prompt=ask
                )
                assert fast.apply_chat_template(turns[:end], given_tools, False, ask) == wanted
    record = {"messages": TURNS if own else PLAIN[1:]} | ({"tools": tools} if own else {})
    for learn in ("all", "last", *(["generation"] if "tags" in template else [])):
        cfg = DataConfig(learn=learn, max_length=4096)
        assert tokenize([parse(record, "")], fast, cfg) == tokenize([parse(record, "")], tokenizer, cfg)


def test_values_that_are_no_json_are_hidden_from_templates(tokenizer):
    """As transformers does: a template that could reach an object's methods could reach more."""
    import copy
    import datetime

    own = copy.deepcopy(tokenizer)
    own.chat_template = "{% for m in messages %}{{ m.tool_calls[0].function.arguments.at }}{% endfor %}"
    call = {"function": {"name": "f", "arguments": {"at": datetime.date(2000, 1, 1)}}}
    turns = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    wanted = own.apply_chat_template(turns, tokenize=False)
    assert FastTokenizer(state_of(own)).apply_chat_template(turns) == wanted == "<date>"


def test_what_tokenizes_imports_no_torch(tmp_path, tokenizer):
    (tmp_path / "state.json").write_text(state_of(tokenizer))
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    code = (
        "import sys; from pathlib import Path; import ftray.data.pipeline as p\n"
        "from ftray.config import DataConfig; from ftray.task_spec import CAUSAL\n"
        f"of, words = p.record_task(CAUSAL), p.FastTokenizer(Path({str(tmp_path / 'state.json')!r}).read_text())\n"
        f"(row,) = of.tokenize([of.parse({json.dumps(record)}, '')], words, DataConfig())\n"
        "print(row.input_ids, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    wanted = tokenize([parse(record, "")], tokenizer, DataConfig())[0].input_ids
    assert result.stdout == f"{wanted} False\n", result.stderr


def test_a_tokenizer_is_loaded_by_a_process_of_its_own_as_by_this_one(tmp_path, tokenizer, monkeypatch):
    records, model = tmp_path / "r.jsonl", tmp_path / "model"
    records.write_text('{"input": "a", "output": "b"}\n' * 9)
    tokenizer.save_pretrained(model)
    cfg = DataConfig(source=str(records), chat_template="chatml")
    here = load_tokenizer(str(model), chat_template="chatml")
    monkeypatch.delitem(sys.modules, "torch")
    apart = load_apart(str(model), "chatml")
    assert isinstance(apart, FastTokenizer)
    assert apart.state == state_of(apart) == state_of(here)
    named = [fingerprint_of(cfg, find_sources(cfg), made, "CAUSAL_LM") for made in (here, apart)]
    assert named[0] == named[1]
    with pytest.raises(UserError, match="no such template"):
        load_apart(str(model), "chatmi")


# --- renderings cut at turns

LOOP, ASK = "{% for m in messages %}", "{% if add_generation_prompt %}<a>{% endif %}"
SAID = "<{{ m.role }}>{{ m.content }}"
CUT = {  # whether a turn depends on the turns before it alone
    "plain": (f"{{{{ bos_token }}}}{LOOP}{SAID}{{% endfor %}}{ASK}", True),
    "blanks taken away": (
        "{%- for m in messages -%}\n <{{ m.role }}>\n {{ m.content | trim -}} \n{%- endfor -%}\n" + ASK,
        True,
    ),
    "a default for the first": (
        "{% if messages[0].role != 'system' %}<system>be{% endif %}"
        f"{LOOP}{{% if not loop.first or m.role != 'system' %}}{SAID}{{{{ loop.index }}}}{{% endif %}}"
        f"{{% endfor %}}{ASK}",
        True,
    ),
    "what was said before": (
        f"{{% set n = namespace(k=0) %}}{LOOP}{{% set n.k = n.k + m.content | length %}}{SAID}{{{{ n.k }}}}"
        f"{{% endfor %}}{ASK}",
        True,
    ),
    "marks": (
        f"{LOOP}{{% if m.role == 'assistant' %}}{{% generation %}}{SAID}{{% endgeneration %}}{{% else %}}{SAID}"
        f"{{% endif %}}{{% endfor %}}{ASK}",
        True,
    ),
    "a turn left out": (
        f"{LOOP}{{% if m.role == 'system' %}}{{% continue %}}{{% endif %}}{SAID}{{% endfor %}}{ASK}",
        True,
    ),
    "joined": (
        LOOP + "{{ '<' + m['role'] + '>' ~ m['content'] + '</s>' }}{% if loop.first %}!{% endif %}{% endfor %}" + ASK,
        True,
    ),
    "the text twice": (f"{LOOP}{SAID}{SAID}{{% endfor %}}{ASK}", True),
    "by what is said": (f"{LOOP}{SAID}{{% if m.content == 'a' %}}!{{% endif %}}{{% endfor %}}{ASK}", True),
    "whether something is said": (
        f"{LOOP}{{{{ (m.content or '-') ~ m.role }}}}{{% if m.content and not m.name %}}{SAID}{{% endif %}}"
        f"{{% for c in m.calls or [] %}}{{{{ c | tojson }}}}{{{{ loop.first }}}}{{% endfor %}}{{% endfor %}}{ASK}",
        True,
    ),
    "letter by letter": (f"{LOOP}{SAID}{{% for c in m.content %}}{{{{ c }}}}.{{% endfor %}}{{% endfor %}}{ASK}", True),
    "by what was said first": (f"{LOOP}{SAID}{{{{ messages[0].content }}}}{{% endfor %}}{ASK}", True),
    "by the number": (f"{LOOP}{SAID}{{{{ loop.index }}}}{{% endfor %}}{ASK}", True),
    "by the turn before": (f"{LOOP}{SAID}{{{{ loop.previtem }}}}{{% endfor %}}{ASK}", True),
    "a turn as a whole": (f"{LOOP}{SAID}{{{{ m | length }}}}{{% endfor %}}{ASK}", True),
    "a text through a filter": (f"{LOOP}{SAID}{{{{ (m.content + ' x') | trim }}}}{{% endfor %}}{ASK}", True),
    "a text called": (f"{LOOP}{SAID}{{{{ m.content.upper() }}}}{{% endfor %}}{ASK}", True),
    "a text in another name": (f"{LOOP}{{% set c = m.content %}}<{{{{ c }}}}>{{% endfor %}}{ASK}", True),
    "a text by a key that is found": (f"{LOOP}{SAID}{{{{ m[m.role and 'content'][:1] }}}}{{% endfor %}}{ASK}", True),
    "an end": (f"{LOOP}{SAID}{{% endfor %}}{{% if add_generation_prompt %}}<a>{{% else %}}</s>{{% endif %}}", True),
    "an early end": (f"{LOOP}{SAID}{{% if m.content == 'a' %}}{{% break %}}{{% endif %}}{{% endfor %}}{ASK}", None),
    "the last": (f"{LOOP}{SAID}{{% if loop.last %}}</s>{{% endif %}}{{% endfor %}}{ASK}", False),
    "the last by its key": (f"{LOOP}{SAID}{{% if loop['last'] %}}</s>{{% endif %}}{{% endfor %}}{ASK}", False),
    "the last of all": (f"{LOOP}{SAID}{{{{ messages[-1].content }}}}{{% endfor %}}{ASK}", False),
    "how many": (f"{{{{ messages | length }}}}{LOOP}{SAID}{{% endfor %}}{ASK}", False),
    "by another name": (f"{{% set all = messages %}}{LOOP}{SAID}{{{{ all | length }}}}{{% endfor %}}{ASK}", False),
    "in a macro": (
        f"{{% macro f() %}}{{{{ messages | length }}}}{{% endmacro %}}{LOOP}{{{{ f() }}}}{SAID}{{% endfor %}}{ASK}",
        False,
    ),
    "some of them": (f"{{% for m in messages if m.role != 'system' %}}{SAID}{{% endfor %}}{ASK}", False),
    "asked within": (f"{LOOP}{SAID}{{% if add_generation_prompt %}}!{{% endif %}}{{% endfor %}}{ASK}", False),
    "an end by what was said": (
        f"{{% set n = namespace(k=0) %}}{LOOP}{{% set n.k = loop.index %}}{SAID}{{% endfor %}}{{{{ n.k }}}}{ASK}",
        False,
    ),
    "two loops": (f"{LOOP}{SAID}{{% endfor %}}{LOOP}{SAID}{{% endfor %}}{ASK}", False),
    **{name: (read_chat_template(name), name in ("chatml", "llama3", "zephyr")) for name in names()},
}


@pytest.mark.parametrize("name", CUT)
@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.one_of(st.sampled_from(["a", " b\n", ""]), st.text(max_size=5)), min_size=1, max_size=6),
    begins=st.booleans(),
)
def test_a_rendering_cut_at_turns_is_that_of_each_number_of_turns(name, texts, begins):
    template, wanted = CUT[name]
    roles = ["system"] * begins + ["user", "assistant"] * 3
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    try:
        pieces = render_pieces(template, messages, None, special)
    except TemplateError:  # it refuses such turns
        return
    assert wanted in (None, pieces is not None)
    for count in range(1, len(messages) + 1) if pieces else ():
        for ask, end in ((False, pieces.end), (True, pieces.ask)):
            assert render(template, messages[:count], None, ask, special) == pieces.begun[count] + end


FRAMED = {"plain", "marks", "an end", "joined", "the text twice", "whether something is said", "chatml", "zephyr"}


@pytest.mark.parametrize("name", [name for name in CUT if CUT[name][1]])
def test_what_stands_around_a_text_is_rendered_once_for_its_role(name, monkeypatch):
    template = CUT[name][0]
    turns = [[(role, f"{text} {i}") for i, role in enumerate(("user", "assistant", "user"))] for text in "ab"]
    first, second = ([{"role": role, "content": text} for role, text in said] for said in turns)
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    wanted = render(template, second, None, False, special)
    render_pieces(template, first, None, special)
    monkeypatch.setattr(Template, "render", None)
    if name in FRAMED:
        pieces = render_pieces(template, second, None, special)
        assert pieces.begun[-1] + pieces.end == wanted
    else:
        with pytest.raises(TypeError):
            render_pieces(template, second, None, special)
