"""What the fuzzer gives: values of every type, records of every shape, odd texts; and how it counts and judges."""

import inspect
import os
import time
from collections import Counter

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftray.errors import UserError

SECONDS = float(os.environ.get("FUZZ_SECONDS", "30"))
PARTS = 8  # tests that share them
CASES: Counter[str] = Counter()  # by test, for the summary

ODD = [
    "",
    " ",
    "\u2028",
    "\x85",
    "\f",
    "\ufeff",
    "\x00",
    "\ud83d",
    "a\nb",
    "é",
    "e\u0301",
    "\U0001f600",
    "~",
    "{prompt}",
    "off",
    "<|end|>",
    "{{ x }}",
    "../..",
    "a" * 300,
]
TEXTS = st.sampled_from(ODD) | st.text(max_size=20)
NUMBERS = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([0, 1, -1, 0.5, 1e-40, 1e308, True, False])
VALUES = st.recursive(
    TEXTS | NUMBERS | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
RAW = st.binary(max_size=30) | TEXTS.map(lambda text: text.encode(errors="surrogatepass"))
KEYS = [
    *("input", "output", "instruction", "prompt", "completion", "messages", "conversations", "text", "label"),
    *("system", "history", "tokens", "tags", "question", "context", "answers", "is_impossible", "anchor", "positive"),
    *("negative", "sentence1", "sentence2", "score", "text_pair", "weight", "mask", "tools", "images", "chosen"),
    *("rejected", "functions", "tool_calls", "ner_tags", "premise", "hypothesis", "title", "response", "summary"),
]
CALLS = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": TEXTS, "arguments": TEXTS | VALUES})},
    optional={"id": TEXTS | VALUES, "type": st.just("function") | VALUES},
)
TURN_KEYS = ("role", "content", "from", "value", "weight", "name", "tool_calls", "tool_call_id", "reasoning", "mask")
PARTS_OF_TURNS = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]) | TEXTS, "text": TEXTS}))
TURNS = st.lists(
    st.fixed_dictionaries({}, optional=dict.fromkeys(TURN_KEYS, TEXTS | VALUES))
    | st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", "developer"]), "content": TEXTS},
        optional={"weight": st.sampled_from([0, 1]) | VALUES, "tool_calls": st.lists(CALLS, max_size=2)},
    )
    | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": PARTS_OF_TURNS})
    | st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system"]), "value": TEXTS}),
    max_size=4,
)
RECORDS = st.one_of(
    st.fixed_dictionaries({"input": TEXTS, "output": TEXTS}),
    st.fixed_dictionaries({"prompt": TEXTS, "completion": TEXTS | VALUES}),
    st.fixed_dictionaries({"messages": TURNS | VALUES}, optional={"system": TEXTS, "tools": VALUES}),
    st.fixed_dictionaries({"conversations": TURNS | VALUES}),
    st.fixed_dictionaries({"prompt": TURNS, "completion": TURNS}),
    st.fixed_dictionaries({"instruction": TEXTS, "output": TEXTS}, optional={"history": VALUES, "input": VALUES}),
    st.fixed_dictionaries({"text": TEXTS}, optional={"label": TEXTS | VALUES, "text_pair": TEXTS | VALUES}),
    st.fixed_dictionaries(
        {"tokens": st.lists(TEXTS, max_size=3) | VALUES, "tags": st.lists(TEXTS, max_size=3) | VALUES}
    ),
    st.fixed_dictionaries({"question": TEXTS, "context": TEXTS, "answers": VALUES | st.lists(TEXTS, max_size=2)}),
    st.fixed_dictionaries(
        {
            "question": TEXTS,
            "context": TEXTS,
            "answers": st.fixed_dictionaries({"text": st.lists(TEXTS) | VALUES, "answer_start": st.lists(NUMBERS)}),
        }
    ),
    st.fixed_dictionaries({"anchor": TEXTS, "positive": TEXTS | VALUES}, optional={"negative": TEXTS | VALUES}),
    st.fixed_dictionaries({"sentence1": TEXTS, "sentence2": TEXTS, "score": NUMBERS | VALUES}),
    st.dictionaries(st.sampled_from(KEYS) | TEXTS, VALUES, max_size=5),
)

