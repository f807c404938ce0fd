import json
import shlex

import pytest
from helpers.record_files import assistant, user

from ftray import cli
from ftray.data.fields import Fields
from ftray.data.record_task import record_task
from ftray.data.records import Example, parse, parse_and_see
from ftray.data.turns import Turn
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
    ({"text": "Question: a Answer: b", "question": "a", "answer": "b"}, "text (text)", "answer, question"),
    ({"text": "### Human: a\n### Assistant: b</s>", "response": "b"}, "text (text)", "response"),
    (
        {"problem": "q", "solution": r"So it is \boxed{4}.", "answer": 4},
        "problem/solution (problem, solution)",
        "answer",
    ),
    (
        {"question": "Which?\nA) x\nB) y", "choices": ["x", "y"], "answer": "A"},
        "question/answer (question, answer)",
        "choices",
    ),
    ({"text": "t", "label": 0}, "text (text)", "label"),
]


@pytest.mark.parametrize(("record", "shape", "ignored"), SEEN)
def test_what_was_recognised_and_what_was_ignored(record, shape, ignored):
    seen = parse_and_see(record, "f:1")[1]
    assert (seen.shape, ", ".join(seen.ignored)) == (shape, ignored)


CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
# the same, which can't be read
LOST = [
    (PLAIN | {"label": False}, "label: marks answers as good or bad, which --task KTO learns from: or keep the good"),
    (PLAIN | {"label": True}, "label: marks answers as good or bad, which --task KTO learns from"),
    ({"instruction": "a", "output": "b", "kto_tag": True}, "kto_tag: .*which --task KTO learns"),
    ({"messages": [USER, ANSWER], "label": False}, "label: .*which --task KTO learns"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen: one of a preference pair, which --task DPO learns"),
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
    ({"messages": [USER, ANSWER | {"weight": "half"}]}, r"messages\[1\]\.weight is 'half': a turn"),
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
        "history, tools, functions alone: say what is to be read, as by --data.fields 'instruction: prompt, "
        "input: context, output: completion' to read it too, or --data.fields",
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
    # short texts that stand in others by chance
    ({"text": "There is no doubt about it.", "answer": "no"}, "answer would be lost"),
    ({"text": "Say yes or no", "answer": "no"}, "answer would be lost"),
    ({"text": "Pick one:\nA\nB", "question": "Pick one:", "answer": "B"}, "question would be lost"),
    ({"prompt": "Pick one:\nA\nB", "completion": "A", "answer": "B"}, "answer would be lost"),
    ({"problem": "q", "solution": "So it is 24.", "answer": "4"}, "answer would be lost"),
    ({"instruction": "a", "output": "no", "text": "a bit of doubt, and no end"}, "text would be lost"),
    (
        {"messages": [USER, {"role": "assistant", "content": "There is no doubt"}], "answer": "no"},
        "answer would be lost",
    ),
    ({"messages": [USER, ANSWER | {"lossMask": 1}]}, r"messages\[1\]\.lossMask: ftray learns whole turns and records"),
    (PLAIN | {"trainMask": 1}, "trainMask: ftray learns whole turns and records"),
]


@pytest.mark.parametrize(("record", "message"), LOST)
def test_keys_that_would_be_lost_are_refused(record, message):
    with pytest.raises(UserError, match=f"^f.jsonl:7: {message}") as told:
        parse(record, "f.jsonl:7")
    assert "\n" not in str(told.value)


def spelt(key: str) -> list[str]:
    """A key in snake, camel and kebab case."""
    first, *rest = key.split("_")
    return [key, first + "".join(word.capitalize() for word in rest), key.replace("_", "-")]


# a key beside an answer, what it holds -> why it is refused; of each kind, some of the names that it has in use
KINDS = [
    ("rejected_output", "x", "one of a preference pair"),
    ("non_preferred_output", [ANSWER], "one of a preference pair"),
    ("worse_response", "x", "one of a preference pair"),
    ("winner", "model_a", "one of a preference pair"),
    ("negative", "x", "a bad answer"),
    ("incorrect_answers", ["x", "y"], "a bad answer"),
    ("corrected_answer", "x", "a better answer than the one that would be learnt"),
    ("thumbs_up", False, "thumbs.?[uU]p is False, and what is learnt are good answers"),
    ("thumbs_down", 1, "thumbs.?[dD]own is 1, and what is learnt are good answers"),
    ("preferred", "false", "preferred is False, and what is learnt"),
    ("accepted", "no", "accepted is 'no', and what is learnt"),
    ("user_feedback", "thumbs_down", "user.?[fF]eedback is 'thumbs_down', and what is learnt"),
    ("rating", "bad", "rating is 'bad', and what is learnt"),
    ("image_path", "a.png", "ftray reads text alone"),
    ("audio_url", "a.wav", "ftray reads text alone"),
    ("system_message", "S", "would be lost: it is read by the name of system: .* system: system.?[mM]essage'"),
    ("chat_history", [["u", "v"]], "would be lost: it is read by the name of history: .* history: chat.?[hH]istory'"),
    ("context_messages", [USER, {"role": "user", "content": "c"}], "would be lost: give what was said before and what"),
    ("available_tools", [{"name": "f"}], "would be lost: it is read by the name of tools: .*tools: available"),
    ("rationale", "since", "would be lost: a record with prompt/completion"),
    ("step_by_step_reasoning", "since", "would be lost: a record with prompt/completion"),
    ("chain_of_thought", "since", "would be lost: a record with prompt/completion"),
    ("compute_loss", False, "marked as one that isn't learnt"),
]


@pytest.mark.parametrize(("key", "value", "why"), KINDS)
def test_a_key_is_known_by_its_words_however_it_is_spelt(key, value, why):
    for name in spelt(key):
        with pytest.raises(UserError, match=f"^f.jsonl:7: .*{why}") as told:
            parse(PLAIN | {name: value}, "f.jsonl:7")
        assert "\n" not in str(told.value)
        assert name in str(told.value) or "marked" in why


def test_a_key_that_is_read_by_another_name_is_read_as_the_message_says():
    for key, value, more in (
        ("systemPrompt", "S", {"system": "S"}),
        ("chat_history", [["u", "v"]], {"history": [["u", "v"]]}),
        ("tool_definitions", [{"name": "f"}], {"tools": [{"name": "f"}]}),
    ):
        with pytest.raises(UserError) as told:
            parse(PLAIN | {key: value}, "f:1")
        fields = cli.parse("preprocess", shlex.split(str(told.value).split("as by ")[1])).data.fields
        assert parse(Fields(fields)(PLAIN | {key: value}, "f:1"), "f:1") == parse(PLAIN | more, "f:1")
    google = {"parts": [{"text": "S"}]}
    assert parse(PLAIN | {"system": google}, "f:1") == parse(PLAIN | {"system": "S"}, "f:1")


HARMLESS = {
    "feedback": "Short, and a little dry.",
    "rating": 1,
    "thumbs_up": True,
    "image_count": 2,
    "has_image": False,
    "finish_reason": "stop",
    "tool_name": "x",
    "tools_used": ["x"],
    "reasoning_tokens": 9,
    "rejected_count": 3,
    "system_id": 4,
}


@pytest.mark.parametrize("key", HARMLESS)
def test_what_only_looks_like_it_is_ignored_and_named(key):
    assert parse_and_see(PLAIN | {key: HARMLESS[key]}, "f:1")[1].ignored == (key,)


@pytest.mark.parametrize(
    ("key", "off"),
    [
        ("compute_loss", False),
        ("calculateLoss", 0),
        ("ignore", True),
        ("skip", 1),
        ("no_loss", True),
        ("mask_loss", 1),
        ("is_supervised", False),
        ("should-train", 0),
        ("learn", False),
        ("loss_weight", 0.0),
        ("requires_grad", False),
        ("no_grad", True),
        ("stopGradient", True),
        ("is_target", False),
        ("use_for_training", False),
        ("to_be_learned", False),
        ("do_not_train", True),
        ("exclude-from-training", True),
        ("contributes_to_loss", 0),
    ],
)
def test_marks_of_turns(key, off):
    marked = parse({"messages": [USER, ANSWER | {key: off}, USER, ANSWER | {key: not off}]}, "f:1")
    assert marked == chat(SAID * 2, context=frozenset([1]))
    as_text = [str(mark).lower() for mark in (off, not off)]  # as in a table
    marked = parse({"messages": [USER, ANSWER | {key: as_text[0]}, USER, ANSWER | {key: as_text[1]}]}, "f:1")
    assert marked == chat(SAID * 2, context=frozenset([1]))
    with pytest.raises(UserError, match=rf"messages\[1\]\.{key} is 'perhaps': a turn or record is learnt or not"):
        parse({"messages": [USER, ANSWER | {key: "perhaps"}]}, "f:1")


# of what is published as text to be learnt alone, and what stands beside it
CORPORA = [
    {"text": "t", "url": "u", "timestamp": "2020-01-01", "source": "s"},
    {"text": "t", "id": "1", "url": "u", "title": "t i"},
    {"text": "t", "meta": {"pile_set_name": "x"}},
    {"text": "t", "id": "x", "added": "d", "created": "d", "source": "s", "version": "v", "metadata": {"a": "b"}},
    {"text": "t", "id": "i", "dump": "d", "url": "u", "date": "d", "file_path": "p", "language": "en"}
    | {"language_score": 0.9, "token_count": 3, "score": 2.5, "int_score": 3},
    {"content": "c", "max_stars_repo_path": "p", "max_stars_repo_name": "r", "hexsha": "x", "lang": "py", "ext": "py"},
    {"content": "c", "blob_id": "b", "detected_licenses": ["MIT"], "license_type": "permissive", "repo_name": "r"},
    {"text": "t", "red_pajama_subset": "wiki", "subset": "s"},
    {"text": "t", "url": "u", "score": 57, "over_18": 0},
    {"text": "t", "id": "i", "likes": 1, "num_replies": 0, "deleted": False, "quality_score": 1},
]


@pytest.mark.parametrize("record", CORPORA)
def test_what_is_about_a_text_is_ignored_and_named(record):
    example, seen = parse_and_see(record, "f:1")
    assert example.target == record.get("text", record.get("content"))
    assert {*seen.ignored} == {*record} - {"text", "content"}


@pytest.mark.parametrize(
    ("more", "proposed"),
    [
        ({"code": "def f(): ...", "task_id": 1, "test_list": ["assert f()"]}, {"prompt": "text", "completion": "code"}),
        ({"label_text": "pos"}, {"text": "text", "label": "label_text"}),
        ({"category": "sport"}, {"text": "text", "label": "category"}),
        ({"stars": 5}, {"text": "text", "label": "stars"}),
        ({"score": 3}, {"text": "text", "label": "score"}),
        ({"toxicity_score": 0.7}, {"text": "text", "label": "{{ toxicity_score | float | round | int }}"}),
        ({"sarcastic": 1}, {"text": "text", "label": "sarcastic"}),
        ({"anger": 0, "joy": 1, "fear": 0, "subreddit": "s"}, {"text": "text", "label": "anger"}),
        ({"role": "user"}, None),
        ({"entities": [{"start": 0, "label": "PER"}]}, None),
    ],
)
def test_what_is_to_be_learnt_of_a_text_does_not_get_lost(more, proposed):
    record = {"text": "a sport"} | more
    with pytest.raises(UserError, match=f"^f:1: {next(iter(more))} would be lost: .*'text: text' to learn the") as told:
        parse(record, "f:1")
    if proposed:
        words = str(told.value).split("as by ")[1].split(" to learn it")[0]
        assert cli.parse("preprocess", shlex.split(words)).data.fields == proposed
    assert parse(Fields({"text": "text"})(record, "f:1"), "f:1") == Example("", "a sport")


def test_an_answer_beside_turns_is_not_left_out():
    for key, where in (("response", "messages"), ("summary", "dialogue"), ("completion", "conversations")):
        with pytest.raises(UserError, match=f"{key} would be lost: a record with {where}"):
            parse({where: [USER, ANSWER], key: "other"}, "f:1")
        assert parse({where: [USER, ANSWER], key: "b"}, "f:1") == chat(SAID)


# shapes of others whose meaning is unique
FOREIGN = [
    (
        {"contents": [{"role": "user", "parts": [{"text": "a"}]}, {"role": "model", "parts": [{"text": "b"}]}]},
        chat(SAID),
    ),
    ({"dialog": ["a", "b", "c", "d"], "act": [1, 1, 2, 2]}, chat((*SAID, ("user", "c"), ("assistant", "d")))),
    ({"question": "a", "answer": ["b"]}, Example("a", "b")),
    ({"question": "a", "answers": ["b", "b"]}, Example("a", "b")),
]


@pytest.mark.parametrize(("record", "example"), FOREIGN)
def test_shapes_of_others(record, example):
    assert parse(record, "f:1") == example


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "a", "answer": ["b", "c"]}, "answer holds 2 answers: say which one is to be learnt"),
        ({"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]}, "preferred_"),
        ({"prompt": "q", "response_a": "x", "response_b": "y", "winner": "a"}, "winner: one of a preference pair"),
        (
            {"prompt": "q", "response_1": "x", "response_2": "y"},
            ".*'prompt: prompt, completion: response_1', which leaves out response_2$",
        ),
        (
            {"contents": [{"role": "user", "parts": [{"inlineData": {"data": "x"}}]}]},
            r"contents\[0\]\.parts\[0\] is no text but 'inlineData'",
        ),
        *(
            ({"messages": [USER, ANSWER | {"tool_calls": [{"function": {"name": "f", "arguments": given}}]}]}, "mess")
            for given in ("not JSON", "{'a': 1}", "[1]", "5", '{"a": ')
        ),
    ],
)
def test_what_has_no_place_is_refused(record, message):
    with pytest.raises(UserError, match=f"^f:1: {message.replace('|', '[|]')}"):
        parse(record, "f:1")


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
    ("SEQ_CLS", LABELLED | {"label": 2.5}, "label is 2.5, and ftray learns classes, not numbers"),
    ("SEQ_CLS", LABELLED | {"image_path": "a.png"}, "image_path: ftray reads text alone"),
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
    ("SEQ_2_SEQ_LM", PLAIN | {"label": False}, "label: .*which --task KTO learns"),
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


