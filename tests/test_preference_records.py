"""Records of preferences, in the shapes in which they are published: what each compares, and what is refused.

What is right is written down here from what each data set means; tokens are computed in the way of TRL, from the whole
rendering of a prompt and its answer.
"""

import copy
import json
import shlex

import pytest
import yaml
from helpers.record_files import assistant, user
from tokenizers.processors import TemplateProcessing

from ftray.config import Config, DataConfig
from ftray.data.check import refuse_mixture
from ftray.data.fields import Fields
from ftray.data.record_task import record_task
from ftray.data.records import Example
from ftray.data.turns import Turn
from ftray.errors import UserError
from ftray.task_spec import IGNORE, OBJECTIVES, TaskSpec
from ftray.tasks.infer_task import infer_task

DPO, KTO, GRPO = (record_task(TaskSpec.named(name)) for name in ("DPO", "KTO", "GRPO"))
SFT = record_task(TaskSpec.named("CAUSAL_LM"))
GPT = [{"from": "human", "value": "q"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def pair(record):
    """The prompt and both answers, of conversations as (role, text)."""
    example = DPO.parse(record, "f:1")
    sides = []
    for side in (example.chosen, example.rejected):
        if side.messages is None:
            sides.append((side.prompt, side.target))
            continue
        said = [(turn.role, turn.text) for turn in side.messages]
        sides.append((said[: side.learnt[0]], said[side.learnt[0] :]))
        assert side.learnt == [i for i in range(side.learnt[0], len(said)) if said[i][0] == "assistant"]
    assert sides[0][0] == sides[1][0]
    return sides[0][0], sides[0][1], sides[1][1]


ASKED, GOOD, BAD = [("user", "q")], [("assistant", "r")], [("assistant", "x")]
HH = "\n\nHuman: q\n\nAssistant: {}"
BOTH = {"chosen": [user("q"), assistant("r")], "rejected": [user("q"), assistant("x")]}
PAIRS = {
    "TRL": ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, ("The sky is", " blue.", " green.")),
    "TRL, conversational": (
        {"prompt": [user("q")], "chosen": [assistant("r")], "rejected": [assistant("x")]},
        (ASKED, GOOD, BAD),
    ),
    "TRL, implicit prompt": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        ("The sky is", " blue.", " green."),
    ),
    "TRL, implicit prompt, conversational": (BOTH, (ASKED, GOOD, BAD)),
    "words that begin alike": (
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        ("The sky is", " blue.", " black."),
    ),
    "one text goes on": ({"chosen": "The sky is", "rejected": "The sky is blue"}, ("The sky", " is", " is blue")),
    "a line of its own": ({"chosen": "Q: x\nA", "rejected": "Q: x\nB"}, ("Q: x\n", "A", "B")),
    "no blanks": ({"chosen": "天空是蓝色", "rejected": "天空是绿色"}, ("天空是", "蓝色", "绿色")),
    "UltraFeedback": (
        {
            "prompt": "q",
            "prompt_id": "1",
            **BOTH,
            "messages": BOTH["chosen"],
            "score_chosen": 8.0,
            "score_rejected": 8.0,
        },
        (ASKED, GOOD, BAD),
    ),
    "UltraFeedback, cleaned": (
        {"source": "s", "prompt": "q", **BOTH, "chosen-model": "m", "rejected-model": "n", "chosen-rating": 5},
        (ASKED, GOOD, BAD),
    ),
    "HH": ({"chosen": HH.format("r"), "rejected": HH.format("x")}, (ASKED, GOOD, BAD)),
    "HH, a later answer": (
        {"chosen": HH.format("o") + HH.format("r"), "rejected": HH.format("o") + HH.format("x")},
        ([*ASKED, ("assistant", "o"), *ASKED], GOOD, BAD),
    ),
    "HH, from the first answer on": (
        {"chosen": HH.format("r") + HH.format("s"), "rejected": HH.format("x") + HH.format("y")},
        (ASKED, [*GOOD, *ASKED, ("assistant", "s")], [*BAD, *ASKED, ("assistant", "y")]),
    ),
    "orca": (
        {"system": "S", "question": "q", "chosen": "r", "rejected": "x"},
        ([("system", "S"), *ASKED], GOOD, BAD),
    ),
    "orca, without a system text": (
        {"system": "", "question": "q", "chosen": "r", "rejected": "x"},
        (ASKED, GOOD, BAD),
    ),
    "orca, by argilla": (
        {
            "system": "S",
            "input": "q",
            "chosen": "r",
            "rejected": "x",
            "generations": ["r", "x"],
            "order": ["a", "b"],
            "labelling_model": "gpt-4",
            "labelling_prompt": [user("z")],
            "raw_labelling_response": "t",
            "rating": [9.0, 2.0],
            "rationale": "since",
            "status": "unchanged",
            "original_chosen": "r",
            "original_rejected": "x",
            "chosen_score": 9.0,
            "in_gsm8k_train": False,
        },
        ([("system", "S"), *ASKED], GOOD, BAD),
    ),
    "capybara": (
        {
            "conversation": [{"input": "q", "output": "r"}],
            "original_response": "r",
            "prompt": "q",
            **BOTH,
            "rating_chosen": 5,
        },
        (ASKED, GOOD, BAD),
    ),
    "a prefilled answer": (
        {"prompt": "User: q\n\nAssistant: So", "chosen": " r", "rejected": " x"},
        ("User: q\n\nAssistant: So", " r", " x"),
    ),
    "a count of turns, as CSV writes it": (
        {"prompt": "q", "chosen": "r", "rejected": "x", "turns": "2"},
        ("q", "r", "x"),
    ),
    "choices": (
        {"prompt": "q", "chosen": "so r", "rejected": "so x", "choice_a": "r", "choice_b": "x"},
        ("q", "so r", "so x"),
    ),
    "answers that were not swapped": (
        {"prompt": "q", "response_0": "r", "response_1": "x", "winner": 0, "swapped": False},
        ("q", "r", "x"),
    ),
    "answers that are lists of JSON": (
        {"prompt": "q", "chosen": '["r"]', "rejected": '["x", "y"]'},
        ("q", '["r"]', '["x", "y"]'),
    ),
    "LLaMA-Factory": ({"instruction": "q", "input": "i", "chosen": "r", "rejected": "x"}, ("q\ni", "r", "x")),
    "LLaMA-Factory, history": (
        {
            "instruction": "q",
            "input": "",
            "chosen": "r",
            "rejected": "x",
            "system": "S",
            "history": [["o", "p"]],
        },
        ([("system", "S"), ("user", "o"), ("assistant", "p"), *ASKED], GOOD, BAD),
    ),
    "LLaMA-Factory, ShareGPT": (
        {"conversations": GPT, "chosen": {"from": "gpt", "value": "r"}, "rejected": {"from": "gpt", "value": "x"}},
        (ASKED, GOOD, BAD),
    ),
    "axolotl": ({"messages": [user("q")], "chosen": assistant("r"), "rejected": assistant("x")}, (ASKED, GOOD, BAD)),
    "axolotl, argilla": ({"instruction": "q", "chosen_response": "r", "rejected_response": "x"}, ("q", "r", "x")),
    "ms-swift": ({"messages": BOTH["chosen"], "rejected_response": "x"}, (ASKED, GOOD, BAD)),
    "ms-swift, conversations": (
        {"messages": BOTH["chosen"], "rejected_messages": BOTH["rejected"]},
        (ASKED, GOOD, BAD),
    ),
    "OpenAI": (
        {
            "input": {"messages": [user("q")], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [assistant("r")],
            "non_preferred_output": [assistant("x")],
        },
        (ASKED, GOOD, BAD),
    ),
    "a prompt of turns, answers as texts": (
        {"prompt": [user("q")], "chosen": "r", "rejected": "x"},
        (ASKED, GOOD, BAD),
    ),
    "a prompt of text, answers as turns": (
        {"prompt": "q", "chosen": [assistant("r")], "rejected": [assistant("x")]},
        (ASKED, GOOD, BAD),
    ),
    "JSON in a table": (
        {
            "prompt": json.dumps([user("q")]),
            "chosen": json.dumps([assistant("r")]),
            "rejected": json.dumps([assistant("x")]),
        },
        (ASKED, GOOD, BAD),
    ),
    "short answers that sound like verdicts": ({"prompt": "q", "chosen": "No", "rejected": "Yes"}, ("q", "No", "Yes")),
    "numbers beside turns": (
        {"prompt": [user("q")], "chosen": 4, "rejected": 5},
        (ASKED, [("assistant", "4")], [("assistant", "5")]),
    ),
    "numbers beside a shorter list": ({"prompt": "q", "chosen": 4, "rejected": 5, "tags": ["a", "b"]}, ("q", "4", "5")),
    "y_w, y_l": ({"prompt": "q", "y_w": "r", "y_l": "x"}, ("q", "r", "x")),
    "win, lose": ({"question": "q", "win": "r", "lose": "x"}, ("q", "r", "x")),
    "other letters": ({"Prompt": "q", "Chosen": "r", "Rejected": "x", "Notes": "n"}, ("q", "r", "x")),
    "camels": (
        {"systemPrompt": "S", "prompt": "q", "chosenResponse": "r", "rejectedResponse": "x"},
        ([("system", "S"), *ASKED], GOOD, BAD),
    ),
    "PKU-SafeRLHF": (
        {
            "prompt": "q",
            "response_0": "x",
            "response_1": "r",
            "is_response_0_safe": True,
            "is_response_1_safe": False,
            "better_response_id": 1,
            "safer_response_id": 1,
        },
        ("q", "r", "x"),
    ),
    "PKU-SafeRLHF, in a table": (
        {"prompt": "q", "response_0": "r", "response_1": "x", "better_response_id": "0"},
        ("q", "r", "x"),
    ),
    "arena": (
        {
            "conversation_a": BOTH["rejected"],
            "conversation_b": BOTH["chosen"],
            "winner": "model_b",
            "model_a": "m",
            "model_b": "n",
        },
        (ASKED, GOOD, BAD),
    ),
    "the winner by its column": (
        {"question": "q", "answer1": "r", "answer2": "x", "preferred": "answer1"},
        ("q", "r", "x"),
    ),
    "the winner by its letter": (
        {"instruction": "q", "input": "i", "output_A": "x", "output_B": "r", "choice": "B"},
        ("q\ni", "r", "x"),
    ),
    "HH, the prompt apart": ({"prompt": HH.format(""), "chosen": " r", "rejected": " x"}, (ASKED, GOOD, BAD)),
    "HH, a later prompt apart": (
        {"prompt": HH.format("o") + HH.format("").rstrip(), "chosen": "r", "rejected": "x"},
        ([*ASKED, ("assistant", "o"), *ASKED], GOOD, BAD),
    ),
    "Python in a table": (
        {"prompt": str([user("q")]), "chosen": str([assistant("r")]), "rejected": str([assistant("x")])},
        (ASKED, GOOD, BAD),
    ),
    "Python in a table, turns alone": (
        {"prompt": "q", "chosen": str(assistant("r")), "rejected": json.dumps(assistant("x"))},
        (ASKED, GOOD, BAD),
    ),
    "answers that are JSON": (
        {"prompt": [user("q")], "chosen": '{"from": "1", "value": "2"}', "rejected": '[{"a": 1}]'},
        (ASKED, [("assistant", '{"from": "1", "value": "2"}')], [("assistant", '[{"a": 1}]')]),
    ),
    "turns that are counted": (BOTH | {"turns": 2}, (ASKED, GOOD, BAD)),
    "a verdict that says the same": (
        {"prompt": "q", "chosen": "r", "rejected": "x", "winner": "chosen", "flipped": False, "is_preferred": True},
        ("q", "r", "x"),
    ),
    "a call, and what is said of its result": (
        {
            "prompt": [user("q")],
            "chosen": [
                assistant(
                    None, tool_calls=[{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
                ),
                {"role": "tool", "tool_call_id": "c1", "content": "21"},
                assistant("r"),
            ],
            "rejected": [assistant("x")],
            "tools": [TOOL],
        },
        (ASKED, [("assistant", ""), ("tool", "21"), *GOOD], BAD),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_a_prompt_and_two_answers(name):
    record, expected = PAIRS[name]
    assert pair(record) == expected


def test_what_stands_beside_a_pair_is_named():
    seen = DPO.parse_and_see(PAIRS["UltraFeedback"][0], "f:1")[1]
    assert seen.shape == "prompt/chosen/rejected (prompt, chosen, rejected)"
    assert seen.ignored == ("messages", "prompt_id", "score_chosen", "score_rejected")
    example = DPO.parse(PAIRS["OpenAI"][0] | {"input": {"messages": [user("q")], "tools": [TOOL]}}, "f:1")
    assert example.chosen.tools == example.rejected.tools == (TOOL,)


PAIR = {"prompt": "q", "chosen": "r", "rejected": "x"}
REFUSED_PAIRS = [
    (PAIR | {"rejected": "r"}, "chosen and rejected are equal"),
    (BOTH | {"rejected": BOTH["chosen"]}, "chosen and rejected are equal"),
    ({"messages": BOTH["chosen"], "rejected_response": "r"}, "messages and rejected_response are equal"),
    ({"prompt": "q", "chosen": "r"}, "rejected is missing or empty: a preference pair needs chosen and rejected"),
    (PAIR | {"chosen": None}, "chosen is missing or empty"),
    (PAIR | {"rejected": " "}, "rejected is missing or empty"),
    ({"prompt": "q", "preferred_output": "r"}, "non_preferred_output is missing or empty"),
    (PAIR | {"winner": "tie (bothbad)"}, r"winner is 'tie \(bothbad\)': neither answer is better"),
    (PAIR | {"preference": "Tie"}, "preference is 'Tie': neither answer is better"),
    (BOTH | {"rejected": [user("z"), assistant("x")]}, "chosen and rejected differ in turn 0, before an answer"),
    ({"chosen": HH.format("r"), "rejected": HH.format("x").replace("q", "z")}, "differ in turn 0, before an answer"),
    ({"chosen": HH.format("r"), "rejected": HH.format("r") + HH.format("x")}, "chosen ends before the two differ"),
    ({"chosen": "blue", "rejected": "black"}, "chosen and rejected don't begin with the same words"),
    ({"chosen": "a b", "rejected": "a c", "system": "S"}, "system without a prompt"),
    (PAIR | {"chosen": [assistant("r")]}, "one of chosen and rejected is a text, the other holds turns"),
    (PAIR | {"chosen": BOTH["chosen"], "rejected": [assistant("x")]}, "one of chosen and rejected is a whole conver"),
    (BOTH | {"prompt": "z"}, "prompt is not what chosen and rejected begin with"),
    (BOTH | {"history": [["a", "b"]], "prompt": "q"}, "history: chosen and rejected are whole conversations"),
    ({"chosen": [assistant("r")], "rejected": [assistant("x")]}, "chosen begins with the assistant"),
    (
        {"prompt": [user("q")], "chosen": [assistant("r", weight=0)], "rejected": "x"},
        "one of chosen and rejected is a te",
    ),
    (BOTH | {"chosen": [user("q"), assistant("r", weight=0)]}, r"chosen\[1\] is marked as one that isn't learnt"),
    (BOTH | {"chosen": [user("q")]}, "chosen has no turn of the assistant"),
    (BOTH | {"messages": BOTH["chosen"], "chosen": assistant("z"), "rejected": assistant("x")}, "ends with an answer"),
    (PAIR | {"chosen": ["r", "s"]}, "chosen holds 2 answers"),
    (PAIR | {"response": "z"}, "response would be lost"),
    (PAIR | {"suffix": "z"}, "suffix would be lost"),
    (PAIR | {"system_message": "S"}, "system_message would be lost: it is read by the name of system"),
    (PAIR | {"rejected_response": "z"}, "rejected_response: a further answer"),
    (PAIR | {"label": 1}, "label: may say which answer is the better one"),
    (PAIR | {"images": ["a"]}, "images: ftray reads text alone"),
    (PAIR | {"chosen": {"a": 1}}, "chosen must be text, not dict"),
    ({"prompt": "q", "completion": "r"}, "record with keys prompt, completion; known shapes of preference pairs"),
    ({"prompt": "q", "completion": "r", "label": True}, "record with keys prompt, completion, label; known shapes"),
    ({}, r"record with keys \(none\); known shapes of preference pairs"),
    (
        {"prompt": "q", "response_a": "r", "response_b": "x", "chosen": "response_b", "rejected": "response_a"},
        "which only say where .*'prompt: prompt, chosen: response_b, rejected: response_a' where all",
    ),
    ({"prompt": "q", "answers_given": ["r", "x"], "chosen": 1, "rejected": 0}, "are 1 and 0, which only say where"),
    (
        {
            "prompt": "q",
            "answers_given": "['r', 'x']",
            "response_0": "r",
            "response_1": "x",
            "chosen": "1",
            "rejected": "0",
        },
        "are '1' and '0', .*--data.fields 'prompt: prompt, chosen: response_1, rejected: response_0' where all",
    ),
    ({"prompt": "q", "given": [{"a": "r"}, {"a": "x"}], "chosen": 1, "rejected": 0}, "are 1 and 0, which only say wh"),
    (
        PAIR | {"preference": 1},
        "preference is 1, which may say that rejected is the better answer: --data.fields 'prompt",
    ),
    (PAIR | {"winner": "model_b"}, "winner is 'model_b', which may say that rejected is the better answer"),
    (PAIR | {"better": "x"}, "better is 'x', which may say that rejected is the better answer"),
    (PAIR | {"flipped": "True"}, "flipped is 'True', which may say .* leaves flipped out, where chosen is, or --data"),
    (PAIR | {"overall_preference": -2}, "overall_preference is -2, which may say that rejected is"),
    (
        {"prompt": "q", "response0": "r", "response1": "x", "response0_better": 1},
        "response0_better is 1, which names neither",
    ),
    (
        {
            "prompt": "q",
            "response1": "r",
            "response2": "x",
            "overall_preference": 1,
        },  # of -3 to 3: the second is better
        "overall_preference is 1, which names neither",
    ),
    ({"Prompt": "q", "Chosen": "r", "Rejected": "x", "Choices": ["s", "t"]}, "choices would be lost"),
    (PAIR | {"prompt": " "}, "prompt is empty: leave the record out; where all records are whole texts that begin ali"),
    (PAIR | {"prompt": None}, "prompt is empty"),
    (
        {"prompt": "q", "response_0": "r", "response_1": "x", "better_response_id": 0, "safer_response_id": 1},
        "better_response_id is 0 and safer_response_id is 1: they differ in which answer is the better one",
    ),
    ({"prompt": "q", "response_a": "r", "response_b": "x", "winner": "tie"}, "winner is 'tie': neither answer is bett"),
    (
        {"prompt": "q", "response_a": "r", "response_b": "x", "preference": 1},
        "preference is 1, which names neither resp",
    ),
    (
        {"prompt": "q", "response_1": "r", "response_2": "x", "preference": 0},
        "preference is 0, which names neither resp",
    ),
    (
        {"prompt": "q", "response_1": "r", "response_2": "x", "winner": "llama-2", "system_message": "S"},
        "winner is 'llama-2', which names neither",
    ),
    ({"Prompt": "q", "Chosen": "r", "Rejected": "r"}, "chosen and rejected are equal"),
    ({"Prompt": "q", "Chosen": "r", "Rejected": "x", "winner": "b"}, "winner is 'b', which may say that rejected"),
    (
        {"prompt": "[{'role': 'user' 'content': 'q'}]", "chosen": "r", "rejected": "x"},
        "prompt holds turns that are written as a text",
    ),
    (
        {"prompt": "q", "chosen": "[{'role': 'assistant', 'content': 'r'}\n {}]", "rejected": "x"},
        "chosen holds turns that are written as a text: give what is asked as turns too, both as JSON has them",
    ),
]


@pytest.mark.parametrize(("record", "message"), REFUSED_PAIRS)
def test_what_is_no_pair_is_refused_in_one_line(record, message):
    with pytest.raises(UserError, match=f"^f:1: .*{message}") as told:
        DPO.parse(record, "f:1")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("flipped", [True, False, "true", "0", 1])
def test_the_line_that_heeds_a_flipped_pair_works(flipped):
    with pytest.raises(UserError) as told:
        DPO.parse(PAIR | {"flipped": True}, "f:1")
    fields = Fields(yaml.safe_load(f"{{{shlex.split(str(told.value).rpartition('--data.fields ')[2])[0]}}}"))
    is_flipped = str(flipped).lower() in ("true", "1")
    assert pair(fields(PAIR | {"flipped": flipped}, "f")) == (("q", "x", "r") if is_flipped else ("q", "r", "x"))


def test_the_line_that_says_which_of_two_verdicts_is_meant_works():
    record = {"prompt": "q", "response_0": "r", "response_1": "x", "better_response_id": 0, "safer_response_id": 1}
    with pytest.raises(UserError) as told:
        DPO.parse(record, "f:1")
    fields = Fields(yaml.safe_load(f"{{{shlex.split(str(told.value).rpartition('--data.fields ')[2])[0]}}}"))
    assert pair(fields(record, "f")) == ("q", "r", "x")
    assert pair(fields(record | {"better_response_id": 1}, "f")) == ("q", "x", "r")


def test_what_says_which_answer_is_better_is_read_and_named():
    seen = DPO.parse_and_see(PAIRS["PKU-SafeRLHF"][0], "f:1")[1]
    assert seen.shape == (
        "two answers and the better one (prompt, response_0, response_1, better_response_id, safer_response_id)"
    )
    assert seen.ignored == ("is_response_0_safe", "is_response_1_safe")
    assert DPO.parse_and_see(PAIRS["other letters"][0], "f:1")[1].ignored == ("Notes",)


@pytest.mark.parametrize(
    "name", [name for name, (record, _) in PAIRS.items() if not {"rationale", "images"} & {*record}]
)
def test_a_pair_is_told_to_be_one_and_is_no_answer_to_learn(name, tiny_llama):
    record = PAIRS[name][0]
    assert infer_task(Config(), tiny_llama, ("f:1", record)).task == "DPO"
    with pytest.raises(UserError, match="--task DPO"):
        SFT.parse(record, "f:1")


def test_whole_texts_are_not_mixed_with_answers_to_a_prompt():
    """One that lacks its prompt would be cut where the two begin to differ."""
    records = [PAIR, {"chosen": "the cat sat", "rejected": "the cat ran"}]
    with pytest.raises(
        UserError, match=r"^f:2: has two whole texts, without a prompt, but f:1 has two answers to a pro"
    ):
        refuse_mixture([DPO.parse(record, f"f:{n + 1}") for n, record in enumerate(records)], DPO)


# --- answers that were judged one by one


JUDGED = {
    "TRL": ({"prompt": "q", "completion": "r", "label": True}, ("q", "r"), True),
    "TRL, conversational": (
        {"prompt": [user("q")], "completion": [assistant("x")], "label": False},
        (ASKED, BAD),
        False,
    ),
    "a table": ({"prompt": "q", "completion": "r", "label": "false"}, ("q", "r"), False),
    "numbers": ({"prompt": "q", "completion": "r", "label": 1}, ("q", "r"), True),
    "thumbs": ({"question": "q", "answer": "r", "label": "thumbs_down"}, ("q", "r"), False),
    "in KTO's words": ({"prompt": "q", "completion": "r", "label": "undesirable"}, ("q", "r"), False),
    "in KTO's good words": ({"prompt": "q", "completion": "r", "label": "Desirable"}, ("q", "r"), True),
    "input": ({"input": "q", "completion": "r", "label": False}, ("q", "r"), False),
    "other letters": ({"Prompt": "q", "Completion": "r", "Label": False}, ("q", "r"), False),
    "HH, the prompt apart": ({"prompt": HH.format(""), "completion": " r", "label": True}, (ASKED, GOOD), True),
    "LLaMA-Factory": ({"instruction": "q", "input": "i", "output": "r", "kto_tag": True}, ("q\ni", "r"), True),
    "LLaMA-Factory, turns": ({"messages": BOTH["rejected"], "kto_tag": False}, (ASKED, BAD), False),
    "ms-swift": (
        {"messages": [user("o"), assistant("p"), user("q"), assistant("r")], "label": True},
        ([("user", "o"), ("assistant", "p"), *ASKED], GOOD),
        True,
    ),
}


def judged(example: Example):
    if example.messages is None:
        return example.prompt, example.target
    said = [(turn.role, turn.text) for turn in example.messages]
    return said[: example.learnt[0]], said[example.learnt[0] :]


@pytest.mark.parametrize("name", JUDGED)
def test_a_judged_answer_is_a_prompt_an_answer_and_a_verdict(name):
    record, expected, desirable = JUDGED[name]
    example = KTO.parse(record, "f:1")
    assert (judged(example.example), example.desirable) == (expected, desirable)


PLAIN = {"prompt": "q", "completion": "r"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (PLAIN, "record with keys prompt, completion; known shapes of answers that are judged"),
        (PLAIN | {"label": None}, "known shapes of answers that are judged"),
        (PAIR, "record with keys prompt, chosen, rejected; known shapes"),
        (PLAIN | {"label": "joy"}, "label is 'joy', which doesn't say whether the answer is a good one"),
        (PLAIN | {"label": 0.7}, "label is 0.7, which doesn't say"),
        (PLAIN | {"label": 3}, "label is 3, which doesn't say"),
        (PLAIN | {"label": True, "kto_tag": False}, "label and kto_tag say different things"),
        (PLAIN | {"label": True, "answer": "z"}, "answer would be lost"),
        (PLAIN | {"thumbs_up": True}, "or say what is what, as in --data.fields"),
        ({"messages": [user("q"), assistant("r", weight=0)], "label": True}, "no assistant turn to be learnt"),
        (
            {"messages": [user("q"), assistant("r"), user("s"), assistant("t", weight=0)], "label": True},
            "the last answer, which alone is learnt, is marked",
        ),
    ],
)
def test_what_is_no_verdict_is_refused_in_one_line(record, message):
    with pytest.raises(UserError, match=f"^f:1: .*{message}") as told:
        KTO.parse(record, "f:1")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("label", [1.0, 0.0, -1.0, 1, 0, True, False])
def test_a_verdict_may_be_a_float_as_pandas_makes_them(label):
    assert KTO.parse(PLAIN | {"label": label}, "f:1").desirable == (label > 0)


@pytest.mark.parametrize("key", ["Label", "LABELS", "ktoTag", "kto-tag", "kto_label", "human_label", "vote"])
@pytest.mark.parametrize("says", [False, 0, -1, "no", "bad", "undesirable"])
def test_what_is_labelled_as_bad_is_not_learnt_whatever_the_label_s_spelling(key, says):
    if key == "LABELS" and isinstance(says, int) and not isinstance(says, bool):
        return  # a class
    for record in (PLAIN, {"messages": [user("q"), assistant("r")]}):
        with pytest.raises(UserError, match=rf"^f:1: {key} is .*, and what is learnt are good answers"):
            SFT.parse(record | {key: says}, "f:1")
        assert SFT.parse(record | {key: True}, "f:1")
    with pytest.raises(UserError, match=r"is .*, and what is learnt are good answers"):
        SFT.parse({"messages": [user("q"), assistant("r", **{key: says})]}, "f:1")
    assert SFT.parse({"text": "t", "label": says}, "f:1").target == "t"  # of a text it is a class


@pytest.mark.parametrize("value", [0, 1, 3, "0"])
def test_labels_that_are_numbers_are_classes(value):
    for record in (PLAIN, {"messages": [user("q"), assistant("r")]}):
        assert SFT.parse_and_see(record | {"labels": value}, "f:1")[1].ignored == ("labels",)


def test_what_is_proposed_keeps_the_verdict():
    with pytest.raises(UserError, match=r"--data.fields 'prompt: ask, completion: reply, label: thumbs_up'"):
        SFT.parse({"ask": "q", "reply": "r", "thumbs_up": False}, "f:1")
    with pytest.raises(
        UserError, match=r"'instruction: prompt, input: input, output: completion, label: label' to read"
    ):
        KTO.parse(PLAIN | {"input": "i", "label": False}, "f:1")
    with pytest.raises(UserError, match=r"an answer that was judged: --task KTO"):
        SFT.parse({"Prompt": "q", "Completion": "r", "Label": False}, "f:1")


@pytest.mark.parametrize("label", ["negative", "yes", "0", 1])
def test_a_label_that_may_be_a_class_is_asked_about(label, tiny_llama):
    record = {"instruction": "q", "output": "r", "label": label}
    with pytest.raises(UserError, match="may say that the answer is good or be a class of it: give --task KTO if"):
        infer_task(Config(), tiny_llama, ("f:1", record))


def test_the_line_that_makes_a_verdict_of_a_score_works():
    with pytest.raises(UserError) as told:
        KTO.parse(PLAIN | {"label": 0.7}, "f:1")
    assert 'label: "{{ label | float > 0.5 }}"\'' in str(told.value)
    fields = Fields({"prompt": "prompt", "completion": "completion", "label": "{{ label | float > 0.5 }}"})
    verdicts = [KTO.parse(fields(PLAIN | {"label": score}, "f"), "f").desirable for score in (0.7, 0.2, "0.9")]
    assert verdicts == [True, False, True]


# --- prompts


PROMPTS = {
    "alone": ({"prompt": "q"}, "q", ""),
    "answered": ({"prompt": "q", "completion": "r"}, "q", "r"),
    "GSM8K": ({"question": "q", "answer": "so 3 #### 3"}, "q", "so 3 #### 3"),
    "Numina": ({"problem": "q", "solution": "so", "answer": "4", "source": "amc"}, "q", "4"),
    "TRL": ({"prompt": [user("q")], "solution": "3", "level": 2}, ASKED, "3"),
    "conversation": ({"messages": [user("q"), assistant("r")]}, ASKED, "r"),
    "conversation that asks": (
        {"messages": [user("q"), assistant("r"), user("s")]},
        [*ASKED, *GOOD, ("user", "s")],
        "",
    ),
    "a prompt and its conversation": ({"prompt": "q", "messages": [user("q"), assistant("r")]}, ASKED, "r"),
    "a prompt that turns end with": (
        {"prompt": "q", "messages": [{"role": "system", "content": "S"}, user("q")], "target": 4},
        [("system", "S"), *ASKED],
        "4",
    ),
    "an instruction and its conversation": (
        {"instruction": "Do", "input": "q", "conversations": [user("Do\nq"), assistant("r")]},
        [("user", "Do\nq")],
        "r",
    ),
    "a transcript": ({"prompt": HH.format("o") + HH.format("")}, [*ASKED, ("assistant", "o"), *ASKED], ""),
    "turns that are counted": ({"prompt": "q", "turns": 2}, "q", ""),
    "other letters": ({"Prompt": "q", "Level": 2}, "q", ""),
    "other letters, answered": ({"Question": "q", "Answer": "r"}, "q", "r"),
    "a prefilled answer": (
        {"prompt": "User: q\n\nAssistant: <think>", "answer": 4},
        "User: q\n\nAssistant: <think>",
        "4",
    ),
    "OpenR1": ({"problem": "q", "solution": "r", "answer": "4", "messages": [user("q"), assistant("r")]}, ASKED, "4"),
    "calls": ({"query": "q", "answers": '[{"name": "f", "arguments": {}}]'}, "q", '[{"name": "f", "arguments": {}}]'),
    "Nectar": ({"prompt": "q", "answers": [{"answer": "r", "rank": 1.0}], "turns": 1.0}, "q", ""),
    "a system text": ({"system": "S", "prompt": "q"}, [("system", "S"), *ASKED], ""),
    "preferences": (PAIR, "q", ""),
    "several accepted answers": ({"question": "q", "answers": ["r", "s"]}, "q", "r"),
    "numbers of these": ({"question": "q", "answer": [4, 5]}, "q", "4"),
    "SQuAD": ({"question": "q", "context": "c", "answers": {"text": ["r", "s"], "answer_start": [0, 1]}}, "q\nc", "r"),
    "SQuAD, CSV": ({"question": "q", "answers": "{'text': ['r', 's'], 'answer_start': [0, 1]}"}, "q", "r"),
    "SQuAD, objects": ({"question": "q", "answers": [{"text": "r"}, {"text": "s"}]}, "q", "r"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_keeps_what_a_reward_may_need(name):
    record, asked, reference = PROMPTS[name]
    example = GRPO.parse(record, "f:1")
    turns = example.example.messages
    assert (example.example.prompt if turns is None else [(turn.role, turn.text) for turn in turns]) == asked
    assert (example.reference, json.loads(example.fields)) == (reference, record)


@pytest.mark.parametrize(
    ("ask", "other"),
    [
        ("prompt", "question"),
        ("instruction", "question"),
        ("prompt", "input"),
        ("prompt", "query"),
        ("problem", "context"),
        ("prompt", "dialogue"),
        ("prompt", "document"),
    ],
)
def test_no_part_of_what_is_asked_is_lost(ask, other):
    record = {ask: "Solve the problem:", other: "1 + 1?", "answer": "2"}
    with pytest.raises(UserError, match=f"^f:1: ({ask}|{other}) would be lost") as told:
        GRPO.parse_and_see(record, "f:1")
    assert "\n" not in str(told.value)
    fields = yaml.safe_load(f"{{{shlex.split(str(told.value).partition('as by --data.fields ')[2])[0]}}}")
    asked = GRPO.parse(Fields(fields)(record, "f"), "f")
    assert {*asked.example.prompt.splitlines()} == {"Solve the problem:", "1 + 1?"}
    assert asked.reference == "2"


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "messages": [user("q"), assistant("r"), user("s"), assistant("t")]},
        {"prompt": [user("q")], "messages": [user("q"), assistant("r"), user("s")]},
        {"question": "q", "conversations": [user("another")]},
        {"question": "q", "choices": ["a", "b"], "answer": 0},
    ],
)
def test_a_prompt_and_another_one_are_refused(record):
    lost = [*record][1]
    with pytest.raises(UserError, match=f"^f:1: {lost} would be lost: .*--data.fields .* to leave {lost} out$"):
        GRPO.parse_and_see(record, "f:1")


@pytest.mark.parametrize("record", [BOTH | {"source": "web"}, BOTH | {"user": "Al"}, {"Text": "q", "Source": "web"}])
def test_where_a_record_is_from_is_no_prompt(record):
    with pytest.raises(UserError, match=r"^f:1: (record with keys chosen, rejected|text would be lost)"):
        GRPO.parse(record, "f:1")


def test_a_text_is_no_prompt():
    with pytest.raises(UserError, match=r"^f:1: record with keys text; known shapes of prompts: prompt \(a text"):
        GRPO.parse({"text": "q"}, "f:1")


# --- tokens


@pytest.fixture(params=["end alone", "begin and end"])
def words(request, tokenizer):
    """A tokenizer, and the same with a beginning-of-sequence token that it puts before every text."""
    if request.param == "end alone":
        return tokenizer
    other = copy.deepcopy(tokenizer)
    other.bos_token = "<|system|>"
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", other.bos_token_id)]
    )
    return other


def halves(row):
    """The token ids and labels of both texts of a row."""
    at = row.lengths[0]
    assert len(row.lengths) == 2
    assert sum(row.lengths) == len(row.input_ids) == len(row.labels)
    return (row.input_ids[:at], row.labels[:at]), (row.input_ids[at:], row.labels[at:])


def whole(task, record, tokenizer, **settings):
    return task.tokenize([task.parse(record, "f:1")], tokenizer, DataConfig(**settings))[0]


def by_trl(tokenizer, prompt, answer):
    """The ids of prompt and answer, as TRL finds them: of the whole rendering, what goes beyond that of the prompt."""
    if isinstance(prompt, str):
        before = tokenizer(prompt)["input_ids"]
        return before, tokenizer(prompt + answer + tokenizer.eos_token)["input_ids"][len(before) :]
    asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    both = tokenizer.apply_chat_template(prompt + answer, tokenize=False)
    before, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, both))
    assert ids[: len(before)] == before
    return before, ids[len(before) :]


