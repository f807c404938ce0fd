"""Answers with a teacher's log-probabilities: which tokens they are of, and what is refused."""

import copy
import json
import math

import pytest
from helpers.record_files import assistant, user
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ftray.config import DataConfig
from ftray.data.fast_tokenizer import FastTokenizer, state_of
from ftray.data.record_task import record_task
from ftray.errors import UserError
from ftray.task_spec import IGNORE, TaskSpec

TASK = record_task(TaskSpec.named("DISTILLATION"))
ABSENT = -1e4


def entry(tokenizer, id: int, logprob: float, **more):
    """A token as OpenAI gives it: its bytes are what it adds to a text before it."""
    text = tokenizer.decode([id])
    return {"token": text, "bytes": list(text.encode()), "logprob": logprob, **more}


def teacher(tokenizer, ids: list[int], others=((5, -2.0), (6, -3.0))):
    """Each token first, with two others that are less likely."""
    top = [[(id, -0.5), *((other, p) for other, p in others if other != id)] for id in ids]
    content = [
        entry(tokenizer, id, -0.5, top_logprobs=[entry(tokenizer, *one) for one in own])
        for id, own in zip(ids, top, strict=True)
    ]
    return {"content": content}, top


def row_of(record, tokenizer, **settings):
    return TASK.tokenize([TASK.parse(record, "f:1")], tokenizer, DataConfig(**settings))[0]


def taught(row) -> list[list[tuple[int, float]]]:
    """The tokens and log-probabilities at each label that bears loss."""
    (k,) = row.lengths
    both = list(zip(row.teacher_ids, row.teacher_logprobs, strict=True))
    assert len(both) == k * sum(label != IGNORE for label in row.labels)
    return [both[at : at + k] for at in range(0, len(both), k)]


def plain(tokenizer, prompt: str, answer: str):
    """The ids of a question by the chat template, of its answer, and of what ends that."""
    text = tokenizer.apply_chat_template([user(prompt)], tokenize=False, add_generation_prompt=True)
    return (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, answer, "<|end|>"))


@pytest.fixture(params=["transformers", "fast"])
def words(request, tokenizer):
    return tokenizer if request.param == "transformers" else FastTokenizer(state_of(tokenizer))


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize(
    "form", ["logprobs", "list", "json", "token ids", "teacher_tokens", "completion_ids", "messages"]
)
def test_a_row_has_the_teachers_word_on_each_token_of_the_answer(tokenizer, words, form, ends):
    before, answer, end = plain(tokenizer, "the cat", "sat on")
    given = [*answer, *end] if ends else answer
    logprobs, top = teacher(tokenizer, given)
    record = {"prompt": "the cat", "completion": "sat on"}
    if form == "logprobs":
        record |= {"logprobs": logprobs}
    elif form == "list":
        record |= {"logprobs": logprobs["content"]}
    elif form == "json":
        record |= {"logprobs": json.dumps(logprobs)}
    elif form == "messages":
        record = {"messages": [user("the cat"), assistant("sat on")], "logprobs": logprobs}
    elif form == "token ids":
        named = [
            {
                "token": f"token_id:{id}",
                "logprob": -0.5,
                "top_logprobs": [{"token": f"token_id:{i}", "logprob": p} for i, p in own],
            }
            for id, own in zip(given, top, strict=True)
        ]
        record |= {"logprobs": {"content": named}}
    else:
        record |= {"teacher_tokens": [[id for id, _ in own] for own in top]}
        record |= {"teacher_logprobs": [[p for _, p in own] for own in top]}
        record |= {"completion_ids": given} if form == "completion_ids" else {}
    row = row_of(record, words)
    assert row.input_ids == before + answer + end
    assert row.labels == [IGNORE] * len(before) + answer + end
    expected = top if ends else [*top, [(end[0], 0.0), (end[0], ABSENT), (end[0], ABSENT)]]
    filled = [own + [(own[0][0], ABSENT)] * (3 - len(own)) for own in expected]
    assert taught(row) == filled
    assert (row.lengths, row.prompt_tokens, row.target) == ([3], len(before), "sat on")


