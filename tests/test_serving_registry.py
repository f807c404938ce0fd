"""What was added and removed over HTTP is remembered, as long as it may be offered."""

import json

import pytest

from ftray.config import ServingConfig
from ftray.errors import UserError
from ftray.serving.registry import Registry


def test_what_was_added_and_removed_is_there_again(tmp_path):
    cfg = ServingConfig(run=str(tmp_path))
    given = {"best": "/a", "trial-1": "/b"}
    first = Registry(cfg, given)
    late, source = first.new("late", str(tmp_path / "late")), str(tmp_path / "late")
    first.add("late", late)
    first.remove("trial-1")
    assert late.id != "late"
    assert [p.name for p in tmp_path.iterdir()] == ["serving.json"]
    again = Registry(cfg, given)
    assert (again.entries["late"], again.entries["best"].id) == (late, "best")
    assert set(again.entries) == {"best", "late"}
    # the name stands for another adapter now
    assert Registry(cfg, {**given, "trial-1": "/c"}).entries["trial-1"].source == "/c"
    again.add("trial-1", again.new("trial-1", source))
    assert Registry(cfg, given).entries["trial-1"].source == source
    again.remove("trial-1")
    again.remove("late")
    assert set(Registry(cfg, given).entries) == {"best"}


def test_what_may_no_longer_come_from_there_is_not_offered(tmp_path):
    file = tmp_path / "kept" / "registry.json"
    cfg = ServingConfig(registry=str(file), adapter_sources=[str(tmp_path)])
    registry = Registry(cfg, {})
    with pytest.raises(FileNotFoundError):  # what can't be remembered isn't offered
        registry.add("late", registry.new("late", str(tmp_path / "late")))
    assert not registry.entries
    file.parent.mkdir()
    registry.add("late", registry.new("late", str(tmp_path / "late")))
    assert set(Registry(cfg, {}).entries) == {"late"}
    assert not Registry(cfg.model_copy(update={"adapter_sources": [str(tmp_path / "other")]}), {}).entries
    for broken in ("{", "[]", json.dumps({"added": {"a": {}}, "removed": {}})):
        file.write_text(broken)
        with pytest.raises(UserError, match="mend or remove it"):
            Registry(cfg, {})
