"""Every claim of chapter 1 on made-up results: once as the paper has it, and once not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sklearn.datasets import load_digits

from companion.connectivity import Barrier, Curve, Measure
from companion.connectivity.gates import Gate
from companion.core import closing
from companion.core.errors import CompanionError
from companion.core.runs import Store
from companion.experiments.instability import Instability, Sample
from companion.experiments.pairs import PairResult
from companion.papers import instability as paper
from companion.report import claims, page, recorded
from companion.training import Recipe

KS = (0, 50, 100, 200)  # of 1,000 steps


def pair(
    height: float,
    train: float | None = None,
    *,
    end: float = 2.0,
    end_train: float = 0.0,
    apart: float = 20.0,
    start: float = 20.0,
    modes: tuple[str, ...] = ("none",),
) -> PairResult:
    """Two networks: the test error rises by ``height`` half-way, from ``end`` at both ends."""

    def rise(foot: float, top: float) -> Mapping[str, tuple[float, ...]]:
        return dict.fromkeys(("error", "loss"), (foot, foot + top, foot))

    values = {
        "test": rise(end, height),
        "train": rise(end_train, height if train is None else train),
    }
    curve = Curve((0.0, 0.5, 1.0), values, modes[0], {"test": 100, "train": 100})
    checks = (Gate("G0 quality", True, ""), Gate("G1 null control", True, "", 0.0))
    measured = Barrier(dict.fromkeys(modes, curve), modes[0], checks, apart, 10, (end, end))
    far = {"ab": apart, "a_init": 30.0, "b_init": 30.0, "a_start": 9.0, "start_init": 9.0}
    return PairResult(measured, far, {"test": Measure(1.0, start), "train": Measure(1.0, start)})


def analysis(heights: Mapping[int, float], recipe: Recipe, **more: Any) -> Instability:
    """Three inits, one pair each, which differ a little."""
    samples = [
        Sample(init, k, (1, 2), pair(height * (1 + 0.02 * (init - 1)), **more))
        for k, height in heights.items()
        for init in range(3)
    ]
    return Instability(recipe, tuple(heights), tuple(samples))


@pytest.fixture(scope="module")
def design() -> paper.Study:
    return paper.design(dataset="digits", steps=1000, ks=list(KS), device="cpu")


def world(
    design: paper.Study,
    *,
    net: str = "mlp:widths=100x5",
    dataset: str = "digits",
    heights: Mapping[int, float] | None = None,
    gentle: float = 0.5,
    slow: float = 1.0,
    again: Mapping[int, float] | None = None,
    strangers: float = 80.0,
    trail: float = 1.0,
    apart: Mapping[int, float] | None = None,
    noise: float = 15.0,
    changed: Mapping[str, Any] | None = None,
    **more: Any,
) -> paper.Study:
    """A study in which all that the paper claims holds, and what a test changes of it."""
    noisy = replace(design.noisy, net=net, data=dataset)
    study = replace(design, noisy=noisy, **(changed or {}))
    heights = heights or {0: 70.0, 50: 1.0, 100: 0.5, 200: 0.2}
    forks = analysis(heights, noisy, **more)
    if apart:
        samples = [
            replace(s, result=replace(s.result, distances={**s.result.distances, "ab": apart[s.k]}))
            for s in forks.samples
        ]
        forks = replace(forks, samples=tuple(samples))
    looks = {step: [(i, pair(trail)) for i in range(3)] for step in study.looks}
    study.__dict__.update(  # as if they had been run
        forks=forks,
        gentle_forks=analysis(dict.fromkeys(study.gentle_ks, gentle), study.gentle),
        restarted=analysis(again or {k: v for k, v in heights.items() if k}, noisy),
        slowed=analysis({0: slow}, study.slow) if study.controls else None,
        strangers=[pair(strangers)] * 3,
        by_noise={"both": forks} | {n: analysis({0: noise}, noisy) for n in study.noises},
        along={0: looks, 200: looks},
    )
    return study


RESNET: dict[str, Any] = {"net": "resnet20", "dataset": "cifar10"}
VGG: dict[str, Any] = {"net": "vgg16", "dataset": "cifar10"}
LATE = {0: 70.0, 50: 30.0, 100: 20.0, 200: 0.2}
OWN = {"C13": RESNET, "C14": VGG, "C17": RESNET}  # claims about other networks than the default's
SHOWN = ("C24", "C28")  # not judged


def caption(draw: Callable[[paper.Study], None], study: paper.Study) -> Mapping[str, Any]:
    """What a figure hands to its caption."""
    with page.captured() as found:
        draw(study)
    (figure,) = found.all("figure")
    return figure["values"]


def verdict(id: str, study: paper.Study) -> claims.Verdict:
    (found,) = claims.verdicts({id: paper.CLAIMS[id]}, study)
    return found


def test_the_claims_are_those_of_the_chapter() -> None:
    listed = [c.id for c in claims.registry().values() if c.chapter == paper.CHAPTER]
    assert list(paper.CLAIMS) == listed


@pytest.mark.parametrize("id", paper.CLAIMS)
def test_it_is_reproduced(design: paper.Study, id: str) -> None:
    found = verdict(id, world(design, **OWN.get(id, {})))
    assert found.verdict == ("reported" if id in SHOWN else "reproduced"), found


@pytest.mark.parametrize(
    ("id", "otherwise"),
    [
        ("C01", {"gentle": 7.0}),
        ("C02", {"heights": {0: 3.0, 50: 1.0, 100: 0.5, 200: 0.2}}),
        ("C03", {"heights": LATE}),
        ("C04", {"heights": {0: 1.0, 50: 2.0, 100: 3.0, 200: 4.0}}),
        ("C05", {"slow": 40.0}),
        ("C06", {"again": {50: 5.0, 100: 5.0, 200: 0.2}}),
        ("C07", {"apart": dict.fromkeys(KS, 3.0)}),
        ("C08", {"strangers": 10.0}),
        ("C13", {**RESNET, "heights": {0: 40.0, 50: 1.0, 100: 0.5, 200: 0.2}}),
        ("C14", {**VGG, "heights": {0: 40.0, 50: 1.0, 100: 0.5, 200: 0.2}}),
        ("C17", {**RESNET, "train": 20.0}),
        ("C23", {"trail": 9.0}),
        ("C27", {"start": 3.0}),
    ],
)
def test_it_is_not_reproduced(design: paper.Study, id: str, otherwise: dict[str, Any]) -> None:
    found = verdict(id, world(design, **otherwise))
    assert found.verdict == "not reproduced", found


def test_every_claim_that_is_judged_has_both_tests() -> None:
    marks = test_it_is_not_reproduced.pytestmark
    assert {id for id, _ in marks[0].args[1]} == set(paper.CLAIMS) - {*SHOWN}


@pytest.mark.parametrize(
    ("id", "otherwise", "why"),
    [
        ("C01", RESNET, "about digits, mnist, fashion_mnist"),
        ("C01", {"changed": {"inits": 1}}, "one init"),
        ("C02", {"heights": {50: 1.0, 100: 0.5}, "changed": {"ks": (50, 100)}}, "no k = 0"),
        ("C03", {"end_train": 40.0}, "cut short: the networks end with 40 % error"),
        ("C03", {"heights": dict.fromkeys(KS, 0.5)}, "stable from the smallest k"),
        ("C04", {"heights": {0: 9.0, 50: 1.0}}, "four k or more"),
        ("C05", {"changed": {"controls": False}}, "controls were left out"),
        ("C06", {"changed": {"controls": False}}, "controls were left out"),
        ("C07", {"heights": dict.fromkeys(KS, 9.0)}, "did not become stable"),
        ("C08", {"changed": {"inits": 2}}, "two inits make one pair"),
        ("C13", VGG, "about ResNet-20"),
        ("C14", {"net": "vgg16"}, "about CIFAR-10"),
        ("C17", {"dataset": "cifar10"}, "about convolutional networks"),
        ("C23", {"heights": dict.fromkeys(KS, 9.0)}, "k = 200 do not end connected"),
        ("C27", {"end_train": 40.0}, "cut short"),
        ("C28", {"changed": {"controls": False}}, "controls were left out"),
    ],
)
def test_what_it_lacks_is_said(
    design: paper.Study, id: str, otherwise: dict[str, Any], why: str
) -> None:
    found = verdict(id, world(design, **otherwise))
    assert found.verdict == claims.NOT_TESTABLE and why in found.note


def test_values_that_are_shown_and_not_judged(design: paper.Study) -> None:
    by_distance = {0: 40.0, 50: 20.0, 100: 20.0, 200: 20.0}
    assert verdict("C24", world(design, apart=by_distance)).value == 1
    assert verdict("C28", world(design, noise=11.0)).value == pytest.approx(11.0)
    never = verdict("C03", world(design, heights=dict.fromkeys(KS, 9.0)))
    assert never.value == math.inf and never.detail == "never on this grid"
    split = verdict("C06", world(design, again={50: 5.0, 100: 0.5, 200: 0.2}))
    assert split.value == pytest.approx(2 / 3)
    assert split.detail == "k = 50: 1.00 against 5.00 points"


def test_the_line_is_named_after_the_headline_of_batchnorm(design: paper.Study) -> None:
    modes = ("batch", "interpolate", "reestimate")
    study = world(design, **RESNET, modes=modes)
    assert verdict("C13", study).detail == (
        "ResNet-20, T = 1000; statistics of the batch 72 %; statistics interpolated 72 %; "
        "statistics re-estimated 72 %"
    )
    assert set(paper.by_mode(study)) == {f"statistics {paper.MODES[m]}, test" for m in modes}
    assert not paper.by_mode(world(design))


def test_a_claim_about_grey_images_is_not_judged_by_a_record_on_others() -> None:
    records = {record.name: record for record in recorded.load(paper.CHAPTER)}
    for name, record in records.items():
        word = record.verdicts["C01"].verdict
        grey = record.data["parameters"]["dataset"] in claims.registry()["C01"].data
        assert (word == claims.NOT_TESTABLE) == (not grey), name
    assert {"cpu-mnist", "gpu-cifar10-jpeg"} <= set(records)


def test_captions_say_what_was_measured(design: paper.Study) -> None:
    study = world(design)
    middles = caption(paper.show_line, study)["middles"]
    assert middles.startswith("72.0 for k = 0, 3.0 for k = 50")
    said = study.words() | paper.values(study)
    assert said["network"] == "six-layer perceptron" and said["calm"] == "LeNet-300-100"
    assert said["wall_first"] == "70.0" and said["wall_slow"] == "1.0"
    assert str(said["onset_sentence"]).startswith("From k = 50 on (5 % of training)")
    never = world(design, heights=dict.fromkeys(KS, 9.0))
    assert paper.onset_sentence(never).startswith("At no step of this grid")
    assert "overlap at every k" in paper.restart_sentence(study)
    apart = world(design, again={50: 5.0, 100: 0.5, 200: 0.2})
    assert "do not overlap at k = 50" in paper.restart_sentence(apart)
    assert "augmentation 15.00" in paper.noise_sentence(study)
    assert "left it out" in paper.restart_sentence(world(design, changed={"controls": False}))


def test_records_keep_the_names_they_were_written_with(design: paper.Study) -> None:
    """Old records name networks by their recipe; on the page they have names for people."""
    found = recorded.curves(recorded.load(paper.CHAPTER), "instability")
    labels = {label for _, curves in found.values() for label in curves}
    assert {"six-layer perceptron, test", "ResNet-20, test", "LeNet-300-100, test"} <= labels
    said = paper.record_values(recorded.load(paper.CHAPTER))
    assert str(said["gpu_noisy"]).startswith("66.7 points at k = 0")
    assert said["gpu_reestimate"] == "31.6"
    assert paper.record_values([])["gpu_noisy"] == "not recorded"


def test_a_closed_recording_still_has_its_captions(design: paper.Study) -> None:
    study = world(design)
    missing = Gate("measured", False, closing.WHY)
    first = study.forks.samples[0]
    hole = replace(first.result, barrier=replace(first.result.barrier, gates=(missing,)))
    samples = (replace(first, result=hole), *study.forks.samples[1:])
    study.__dict__["forks"] = replace(study.forks, samples=samples)
    with closing.closed({"device": "cpu"}):
        assert "not measured" in caption(paper.show_instability, study)["onset_sentence"]
        assert verdict("C03", study).note == closing.WHY
        assert verdict("C08", study).verdict == "reproduced"


def test_two_networks_of_one_name_are_told_apart(design: paper.Study) -> None:
    study = world(design, net="mlp:widths=400-100")
    assert (study.network, study.calm) == ("three-layer perceptron", "LeNet-300-100")
    same = replace(study, gentle=replace(study.gentle, net="mlp:widths=20-100"))
    assert (same.network, same.calm) == ("mlp:widths=400-100", "mlp:widths=20-100")
    assert recorded.load(paper.CHAPTER)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"ks": [0, 40]}, ["ks", "40", "from 0 to 39"]),
        ({"ks": [0]}, ["ks", "two fork steps"]),
        ({"looks": 1}, ["looks", "2 or more"]),
        ({"batch": 5000}, ["batch", "5000", "1437"]),
    ],
)
def test_what_cannot_be_run_is_refused_by_the_design(
    store: Store, parameters: Any, words: list[str]
) -> None:
    with pytest.raises(CompanionError) as caught:
        paper.design(**{"steps": 40, "device": "cpu", **parameters})
    assert all(word in str(caught.value) for word in words)
    assert list(store.entries()) == []


def test_images_of_the_users_own(tmp_path: Path) -> None:
    digits = load_digits()
    for i in range(60):
        folder = tmp_path / "pictures" / f"class{digits.target[i] % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        grey = (digits.images[i] * 15).astype("uint8")
        Image.fromarray(grey).convert("RGB").save(folder / f"{i}.png")
    study = paper.design(dataset=f"images:{tmp_path}/pictures", batch=8, device="cpu")
    assert study.images.classes == 3 and study.network == "six-layer perceptron"
    assert study.noisy.augment == "none" and study.noises == ()
    assert study.ks == (0, 25, 50, 100, 200)


def test_the_design_follows_data_and_device() -> None:
    study = paper.design(unstable="resnet8:width=4", steps=80, device="cpu")
    assert (
        study.network == "ResNet-8 (width 4)" and study.noisy.lr == 0.08
    )  # grey: the perceptron's
    assert study.looks == (19, 34, 49, 65, 80) and study.gentle.steps == 80
    few = replace(study, controls=False)
    assert (study.again, few.again) == ((1, 2, 4, 8), ()) and few.slowed is few.restarted is None
    assert len(study.plans()) == 12 and len(few.plans()) == 5


def test_an_experiment_is_run_once(design: paper.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def noted(word: str, answer: object) -> Callable[..., object]:
        def ask(*_: object, **__: object) -> object:
            asked.append(word)
            return answer

        return ask

    monkeypatch.setattr(paper, "through_training", noted("along", {}))
    monkeypatch.setattr(paper, "analyse", noted("forks", "found"))
    study = replace(design)
    assert study.forks == study.forks == "found"
    assert asked == ["along", "along", "forks"], "copies that are looked at on their way come first"