def test_a_token_that_was_drawn_is_kept_beside_those_that_were_likelier(tokenizer):
    _, answer, _ = plain(tokenizer, "q", "a")
    drawn = entry(tokenizer, answer[0], -4.0, top_logprobs=[entry(tokenizer, 5, -0.1)])
    row = row_of({"prompt": "q", "completion": "a", "logprobs": {"content": [drawn]}}, tokenizer)
    assert taught(row)[0] == [(5, -0.1), (answer[0], -4.0)]


def test_the_tokens_that_a_teacher_drew_stand_in_place_of_the_usual_ones(tokenizer):
    """A teacher may write `at` as two tokens, which the tokenizer would make one."""
    before, usual, end = plain(tokenizer, "q", "sat")
    drawn = [id for letter in "sat" for id in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    assert len(drawn) > len(usual)
    logprobs, top = teacher(tokenizer, drawn)
    row = row_of({"prompt": "q", "completion": "sat", "logprobs": logprobs}, tokenizer)
    assert row.input_ids == before + drawn + end
    assert taught(row)[: len(drawn)] == top
    logprobs, top = teacher(tokenizer, [*drawn, *end])
    assert row_of({"prompt": "q", "completion": "sat", "logprobs": logprobs}, tokenizer).input_ids == row.input_ids


def test_parts_of_characters_are_told_by_their_bytes(tokenizer):
    """OpenAI gives the bytes of a token that holds half a letter; vLLM shows a mark: the answer tells which it is."""
    before, answer, end = plain(tokenizer, "q", "é")
    assert len(answer) == 2
    content = [
        {
            "token": "\\x",
            "bytes": [byte],
            "logprob": -0.5,
            "top_logprobs": [{"token": "\\x", "bytes": [byte], "logprob": -0.5}],
        }
        for byte in "é".encode()
    ]
    row = row_of({"prompt": "q", "completion": "é", "logprobs": {"content": content}}, tokenizer)
    assert row.input_ids == before + answer + end
    assert taught(row)[:2] == [[(answer[0], -0.5)], [(answer[1], -0.5)]]
    mark = {"token": "\ufffd", "bytes": list("\ufffd".encode()), "logprob": -0.5}
    shown = {"content": [mark | {"top_logprobs": [entry(tokenizer, 5, -1.0)]}] * 2}
    row = row_of({"prompt": "q", "completion": "é", "logprobs": shown}, tokenizer)
    assert row.input_ids == before + answer + end
    assert taught(row)[:2] == [[(5, -1.0), (id, -0.5)] for id in answer]
    unsure = mark | {"top_logprobs": [{"token": "\ufffd", "logprob": -0.7}]}
    row = row_of({"prompt": "q", "completion": "é", "logprobs": {"content": [unsure] * 2}}, tokenizer)
    assert taught(row)[:2] == [[(id, -0.7)] for id in answer]


def test_a_long_answer_loses_its_end_and_what_the_teacher_said_of_it(tokenizer):
    before, answer, end = plain(tokenizer, "q", "a b c d")
    logprobs, top = teacher(tokenizer, answer)
    record = {"prompt": "q", "completion": "a b c d", "logprobs": logprobs}
    row = row_of(record, tokenizer, max_length=5)
    assert row.input_ids == [before[-1], *answer][:5]
    assert taught(row) == top[:4]
    assert row.truncated == len(before + answer + end)
    assert row_of(record, tokenizer, max_length=5, overlong="drop") is None


def test_the_last_answer_of_a_conversation_is_the_teachers(tokenizer):
    logprobs, top = teacher(tokenizer, tokenizer("d", add_special_tokens=False)["input_ids"])
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    row = row_of({"messages": turns, "logprobs": logprobs}, tokenizer)
    assert tokenizer.decode([label for label in row.labels if label != IGNORE]) == "d<|end|>"
    assert taught(row)[0] == top[0]


R = {"prompt": "q", "completion": "a"}
ONE = {"token": "a", "logprob": -0.1, "top_logprobs": [{"token": "a", "logprob": -0.1}]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (R, "record with keys prompt, completion; known shapes of answers with a teacher's"),
        (R | {"logprobs": {"content": []}}, "logprobs holds no token"),
        (R | {"logprobs": {"tokens": ["a"]}}, "logprobs must hold a list of tokens as content"),
        (
            R | {"logprobs": {"content": [ONE | {"top_logprobs": []}]}},
            r"content\[0\] has no top_logprobs: ask the teacher",
        ),
        (R | {"logprobs": {"content": [{"logprob": 1}]}}, r"content\[0\] must be an object with token and logprob"),
        (R | {"logprobs": {"content": [ONE | {"logprob": None}]}}, r"content\[0\]: None is no log-probability"),
        (R | {"logprobs": {"content": [ONE | {"logprob": 0.5}]}}, "0.5 is no log-probability"),
        (R | {"logprobs": {"content": [ONE | {"logprob": math.nan}]}}, "nan is no log-probability"),
        (
            R | {"logprobs": {"content": [ONE, ONE]}},
            "log-probabilities of 2 tokens, 'aa', stand beside an answer of 1, 'a'",
        ),
        (R | {"logprobs": {"content": [ONE]}, "completion": "a b"}, "log-probabilities of 1 tokens, 'a', stand beside"),
        (R | {"logprobs": {"content": [ONE]}, "completion": "b"}, "teacher and base need the same tokenizer"),
        (
            R | {"logprobs": {"content": [ONE | {"token": "zebra", "logprob": -9.0}]}},
            "token 'zebra' is none of the base's: teacher and base",
        ),
        (R | {"teacher_tokens": [[1]], "teacher_logprobs": []}, "known shapes of answers with a teacher's"),
        (
            R | {"teacher_tokens": [[1]], "teacher_logprobs": [[-1], [-1]]},
            "must be lists, an entry a token of the answer",
        ),
        (
            R | {"teacher_tokens": [[1, 2]], "teacher_logprobs": [[-1]]},
            r"teacher_tokens\[0\] and .* of the same length",
        ),
        (R | {"teacher_tokens": [["a"]], "teacher_logprobs": [[-1]]}, "holds 'a', which is no token id"),
        (R | {"teacher_tokens": [[99999]], "teacher_logprobs": [[-1]]}, "token 99999 is none of the base's"),
        (
            R | {"teacher_tokens": [[1]], "teacher_logprobs": [[-1]], "completion_ids": [1, 2]},
            "must be a list of 1 ids",
        ),
        (
            R | {"teacher_tokens": [[1]], "teacher_logprobs": [[-9999]]},
            "finds none of these tokens likely, the best -9999",
        ),
        (
            R | {"teacher_tokens": [[5, 6]], "teacher_logprobs": [[-0.1, -0.2]]},
            r"teacher_logprobs\[0\]: the teacher's probabilities add up to 1.72, more than 1",
        ),
        (R | {"logprobs": {"content": [ONE]}, "rejected": "b"}, "rejected: one of a preference pair"),
    ],
)
def test_what_is_no_teachers_word_is_refused_in_one_line(tokenizer, record, message):
    with pytest.raises(UserError, match=f"^f:1: .*{message}") as told:
        row_of(record, tokenizer)
    assert "\n" not in str(told.value)