CASES = {
    "conversation": (PAIRS["TRL, conversational"][0], [user("q")], [assistant("r")], [assistant("x")], "auto"),
    "question": (
        {"prompt": "a b", "chosen": "c", "rejected": "d e"},
        [user("a b")],
        [assistant("c")],
        [assistant("d e")],
        "auto",
    ),
    "text": ({"prompt": "the cat", "chosen": " sat", "rejected": " on"}, "the cat", " sat", " on", "{prompt}"),
    "implicit": ({"chosen": "the cat sat on", "rejected": "the cat sat a"}, "the cat sat", " on", " a", "auto"),
    "HH": (
        PAIRS["HH, a later answer"][0],
        [user("q"), assistant("o"), user("q")],
        [assistant("r")],
        [assistant("x")],
        "auto",
    ),
    "OpenAI": (PAIRS["OpenAI"][0], [user("q")], [assistant("r")], [assistant("x")], "auto"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_tokens_of_a_pair_are_those_that_trl_makes(words, name):
    record, prompt, good, bad, template = CASES[name]
    row = whole(DPO, record, words, template=template)
    for (ids, labels), answer in zip(halves(row), (good, bad), strict=True):
        before, after = by_trl(words, prompt, answer)
        assert ids == before + after
        assert labels == [IGNORE] * len(before) + after
        assert row.prompt_tokens == len(before)
    texts = [answer if isinstance(answer, str) else answer[-1]["content"] for answer in (good, bad)]
    assert [row.target, json.loads(row.extra)["rejected"]] == texts
    assert words.decode(row.input_ids[: row.prompt_tokens], skip_special_tokens=True).strip()
    for name in OBJECTIVES:
        if name not in ("SFT", "KTO", "DISTILLATION", "GRPO"):
            assert whole(record_task(TaskSpec.named(name)), record, words, template=template) == row


def test_prompts_and_answers_are_rendered_as_trl_renders_them(tokenizer):
    """By TRL itself: how it finds a prompt that two conversations or texts share, and what its templates make of it."""
    import trl  # takes seconds

    earlier = [user("a"), assistant("b"), user("c d")]
    records = [
        {"prompt": [user("the cat")], "chosen": [assistant("sat on")], "rejected": [assistant("no")]},
        {"chosen": [*earlier, assistant("é")], "rejected": [*earlier, assistant("zz top")]},
        {"chosen": "the cat sat on a mat", "rejected": "the cat sat on the mat"},
        {"chosen": "Q: x\nA", "rejected": "Q: x\nB"},
    ]
    for record in records:
        theirs = record if "prompt" in record else trl.extract_prompt(record)
        theirs = trl.apply_chat_template(theirs, tokenizer) if isinstance(theirs["prompt"], list) else theirs
        row = whole(DPO, record, tokenizer)
        prompt = row.prompt_tokens
        texts = [
            row.input_ids[:prompt],
            row.input_ids[prompt : row.lengths[0]],
            row.input_ids[row.lengths[0] + prompt :],
        ]
        said = [tokenizer.decode(ids) for ids in texts]
        ends = [theirs["prompt"], *(theirs[key].removesuffix("<|end|>") + "<|end|>" for key in ("chosen", "rejected"))]
        assert said == ends


def test_an_answer_of_several_turns_bears_loss_but_for_what_tools_and_users_say(tokenizer):
    record = PAIRS["HH, from the first answer on"][0]
    row = whole(DPO, record, tokenizer)
    ids, labels = halves(row)[0]
    assert tokenizer.decode(ids) == "<|user|>q<|end|><|assistant|>r<|end|><|user|>q<|end|><|assistant|>s<|end|>"
    assert tokenizer.decode([label for label in labels if label != IGNORE]) == "r<|end|>s<|end|>"
    assert tokenizer.decode(ids[: row.prompt_tokens]) == "<|user|>q<|end|><|assistant|>"


def test_over_the_length_both_prompts_lose_the_same_start_then_the_answers_their_end(words):
    record = {"prompt": "a b c d e f g", "chosen": "a b", "rejected": "c d e f"}
    full = whole(DPO, record, words, template="{prompt}: ", max_length=100)
    (good, _), (bad, _) = halves(full)
    head = int(words.bos_token is not None)
    for longest in range(3, len(bad) + 1):
        row = whole(DPO, record, words, template="{prompt}: ", max_length=longest)
        cut = min(len(bad) - longest, full.prompt_tokens - 1)
        for (ids, labels), all_ids in zip(halves(row), (good, bad), strict=True):
            assert ids == (all_ids[:head] + all_ids[head + cut :])[:longest]
            assert labels == [IGNORE] * (full.prompt_tokens - cut) + ids[full.prompt_tokens - cut :]
        assert row.prompt_tokens == full.prompt_tokens - cut
        assert row.truncated == (len(bad) if longest < len(bad) else 0)
        assert (whole(DPO, record, words, max_length=longest, overlong="drop", template="{prompt}: ") is None) == bool(
            row.truncated
        )
    alike = {"prompt": "a", "chosen": "b c d", "rejected": "b c e"}
    assert whole(DPO, alike, words, template="{prompt}: ", max_length=3) is None  # what is left is equal


def test_a_prompt_may_not_bear_loss_in_preferences(tokenizer):
    for task, record in ((DPO, PAIR), (KTO, PLAIN | {"label": True})):
        with pytest.raises(UserError, match=r"data\.train_on_prompt: preferences are about answers"):
            whole(task, record, tokenizer, train_on_prompt=True)


def test_a_reward_model_of_an_encoder_gets_its_special_tokens(tiny_bert_words):
    spec = TaskSpec.named("REWARD")
    row = whole(
        record_task(spec), {"prompt": "a b", "chosen": "c", "rejected": "d"}, tiny_bert_words, template="{prompt} "
    )
    for (ids, _), answer in zip(halves(row), ("c", "d"), strict=True):
        inner = [*tiny_bert_words("a b ", add_special_tokens=False)["input_ids"]]
        inner += tiny_bert_words(answer, add_special_tokens=False)["input_ids"]
        assert ids == [tiny_bert_words.cls_token_id, *inner, tiny_bert_words.sep_token_id]


@pytest.fixture
def tiny_bert_words(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.cls_token, other.sep_token, other.eos_token = "<|user|>", "<|assistant|>", None
    other.chat_template = None
    return other


def test_a_judged_answer_comes_with_the_answer_to_the_next_prompt_of_its_split(words):
    records = [{"prompt": f"a {n}", "completion": f"b {n}", "label": n % 2 == 0} for n in range(5)]
    examples = [KTO.parse(record, "f:1") for record in records]
    rows = KTO.tokenize(KTO.in_batch(examples, ["train", "test", "train", "train", "validation"]), words, DataConfig())
    following = [2, 2, 3, 0, 0]  # of those alone in their splits, the next one of all
    for n, row in enumerate(rows):
        for (ids, labels), other in zip(halves(row), (n, following[n]), strict=True):
            before, after = by_trl(words, [user(f"a {n}")], [assistant(f"b {other}")])
            assert (ids, labels) == (before + after, [IGNORE] * len(before) + after)
        assert (row.score, row.target, row.prompt_tokens) == (float(n % 2 == 0), f"b {n}", len(before))
    alone = KTO.tokenize(KTO.in_batch(examples[:1], ["train"]), words, DataConfig())[0]
    assert halves(alone)[0] == halves(alone)[1]


def test_a_long_mismatched_answer_takes_nothing_from_the_prompt(tokenizer):
    long = {"prompt": "a", "completion": "b c d e f g " * 5, "label": True}
    short = {"prompt": "the cat sat", "completion": "on", "label": False}
    cfg = DataConfig(max_length=14, template="{prompt}: ")
    examples = KTO.in_batch([KTO.parse(record, "f:1") for record in (long, short)], ["train"] * 2)
    row = KTO.tokenize(examples, tokenizer, cfg)[1]
    (ids, _), (other, _) = halves(row)
    assert tokenizer.decode(ids) == "the cat sat: on<|end|>"
    assert tokenizer.decode(other).startswith("the cat sat: b c")
    assert len(other) == 14
    assert row.truncated == 0


def test_conversations_and_plain_answers_lend_each_other_theirs(tokenizer):
    records = [PLAIN | {"label": True}, {"messages": [user("s"), assistant("t")], "label": False}]
    examples = KTO.in_batch([KTO.parse(record, "f:1") for record in records], ["train"] * 2)
    rows = KTO.tokenize(examples, tokenizer, DataConfig())
    assert tokenizer.decode(halves(rows[0])[1][0]) == "<|user|>q<|end|><|assistant|>t<|end|>"
    assert tokenizer.decode(halves(rows[1])[1][0]) == "<|user|>s<|end|><|assistant|>r<|end|>"


def test_the_tokens_of_a_prompt_are_those_that_generation_is_given(words):
    text = words.apply_chat_template([user("a b")], tokenize=False, add_generation_prompt=True)
    asked = words(text, add_special_tokens=False)["input_ids"]
    for record in ({"prompt": "a b", "answer": "c"}, {"messages": [user("a b"), assistant("c")]}):
        row = whole(GRPO, record, words)
        assert (row.input_ids, row.labels, row.prompt_tokens) == (asked, [IGNORE] * len(asked), len(asked))
        assert row.target == "c"
    raw = whole(GRPO, {"prompt": "a b"}, words, template="{prompt}: ")
    assert raw.input_ids == words("a b: ")["input_ids"]
    cut = whole(GRPO, {"prompt": "a b c d e f"}, words, template="{prompt}: ", max_length=6)
    ids = words("a b c d e f: ")["input_ids"]
    head = int(words.bos_token is not None)
    assert (cut.input_ids, cut.truncated) == (ids[:head] + ids[head + len(ids) - 6 :], len(ids))


# --- splits


def test_what_is_asked_decides_the_split():
    one = [DPO.parse(PAIR | {"rejected": text}, "f:1") for text in "xyz"]
    assert {json.dumps(DPO.group(example)) for example in one} == {'[["user", "q"]]'}
    assert DPO.group(DPO.parse(BOTH, "f:1")) == DPO.group(one[0])  # a conversation of it alone
    assert DPO.group(DPO.parse(PAIR | {"prompt": "p"}, "f:1")) != DPO.group(one[0])
    assert DPO.group(DPO.parse(PAIR | {"system": "S"}, "f:1")) == [["system", "S"], ["user", "q"]]
    assert KTO.group(KTO.parse(PLAIN | {"label": True}, "f:1")) == KTO.group(KTO.parse(PLAIN | {"label": 0}, "f:1"))
    assert GRPO.group(GRPO.parse({"prompt": "q"}, "f:1")) == DPO.group(one[0])
    assert record_task(TaskSpec()).group(Example("q", "r", messages=(Turn("user", "q"),))) is None
