"""Chapter 2 end to end: plain papermill with tiny parameters, and the phenomena it stands on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import papermill
import pytest
from papermilled import build, entries, run
from PIL import Image
from sklearn.datasets import load_digits

from companion import data
from companion.core.runs import Store
from companion.experiments.aligned import align, pairs_of
from companion.experiments.pairs import Evaluation
from companion.report import claims
from companion.training import Recipe

CHAPTER = "02_git_rebasin"
ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {
    "width": 16,
    "widths": [8],
    "steps": 40,
    "batch": 32,
    "pairs": 1,
    "many": 2,
    "halves": 2,
    "ste_steps": 2,
    "points": 5,
    "train_examples": 100,
    "device": "cpu",
    "workers": 1,
}
LEAST: dict[str, Any] = {
    **TINY,
    "many": 0,
    "halves": 0,
    "split": False,
    "wide_decay": 0.0,
    "map_pairs": 0,
    "ste_steps": 0,
}
FIGURES = ["line", "plane", "width", "time", "merge", "split", "controls", "map"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chapter as `make notebooks` writes it, in a folder of the test."""
    return build(CHAPTER, tmp_path_factory.mktemp("book"))


def printed(notebook: Any) -> str:
    """What its cells printed."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return "".join(o.get("text", "") for o in outputs)


def figure_names(notebook: Any) -> list[str]:
    names = [figure["name"].removeprefix("rebasin-") for figure in entries(notebook, "figure")]
    return [name for name in names if not name.startswith("recorded")]


def test_plain_papermill_runs_the_chapter(source: Path, tmp_path: Path) -> None:
    notebook = run(source, tmp_path, **TINY)
    assert figure_names(notebook) == FIGURES
    (verdicts,) = entries(notebook, "claims")
    assert [v["claim"]["id"] for v in verdicts] == [f"R{n:02d}" for n in range(1, 37)]
    assert {c.id for c in claims.registry().values() if c.chapter == CHAPTER} == {
        v["claim"]["id"] for v in verdicts
    }
    by_id = {v["claim"]["id"]: v for v in verdicts}
    # One pair, two widths, a narrow network, digits: what has no premise is not judged.
    for name, why in {
        "R01": "one pair",
        "R02": "512 units",
        "R05": "MNIST",
        "R09": "four widths",
        "R10": "one pair",
        "R34": "ResNet-20",
        "R36": "one pair",
    }.items():
        assert by_id[name]["verdict"] == "not testable at this scale", name
        assert why in by_id[name]["note"]
    # What needs no training holds at every scale.
    assert by_id["R26"]["verdict"] == "reproduced" and by_id["R27"]["verdict"] == "reproduced"
    assert by_id["R28"]["verdict"] == "not reproduced"
    (command,) = entries(notebook, "rerun")
    assert "-p steps 40" in command and "-p dataset" not in command and "-p lr" not in command
    (record,) = entries(notebook, "provenance")
    assert record["dataset"]["sha256"] == data.load("digits").fingerprint
    said = printed(notebook)
    assert "found again: True" in said
    assert "greedy: half-way f(x) = 0.5" in said and "weight matching: half-way f(x) = 1.05" in said
    assert "10^55109, the paper's count; tied: 10^25638" in said
    assert "67% less" in said and "78% less" in said and "by membership 100%" in said
    copied, last = re.search(r"as a copy ([\d.]+) nats, by reference ([\d.]+)", said).groups()
    assert float(copied) < float(last) and "2 seeds" in said
    # Prose follows the run: claims without a premise are named, and nothing is said of what is left
    # out.
    prose = "\n".join(entries(notebook, "text"))
    assert "R05 (the claim is about MNIST" in prose and "One pair has no interval" in prose
    assert "merged from several" in prose and "one pair does not decide" in prose
    line = next(f for f in entries(notebook, "figure") if f["name"] == "rebasin-line")
    assert set(line["data"]) == {f"{s} {m}" for s in ("test", "train") for m in ("error", "loss")}


def test_parts_can_be_left_out(source: Path, tmp_path: Path) -> None:
    notebook = run(source, tmp_path, **LEAST)
    left = [n for n in FIGURES if n not in ("merge", "split", "map")]
    assert figure_names(notebook) == left
    (verdicts,) = entries(notebook, "claims")
    by_id = {v["claim"]["id"]: v["verdict"] for v in verdicts}
    for n in (4, 7, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 23, 24, 25):
        assert by_id[f"R{n:02d}"] == "not testable at this scale", n
    prose = "\n".join(entries(notebook, "text"))
    assert "merged from several" not in prose and "corrected for" not in prose


def test_a_network_with_batchnorm_on_images_of_the_users_own(source: Path, tmp_path: Path) -> None:
    digits = load_digits()
    for i in range(120):
        folder = tmp_path / "pictures" / f"class{digits.target[i] % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        grey = (digits.images[i] * 15).astype("uint8")
        Image.fromarray(grey).convert("RGB").save(folder / f"{i}.png")
    name = f"images:{tmp_path / 'pictures'}"
    net = "resnet8:width={width},norm=batch"
    tiny = {**LEAST, "net": net, "width": 8, "widths": [4], "steps": 60, "lr": 0.02}
    notebook = run(source, tmp_path, **{**tiny, "dataset": name, "split": True})
    (record,) = entries(notebook, "provenance")
    assert record["dataset"]["sha256"] == data.load(name).fingerprint
    by_name = {f["name"]: f for f in entries(notebook, "figure")}
    drawn = by_name["rebasin-width"]["data"]
    assert "weight matching, statistics interpolated, test" in drawn
    # The mode of the headline is named, and it is what is drawn without a mode's name.
    (scale,) = {c["scale"] for group in entries(notebook, "claims") for c in group}
    assert "BatchNorm reestimate" in scale
    assert "BatchNorm reestimate" in by_name["rebasin-line"]["caption"]
    assert (
        drawn["weight matching, test"]["mean"]
        != drawn["weight matching, statistics interpolated, test"]["mean"]
    )


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"datset": "mnist"}, ["datset", "Did you mean 'dataset'"]),
        ({"pairs": 0}, ["pairs", "1 or more"]),
        ({"net": "mlp:widths=16x2"}, ["{width}"]),
        ({"many": 1}, ["many", "2 or more"]),
        ({"batch": 5000}, ["batch", "5000", "1437"]),
        ({"points": 4}, ["points", "odd"]),
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


@pytest.mark.slow
def test_on_digits_the_barrier_is_there_and_matching_takes_it_away(store: Store) -> None:
    """Width 512, SGD 0.1 with momentum 0.9: above 30 points before, below 2 after, every pair."""
    recipe = Recipe(
        net="mlp:widths=512x3",
        data="digits",
        steps=500,
        batch=48,
        lr=0.1,
        schedule="step",
        milestones=(0.85,),
    )
    few = Evaluation(points=13, train_examples=500)
    found = align(pairs_of(recipe, 3), ["naive", "weights"], few, max_error=5.0)
    before = [r.barrier.height() for r in found["naive"]]
    after = [r.barrier.height() for r in found["weights"]]
    assert len(before) == len(after) == 3
    assert min(before) > 30
    assert max(after) < 2
