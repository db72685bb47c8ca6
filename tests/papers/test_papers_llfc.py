"""Claims and figures of the paper's module on made-up pairs: each claim in both verdicts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from companion.book import prose
from companion.connectivity import Measure
from companion.core import closing
from companion.core.errors import BadParameter, MissingData
from companion.core.runs import Store
from companion.core.theta import snapshot
from companion.experiments.aligned import Method, pairs_of
from companion.experiments.featured import Featured
from companion.features import (
    Additivity,
    Commutativity,
    Features,
    LayerCommutativity,
    LayerFeatures,
    ReluAdditivity,
    Spectrum,
    Stat,
    Stitched,
    Stitching,
)
from companion.papers import conditions, llfc
from companion.papers.llfc import ACTIVATIONS, COPIES, INDEPENDENT, WEIGHTS, Study
from companion.report import claims, page, recorded, words
from companion.training import Recipe, build

ROOT = Path(__file__).parents[2]
MAIN = Recipe(net="mlp:widths=64x3", data="digits", steps=500, batch=48, lr=0.1)
TREE = Recipe(net="resnet8:width=8", data="digits", steps=400, batch=48, lr=0.1)
LAYERS = ("layer1.linear", "layer1.relu", "layer2.linear", "layer2.relu", "head")
ALPHAS = (0.25, 0.5, 0.75)


def stat(value: float) -> Stat:
    return Stat(value, 0.0, 10, value, value, value)


def pair(
    number: int,
    *,
    height: float = 0.5,
    gap: float = 0.005,
    between: float = 0.1,
    c: float = 1.0,
    sigma: float = 0.01,
    com: float = 0.01,
    stitched: float = 3.0,
    excess: float = -1.0,
    valid: bool = True,
) -> Featured:
    """One pair; each end has 2 % test error."""
    layers = tuple(
        LayerFeatures(
            name,
            "linear",
            size,
            stat(between),
            {a: stat(gap) for a in ALPHAS},
            {a: stat(c) for a in ALPHAS},
            {a: stat((1 - gap) ** 2 / c) for a in ALPHAS},
        )
        for size, name in enumerate(LAYERS, start=5)
    )
    ends = {"a": 2.0, "b": 2.0}
    seen = Features(layers, ALPHAS, 1000, "sample", "none", 1000, ends, ends, {}, {}, {}, {})
    rows = [("input", 2.0), *((name, stitched) for name in LAYERS[:-1]), ("head", 2.0)]
    path = (2.0, 4.0 + excess, 2.0)
    curve = SimpleNamespace(alphas=(0.0, 0.5, 1.0), values={"test": {"error": path}})
    barrier: Any = SimpleNamespace(
        valid=valid, height=lambda *_, **__: height, curves={"none": curve}
    )
    measured = Measure(loss=0.1, error=2.0)
    return Featured(
        pairs_of(MAIN, number + 1)[number],
        Method("naive"),
        barrier,
        {"none": seen},
        (2.0, 2.0, 2.0),
        1000,
        Additivity(
            tuple(
                ReluAdditivity(n, 8, {a: stat(sigma) for a in ALPHAS}, {}, 10.0)
                for n in LAYERS
                if n.endswith("relu")
            ),
            ALPHAS,
            1000,
            "none",
        ),
        Commutativity(
            tuple(
                LayerCommutativity(n, "linear", com, 1.0, 0.5)
                for n in LAYERS
                if not n.endswith("relu")
            ),
            1000,
            "none",
        ),
        Stitching(
            tuple(
                Stitched(name=n, kind="linear", default="b", loss=0.1, error=e, wrong=1, cut=True)
                for n, e in rows
            ),
            {"a": measured, "b": measured},
            ("head",),
            1000,
            "none",
        ),
    )


def group(**numbers: Any) -> list[Featured]:
    return [pair(i, **numbers) for i in range(3)]


FAR: dict[str, Any] = {
    "height": 70.0,
    "gap": 0.4,
    "between": 0.5,
    "c": 3.0,
    "sigma": 0.3,
    "com": 0.8,
    "stitched": 90.0,
    "excess": 60.0,
}


def study(**changed: Any) -> Study:
    """A study in which every claim is reproduced, but for what ``changed`` says.

    Arguments:
        changed: numbers of :func:`pair` for ``copies``, ``independent``, ``matched``; ``along`` and
            ``wide`` take a function of the place on the grid that returns them.
    """
    small = {"width": 64, "widths": [8, 16], "spawned": [TREE.net], "points": 3, "workers": 1}
    made = llfc.design(**{**PARAMETERS, **small})
    copies, independent = (
        group(**{**base, **changed.get(name, {})})
        for name, base in (("copies", {}), ("independent", FAR))
    )
    along: Callable[[int], dict[str, Any]] = changed.get(
        "along", lambda i: {"height": 40 / 10**i, "gap": 0.1 / 2**i}
    )
    wide: Callable[[int], dict[str, Any]] = changed.get(
        "wide", lambda i: {"height": 1.5 - 0.2 * i, "gap": 0.02 / 2**i}
    )
    found: dict[tuple[str, str], list[Featured]] = {}
    narrower: dict[tuple[str, str], list[Featured]] = {}
    for i, w in enumerate(made.widths):
        net = made.at_width(w).net
        target = found if w in made.both else narrower
        target[net, INDEPENDENT] = independent
        for c in (WEIGHTS, ACTIVATIONS):
            target[net, c] = group(**{**wide(i), **changed.get("matched", {})})
    for net in (recipe.net for recipe in made.forks):
        found[net, COPIES], found[net, INDEPENDENT] = copies, independent
    steps = {k: group(**along(i)) for i, k in enumerate(made.ks)}
    vars(made).update(found=found, narrower=narrower, along=steps)
    return made


BROKEN: dict[str, dict[str, Any]] = {
    "A01": {"along": lambda i: {"height": 30.0 - i, "gap": 0.1 / 2**i}},
    "A02": {"copies": {"gap": 0.06}},
    "A03": {"independent": {"gap": 0.01}},
    "A04": {"copies": {"c": 2.0}},
    "A05": {"copies": {"excess": 5.0}},
    "A06": {"copies": {"sigma": 0.2}},
    "A07": {"copies": {"com": 0.3}},
    "A09": {"copies": {"stitched": 50.0}},
    "A10": {"independent": {"stitched": 10.0}},
    "A11": {"matched": {"height": 30.0}},
    "A12": {"matched": {"com": 2.0}},
    "A13": {"along": lambda i: {"height": 40 / 10**i, "gap": 0.1 * 2**i}},
    "A14": {"wide": lambda i: {"height": 1.0 + 0.2 * i, "gap": 0.02 / 2**i}},
}
EVERY = {**llfc.CLAIMS, **conditions.CLAIMS}


def judged(id: str, of: Study) -> claims.Verdict:
    (found,) = claims.verdicts({id: EVERY[id]}, of)
    return found


@pytest.mark.parametrize("id", sorted(EVERY))
def test_every_claim_can_be_reproduced(id: str) -> None:
    assert judged(id, study()).verdict == "reproduced"


@pytest.mark.parametrize("id", sorted(BROKEN))
def test_every_claim_can_fail(id: str) -> None:
    assert judged(id, study(**BROKEN[id])).verdict == "not reproduced"


def test_the_theorem_fails_where_features_are_not_connected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = [SimpleNamespace(baseline=1.0)]

    def made(distance: float) -> Callable[[], dict[str, Any]]:
        one = SimpleNamespace(conditions=distance, gap=1e-3, c=0.0, layers=layers)
        return lambda: dict.fromkeys(conditions.BUILT, one)

    monkeypatch.setattr(conditions, "prove", made(0.0))
    assert judged("A08", study()).verdict == "not reproduced"
    monkeypatch.setattr(
        conditions, "prove", made(0.1)
    )  # they miss a condition: nothing to conclude
    assert judged("A08", study()).verdict == claims.NOT_TESTABLE


@pytest.mark.parametrize(
    ("id", "changed", "why"),
    [
        ("A02", {"copies": {"height": 9.0}}, "no pair of copies is connected"),
        ("A10", {"independent": {"height": 1.0}}, "independent pairs are connected"),
        ("A03", {"copies": {"valid": False}}, "no network with connected"),
    ],
)
def test_what_a_claim_lacks_is_said(id: str, changed: dict[str, Any], why: str) -> None:
    found = judged(id, study(**changed))
    assert found.verdict == claims.NOT_TESTABLE and why in found.note


def test_one_pair_decides_nothing() -> None:
    alone = replace(study(), pairs=1)
    vars(alone).update({k: vars(study())[k] for k in ("found", "narrower", "along")})
    for id in sorted(set(EVERY) - {"A08"}):
        found = judged(id, alone)
        assert found.verdict == claims.NOT_TESTABLE and "one pair" in found.note, id


def test_pairs_that_are_on_two_lists_count_once() -> None:
    made = study()
    own = made.forks[made.swept]
    assert own in made.along
    # 2 networks of copies and independent pairs, 3 widths twice matched and independent, 4 steps
    assert len(made.all_pairs) == 3 * (2 + 1 + 3 * 3 + 4)


def test_the_matrix_of_the_low_rank_figure_is_chosen_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A state dict need not come in the module's order; the matrices compared have to be one."""
    made = llfc.design(**{**PARAMETERS, "width": 16, "widths": [8], "spawned": []})

    def mixed_up(run: Any, device: str) -> dict[str, Any]:
        theta = snapshot(build(run, made.images, torch.device(device)))
        return dict(reversed(list(theta.items())))

    monkeypatch.setattr(llfc, "load_weights", mixed_up)
    found = made.spectra
    assert {held.name for held, _ in found.values()} == {"layer3.linear.weight"}
    assert {len(held.values) for held, _ in found.values()} == {8, 16}
    assert found[16, llfc.START][0] == found[16, llfc.TRAINED][0]  # nothing was trained


