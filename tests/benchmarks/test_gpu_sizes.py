"""How long a record may train, from measured speeds: arithmetic, and that the chapters take it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_pack
import pytest
from gpu_sizes import (
    DESIGNS,
    GUESS,
    SPARE,
    START_S,
    TINY,
    TRIALS,
    Design,
    Load,
    Pairs,
    Rate,
    Speeds,
    Trial,
    seconds,
    sensible,
    size,
    speeds,
)
from gpu_sizes import instability as cost_of_chapter_1

from companion.book.layout import Book
from companion.book.recording import prepare, record

ROOT = Path(__file__).resolve().parents[2]


def design(**changes: Any) -> Design:
    """A record of four rounds of nine networks and ten pairs."""
    plain = Design(
        stage="a record",
        chapter="01_instability",
        profile="gpu",
        name="a-record",
        settings=("inits=3",),
        loads=(Load("resnet20", 9, 4),),
        pairs=(Pairs("resnet20", 10, 11, 4000, modes=3, reestimated=2000),),
        least=100,
        most=63_000,
        limit_s=100,
    )
    return replace(plain, **changes)


def row(net: str, engine: str, count: int, rate: float, **more: Any) -> dict[str, Any]:
    found = {"net": net, "engine": engine, "replicas": count, "steps_per_second_each": rate}
    return found | {"deterministic": True, "seconds_per_copy": 1.0, **more}


# ---- speeds


def test_a_step_takes_as_long_as_the_next_larger_group() -> None:
    known = Speeds({("lenet", "vmap"): {1: Rate(1.0), 9: Rate(2.0)}}, {})
    assert [known.step_s("lenet", "vmap", m) for m in (1, 2, 9)] == [1.0, 2.0, 2.0]
    assert known.step_s("lenet", "vmap", 27) == 6.0  # three groups, one after the other
    assert known.step_s("lenet", "graphs", 1) is None
    # Captured steps are not padded: five networks cost what lies between three and nine.
    steps = Speeds({("resnet20", "graphs"): {3: Rate(2.0), 9: Rate(5.0)}}, {})
    assert [steps.step_s("resnet20", "graphs", m) for m in (1, 3, 5, 9)] == [2.0, 2.0, 3.0, 5.0]


def test_measured_speeds_replace_estimates_network_by_network() -> None:
    found = speeds(
        {
            "rows": [
                row("resnet20", "graphs", 9, 400.0, ready_s=3.0),
                row("resnet20", "loop", 1, 250.0),
                row("resnet20", "compile", 9, 900.0, finite=False),
                row("resnet20", "graphs", 9, 999.0, deterministic=False),
                {"net": "lenet", "engine": "vmap", "replicas": 9, "error": "RuntimeError: no"},
                {"net": "resnet20", "engine": "graphs", "replicas": 27, "error": "no memory"},
            ],
            "pairs": {"resnet20": {"image_s": 1e-6, "reestimated_image_s": 2e-6}},
        }
    )
    assert found.measured
    assert found.rates["resnet20", "graphs"] == {9: Rate(1 / 400, 3.0)}
    assert found.step_s("resnet20", "loop", 9) == pytest.approx(9 / 250)
    assert found.step_s("resnet20", "compile", 9) is None  # it diverged
    assert found.step_s("lenet", "vmap", 9) is None  # it failed: the estimate is no comfort
    assert found.failed == {("lenet", "vmap"), ("resnet20", "compile")}
    assert found.rates["vgg16", "graphs"] == GUESS.rates["vgg16", "graphs"]
    assert found.image_s["resnet20"] == 1e-6 and found.again_s["resnet20"] == 2e-6
    assert found.image_s["vgg16"] == GUESS.image_s["vgg16"]
    assert speeds(None) is GUESS and not GUESS.measured


# ---- T


@pytest.mark.parametrize(
    ("steps", "rounded"),
    [(12_345, 12_000), (3999, 3500), (1234, 1200), (499, 450), (87.9, 80), (7.5, 0), (0.5, 0)],
)
def test_a_sensible_number_of_steps(steps: float, rounded: int) -> None:
    assert sensible(steps) == rounded


def test_a_record_ends_in_its_slot_with_a_factor_of_two_to_spare() -> None:
    last = 0
    for slot in (60, 90, 120, 200, 400, 1000):
        found = size(design(), slot, GUESS)
        assert found is not None
        # `companion record` stops 20 s before its limit, or a tenth of it.
        margin = min(20, slot / 10)
        assert START_S + SPARE * (found.expected_s - START_S) <= slot - margin
        assert found.steps >= last
        last = found.steps
    each, besides = seconds(design(), GUESS, None) or (0, 0)
    assert each == pytest.approx(4 * 3e-3)
    pair = 11 * (3 * (4000 * 3e-6 + 0.005) + 2000 * 3e-6)
    assert besides == pytest.approx(10 * pair)


def test_bounds_and_what_does_not_fit() -> None:
    most = size(design(most=700), 400, GUESS)
    assert most is not None and most.steps == 700
    assert size(design(least=50_000), 100, GUESS) is None
    assert size(design(), 20, GUESS) is None  # nothing is left after the start
    many = design(pairs=(Pairs("resnet20", 1000, 31, 60_000),))
    assert size(many, 400, GUESS) is None  # the pairs alone take longer


def test_fork_steps_are_shares_of_the_training() -> None:
    found = size(design(shares=(0, 0.01, 0.1), most=2000), 400, GUESS)
    assert found is not None
    assert found.settings == ("inits=3", "steps=2000", "ks=[0,20,200]")


def test_another_engine_is_taken_if_it_is_clearly_faster() -> None:
    def known(compile_s: float, ready: float, **failed: Any) -> Speeds:
        rates = {
            ("resnet20", "graphs"): {9: Rate(3e-3)},
            ("resnet20", "compile"): {9: Rate(compile_s, ready)},
        }
        return Speeds(rates, GUESS.image_s, measured=True, **failed)

    free = design(pairs=())
    fast = size(free, 200, known(1e-3, 20), True)
    assert fast is not None and fast.engine == "compile" and fast.measured
    slow_to_start = size(free, 200, known(1e-3, 75), True)
    assert slow_to_start is not None and slow_to_start.engine is None
    little = size(free, 200, known(2.8e-3, 0), True)
    assert little is not None and little.engine is None
    not_offered = size(free, 200, known(1e-3, 0))
    assert not_offered is not None and not_offered.engine is None
    # Where auto's own choice failed, the next best does it.
    broken = known(4e-3, 10, failed=frozenset({("resnet20", "graphs")}))
    other = size(free, 200, broken, True)
    assert other is not None and other.engine == "compile"
    assert size(free, 200, broken) is None


def test_the_counts_of_chapter_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 inits x 2 copies, 4 fork steps: 3 pairs a step, 3 independent, 18 along training."""
    loads, pairs = cost_of_chapter_1("resnet20", 4, 3, 2, norm=True)
    assert [p.count for p in pairs] == [33, 9] and [x.rounds for x in loads] == [6, 4]
    assert {x.copies for x in loads} == {6} and [p.modes for p in pairs] == [3, 1]
    loads, pairs = cost_of_chapter_1("lenet", 4, 3, 3, controls=True)
    # The budget of `paper-mnist` with four fork steps says 107 runs and 126 pairs, with 5 looks.
    assert 107 <= 9 * sum(x.rounds for x in loads) <= 1.3 * 107
    assert 0.9 * 126 <= sum(p.count for p in pairs) + 12 <= 1.3 * 126


