import json
import shlex

import pytest

from ftray import cli
from ftray.data.fields import Fields
from ftray.data.records import Example, Turn, parse, parse_and_see
from ftray.errors import UserError
from ftray.task_spec import TaskSpec


def chat(turns, **more) -> Example:
    """A conversation of (role, text)."""
    return Example(messages=tuple(Turn(*turn) for turn in turns), **more)


TURNS = (("system", "Be brief."), ("user", "1+1?"), ("assistant", "2"))
SHAPES = [
    ({"input": "a", "output": "b"}, Example("a", "b")),
    ({"input": "", "output": "b"}, Example("", "b")),
    ({"instruction": "Add", "input": "1 1", "output": "2"}, Example("Add\n1 1", "2")),
    ({"instruction": "Add", "input": "", "output": "2"}, Example("Add", "2")),
    ({"instruction": "Add", "input": None, "output": "2"}, Example("Add", "2")),
    ({"instruction": "Add", "output": "2"}, Example("Add", "2")),
    ({"prompt": "a", "completion": "b", "id": 3}, Example("a", "b")),
    ({"text": "once upon"}, Example("", "once upon")),
    ({"messages": [{"role": r, "content": c} for r, c in TURNS]}, chat(TURNS)),
    (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "1+1?"},
                {"from": "gpt", "value": "2"},
            ]
        },
        chat(TURNS),
    ),
]


