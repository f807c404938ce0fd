"""The card of the best adapter, as the hub's own library reads it."""

import pytest
from huggingface_hub import InferenceClient, ModelCard

from ftray.config import Config
from ftray.search.model_card import model_card
from ftray.task_spec import TASKS, TaskSpec

BEST = {
    "config": {"adapter": {"method": "lora", "rank": 8}, "training": {"learning_rate": 0.001}},
    "value": 1.25,
    "records": 640,
    "tokens": 9000,
}
METRIC = {"base": 2.5, "best": 1.5, "difference": -1.0, "interval": [-1.25, -0.75]}
PROOF = {
    "records": 60,
    "metrics": {"loss": METRIC, "exact_match": METRIC | {"best": 0.75}},
    "sources": {"chats.jsonl": {"records": 40, **METRIC}},
    "new_modules": ["score"],
}


def written(proof, **fields) -> ModelCard:
    values = {"task": "CAUSAL_LM", "model": {"name": "some-org/base"}, "data": {"source": "some-org/records:main"}}
    return ModelCard(model_card(Config.model_validate(values | fields), BEST, proof))


def test_the_header_says_where_it_comes_from_and_what_it_scored():
    data = written(PROOF).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("some-org/base", "peft", "text-generation")
    assert data.tags == ["ftray", "lora"]
    assert data.datasets == ["some-org/records"]
    assert data.metrics == ["loss", "exact_match"]
    assert data.model_name == "lora adapter for some-org/base"
    results = [(r.metric_type, r.metric_value, r.dataset_split, r.dataset_type) for r in data.eval_results]
    assert results == [("loss", 1.5, "test", "some-org/records"), ("exact_match", 0.75, "test", "some-org/records")]


def test_it_says_what_was_gained_over_the_default_configuration():
    proof = PROOF | {"over_default": {"loss": METRIC | {"base": 1.75, "difference": -0.25, "interval": [-0.5, -0.125]}}}
    wanted = "| loss, over the default configuration | 1.7500 | 1.5000 | difference -0.5000 to -0.1250 |"
    assert wanted in str(written(proof)).splitlines()
    assert "over the default configuration" not in str(written(PROOF | {"over_default": None}))


def test_of_a_few_records_it_names_no_interval():
    told = {"interval": None, "shown": False, "reason": "1 record is too few: it takes 6"}
    text = str(written(PROOF | {"records": 1, "metrics": {"loss": METRIC | told}, "sources": {}}))
    assert "| loss | 2.5000 | 1.5000 | no interval: 1 record is too few: it takes 6 |" in text
    assert "On 1 record of a test split" in text


def test_without_a_proof_it_says_what_was_validated_and_names_no_data_set_that_the_hub_lacks(tmp_path):
    data = written(None, data={"source": str(tmp_path / "words.jsonl")}).data
    assert data.datasets is None
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("loss", 1.25, "validation")
    assert result.dataset_name == "words.jsonl"


def test_of_several_sources_those_of_the_hub_are_named():
    mixed = [
        {"source": "some-org/chats"},
        {"source": "words.jsonl", "weight": 2},
        {"source": "other-org/facts:small@train"},
    ]
    assert written(None, data={"sources": mixed}).data.datasets == ["some-org/chats", "other-org/facts"]


def test_names_that_mean_something_to_yaml_stay_names():
    assert written(None, model={"name": "/models/a: b #1"}).data.base_model == "/models/a: b #1"


def test_the_text_says_how_it_was_made_what_it_is_worth_and_how_it_is_used():
    text = written(PROOF).text
    for said in (
        "# lora adapter for some-org/base",
        "Trained on `some-org/records:main`; the best of a search over",
        "validation_loss: 1.2500 after 640 records (9000 tokens).",
        "| loss | 2.5000 | 1.5000 | difference -1.2500 to -0.7500 |",
        "| loss, 40 records of chats.jsonl | 2.5000 | 1.5000 | difference -1.2500 to -0.7500 |",
        "The base came without score: above, its head is untrained.",
        "from transformers import AutoModelForCausalLM",
        'model = PeftModel.from_pretrained(base, ".")',
    ):
        assert said in text


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_the_hubs_name(task):
    tag = TaskSpec(task).load().pipeline_tag
    assert hasattr(InferenceClient, tag.replace("-", "_")) or tag == "text2text-generation"  # no endpoint has this one
    assert written(None, task=task).data.pipeline_tag == tag