def test_turns_that_a_csv_file_writes_as_python_does_are_read():
    turns, calls = [user("it's"), assistant("r")], [assistant(None, tool_calls=[{"name": "f", "arguments": {}}])]
    assert parse({"messages": str(turns)}, "f").messages == (Turn("user", "it's"), Turn("assistant", "r"))
    assert parse({"messages": str([user("q"), *calls]), "tools": str([{"name": "f"}])}, "f").tools
    both = {"prompt": str(turns[:1]), "completion": str(turns[1])}
    assert parse(both, "f").messages == (Turn("user", "it's"), Turn("assistant", "r"))
    for answer in ('{"from": "EUR", "value": 3}', '[{"role": "x", "content": 3}]'):  # which is no turn
        assert parse({"prompt": "q", "completion": answer}, "f").target == answer
        assert parse({"prompt": [user("q")], "completion": answer}, "f").messages[-1].text == answer


@pytest.mark.parametrize(
    "answer",
    [
        '{"model": "m", "messages": [{"role": "user", "content": "q"}]}',
        '[{"id": 1, "role": "user", "content": "q"}]',
        '["Rome"]',
        '["Rome", "Paris"]',
        "[" * 10_000,
        "{'a': '\\d'",
    ],
)
def test_json_that_is_an_answer_is_learnt_as_it_stands(answer):
    assert parse({"instruction": "q", "input": "", "output": answer}, "f") == Example("q", answer)
    if "id" not in answer:  # a turn, with which an answer of a pair may begin
        pair = record_task(TaskSpec.named("DPO")).parse({"prompt": "q", "chosen": answer, "rejected": "x"}, "f")
        assert pair.chosen.target == answer


