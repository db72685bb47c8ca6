"""Chapter 3 end to end: plain papermill with tiny parameters, and the phenomenon it stands on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import papermill
import pytest
from papermilled import build, entries, run

from companion import data
from companion.core.runs import Store
from companion.experiments.aligned import pairs_of
from companion.experiments.featured import Scope, survey
from companion.experiments.featured_stats import after_first
from companion.experiments.methods import Method
from companion.training import Recipe

CHAPTER = "03_llfc"
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


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chapter as `make notebooks` writes it, in a folder of the test."""
    return build(CHAPTER, tmp_path_factory.mktemp("book"))


def test_plain_papermill_runs_the_chapter(source: Path, tmp_path: Path) -> None:
    notebook = run(source, tmp_path, **TINY)
    names = [figure["name"] for figure in entries(notebook, "figure")]
    assert [name for name in names if "recorded" not in name] == [
        "llfc-layers",
        "llfc-coefficient",
        "llfc-additivity",
        "llfc-commutativity",
        "llfc-lemma",
        "llfc-stitching",
        "llfc-rank",
        "llfc-fork",
        "llfc-width",
    ]
    (verdicts,) = entries(notebook, "claims")
    assert [v["claim"]["id"] for v in verdicts] == [f"A{n:02d}" for n in range(1, 15)]
    by_id = {v["claim"]["id"]: v for v in verdicts}
    # What is exact at any scale: the theorem on built networks, and the mixture of logits.
    assert by_id["A08"]["verdict"] == "reproduced"
    assert "mixed logits exceed it at 0 of" in by_id["A05"]["detail"]
    # One pair of each kind: nothing to conclude from that.
    for name in ("A01", "A02", "A04", "A07", "A11", "A13", "A14"):
        assert by_id[name]["verdict"] == "not testable at this scale", name
    assert "one pair" in by_id["A01"]["note"]
    stitching = next(t for t in entries(notebook, "table") if "Stitching" in t["caption"])
    assert {row[-1] for row in stitching["rows"]} == {"yes"}
    checked = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    for words in ("1 − cos = 2, 1 − |cos| = 0", "0 ReLU modules", "569,354 numbers an image"):
        assert words in checked
    (command,) = entries(notebook, "rerun")
    assert "-p steps 60" in command and "-p dataset" not in command
    (record,) = entries(notebook, "provenance")
    assert record["dataset"]["sha256"] == data.load("digits").fingerprint


def test_pairs_that_fail_a_gate_leave_gaps_and_no_error(source: Path, tmp_path: Path) -> None:
    """Every pair of the convolutional network is untrained, and copies part at the very end."""
    extreme = {"max_error": 15.0, "fork": 0.95, "pairs": 2, "ks": [0]}
    notebook = run(source, tmp_path, **{**TINY, **extreme})
    (verdicts,) = entries(notebook, "claims")
    by_id = {v["claim"]["id"]: v for v in verdicts}
    assert by_id["A01"]["verdict"] == "not testable at this scale"
    areas = next(t for t in entries(notebook, "table") if "ROC" in t["caption"])
    assert {row[2] for row in areas["rows"] if row[0].startswith("resnet8")} == {"—"}
    drawn = {f["name"]: f["data"] for f in entries(notebook, "figure")}
    assert "layers" not in drawn["llfc-additivity"]["resnet8:width=2"]
    written = "".join(
        output["data"].get("text/markdown", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "data" in output
    )
    assert "a factor of nan" not in written


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"datset": "mnist"}, ["datset", "Did you mean 'dataset'"]),
        ({"fork": 1.0}, ["fork", "share"]),
        ({"ks": [16]}, ["ks", "16", "T = 16"]),
        ({"dataset": "cifar100"}, ["cifar100", "companion data get cifar100"]),
    ],
)
def test_bad_parameters_end_before_anything_trains(
    source: Path,
    tmp_path: Path,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    parameters: dict[str, Any],
    words: list[str],
) -> None:
    monkeypatch.setenv("COMPANION_DATA", str(tmp_path / "no-data"))
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        run(source, tmp_path, **{**TINY, **parameters})
    for word in words:
        assert word in caught.value.evalue
    assert list(store.entries()) == []


def test_matching_connects_features_of_a_perceptron(store: Store) -> None:
    """The issue's numbers, on the chapter's narrower perceptron: two pairs of 3 x 128 units."""
    recipe = Recipe(
        net="mlp:widths=128x3",
        data="digits",
        steps=500,
        batch=48,
        lr=0.1,
        schedule="step",
        milestones=(0.85,),
    )
    pairs = pairs_of(recipe, 2)
    groups = {n: [(p, Method(n)) for p in pairs] for n in ("naive", "weights")}
    found = survey(groups, Scope(points=5, parts=()), store=store, workers=1, max_error=5.0)
    for before, after in zip(found["naive"], found["weights"], strict=True):
        assert before.height() > 30 and after.height() < 2
        for layer, gap in after_first(before.gaps()).items():
            assert gap >= 3 * after.gaps()[layer], layer
        assert before.ratios()["head"] > 1 and after.ratios()["head"] <= 0.25
        # The ratio alone is small in hidden layers of pairs that are not connected.
        assert before.ratios()["layer2.linear"] < 0.5