@pytest.mark.parametrize("controls", [False, True])
def test_the_counts_are_those_of_the_chapters_budget(
    controls: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What chapter 1 declares for these parameters, against the sum that sizes it."""
    found: list[Any] = []
    settings = ["unstable=mlp:widths=4", "stable=mlp:widths=5", "steps=100", "ks=[0,10,20,30]"]
    settings += ["inits=3", "copies=2", f"controls={str(controls).lower()}", "looks=3"]

    def estimate(costs: list[Any], *_: Any, **__: Any) -> list[float]:
        found.extend(costs)
        return [0.0]

    monkeypatch.setattr("companion.experiments.budget.estimate", estimate)
    record(
        prepare(Book(ROOT), "01_instability", "quick", [*settings, "device=cpu", "workers=1"], "x"),
        dry_run=True,
        say=lambda _: None,
    )
    loads, pairs = cost_of_chapter_1("lenet", 4, 3, 2, controls=controls, kinds=2)
    trained = sum(c.whole.steps for c in found) / 100
    planned = sum(load.rounds * 6 for load in loads)
    assert trained <= planned <= 1.6 * trained  # a group that is not full counts as full
    counted = sum(c.whole.measured.get("pair", 0) for c in found)
    assert counted <= sum(p.count for p in pairs) <= 1.2 * counted


# ---- the table


@pytest.mark.parametrize("one", [*(d.trial for d in DESIGNS), *TRIALS], ids=lambda t: t.stage)
def test_the_chapters_take_what_is_tried_out(one: Trial) -> None:
    """Every parameter of a trial is one of its chapter."""
    asked = prepare(Book(ROOT), one.chapter, one.profile, one.settings, "tried")
    assert asked.parameters["steps"] <= 200


@pytest.mark.parametrize("one", [*DESIGNS, *TINY], ids=lambda d: d.stage)
def test_the_chapters_take_what_the_table_says(one: Design) -> None:
    """Chapter, profile, every parameter and the file's name, as ``companion record`` reads them."""
    found = size(one, 100_000, GUESS)
    assert found is not None and found.steps == one.most
    asked = prepare(Book(ROOT), one.chapter, one.profile, found.settings, one.name)
    values = asked.parameters
    assert values["steps"] == one.most and asked.name == one.name
    if one in DESIGNS:
        assert values["device"] == "cuda"
        folder = str(values["dataset"]).partition("?")[0]
        there = [name.split("/")[0].lower() for names in gpu_pack.FILES.values() for name in names]
        assert folder.replace("wikitext2", "wikitext-2") in there


def test_every_record_has_a_stage_and_a_file_of_its_own() -> None:
    for table in (DESIGNS, TINY):
        assert len({d.stage for d in table}) == len(table)
        assert len({(d.chapter, d.name) for d in table}) == len(table)
