"""Later stages are checked by what the stages before them may leave, in a moment; no Ray, nothing trained."""

import json

import pytest
import yaml

from ftray.config import config_from
from ftray.errors import UserError
from ftray.search.stages import run_stages, stage_configs


@pytest.fixture
def pairs(tmp_path) -> str:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"the cat {i}", "chosen": f"sat {i}", "rejected": f"ran {i}"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def checked(pairs, tmp_path, tiny_llama):
    """What is said of stages before anything runs; empty: all of them began."""

    def check(stages, command: str = "tune", **sections) -> str:
        values = {"data": {"source": pairs, "max_length": 64}, "model": {"name": tiny_llama}, "stages": stages}
        values |= {"output": str(tmp_path / "out")}
        module = __import__(f"ftray.{command}", fromlist=["check"])
        begun: list[str] = []
        try:
            run_stages(config_from(values | sections), module.check, lambda stage: begun.append(stage.output) or 9, "x")
        except UserError as error:
            assert not begun
            return str(error)
        assert begun
        return ""

    return check


def space(tmp_path, text: str) -> str:
    (tmp_path / "space.yaml").write_text(text)
    return str(tmp_path / "space.yaml")


SFT_DPO = [{"task": "sft"}, {"task": "dpo"}]
KEPT = [{"task": "sft"}, {"task": "dpo", "start": {"form": "kept"}}]


def test_what_only_one_stage_reads_is_given_to_that_one_alone(checked):
    assert checked("sft,dpo", training={"beta": 0.3}) == ""
    cfg = config_from({"stages": "sft,dpo", "training": {"beta": 0.3, "steps": 4}})
    assert [stage.training.beta for stage in stage_configs(cfg).values()] == [None, 0.3]
    assert [stage.training.steps for stage in stage_configs(cfg).values()] == [4, 4]
    own = [{"task": "sft", "training": {"beta": 0.3}}, {"task": "dpo"}]
    assert "training.beta: what is learnt here has no such setting" in checked(own)
    assert "training.gamma: what is learnt here has no such setting" in checked("sft,dpo", training={"gamma": 0.3})


def test_a_method_that_a_later_stage_can_not_start_from_is_refused(checked, tmp_path):
    text = "method: {choice: [lora, prompt_tuning]}\nlearning_rate: 0.01\n"
    said = checked(SFT_DPO, search={"space": space(tmp_path, text)})
    assert said.startswith("stage 2-dpo: the adapter that 1-sft may leave: prompt_tuning can't be merged into the base")
    adalora = {"method": "adalora"}
    assert checked(SFT_DPO, "train", adapter=adalora) == ""
    said = checked(KEPT, "train", adapter=adalora)
    assert said.startswith("stage 2-dpo: the adapter that 1-sft may leave: the ranks of adalora are allotted")


def test_an_adapter_that_is_kept_is_not_asked_to_be_another(checked, tmp_path):
    assert checked(KEPT, "train", adapter={"method": "lora", "rank": 4}) == ""  # which is that of the first stage
    own = [{"task": "sft"}, {"task": "dpo", "start": {"form": "kept"}, "adapter": {"rank": 4}}]
    assert "stage 2-dpo: adapter.rank: the adapter of 1-sft is kept" in checked(own, "train")
    of_both = {"space": space(tmp_path, "method: {choice: [lora, ia3]}\nlearning_rate: 0.01\n")}
    assert "method lora, ia3: a kept adapter stays as it is" in checked(KEPT, search=of_both)
    (tmp_path / "ia3.yaml").write_text(yaml.safe_dump({"method": "ia3", "learning_rate": 0.1}))
    other = [KEPT[0], KEPT[1] | {"search": {"space": str(tmp_path / "ia3.yaml")}}]
    lora = {"space": space(tmp_path, "method: lora\nlora: {rank: {choice: [2, 4]}}\nlearning_rate: 0.01\n")}
    assert "method ia3: 1-sft may leave an adapter of lora, which stays as it is" in checked(other, search=lora)
    assert "training.zero_stage 3" in checked(KEPT, "train", training={"zero_stage": 3})


def test_a_stage_for_another_kind_of_model_is_refused(checked):
    said = checked([{"task": "sft"}, {"task": "reward"}])
    assert "stage 2-reward: starts from the adapter of 1-sft, which is for CAUSAL_LM" in said


def test_what_an_earlier_stage_trains_on_is_not_what_a_later_one_is_proven_on(checked):
    said = checked([{"task": "sft"}, {"task": "dpo", "data": {"seed": 3}}])
    assert said.startswith("stage 2-dpo: data.seed 3: the adapter of an earlier stage was trained with 0")
    assert checked([{"task": "sft", "data": {"seed": 3}}, {"task": "dpo", "data": {"seed": 3}}]) == ""