@pytest.mark.parametrize(("record", "example"), SHAPES)
def test_shapes(record, example):
    parsed = parse(record, "f:1")
    assert parsed == example
    assert parsed.where == "f:1"


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
PLAIN = {"prompt": "a", "completion": "b"}
SAID = (("user", "a"), ("assistant", "b"))
EARLIER = (("user", "u1"), ("assistant", "a1"))
PARTS = [{"type": "text", "text": "a "}, {"type": "image", "image": None, "text": None}, "b"]
# keys that change what is learnt, and are read: (record, what it says)
HONOURED = [
    (PLAIN | {"system": "S"}, chat((("system", "S"), *SAID))),
    (PLAIN | {"system_prompt": "S", "system": "S"}, chat((("system", "S"), *SAID))),
    ({"input": "a", "output": "b", "system": "S"}, chat((("system", "S"), *SAID))),
    (PLAIN | {"history": [["u1", "a1"]]}, chat((*EARLIER, *SAID))),
    (
        {"instruction": "a", "input": "x", "output": "b", "system": "S", "history": [["u1", "a1"]]},
        chat((("system", "S"), *EARLIER, ("user", "a\nx"), ("assistant", "b"))),
    ),
    # as others of its file, whose keys hold something, it is a conversation
    (PLAIN | {"system": "", "history": []}, chat(SAID)),
    (PLAIN | {"history": ""}, chat(SAID)),
    (PLAIN | {"system": None, "history": None, "label": None, "weight": None, "images": None}, Example("a", "b")),
    *((PLAIN | {"weight": whole, "mask": "0"}, Example("a", "b")) for whole in ("1", "1.0", "true", "True ")),
    (PLAIN | {"images": [], "tools": "[]", "context": " ", "rejected": "", "weight": 1}, Example("a", "b")),
    ({"messages": None, "prompt": None, "completion": None, "text": "t"}, Example("", "t")),
    ({"instruction": None, "input": "a", "output": "b"}, Example("a", "b")),
    ({"instruction": "a", "input": " \n", "output": "b"}, Example("a", "b")),
    ({"messages": [{"role": "developer", "content": "S"}, USER, ANSWER]}, chat((("developer", "S"), *SAID))),
    ({"messages": [USER, ANSWER], "system": "S"}, chat((("system", "S"), *SAID))),
    (
        {"messages": [{"role": "system", "content": "S"}, USER, ANSWER], "system": "S"},
        chat((("system", "S"), *SAID)),
    ),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "S"},
        chat((("system", "S"), *SAID)),
    ),
    (
        {"messages": [{"role": "user", "content": [PARTS[0], PARTS[2]]}, ANSWER]},
        chat((("user", "a b"), SAID[1])),
    ),
    (
        {"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1}]},
        chat(SAID * 2, context=frozenset([1])),
    ),
    (
        {"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1.0}], "system": "S"},
        chat((("system", "S"), *SAID * 2), context=frozenset([2])),
    ),
    *(
        ({"messages": [USER, ANSWER | off, USER, ANSWER | on]}, chat(SAID * 2, context=frozenset([1])))
        for off, on in (
            ({"train": False}, {"train": True}),
            ({"loss": False}, {"loss": True}),
            ({"training": 0}, {"training": None}),
            ({"mask": True}, {"mask": False}),
            ({"masked": 1}, {}),
            ({"weight": 1, "mask": True}, {"weight": 1, "mask": False}),
        )
    ),
    (
        {"conversations": [{"from": "human", "value": "a", "weight": 1}, {"from": "gpt", "value": "b", "weight": 1}]},
        chat(SAID),
    ),
]


@pytest.mark.parametrize(("record", "example"), HONOURED)
def test_keys_that_change_what_is_learnt(record, example):
    assert parse(record, "f:1") == example


# (record, what was recognised, what was ignored)
SEEN = [
    (PLAIN | {"id": 3, "source": "x", "url": None, "tags": []}, "prompt/completion (prompt, completion)", "id, source"),
    ({"instruction": "a", "input": "", "output": "b"}, "instruction (instruction, output, input)", ""),
    (PLAIN | {"history": []}, "prompt/completion (prompt, completion, history)", ""),
    (
        {"messages": [USER | {"name": "Al"}, ANSWER | {"weight": 1}], "n": 1},
        "messages (messages, messages[].weight)",
        "messages[].name, n",
    ),
    (
        {"messages": [USER | {"content": [{"type": "text", "text": "a", "cache_control": {"x": 1}}]}, ANSWER]},
        "messages (messages)",
        "messages[].content[].cache_control",
    ),
    # a verdict that the answer is good, and a share, which says neither
    (PLAIN | {"is_correct": True, "reward": 0.3}, "prompt/completion (prompt, completion)", "is_correct, reward"),
    # a text that only repeats what the record says
    ({"messages": [USER, ANSWER], "prompt": " a"}, "messages (messages)", "prompt"),
    ({"instruction": "a", "output": "b", "text": "### a\n### b"}, "instruction (instruction, output)", "text"),
    ({"text": "Q: a\nA: b", "question": "a", "answer": "b"}, "text (text)", "answer, question"),
    ({"text": "t", "label": 0}, "text (text)", "label"),
]


@pytest.mark.parametrize(("record", "shape", "ignored"), SEEN)
def test_what_was_recognised_and_what_was_ignored(record, shape, ignored):
    seen = parse_and_see(record, "f:1")[1]
    assert (seen.shape, ", ".join(seen.ignored)) == (shape, ignored)


CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
# the same, which can't be read
LOST = [
    (PLAIN | {"label": False}, "label: marks answers as good or bad, and ftray has no KTO yet: keep the good ones"),
    (PLAIN | {"label": True}, "label: marks answers as good or bad, and ftray has no KTO yet"),
    ({"instruction": "a", "output": "b", "kto_tag": True}, "kto_tag: .*no KTO yet"),
    ({"messages": [USER, ANSWER], "label": False}, "label: .*no KTO yet"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen: one of a preference pair, and ftray has no preference"),
    ({"chosen": "a b", "rejected": "a c"}, "chosen: one of a preference pair"),
    ({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, "chosen: one of a preference pair"),
    ({"messages": [USER, ANSWER], "rejected": "c"}, "rejected: one of a preference pair"),
    ({"messages": [USER, ANSWER], "rejected_response": "c"}, "rejected_response: one of a preference pair"),
    ({"text": "t", "rejected": "c"}, "rejected: one of a preference pair"),
    (PLAIN | {"is_correct": False}, "is_correct is False, and what is learnt are good answers: leave the record out"),
    (PLAIN | {"accepted": "perhaps", "correct": "False"}, "correct is False, and what is learnt are good answers"),
    (PLAIN | {"reward": "-1.0"}, "reward is -1, and what is learnt are good answers"),
    ({"question": "q", "answer": "a", "passed": 0}, "passed is 0, and what is learnt are good answers"),
    ({"messages": [USER, ANSWER], "accepted": False}, "accepted is False, and what is learnt are good answers"),
    ({"messages": [USER, ANSWER | {"is_correct": False}]}, r"messages\[1\]\.is_correct is False, and what is learnt"),
    (PLAIN | {"images": ["a.png"]}, "images: ftray reads text alone"),
    (PLAIN | {"image": {"bytes": "x"}}, "image: ftray reads text alone"),
    ({"messages": [USER, ANSWER], "videos": ["v"]}, "videos: ftray reads text alone"),
    ({"messages": [USER | {"audio": "a.wav"}, ANSWER]}, r"messages\[0\]\.audio: ftray reads text alone"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER]},
        r"messages\[0\]\.content\[0\] is no text but 'image_url': ftray reads text alone",
    ),
    ({"messages": [{"role": "user", "content": PARTS}, ANSWER]}, r"messages\[0\]\.content\[1\] is no text but 'image'"),
    ({"messages": [{"role": "user", "content": []}, ANSWER]}, r"messages\[0\] must have role and content, both text"),
    ({"messages": [USER, ANSWER], "tools": [{"type": "function"}]}, r"tools\[0\] must be an object with a name"),
    ({"messages": [USER, ANSWER], "tools": "{}x"}, "tools must be a list of tools, also as JSON, not str"),
    (
        {"messages": [USER, ANSWER | {"tool_calls": [{"function": "f"}]}]},
        r"messages\[1\]\.tool_calls\[0\] must be an object with a function of name and arguments",
    ),
    (PLAIN | {"tool_calls": [CALL]}, "tool_calls: a call is part of a turn"),
    ({"messages": [USER, {"role": "function", "content": None}, ANSWER]}, r"messages\[1\] must have role and content"),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "observation", "value": "42"}]},
        "conversations has no assistant turn",
    ),
    (
        {"messages": [USER, ANSWER | {"weight": 0.5}]},
        r"messages\[1\]\.weight is 0.5: a turn or record is learnt or not",
    ),
    ({"messages": [USER, ANSWER | {"weight": "0"}]}, r"messages\[1\]\.weight is '0': a turn"),
    ({"messages": [USER, ANSWER | {"mask": [0, 1]}]}, r"messages\[1\]\.mask is \[0, 1\]: a turn"),
    ({"messages": [USER, ANSWER | {"weight": float("nan")}]}, r"messages\[1\]\.weight is nan: a turn"),
    ({"messages": [USER, ANSWER | {"weight": 0}]}, "messages has no assistant turn to be learnt: nothing to learn"),
    ({"messages": [USER | {"train": True}, ANSWER]}, r"messages\[0\]\.train: a turn of user can't be learnt alone"),
    (PLAIN | {"weight": 0.5}, "weight is 0.5: a turn or record is learnt or not"),
    (PLAIN | {"weight": "0.5"}, "weight is 0.5: a turn or record is learnt or not"),
    (PLAIN | {"weight": "often"}, "weight is 'often': a turn or record is learnt or not"),
    *((PLAIN | {"weight": none}, "marked as one that isn't learnt") for none in ("0", "0.0", " FALSE")),
    (PLAIN | {"mask": "1"}, "marked as one that isn't learnt: leave the record out"),
    (PLAIN | {"weight": 0}, "marked as one that isn't learnt: leave the record out"),
    (PLAIN | {"mask": True}, "marked as one that isn't learnt: leave the record out"),
    (PLAIN | {"system": ["S"]}, "system must be text, not list"),
    (PLAIN | {"system": "S", "system_prompt": "T"}, "system and system_prompt differ: leave one of them out"),
    (
        {"messages": [{"role": "system", "content": "S"}, USER, ANSWER], "system": "T"},
        "has a system text, and messages",
    ),
    (PLAIN | {"history": [["u1"]]}, r"history\[0\] must be a pair of texts"),
    (PLAIN | {"history": [["u1", None]]}, r"history\[0\] must be a pair of texts"),
    (PLAIN | {"history": [USER]}, r"history\[0\] must be a pair of texts"),
    (PLAIN | {"history": "u1"}, r"history\[0\] must be a pair of texts"),
    (
        {"messages": [USER, ANSWER], "history": [["u1", "a1"]]},
        "history would be lost: a record with messages is read by",
    ),
    (
        PLAIN | {"context": "c"},
        "context would be lost: a record with prompt/completion is read by prompt, completion, system, system_prompt, "
        "history, tools, functions alone: put it into one of them, leave it out, or say by --data.fields",
    ),
    ({"instruction": "sum up", "text": "long", "output": "b"}, "text would be lost: a record with instruction/output"),
    (PLAIN | {"suffix": "c"}, "suffix would be lost"),
    ({"text": "t", "system": "S"}, "system would be lost: a record with text is read by text alone"),
    (
        {"text": "t", "instruction": "a", "response": "b"},
        "instruction would be lost: a record with text is read by text",
    ),
    ({"text": "long", "highlights": "short"}, "highlights would be lost: a record with text is read by text alone"),
    ({"instruction": "a", "output": None, "text": "a"}, "output must be text, not NoneType"),
]


