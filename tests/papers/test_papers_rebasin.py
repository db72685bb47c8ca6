"""Chapter 2's claims on made-up results: reproduced, not reproduced, and undetermined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from companion.connectivity import Barrier, Curve, Measure
from companion.connectivity.gates import Gate
from companion.core.errors import BadParameter
from companion.core.runs import Store
from companion.experiments.aligned import Aligned, Method, pairs_of
from companion.experiments.merged import Reading
from companion.papers import merging, rebasin
from companion.report import claims
from companion.training import Recipe

COMMON: dict[str, Any] = {
    "dataset": "digits",
    "net": None,
    "width": None,
    "steps": None,
    "optimizer": None,
    "lr": None,
    "batch": None,
    "weight_decay": None,
    "pairs": 3,
    "points": 25,
    "train_examples": None,
    "test_examples": None,
    "max_error": 5.0,
    "bn": None,
    "precision": "float32",
    "device": "cpu",
    "workers": 1,
}
PAGE: dict[str, Any] = {
    **COMMON,
    "widths": None,
    "looks": None,
    "wide_decay": 3e-3,
    "map_pairs": 1,
    "ste_steps": 20,
    "ste_lr": 1.0,
    "ste_batch": 256,
}
MERGING: dict[str, Any] = {
    **COMMON,
    "many": 2,
    "halves": 2,
    "merges": 3,
    "merge_width": None,
    "split": True,
}
LONG: dict[str, Any] = {"steps": 1000}  # 33 times all images: trained, as claims on the loss ask
PAIRS = pairs_of(Recipe(net="mlp:widths=8x3", data="digits", steps=10), 3)


def line(
    error: float = 0.0,
    loss: float = 0.0,
    *,
    place: int = 0,
    chosen: tuple[float, float] = (0.0, 0.0),
    left: float = 0.9,
    calibrated: float = 0.0,
    repaired: float = 0.0,
    mode: str = "none",
    valid: bool = True,
) -> Aligned:
    """A made-up pair: its ends have 2 % error and 0.1 nats, and half-way it has this much more.

    Arguments:
        place: of the pair.
        chosen: error and loss, above the ends, of the test images where the train loss is lowest.
        left: of the distance; calibrated, repaired: loss above the ends with either.
        mode: of BatchNorm.
    """

    def along(end: float, middle: float, quarter: float) -> tuple[float, ...]:
        return (end, end + quarter, end + middle, end, end)

    values = {
        "test": {"error": along(2.0, error, chosen[0]), "loss": along(0.1, loss, chosen[1])},
        "train": {"error": along(2.0, error, 0.0), "loss": along(0.1, loss, -0.05)},
    }
    sizes = {"test": 100, "train": 100}
    alphas = (0.0, 0.25, 0.5, 0.75, 1.0)
    tempered = {"test": {"loss": along(0.1, calibrated, 0.0)}}
    return Aligned(
        PAIRS[place],
        Method("naive"),
        Barrier(
            {mode: Curve(alphas, values, mode, sizes)},
            mode,
            (Gate("G0 quality", valid, "made up"),),
            1.0,
            10,
            (2.0, 2.0),
        ),
        {"before": 1.0, "after": left},
        {},
        Curve(alphas, tempered, mode, sizes),
        {"test": Measure(0.1 + repaired, 0.0)},
    )


def three(*errors: float, **of: Any) -> list[Aligned]:
    """Three pairs, of these error barriers in turn; a list has a value for each."""
    errors = errors or (0.0,)
    return [
        line(
            errors[i % len(errors)],
            place=i,
            **{name: value[i] if isinstance(value, list) else value for name, value in of.items()},
        )
        for i in range(3)
    ]


def study_with(changed: Mapping[str, Any] | None = None, /, **found: Any) -> rebasin.Study:
    """A study of three pairs on ``digits`` whose experiments found this."""
    study = rebasin.design(**{**PAGE, **(changed or {})})
    vars(study).update(found)
    return study


def lines(**given: Sequence[Aligned]) -> rebasin.Study:
    """Every method on three pairs; what is not given has no barrier."""
    return study_with(LONG, lines={name: given.get(name, three()) for name in rebasin.NAMES})


def kept(method: str, *errors: float, loss: Any = 0.0) -> rebasin.Study:
    """What a method leaves of 80 points and 2 nats."""
    return lines(naive=three(80.0, loss=2.0), **{method: three(*errors, loss=loss)})


def sweep(name: str, losses: Sequence[Any], keys: Sequence[int]) -> rebasin.Study:
    """Width or step -> results whose loss barrier after matching is this."""
    found = {k: {"weights": three(loss=v)} for k, v in zip(keys, losses, strict=True)}
    return study_with(**{name: found})


def narrowest(*errors: float, **of: Any) -> rebasin.Study:
    """The narrowest of the widths after matching with either solver."""
    return study_with(
        by_width={32: {"weights": three(*errors, **of), "authors": three(*errors, **of)}}
    )


def young(*errors: float) -> rebasin.Study:
    """The first step after matching; our solver leaves nothing, and is not asked."""
    return study_with(by_step={15: {"authors": three(*errors), "weights": three()}})


def resnet(norm: str, *errors: float, mode: str = "none") -> rebasin.Study:
    """ResNet-20, four times as wide."""
    net = {"net": f"resnet20:width={{width}},norm={norm}", "width": 64, "widths": []}
    return study_with(net, by_width={64: {"weights": three(*errors, mode=mode)}})


def wide_resnet(loss: Any) -> rebasin.Study:
    """ResNet-20, 32 times as wide, which is too large to be built here."""
    study = replace(resnet("layer", 7.0), widths=(512,))
    vars(study).update(by_width={512: {"weights": three(loss=loss)}})
    return study


def map_of(barrier: Callable[[str, float, int], float]) -> rebasin.Study:
    """The map of settings: a barrier after matching for each optimiser, rate and width."""
    study = study_with()
    cells = study.cells
    vars(study)["map"] = {c: {"weights": [line(barrier(c[0], c[1], c[3]))]} for c in cells}
    return study


def on(data: str, study: rebasin.Study) -> rebasin.Study:
    """The same results of other data."""
    found = replace(study, main=replace(study.main, data=data))
    vars(found).update(lines=study.lines)
    return found


def loss_on_mnist(weights: Any, activations: Any) -> rebasin.Study:
    """Loss barriers after matching, on MNIST."""
    study = lines(weights=three(loss=weights), activations=three(loss=activations))
    return on("mnist", study)


LOW, HIGH, MIXED = three(0.4, 0.1, 0.5), three(6.1, 6.2, 7.1), three(0.1, 4.0, 1.0)
WIDTHS, LOOKS = (32, 64, 128, 256, 512), (15, 50, 150, 500)
DOWN, UP = (0.5, 0.4, 0.3, 0.2, 0.1), (0.1, 0.2, 0.3, 0.4, 0.5)
BOTH = [[down, up, 0.1] for down, up in zip(DOWN, UP, strict=True)]
Case = tuple[Callable[[], Any], ...]

# Claim -> results under which it is reproduced, under which it is not, and, where it has an
# interval, under which the pairs do not decide it.
CASES: dict[str, Case] = {
    "R01": (
        lambda: lines(naive=three(40.0, 31.0)),
        lambda: lines(naive=LOW),
        lambda: lines(naive=MIXED),
    ),
    "R02": (
        lambda: kept("weights", 0.4, loss=0.05),
        lambda: kept("weights", 0.4, loss=[0.5, 0.6, 0.5]),  # the loss decides, too
        lambda: kept("weights", 0.4, 8.0, 1.0),
    ),
    "R03": (
        lambda: kept("activations", 0.4, loss=0.05),
        lambda: kept("activations", 9.0, 10.0),
        lambda: kept("activations", 0.4, 8.0, 1.0),
    ),
    "R04": (
        lambda: kept("ste", 0.4, loss=0.05),
        lambda: kept("ste", 9.0, 10.0),
        lambda: kept("ste", 0.4, 8.0, 1.0),
    ),
    "R05": (
        lambda: loss_on_mnist(0.01, 0.015),
        lambda: loss_on_mnist(0.01, 0.03),
        lambda: loss_on_mnist([0.0, 0.03, 0.01], 0.0),
    ),
    "R06": (
        lambda: lines(activations=three(loss=0.2)),
        lambda: lines(weights=three(loss=0.2)),
        lambda: lines(activations=three(loss=[0.2, -0.1, 0.1])),
    ),
    "R07": (
        lambda: lines(weights=three(loss=0.2), activations=three(loss=0.1)),
        lambda: lines(ste=three(loss=0.05), activations=three(loss=0.1)),
        lambda: lines(ste=three(loss=[-0.1, 0.1, 0.0]), activations=three(loss=0.5)),
    ),
    "R08": (
        lambda: lines(weights=three(loss=-0.01)),
        lambda: lines(weights=three(loss=0.01)),
        lambda: lines(weights=three(loss=[-0.01, 0.02, 0.0])),
    ),
    "R09": (
        lambda: sweep("by_width", DOWN, WIDTHS),
        lambda: sweep("by_width", UP, WIDTHS),
        lambda: sweep("by_width", BOTH, WIDTHS),
    ),
    "R10": (lambda: narrowest(3.0, 4.0), lambda: narrowest(0.5, 1.0), lambda: narrowest(0.5, 9.0)),
    "R11": (
        lambda: sweep("by_step", DOWN[:4], LOOKS),
        lambda: sweep("by_step", UP[:4], LOOKS),
        lambda: sweep("by_step", BOTH[:4], LOOKS),
    ),
    "R21": (
        lambda: study_with(decayed={"naive": three(loss=1.0, calibrated=0.01)}),
        lambda: study_with(decayed={"naive": three(loss=1.0, calibrated=0.05)}),
        lambda: study_with(decayed={"naive": three(loss=1.0, calibrated=[0.0, 0.01, 0.05])}),
    ),
    "R22": (
        lambda: lines(greedy=three(loss=0.2)),
        lambda: lines(weights=three(loss=0.2)),
        lambda: lines(greedy=three(loss=[0.2, -0.1, 0.1])),
    ),
    "R23": (
        lambda: map_of(lambda opt, rate, width: 5.0 * (opt == "sgd" and rate == 0.01)),
        lambda: map_of(lambda opt, rate, width: 5.0 * (opt == "sgd" and rate == 0.1)),
        lambda: map_of(lambda opt, rate, width: 5.0 * (rate == 0.01 and width == 32)),
    ),
    "R24": (
        lambda: map_of(lambda opt, rate, width: 5.0 * (opt == "adam" and rate == 1e-2)),
        lambda: map_of(lambda opt, rate, width: 5.0 * (opt == "adam" and rate == 1e-3)),
        lambda: map_of(lambda opt, rate, width: 5.0 * (rate == 1e-2 and width == 32)),
    ),
    "R26": (study_with, lambda: study_with(counterexample={"one": 25.0, "other": 12.0})),
    "R27": (study_with, lambda: study_with(counts={"MLP": 3498, "VGG-16": 35161})),
    "R28": (lambda: study_with(tied=(55109.4, 53)), lambda: study_with(tied=(25638.3, 37))),
    "R29": (
        lambda: lines(steepest=three(30.0, 26.0)),
        lambda: lines(steepest=three(0.4, 1.0)),
        lambda: lines(steepest=three(30.0, 1.0)),
    ),
    "R30": (
        lambda: lines(weights=three(left=0.9)),
        lambda: lines(weights=three(left=0.5)),
        lambda: lines(weights=three(left=[0.9, 0.6, 0.8])),
    ),
    "R31": (
        lambda: study_with(late={"naive": LOW}),
        lambda: study_with(late={"naive": HIGH}),
        lambda: study_with(late={"naive": MIXED}),
    ),
    "R32": (
        lambda: lines(naive=three(70.0), random=three(72.0, 69.0)),
        lambda: lines(naive=three(70.0), random=three(20.0, 30.0)),
        lambda: lines(naive=three(70.0), random=three(90.0, 50.0)),
    ),
    "R33": (
        lambda: narrowest(5.0, loss=0.5, repaired=0.1),
        lambda: narrowest(5.0, loss=0.5, repaired=0.4),
        lambda: narrowest(5.0, loss=0.5, repaired=[0.0, 0.4, 0.2]),
    ),
    "R34": (
        lambda: resnet("batch", 7.0, mode="reestimate"),
        lambda: resnet("batch", 1.0, mode="reestimate"),
        lambda: resnet("batch", 7.0, 1.0, mode="reestimate"),
    ),
    "R35": (
        lambda: resnet("layer", 7.0),
        lambda: resnet("layer", 1.0),
        lambda: resnet("layer", 7.0, 1.0),
    ),
    "R36": (lambda: young(8.0, 9.0), lambda: young(0.5, 1.0), lambda: young(0.5, 9.0)),
    "R37": (
        lambda: wide_resnet(0.01),
        lambda: wide_resnet(0.1),
        lambda: wide_resnet([0.0, 0.05, 0.01]),
    ),
    "R38": (
        lambda: on("cifar10-jpeg", kept("weights", 20.0)),
        lambda: on("cifar10-jpeg", kept("weights", 0.1)),
        lambda: on("cifar10-jpeg", kept("weights", 1.0, 60.0)),
    ),
    "R39": (
        lambda: study_with(hidden=[{"ours": True, "the paper's": True}]),
        lambda: study_with(hidden=[{"ours": True, "the paper's": i > 0} for i in range(3)]),
    ),
    "R41": (
        lambda: study_with(initial=[(0.5, 0.01)] * 3),
        lambda: study_with(initial=[(0.5, 0.4)] * 3),
        lambda: study_with(initial=[(0.5, 0.0), (0.5, 0.04), (0.5, 0.0)]),
    ),
    "R42": (
        lambda: study_with(spread=[(0.7, 1.0)] * 3),
        lambda: study_with(spread=[(1.0, 1.0)] * 3),
        lambda: study_with(spread=[(0.9, 1.0), (1.1, 1.0), (0.9, 1.0)]),
    ),
}
NEVER = {"R40"}  # not testable here by anything


def merged(**given: tuple[float, float, float]) -> dict[str, dict[str, Reading]]:
    """What predictors read: loss, error and calibration error, of test and train data alike."""
    usual = dict.fromkeys(
        [
            "input_0",
            "input_1",
            "mean",
            "merged",
            "c2m3",
            "ensemble",
            "A",
            "B",
            "A_corrected",
            "B_corrected",
            "full_data",
        ],
        (0.1, 2.0, 1.0),
    )
    return {
        name.replace("_", " "): {"test": Reading(*of), "train": Reading(*of)}
        for name, of in (usual | given).items()
    }


def each(given: Mapping[str, Any]) -> list[dict[str, dict[str, Reading]]]:
    """Three such readings; a list has one for each."""
    return [
        merged(**{name: of[i] if isinstance(of, list) else of for name, of in given.items()})
        for i in range(3)
    ]


def merges(**given: Any) -> merging.Study:
    """Three merges of the same data and of random halves that read this."""
    study = merging.design(**{**MERGING, **LONG})
    vars(study).update(merged=dict.fromkeys([*study.groups, merging.THREE], each(given)))
    return study


def apart(chosen: Any = (0.0, 0.0), **given: Any) -> merging.Study:
    """Three pairs of biased halves: error and loss at the chosen point, above the ends."""
    study = merging.design(**MERGING)
    vars(study).update(halfway={"weights": three(chosen=chosen)}, apart=each(given))
    return study


def reading(loss: float = 0.1, error: float = 2.0, ece: float = 1.0) -> tuple[float, float, float]:
    """What a predictor reads."""
    return loss, error, ece


MERGING_CASES: dict[str, Case] = {
    "R12": (
        lambda: merges(merged=reading(loss=0.05)),
        lambda: merges(merged=reading(loss=0.2)),
        lambda: merges(merged=[reading(loss=x) for x in (0.05, 0.15, 0.1)]),
    ),
    "R13": (
        lambda: merges(merged=reading(error=2.5)),
        lambda: merges(merged=reading(error=1.5)),
        lambda: merges(merged=[reading(error=x) for x in (1.5, 2.5, 2.0)]),
    ),
    "R14": (
        lambda: merges(merged=reading(ece=2.5)),
        lambda: merges(merged=reading(ece=3.5)),
        lambda: merges(merged=[reading(ece=x) for x in (2.0, 5.0, 2.0)]),
    ),
    "R15": (
        lambda: merges(mean=reading(error=80.0)),
        lambda: merges(mean=reading(error=20.0)),
        lambda: merges(mean=[reading(error=x) for x in (80.0, 20.0, 60.0)]),
    ),
    "R16": (
        lambda: apart((0.0, -0.02)),
        lambda: apart((0.0, 0.02)),
        lambda: apart([(0.0, -0.02), (0.0, 0.02), (0.0, 0.0)]),
    ),
    "R17": (
        lambda: apart((0.5, 0.0)),
        lambda: apart((-0.5, 0.0)),
        lambda: apart([(0.5, 0.0), (-0.5, 0.0), (0.1, 0.0)]),
    ),
    "R18": (
        lambda: apart(A_corrected=reading(loss=0.08)),
        lambda: apart(A_corrected=reading(loss=0.2), B_corrected=reading(loss=0.2)),
        lambda: apart(
            A_corrected=[reading(loss=x) for x in (0.05, 0.2, 0.1)],
            B_corrected=[reading(loss=x) for x in (0.05, 0.2, 0.1)],
        ),
    ),
    "R19": (
        lambda: apart(ensemble=reading(loss=0.05), full_data=reading(loss=0.06)),
        lambda: apart(ensemble=reading(loss=0.05), full_data=reading(loss=0.2)),
        lambda: apart(full_data=[reading(loss=x) for x in (0.05, 0.2, 0.1)]),
    ),
    "R20": (
        lambda: apart(merged=reading(ece=0.5)),
        lambda: apart(merged=reading(ece=1.5), B=reading(ece=5.0)),
        lambda: apart(merged=[reading(ece=x) for x in (0.5, 1.5, 1.0)]),
    ),
    "R43": (
        lambda: merges(c2m3=reading(loss=0.08)),
        lambda: merges(c2m3=reading(loss=0.12)),
        lambda: merges(c2m3=[reading(loss=x) for x in (0.05, 0.15, 0.1)]),
    ),
}
EVERY = [
    (module, id, made)
    for module, cases in ((rebasin, CASES), (merging, MERGING_CASES))
    for id, made in cases.items()
]


def verdict(module: Any, id: str, study: Any) -> claims.Verdict:
    """The verdict of one claim by its rule in data/claims.yaml."""
    (found,) = claims.verdicts({id: module.CLAIMS[id]}, study)
    return found


@pytest.mark.parametrize(("module", "id", "made"), EVERY, ids=[id for _, id, _ in EVERY])
def test_a_claim_is_reproduced_by_some_results_not_by_others_and_open_in_between(
    module: Any, id: str, made: Case
) -> None:
    found = [verdict(module, id, make()) for make in made]
    words = ["reproduced", "not reproduced", "undetermined"]
    assert [v.verdict for v in found] == words[: len(made)]
    assert (found[0].interval is not None) == (len(made) == 3)  # none is left out


def test_every_claim_of_both_pages_has_its_function_and_its_case() -> None:
    for module, cases, page in (
        (rebasin, CASES, "02_git_rebasin"),
        (merging, MERGING_CASES, "02b_merging"),
    ):
        known = {c.id: c for c in claims.registry().values() if c.chapter == page}
        judged = {id for id, c in known.items() if c.test["op"] != "report"} - NEVER
        assert list(module.CLAIMS) == sorted(known) and set(cases) == judged


def test_the_map_is_reported_and_cells_that_did_not_train_count_nowhere() -> None:
    study = map_of(lambda opt, rate, width: 5.0 * (opt == "adam"))
    bad = next(c for c in study.map if c[0] == "sgd")
    vars(study)["map"] = {**study.map, bad: {"weights": [line(valid=False)]}}
    found = verdict(rebasin, "R25", study)
    assert found.verdict == "reported" and found.n == 23 and found.value == pytest.approx(12 / 23)


def test_what_lacks_its_premise_is_not_judged() -> None:
    one = study_with({"pairs": 1}, lines={name: [line(40.0)] for name in rebasin.NAMES})
    assert verdict(rebasin, "R01", one).note == "one pair decides nothing"
    narrow = study_with({"width": 16}, lines=kept("weights", 0.4).lines)
    assert "512 units" in verdict(rebasin, "R02", narrow).note
    assert verdict(rebasin, "R02", lines()).note == "no barrier to take away"
    assert "MNIST" in verdict(rebasin, "R05", lines()).note
    without = {"naive": LOW, "weights": LOW, "activations": LOW}
    none = study_with({"ste_steps": 0}, lines=without)
    assert "no straight-through" in verdict(rebasin, "R04", none).note
    assert "no straight-through" in verdict(rebasin, "R07", none).note
    assert "four widths" in verdict(rebasin, "R09", study_with({"widths": []}, by_width={})).note
    assert "no map" in verdict(rebasin, "R23", study_with({"map_pairs": 0}, map={})).note
    few = study_with()
    vars(few)["map"] = {c: {"weights": [line(valid=c[3] == 32)]} for c in few.cells}
    assert "fewer than five settings" in verdict(rebasin, "R23", few).note
    assert "no width keeps" in verdict(rebasin, "R33", narrowest(1.0, loss=0.01)).note
    assert "LayerNorm" in verdict(rebasin, "R35", resnet("batch", 7.0, mode="reestimate")).note
    assert "at no early step two" in verdict(rebasin, "R36", study_with(by_step={})).note
    end = study_with()
    vars(end)["by_step"] = {end.main.steps: {"authors": three(0.5), "weights": three()}}
    assert "at no early step two" in verdict(rebasin, "R36", end).note
    assert "32 times" in verdict(rebasin, "R37", resnet("layer", 7.0)).note
    assert "CIFAR-10" in verdict(rebasin, "R38", study_with()).note
    assert "OT-Fusion" in verdict(rebasin, "R40", study_with()).note
    none_there = study_with(initial=[(0.0, 0.0)] * 3)
    assert "no barrier to remove" in verdict(rebasin, "R41", none_there).note
    for module, id, young in (
        (rebasin, "R05", on("mnist", study_with(lines=lines().lines))),
        (rebasin, "R08", study_with(lines=lines().lines)),
        (merging, "R12", replace(merges(), main=study_with().main)),
        (merging, "R14", replace(merges(), main=study_with().main)),
    ):
        if module is merging:
            vars(young).update(merged=merges().merged)
        assert "17 times" in verdict(module, id, young).note, id
    other = replace(merges(), net="resnet8:width={width},norm=batch", merges=1)
    vars(other).update(merged={name: found[:1] for name, found in merges().merged.items()})
    for id in ("R12", "R13", "R14"):
        assert verdict(merging, id, other).note.startswith("one merge decides nothing; the claim")
    vars(other).update(merged={"same data": merges().merged["same data"]})
    assert "C2M3 was not tried" in verdict(merging, "R43", other).note
    left_out = merging.design(**{**MERGING, "many": 0, "halves": 0, "split": False})
    vars(left_out).update(merged={}, halfway={"weights": []}, apart=[])
    for found in claims.verdicts(merging.CLAIMS, left_out):
        assert found.verdict == claims.NOT_TESTABLE and found.note, found.claim.id


def test_pairs_that_failed_a_gate_count_nowhere() -> None:
    given = [line(40.0), line(50.0, place=1), line(0.0, place=2, valid=False)]
    found = verdict(rebasin, "R01", lines(naive=given))
    assert (found.value, found.n) == (45.0, 2)


def test_a_search_whose_last_step_is_its_best_is_not_judged() -> None:
    def searched(best: int) -> rebasin.Study:
        details = {"best": best, "held out": [[0, 0.3], [10, 0.2], [20, 0.1]]}
        found = [replace(one, matching={"details": details}) for one in three(0.4)]
        return lines(naive=three(80.0, loss=2.0), ste=found)

    for id in ("R04", "R07"):
        assert "cut short" in verdict(rebasin, id, searched(20)).note
        assert verdict(rebasin, id, searched(10)).verdict != claims.NOT_TESTABLE
    assert "still finding" in rebasin.search(searched(20))
    assert "not its last" in rebasin.search(searched(10))
    assert "left out" in rebasin.search(study_with(lines={}))


def test_young_and_narrow_networks_are_judged_with_the_papers_solver() -> None:
    study = study_with(
        by_width={32: {"weights": three(0.1), "authors": three(5.0)}},
        by_step={15: {"weights": three(0.1), "authors": three(6.0)}},
    )
    for id, value in (("R10", 5.0), ("R36", 6.0)):
        found = verdict(rebasin, id, study)
        assert found.value == value and found.detail.endswith("our solver: 0.1")


def test_a_sentence_says_what_young_and_narrow_networks_keep() -> None:
    found = [verdict(rebasin, "R10", narrowest(0.5, 9.0)), verdict(rebasin, "R36", young(8.0, 9.0))]
    words = "Young networks keep a barrier; whether narrow networks keep one, the pairs do not"
    assert rebasin.keeps(found) == f"{words} decide."
    assert rebasin.keeps([]) == ""


def test_repair_is_judged_over_all_widths_that_keep_a_barrier() -> None:
    study = study_with(
        by_width={
            32: {"weights": three(5.0, loss=0.5, repaired=0.1)},
            64: {"weights": three(3.0, loss=0.3, repaired=0.3)},
            128: {"weights": three(1.0, loss=0.1, repaired=0.0)},  # below the margin
        }
    )
    found = verdict(rebasin, "R33", study)
    assert found.value == pytest.approx(1 - 0.4 / 0.8) and found.n == 3
    assert found.detail == "widths 32, 64"


def test_each_setting_of_the_map_has_networks_of_its_own() -> None:
    inits: dict[Any, set[Any]] = {}
    for (_, _, *setting), pairs in study_with().cells.items():
        ends = {run.init for pair in pairs for run in (pair.a, pair.b)}
        inits.setdefault(tuple(setting), set()).update(ends)
    assert (
        len(inits) == 6 and sum(map(len, inits.values())) == len(set.union(*inits.values())) == 12
    )


def test_which_network_is_corrected_is_decided_on_training_images() -> None:
    study = apart(A_corrected=(0.3, 2.0, 1.0), B_corrected=(0.2, 2.0, 1.0))
    readings = dict(study.apart[0])
    readings["A corrected"] = {**readings["A corrected"], "train": Reading(0.1, 2.0, 1.0)}
    vars(study).update(apart=[readings])
    assert study.read("corrected") == [0.3]  # worse on test images, and chosen all the same


def test_values_say_that_there_is_nothing_where_there_is_nothing() -> None:
    failed = {name: [line(valid=False)] for name in rebasin.NAMES}
    nothing: dict[str, Any] = {"initial": [], "spread": []}
    study = study_with(
        **nothing,
        first=failed,
        lines=failed,
        late=failed,
        decayed={},
        map={},
        by_width={512: failed},
        by_step={15: failed},
    )
    said = rebasin.values(study, [])
    assert said["naive_points"] == "no valid pair" and "stays open" in str(said["closer"])
    assert said["earliest"] == "none" and said["early_points"] == said["time_after"]
    assert said["decayed_nats"] == "not measured" and said["most"] == said["map_told"] == ""
    study = lines(weights=three(loss=0.2, left=0.8), activations=three(left=0.9))
    assert "which way B lies" in rebasin.closer(study.lines)
    vars(study).update(
        nothing, first=study.lines, late=failed, decayed={}, map={}, by_width={}, by_step={}
    )
    assert rebasin.values(study, [])["weights_left"] == "80"
    assert rebasin.told(-0.001, "{:.2f}") == "0.00" and rebasin.told(-0.5) == "−0.5"


@pytest.mark.parametrize(
    ("design", "changed", "words"),
    [
        (rebasin.design, {"pairs": 0}, "pairs: 1 or more"),
        (rebasin.design, {"net": "mlp:widths=16x2"}, "{width}"),
        (rebasin.design, {"batch": 5000}, "batch: 5000"),
        (rebasin.design, {"points": 4}, "points"),
        (merging.design, {"many": 1}, "many, halves: 0, or 2 or more"),
        (merging.design, {"halves": 1}, "many, halves: 0, or 2 or more"),
        (merging.design, {"merges": 0}, "merges: 1 or more"),
    ],
)
def test_bad_parameters_are_refused(
    design: Callable[..., Any], changed: dict[str, Any], words: str
) -> None:
    base = PAGE if design is rebasin.design else MERGING
    with pytest.raises(BadParameter, match=words):
        design(**{**base, **changed})


def test_the_page_on_merging_trains_runs_of_chapter_2() -> None:
    """Networks of all the data are those of the main experiment: nothing is trained twice."""
    main, other = rebasin.design(**PAGE), merging.design(**MERGING)
    trained = {job.run for plan in main.plans() for task in plan for job in task.jobs()}
    assert set(other.full) <= trained
    merged = [run for group in other.groups["same data"] for run in group]
    assert {r.recipe.net for r in merged} == {"mlp:widths=128x3"} and len(set(merged)) == 6
    assert set(merged) <= trained  # width 128 is in the sweep


@pytest.mark.slow
def test_a_budget_holds_what_the_page_measures(store: Store) -> None:
    """After everything was looked at, nothing of the budget is missing, and nothing else there."""
    tiny: dict[str, Any] = {"width": 8, "steps": 20, "pairs": 2, "points": 3, "train_examples": 60}
    more = {"widths": [4], "looks": [10], "ste_steps": 1}
    main = rebasin.design(**{**PAGE, **tiny, **more})
    other = merging.design(**{**MERGING, **tiny, "many": 3, "merges": 1})
    for study, names in (
        (main, ("lines", "by_width", "by_step", "late", "decayed", "map")),
        (other, ("merged", "halfway", "apart")),
    ):
        for name in names:
            getattr(study, name)
    tasks = [task for study in (main, other) for plan in study.plans() for task in plan]
    planned = {task.entry(store, "cpu").key for task in tasks}
    there = {e.key for e in store.entries() if e.identity["kind"] in {t.KIND for t in tasks}}
    assert planned == there
