"""Chapter 6 end to end: a tiny run, and the phenomena it stands on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from papermilled import (
    check_budget,
    check_page,
    entries,
    figures,
    filled,
    judged,
    notebook_of,
    pictures,
    run_here,
    values,
)

from companion import data
from companion.core.runs import Store

CHAPTER = "06_landscape"
TINY: dict[str, Any] = {
    "net": "mlp:widths=12x3",
    "steps": 80,
    "ks": [0, 4, 8, 16],
    "looks": [0.3, 0.6, 1.0],
    "inits": 2,
    "bend_steps": 5,
    "points": 9,
    "train_examples": 120,
    "test_examples": 60,
    "device": "cpu",
    "workers": 1,
}


source = notebook_of(CHAPTER)


@pytest.mark.slow
def test_a_tiny_run_of_the_chapter(source: Path, store: Store) -> None:
    notebook = run_here(source, **TINY)
    record = check_page(CHAPTER, notebook, **TINY)
    assert list(figures(notebook)) == [
        "descent",
        "apart",
        "predictors",
        "annealing",
        "landscape-layers",
        "examples",
        "bends",
    ]
    assert [table["name"] for table in entries(notebook, "table")] == ["toys", "ranks", "logits"]
    by_id = judged(notebook)
    for name in ("L18", "L21"):  # exact at any scale
        assert by_id[name]["verdict"] == "reproduced", name
    for name in ("L16", "L17"):
        assert "two initialisations make one pair" in by_id[name]["note"]
    assert record["network"]["steps"] == 80
    text = filled(notebook, CHAPTER)
    assert "that part at step 16" in text and "Without a departure nothing is left" in text
    check_budget(CHAPTER, store, **TINY)


@pytest.mark.slow
def test_images_of_the_users_own_and_no_curves(source: Path, tmp_path: Path) -> None:
    name = pictures(tmp_path, 240)
    few = {**TINY, "dataset": name, "ks": [0, 8], "looks": [1.0], "bends": 0}
    notebook = run_here(source, **few)
    (record,) = entries(notebook, "provenance")
    assert record["dataset"]["sha256"] == data.load(name).fingerprint
    by_id = judged(notebook)
    assert "curves were left out" in by_id["L19"]["note"]
    assert "four k or more" in by_id["L01"]["note"]
    assert "no step was looked at" in by_id["L10"]["note"]
    assert "did not look often enough" in values(notebook)["ridge_sentence"]
    assert "bends" not in figures(notebook)
