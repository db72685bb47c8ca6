"""Chapter 3 end to end: a tiny run, and the phenomenon it stands on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from papermilled import (
    check_budget,
    check_page,
    figures,
    judged,
    notebook_of,
    run_here,
)

from companion.core.runs import Store
from companion.papers import conditions, llfc

CHAPTER, SECOND = "03_llfc", "03b_conditions"
TINY: dict[str, Any] = {
    "width": 32,
    "widths": [8],
    "steps": 60,
    "spawned": ["resnet8:width=2"],
    "spawned_steps": 16,
    "fork": 0.5,
    "ks": [0],
    "pairs": 1,
    "points": 5,
    "max_error": 100.0,
    "train_examples": 100,
    "test_examples": 60,
    "device": "cpu",
    "workers": 1,
}


source = notebook_of(CHAPTER)
second = notebook_of(SECOND)


@pytest.mark.slow
def test_tiny_runs_of_both_pages_train_once(source: Path, second: Path, store: Store) -> None:
    notebook = run_here(source, **TINY)
    check_page(CHAPTER, notebook, **TINY)
    assert list(figures(notebook)) == [
        "llfc-stitching",
        "llfc-arrows",
        "llfc-layers",
        "llfc-ratios",
        "llfc-coefficient",
        "llfc-lemma",
        "llfc-fork",
        "llfc-width",
        "llfc-rank",
    ]
    by_id = judged(notebook)
    assert list(by_id) == list(llfc.CLAIMS)
    theorem = by_id.pop("A05")
    assert theorem["verdict"] == "reproduced" and "at 0 of" in theorem["detail"]  # at any scale
    # One pair of each kind: nothing to conclude from that.
    for name in by_id:
        assert by_id[name]["verdict"] == "not testable at this scale", name
    assert "one pair" in by_id["A01"]["note"]

    check_budget(CHAPTER, store, **TINY)
    before = {entry.key for entry in store.entries()}
    shared = {k: v for k, v in TINY.items() if k != "ks"}
    conditions_page = run_here(second, **shared)
    check_page(SECOND, conditions_page, **shared)
    assert {entry.key for entry in store.entries()} == before
    assert list(figures(conditions_page)) == [
        "llfc-additivity",
        "llfc-commutativity",
    ]
    by_id = judged(conditions_page)
    assert list(by_id) == list(conditions.CLAIMS)
    assert by_id["A08"]["verdict"] == "reproduced"  # the theorem, on built networks


@pytest.mark.slow
def test_pairs_that_fail_a_gate_leave_gaps_and_no_error(source: Path) -> None:
    """Every pair of the convolutional network is untrained, and copies part at the very end."""
    extreme = {"max_error": 15.0, "fork": 0.95, "pairs": 2, "points": 3}
    notebook = run_here(source, **{**TINY, **extreme})
    by_id = judged(notebook)
    assert list(by_id) == list(llfc.CLAIMS)
    assert by_id["A01"]["verdict"] == "not testable at this scale"
    assert figures(notebook)["llfc-coefficient"]["ResNet-8 (width 2)"] == {"layers": []}
