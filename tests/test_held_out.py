"""A test split that holds what the adapter was trained on proves nothing: it is refused, by the records' own hashes."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import llama
from peft import LoraConfig, get_peft_model

from ftray.adapters.discovery import find_adapter
from ftray.cli import main
from ftray.config import Config, DataConfig
from ftray.data.splits import order_key, split_of
from ftray.errors import UserError
from ftray.exports.source import find_source
from ftray.search.held_out import Trained, refuse_seen, said_of_split, split_as_trained, trained_by
from ftray.search.starting_point import find_start

RECORDS = [{"prompt": f"word {i}", "completion": str(i)} for i in range(400)]


@pytest.fixture
def words(tmp_path) -> Path:
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def judged(own: DataConfig, trained: DataConfig, split: str = "test", task: str = "auto") -> str:
    try:
        refuse_seen(own, split, [Trained(trained)], "adapter a", task)
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
    assert split_as_trained(DataConfig(source=str(words)), [Trained(trained)]).test == "test.jsonl"


def test_of_a_mixture_each_source_is_held_against_its_own_part(words):
    trained = DataConfig(sources=[{"source": str(words), "test_fraction": 0.2}, {"source": "b.jsonl"}])
    assert judged(DataConfig(source=str(words), test_fraction=0.2), trained) == ""
    assert "data.test_fraction 0.4: " in judged(DataConfig(source=str(words), test_fraction=0.4), trained)
    assert split_as_trained(DataConfig(source=str(words)), [Trained(trained)]).test_fraction == 0.2


def test_what_is_not_said_is_as_it_was_trained(words, monkeypatch):
    trained = DataConfig(source=str(words), seed=5, group="id", test_fraction=0.2)
    monkeypatch.chdir(words.parent)
    own = split_as_trained(DataConfig(source=words.name), [Trained(trained)])  # the same file by another name
    assert (own.seed, own.group, own.test_fraction, own.source) == (5, "id", 0.2, words.name)
    assert said_of_split(DataConfig(source=words.name), own) == "data.seed 5, data.group id, data.test_fraction 0.2"
    assert judged(own, trained) == ""
    assert split_as_trained(DataConfig(source=words.name, seed=2), [Trained(trained)]).seed == 2


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
    assert trained_by(adapter)[0].data.seed == 5
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


def settings(output: Path) -> dict:
    return yaml.safe_load((output / "config.yaml").read_text())


def test_adapters_of_one_run_have_one_template(run, words, tiny_llama, monkeypatch, capsys):
    """Whatever is taken from their run: its seed says nothing of templates."""

    def reached(*_):
        raise UserError("all are to be asked the same")

    shutil.copytree(run / "best", run / "other")
    monkeypatch.setattr("ftray.data.DataCheck", reached)
    adapters = [part for own in ("best", "other") for part in ("--adapter", str(run / own / "adapter"))]
    assert main(["evaluate", *adapters, "--data", str(words), "--model", tiny_llama]) == 2
    said = capsys.readouterr()
    assert "split    as in training: data.seed 5\n" in said.out
    assert "all are to be asked the same" in said.err


def test_records_in_memory_are_known_by_their_content(tmp_path):
    name = "source-0123456789abcdef.jsonl"
    trained = DataConfig(source=f"{tmp_path}/out/inputs/{name}", seed=5)
    own = DataConfig(source=f"{tmp_path}/cache/inputs/{name}")
    assert split_as_trained(own, [Trained(trained)]).seed == 5
    assert "the test split of data.source would hold" in judged(own, trained)
    assert judged(DataConfig(source=own.source.replace("f.", "e.")), trained) == ""


def test_a_path_is_found_from_another_directory(run, words, monkeypatch, tmp_path):
    whole = settings(run)
    whole["data"] |= {"source": "words.jsonl", "test": "gone.jsonl"}
    (run / "config.yaml").write_text(yaml.safe_dump(whole))
    (run / "commands.json").write_text(json.dumps([{"directory": str(words.parent)}]))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (trained,) = trained_by(run / "best" / "adapter")
    assert (trained.data.source, trained.data.test) == (str(words), "gone.jsonl")


def test_what_a_run_started_from_has_trained_it_too(run, words, tmp_path):
    later = tmp_path / "later"
    shutil.copytree(run, later)
    whole = settings(run)
    for before in (run, run / "best" / "adapter"):
        (later / "config.yaml").write_text(
            yaml.safe_dump(whole | {"data": {"source": "b.jsonl"}, "start": {"adapter": str(before)}})
        )
        assert [one.data.source for one in trained_by(later / "best" / "adapter")] == ["b.jsonl", str(words)]


def test_a_test_split_by_which_an_adapter_was_chosen_is_refused():
    trained = DataConfig(source="a.jsonl", validation="v.jsonl")
    given = DataConfig(source="b.jsonl", test="v.jsonl")
    assert judged(given, trained) == "data.test v.jsonl: adapter a was chosen by it: give other records"
    assert judged(given, trained, "validation") == ""
    assert "data.source v.jsonl: adapter a was chosen by it" in judged(DataConfig(source="v.jsonl"), trained)
    assert judged(DataConfig(source="v.jsonl"), trained, "validation") == ""


def test_a_group_is_the_same_whatever_fields_are_made_of(words):
    trained = DataConfig(source=str(words), group="prompt", fields={"text": "completion"})
    assert judged(DataConfig(source=str(words), group="prompt"), trained) == ""
    assert "data.fields {}" in judged(DataConfig(source=str(words)), trained.model_copy(update={"group": None}))


def test_a_task_that_keeps_prompts_together_splits_in_another_way(words):
    def said(task: str, before: str, **changed) -> str:
        own = DataConfig(source=str(words), **changed)
        try:
            refuse_seen(own, "test", [Trained(own, before)], "adapter a", task)
        except UserError as error:
            return str(error)
        return ""

    assert "task GRPO: adapter a was trained by CAUSAL_LM" in said("GRPO", "CAUSAL_LM")
    assert "was trained by SFT" in said("GRPO", "SFT")
    assert said("GRPO", "SFT", group="prompt") == said("CAUSAL_LM", "SFT") == said("GRPO", "GRPO") == ""
    pairs = [{"prompt": f"word {i}", "chosen": "a", "rejected": "b"} for i in range(40)]
    words.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    assert said("DPO", "SFT") == ""  # which go by the prompt, both of them


@pytest.mark.parametrize("seed", range(1, 12))
def test_of_a_run_that_took_few_records_those_count_that_it_took(words, seed):
    trained, own = DataConfig(source=str(words), limit=20), DataConfig(source=str(words), seed=seed, limit=40)
    took, takes = (sorted(RECORDS, key=lambda r: order_key(r, data.seed))[: data.limit] for data in (trained, own))
    both = [record for record in takes if record in took]
    told = [bool(judged(own, trained, "test", task)) for task in ("CAUSAL_LM", "auto")]
    assert told == [any(split_of(record, own, "train") == "test" for record in both), bool(both)]


def test_a_configuration_of_another_program_is_none_of_a_run(run):
    adapter = run / "best" / "adapter"
    (run / "config.yaml").write_text("site: !ENV NAME\n")
    assert trained_by(adapter) == []
    (run / "data.json").write_text("{}")
    with pytest.raises(UserError, match="is not as ftray wrote it"):
        trained_by(adapter)


def test_an_adapter_at_a_uri_is_known_by_the_output_that_it_lies_in(run, words):
    for uri in (run.as_uri(), (run / "best" / "adapter").as_uri()):
        assert [one.data.source for one in trained_by(find_adapter(uri))] == [str(words)]