@pytest.mark.parametrize(("record", "message"), LOST)
def test_keys_that_would_be_lost_are_refused(record, message):
    with pytest.raises(UserError, match=f"^f.jsonl:7: {message}") as told:
        parse(record, "f.jsonl:7")
    assert "\n" not in str(told.value)


LABELLED, TAGGED = {"text": "a", "label": 1}, {"tokens": ["a"], "tags": ["O"]}
ASKED = {"question": "q", "context": "a b", "answers": ["b"]}
PAIR, SCORED = {"anchor": "a", "positive": "b"}, {"sentence1": "a", "sentence2": "b", "score": 0.5}
# the same for other tasks
OTHERS = [
    ("SEQ_CLS", LABELLED | {"sentence2": "b"}, "sentence2 would be lost: .* is read by text, label, text_pair alone"),
    ("SEQ_CLS", LABELLED | {"hypothesis": "b"}, "hypothesis would be lost"),
    ("SEQ_CLS", LABELLED | {"messages": [USER, ANSWER]}, "messages would be lost"),
    ("SEQ_CLS", LABELLED | {"labels": [1, 2]}, "labels: ftray learns one label a text"),
    ("SEQ_CLS", LABELLED | {"image": "a.png"}, "image: ftray reads text alone"),
    ("SEQ_CLS", LABELLED | {"weight": 2}, "weight is 2: a turn or record is learnt or not"),
    ("TOKEN_CLS", TAGGED | {"bboxes": [[0, 0, 1, 1]]}, "bboxes: ftray reads text alone, not where it stands"),
    ("TOKEN_CLS", TAGGED | {"mask": [1]}, r"mask is \[1\]: a turn or record"),
    ("QUESTION_ANS", ASKED | {"is_impossible": True}, "is_impossible is True, but there are 1 answers"),
    (
        "QUESTION_ANS",
        ASKED | {"answers": [], "is_impossible": False},
        "is_impossible is False, but there are 0 answers",
    ),
    ("QUESTION_ANS", ASKED | {"answers": "b", "answer_start": 2}, "answer_start: give it in answers"),
    ("QUESTION_ANS", ASKED | {"choices": ["a", "b"]}, "choices: ftray learns answers that stand in the context"),
    ("QUESTION_ANS", ASKED | {"history": [["q", "a"]]}, "history: ftray reads one question a record"),
    ("FEATURE_EXTRACTION", PAIR | {"negatives": ["c"]}, "negatives: ftray reads one negative a record"),
    ("FEATURE_EXTRACTION", PAIR | {"negative_1": "c"}, "negative_1: ftray reads one negative a record"),
    ("FEATURE_EXTRACTION", PAIR | {"label": 0}, "label: ftray learns these pairs as all alike"),
    ("FEATURE_EXTRACTION", SCORED | {"instruction": "c"}, "instruction would be lost"),
    ("SEQ_2_SEQ_LM", PLAIN | {"system": "S"}, "SEQ_2_SEQ_LM learns one text .*, without system or history"),
    ("SEQ_2_SEQ_LM", PLAIN | {"label": False}, "label: .*no KTO yet"),
]


