"""The run store: names that mean content, writes that survive anything, reads that check."""

from __future__ import annotations

import builtins
import errno
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from companion.cli.console import INVALID
from companion.core.errors import BadParameter, CompanionError, CorruptEntry, StoreUnwritable
from companion.core.runs import Entry, Store, canonical_json, digest

TENSORS = {"w": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(3)}

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=8,
)


@pytest.fixture
def entry(store: Store) -> Entry:
    return store.entry({"kind": "test", "lr": 0.1})


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
    )


# ---- names


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=4), json_values, min_size=1, max_size=5), st.randoms())
def test_the_order_of_a_dictionary_does_not_matter(value: dict[str, Any], rng: Any) -> None:
    items = list(value.items())
    rng.shuffle(items)
    assert digest(dict(items)) == digest(value)
    assert json.loads(canonical_json(value)) == value, "the text says everything"


@settings(deadline=None)
@given(json_values, json_values)
def test_different_values_have_different_names(a: Any, b: Any) -> None:
    assert (canonical_json(a) == canonical_json(b)) == (
        json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    )


def test_canonical_text_is_pinned() -> None:
    """A change here would orphan every store there is."""
    value = {"b": [1, 2.5, None], "a": {"ü": True, "lr": 0.1}}
    assert canonical_json(value) == '{"a":{"lr":0.1,"\\u00fc":true},"b":[1,2.5,null]}'
    assert digest({"kind": "run"}) == (
        "78eec4426114b612c414c0602dfefe269663c92230da2bbdb6cb7e1473edb0e0"
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused(bad: float, store: Store, entry: Entry) -> None:
    with pytest.raises(ValueError, match="JSON"):
        store.entry({"lr": bad})
    with pytest.raises(ValueError, match="JSON"):
        entry.write_json("x.json", {"loss": [bad]})
    assert not entry.files()


# ---- what is written is what is read


def test_round_trip(entry: Entry) -> None:
    tied = torch.randn(4, 4)
    odd = {
        "a": tied,
        "b": tied,
        "view": tied[:, 1],
        "turned": tied.t(),
        "half": tied.bfloat16(),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(7),
        "none": torch.zeros(0),
        "grad": torch.randn(3, requires_grad=True),
        "image": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    assert not entry.path.exists(), "an entry that nobody wrote costs nothing"
    assert entry.files() == {} and "x.safetensors" not in entry
    entry.write_tensors("x.safetensors", odd)
    entry.write_json("y.json", {"a": [1, 2.5, None]})
    assert "x.safetensors" in entry and "y.json" in entry
    assert same(entry.read_tensors("x.safetensors"), {k: v.detach() for k, v in odd.items()})
    assert entry.read_json("y.json") == {"a": [1, 2.5, None]}
    assert json.loads((entry.path / "identity.json").read_text()) == {"kind": "test", "lr": 0.1}
    assert entry.bytes() == sum((entry.path / n).stat().st_size for n in entry.files())
    assert entry.verify() == []
    assert Store(entry.store.root).entry({"lr": 0.1, "kind": "test"}).read_json("y.json")


def test_what_is_not_there_is_a_key_error(entry: Entry) -> None:
    with pytest.raises(KeyError, match=r"x.json"):
        entry.read_json("x.json")
    entry.write_json("x.json", 1)
    (entry.path / "stranger.json").write_text("2")
    with pytest.raises(KeyError):
        entry.read_json("stranger.json")
    entry.remove("stranger.json")
    assert (entry.path / "stranger.json").exists(), "not ours to delete"


def test_replace_and_remove(entry: Entry) -> None:
    for turn in (1, 2, 2, 3):
        entry.write_json("x.json", turn)
        assert entry.read_json("x.json") == turn and entry.verify() == []
    inside = {p.name for p in entry.path.iterdir()}
    assert len(inside) == 3, f"old values stay behind: {inside}"
    entry.write_json("y.json", 1)
    entry.remove("x.json")
    assert list(entry.files()) == ["y.json"] and entry.verify() == []
    assert {p.name for p in entry.path.iterdir()} == {"identity.json", "manifest.json", "y.json"}
    entry.discard()
    assert not entry.path.exists() and entry.files() == {}
    entry.discard()


# ---- kills, crashes, other writers


class Killed(BaseException):
    """Not an Exception: nothing may tidy up after a kill."""


def crash_at(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], int]:
    """Make the ``number``-th call that touches the disk kill us instead. Returns the call count."""
    count = 0

    def guard(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                raise Killed
            return original(*args, **options)

        monkeypatch.setattr(owner, name, wrapped)

    guard(os, "fsync")
    for name in ("replace", "unlink", "mkdir"):
        guard(Path, name)
    guard(shutil, "rmtree")
    return lambda: count


def test_a_kill_at_any_moment_leaves_a_consistent_entry(tmp_path: Path) -> None:
    """Every point between two system calls, one by one: add, replace, remove."""
    number = calls = 0
    while number <= calls:
        number += 1
        entry = Store(tmp_path / str(number)).entry({"kind": "crash"})
        stage = "nothing"
        with pytest.MonkeyPatch.context() as patch:
            counted = crash_at(patch, number)
            try:
                entry.write_json("a.json", "old")
                stage = "a is old"
                entry.write_json("b.json", "b")
                stage = "a and b"
                entry.write_json("a.json", "new")
                stage = "a is new"
                entry.remove("b.json")
                stage = "b is gone"
            except Killed:
                pass
            calls = counted()
        files = entry.files()
        found = {name: entry.read_json(name) for name in files}
        allowed: dict[str, list[dict[str, str]]] = {
            "nothing": [{}, {"a.json": "old"}],
            "a is old": [{"a.json": "old"}, {"a.json": "old", "b.json": "b"}],
            "a and b": [{"a.json": a, "b.json": "b"} for a in ("old", "new")],
            "a is new": [{"a.json": "new", "b.json": "b"}, {"a.json": "new"}],
            "b is gone": [{"a.json": "new"}],
        }
        assert found in allowed[stage], f"killed at call {number}, after {stage!r}: {found}"
        if entry.path.exists() and (entry.path / "identity.json").exists():
            assert entry.verify() == []
        entry.write_json("a.json", "again")  # and the next run goes on
        assert entry.read_json("a.json") == "again" and entry.verify() == []
    assert calls > 15, "the loop looked at too few moments to mean anything"


@pytest.fixture(scope="module")
def outcome(in_processes: Any) -> dict[str, Any]:
    answers, _ = in_processes(
        *("killed_writes", "many_writers", "reader_and_writer", "file_size_limit", "no_rights"),
        "read_only_store",
    )
    return answers


def test_kill_9_in_the_middle_of_writes(outcome: dict[str, Any]) -> None:
    assert outcome["killed_writes"] == {"problems": [], "values_in_a_file": 1}


def test_processes_that_write_one_entry_lose_nothing(outcome: dict[str, Any]) -> None:
    found = outcome["many_writers"]
    assert found["codes"] == [0, 0, 0] and found["problems"] == []
    expected = [f"{who}-{turn}.safetensors" for who in range(3) for turn in range(12)]
    assert found["files"] == sorted([*expected, "shared.json"])


def test_a_reader_beside_a_writer_sees_whole_values(outcome: dict[str, Any]) -> None:
    found = outcome["reader_and_writer"]
    assert found["problems"] == []
    assert found["seen"] > 3, "nothing was replaced while we read"


def test_a_refusal_of_the_operating_system(outcome: dict[str, Any]) -> None:
    found = outcome["file_size_limit"]
    kind, text = found["said"]
    assert kind == "StoreUnwritable" and "File too large" in text and "0.4 MB" in text
    assert found["left"] == ["identity.json", "manifest.json", "small.json"]
    assert found["problems"] == []


def test_a_store_that_may_only_be_read(outcome: dict[str, Any]) -> None:
    found = outcome["no_rights"]
    assert found["read"] == 41
    for attempt in ("write", "replace", "lock"):
        kind, text = found[attempt]
        assert kind == "StoreUnwritable", f"{attempt}: {kind}: {text}"
        assert found["folder"] in text and "Permission denied" in text and "COMPANION_RUNS" in text


def test_a_complete_store_that_may_only_be_read_serves_its_results(outcome: Any) -> None:
    """Looked at first, locked only to write: no result needs the right to write, nor an export."""
    found = outcome["read_only_store"]
    for command in ("again", "list", "export", "barrier"):
        code, output = found[command]
        # Of a network with itself there is no barrier, and the code says so.
        assert code == (INVALID if command == "barrier" else 0), output
    assert "0 to train" in found["again"][1]
    table = found["first"].partition("on cpu")[2]
    assert table.strip() and found["again"][1].partition("on cpu")[2] == table, "the same numbers"


def test_what_may_not_be_read_is_not_taken_for_damaged(outcome: Any) -> None:
    found = outcome["read_only_store"]
    code, output = found["verify"]
    assert code == 1 and "cannot be read (Permission denied)" in output
    assert found["gc"][0] == 0 and "nothing to remove" in found["gc"][1]
    assert found["kept"] == []


# ---- a full disk, a folder that is none


def failing(code: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.fixture
def filled(entry: Entry) -> Entry:
    entry.write_json("kept.json", "kept")
    entry.write_tensors("x.safetensors", TENSORS)
    return entry


def unchanged(entry: Entry) -> bool:
    inside = {p.name for p in entry.path.iterdir()}
    return (
        entry.verify() == []
        and inside == {"identity.json", "manifest.json", "kept.json", "x.safetensors"}
        and same(entry.read_tensors("x.safetensors"), TENSORS)
    )


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(filled: Entry, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    large = {"w": torch.zeros(500_000)}
    for name in ("x.safetensors", "new.safetensors"):
        with monkeypatch.context() as patch, pytest.raises(StoreUnwritable) as caught:
            patch.setattr(os, "fsync", failing(code))
            filled.write_tensors(name, large)
        text = str(caught.value)
        assert str(filled.path) in text and "2.0 MB" in text and os.strerror(code) in text
        assert "free" in text.lower() and "COMPANION_RUNS" in text and "companion runs gc" in text
        assert isinstance(caught.value, CompanionError)
        assert unchanged(filled)
    filled.write_tensors("new.safetensors", large)
    assert filled.verify() == []


def test_disk_that_fills_up_between_the_file_and_the_manifest(
    filled: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = os.fsync, 0

    def second(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(fd)

    for name in ("x.safetensors", "new.safetensors"):
        calls = 0
        with monkeypatch.context() as patch, pytest.raises(StoreUnwritable, match="no space"):
            patch.setattr(os, "fsync", second)
            filled.write_tensors(name, {"w": torch.ones(9)})
        assert calls == 2
        assert filled.verify() == []
        assert same(filled.read_tensors("x.safetensors"), TENSORS)
        assert "new.safetensors" not in filled


def test_no_space_for_the_lock(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", failing(errno.ENOSPC))
    with pytest.raises(StoreUnwritable, match="No space left"), entry.lock():
        raise AssertionError("locked without a lock")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_read_only_file_system(entry: Entry, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """There even ``unlink`` of a file that does not exist is refused."""
    monkeypatch.setattr(Path, "mkdir", failing(code))
    monkeypatch.setattr(Path, "unlink", failing(code))
    with pytest.raises(StoreUnwritable, match=r"cannot be written.*COMPANION_RUNS"):
        entry.write_json("x.json", 1)


def test_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    entry = Store(tmp_path / "file").entry({"kind": "test"})
    with pytest.raises(StoreUnwritable, match=r"file.*Point COMPANION_RUNS"):
        entry._write("x.json", b"1")
    with pytest.raises(StoreUnwritable, match=r"file.*Point COMPANION_RUNS"), entry.lock():
        pass


# ---- damage


def damaged_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [damaged_byte, truncated, Path.unlink])
@pytest.mark.parametrize("name", ["kept.json", "x.safetensors"])
def test_damage_is_found_on_reading(filled: Entry, damage: Any, name: str) -> None:
    damage(filled.path / name)
    read = filled.read_json if name.endswith("json") else filled.read_tensors
    with pytest.raises(CorruptEntry, match=rf"{name} does not match its checksum .*bytes on disk"):
        read(name)
    assert len(filled.verify()) == 1 and name in filled.verify()[0]
    filled.write_json("kept.json", "kept")
    filled.write_tensors("x.safetensors", TENSORS)
    assert filled.verify() == [] and same(filled.read_tensors("x.safetensors"), TENSORS)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b'{"files": null}',
        b'{"files": {"x.safetensors": 3}}',
        b'{"files": {"x.safetensors": {"sha256": "00"}}}',
        b'{"files": {"x.safetensors": {"sha256": "00", "bytes": 1, "file": "../../secret"}}}',
        b"\xff\xfe",
    ],
)
def test_broken_manifest(filled: Entry, text: bytes) -> None:
    (filled.path / "manifest.json").write_bytes(text)
    for attempt in (
        filled.files,
        lambda: filled.read_tensors("x.safetensors"),
        lambda: "x.safetensors" in filled,
        lambda: filled.write_json("y.json", 1),
    ):
        with pytest.raises(CorruptEntry, match=r"manifest\.json is unreadable"):
            attempt()
    assert len(filled.verify()) == 1
    filled.discard()
    assert filled.files() == {}


def test_manifest_whose_key_is_not_the_identity(filled: Entry) -> None:
    (filled.path / "identity.json").write_text('{"kind": "another"}')
    assert "not what its key says" in filled.verify()[0]
    (filled.path / "identity.json").write_text("{")
    assert "unreadable" in filled.verify()[0]


# ---- looking around


def test_find(store: Store) -> None:
    made = [store.entry({"n": n}) for n in range(40)]
    for entry in made:
        entry._write("x.json", b"1")
    keys = sorted(e.key for e in made)
    assert [e.key for e in store.entries()] == keys
    assert {e.identity["n"] for e in store.entries()} == set(range(40))
    assert store.find(keys[7][:12]).key == keys[7]
    assert store.find(keys[7]).identity == store.find(keys[7][:12]).identity
    for prefix, found in ((keys[7][:3], keys[7][:12]), ("zzzz", "none"), ("", keys[0][:12])):
        with pytest.raises(BadParameter, match=f"at least 4 hex digits.*found: .*{found}"):
            store.find(prefix)
    with pytest.raises(BadParameter, match="none"):
        Store(store.root / "nowhere").find("abcd")


def test_find_that_fits_two_entries(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = [Entry(store, {"n": n}, "abcd" + str(n) * 60) for n in (1, 2)]
    for twin in twins:
        twin._write("x.json", b"1")
    with pytest.raises(BadParameter, match="abcd11111111, abcd22222222"):
        store.find("abcd")
    assert store.find("abcd2").key == twins[1].key


def aged(path: Path) -> Path:
    past = time.time() - 7200
    os.utime(path, (past, past))
    return path


def test_garbage(store: Store) -> None:
    entries = [store.entry({"n": n}) for n in range(4)]
    for e in entries:
        e.write_json("x.json", e.identity["n"])
        e.write_json("x.json", [e.identity["n"]])
    good, old, corrupt, littered = entries
    (corrupt.path / corrupt.files()["x.json"]["file"]).write_bytes(b"rubbish")
    leftover = littered.path / ".tmp-123-x.json"
    unlisted = littered.path / "half.safetensors"
    for path in (leftover, unlisted):
        path.write_bytes(b"half")
    young = good.path / ".tmp-456-x.json"
    young.write_bytes(b"at work")

    def is_current(identity: Mapping[str, Any]) -> bool:
        return bool(identity["n"] != 1)

    assert dict(store.garbage(is_current)) == {
        old.path: "made by an older version of the code",
        corrupt.path: "corrupt",
    }, "young files may belong to a writer at work"
    aged(leftover), aged(unlisted)
    for path in good.path.iterdir():
        if path != young:
            aged(path)
    assert dict(store.garbage(is_current)) == {
        old.path: "made by an older version of the code",
        corrupt.path: "corrupt",
        leftover: "left by a killed write",
        unlisted: "not listed in the manifest",
    }
    assert young in dict(store.garbage(is_current, min_age_s=-1.0))
    assert good.read_json("x.json") == [0], "looking for garbage removes nothing"


def test_garbage_beside_a_writer_that_is_at_work(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = store.entry({"n": 1})
    entry.write_json("x.json", 1)
    ghost = entry.path / ".tmp-1-x.json"
    real = Path.iterdir

    def with_ghost(self: Path) -> Iterator[Path]:
        yield from real(self)
        if self == entry.path:
            yield ghost  # renamed between the listing and the look at its age

    monkeypatch.setattr(Path, "iterdir", with_ghost)
    assert store.garbage(lambda _: True) == []


# ---- no pickle


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (builtins.exec, ("raise SystemExit('a pickle was run')",))


def test_a_planted_pickle_is_never_run(entry: Entry, tmp_path: Path) -> None:
    poison = pickle.dumps(Trap())
    torch.save({"w": Trap()}, tmp_path / "poison.pt")
    entry.write_json("x.json", 1)
    for name, content in {
        "x.pkl": poison,
        "state.pt": (tmp_path / "poison.pt").read_bytes(),
        "weights.safetensors": poison,
    }.items():
        entry._write(name, content)  # listed, with the right checksum: the attacker did it well
        with pytest.raises(CorruptEntry, match=f"{name} is no safetensors file"):
            entry.read_tensors(name)
        with pytest.raises(CorruptEntry, match=f"{name} is no JSON file"):
            entry.read_json(name)
    assert entry.verify() == []
    assert next(iter(entry.store.entries())).identity == entry.identity


def test_tensors_come_back_in_the_order_they_were_written_in(tmp_path: Path) -> None:
    """What takes "the middle matrix" of a state dict takes another one if they do not."""
    names = ["z", "head.weight", "b", "a", "m.0", "m.10", "m.2"]
    entry = Store(tmp_path).entry({"kind": "order"})
    tensors = {n: torch.full((i + 1,), float(i)) for i, n in enumerate(names)}
    tensors["count"] = torch.tensor(3)  # other types are stored apart
    entry.write_tensors("w.safetensors", tensors)
    for _ in range(5):
        assert list(entry.read_tensors("w.safetensors")) == [*names, "count"]


def test_tensors_of_an_older_store_come_back_in_one_order(tmp_path: Path) -> None:
    """Without a note of the order it is that of the file, the same at every load."""
    entry = Store(tmp_path).entry({"kind": "order"})
    entry._write("w.safetensors", save({n: torch.zeros(1) for n in "gcfa"}))
    assert [list(entry.read_tensors("w.safetensors")) for _ in range(5)] == [list("acfg")] * 5
