"""Chapter 5 end to end: a tiny run, and the phenomenon it stands on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from neox import STEPS, train
from papermilled import check_page, entries, figures, judged, notebook_of, run_here

from companion import data, models
from companion.core.errors import BadParameter, MissingData
from companion.core.runs import Store
from companion.papers import gpt as paper

CHAPTER = "05_gpt"
TINY: dict[str, Any] = {
    "dataset": "pydoc?vocab=320&window=16",
    "net": "gpt:layers=2,width=16,heads=2",
    "steps": 10,
    "batch": 8,
    "ks": [4],
    "inits": 2,
    "looks": [0],
    "points": 3,
    "windows": 12,
    "train_windows": 4,
    "max_error": 100.0,
    "device": "cpu",
    "workers": 1,
}


source = notebook_of(CHAPTER)


@pytest.mark.slow
def test_a_tiny_run_of_the_chapter(source: Path, tmp_path: Path) -> None:
    """With two trainings that somebody published."""
    for seed in (1, 2):
        train(tmp_path / "seeds" / f"seed{seed}", seed)
    more: dict[str, Any] = {
        "published": str(tmp_path / "seeds"),
        "published_text": "pydoc?window=16",
    }
    notebook = run_here(source, **TINY, **more)
    record = check_page(CHAPTER, notebook, **TINY, **more)
    drawn = figures(notebook)
    kinds = ("instability", "matching", "heatmap", "parts", "groups", "features")
    assert list(drawn) == [*(f"gpt-{kind}" for kind in kinds), "gpt-published"]
    assert len(drawn["gpt-matching"]["barriers"]) == len(paper.WAYS)
    for line in ("as trained", "… and the stream permuted", paper.WAYS["rotated"]):
        assert drawn["gpt-published"][line]["k"] == list(STEPS)
    by_id = judged(notebook)
    assert list(by_id) == ["B13", *(f"G{n:02d}" for n in range(1, 10))]
    assert by_id["G01"]["value"] < 0.01 and by_id["G01"]["n"] == 2
    # Two initialisations make one pair, and ten steps teach nothing.
    for name in ("B13", "G01", "G03", "G04", "G05", "G06", "G07", "G08"):
        assert by_id[name]["verdict"] == "not testable at this scale", name
    assert by_id["G02"]["verdict"] != "reproduced"
    assert record["network"]["net"] == models.canonical(TINY["net"])
    # The windows that all were scored on, by their hash, on the page and in the store.
    digest = data.text.windows_digest(data.load(TINY["dataset"]).test.head(TINY["windows"]))
    assert record["evaluation_windows"] == digest
    tables = {table["name"]: table["values"] for table in entries(notebook, "table")}
    assert list(tables) == ["gpt-text", "gpt-trained"] and tables["gpt-text"]["digest"] == digest
    assert len(data.text.load_windows(digest, Store())) == TINY["windows"]
    # Layers as the paper counts them, and the tied embedding once.
    for kind in ("same", "different"):
        layers = drawn["gpt-parts"][kind]["layers"]
        assert len(layers) == len(set(layers)) == 3 + 2 * 3
        assert layers[0] == "embedding = output" and "output" not in layers


@pytest.mark.slow
def test_wikitext_by_one_command(source: Path) -> None:
    """WikiText-2 as it is for development: validation and test text, under a data root."""
    name = "wikitext2?train=test&vocab=320&window=16"
    try:
        text = data.load(name)
    except MissingData as e:
        pytest.skip(str(e))
    small = {**TINY, "dataset": name, "inits": 2, "steps": 6, "ks": [2]}
    notebook = run_here(source, **small)
    (record,) = entries(notebook, "provenance")
    assert record["dataset"] == {"name": text.label, "sha256": text.fingerprint}
    assert "WikiText-2" in text.label and "test" in text.label


@pytest.mark.slow
def test_an_untied_network_with_one_head_and_no_biases(source: Path) -> None:
    net = "gpt:layers=1,width=16,heads=1,bias=false,tied=false"
    drawn = figures(run_here(source, **{**TINY, "net": net, "steps": 6, "ks": [2]}))
    assert drawn["gpt-features"]["places"] == ["block 1", "last norm", "output"]
    assert {"output", "embedding"} <= set(drawn["gpt-heatmap"]["same"])
    assert "gpt-published" not in drawn  # a note says how to get one


@pytest.mark.slow
def test_networks_that_did_not_train_end_in_a_sentence(source: Path) -> None:
    """With the check as it is by default, and too few steps to beat the commonest token."""
    small = {k: v for k, v in TINY.items() if k != "max_error"}
    with pytest.raises(BadParameter, match="no pair trained"):
        run_here(source, **{**small, "steps": 4, "ks": [2]})