@pytest.mark.parametrize(("task", "record", "message"), OTHERS)
def test_keys_that_another_task_would_lose(task, record, message):
    with pytest.raises(UserError, match=f"^f.jsonl:7: {message}"):
        TaskSpec(task).load().parse(record, "f.jsonl:7")


ELSEWHERE = [
    ("SEQ_CLS", LABELLED | {"text_pair": "b", "idx": 3}, "labelled text (text, label, text_pair)", "idx"),
    ("SEQ_CLS", LABELLED | {"text_pair": None, "sentence2": ""}, "labelled text (text, label)", ""),
    ("TOKEN_CLS", TAGGED | {"pos_tags": ["X"]}, "tagged words (tokens, tags)", "pos_tags"),
    (
        "QUESTION_ANS",
        ASKED | {"is_impossible": False, "title": "t"},
        "question (question, context, answers, is_impossible)",
        "title",
    ),
    ("FEATURE_EXTRACTION", PAIR | {"negative": "c", "negatives": []}, "pair (anchor, positive, negative)", ""),
    ("FEATURE_EXTRACTION", SCORED | {"split": "dev"}, "scored pair (sentence1, sentence2, score)", "split"),
    ("SEQ_2_SEQ_LM", PLAIN | {"system": "", "history": []}, "prompt/completion (prompt, completion)", ""),
]


