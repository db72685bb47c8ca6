"""Chapter 4 end to end: a tiny run, and the phenomena it stands on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from papermilled import (
    ROOT,
    check_page,
    entries,
    figures,
    judged,
    notebook_of,
    pictures,
    run_here,
    values,
)

from companion import data, models
from companion.book import recording
from companion.book.layout import Book
from companion.core.runs import Store
from companion.report import claims

CHAPTER, FEDERATED = "04_layerwise", "04b_federated"
TINY: dict[str, Any] = {
    "net": "resnet8:width=4,norm=none",
    "plain": "vgg11:width=2,norm=layer",
    "others": ["resnet8:width=2,norm=batch"],
    "steps": 40,
    "batch": 32,
    "inits": 1,
    "looks": 2,
    "window": 3,
    "draws": 1,
    "max_error": 100.0,
    "train_examples": 60,
    "device": "cpu",
    "workers": 1,
}
CLIENTS: dict[str, Any] = {
    "net": "resnet8:width=4,norm=none",
    "steps": 40,
    "batch": 32,
    "pairs": 1,
    "train_examples": 60,
    "client_net": "mlp:widths=8x2",
    "client_steps": 4,
    "seeds": 1,
    "device": "cpu",
    "workers": 1,
}


source = notebook_of(CHAPTER)
federated = notebook_of(FEDERATED)


@pytest.mark.slow
def test_a_tiny_run_of_the_chapter(source: Path) -> None:
    notebook = run_here(source, **TINY)
    record = check_page(CHAPTER, notebook, **TINY)
    assert list(figures(notebook)) == [
        "toy",
        "layers",
        "cumulative",
        "layerwise-time",
        "heatmap",
        "layerwise-regimes",
        "directions",
        "subspaces",
    ]
    by_id = judged(notebook)
    # What is exact at any scale.
    for name in ("B04", "B08", "B09"):
        assert by_id[name]["verdict"] == "reproduced", name
    # One pair: nothing to conclude from that.
    for name in ("B01", "B02", "B05", "B07", "B12"):
        assert by_id[name]["verdict"] == "not testable at this scale", name
    assert "one pair" in by_id["B01"]["note"]
    rows = [row for table in entries(notebook, "table") for row in table["rows"]]
    normed = "ResNet-8 (width 2), T = 40, BatchNorm re-estimated"
    assert any(normed in str(row) for row in rows)
    assert record["residual"]["net"] == models.canonical(TINY["net"])
    # Prose follows the run.
    filled = values(notebook)
    assert "B01 (one pair decides nothing)" in filled["untested"]
    assert filled["middle"] == 40 and "the costliest is window" in filled["where"]


@pytest.mark.slow
def test_a_tiny_run_of_the_page_on_federated_learning(federated: Path) -> None:
    notebook = run_here(federated, **CLIENTS)
    check_page(FEDERATED, notebook, **CLIENTS)
    assert list(figures(notebook)) == ["federated"]
    by_id = judged(notebook)
    assert {c.id for c in claims.registry().values() if c.chapter == FEDERATED} == set(by_id)
    assert "fewer than three seeds" in by_id["B15"]["note"]
    (table,) = entries(notebook, "table")
    assert [row[0] for row in table["rows"]] == ["very different", "similar"]
    (record,) = entries(notebook, "provenance")
    assert record["residual"]["steps"] == 10 and record["clients"]["steps"] == 4
    notebook = run_here(federated, **{**CLIENTS, "pairs": 0})
    assert "never average were left out" in judged(notebook)["B14"]["note"]
    assert not entries(notebook, "table") and "left out" in values(notebook)["below"]


@pytest.mark.slow
def test_both_pages_run_on_images_of_the_users_own(
    source: Path, federated: Path, tmp_path: Path
) -> None:
    name = pictures(tmp_path, 240)
    notebook = run_here(source, **{**TINY, "dataset": name, "others": [], "steps": 20})
    (record,) = entries(notebook, "provenance")
    assert record["dataset"]["sha256"] == data.load(name).fingerprint
    notebook = run_here(federated, **{**CLIENTS, "dataset": name, "clients": 3, "pairs": 0})
    (record,) = entries(notebook, "provenance")
    assert record["dataset"]["sha256"] == data.load(name).fingerprint


@pytest.mark.slow
def test_chapter_1s_networks_with_chosen_checkpoints_and_no_controls(source: Path) -> None:
    few = {**TINY, "net": "resnet8:width=4", "others": [], "checkpoints": [10], "controls": False}
    notebook = run_here(source, **{**few, "steps": 24, "together": False})
    drawn = figures(notebook)
    assert "layers" in drawn and not {"cumulative", "directions"} & set(drawn)
    assert drawn["heatmap"]["steps"] == [0, 10, 24]
    by_id = judged(notebook)
    assert "controls were left out" in by_id["B11"]["note"]
    for name in ("B04", "B05", "B06", "B10", "B17"):
        assert "groups of layers and random directions were left out" in by_id[name]["note"], name
    assert "has BatchNorm" in by_id["B01"]["note"]
    (record,) = entries(notebook, "provenance")
    assert record["residual"]["schedule"] == "step"  # as chapter 1 trains them
    assert record["residual"]["weight_decay"] == 1e-4


def test_the_budget_counts_the_clients(store: Store) -> None:
    said: list[str] = []
    ready = recording.prepare(Book(ROOT), FEDERATED, "quick", ["seeds=1"])
    recording.record(ready, dry_run=True, say=said.append)
    assert "60 of 60 runs to train" in said[0] and said[0].endswith("federated 12 of 12")
    assert "8 of 8 runs to train" in said[1] and said[1].endswith("federated 4 of 4")


# The residual network of the chapter.
