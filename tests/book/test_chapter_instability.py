"""Chapter 1 end to end: plain papermill with tiny parameters, and the phenomena it stands on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from papermilled import check_page, figures, filled, judged, notebook_of, run, run_here

from companion import data
from companion.core.runs import Store
from companion.experiments.instability import Instability, analyse
from companion.experiments.pairs import Evaluation
from companion.training import Recipe

CHAPTER = "01_instability"
TINY: dict[str, Any] = {
    "unstable": "mlp:widths=16x2",
    "stable": "mlp:widths=16",
    "steps": 40,
    "batch": 32,
    "ks": [0, 10],
    "inits": 1,
    "copies": 2,
    "train_examples": 100,
    "device": "cpu",
    "workers": 1,
}


source = notebook_of(CHAPTER)


@pytest.mark.slow
def test_plain_papermill_runs_the_chapter(source: Path, tmp_path: Path) -> None:
    notebook = run(source, tmp_path, **TINY)
    record = check_page(CHAPTER, notebook, **TINY)
    assert list(figures(notebook)) == [
        "plane",
        "line",
        "instability",
        "controls",
        "restart",
        "distance",
        "through",
    ]
    by_id = judged(notebook)
    numbers = [*range(1, 9), *range(13, 18), *range(23, 31)]
    wanted = [f"C{number:02d}" for number in numbers]
    assert list(by_id) == wanted
    for name in ("C13", "C14", "C15", "C16", "C17", "C26", "C30"):
        assert by_id[name]["verdict"] == "not testable at this scale"
    assert record["noisy"]["net"] == TINY["unstable"]
    text = filled(notebook, CHAPTER)
    assert "Fork a three-layer perceptron at step 0" in text and "{{" not in text


@pytest.mark.slow
def test_batchnorm_is_drawn_in_three_modes_and_controls_can_be_left_out(
    source: Path,
) -> None:
    few = {**TINY, "unstable": "resnet8:width=4", "steps": 12, "ks": [0, 2], "points": 3}
    few |= {"controls": False, "looks": 2, "test_examples": 20, "max_error": 100.0, "bn": "batch"}
    notebook = run_here(source, **few)
    found = figures(notebook)
    drawn = found["batchnorm"]
    modes = {"interpolated", "re-estimated", "of the batch"}
    assert set(drawn) == {"T", *(f"statistics {mode}, test" for mode in modes)}
    assert all(drawn[f"statistics {mode}, test"]["k"] == [0, 2] for mode in modes)
    headline = found["instability"]["ResNet-8 (width 4), test"]["mean"]
    assert headline == drawn["statistics of the batch, test"]["mean"]
    by_id = judged(notebook)
    for name in ("C05", "C06", "C25", "C28"):
        assert "controls were left out" in by_id[name]["note"], name
    for name in ("C03", "C27", "C29"):  # twelve steps: no share of a training
        assert "training was cut short" in by_id[name]["note"], name
        assert by_id[name]["verdict"] == "not testable at this scale", name
    line = found["line"]["error"]
    assert len(line["alpha"]) == few["points"]
    assert "restart" not in found and "This run left it out." in filled(notebook, CHAPTER)


# The recipes of the chapter. Two copies of one network and the ends of the grid are enough.
PERCEPTRON: dict[str, Any] = {
    "net": "mlp:widths=100x5",
    "steps": 2000,
    "batch": 60,
    "schedule": "step",
    "milestones": (0.6, 0.85),
}
LENET: dict[str, Any] = {
    "net": "lenet-300-100",
    "steps": 1000,
    "batch": 60,
    "optimizer": "adam",
    "lr": 1.2e-3,
}
FEW: dict[str, Any] = {
    "inits": 1,
    "copies": 2,
    "evaluation": Evaluation(train_examples=500, test_examples=2000),
    "max_error": 5.0,
    "workers": 1,
}


def only(found: Instability, k: int) -> float:
    ((_, value),) = found.values(k)
    return value


def null(found: Instability) -> float | None:
    (value,) = {s.result.barrier.gate("G1").value for s in found.samples}
    return value


@pytest.mark.slow
def test_mnist_has_a_stable_and_an_unstable_network(store: Store) -> None:
    if not any(entry.name == "mnist" and entry.present for entry in data.catalogue()):
        pytest.skip("mnist is not under the data root (COMPANION_DATA)")
    found = analyse(Recipe(data="mnist", lr=0.05, **PERCEPTRON), [0, 100], **FEW)
    assert only(found, 0) > 5
    assert only(found, 100) < 2  # 5 % of training
    assert null(found) == 0
    assert only(analyse(Recipe(data="mnist", **LENET), [0], controls=False, **FEW), 0) < 2


@pytest.mark.slow
def test_a_convolutional_network_with_batchnorm_on_cifar(store: Store, few_of_cifar: None) -> None:
    """The BatchNorm path on real images: three modes logged, the headline one named."""
    recipe = Recipe(
        net="resnet8:width=4",
        data="cifar10-jpeg",
        steps=6,
        batch=16,
        augment="flip+crop4",
        weight_decay=1e-4,
    )
    few = Evaluation(points=3, train_examples=64, test_examples=64)
    found = analyse(recipe, [2], inits=1, copies=2, evaluation=few, max_error=100.0, workers=1)
    (sample,) = found.samples
    barrier = sample.result.barrier
    assert set(barrier.curves) == {"interpolate", "reestimate", "batch"}
    assert barrier.bn == "interpolate" and barrier.gate("G5").passed
    assert "BatchNorm interpolate" in str(barrier)
    assert torch.isfinite(torch.tensor(barrier.height("test", "loss")))