@pytest.mark.parametrize(("task", "record", "shape", "ignored"), ELSEWHERE)
def test_what_other_tasks_recognise(task, record, shape, ignored):
    seen = TaskSpec(task).load().parse_and_see(record, "f:1")[1]
    assert (seen.shape, ", ".join(seen.ignored)) == (shape, ignored)


REFUSED = [
    ({"foo": 1, "bar": 2}, "record with keys foo, bar; known shapes: input/output, .*messages.*text"),
    ({}, r"record with keys \(none\)"),
    ({"input": "a"}, "record with keys input; known"),
    ({"input": "a", "output": [5]}, "output must be text, not list"),
    ({"input": "a", "output": float("nan")}, "output is nan, which is no text: give null where there is none"),
    ({"input": None, "output": "a"}, "input must be text, not NoneType"),
    ({"input": "a", "output": " "}, "output is empty"),
    ({"instruction": "", "output": "a"}, "instruction is empty"),
    ({"text": ["a"]}, "text must be text, not list"),
    ({"messages": []}, "messages must be a list of turns, at least one"),
    ({"messages": "a"}, "messages must be a list of turns"),
    ({"messages": [USER]}, "messages has no assistant turn: nothing to learn"),
    ({"messages": [USER, "b"]}, r"messages\[1\] must have role and content"),
    ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\] must have role and content"),
    ({"messages": [{"role": "robot", "content": "a"}]}, r"messages\[0\]\.role is 'robot'; known: human"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, r"messages\[0\]\.role is \['user'\]"),
    ({"conversations": [{"role": "user", "content": "a"}]}, "conversations has no assistant turn"),
    ({"messages": [{"role": "user", "content": "a", "value": "b"}]}, r"messages\[0\] must have role and content"),
]


@pytest.mark.parametrize(("record", "message"), REFUSED)
def test_refused(record, message):
    with pytest.raises(UserError, match=f"^f.jsonl:7: {message}"):
        parse(record, "f.jsonl:7")


# of records of no known shape, what they say once they are mapped as the message proposes
ODD = [
    (
        {
            "id": 1,
            "talk": [{"who": "Customer", "said": 'it\'s <b>"broken"\n'}, {"who": "Agent", "said": "try \\ again"}],
        },
        chat((("user", 'it\'s <b>"broken"\n'), ("assistant", "try \\ again"))),
    ),
    (
        {"talk": [{"name": "Al", "values": "a"}, {"name": "Bo", "values": "b"}, {"name": "Al", "values": "thanks"}]},
        chat((*SAID, ("user", "thanks"))),
    ),
    ({"data": {"thread": [{"speaker": "patient", "text": "a"}, {"speaker": "doctor", "text": "b"}]}}, chat(SAID)),
    (
        {
            "talk": [
                {"role of": "System", "t": "S"},
                {"role of": "Kunde", "t": "a"},
                {"role of": "Berater", "t": "b"},
            ]
        },
        chat((("system", "S"), *SAID)),
    ),
    ({"talk": [USER, ANSWER]}, chat(SAID)),
    ({"talk": json.dumps([USER, ANSWER])}, chat(SAID)),
    ({"options": [{"n": 1}, {"n": 2}], "riddle": "a", "gold": "b"}, Example("a", "b")),
]


@pytest.mark.parametrize(("record", "example"), ODD)
def test_the_mapping_that_is_proposed_for_an_odd_record_reads_it(record, example):
    with pytest.raises(UserError) as told:
        parse(record, "f.jsonl:7")
    assert "\n" not in str(told.value)
    proposed = str(told.value).split("as in ")[1]
    fields = cli.parse("preprocess", shlex.split(proposed)).data.fields
    assert parse(Fields(fields)(record, "f.jsonl:7"), "f.jsonl:7") == example


def test_numbers_that_a_csv_file_writes_as_text_are_read():
    scored = {"sentence1": "a", "sentence2": "b", "score": "0.5"}
    assert TaskSpec("FEATURE_EXTRACTION").load().parse(scored, "f:1").score == 0.5
    asked = {"question": "q", "context": "a b b", "answer": "b", "answer_start": "4", "is_impossible": "False"}
    assert TaskSpec("QUESTION_ANS").load().parse(asked, "f:1").answers == [("b", 4)]
