"""The store loses nothing that counts, follows no link, and names in a line what it cannot read."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run

from companion.core import files, locks
from companion.core.errors import Busy, CompanionError, CorruptEntry, StoreUnreadable
from companion.core.runs import Entry, Store
from companion.experiments import measurement
from companion.experiments.measurement import stored_value


def keep(_: Any) -> bool:
    return True


@pytest.fixture
def two(store: Store) -> tuple[Entry, Entry]:
    found = [store.entry({"kind": "test", "n": n}) for n in range(2)]
    for entry in found:
        entry.write_json("x.json", {"n": entry.identity["n"]})
    return found[0], found[1]


def aged(path: Path) -> Path:
    for one in (*path.rglob("*"), path) if path.is_dir() else (path,):
        os.utime(one, (0, 0))
    return path


def gc(code: int = 0) -> str:
    return run("runs", "gc", "--yes", code=code).output


# ---- what is removed


def test_a_stray_folder_with_another_entry_s_name_takes_only_itself(two: Any) -> None:
    a, b = two
    stray = a.path / b.key
    (stray / "inside").mkdir(parents=True)
    aged(stray)
    assert "removed 1" in gc()
    assert not stray.exists()
    assert (a.read_json("x.json"), b.read_json("x.json")) == ({"n": 0}, {"n": 1})


def test_an_entry_made_again_since_it_was_looked_at_stays(two: Any) -> None:
    a, b = two
    for entry in two:
        (entry.path / "x.json").write_text("damaged")
    found = a.store.garbage(keep)
    assert [why for _, why in found] == ["corrupt", "corrupt"]
    a.discard()
    a.write_json("x.json", "made again")
    left = a.store.clear(found, keep)
    assert [(path, why) for path, why in left] == [(a.path, "it has changed, and counts again")]
    assert a.read_json("x.json") == "made again" and not b.path.exists()


def test_an_entry_at_work_stays_and_is_named(two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = two
    (a.path / "x.json").write_text("damaged")

    def busy(*_: Any, **__: Any) -> Any:
        raise Busy("it is being worked on by process 7")

    with monkeypatch.context() as patch:
        patch.setattr(locks, "held", busy)
        said = gc(code=1)
    assert "removed 0" in said and "still there" in said and "process 7" in said
    assert a.path.exists()


def test_what_could_not_be_removed_is_not_called_removed(
    two: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _ = two
    (a.path / "x.json").write_text("damaged")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        said = gc(code=1)
    assert "removed 0" in said and f"still there: {a.path.relative_to(a.store.root)}" in said
    assert "Permission denied" in said and a.path.exists()


def test_what_a_kill_leaves_is_collected(two: Any) -> None:
    """Half-deleted entries, entries without content, locks, temporary files: all of it."""
    a, b = two
    root = a.store.root
    half = a.path.parent / f"{files.TEMPORARY}0123"  # discard renames, then removes
    shutil.copytree(a.path, half)
    empty = Entry(a.store, {"n": 7}, a.store.entry({"n": 7}).key)
    empty._write_identity()  # killed before its first file
    naked = a.store.entry({"n": 8}).path
    naked.mkdir(parents=True)  # killed before its identity
    (a.path / ".tmp-1-x.json").write_text("half")
    (a.path / "unlisted.json").write_text("half")
    lock = a.store.lock_of(b.key)
    lock.parent.mkdir(exist_ok=True)
    lock.write_text("process 1")
    assert a.store.garbage(keep) == [
        (half, "left by a killed deletion"),
        (lock, "a lock that nobody holds"),
    ]
    for path in (empty.path, naked, a.path):
        aged(path)
    assert "removed 6" in gc()
    inside = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    assert inside == {
        f"{e.key[:2]}/{e.key}/{name}"
        for e in two
        for name in ("identity.json", "manifest.json", "x.json")
    }
    assert "nothing to remove" in gc()


def test_a_killed_discard_has_removed_the_entry_or_not(
    two: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _ = two

    def killed(*_: Any, **__: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(shutil, "rmtree", killed)
        a.discard()
    assert a.files() == {} and a.key not in {e.key for e in a.store.entries()}
    assert [why for _, why in a.store.garbage(keep)] == ["left by a killed deletion"]


# ---- links


def test_no_link_is_followed(two: Any, tmp_path: Path) -> None:
    a, b = two
    outside = tmp_path / "outside"
    shutil.move(a.path, outside)
    a.path.symlink_to(outside)
    (outside / "x.json").write_text("damaged")  # and garbage, if it were the store's
    before = {p: p.read_bytes() for p in outside.iterdir()}
    for attempt in (
        a.files,
        lambda: a.read_json("x.json"),
        lambda: a.write_json("y.json", 1),
        lambda: a.remove("x.json"),
        a.discard,
        a.mend,
        lambda: a.lock().__enter__(),
        lambda: stored_value(a, "x.json"),
    ):
        with pytest.raises(StoreUnreadable, match="symbolic link"):
            attempt()
    assert "nothing to remove" in gc()
    assert "is a link" in run("runs", "verify", code=1).output
    assert b.key[:12] in (listed := run("runs", "list").output) and a.key[:12] not in listed
    assert {p: p.read_bytes() for p in outside.iterdir()} == before
    file = b.path / "x.json"
    file.rename(outside / "taken.json")
    file.symlink_to(outside / "taken.json")
    with pytest.raises(StoreUnreadable, match="symbolic link"):
        b.read_json("x.json")
    assert "nothing to remove" in gc()
    b.write_json("x.json", "new")  # in place of the link, not through it
    assert b.read_json("x.json") == "new" and (outside / "taken.json").read_text() == '{"n": 1}'


@pytest.mark.parametrize("which", ["shard", "locks"])
def test_no_link_above_an_entry_is_followed(two: Any, tmp_path: Path, which: str) -> None:
    a, _ = two
    outside = tmp_path / "outside"
    outside.mkdir()
    if which == "shard":
        shutil.rmtree(a.path.parent)
        a.path.parent.symlink_to(outside)
    else:
        shutil.rmtree(a.store.root / ".locks", ignore_errors=True)
        (a.store.root / ".locks").symlink_to(outside)
    with pytest.raises(StoreUnreadable, match="symbolic link"), a.lock():
        raise AssertionError("locked through a link")
    assert list(outside.iterdir()) == []


# ---- what cannot be read


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def deep(path: Path) -> None:
    path.write_text('{"files": ' + "[" * 100_000 + "]" * 100_000 + "}")


@pytest.mark.parametrize("damage", [folder, loop, pipe, deep])
@pytest.mark.parametrize("name", ["identity.json", "manifest.json", "x.json"])
def test_what_is_no_file_is_one_line(two: Any, damage: Callable[[Path], None], name: str) -> None:
    """Never a traceback, never a wait, and the other entries are still there to be seen."""
    a, b = two
    damage(a.path / name)
    assert len(a.verify()) >= 1 and "\n" not in a.verify()[0]
    for words in (("list",), ("verify",), ("gc", "--dry-run"), ("show", b.key[:12])):
        done = run("runs", *words, code=1 if words == ("verify",) else 0)
        assert words[0] == "verify" or b.key[:12] in done.output or "to remove" in done.output
    try:
        stored_value(a, "x.json")
    except CompanionError as e:
        assert "\n" not in str(e)
    assert b.read_json("x.json") == {"n": 1}


def test_a_root_that_is_a_file_is_one_line(runs_root: Path) -> None:
    runs_root.write_text("no folder")
    for words in (("list",), ("verify",), ("gc",)):
        done = run("runs", *words, code=1)
        assert done.output.strip().splitlines()[-1].endswith("point COMPANION_RUNS at a folder.")


def test_an_identity_of_any_shape_hides_no_other_entry(store: Store, two: Any) -> None:
    shapes: list[Any] = [
        {"kind": "run"},
        {"kind": "run", "fork": 3, "recipe": [1]},
        {"kind": "pair", "a": 1, "evaluation": "x"},
        {"kind": ["pair"], "x": {"y": None}},
        {"kind": None},
    ]
    for shape in shapes:
        store.entry(shape).write_json("x.json", 1)
    values: list[Any] = [[1], "text", 3, None]  # whole, but no object
    for value in values:
        entry = Entry(store, value, store.entry({"kind": "x", "v": value}).key)
        entry.write_json("x.json", 1)
    listed = run("runs", "list").output
    assert all(entry.key[:12] in listed for entry in (*two, *store.entries()))
    gc()
    run("runs", "export", store.root.parent / "a.tar", "--kind", "test", code=2)
    run("runs", "export", store.root.parent / "a.tar", two[0].key)


def test_terminal_escapes_of_an_identity_are_shown_and_not_sent(store: Store) -> None:
    store.entry({"kind": "\x1b[2J\x9b31m\u202egone\r\n", "n": 1}).write_json("x.json", 1)
    for words in (("list",), ("show", next(store.entries()).key)):
        shown = run("runs", *words).output
        assert not set(shown) & set("\x1b\x9b\u202e\r"), repr(shown)
        assert "gone" in shown


# ---- damage that heals


@pytest.mark.parametrize("text", ["", "{", '{"kind": "another"}', "[" * 100_000])
def test_a_damaged_identity_is_mended_by_whoever_asks(two: Any, text: str) -> None:
    a, _ = two
    (a.path / "identity.json").write_text(text)
    assert a.verify()
    assert stored_value(a, "x.json") == {"n": 0}
    assert a.verify() == [] and json.loads((a.path / "identity.json").read_text()) == a.identity


# ---- readers beside those who delete


def test_a_reader_during_a_discard_finds_a_value_or_none(store: Store) -> None:
    """It used to be a KeyError, between the look at the manifest and the read."""
    entry = store.entry({"kind": "test"})
    stop, wrong, seen = threading.Event(), [], set()

    def delete() -> None:
        while not stop.is_set():
            entry.write_json("value.json", {"x": 1})
            time.sleep(0.001)
            entry.discard()

    asked: Any = Asked()
    worker = threading.Thread(target=delete)
    worker.start()
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        try:
            seen.add(str(measurement.stored([asked], store, "cpu")))
        except BaseException as e:
            wrong.append(repr(e))
    stop.set()
    worker.join()
    assert wrong == [] and seen == {"[{'x': 1}]", "[None]"}


class Asked:
    """A measurement as far as :func:`measurement.stored` looks at it."""

    FILE = "value.json"

    def entry(self, store: Store, device: str) -> Entry:
        return store.entry({"kind": "test"})


# ---- output files


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "found.json"
    target.write_text("the previous result")
    target.chmod(0o640)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", full)
        files.write(target, b"new")
    assert target.read_text() == "the previous result"
    assert [p.name for p in tmp_path.iterdir()] == ["found.json"]
    files.write(target, b"new")
    assert target.read_bytes() == b"new" and target.stat().st_mode & 0o777 == 0o640
    link = tmp_path / "link.json"
    link.symlink_to(target)
    files.write(link, b"through the link")
    assert link.is_symlink() and target.read_bytes() == b"through the link"
    long = tmp_path / ("ü" * 120 + ".json")
    files.write(long, b"x")
    assert long.read_bytes() == b"x"


def test_what_a_killed_write_left_goes_with_the_next_one(tmp_path: Path) -> None:
    target = tmp_path / "a [1].tar"
    left = tmp_path / f"{files.TEMPORARY}123-{target.name}"
    left.write_text("half")
    other = tmp_path / f"{files.TEMPORARY}123-b.tar"
    other.write_text("not this file's")
    with files.whole(target) as working:
        working.write_text("first")
        assert not left.exists()
        files.write(target, b"second")  # another process beside it: neither takes the other's
    assert target.read_text() == "first" and other.exists()


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_is_refused_before_any_work(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr("companion.cli.barrier.opened", opened)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", refuse)
        done = run("barrier", "a", "b", option, tmp_path / "x.svg", code=2)
    assert (
        f"{option}: {tmp_path / 'x.svg'} cannot be written (Read-only file system)" in done.output
    )
    assert list(tmp_path.iterdir()) == []
    done = run("barrier", "a", "b", option, tmp_path / ("x" * 300 + ".svg"), code=2)
    assert "File name too long" in done.output


# ---- tensors


def test_tensors_that_are_no_state_are_refused(store: Store) -> None:
    from companion.core.errors import BadParameter
    from companion.training import State

    for step in (torch.zeros(3), torch.tensor(float("nan")), torch.tensor(-1), torch.tensor(1e300)):
        with pytest.raises(BadParameter, match="step"):
            State.from_tensors({"step": step, "trace": torch.zeros(1)})
    with pytest.raises(BadParameter, match="step"):
        State.from_tensors({})


def test_corrupt_entries_are_still_corrupt(two: Any) -> None:
    a, _ = two
    (a.path / "x.json").write_text("2")
    with pytest.raises(CorruptEntry):
        a.read_json("x.json")
