"""Chapter 2's pages end to end: a tiny run, and what they stand on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from papermilled import (
    check_page,
    entries,
    figures,
    judged,
    notebook_of,
    pictures,
    printed,
    run_here,
    values,
)

from companion import data
from companion.report import claims

CHAPTER, MERGING = "02_git_rebasin", "02b_merging"
SHARED: dict[str, Any] = {
    "width": 16,
    "steps": 40,
    "batch": 32,
    "pairs": 1,
    "points": 5,
    "train_examples": 100,
    "device": "cpu",
    "workers": 1,
}
TINY: dict[str, Any] = {**SHARED, "widths": [8], "ste_steps": 2}
FEWER: dict[str, Any] = {**SHARED, "points": 3}
LEAST: dict[str, Any] = {**TINY, **FEWER, "looks": [20]}
LEAST |= {"wide_decay": 0.0, "map_pairs": 0, "ste_steps": 0}
FIGURES = ["swap", "plane", "line", "width", "time", "map", "controls"]


source = notebook_of(CHAPTER)
merging = notebook_of(MERGING)


def figure_names(notebook: Any) -> list[str]:
    return [name.removeprefix("rebasin-") for name in figures(notebook)]


@pytest.mark.slow
def test_a_tiny_run_of_the_chapter(source: Path) -> None:
    notebook = run_here(source, **TINY)
    check_page(CHAPTER, notebook, **TINY)
    assert figure_names(notebook) == FIGURES
    by_id = judged(notebook)
    # One pair, two widths, a narrow network, digits: what has no premise is not judged.
    for name, why in {
        "R01": "one pair",
        "R02": "512 units",
        "R05": "MNIST",
        "R09": "four widths",
        "R10": "one pair",
        "R34": "ResNet-20",
        "R36": "two valid pairs",
        "R37": "32 times",
        "R38": "CIFAR-10",
        "R41": "no barrier to remove",
        "R42": "one pair",
    }.items():
        assert by_id[name]["verdict"] == "not testable at this scale", name
        assert why in by_id[name]["note"]
    # What needs no training holds at every scale.
    assert {by_id[name]["verdict"] for name in ("R26", "R27", "R39")} == {"reproduced"}
    assert by_id["R28"]["verdict"] == "not reproduced"
    said = printed(notebook)
    assert "found again: True" in said and "the same outputs: True" in said
    assert said.count("% wrong\n") == 4
    # Prose follows the run: claims without a premise are named.
    filled = values(notebook)
    assert "R05 (the claim is about MNIST" in filled["untested"]
    assert filled["pairs"] == "one pair"
    assert filled["network"].startswith("four-layer perceptron")
    assert set(figures(notebook)["rebasin-line"]) == {"test error", "test loss"}


@pytest.mark.slow
def test_a_tiny_run_of_the_page_on_merging(merging: Path) -> None:
    notebook = run_here(merging, **SHARED, many=3, halves=2, merges=2)
    check_page(MERGING, notebook, **SHARED)
    assert figure_names(notebook) == ["merge", "split"]
    by_id = judged(notebook)
    assert {c.id for c in claims.registry().values() if c.chapter == MERGING} == set(by_id)
    assert "one pair" in by_id["R16"]["note"] and by_id["R15"]["n"] == 2
    assert "saw their data" in by_id["R14"]["note"]
    assert by_id["R13"]["verdict"] in ("reproduced", "not reproduced", "undetermined")
    assert by_id["R43"]["n"] == 2 and by_id["R43"]["verdict"] != "not testable at this scale"
    told = values(notebook)
    assert float(told["passes_share"]) <= float(told["c2m3_share"]) and float(told["defect"]) > 0
    assert "does not decide" in values(notebook)["corrected_or_merged"]
    assert "passes until nothing moves" in printed(notebook)


@pytest.mark.slow
def test_parts_can_be_left_out(source: Path, merging: Path) -> None:
    notebook = run_here(source, **LEAST)
    assert figure_names(notebook) == [n for n in FIGURES if n != "map"]
    by_id = judged(notebook)
    for n in (4, 7, 21, 23, 24, 25):
        assert by_id[f"R{n:02d}"]["verdict"] == "not testable at this scale", n
    notebook = run_here(merging, **FEWER, many=0, halves=0, split=False)
    assert figure_names(notebook) == []
    assert {v["verdict"] for v in judged(notebook).values()} == {"not testable at this scale"}
    assert values(notebook)["same_merged_loss"] == "not measured"


@pytest.mark.slow
def test_a_network_with_batchnorm_on_images_of_the_users_own(
    source: Path, merging: Path, tmp_path: Path
) -> None:
    name = pictures(tmp_path, 120)
    net = "resnet8:width={width},norm=batch"
    own = {"dataset": name, "net": net, "width": 8, "steps": 60, "lr": 0.02}
    notebook = run_here(source, **{**LEAST, **own, "widths": [4]})
    (record,) = entries(notebook, "provenance")
    assert record["dataset"]["sha256"] == data.load(name).fingerprint
    drawn = figures(notebook)["rebasin-width"]
    assert "weight matching, statistics interpolated, test" in drawn
    # The mode of the headline is named, and it is what is drawn without a mode's name.
    (scale,) = {c["scale"] for group in entries(notebook, "claims") for c in group}
    assert "BatchNorm reestimate" in scale
    assert "reestimate" in values(notebook)["network"]
    assert (
        drawn["weight matching, test"]["mean"]
        != drawn["weight matching, statistics interpolated, test"]["mean"]
    )
    notebook = run_here(merging, **{**FEWER, **own}, many=0, halves=0)
    assert figure_names(notebook) == ["split"]
