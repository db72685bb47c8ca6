"""Chapter 2's claims on made-up results: each comes out reproduced once, and once not."""

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
}
MERGING: dict[str, Any] = {**COMMON, "many": 2, "halves": 2, "merge_width": None, "split": True}
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
    """Three pairs, of these error barriers in turn."""
    errors = errors or (0.0,)
    return [line(errors[i % len(errors)], place=i, **of) for i in range(3)]


def study_with(changed: Mapping[str, Any] | None = None, /, **found: Any) -> rebasin.Study:
    """A study of three pairs on ``digits`` whose experiments found this."""
    study = rebasin.design(**{**PAGE, **(changed or {})})
    vars(study).update(found)
    return study


def lines(**given: Sequence[Aligned]) -> rebasin.Study:
    """Every method on three pairs; what is not given has no barrier."""
    return study_with(lines={name: given.get(name, three()) for name in rebasin.NAMES})


def sweep(name: str, losses: Sequence[float], keys: Sequence[int]) -> rebasin.Study:
    """Width or step -> results whose loss barrier after matching is this."""
    found = {k: {"weights": three(loss=v)} for k, v in zip(keys, losses, strict=True)}
    return study_with(**{name: found})


def narrowest(*errors: float, **of: Any) -> rebasin.Study:
    """The narrowest of the widths after matching."""
    return study_with(by_width={32: {"weights": three(*errors, **of)}})


def resnet(norm: str, error: float, mode: str = "none") -> rebasin.Study:
    """ResNet-20, four times as wide."""
    net = {"net": f"resnet20:width={{width}},norm={norm}", "width": 64, "widths": []}
    return study_with(net, by_width={64: {"weights": three(error, mode=mode)}})


def map_of(barrier: Callable[[str, float], float]) -> rebasin.Study:
    """The map of settings, with a barrier after matching for each optimiser and rate."""
    study = study_with()
    vars(study)["map"] = {c: {"weights": [line(barrier(c[0], c[1]))]} for c in study.cells}
    return study


def on_mnist(**given: Any) -> rebasin.Study:
    """As :func:`lines`, on MNIST."""
    study = lines(**given)
    found = replace(study, main=replace(study.main, data="mnist"))
    vars(found).update(lines=study.lines)
    return found


LOW, HIGH = three(1.9, 0.1, 0.5), three(0.1, 0.2, 2.1)
WIDTHS, LOOKS = (32, 64, 128, 256, 512), (15, 50, 150, 500)
DOWN, UP = (0.5, 0.4, 0.3, 0.2, 0.1), (0.1, 0.2, 0.3, 0.4, 0.5)

# Claim -> results under which it is reproduced, and under which it is not.
CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "R01": (lambda: lines(naive=three(40.0, 31.0)), lambda: lines(naive=three(40.0, 29.0))),
    "R02": (lambda: lines(weights=LOW), lambda: lines(weights=HIGH)),
    "R03": (lambda: lines(activations=LOW), lambda: lines(activations=HIGH)),
    "R04": (lambda: lines(ste=LOW), lambda: lines(ste=HIGH)),
    "R05": (
        lambda: on_mnist(weights=three(loss=0.01), activations=three(loss=0.015)),
        lambda: on_mnist(weights=three(loss=0.01), activations=three(loss=0.03)),
    ),
    "R06": (lambda: lines(activations=three(loss=0.2)), lambda: lines(weights=three(loss=0.2))),
    "R07": (
        lambda: lines(weights=three(loss=0.2), activations=three(loss=0.1)),
        lambda: lines(ste=three(loss=0.05), activations=three(loss=0.1)),
    ),
    "R08": (lambda: lines(weights=three(loss=-0.01)), lambda: lines(weights=three(loss=0.01))),
    "R09": (lambda: sweep("by_width", DOWN, WIDTHS), lambda: sweep("by_width", UP, WIDTHS)),
    "R10": (lambda: narrowest(3.0, 4.0), lambda: narrowest(0.5, 1.0)),
    "R11": (lambda: sweep("by_step", DOWN[:4], LOOKS), lambda: sweep("by_step", UP[:4], LOOKS)),
    "R21": (
        lambda: study_with(decayed={"naive": three(loss=1.0, calibrated=0.05)}),
        lambda: study_with(decayed={"naive": three(loss=1.0, calibrated=0.5)}),
    ),
    "R22": (lambda: lines(greedy=three(loss=0.2)), lambda: lines(weights=three(loss=0.2))),
    "R23": (
        lambda: map_of(lambda opt, rate: 5.0 * (opt == "sgd" and rate == 0.01)),
        lambda: map_of(lambda opt, rate: 5.0 * (opt == "sgd" and rate == 0.1)),
    ),
    "R24": (
        lambda: map_of(lambda opt, rate: 5.0 * (opt == "adam" and rate == 1e-2)),
        lambda: map_of(lambda opt, rate: 5.0 * (opt == "adam" and rate == 3e-4)),
    ),
    "R26": (study_with, lambda: study_with(counterexample={"one": 25.0, "other": 12.0})),
    "R27": (study_with, lambda: study_with(counts={"MLP": 3498, "VGG-16": 35161})),
    "R28": (lambda: study_with(tied=(55109.4, 53)), lambda: study_with(tied=(25638.3, 37))),
    "R29": (
        lambda: lines(steepest=three(30.0, 6.0)),
        lambda: lines(steepest=three(4.0, 1.0)),
    ),
    "R30": (lambda: lines(weights=three(left=0.9)), lambda: lines(weights=three(left=0.5))),
    "R31": (lambda: study_with(late={"naive": LOW}), lambda: study_with(late={"naive": HIGH})),
    "R32": (
        lambda: lines(naive=three(70.0), random=three(75.0, 66.0)),
        lambda: lines(naive=three(70.0), random=three(20.0, 30.0)),
    ),
    "R33": (
        lambda: narrowest(loss=0.5, repaired=0.1),
        lambda: narrowest(loss=0.5, repaired=0.4),
    ),
    "R34": (
        lambda: resnet("batch", 7.0, "reestimate"),
        lambda: resnet("batch", 1.0, "reestimate"),
    ),
    "R35": (lambda: resnet("layer", 7.0), lambda: resnet("layer", 1.0)),
    "R36": (
        lambda: study_with(by_step={15: {"weights": three(8.0, 9.0)}}),
        lambda: study_with(by_step={15: {"weights": three(0.5, 1.0)}}),
    ),
}