ANSWERS = TEXTS | TURNS | VALUES
SAID = TURNS | st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXTS}), max_size=3
)
BESIDE = {"system": TEXTS, "tools": VALUES, "history": VALUES, "winner": TEXTS | st.just("tie"), "label": VALUES}
VERDICTS = st.sampled_from([True, False, 0, 1, -1, "true", "thumbs_down", "no", 0.7]) | VALUES
NAMED = st.fixed_dictionaries(
    {"token": TEXTS, "logprob": NUMBERS | st.just(-0.5)},
    optional={"bytes": st.lists(st.integers(0, 255), max_size=3) | VALUES},
)
TAUGHT = st.fixed_dictionaries(
    {"token": TEXTS, "logprob": st.just(-0.5)},
    optional={"top_logprobs": st.lists(NAMED, max_size=3), "bytes": st.none()},
)
IDS = st.lists(st.lists(st.integers(-1, 300), max_size=2), max_size=3)
PREFERENCES = st.one_of(
    st.fixed_dictionaries({"prompt": TEXTS, "chosen": TEXTS, "rejected": TEXTS}, optional=BESIDE),
    st.fixed_dictionaries({"prompt": ANSWERS, "chosen": ANSWERS, "rejected": ANSWERS}, optional=BESIDE),
    st.fixed_dictionaries({"chosen": SAID, "rejected": SAID}, optional={"prompt": ANSWERS, **BESIDE}),
    st.builds(
        lambda asked, good, bad, beside: {"chosen": [*asked, good], "rejected": [*asked, bad], **beside},
        SAID,
        *[st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXTS})] * 2,
        st.fixed_dictionaries({}, optional=BESIDE),
    ),
    st.fixed_dictionaries({"chosen": TEXTS, "rejected": TEXTS}),
    st.fixed_dictionaries({"messages": SAID, "rejected_response": ANSWERS}),
    st.fixed_dictionaries({"messages": SAID, "rejected_messages": ANSWERS}),
    st.fixed_dictionaries(
        {
            "input": st.fixed_dictionaries({"messages": SAID}, optional={"tools": VALUES}) | VALUES,
            "preferred_output": SAID,
            "non_preferred_output": SAID | VALUES,
        }
    ),
    st.fixed_dictionaries(
        {"prompt": ANSWERS, "completion": ANSWERS, "label": VERDICTS}, optional={"kto_tag": VERDICTS}
    ),
    st.fixed_dictionaries({"messages": SAID, "kto_tag": VERDICTS}, optional=BESIDE),
    st.fixed_dictionaries({"prompt": ANSWERS}, optional={"answer": ANSWERS, "solution": VALUES, **BESIDE}),
    st.fixed_dictionaries(
        {
            "prompt": TEXTS,
            "completion": TEXTS,
            "logprobs": st.fixed_dictionaries({"content": st.lists(TAUGHT)}) | VALUES,
        }
    ),
    st.fixed_dictionaries(
        {"prompt": TEXTS, "completion": TEXTS, "teacher_tokens": IDS, "teacher_logprobs": IDS | VALUES},
        optional={"completion_ids": st.lists(st.integers(-1, 300), max_size=3) | VALUES},
    ),
    RECORDS,
)


def fuzz(check, **strategies) -> None:
    """Call `check` with ever new values until its share of the time is over."""
    end, kind = time.monotonic() + SECONDS / PARTS, inspect.stack()[1].function

    def counted(**values) -> None:
        CASES[kind] += 1
        check(**values)

    some = settings(max_examples=50, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    while time.monotonic() < end:
        some(given(**strategies)(counted))()


def refused(error: UserError, *names: str) -> None:
    """That a refusal is one line that can be printed, and names one of `names`."""
    said = str(error)
    said.encode()
    assert len(said.splitlines()) == 1, ascii(said)
    assert not names or any(name in said for name in names), said
