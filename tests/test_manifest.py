"""What is written whole, and what becomes of it when it is damaged later."""

import json
import shutil

import pytest
from conftest import llama
from peft import LoraConfig, get_peft_model

from ftray.adapters.discovery import find_adapter
from ftray.config import Config
from ftray.errors import UserError
from ftray.models.find import find
from ftray.search.results import newest_whole
from ftray.serving.adapters import check_adapter, local_adapter
from ftray.storage.atomic import atomic_dir
from ftray.storage.local import LocalLocation
from ftray.storage.manifest import MANIFEST, check, find_corruption, seal
from ftray.tune import save_best


def written(directory):
    (directory / "state").mkdir(parents=True)
    (directory / "state" / "shard.pt").write_bytes(b"weights" * 1000)
    (directory / "config.json").write_text("{}")
    (directory / "README.md").write_text("a card")
    return directory


def publish(content, target):
    with atomic_dir(target) as made:
        shutil.copytree(content, made, dirs_exist_ok=True)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a bit flipped": (lambda d: flip(d / "state" / "shard.pt"), "state/shard.pt is not as it was written"),
    "cut off": (
        lambda d: (d / "state" / "shard.pt").write_bytes(b"weights"),
        "state/shard.pt is not as it was written",
    ),
    "a file gone": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "empty manifest": (lambda d: (d / f"{MANIFEST}.json").write_text(""), f"its {MANIFEST}.json can't be read"),
    "other JSON": (lambda d: (d / f"{MANIFEST}.json").write_text("[]"), f"its {MANIFEST}.json can't be read"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_shows(tmp_path, name):
    publish(written(tmp_path / "aside"), tmp_path / "place")
    assert find_corruption(tmp_path / "place") is None
    change, said = DAMAGES[name]
    change(tmp_path / "place")
    assert find_corruption(tmp_path / "place").startswith(said)
    with pytest.raises(UserError, match="is damaged") as caught:
        check(tmp_path / "place", "thing")
    assert len(str(caught.value).splitlines()) == 1


def test_a_card_may_be_changed_and_what_others_made_is_taken(tmp_path):
    publish(written(tmp_path / "aside"), tmp_path / "place")
    (tmp_path / "place" / "README.md").write_text("a better card")
    check(tmp_path / "place", "thing")
    (tmp_path / "place" / f"{MANIFEST}.json").unlink()
    flip(tmp_path / "place" / "state" / "shard.pt")
    check(tmp_path / "place", "thing")
    assert "No such file" in find_corruption(tmp_path / "place")  # of ours it would be damage


def test_what_two_processes_write_is_whole_with_both_parts(tmp_path):
    for part in range(2):
        (tmp_path / str(part)).mkdir()
        (tmp_path / str(part) / f"shard-{part}").write_text(str(part))
        seal(tmp_path / str(part), part, 2)
    shutil.copytree(tmp_path / "0", tmp_path / "all")
    assert find_corruption(tmp_path / "all") == "a part of it is missing"
    shutil.copytree(tmp_path / "1", tmp_path / "all", dirs_exist_ok=True)
    assert find_corruption(tmp_path / "all") is None
    flip(tmp_path / "all" / "shard-1")
    assert find_corruption(tmp_path / "all") == "shard-1 is not as it was written"


def test_a_trial_goes_on_from_the_newest_checkpoint_that_is_whole(tmp_path):
    trial = LocalLocation(tmp_path)
    for step in (3, 9, 27):
        publish(written(tmp_path / f"made-{step}"), trial / f"checkpoint_{step:08d}")
    assert newest_whole(trial).endswith("checkpoint_00000027")
    flip(tmp_path / "checkpoint_00000027" / "state" / "shard.pt")
    assert newest_whole(trial).endswith("checkpoint_00000009")
    (tmp_path / "checkpoint_00000009" / f"{MANIFEST}.json").unlink()  # half-written
    assert newest_whole(trial).endswith("checkpoint_00000003")
    shutil.rmtree(tmp_path / "checkpoint_00000003" / "state")
    assert newest_whole(trial) is None


@pytest.fixture
def adapter(tmp_path, tiny_llama):
    """A PEFT directory with a manifest."""
    model = llama()
    model.name_or_path = tiny_llama
    config = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=tiny_llama)
    get_peft_model(model, config).save_pretrained(tmp_path / "aside")
    publish(tmp_path / "aside", tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_damaged_adapter_is_refused_everywhere(adapter, tiny_llama):
    assert find_adapter(str(adapter)) == adapter
    check_adapter(adapter, tiny_llama)
    with local_adapter(f"file://{adapter}") as copy:
        check_adapter(copy, tiny_llama)
    flip(adapter / "adapter_model.safetensors")
    for use in (
        lambda: find_adapter(str(adapter)),  # evaluate, infer, merge
        lambda: check_adapter(adapter, tiny_llama),  # serve
        lambda: local_adapter(f"file://{adapter}").__enter__(),  # serve, from a URI
    ):
        with pytest.raises(UserError, match=r"adapter_model\.safetensors is not as it was written"):
            use()


def test_a_damaged_model_is_refused(tmp_path, tiny_llama):
    shutil.copytree(tiny_llama, tmp_path / "aside")
    publish(tmp_path / "aside", tmp_path / "merged")
    assert find(str(tmp_path / "merged")) == str((tmp_path / "merged").resolve())
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    (tmp_path / "merged" / "config.json").write_text(json.dumps(config | {"vocab_size": 7}))
    with pytest.raises(UserError, match=r"merged: is damaged: config\.json is not as it was written"):
        find(str(tmp_path / "merged"))


def test_the_best_trial_whose_adapter_is_whole_is_the_best(adapter, tokenizer, tmp_path, capsys):
    cfg = Config.model_validate({"task": "CAUSAL_LM", "data": {"source": "words.jsonl"}})
    rows = []
    for number in range(3):
        checkpoint = tmp_path / "tune" / f"trial-{number}"
        publish(adapter, checkpoint / "adapter")
        settings = {"adapter": {"method": "lora"}, "training": {}}
        row = {"trial": number, "value": 1.0 + number, "records": 8, "tokens": 99, "config": settings}
        rows.append(row | {"checkpoint": str(checkpoint) if number else None})
    flip(tmp_path / "tune" / "trial-1" / "adapter" / "adapter_model.safetensors")
    assert save_best(cfg, rows, tokenizer, LocalLocation(tmp_path)) is rows[2]
    assert [row["checkpoint"] for row in rows[:2]] == [None, None]
    assert "trial 1: adapter" in capsys.readouterr().out
    weights = (tmp_path / "best" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert weights == (adapter / "adapter_model.safetensors").read_bytes()
    assert find_corruption(tmp_path / "best" / "adapter") is None
    assert save_best(cfg, rows[:2], tokenizer, LocalLocation(tmp_path)) is None
