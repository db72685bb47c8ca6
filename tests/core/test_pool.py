"""Many jobs at once: the same answers, in the same order, whatever the number of workers."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from joblib import cpu_count

from companion.core import locations, pool
from companion.core.errors import BadParameter, StoreUnwritable
from companion.core.pool import keep_memory, one_thread, resolve_workers, run_all


def glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def look(item: int) -> dict[str, object]:
    """What a job sees: where it runs and with how many threads; every fourth one is refused."""
    if item % 4 == 3:
        raise BadParameter(f"item {item} is refused")
    return {
        "item": item,
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "runs": str(locations.runs_root()),
        "data": str(locations.data_root()),
        "sum": float(torch.arange(10_000, dtype=torch.float32).mul(0.1 * item).sum()),
    }


def full_disk(item: int) -> None:
    raise StoreUnwritable("the disk is full")


@pytest.fixture
def two_threads() -> object:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_one_thread_inside_and_as_before_outside(two_threads: object) -> None:
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError), one_thread():
        _ = 1 / 0
    assert torch.get_num_threads() == 2


def faults_of_steps(keep: bool) -> int:
    """Page faults of what a training step does: sixteen times 4 MB, then all of it freed."""
    import resource

    if keep:
        assert keep_memory()

    def step() -> None:
        _ = [torch.ones(1 << 20) for _ in range(16)]

    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.slow
@pytest.mark.skipif(not glibc(), reason="glibc's malloc has this option, others do not")
def test_workers_keep_what_they_free() -> None:
    """In a process of its own: the option cannot be taken back."""
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_pool import faults_of_steps\n"
        "print(faults_of_steps(False), faults_of_steps(True))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    usual, kept = map(int, done.stdout.split())
    assert kept < usual / 4, (usual, kept)


def test_workers_are_told_to_keep_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(pool, "keep_memory", lambda: called.append(1))
    pool._call(str, 3, {}, None)
    assert called == [1]


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool.ctypes, "CDLL", lambda _: object())
    assert pool.keep_memory.__wrapped__() is False
    monkeypatch.setattr(pool.sys, "platform", "darwin")
    assert pool.keep_memory.__wrapped__() is False


def test_workers_are_resolved() -> None:
    assert resolve_workers(3) == 3
    assert resolve_workers(0) == cpu_count() >= 1
    with pytest.raises(BadParameter, match=r"workers: -1 must be 0 \(one per core\) or more"):
        resolve_workers(-1)
    with pytest.raises(BadParameter, match="workers"):
        run_all(look, [0], workers=-1)


def test_one_worker_runs_here(two_threads: object, runs_root: Path) -> None:
    found = run_all(look, [2, 0, 1], workers=1)
    assert [f["item"] for f in found] == [2, 0, 1]
    assert {f["pid"] for f in found} == {os.getpid()}
    assert {f["threads"] for f in found} == {1}, "also a job in this process computes with one"
    assert torch.get_num_threads() == 2
    assert run_all(look, [], workers=0) == []
    with pytest.raises(BadParameter, match="item 3 is refused"):
        run_all(look, [1, 3], workers=1)
    assert torch.get_num_threads() == 2


@pytest.mark.slow
def test_two_workers_run_elsewhere_and_agree(
    two_threads: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [8, 0, 5, 1, 4, 2, 6, 9]
    for name in ("first", "second"):  # workers are kept; folders must be those of this call
        monkeypatch.setenv("COMPANION_RUNS", str(tmp_path / name))
        monkeypatch.setenv("COMPANION_DATA", str(tmp_path / name / "data"))
        there = run_all(look, items, workers=2)
        here = run_all(look, items, workers=1)
        assert [f["item"] for f in there] == items
        assert os.getpid() not in {f["pid"] for f in there}
        assert {f["threads"] for f in there} == {1}
        assert {f["runs"] for f in there} == {str(tmp_path / name)}
        assert {f["data"] for f in there} == {str(tmp_path / name / "data")}
        assert [f["sum"] for f in there] == [f["sum"] for f in here]
    # A GPU has one owner: with its name the jobs run here, whatever was asked for.
    assert {f["pid"] for f in run_all(look, items, workers=2, device="cuda:0")} == {os.getpid()}


@pytest.mark.slow
def test_an_error_of_a_worker_arrives_as_what_it_was() -> None:
    with pytest.raises(StoreUnwritable, match=r"^the disk is full$"):
        run_all(full_disk, [1, 2, 3], workers=2)
    assert len(run_all(look, [0, 1, 2], workers=2)) == 3, "the pool is of use afterwards"


@pytest.mark.slow
def test_a_worker_that_grows_is_kept() -> None:
    """loky ends workers that grew by 300 MB, with a warning that kills its manager thread here."""
    sizes = [0, 0, 130_000_000, 0, 0, 0]  # float32: 520 MB from the second job of a worker on
    pids = run_all(_grow, sizes, workers=2)
    assert len(set(pids)) == 2


_kept: list[torch.Tensor] = []


def _grow(size: int) -> int:
    if size:
        _kept.append(torch.zeros(size))
    time.sleep(1.2)  # loky looks once a second
    return os.getpid()
