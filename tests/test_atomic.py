"""What appears whole or not at all, on a disk and in an object store; who holds it."""

import multiprocessing
import time
from contextlib import suppress
from pathlib import Path

import pytest
import test_storage

from ftray.errors import UserError
from ftray.models.find import is_hub_id
from ftray.storage.atomic import atomic_dir, atomic_write
from ftray.storage.location import Stored, parse_location
from ftray.storage.lock import held_since, hold
from ftray.storage.manifest import find_corruption

store = test_storage.store  # a fixture


@pytest.fixture(params=["disk", "store"])
def place(request, tmp_path, store):
    return parse_location(str(tmp_path) if request.param == "disk" else f"s3://runs/{tmp_path.name}")


def names(place) -> set[str]:
    """All files that lie there, hidden ones too."""
    return {str(file).removeprefix(f"{place}/") for file in place.glob("**/*" if isinstance(place, Path) else "*")}


def test_a_file_is_replaced_whole_or_not_at_all(place):
    with atomic_write(place / "a.csv") as file:
        file.write("ä\r\n")
    assert (place / "a.csv").read_bytes() == b"\xc3\xa4\r\n"
    with suppress(ZeroDivisionError), atomic_write(place / "a.csv") as file:
        file.write("half")
        file.flush()
        raise ZeroDivisionError
    assert (place / "a.csv").read_bytes() == b"\xc3\xa4\r\n"
    assert names(place) == {"a.csv"}


def test_a_directory_is_replaced_whole_or_not_at_all(place):
    for content in ("old", "new"):
        with atomic_dir(place / "made") as directory:
            (directory / content).write_text(content)
        with suppress(ZeroDivisionError), atomic_dir(place / "made") as directory:
            (directory / "half").write_text("half")
            raise ZeroDivisionError
        found = {name for name in names(place) if name != "made"}
        assert found == {f"made/{content}", "made/MANIFEST.json"}
    if isinstance(place, Path):
        assert find_corruption(place / "made") is None


def test_what_is_cached_under_the_same_name_is_kept(tmp_path):
    with atomic_dir(tmp_path / "made", cached=True) as second:
        (second / "data").write_text("second")
        with atomic_dir(tmp_path / "made", cached=True) as first:
            (first / "data").write_text("first")
    assert names(tmp_path) == {"made", "made/data"}
    assert (tmp_path / "made" / "data").read_text() == "first"


def test_the_file_that_says_all_is_there_comes_last_in_a_store(store, monkeypatch):
    written = []
    once = Stored.open_output
    monkeypatch.setattr(Stored, "open_output", lambda self: written.append(str(self)) or once(self))
    whole = Stored.write_bytes
    monkeypatch.setattr(Stored, "write_bytes", lambda self, b: written.append(str(self)) or whole(self, b))
    with atomic_dir(Stored("s3://runs/ordered"), cached=True, marker="a") as directory:
        for name in "abc":
            (directory / name).write_text(name)
    assert written == [f"s3://runs/ordered/{name}" for name in "bca"]


def _hold(lock: str, held, over) -> None:
    with hold(Path(lock), lambda: UserError("held")):
        held.set()
        over.wait(60)


def test_what_one_process_holds_another_is_refused(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, over, lock = context.Event(), context.Event(), tmp_path / "sub" / ".lock"
    assert held_since(lock) is None
    holder = context.Process(target=_hold, args=(str(lock), held, over))
    holder.start()
    assert held.wait(60)
    assert 0 <= time.time() - held_since(lock) < 60
    with pytest.raises(UserError, match="held"), hold(lock, lambda: UserError("held")):
        pass
    holder.kill()  # the system lets go of it
    holder.join()
    assert held_since(lock) is None
    with hold(lock, lambda: UserError("held")):
        pass


def test_a_hub_id_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("some-org/Some.Model_7B")
    for name in ("model", "./model", "../model", "/org/model", "~/model", "a/b/c", "org/", "s3://org/model", "org/a b"):
        assert not is_hub_id(name), name
    (tmp_path / "some-org").mkdir()
    assert not is_hub_id("some-org/model")
