"""Records of preferences from a file to shards: objective, splits, lengths, what is shown of them."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
from helpers.record_files import assistant, config, lines, user

from ftray.config import DataConfig
from ftray.data import DataCheck, pipeline, prepare
from ftray.data.limits import longest_record
from ftray.data.splits import SPLITS
from ftray.errors import UserError
from ftray.models.load import load_tokenizer
from ftray.reports.data import marked, rendered
from ftray.task_spec import IGNORE, OBJECTIVES, TaskSpec
from ftray.tasks.infer_task import infer_task

SHARES = {"validation_fraction": 0.2, "test_fraction": 0.2, "max_length": 64}


def told(tmp_path, record, model, **more) -> str:
    """The objective that is told from a file of such records, none of which is refused."""
    (tmp_path / "r.jsonl").write_text(lines(record))
    cfg = config(tmp_path / "r.jsonl", model, None, **more)
    check = DataCheck(cfg.data)
    cfg = infer_task(cfg, model, check.first)
    check.run(load_tokenizer(model), cfg.task)
    return cfg.task


def shards(tmp_path, records: list[dict], model: str, task: str, **settings):
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    cfg = DataConfig(source=str(tmp_path / "r.jsonl"), cache=str(tmp_path / "cache"), **SHARES | settings)
    return prepare(cfg, model, task=task)


@pytest.mark.parametrize(
    ("record", "task"),
    [
        (lambda n: {"prompt": f"q {n}", "chosen": "r", "rejected": "x"}, "DPO"),
        (lambda n: {"prompt": [user(f"q {n}")], "chosen": [assistant("r")], "rejected": [assistant("x")]}, "DPO"),
        (lambda n: {"chosen": f"\n\nHuman: {n}\n\nAssistant: r", "rejected": f"\n\nHuman: {n}\n\nAssistant: x"}, "DPO"),
        (lambda n: {"messages": [user(f"q {n}"), assistant("r")], "rejected_response": "x"}, "DPO"),
        (lambda n: {"prompt": f"q {n}", "completion": "r", "label": n % 2 == 0}, "KTO"),
        (lambda n: {"messages": [user(f"q {n}"), assistant("r")], "kto_tag": n % 2 == 0}, "KTO"),
        (lambda n: {"prompt": f"q {n}", "completion": "r", "label": n % 2}, "KTO"),
        (lambda n: {"question": f"q {n}", "answer": "r", "label": "good" if n % 2 else "bad"}, "KTO"),
        (lambda n: {"prompt": f"q {n}", "completion": "r"}, "CAUSAL_LM"),
        (lambda n: {"prompt": f"q {n}", "completion": "r", "label": None}, "CAUSAL_LM"),
        (lambda n: {"prompt": f"q {n}", "completion": "r", "thumbs_up": True}, "CAUSAL_LM"),
    ],
)
def test_the_objective_is_told_from_the_records(tmp_path, tiny_llama, record, task):
    assert told(tmp_path, record, tiny_llama) == task


@pytest.mark.parametrize(
    "record",
    [
        lambda n: {"question": f"q {n}", "answer": "r", "label": n % 2},  # as WikiQA has it
        lambda n: {"instruction": f"q {n}", "output": "r", "label": str(n % 2)},
        lambda n: {"messages": [user(f"q {n}"), assistant("r")], "label": n % 2},
    ],
)
def test_a_label_of_0_or_1_may_be_a_class_and_is_asked_about(tmp_path, tiny_llama, record):
    with pytest.raises(UserError, match=r"label 0, which may say .* give --task KTO if 1 .*, or --data\.fields '"):
        told(tmp_path, record, tiny_llama)
    cfg = config(tmp_path / "r.jsonl", tiny_llama, None).model_copy(update={"task": "KTO"})
    assert infer_task(cfg, tiny_llama, DataCheck(cfg.data).first).task == "KTO"


def test_pairs_want_a_model_that_continues_texts(tmp_path, tiny_bert, tiny_t5):
    for model, message in ((tiny_bert, "give --task REWARD"), (tiny_t5, "learnt by a model that continues texts")):
        with pytest.raises(UserError, match=rf"r\.jsonl:1: .*{message}"):
            told(tmp_path, lambda n: {"prompt": f"q {n}", "chosen": "r", "rejected": "x"}, model)


def test_records_that_a_given_objective_does_not_read_are_refused(tmp_path, tiny_llama):
    answers, pairs = {"prompt": "q", "completion": "r"}, {"prompt": "q", "chosen": "r", "rejected": "x"}
    cases = {
        "DPO": (answers, "known shapes of preference pairs: prompt/chosen/rejected"),
        "REWARD": (answers, "known shapes of preference pairs"),
        "KTO": (pairs, "known shapes of answers that are judged one by one: prompt/completion/label"),
        "CAUSAL_LM": (pairs, "chosen: one of a preference pair, which --task DPO learns from"),
    }
    for task, (record, message) in cases.items():
        (tmp_path / "r.jsonl").write_text(lines(lambda n, record=record: record | {"id": n}))
        cfg = config(tmp_path / "r.jsonl", tiny_llama, None).model_copy(update={"task": task})
        check = DataCheck(cfg.data)
        with pytest.raises(UserError, match=rf"r\.jsonl:1: .*{message}"):
            check.run(load_tokenizer(tiny_llama), infer_task(cfg, tiny_llama, check.first).task)


def of_prompts(count: int = 60, each: int = 3) -> list[dict]:
    """Several pairs a prompt, of several users."""
    return [
        {"prompt": f"q {n}", "chosen": f"r {k}", "rejected": f"x {k}", "user": str(k)}
        for n in range(count)
        for k in range(each)
    ]


def splits_by(data, key) -> dict[str, set[str]]:
    found = defaultdict(set)
    for split in SPLITS:
        for row in data.rows(split):
            found[key(row)].add(split)
    return found


@pytest.mark.parametrize("local", [True, False])
def test_pairs_of_one_prompt_share_a_split(tmp_path, tiny_llama, cluster, monkeypatch, local):
    """Whether they are read in this process or by tasks of Ray; and as the check before anything starts has it."""
    monkeypatch.setattr(pipeline, "LOCAL_BYTES", 2**22 if local else -1)
    data = shards(tmp_path, of_prompts(), tiny_llama, "DPO")
    found = splits_by(data, lambda row: row["prompt"])
    assert len(found) == 60
    assert {len(own) for own in found.values()} == {1}
    assert {name for own in found.values() for name in own} == {*SPLITS}
    cfg = DataConfig(source=str(tmp_path / "r.jsonl"), **SHARES)
    check = DataCheck(cfg)
    check.run(load_tokenizer(tiny_llama), "DPO")
    held_out = {row["prompt"] for row in data.rows("validation")}
    assert check.shown
    assert {shown["prompt"] for shown in check.shown} <= held_out


def test_a_group_that_the_user_names_wins_over_the_prompt(tmp_path, tiny_llama):
    data = shards(tmp_path, of_prompts(each=8), tiny_llama, "DPO", group="user")
    assert {len(own) for own in splits_by(data, lambda row: row["target"]).values()} == {1}
    assert max(len(own) for own in splits_by(data, lambda row: row["prompt"]).values()) > 1


def test_pairs_of_one_prompt_alone_hold_nothing_out_that_proves_something(tmp_path, tiny_llama, capsys):
    def check(count: int) -> None:
        (tmp_path / "r.jsonl").write_text(lines(lambda n: {"prompt": "q", "chosen": f"r {n}", "rejected": "x"}, count))
        cfg = DataConfig(source=str(tmp_path / "r.jsonl"), **SHARES)
        DataCheck(cfg).run(load_tokenizer(tiny_llama), "DPO")

    check(40)
    assert "too few records differ: those of one prompt are trained on and held out" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"1100 record.*; records of one prompt stay together"):
        check(1100)


@pytest.mark.parametrize("local", [True, False])
def test_an_answer_to_another_prompt_comes_from_the_same_split(tmp_path, tiny_llama, cluster, monkeypatch, local):
    monkeypatch.setattr(pipeline, "LOCAL_BYTES", 2**22 if local else -1)
    tokenizer = load_tokenizer(tiny_llama)
    records = [{"prompt": f"q {n}", "completion": f"r {n}", "label": n % 3 == 0} for n in range(60)]
    data = shards(tmp_path, records, tiny_llama, "KTO")
    for split in SPLITS:
        rows = data.rows(split)
        own = [row["target"] for row in rows]
        others = [tokenizer.decode(row["input_ids"][row["lengths"][0] + row["prompt_tokens"] :]) for row in rows]
        assert [text.removesuffix("<|end|>") for text in others] == [*own[1:], own[0]]
        assert [row["score"] == 1 for row in rows] == [int(text.split()[1]) % 3 == 0 for text in own]


def test_the_length_of_a_pair_is_that_of_its_longer_text(tmp_path, tiny_llama):
    records = of_prompts()
    data = shards(tmp_path, records, tiny_llama, "DPO")
    longest = max(max(row["lengths"]) for split in SPLITS for row in data.rows(split))
    assert longest_record(data) == longest
    cfg = DataConfig(source=str(tmp_path / "r.jsonl"), **SHARES | {"max_length": "auto"})
    check = DataCheck(cfg)
    check.run(load_tokenizer(tiny_llama), "DPO")
    assert max(check.lengths) <= longest < 2 * min(check.lengths)
    short = DataConfig(source=str(tmp_path / "r.jsonl"), **SHARES | {"max_length": 5, "overlong": "drop"})
    with pytest.raises(UserError, match="no supervised token is left within max_length 5"):
        DataCheck(short).run(load_tokenizer(tiny_llama), "DPO")


def test_both_answers_are_shown(tmp_path, tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    data = shards(tmp_path, of_prompts(), tiny_llama, "DPO")
    (row,) = data.rows("train", 1)
    asked = "<|user|>" + row["prompt"].removeprefix("<|user|>")
    lines = [f"chosen: {asked}[[{row['target']}<|end|>]]"]
    lines += [f"rejected: {asked}[[{json.loads(row['extra'])['rejected']}<|end|>]]"]
    assert marked(rendered(row, tokenizer, "DPO")) == "\n".join(lines)
    records = [{"prompt": f"q {n}", "completion": f"r {n}", "label": False} for n in range(60)]
    (row,) = shards(tmp_path, records, tiny_llama, "KTO").rows("train", 1)
    own, other = marked(rendered(row, tokenizer, "KTO")).split("\n")
    assert own == f"bad answer: {row['prompt']}[[{row['target']}<|end|>]]"
    assert other.startswith("with another record's answer")
    assert "[[" not in other


def test_a_mixture_of_shapes_is_one_file_of_pairs(tmp_path, tiny_llama):
    records = [
        {"prompt": "a 1", "chosen": "r", "rejected": "x"},
        {"chosen": [user("a 2"), assistant("r")], "rejected": [user("a 2"), assistant("x")]},
        {"messages": [user("a 3"), assistant("r")], "rejected_response": "x"},
    ] * 20
    records = [json.loads(json.dumps(record).replace("a ", f"a {n} ")) for n, record in enumerate(records)]
    data = shards(tmp_path, records, tiny_llama, "DPO")
    assert data.sources["train"].shapes == {
        "chosen/rejected (chosen, rejected)": 20,
        "messages/rejected_response (messages, rejected_response)": 20,
        "prompt/chosen/rejected (prompt, chosen, rejected)": 20,
    }
    assert (data.task, data.task.full_name) == (
        TaskSpec("CAUSAL_LM", pad=data.task.pad, template="chat", objective="DPO"),
        "DPO",
    )
    assert sum(data.splits[split].records for split in SPLITS) == 60


def test_texts_that_part_are_continued_as_they_are(tmp_path, tiny_llama):
    records = [{"chosen": f"the cat {n} sat", "rejected": f"the cat {n} on"} for n in range(40)]
    data = shards(tmp_path, records, tiny_llama, "DPO")
    assert data.task.template == "{prompt}"
    row = next(row for row in data.rows("train") if row["prompt"] == "the cat 7" or row["prompt"])
    assert load_tokenizer(tiny_llama).decode(row["input_ids"][: row["lengths"][0]]) == f"{row['prompt']} sat<|end|>"


def test_a_reward_model_and_prompts_have_their_shards(tmp_path, tiny_llama):
    data = shards(tmp_path, of_prompts(), tiny_llama, "REWARD")
    assert (data.task.name, data.task.objective) == ("SEQ_CLS", "REWARD")
    assert all(len(row["lengths"]) == 2 for row in data.rows("train"))


def test_every_objective_reads_records_without_torch():
    import subprocess
    import sys

    names = ", ".join(repr(name) for name in OBJECTIVES)
    code = (
        "import sys; from ftray.data.record_task import record_task; from ftray.task_spec import TaskSpec; "
        f"[record_task(TaskSpec.named(name)) for name in ({names})]; assert 'torch' not in sys.modules"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_labels_of_a_prompt_bear_no_loss_in_any_row(tmp_path, tiny_llama):
    for row in shards(tmp_path, of_prompts(), tiny_llama, "SIMPO").rows("train"):
        first = row["lengths"][0]
        for part in (row["labels"][:first], row["labels"][first:]):
            assert {*part[: row["prompt_tokens"]]} == {IGNORE}
            assert IGNORE not in part[row["prompt_tokens"] :]


def test_what_a_teacher_said_of_later_records_is_not_lost(tmp_path, tiny_llama):
    """The first record, by which the objective is told, may be one without a teacher."""
    said = {"content": [{"token": "r", "logprob": -0.1, "top_logprobs": [{"token": "r", "logprob": -0.1}]}]}
    for first in ({"logprobs": None}, {}):
        with pytest.raises(UserError, match=r"r\.jsonl:2: has a teacher's log-probabilities, which aren't learnt, but"):
            told(
                tmp_path,
                lambda n, first=first: {"prompt": f"q {n}", "completion": "r"} | ({"logprobs": said} if n else first),
                tiny_llama,
            )
    assert (
        told(tmp_path, lambda n: {"prompt": f"q {n}", "completion": "r", "logprobs": None}, tiny_llama) == "CAUSAL_LM"
    )


def test_of_a_judged_answer_its_own_tokens_alone_are_counted(tmp_path, tiny_llama):
    records = [{"prompt": f"q {n}", "completion": "a b c" if n % 2 else "d", "label": True} for n in range(60)]
    data = shards(tmp_path, records, tiny_llama, "KTO")
    for split in SPLITS:
        own = [label for row in data.rows(split) for label in row["labels"][: row["lengths"][0]]]
        assert data.splits[split].supervised_tokens == sum(label != IGNORE for label in own) > 0


def check_sft(tmp_path, model: str, label, **data) -> None:
    records = [{"prompt": f"q {n}", "completion": "r", "label": label(n)} for n in range(40)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    DataCheck(config(tmp_path / "r.jsonl", model, None, **data).data).run(load_tokenizer(model), "SFT")


def test_bad_answers_are_nothing_to_learn_and_no_split(tmp_path, tiny_llama):
    check_sft(tmp_path, tiny_llama, lambda n: n % 2 == 0)
    with pytest.raises(
        UserError, match=r"r\.jsonl: holds only answers that were judged bad, of which SFT learns nothing"
    ):
        check_sft(tmp_path, tiny_llama, lambda n: False)
    with pytest.raises(
        UserError, match=r"the validation split of 1 record.s., without answers that were judged bad, is "
    ):
        check_sft(tmp_path, tiny_llama, lambda n: n == 3)
    (tmp_path / "bad.jsonl").write_text(lines(lambda n: {"prompt": f"p {n}", "completion": "r", "label": False}))
    with pytest.raises(UserError, match=r"bad\.jsonl: holds only answers that were judged bad"):
        check_sft(tmp_path, tiny_llama, lambda n: True, validation=str(tmp_path / "bad.jsonl"))