def test_low_rank_is_said_of_what_is_measured() -> None:
    _, made = shown(llfc.show_rank, _with_spectra())
    assert made["of_weights"] == "layer 3" and made["wide_weights_full"] == 64
    assert made["weights_low"].startswith("not of low rank: 98 % of the dimensions")


def _with_spectra() -> Study:
    made = study()

    def flat(size: int, kept: int) -> tuple[Spectrum, Spectrum]:
        values = tuple([1.0] * kept + [0.0] * (size - kept))
        return (
            Spectrum("layer3.linear.weight", "weight", size, size, values),
            Spectrum("layer2.relu", "feature", 2000, size, values),
        )

    vars(made)["spectra"] = {
        (w, when): flat(w, w if when == llfc.START else w - 1)
        for w in (8, 64)
        for when in (llfc.START, llfc.TRAINED)
    }
    return made


def shown(show: Callable[[Study], None], of: Study) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figure, and the values that its function fills the page with."""
    with page.captured() as kept:
        show(of)
    values = {name: value for one in kept.all("values") for name, value in one.items()}
    return next(iter(kept.all("figure")), {}), values


FIGURES = {
    "llfc-stitching": llfc.show_stitching,
    "llfc-arrows": llfc.show_arrows,
    "llfc-layers": llfc.show_layers,
    "llfc-ratios": llfc.show_ratios,
    "llfc-coefficient": llfc.show_coefficient,
    "llfc-lemma": llfc.show_lemma,
    "llfc-fork": llfc.show_fork,
    "llfc-width": llfc.show_width,
    "llfc-rank": llfc.show_rank,
    "llfc-additivity": conditions.show_additivity,
    "llfc-commutativity": conditions.show_commutativity,
}


SHOWN = (*FIGURES.values(), conditions.show_factors, conditions.show_separation)


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_every_figure_is_drawn_with_the_numbers_of_its_caption(name: str) -> None:
    figure, values = shown(FIGURES[name], _with_spectra())
    assert figure["name"] == name and figure["data"]
    assert "nan" not in map(str, [*values.values(), *figure.get("values", {}).values()])


def test_what_failed_its_gates_leaves_gaps_and_no_error() -> None:
    gone = study(
        **{n: {"valid": False} for n in ("copies", "independent", "matched")},
        along=lambda i: {"valid": False},
    )
    spectra = FIGURES["llfc-rank"]
    for show in SHOWN:
        if show is not spectra:
            show(gone)  # drawn, not captured: an empty axis has to be drawn, too
    figure, _ = shown(conditions.show_additivity, gone)
    assert figure["data"][llfc.called(TREE.net)] == {"layers": []}


def test_captions_say_the_numbers_of_the_pairs() -> None:
    made = study()
    _, ratios = shown(llfc.show_ratios, made)
    assert ratios == {"low_anyway": 0.0, "apart": 9}  # R of 0.8 everywhere
    _, lemma = shown(llfc.show_lemma, made)
    assert lemma["bound"] == 4.0 and lemma["violations"] == 0
    _, fork = shown(llfc.show_fork, made)
    assert fork["papers_height"] == 0.4 and fork["last_barrier"] == 0.004
    found = llfc.findings(made)
    assert found["independent_wall"] == 70.0
    assert "layer 2, ReLU: 1.0 points" in str(found["worst_places"])
    assert made.words()["one_image"] == 100 / 360
    left = conditions.remaining(made, made.main.net, WEIGHTS, "com")
    assert list(left.values()) == pytest.approx([0.01 / 0.8] * 2)
    _, separated = shown(conditions.show_separation, made)
    assert separated["ratio_output"] == 1.0


PAGES: dict[str, tuple[dict[str, Any], set[Callable[[Study], None]]]] = {
    "03b_conditions": (
        conditions.CLAIMS,
        {f for f in SHOWN if f.__module__ == conditions.__name__},
    ),
    "03_llfc": (llfc.CLAIMS, {f for f in SHOWN if f.__module__ == llfc.__name__}),
}


@pytest.mark.parametrize("chapter", PAGES)
def test_every_place_in_the_text_is_filled_once(chapter: str) -> None:
    judge, functions = PAGES[chapter]
    made = _with_spectra()
    filled = [made.words(), words.judged(claims.verdicts(judge, made))]
    filled += [shown(function, made)[1] for function in functions]
    if chapter == "03_llfc":
        filled += [llfc.findings(made), shown(lambda _: llfc.show_records([]), made)[1]]
    text = (ROOT / "chapters" / f"{chapter}.md").read_text(encoding="utf-8")
    asked = set(re.findall(r"{{(\w+)", text)) - {"told", "titles", "samples"}  # a figure's own
    assert asked <= set(prose.merged(filled, chapter))


def test_networks_have_names_for_people() -> None:
    for net in ("mlp", "mlp:widths=512x3"):  # which are one
        assert llfc.called(net) == "512-wide four-layer perceptron"
    assert llfc.called("resnet8:width=8") == "ResNet-8 (width 8)"
    assert llfc.called("ResNet-8 (width 8)") == "ResNet-8 (width 8)"


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ("layer2.relu", "layer 2, ReLU"),
        ("layer3.linear", "layer 3"),
        ("head", "output"),
        ("stem.conv", "stem, convolution"),
        ("stage1.0.conv2", "block 1, convolution 2"),
        ("stage3.1.relu1", "block 3.2, ReLU 1"),
        ("stage2.0.shortcut.norm", "block 2, shortcut normalisation"),
        ("layer1.0.downsample.0", "layer 1, downsample.0"),
    ],
)
def test_layers_have_names_for_people(layer: str, said: str) -> None:
    assert llfc.place(layer) == said and llfc.place(said) == said


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"fork": 1.0}, ["fork", "share"]),
        ({"pairs": 0}, ["pairs"]),
        ({"net": "mlp"}, ["{width}"]),
        ({"ks": [400]}, ["ks", "400", "T = 400"]),
    ],
)
def test_a_design_that_cannot_be_is_refused(changed: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(BadParameter) as caught:
        llfc.design(**{**PARAMETERS, **changed})
    for word in named:
        assert word in str(caught.value)


def test_a_dataset_that_is_not_here_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPANION_DATA", str(tmp_path))
    with pytest.raises(MissingData, match="companion data get cifar100"):
        llfc.design(**{**PARAMETERS, "dataset": "cifar100"})


PARAMETERS: dict[str, Any] = {
    "dataset": "digits",
    **dict.fromkeys(
        (
            "net",
            "width",
            "widths",
            "steps",
            "optimizer",
            "lr",
            "batch",
            "weight_decay",
            "spawned",
            "spawned_steps",
            "fork",
            "ks",
            "train_examples",
            "test_examples",
        )
    ),
    "pairs": 3,
    "points": 9,
    "max_error": 15.0,
    "precision": "float32",
    "device": "cpu",
    "workers": 0,
}


def test_the_design_of_digits() -> None:
    made = llfc.design(**PARAMETERS)
    assert made.widths == (32, 128, 512) and made.both == (128, 512)
    assert made.ks == (0, 3, 12, 50, 200) and made.swept.net == "vgg11:width=8"
    assert [made.forks[r] for r in (made.main, *made.trees)] == [62, 50, 50]
    (everything,), (short,) = made.plans(), conditions.design(**PARAMETERS).plans()
    # 3 networks' copies, 2 networks' and 2 widths' independent pairs, these matched twice
    assert len(short) == 3 * (3 + 2 + 2 * 3) and set(short) < set(everything)
    assert len(everything) == len(short) + 3 * (3 + 4)  # one width, four fork steps


def test_the_page_says_of_the_mnist_record_what_is_in_it() -> None:
    """Chapter 3 explains in words why five claims fail there, and the barriers that are 0."""
    records = {r.name: r for r in recorded.load("03_llfc")}
    mnist = records["gpu-mnist"]
    failed = [id for id, v in mnist.verdicts.items() if v.verdict == "not reproduced"]
    assert failed == ["A04", "A07", "A11", "A13", "A14"]
    assert mnist.verdicts["A13"].value == 0
    assert llfc.forks_sentence([mnist]) == "0.0 points at most over 4 steps in gpu-mnist"
    assert "points at width 512" in llfc.width_sentence(mnist)
    with page.captured() as kept:
        llfc.show_records(list(records.values()))
    layers, fork = kept.all("figure")
    (values,) = kept.all("values")
    assert "gpu-mnist" in values["recorded_widths"] and "gpu-mnist" in values["recorded_forks"]
    assert set(layers["data"]) == set(records) and len(layers["data"]["gpu-mnist"]) == 3
    labels = {label for one in fork["data"].values() for label in one}
    assert "four-layer perceptron (init torch), test" in labels


def test_what_a_closed_recording_lacks_costs_only_the_claims_that_need_it(store: Store) -> None:
    made = study()
    del vars(made)["along"]
    with closing.closed({"device": "cpu"}) as lacking:
        found = {v.claim.id: v for v in claims.verdicts(llfc.CLAIMS, made)}
    untested = [id for id, v in found.items() if v.verdict == claims.NOT_TESTABLE]
    assert untested == ["A01", "A05", "A13"] and found["A13"].note == closing.WHY
    assert len(lacking["features"]) == 4 * 3  # the fork steps but the one that is found already
