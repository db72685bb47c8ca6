"""Every kind of measurement keeps one protocol: stored, read, stale, corrupt, closed, counted."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import on_gpu
import pytest
from commands import run
from everykind import ASKED, COPIES, FEDERATION, FEW, STRANGERS, A, B

from companion.cli.runs import describe_entry, is_current
from companion.core import closing
from companion.core.errors import NotMeasured
from companion.core.runs import Entry, Store
from companion.experiments import measurement
from companion.experiments.aligned import MatchedLine
from companion.experiments.budget import count
from companion.experiments.federated import FederatedRun
from companion.experiments.measurement import kinds
from companion.experiments.merged import Merge
from companion.experiments.methods import Method
from companion.experiments.pairs import NullControl, PairBarrier

GOLDEN = json.loads(Path(__file__).with_name("golden_entries.json").read_bytes())
every_kind = pytest.mark.parametrize("kind", ASKED)


def golden(kind: str) -> dict[str, Any]:
    """The stored entry of a kind: identity, and the JSON value by file name."""
    (found,) = [e for e in GOLDEN if json.loads(e["identity"])["kind"] == kind]
    return {"identity": json.loads(found["identity"]), "files": found["files"]}


def write(store: Store, kind: str, **change: Any) -> Entry:
    """The golden entry in a store that has no network, perhaps with another identity."""
    found, file = golden(kind), kinds()[kind].FILE
    entry = store.entry(found["identity"] | change)
    entry.write_json(file, found["files"][file])
    return entry


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*_: object, **__: object) -> None:
        raise AssertionError("trained or measured")

    monkeypatch.setattr(measurement, "train", no)
    monkeypatch.setattr(measurement, "_make", no)


def test_every_kind_is_registered_and_tested() -> None:
    assert set(ASKED) == set(kinds())
    # It runs before the package can be imported, so its list is written by hand.
    assert set(on_gpu.MEASURED) == {*kinds(), "recording", "windows"}


@every_kind
def test_what_is_measured_needs_no_networks(kind: str, store: Store, no_training: None) -> None:
    """Also what an older version stored: the golden entries were made by one."""
    entry = write(store, kind)
    ASKED[kind](store)
    assert [e.key for e in store.entries()] == [entry.key]


@every_kind
def test_a_corrupt_value_is_said_and_measured_again(
    kind: str, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cls = kinds()[kind]
    value = golden(kind)["files"][cls.FILE]
    entry = write(store, kind)
    (entry.path / cls.FILE).write_text("{")
    trained: list[object] = []
    monkeypatch.setattr(measurement, "train", lambda jobs, **_: trained.extend(jobs))
    monkeypatch.setattr(cls, "measure", lambda *_: value)
    with caplog.at_level(logging.WARNING, logger="companion"):
        ASKED[kind](store)
    assert [r.getMessage().endswith("measured again") for r in caplog.records] == [True]
    assert entry.read_json(cls.FILE) == value
    assert bool(trained) == (kind != "federated"), "what it needs was trained"


@every_kind
def test_what_is_missing_is_noted_while_a_recording_is_closed(kind: str, store: Store) -> None:
    with closing.closed({"device": "cpu"}) as lacking:
        if kind == "pair":
            assert not ASKED[kind](store)[0].measured
        elif kind == "null":
            assert ASKED[kind](store).passed is None
        else:
            with pytest.raises(NotMeasured, match="1 of 1"):
                ASKED[kind](store)
    assert {k: len(keys) for k, keys in lacking.items()} == {kind: 1}
    assert not list(store.entries())


@every_kind
def test_what_older_code_measured_is_stale(kind: str, store: Store) -> None:
    identity = golden(kind)["identity"]
    current = write(store, kind)
    changes = [{"semantics": 0}] if kinds()[kind].SEMANTICS else []
    if "evaluation" in identity:
        changes.append({"evaluation": identity["evaluation"] | {"semantics": 0}})
    old = {write(store, kind, **change).key for change in changes}
    assert old and is_current(store)(current.identity)
    told = run("runs", "gc", "--dry-run").stdout
    assert f"{len(old)} to remove" in told
    assert all(key in told for key in old) and current.key not in told


@every_kind
def test_every_kind_is_described(kind: str) -> None:
    identity = golden(kind)["identity"]
    assert describe_entry(identity) not in ("unreadable", kind)
    assert describe_entry({"kind": kind}) == "unreadable"


def test_equal_tasks_are_measured_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def measure(*_: object) -> dict[str, int]:
        made.append("x")
        return {"n": len(made)}

    monkeypatch.setattr(Merge, "measure", measure)
    monkeypatch.setattr(measurement, "train", lambda *_, **__: None)
    tasks = [Merge((A, B), FEW), Merge((B, A), FEW), Merge((A, B), FEW)]
    found = measurement.run(tasks, store=store, workers=1)
    assert found == [{"n": 1}, {"n": 2}, {"n": 1}] == measurement.run(tasks, store=store)


def test_a_budget_counts_measurements_and_what_they_train(store: Store) -> None:
    line = MatchedLine(STRANGERS, Method("weights"), FEW, ("temperature", "repair"))
    forks = [PairBarrier(COPIES, FEW), NullControl(COPIES.a, FEW)]
    plans = [forks, [line, FederatedRun(FEDERATION, 0)]]

    def budget() -> list[Any]:
        return count(plans, store=store, device="cpu")

    copies, plain = budget()
    # A trunk to step 2, two copies of 2 steps, and one of them again.
    assert (copies.whole.runs, copies.whole.steps) == (4, 8)
    assert copies.whole.measured == {"pair": 1, "null": 1}
    # Two networks, and two clients that a federation trains itself.
    assert (plain.whole.runs, plain.whole.steps) == (4, 16)
    assert plain.whole.measured == {"aligned": 1, "federated": 1}
    assert (copies.missing, plain.missing) == (copies.whole, plain.whole)
    assert copies.whole.points == 3 * 3 + 4, "three BatchNorm modes"
    for kind in ("null", "aligned"):
        write(store, kind)
    copies, plain = budget()
    assert (copies.missing.runs, copies.missing.measured) == (3, {"pair": 1})
    # The line is measured: its networks, which are not here, are not counted as missing.
    assert (plain.missing.runs, plain.missing.measured) == (2, {"federated": 1})
    for kind in ("pair", "federated"):
        write(store, kind)
    assert not any(cost.missing for cost in budget())