@pytest.mark.parametrize("ask", ["prompt", "question", "query", "problem"])
def test_an_empty_column_beside_a_question_says_nothing(ask):
    assert parse({ask: "q", "input": "", "answer": "r"}, "f") == Example("q", "r")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"prompt": "q", "completion": str([assistant("r")])},
            "completion holds turns that are written as a text: give",
        ),
        (
            {"prompt": [user("q")], "completion": f"[{assistant('r')} {user('s')}]"},
            "completion holds turns that are wri",
        ),
        ({"question": "q", "answers": "['a', 'b']"}, "answers is a list that is written otherwise than as JSON"),
        ({"question": "q", "answers": "['a' 'b']"}, "answers is a list that is written otherwise than as JSON"),
    ],
)
def test_lists_that_are_written_otherwise_are_not_learnt_as_texts(record, message):
    with pytest.raises(UserError, match=f"^f: {message}"):
        parse(record, "f")


def test_numbers_that_a_csv_file_writes_as_text_are_read():
    scored = {"sentence1": "a", "sentence2": "b", "score": "0.5"}
    assert TaskSpec("FEATURE_EXTRACTION").load().parse(scored, "f:1").score == 0.5
    asked = {"question": "q", "context": "a b b", "answer": "b", "answer_start": "4", "is_impossible": "False"}
    assert TaskSpec("QUESTION_ANS").load().parse(asked, "f:1").answers == [("b", 4)]