def merged(**given: tuple[float, float, float]) -> dict[str, dict[str, Reading]]:
    """What predictors read: loss, error and calibration error, of test and train data alike."""
    usual = dict.fromkeys(
        [
            "input_0",
            "input_1",
            "mean",
            "merged",
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


def merges(**given: tuple[float, float, float]) -> merging.Study:
    """Two merges, of the same data and of random halves, that read this."""
    study = merging.design(**MERGING)
    vars(study).update(merges=dict.fromkeys(study.groups, merged(**given)))
    return study


def apart(
    chosen: tuple[float, float] = (0.0, 0.0), **given: tuple[float, float, float]
) -> merging.Study:
    """Three pairs of biased halves: error and loss at the chosen point, above the ends."""
    study = merging.design(**MERGING)
    vars(study).update(halfway={"weights": three(chosen=chosen)}, apart=[merged(**given)] * 3)
    return study


MERGING_CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "R12": (lambda: merges(merged=(0.05, 2.0, 1.0)), lambda: merges(merged=(0.2, 2.0, 1.0))),
    "R13": (lambda: merges(merged=(0.1, 2.5, 1.0)), lambda: merges(merged=(0.1, 1.5, 1.0))),
    "R14": (lambda: merges(merged=(0.1, 2.0, 2.5)), lambda: merges(merged=(0.1, 2.0, 3.5))),
    "R15": (lambda: merges(mean=(2.0, 80.0, 1.0)), lambda: merges(mean=(2.0, 20.0, 1.0))),
    "R16": (lambda: apart((0.0, -0.02)), lambda: apart((0.0, 0.02))),
    "R17": (lambda: apart((0.5, 0.0)), lambda: apart((-0.5, 0.0))),
    "R18": (
        lambda: apart(A_corrected=(0.08, 2.0, 1.0)),
        lambda: apart(A_corrected=(0.2, 2.0, 1.0), B_corrected=(0.2, 2.0, 1.0)),
    ),
    "R19": (
        lambda: apart(ensemble=(0.05, 2.0, 1.0), full_data=(0.06, 2.0, 1.0)),
        lambda: apart(ensemble=(0.05, 2.0, 1.0), full_data=(0.2, 2.0, 1.0)),
    ),
    "R20": (
        lambda: apart(merged=(0.1, 2.0, 0.5)),
        lambda: apart(merged=(0.1, 2.0, 1.5), B=(0.1, 2.0, 5.0)),
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
def test_a_claim_is_reproduced_by_some_results_and_not_by_others(
    module: Any, id: str, made: tuple[Callable[[], Any], Callable[[], Any]]
) -> None:
    assert verdict(module, id, made[0]()).verdict == "reproduced"
    assert verdict(module, id, made[1]()).verdict == "not reproduced"


def test_every_claim_of_both_pages_has_its_function_and_its_case() -> None:
    for module, cases, page in (
        (rebasin, CASES, "02_git_rebasin"),
        (merging, MERGING_CASES, "02b_merging"),
    ):
        known = {c.id: c for c in claims.registry().values() if c.chapter == page}
        judged = {id for id, c in known.items() if c.test["op"] != "report"}
        assert list(module.CLAIMS) == sorted(known) and set(cases) == judged


def test_the_map_is_reported_and_cells_that_did_not_train_count_nowhere() -> None:
    study = map_of(lambda opt, rate: 5.0 * (opt == "adam"))
    bad = next(c for c in study.map if c[0] == "sgd")
    vars(study)["map"] = {**study.map, bad: {"weights": [line(valid=False)]}}
    found = verdict(rebasin, "R25", study)
    assert found.verdict == "reported" and found.n == 23 and found.value == pytest.approx(12 / 23)


def test_what_lacks_its_premise_is_not_judged() -> None:
    one = study_with({"pairs": 1}, lines={name: [line(40.0)] for name in rebasin.NAMES})
    assert verdict(rebasin, "R01", one).note == "one pair decides nothing"
    narrow = study_with({"width": 16}, lines={"weights": LOW})
    assert "512 units" in verdict(rebasin, "R02", narrow).note
    assert "MNIST" in verdict(rebasin, "R05", lines()).note
    none = study_with({"ste_steps": 0}, lines={"weights": LOW, "activations": LOW})
    assert "no straight-through" in verdict(rebasin, "R04", none).note
    assert "no straight-through" in verdict(rebasin, "R07", none).note
    assert "four widths" in verdict(rebasin, "R09", study_with({"widths": []}, by_width={})).note
    assert "no map" in verdict(rebasin, "R23", study_with({"map_pairs": 0}, map={})).note
    assert "too small" in verdict(rebasin, "R33", narrowest(loss=0.01)).note
    assert "LayerNorm" in verdict(rebasin, "R35", resnet("batch", 7.0, "reestimate")).note
    short = merges(input_0=(0.1, 40.0, 1.0), input_1=(0.1, 40.0, 1.0))
    assert "cut short" in verdict(merging, "R12", short).note
    left_out = merging.design(**{**MERGING, "many": 0, "halves": 0, "split": False})
    vars(left_out).update(merges={}, halfway={"weights": []}, apart=[])
    for found in claims.verdicts(merging.CLAIMS, left_out):
        assert found.verdict == claims.NOT_TESTABLE and found.note, found.claim.id


def test_pairs_that_failed_a_gate_count_nowhere() -> None:
    given = [line(40.0), line(50.0, place=1), line(0.0, place=2, valid=False)]
    found = verdict(rebasin, "R01", lines(naive=given))
    assert (found.verdict, found.value, found.n) == ("reproduced", 40.0, 2)


def test_which_network_is_corrected_is_decided_on_training_images() -> None:
    study = apart(A_corrected=(0.3, 2.0, 1.0), B_corrected=(0.2, 2.0, 1.0))
    readings = dict(study.apart[0])
    readings["A corrected"] = {**readings["A corrected"], "train": Reading(0.1, 2.0, 1.0)}
    vars(study).update(apart=[readings])
    assert study.read("corrected") == [0.3]  # worse on test images, and chosen all the same


def test_values_say_that_there_is_nothing_where_there_is_nothing() -> None:
    failed = {name: [line(valid=False)] for name in rebasin.NAMES}
    study = study_with(
        first=failed,
        lines=failed,
        late=failed,
        decayed={},
        map={},
        by_width={512: failed},
        by_step={15: failed},
    )
    said = rebasin.values(study, [], [])
    assert said["naive_points"] == "no valid pair" and "stays open" in str(said["closer"])
    assert said["earliest"] == "none" and said["early_points"] == said["time_after"]
    assert said["decayed_nats"] == "not measured" and said["most"] == said["map_told"] == ""
    study = lines(weights=three(loss=0.2, left=0.8), activations=three(left=0.9))
    assert "which way B lies" in rebasin.closer(study.lines)
    vars(study).update(first=study.lines, late=failed, decayed={}, map={}, by_width={}, by_step={})
    assert rebasin.values(study, [], [])["weights_left"] == "80"
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
    assert {r.recipe.net for r in other.groups["same data"]} == {"mlp:widths=128x3"}
    assert set(other.groups["same data"]) <= trained  # width 128 is in the sweep


@pytest.mark.slow
def test_a_budget_holds_what_the_page_measures(store: Store) -> None:
    """After everything was looked at, nothing of the budget is missing, and nothing else there."""
    tiny = {"width": 8, "steps": 20, "pairs": 2, "points": 3, "train_examples": 60}
    more = {"widths": [4], "looks": [10], "ste_steps": 1}
    main = rebasin.design(**{**PAGE, **tiny, **more})
    other = merging.design(**{**MERGING, **tiny})
    for study, names in (
        (main, ("lines", "by_width", "by_step", "late", "decayed", "map")),
        (other, ("merges", "halfway", "apart")),
    ):
        for name in names:
            getattr(study, name)
    tasks = [task for study in (main, other) for plan in study.plans() for task in plan]
    planned = {task.entry(store, "cpu").key for task in tasks}
    there = {e.key for e in store.entries() if e.identity["kind"] in {t.KIND for t in tasks}}
    assert planned == there
