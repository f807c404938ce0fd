"""What appears whole or not at all, on a disk and in an object store; who holds it."""

import multiprocessing
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from ftray.errors import UserError
from ftray.models.find import is_hub_id
from ftray.storage.atomic import atomic_dir, atomic_write
from ftray.storage.local import LocalLocation
from ftray.storage.location import parse_location
from ftray.storage.manifest import find_corruption
from ftray.storage.object_store import ObjectStoreLocation


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
    once = ObjectStoreLocation.open_output
    monkeypatch.setattr(ObjectStoreLocation, "open_output", lambda self: written.append(str(self)) or once(self))
    whole = ObjectStoreLocation.write_bytes
    monkeypatch.setattr(ObjectStoreLocation, "write_bytes", lambda self, b: written.append(str(self)) or whole(self, b))
    with atomic_dir(ObjectStoreLocation("s3://runs/ordered"), cached=True, marker="a") as directory:
        for name in "abc":
            (directory / name).write_text(name)
    assert written == [f"s3://runs/ordered/{name}" for name in "bca"]


def test_a_directory_of_several_processes_appears_with_the_parts_of_all(place):
    meet = threading.Barrier(2, timeout=30)

    def write(rank: int, content: str) -> None:
        with (place / "trial" / "checkpoint_1").shared_dir(rank, 2, meet.wait, last=["report.json"]) as directory:
            (directory / f"shard-{rank}").write_text(content)
            if rank == 0:
                (directory / "report.json").write_text(content)
            assert content == "new" or not list((place / "trial").published_dirs("checkpoint_*"))

    for content in ("old", "new"):
        with ThreadPoolExecutor(2) as ranks:
            list(ranks.map(write, (0, 1), (content, content)))
    (made,) = (place / "trial").published_dirs("checkpoint_*")
    assert str(made) == str(place / "trial" / "checkpoint_1")
    with made.as_local_dir() as directory:
        assert find_corruption(directory) is None
        files = {path.name: path.read_text() for path in directory.iterdir() if not path.name.startswith("MANIFEST")}
    assert files == dict.fromkeys(("shard-0", "shard-1", "report.json"), "new")


def test_in_a_store_what_makes_a_checkpoint_valid_comes_after_the_parts_of_all(store, monkeypatch):
    written, meet = [], threading.Barrier(2, timeout=30)
    once = ObjectStoreLocation.open_output
    monkeypatch.setattr(ObjectStoreLocation, "open_output", lambda self: written.append(str(self)) or once(self))

    def write(rank: int) -> None:
        target = ObjectStoreLocation("s3://runs/of-ranks")
        with target.shared_dir(rank, 2, meet.wait, last=["a.json"]) as directory:
            for name in ["a.json", "z-0"] if rank == 0 else ["z-1"]:
                (directory / name).write_text(name)

    with ThreadPoolExecutor(2) as ranks:
        list(ranks.map(write, (0, 1)))
    names = [name.rpartition("/")[2] for name in written]
    assert sorted(names[:-2]) == ["MANIFEST.1.json", "z-0", "z-1"]
    assert names[-2:] == ["MANIFEST.json", "a.json"]


def test_both_kinds_of_location_answer_alike(place):
    """What callers rely on without knowing which one they hold."""
    made = place / "dir"
    assert (made / "").exists() is False
    made.mkdir(parents=True, exist_ok=True)
    assert (made / "a.json").write_text("ä") == 2
    (made / "a.json").write_bytes(b"1")
    assert made.exists()
    assert not made.is_file()
    assert (made / "a.json").is_file()
    assert [str(found) for found in made.glob("*.json")] == [str(made / "a.json")]
    assert str((made / "a.json").parent) == str(made) == str(parse_location(str(made)))
    assert parse_location(made) is made
    with made.filesystem.open_input_file((made / "a.json").path) as file:
        assert file.read() == b"1"
    made.check_writable()
    assert made.free_bytes() > 0
    assert not made.is_full()
    again = pickle.loads(pickle.dumps(made / "a.json"))
    assert again.read_text() == "1"
    assert str(made.resolve()) == str(made.absolute()) == str(made)
    (made / "a.json").unlink()
    made.remove()
    made.remove()
    assert not made.exists()


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    for content, left in ((b"a\nb", b"a\n"), (b"a\nb\n", b"a\nb\n"), (b"a", b"")):
        (tmp_path / "journal").write_bytes(content)
        LocalLocation(tmp_path / "journal").drop_cut_line()
        assert (tmp_path / "journal").read_bytes() == left
    LocalLocation(tmp_path / "none").drop_cut_line()
    assert not (tmp_path / "none").exists()


def _hold(lock: str, held, over) -> None:
    with LocalLocation(lock).hold(lambda: UserError("held")):
        held.set()
        over.wait(60)


def test_what_one_process_holds_another_is_refused(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, over, lock = context.Event(), context.Event(), LocalLocation(tmp_path / "sub" / ".lock")
    assert lock.held_since() is None
    holder = context.Process(target=_hold, args=(str(lock), held, over))
    holder.start()
    assert held.wait(60)
    assert 0 <= time.time() - lock.held_since() < 60
    with pytest.raises(UserError, match="held"), lock.hold(lambda: UserError("held")):
        pass
    holder.kill()  # the system lets go of it
    holder.join()
    assert lock.held_since() is None
    with lock.hold(lambda: UserError("held")):
        pass


def test_a_hub_id_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("some-org/Some.Model_7B")
    for name in ("model", "./model", "../model", "/org/model", "~/model", "a/b/c", "org/", "s3://org/model", "org/a b"):
        assert not is_hub_id(name), name
    (tmp_path / "some-org").mkdir()
    assert not is_hub_id("some-org/model")