def test_a_vocabulary_whose_tokens_cannot_be_told_from_texts_takes_ids():
    """As SentencePiece's, where a token at the beginning of a text is shown without its blank."""
    vocabulary = {token: id for id, token in enumerate(["<unk>", "</s>", "▁", "a", "b", "▁a", "▁b"])}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(
        UserError, match=r"^f:1: the base's tokens can't be told from their texts: give the teacher's as"
    ):
        row_of({"prompt": "b", "completion": "a", "logprobs": {"content": [ONE]}}, words)
    given = {"teacher_tokens": [[5, 6]], "teacher_logprobs": [[-0.1, -2.0]]}
    row = row_of({"prompt": "b", "completion": "a"} | given, words, template="{prompt} ")
    assert row.input_ids[row.prompt_tokens :] == [5, 1]
    assert taught(row) == [[(5, -0.1), (6, -2.0)], [(1, 0.0), (1, ABSENT)]]


def test_a_prompt_bears_no_loss(tokenizer):
    logprobs, _ = teacher(tokenizer, tokenizer("a", add_special_tokens=False)["input_ids"])
    with pytest.raises(UserError, match=r"data\.train_on_prompt: a teacher says nothing of prompts"):
        row_of(R | {"logprobs": logprobs}, tokenizer, train_on_prompt=True)
    other = copy.deepcopy(tokenizer)
    other.chat_template = None
    row = row_of({"prompt": "", "completion": "a b", "logprobs": teacher(other, other("a b")["input_ids"])[0]}, other)
    assert row.labels[0] == IGNORE  # nothing stands before it
    assert len(taught(row)) == len(row.labels) - 1
