"""A test split that holds what the adapter was trained on proves nothing: it is refused, by the records' own hashes."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import llama
from peft import LoraConfig, get_peft_model

from ftray.cli import main
from ftray.config import Config, DataConfig
from ftray.data.splits import split_of
from ftray.errors import UserError
from ftray.exports.source import find_source
from ftray.search.held_out import refuse_seen, said_of_split, split_as_trained, trained_by
from ftray.search.starting_point import find_start

RECORDS = [{"prompt": f"word {i}", "completion": str(i)} for i in range(400)]


@pytest.fixture
def words(tmp_path) -> Path:
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def judged(own: DataConfig, trained: DataConfig, split: str = "test") -> str:
    try:
        refuse_seen(own, split, trained, "adapter a")
    except UserError as error:
        return str(error)
    return ""


def seen(own: DataConfig, trained: DataConfig, split: str, by: tuple[str, ...]) -> bool:
    """Whether a record of the split was in one of the run's splits `by`, each of them looked up by itself."""
    return any(split_of(r, own, "train") == split and split_of(r, trained, "train") in by for r in RECORDS)


@pytest.mark.parametrize("split", ["test", "validation"])
@pytest.mark.parametrize(
    "changed",
    [{}, {"seed": 1}, {"test_fraction": 0.05}, {"test_fraction": 0.15}, {"test_fraction": 0.4},
     {"validation_fraction": 0.3}, {"test_fraction": 0.0, "validation_fraction": 0.15}],
)  # fmt: skip
def test_a_split_is_refused_where_it_holds_what_the_run_has_seen(words, changed, split):
    trained = DataConfig(source=str(words))
    own = DataConfig(source=str(words), **changed)
    by = ("train", "validation") if split == "test" else ("train",)
    assert bool(judged(own, trained, split)) is seen(own, trained, split, by)
    assert judged(own, trained, "all") == judged(own, trained, "train") == ""


def test_other_records_may_be_split_in_any_way(words, tmp_path):
    assert judged(DataConfig(source="other.jsonl", seed=3), DataConfig(source=str(words))) == ""
    held_out = DataConfig(source=str(words), test=str(tmp_path / "test.jsonl"))
    assert judged(held_out, DataConfig(source=str(words), seed=1)) == ""
    said = judged(DataConfig(source="other.jsonl", test=str(words)), DataConfig(source=str(words)))
    assert said == f"data.test {words}: adapter a was trained on it: give other records"


def test_what_was_all_trained_on_because_a_test_file_was_given_is_not_cut_again(words):
    trained = DataConfig(source=str(words), test="test.jsonl", validation_fraction=0.1)
    assert "was trained with test.jsonl" in judged(DataConfig(source=str(words), validation_fraction=0.1), trained)
    assert split_as_trained(DataConfig(source=str(words)), trained).test == "test.jsonl"


def test_of_a_mixture_each_source_is_held_against_its_own_part(words):
    trained = DataConfig(sources=[{"source": str(words), "test_fraction": 0.2}, {"source": "b.jsonl"}])
    assert judged(DataConfig(source=str(words), test_fraction=0.2), trained) == ""
    assert "data.test_fraction 0.4: " in judged(DataConfig(source=str(words), test_fraction=0.4), trained)
    assert split_as_trained(DataConfig(source=str(words)), trained).test_fraction == 0.2


def test_what_is_not_said_is_as_it_was_trained(words, monkeypatch):
    trained = DataConfig(source=str(words), seed=5, group="id", test_fraction=0.2)
    monkeypatch.chdir(words.parent)
    own = split_as_trained(DataConfig(source=words.name), trained)  # the same file by another name
    assert (own.seed, own.group, own.test_fraction, own.source) == (5, "id", 0.2, words.name)
    assert said_of_split(DataConfig(source=words.name), own) == "data.seed 5, data.group id, data.test_fraction 0.2"
    assert judged(own, trained) == ""
    assert split_as_trained(DataConfig(source=words.name, seed=2), trained).seed == 2


@pytest.fixture
def run(words, tmp_path, tiny_llama) -> Path:
    """An output whose adapter was trained on `words`, split by seed 5."""
    output = tmp_path / "run"
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = tiny_llama
    model.save_pretrained(output / "best" / "adapter")
    cfg = Config.model_validate({"data": {"source": str(words), "seed": 5}, "model": {"name": tiny_llama}})
    (output / "config.yaml").write_text(yaml.safe_dump(cfg.model_dump(exclude={"resume", "plan", "show", "png"})))
    return output


def test_commands_refuse_it_in_one_line(run, words, tiny_llama, capsys):
    adapter = run / "best" / "adapter"
    assert trained_by(adapter).seed == 5
    line = f"data.seed 0: adapter {adapter} was trained with 5, so that the test split of {words} would hold records"
    given = ["evaluate", "--adapter", str(run), "--data", str(words), "--data.seed", "0", "--model", tiny_llama]
    assert main(given) == 2
    assert line in capsys.readouterr().err
    cfg = {"data": {"source": str(words), "seed": 0}, "model": {"name": tiny_llama}}
    with pytest.raises(UserError) as told:
        find_start(Config.model_validate(cfg | {"start": {"adapter": str(run)}}))
    assert line in str(told.value)
    with pytest.raises(UserError) as told:
        find_source(Config.model_validate(cfg | {"export": {"run": str(run)}}))
    assert line in str(told.value)
    again = find_source(Config.model_validate({"data": {"source": str(words)}, "export": {"run": str(run)}}))
    assert again.cfg.data.seed == 5
