"""Records in the shapes in which they are published: what each teaches, or the line to type where nobody can know.

What is right is written down here from what each data set means.
"""

import gzip
import json
import re
import shlex

import datasets
import pyarrow as pa
import pytest
from helpers.record_files import ASK, END, TEMPLATE, USER, assistant, config, lines, rows_of, said, user

from ftray import cli
from ftray.config import DataConfig
from ftray.data.fields import Fields
from ftray.data.inference import Renderer
from ftray.data.proposal import proposal
from ftray.data.records import Example, parse, parse_and_see
from ftray.data.turns import Turn
from ftray.errors import UserError
from ftray.task_spec import TaskSpec

# --- one file a shape that is in wide use, through all that a command does with it

SYSTEM = "<|system|>"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "w",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
# name of the file -> (the record numbered n, the pieces of record 0: context, what is learnt, context, ...)
GENERATING = {
    "openai_tools": (
        lambda n: {
            "messages": [
                user(f"Weather in Rome {n}?"),
                assistant(None, tool_calls=[CALL]),
                {"role": "tool", "tool_call_id": "c1", "content": "21C"},
                assistant(f"It is 21C {n}."),
            ],
            "tools": [WEATHER],
            "parallel_tool_calls": False,
        },
        [
            f"{SYSTEM}{json.dumps([WEATHER])}{END}{USER}Weather in Rome 0?{ASK}",
            '{"name": "get_weather", "arguments": {"city": "Rome"}}' + END,
            f"<|tool|>21C{ASK}",
            f"It is 21C 0.{END}",
        ],
    ),
    "openai_weight": (
        lambda n: {
            "messages": [
                {"role": "system", "content": "You are terse."},
                user(f"Capital of France {n}?"),
                assistant("I think Paris", weight=0),
                user("Sure?"),
                assistant("Paris.", weight=1),
            ]
        },
        [
            f"{SYSTEM}You are terse.{END}{USER}Capital of France 0?{ASK}I think Paris{END}{USER}Sure?{ASK}",
            f"Paris.{END}",
        ],
    ),
    "openai_parts": (
        lambda n: {
            "messages": [
                user([{"type": "text", "text": "Say "}, {"type": "text", "text": str(n)}]),
                assistant([{"type": "text", "text": f"number {n}"}]),
            ]
        },
        [f"{USER}Say 0{ASK}", f"number 0{END}"],
    ),
    "openai_developer": (
        lambda n: {"messages": [{"role": "developer", "content": "Be short."}, user(f"Say {n}"), assistant(str(n))]},
        [f"{SYSTEM}Be short.{END}{USER}Say 0{ASK}", f"0{END}"],
    ),
    "dolly": (
        lambda n: {
            "instruction": f"Sum up {n}.",
            "context": f"Some text {n}" if n % 2 == 0 else "",
            "response": "Text.",
            "category": "summarization",
        },
        [f"{USER}Sum up 0.\nSome text 0{ASK}", f"Text.{END}"],
    ),
    "gsm8k": (
        lambda n: {"question": f"What is 2+{n}?", "answer": f"It is <<2+{n}>> #### {n}"},
        [f"{USER}What is 2+0?{ASK}", f"It is <<2+0>> #### 0{END}"],
    ),
    "sharegpt_tools": (
        lambda n: {
            "conversations": [
                {"from": "human", "value": f"q {n}"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                {"from": "observation", "value": "42"},
                {"from": "gpt", "value": f"It is 42 {n}"},
            ],
            "tools": "[]",
        },
        [f"{USER}q 0{ASK}", '{"name": "f", "arguments": {}}' + END, f"<|tool|>42{ASK}", f"It is 42 0{END}"],
    ),
    "trl_conv_pc": (
        lambda n: {"prompt": [user(f"What color is the sky {n}?")], "completion": [assistant(f"Blue {n}.")]},
        [f"{USER}What color is the sky 0?{ASK}", f"Blue 0.{END}"],
    ),
}
PLAIN = [f"{USER}a 0{ASK}", f"b 0{END}"]


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("template") / "tools.jinja"
    path.write_text(TEMPLATE)
    return str(path)


@pytest.mark.parametrize("name", GENERATING)
def test_what_a_file_teaches_and_after_what_context(tmp_path, tiny_llama, tokenizer, template, name):
    record, pieces = GENERATING[name]
    (tmp_path / "r.jsonl").write_text(lines(record))
    task, rows = rows_of(config(tmp_path / "r.jsonl", tiny_llama, template, max_length=400))
    assert (task, len(rows)) == ("CAUSAL_LM", 40)
    assert said(rows[0][1], tokenizer) == [(text, index % 2 == 1) for index, text in enumerate(pieces)]


LABELLED = {
    "ner_ints": (lambda n: {"tokens": ["EU", f"n{n}"], "ner_tags": [3, 0]}, "TOKEN_CLS", "EU n0", "3 0"),
    "ner_str": (lambda n: {"tokens": ["EU", f"n{n}"], "ner_tags": ["B-ORG", "O"]}, "TOKEN_CLS", "EU n0", "B-ORG O"),
    "sentiment_sentence": (
        lambda n: {"sentence": f"good {n}", "label": (n + 1) % 2, "idx": n},
        "SEQ_CLS",
        "good 0",
        "1",
    ),
    "pairs_nli": (
        lambda n: {"premise": f"a man {n}", "hypothesis": "a cat", "label": n % 3},
        "SEQ_CLS",
        "a man 0\na cat",
        "0",
    ),
}


@pytest.mark.parametrize("name", LABELLED)
def test_what_a_labelled_file_teaches(tmp_path, tiny_bert, name):
    record, task, text, label = LABELLED[name]
    (tmp_path / "r.jsonl").write_text(lines(record))
    found, rows = rows_of(config(tmp_path / "r.jsonl", tiny_bert, None))
    assert (found, len(rows), rows[0][1].prompt, rows[0][1].target) == (task, 40, text, label)


PREFERENCES = {
    "dpo": (
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        "chosen: one of a preference pair",
        Example("The sky is", " blue."),
    ),
    "dpo_conv": (
        {"prompt": [user("Sky?")], "chosen": [assistant("Blue")], "rejected": [assistant("Green")]},
        "chosen: one of a preference pair",
        Example(messages=(Turn("user", "Sky?"), Turn("assistant", "Blue"))),
    ),
    "kto": (
        {"prompt": "Sky?", "completion": "Blue", "label": True},
        "label: marks answers as good or bad",
        Example("Sky?", "Blue"),
    ),
    "kto, bad": (
        {"prompt": "Sky?", "completion": "Green", "label": False},
        "label: marks answers as good or bad",
        Example("Sky?", "Green"),
    ),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_are_never_trained_on_as_good_answers(tmp_path, tiny_llama, template, name):
    record, message, kept = PREFERENCES[name]
    (tmp_path / "r.jsonl").write_text(lines(lambda n: record | {"id": n}))
    cfg = config(tmp_path / "r.jsonl", tiny_llama, template).model_copy(update={"task": "CAUSAL_LM"})
    with pytest.raises(UserError, match=rf"r\.jsonl:1: {message}, which --task (DPO|KTO) learns from") as told:
        rows_of(cfg)
    assert as_mapped(record, str(told.value)) == kept


def test_plain_files_are_read_as_they_are(tmp_path, tiny_llama, tokenizer):
    records = [{"input": f"a {n}", "output": f"b {n}"} for n in range(40)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "gz.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "plain.ndjson").write_text(text)
    (tmp_path / "tsv.tsv").write_text("input\toutput\n" + "".join(f"a {n}\tb {n}\n" for n in range(40)))
    for name in ("gz.jsonl.gz", "plain.ndjson", "tsv.tsv"):
        _, rows = rows_of(config(tmp_path / name, tiny_llama, None))
        assert said(rows[0][1], tokenizer) == [(PLAIN[0], False), (PLAIN[1], True)]
        assert len(rows) == 40
    parts = {"train": records[:30], "test": records[30:]}
    saved = {name: datasets.Dataset.from_list(part) for name, part in parts.items()}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "saved_dd")
    _, rows = rows_of(config(tmp_path / "saved_dd", tiny_llama, None), "test")
    assert [(split, row.target) for split, row in rows] == [("test", f"b {n}") for n in range(30, 40)]
    (tmp_path / "surrogate.jsonl").write_text('{"input": "emoji \\ud83d 0", "output": "b 0"}\n')
    with pytest.raises(UserError, match=r"surrogate\.jsonl:1: input holds \\ud83d, half of a surrogate pair"):
        rows_of(config(tmp_path / "surrogate.jsonl", tiny_llama, None))
    book = "".join(f"Line {n} of a book. It goes on.\n" for n in range(200))
    (tmp_path / "raw.txt").write_text(book)
    _, rows = rows_of(config(tmp_path / "raw.txt", tiny_llama, None))
    assert all(row.labels == row.input_ids for _, row in rows)
    assert "".join(tokenizer.decode(row.input_ids) for _, row in rows).replace(END, "") == book


# --- data sets of the hub, record by record


def conversation(*turns, **more) -> Example:
    return Example(messages=tuple(Turn(*turn) if isinstance(turn, tuple) else turn for turn in turns), **more)


def function(name, **more):
    return {"type": "function", "function": {"name": name, "arguments": more}}


SAID = (("user", "q"), ("assistant", "r"))
OTHERS = {"human": "q", "gpt": "r"}
SHAREGPT = [{"from": name, "value": text} for name, text in OTHERS.items()]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
F = {"name": "f", "description": "d", "parameters": SCHEMA}
AS_OPENAI = ({"type": "function", "function": F},)
USES = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}
TAKEN = {
    "ultrachat": ({"prompt": "q", "prompt_id": "x", "messages": [user("q"), assistant("r")]}, conversation(*SAID)),
    "openorca": (
        {"id": "flan.1", "system_prompt": "S", "question": "q", "response": "r"},
        conversation(("system", "S"), *SAID),
    ),
    "slimorca": (
        {
            "conversations": [
                {"from": "system", "value": "S", "weight": None},
                {"from": "human", "value": "q", "weight": 0},
                {"from": "gpt", "value": "r", "weight": 1},
            ]
        },
        conversation(("system", "S"), *SAID, context=frozenset({1})),
    ),
    "alpaca": (
        {
            "instruction": "q",
            "input": "i",
            "output": "r",
            "text": "Below is a task.\n\n### Instruction:\nq\n\n### Input:\ni\n\n### Response:\nr",
        },
        Example("q\ni", "r"),
    ),
    "sharegpt of the first days": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "chatgpt", "value": "r"}]},
        conversation(*SAID),
    ),
    "exchanges": (
        {"conversation": [{"input": "q", "output": "r"}, {"input": "s", "output": "t"}]},
        conversation(*SAID, ("user", "s"), ("assistant", "t")),
    ),
    "exchanges of a human": (
        {"conversation": [{"human": "q", "assistant": "r"}], "category": "c"},
        conversation(*SAID),
    ),
    "wildchat": (
        {"model": "m", "conversation": [user("q") | {"toxic": False}, assistant("r", country=None)], "turn": 1},
        conversation(*SAID),
    ),
    "lima": ({"conversations": ["q", "r"], "source": "s"}, conversation(*SAID)),
    "glaive": (
        {"system": "S", "chat": "USER: q\n\n\nASSISTANT: r <|endoftext|>\n\n\nFUNCTION RESPONSE: {}\n\n\nASSISTANT: s"},
        conversation(("system", "S"), *SAID, ("tool", "{}"), ("assistant", "s")),
    ),
    "glaive as sharegpt": (
        {
            "conversations": [
                SHAREGPT[0],
                {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "21"},
                SHAREGPT[1],
            ],
            "tools": json.dumps([F]),
        },
        conversation(
            SAID[0],
            Turn("assistant", "", (function("f", a=1),), '{"name": "f", "arguments": {"a": 1}}'),
            ("tool", "21"),
            SAID[1],
            tools=AS_OPENAI,
        ),
    ),
    "xlam": (
        {
            "id": 1,
            "query": "q",
            "answers": '[{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {"a": 2}}]',
            "tools": json.dumps([F]),
        },
        conversation(
            SAID[0],
            Turn(
                "assistant",
                "",
                (function("f", a=1), function("f", a=2)),
                '[{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {"a": 2}}]',
            ),
            tools=AS_OPENAI,
        ),
    ),
    "toolace": (
        {
            "system": "S",
            "conversations": [
                {"from": "user", "value": "q"},
                {"from": "assistant", "value": "[f(a=1)]"},
                {"from": "tool", "value": "[21]"},
                {"from": "assistant", "value": "r"},
            ],
        },
        conversation(("system", "S"), SAID[0], ("assistant", "[f(a=1)]"), ("tool", "[21]"), SAID[1]),
    ),
    "anthropic": (
        {
            "system": [{"type": "text", "text": "S"}],
            "messages": [
                user("q"),
                assistant(
                    [{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "see"}, USES]
                ),
                user([{"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "21"}]}]),
                assistant("r"),
            ],
            "tools": [{"name": "f", "description": "d", "input_schema": SCHEMA}],
        },
        conversation(
            ("system", "S"),
            SAID[0],
            Turn("assistant", "see", ({"id": "t1", **function("f", a=1)},), thoughts="hm"),
            Turn("tool", "21", more={"tool_call_id": "t1"}),
            SAID[1],
            tools=AS_OPENAI,
        ),
    ),
    "anthropic, results and a question": (
        {
            "messages": [
                user("q"),
                assistant([USES, USES | {"id": "t2"}]),
                user(
                    [
                        {"type": "tool_result", "tool_use_id": "t1", "content": "21"},
                        {"type": "tool_result", "tool_use_id": "t2"},
                        {"type": "text", "text": "and?"},
                    ]
                ),
                assistant("x", weight=0),
                user("q"),
                assistant("r"),
            ]
        },
        conversation(
            SAID[0],
            Turn("assistant", "", ({"id": "t1", **function("f", a=1)}, {"id": "t2", **function("f", a=1)})),
            Turn("tool", "21", more={"tool_call_id": "t1"}),
            Turn("tool", "", more={"tool_call_id": "t2"}),
            ("user", "and?"),
            ("assistant", "x"),
            *SAID,
            context=frozenset({5}),
        ),
    ),
    "gemini": (
        {
            "system": {"parts": [{"text": "S"}]},
            "contents": [
                {"role": "user", "parts": [{"text": "q"}]},
                {
                    "role": "model",
                    "parts": [{"text": "hm", "thought": True}, {"functionCall": {"name": "f", "args": {"a": 1}}}],
                },
                {"role": "function", "parts": [{"functionResponse": {"name": "f", "response": {"x": 1}}}]},
                {"role": "model", "parts": [{"text": "r"}]},
            ],
            "tools": [{"functionDeclarations": [F]}],
        },
        conversation(
            ("system", "S"),
            SAID[0],
            Turn("assistant", "", (function("f", a=1),), thoughts="hm"),
            Turn("tool", '{"x": 1}', more={"name": "f"}),
            SAID[1],
            tools=AS_OPENAI,
        ),
    ),
    "turns to turns": ({"input": [user("q")], "output": [assistant("r")]}, conversation(*SAID)),
    "turns to a text": ({"prompt": [user("q")], "response": "r"}, conversation(*SAID)),
    "no_robots": (
        {"prompt": "q", "prompt_id": "x", "messages": [user("q"), assistant("r")], "category": "c"},
        conversation(*SAID),
    ),
    "magpie": (
        {
            "instruction": "q",
            "response": "r",
            "conversations": SHAREGPT,
            "intent": "to know",
            "quality_explanation": "clear",
            "reward_model": "m",
            "instruct_reward": -3.2,
        },
        conversation(*SAID),
    ),
    "numina": (
        {"source": "s", "problem": "q", "solution": "r", "messages": [user("q"), assistant("r")]},
        conversation(*SAID),
    ),
    "metamath": ({"type": "t", "query": "q", "original_question": "p", "response": "r"}, Example("q", "r")),
    "math": ({"problem": "q", "solution": r"so \boxed{4}.", "answer": "4", "level": 2}, Example("q", r"so \boxed{4}.")),
    "openthoughts": ({"system": "S", "conversations": SHAREGPT}, conversation(("system", "S"), *SAID)),
    "reasoning": (
        {"messages": [user("q"), assistant("r", reasoning_content="hm")]},
        conversation(SAID[0], Turn("assistant", "r", thoughts="hm")),
    ),
    "helpsteer": (
        {"prompt": "q", "response": "r", "helpfulness": 3, "correctness": 4, "verbosity": 2},
        Example("q", "r"),
    ),
    "wmt": ({"translation": {"de": "q", "en": "r"}}, Example("q", "r")),
    "xsum": ({"document": "q", "summary": "r", "id": "x"}, Example("q", "r")),
    "cnn": ({"article": "q", "highlights": "r", "id": "x"}, Example("q", "r")),
    "samsum": (
        {"id": "x", "dialogue": "User: q\n\nAssistant: p", "summary": "r"},
        Example("User: q\n\nAssistant: p", "r"),
    ),
    "fineweb-edu": ({"text": "t", "url": "u", "dump": "d", "score": 2.5, "int_score": 3}, Example("", "t")),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_published_is_taken(name):
    record, example = TAKEN[name]
    assert parse(record, "f:1") == example


def as_mapped(record, message: str, task: str = "CAUSAL_LM"):
    """What a record says once the first line that a message offers is typed."""
    words = shlex.split(message[message.index("--data.fields") :])[:2]
    fields = cli.parse("preprocess", words).data.fields
    return TaskSpec(task).load().parse(Fields(fields)(record, "f:1"), "f:1")


# record -> (how the refusal begins, what the record says once the first line that it offers is typed)
ASKED_ABOUT = {
    "hh-rlhf": (
        {"chosen": "\n\nHuman: q\n\nAssistant: r", "rejected": "\n\nHuman: q\n\nAssistant: no"},
        "chosen: one of a preference pair",
        conversation(*SAID),
    ),
    "ultrafeedback": (
        {
            "prompt": "q",
            "chosen": [user("q"), assistant("r")],
            "rejected": [user("q"), assistant("x")],
            "score_chosen": 8.0,
        },
        "chosen: one of a preference pair",
        conversation(*SAID),
    ),
    "orca, pairs": (
        {"system": "S", "question": "q", "chosen": "r", "rejected": "x"},
        "chosen: one of a preference pair",
        conversation(("system", "S"), *SAID),
    ),
    "kto": (
        {"prompt": [user("q")], "completion": [assistant("r")], "label": True},
        "label: marks answers",
        conversation(*SAID),
    ),
    "alpaca in Chinese": (
        {"instruction_zh": "q", "input_zh": "", "output_zh": "r"},
        "record with keys",
        Example("q", "r"),
    ),
    "self-instruct": (
        {"id": "x", "instruction": "q", "instances": [{"input": "i", "output": "r"}]},
        "record with keys",
        Example("q\ni", "r"),
    ),
    "ultrachat as texts": ({"id": "1", "data": ["q", "r"]}, "record with keys", conversation(*SAID)),
    "a batch of requests": (
        {"custom_id": "1", "body": {"model": "m", "messages": [user("q"), assistant("r")]}},
        "record with keys",
        conversation(*SAID),
    ),
    "speakers of other names": (
        {"messages": [{"role": "customer", "content": "q"}, {"role": "agent", "content": "r"}]},
        r"messages\[0\]\.role is 'customer'",
        conversation(*SAID),
    ),
    "turns beside a system text": (
        {"log": [user("q"), assistant("r")], "system_prompt": "S"},
        "record with keys",
        conversation(("system", "S"), *SAID),
    ),
    "trivia": ({"question": "q", "answer": {"aliases": ["x"], "value": "r"}}, "answer must be text", Example("q", "r")),
    "several answers": ({"question": "q", "answers": [{"text": "r"}]}, "answers must be text", Example("q", "r")),
    "natural questions": ({"question": "q", "answer": ["r", "s"]}, "answer holds 2 answers", Example("q", "r")),
    "three languages": ({"translation": {"de": "q", "en": "r", "fr": "s"}}, "translation holds", Example("q", "r")),
    "mmlu": (
        {"question": "q", "choices": ["x", "y"], "answer": "y"},
        "choices would be lost",
        Example("q\nx\ny", "y"),
    ),
    "arc": (
        {"id": "x", "question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        "record with keys",
        Example("q\nx\ny", "B"),
    ),
    "race": (
        {"article": "a", "question": "q", "answer": "r"},
        "article would be lost",
        Example("q\na", "r"),
    ),
    "a suffix": (
        {"prompt": "q", "completion": "r", "suffix": "s"},
        "suffix would be lost",
        Example("q\ns", "r"),
    ),
    "numina without a box": (
        {"problem": "q", "solution": "so it is 24", "answer": "4"},
        "answer would be lost",
        Example("q", "4"),
    ),
    "aqua": (
        {"question": "q", "answer": "r", "rationale": "hm"},
        "rationale would be lost",
        Example("q", "<think>\nhm\n</think>\nr"),
    ),
    "medical o1": (
        {"Question": "q", "Complex_CoT": "hm", "Response": "r"},
        "record with keys",
        Example("q", "<think>\nhm\n</think>\nr"),
    ),
    "cosmopedia": ({"prompt": "q", "text": "r", "format": "blog"}, "prompt would be lost", Example("q", "r")),
    "a text beside a pair": (
        {"text": "t", "instruction": "q", "response": "r"},
        "instruction would be",
        Example("q", "r"),
    ),
    "a gap": ({"prefix": "a(", "suffix": ")", "middle": "b"}, "record with keys", Example("a([...])", "b")),
    "llava": ({"image": "a.jpg", "conversations": SHAREGPT}, "image: ftray reads text alone", conversation(*SAID)),
    "speech": ({"path": "p", "audio": {"array": [0.1]}, "sentence": "t"}, "audio: ftray reads", Example("", "t")),
    "video": ({"video": "a.mp4", "question": "q", "answer": "r"}, "video: ftray reads text", Example("q", "r")),
    "images": ({"messages": [user("q"), assistant("r")], "images": ["a"]}, "images: ftray", conversation(*SAID)),
    "sciq": ({"question": "q", "distractor1": "x", "correct_answer": "r"}, "distractor1: a bad", Example("q", "r")),
    "mbpp": ({"text": "q", "code": "r"}, "code would be lost", Example("q", "r")),
    "documents": ({"documents": "q", "tldr": "r"}, "record with keys", Example("q", "r")),
}


@pytest.mark.parametrize("name", ASKED_ABOUT)
def test_what_nobody_can_know_is_refused_with_a_line_that_works(name):
    record, message, example = ASKED_ABOUT[name]
    with pytest.raises(UserError, match=f"^f:1: {message}") as told:
        parse(record, "f:1")
    assert "\n" not in str(told.value)
    assert as_mapped(record, str(told.value)) == example


# of other tasks: record -> (the refusal, what the first line gives)
OF_TASKS = {
    "several emotions": ("SEQ_CLS", {"text": "t", "labels": [3, 5]}, "labels holds 2 labels", ("t", "3")),
    "stars": ("SEQ_CLS", {"text": "t", "stars": 4}, "stars would be lost", ("t", "4")),
    "a score": ("SEQ_CLS", {"text": "t", "score": 2.4}, "score would be lost", ("t", "2")),
    "quora": ("SEQ_CLS", {"question1": "t", "question2": "u", "is_duplicate": 1}, "record with keys", ("t", "1")),
    "ag_news": ("SEQ_CLS", {"Class Index": 3, "Title": "h", "Description": "t"}, "record with keys", ("t", "3")),
}


@pytest.mark.parametrize("name", OF_TASKS)
def test_what_another_task_learns_is_refused_with_a_line_that_works(tmp_path, tiny_llama, name):
    task, record, message, (text, label) = OF_TASKS[name]
    (tmp_path / "r.jsonl").write_text(lines(lambda n: record | {"id": n}))
    with pytest.raises(UserError, match=rf"r\.jsonl:1: {message}") as told:
        rows_of(config(tmp_path / "r.jsonl", tiny_llama, None))
    example = as_mapped(record, str(told.value), task)
    assert (example.text, example.label) == (text, label)


def test_a_record_of_two_tasks_is_refused_with_a_line_for_each(tmp_path, tiny_llama):
    record = {"text": "a b", "label": True, "prompt": "a", "completion": "b"}
    (tmp_path / "r.jsonl").write_text(lines(lambda n: record | {"id": n}))
    with pytest.raises(UserError, match="holds text and label, and prompt and completion: say which are meant") as told:
        rows_of(config(tmp_path / "r.jsonl", tiny_llama, None))
    label, answer = re.split(r"(?<=label), or ", str(told.value))
    assert as_mapped(record, label, "SEQ_CLS").label == "True"
    assert as_mapped(record, answer) == Example("a", "b")


def test_a_gap_is_filled_in_with_the_tokens_of_the_model(tmp_path, tokenizer):
    """The line that is proposed holds the tokens that the tokenizer has for it, whichever these are."""
    record = {"prefix": "a(", "suffix": ")", "middle": "b"}
    for tokens in (
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ):
        before, after, gap = tokens
        assert as_mapped(record, proposal(record, tokens)) == Example("", f"{before}a({after}){gap}b")
        with pytest.raises(UserError, match=re.escape(before)):
            rows_of(config(write_gap(tmp_path), model_with(tmp_path / gap, tokens), None))


def write_gap(path):
    (path / "gap.jsonl").write_text(lines(lambda n: {"prefix": f"a{n}(", "suffix": ")", "middle": "b"}))
    return path / "gap.jsonl"


def model_with(path, tokens) -> str:
    from conftest import llama, make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.save_pretrained(path)
    llama().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ([USES, {"type": "text", "text": "r"}], r"content\[1\] is text after a call"),
        ([{"type": "text", "text": "r"}, {"type": "thinking", "thinking": "hm"}], r"content\[1\] is a thought after"),
        ([USES | {"input": "x"}], "the arguments of f are no JSON object but 'x'"),
        ([{"type": "tool_result", "content": [USES]}], r"content\[0\]\.content\[0\] is no text but 'tool_use'"),
        ([{"type": "tool_result", "content": "x"}], "the result of a tool in a turn of the assistant"),
        ([{"type": "image", "source": {}}], r"content\[0\] is no text but 'image'"),
        ([{"type": "text", "text": "hm", "train": False}], r"\[0\] is marked as not learnt: ftray learns whole"),
        ([{"type": "text", "text": "hm"}, {"type": "text", "text": "r", "weight": 0}], r"content\[1\] is marked"),
    ],
)
def test_parts_that_would_be_put_elsewhere_are_refused(part, message):
    with pytest.raises(UserError, match=rf"^f:1: messages\[1\].*{message}"):
        parse({"messages": [user("q"), assistant(part)]}, "f:1")
    with pytest.raises(UserError, match=r"messages\[0\]\.content: a call or a thought in a turn of user"):
        parse({"messages": [user([USES]), assistant("r")]}, "f:1")


def test_thoughts_in_parts_are_joined_and_none_of_them_is_left_unlearnt():
    """As axolotl has them, each part with a mark of its own."""
    parts = [{"type": "text", "text": "2+2", "train": True}, {"type": "text", "text": " is 4."}]
    whole = parse({"messages": [user("q"), assistant("4", reasoning_content=parts)]}, "f:1")
    assert whole == parse({"messages": [user("q"), assistant("4", reasoning_content="2+2 is 4.")]}, "f:1")
    with pytest.raises(UserError, match=r"^f:1: messages\[1\].reasoning_content\[0\] is marked as not learnt"):
        parse({"messages": [user("q"), assistant("4", reasoning_content=[parts[0] | {"train": False}])]}, "f:1")
    with pytest.raises(UserError, match=r"reasoning_content must be text, not dict"):
        parse({"messages": [user("q"), assistant("4", reasoning_content={"text": "hm"})]}, "f:1")


@pytest.mark.parametrize(
    "record",
    [
        {"conversation": [{"input": "p", "output": "o"}, {"input": "q", "output": "r"}]},
        {"conversation": [{"input": "p", "output": "o"}, {"input": "q"}]},
        {"chat": "USER: p\n\nASSISTANT: o\n\nUSER: q\n\nASSISTANT: r"},
        {"chat": "USER: p\n\nASSISTANT: o\n\nUSER: q"},
        {"messages": json.dumps([user("p"), assistant("o"), user("q"), assistant("r")])},
        {"input": [user("p"), assistant("o"), user("q")], "output": [assistant("r")]},
    ],
)
def test_infer_asks_the_last_question_of_a_record(tiny_llama, tokenizer, record):
    prompts = Renderer(tokenizer, DataConfig(), None)
    asked = tokenizer.decode(prompts.record("f:1", record, False))
    assert asked == f"{USER}p{ASK}o{END}{USER}q{ASK}"


def test_parts_are_read_alike_from_a_table_which_has_each_key_in_each_part():
    called = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "see"}, USES]
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "21"}
    turns = [user([{"type": "text", "text": "q"}]), assistant(called), user([result]), assistant(called[1:2])]
    record = {"messages": turns, "tools": [{"name": "f", "description": "d", "input_schema": SCHEMA}]}
    (row,) = pa.Table.from_pylist([record]).to_pylist()
    assert row["messages"][0]["content"][0].keys() > {"thinking", "input", "tool_use_id"}
    assert parse(row, "f") == parse(record, "f")


def test_what_a_part_says_beside_is_named():
    said = [
        {"type": "text", "text": "q", "cache_control": {}},
        {"type": "tool_result", "content": "x", "is_error": True},
    ]
    seen = parse_and_see({"messages": [user(said[:1]), assistant("r"), user(said[1:]), assistant("s")]}, "f:1")[1]
    assert seen.ignored == ("messages[].content[].is_error",)
    called = assistant(None, tool_calls=[{"id": "t1", "index": 0, **function("f", a=1)}])
    assert parse_and_see({"messages": [user("q"), called]}, "f:1")[1].ignored == ()


def test_parts_are_other_spellings_of_calls_and_turns_of_tools():
    """As in a file of OpenAI's."""
    result = user([{"type": "tool_result", "content": "x"}])
    theirs = parse({"messages": [user("q"), assistant([USES]), result, assistant("r")]}, "f")
    called = assistant(None, tool_calls=[{"id": "t1", **function("f", a=1)}])
    ours = [user("q"), called, {"role": "tool", "content": "x"}, assistant("r")]
    assert theirs == parse({"messages": ours}, "f")
