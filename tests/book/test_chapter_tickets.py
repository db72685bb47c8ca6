"""The chapter on lottery tickets end to end: a tiny run, and a record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from papermilled import (
    check_budget,
    check_page,
    figures,
    filled,
    judged,
    notebook_of,
    run_here,
    values,
)

from companion.core.runs import Store

CHAPTER = "01b_tickets"
TINY: dict[str, Any] = {
    "net": "mlp:widths=16x2",
    "steps": 40,
    "batch": 32,
    "ks": [0, 10],
    "dense_ks": [],
    "level": 2,
    "levels": [1, 2],
    "control_levels": [2],
    "inits": 2,
    "points": 3,
    "train_examples": 100,
    "device": "cpu",
    "workers": 1,
}


source = notebook_of(CHAPTER)


@pytest.mark.slow
def test_a_tiny_run_of_the_chapter(source: Path, store: Store) -> None:
    notebook = run_here(source, **TINY)
    record = check_page(CHAPTER, notebook, **TINY)
    names = ["density", "density-late", "quadrants", "onset", "chain", "carried"]
    drawn = figures(notebook)
    assert list(drawn) == names
    by_id = judged(notebook)
    assert list(by_id) == [
        *("C09", "C10", "C11", "C12", "C18", "C19", "C20", "C21", "C22"),
        *(f"I{number:02d}" for number in range(1, 8)),
    ]
    for id in ("C18", "C19", "C21", "C22", "I03", "I05", "I06", "I07"):
        assert by_id[id]["verdict"] == "not testable at this scale"
    curves = drawn["density"]
    assert curves["error: IMP, test"]["k"] == [0, 1, 2]  # levels, from the whole network on
    assert curves["error: pruned at random, test"]["k"] == [0, 2]
    assert set(drawn["chain"]["the whole network"]) == {"T", "k = 0", "k = 10"}
    assert record["recipe"]["net"] == TINY["net"]
    text = filled(notebook, CHAPTER)
    assert "Two copies of the whole three-layer perceptron that part" in text and "{{" not in text
    assert "pairs of copies of this page" in text
    check_budget(CHAPTER, store, **TINY)


@pytest.mark.slow
def test_one_k_and_nothing_carried_over(source: Path) -> None:
    few = {**TINY, "ks": [0], "carried": False, "skip": [], "steps": 3, "test_examples": 60}
    notebook = run_here(source, **few)
    assert list(figures(notebook)) == ["density", "quadrants", "onset", "chain"]
    by_id = judged(notebook)
    assert "left out of this run" in by_id["I04"]["note"]
    found = values(notebook)
    assert found["weights"] == "all layers" and found["new_permuted"] == "not measured"
    assert "have a dead end, and no barrier" in found["dead_sentence"]  # after three steps
    assert "{{" not in filled(notebook, CHAPTER)
