"""Every claim of the lottery ticket chapter on made-up results: as the papers have it, and not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from companion.connectivity import Barrier, Curve
from companion.connectivity.gates import Gate
from companion.core import closing
from companion.core.errors import CompanionError
from companion.core.runs import Store
from companion.experiments.instability import Instability, Sample
from companion.experiments.pairs import PairResult
from companion.experiments.tickets import Search, Subnetwork, Tickets
from companion.papers import tickets as paper
from companion.report import claims, page

KS = (0, 50, 100)  # of 10,000 steps
LEVELS = (3, 6, 8, 9, 11)
INITS = 3
DEAD = 90.0  # percent


def pair(height: float, end: float = 3.0, train: float = 0.0) -> PairResult:
    """Two networks with ``end`` % errors, between which the test error rises by ``height``."""

    def rise(foot: float) -> Mapping[str, tuple[float, ...]]:
        return dict.fromkeys(("error", "loss"), (foot, foot + height, foot))

    values = {"test": rise(end), "train": rise(train)}
    curve = Curve((0.0, 0.5, 1.0), values, "none", {"test": 100, "train": 100})
    alive = Gate("G0 quality", end <= paper.ALIVE, "")
    found = Barrier({"none": curve}, "none", (alive,), 20.0, 10, (end, end))
    return PairResult(found, {"ab": 20.0, "a_init": 30.0, "b_init": 30.0}, {})


Number = float | tuple[float, float, float]
"""Of three inits, about equal or one by one."""
ByK = Number | Mapping[int, Number]
"""The same at every k, or k by k; ``-1`` is all others."""


def at(value: ByK, k: int, init: int) -> float:
    here = value.get(k, value.get(-1, math.nan)) if isinstance(value, Mapping) else value
    return here[init] if isinstance(here, tuple) else here * (1 + 0.01 * (init - 1))


def tickets(
    search: Search,
    errors: Mapping[str, ByK],
    heights: Mapping[str, ByK],
    previous: ByK = 0.3,
    dense: ByK = 8.0,
    train: float = 0.0,
    at_level: Mapping[tuple[str, int], tuple[ByK, ByK]] | None = None,
) -> Tickets:
    """Every subnetwork of a search; a kind has one error and one barrier at all levels.

    ``at_level``: kind and level -> error and barrier there.
    """
    out = []
    for k in search.ks:
        for kind in dict.fromkeys(("imp", *search.kinds)):
            for level in search.levels_of(kind):
                for init in range(search.inits):
                    name = kind if level else "whole"
                    error, height = (at_level or {}).get(
                        (kind, level), (errors[name], heights[name])
                    )
                    two = pair(at(height, k, init), at(error, k, init), train)
                    along: list[PairResult | None] = [None, None]
                    if kind == "imp" and level:
                        along = [pair(at(v, k, init)) for v in (previous, dense)]
                    sample = Sample(init, k, (1, 2), two)
                    out.append(Subnetwork(kind, level, k, init, (sample,), {}, *along))
    return Tickets(search, tuple(out))


@pytest.fixture(scope="module")
def design() -> paper.Study:
    return paper.design(
        steps=10_000,
        ks=list(KS),
        dense_ks=[],
        levels=list(LEVELS),
        control_levels=list(LEVELS),
        inits=INITS,
        device="cpu",
    )


ERRORS: dict[str, ByK] = {"whole": 3.0, "imp": 3.0, "random": 9.0, "reinit": 8.0}
HEIGHTS: dict[str, ByK] = {"whole": {0: 20.0, -1: 0.5}, "imp": 0.3, "random": 6.0, "reinit": 5.0}


def world(
    design: paper.Study,
    *,
    net: str = "mlp:widths=100x4",
    dataset: str = "digits",
    errors: Mapping[str, ByK] | None = None,
    heights: Mapping[str, ByK] | None = None,
    new: Mapping[str, ByK] | None = None,
    recipe: Mapping[str, Any] | None = None,
    changed: Mapping[str, Any] | None = None,
    search: Mapping[str, Any] | None = None,
    **more: Any,
) -> paper.Study:
    """A study of a small network in which all that the papers claim holds, and what is changed."""
    own = replace(design.recipe, net=net, data=dataset, **(recipe or {}))
    asked = replace(design.search, recipe=own, **(search or {}))
    study = replace(design, search=asked, dense_ks=asked.ks, **(changed or {}))
    errors, heights = ERRORS | dict(errors or {}), HEIGHTS | dict(heights or {})
    found = tickets(asked, errors, heights, **more)
    whole = Instability(own, asked.ks, found.instability("imp", 0).samples)
    renewed: dict[str, ByK] = {"imp": 3.0, "whole": 3.0, "reinit": 8.0, "permuted": 4.0}
    renewed |= dict(new or {})
    moved = tickets(study.new_start, renewed, dict.fromkeys(renewed, 5.0))
    study.__dict__.update(found=found, whole=whole, renewed=moved if study.carried else None)
    return study


RESNET: dict[str, Any] = {"net": "resnet20", "dataset": "cifar10"}
LOW: dict[str, Any] = {**RESNET, "recipe": {"lr": 0.01}}
LARGE: dict[str, Any] = {  # a network whose subnetworks fail at k = 0
    **RESNET,
    "errors": {"imp": {0: 8.9, -1: 3.0}},
    "heights": {"imp": {0: 20.0, -1: 0.3}},
    "previous": {0: 9.0, -1: 0.3},
}
PERHAPS = (0.5, 1.9, 3.2)  # points: the interval has 2 in it
WIDE = (1.0, 4.0, 12.0)
LATE: dict[int, Number] = {0: 20.0, 50: 20.0, 100: 0.3}
OWN: dict[str, dict[str, Any]] = {  # claims about other networks than the default's
    **dict.fromkeys(("C18", "C19", "C20", "C22", "I01"), LARGE),
    "C21": LOW,
}
NEVER = ("I03", "I05", "I06", "I07")  # nothing here measures what they are about


def merged(base: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Nested: what a test changes of a world that is changed already."""
    out = dict(base)
    for name, value in more.items():
        both = isinstance(out.get(name), Mapping) and isinstance(value, Mapping)
        out[name] = {**out[name], **value} if both else value
    return out


def verdict(id: str, study: paper.Study) -> claims.Verdict:
    (found,) = claims.verdicts({id: paper.CLAIMS[id]}, study)
    return found


def caption(draw: Callable[..., None], *given: Any) -> Mapping[str, Any]:
    """What a figure hands to its caption."""
    with page.captured() as found:
        draw(*given)
    (figure,) = found.all("figure")
    values: Mapping[str, Any] = figure["values"]
    return values


def test_the_claims_are_those_of_the_chapter() -> None:
    listed = [c.id for c in claims.registry().values() if c.chapter == paper.CHAPTER]
    assert list(paper.CLAIMS) == listed
    assert {id for id in listed if not claims.registry()[id].profiles} == set(NEVER)


@pytest.mark.parametrize("id", [id for id in paper.CLAIMS if id not in NEVER])
def test_it_is_reproduced(design: paper.Study, id: str) -> None:
    found = verdict(id, world(design, **OWN.get(id, {})))
    assert found.verdict == "reproduced", found


OTHERWISE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # not reproduced, undetermined
    "C09": (
        {"heights": {"imp": LATE}},
        {"heights": {"whole": {0: 20.0, 50: PERHAPS, -1: 0.5}, "imp": {**LATE, 50: PERHAPS}}},
    ),
    "C10": ({"errors": {"imp": 6.0}}, {"heights": {"imp": PERHAPS}}),
    "C11": ({"errors": {"random": 2.0}}, {"errors": {"random": WIDE}}),
    "C12": ({"errors": {"reinit": 2.0}}, {"errors": {"reinit": WIDE}}),
    "C18": (RESNET, merged(LARGE, heights={"imp": {0: PERHAPS, -1: 0.3}})),
    "C19": (
        merged(LARGE, heights={"imp": 20.0}),
        merged(LARGE, heights={"imp": {0: 20.0, 50: 0.3, 100: PERHAPS}}),
    ),
    "C20": (
        merged(LARGE, heights={"imp": 0.3}),
        merged(LARGE, heights={"imp": {0: (20.0, 1.0, 20.0), -1: 0.3}}),
    ),
    "C21": (merged(LOW, errors={"imp": 6.0}), merged(LOW, heights={"imp": PERHAPS})),
    "C22": (RESNET, merged(LARGE, errors={"random": WIDE})),
    "I01": (merged(LARGE, previous=0.3), merged(LARGE, previous={0: (9.0, 1.0, 9.0), -1: 0.3})),
    "I02": ({"dense": 1.0}, {"dense": PERHAPS}),
    "I04": ({"new": {"permuted": 9.0}}, {"new": {"permuted": WIDE}}),
}


@pytest.mark.parametrize("id", OTHERWISE)
def test_it_is_not_reproduced_or_left_open(design: paper.Study, id: str) -> None:
    words = ("not reproduced", "undetermined")
    for otherwise, word in zip(OTHERWISE[id], words, strict=True):
        found = verdict(id, world(design, **otherwise))
        assert found.verdict == word, found


def test_every_claim_that_is_judged_has_all_tests() -> None:
    assert set(OTHERWISE) == set(paper.CLAIMS) - set(NEVER)


ONE: dict[str, Any] = {"search": {"inits": 1}}
LATER: dict[str, Any] = {"search": {"ks": (50, 100)}}
SHORT: dict[str, Any] = {**LARGE, "train": 40.0}


@pytest.mark.parametrize(
    ("id", "otherwise", "why"),
    [
        ("C09", {"heights": {"whole": 0.5}}, "not certainly unstable at the smallest k"),
        ("C09", {"heights": {"whole": PERHAPS}}, "not certainly unstable at the smallest k"),
        ("C10", ONE, "one init"),
        ("C10", LATER, "no k = 0"),
        ("C10", RESNET, "about small networks"),
        ("C10", {"search": {"levels": (3, 6), "control_levels": (3, 6)}}, "13.4 % of the weights"),
        ("C11", {"errors": {"random": DEAD}}, "dead at this density"),
        ("C12", ONE, "one init"),
        ("C18", {**RESNET, "recipe": {"lr": 0.01}}, "standard recipe"),
        ("C18", {}, "about ResNet-20"),
        ("C18", SHORT, "cut short: the whole networks end with 40 % error"),
        ("C19", merged(LARGE, search={"ks": (0, 50)}), "both sides of 0.8 %"),
        ("C19", SHORT, "cut short"),
        ("C20", {}, "every subnetwork matches"),
        ("C20", {"errors": {"random": 3.0}}, "at no density"),
        ("C21", RESNET, "low learning rate, or warm-up"),
        ("C21", {**LOW, "train": 40.0}, "cut short"),
        ("C22", {}, "about ResNet-20 and VGG-16"),
        ("C22", SHORT, "cut short"),
        ("I01", {}, "nothing can disagree"),
        ("I02", {"previous": 5.0}, "not certainly connected"),
        ("I02", LATER, "no k = 0"),
        ("I03", {}, "level by level"),
        ("I04", {"changed": {"carried": False}}, "left out of this run"),
        ("I05", {}, "signs"),
        ("I06", {}, "the share that a round prunes"),
        ("I07", {}, "fails at k = 0"),
    ],
)
def test_what_it_lacks_is_said(
    design: paper.Study, id: str, otherwise: dict[str, Any], why: str
) -> None:
    found = verdict(id, world(design, **otherwise))
    assert found.verdict == claims.NOT_TESTABLE and why in found.note, found


def test_warm_up_is_a_gentle_recipe_and_another_net_has_its_own_mark(design: paper.Study) -> None:
    warm = merged(RESNET, recipe={"warmup": 500})
    assert verdict("C21", world(design, **warm)).verdict == "reproduced"
    vgg = merged(LARGE, net="vgg16")
    assert verdict("C22", world(design, **vgg)).verdict == "reproduced"
    assert "about ResNet-20" in verdict("C18", world(design, **vgg)).note


def test_dead_controls_are_not_stable_and_are_named(design: paper.Study) -> None:
    alive = world(design)
    subnetworks = 3 * (3 * len(LEVELS) + 1) + len(LEVELS)  # an init; carried: at the last k
    assert paper.dead(alive)[0] == 0 and "are alive" in paper.dead_sentence(alive)
    study = world(design, at_level={("random", 11): (DEAD, 0.0)})
    assert study.found.stable("random", 11, 0) == "invalid"
    lost, total, where = paper.dead(study)
    assert (lost, total) == (3 * INITS, subnetworks * INITS)
    assert where == ["pruned at random at 8.59 %"]
    assert "9 of the" in paper.dead_sentence(study)
    assert "pruned at random at 8.59 %" in paper.dead_sentence(study)
    drawn = caption(paper.show_density, study, 0, "density")
    assert "8.59 %" not in drawn["random_barriers"] and "90.0 at 8.59 %" in drawn["random_errors"]
    agreeing = caption(paper.show_quadrants, study)["agreeing"]
    assert "IMP 15 of 15; pruned at random 12 of 12" in agreeing  # a dead one has no place there


def test_ranges_follow_from_what_matches(design: paper.Study) -> None:
    easy, hard = (3.0, 6.0), (9.0, 0.3)  # error and barrier
    study = world(design, at_level={("random", 3): easy, ("imp", 11): hard})
    assert paper.only_imp(study) == [6, 8, 9]
    assert paper.range_sentence(study) == (
        "By the intervals, random pruning matches, too, at 51.2 %; only IMP certainly matches at "
        "26.2 %, 16.8 %, 13.4 %; certainly nothing matches at 8.59 %."
    )
    open_ = world(design, errors={"imp": WIDE, "random": WIDE, "reinit": WIDE})
    assert paper.range_sentence(open_).startswith("At no density")
    stable_and_worse = paper.cells(study)[0, 11]
    assert set(stable_and_worse.values()) == {(True, False)}


def test_captions_and_sentences_say_what_was_measured(design: paper.Study) -> None:
    study = world(design)
    said = study.words() | paper.values(study)
    assert said["network"] == "five-layer perceptron" and said["density"] == "13.4 %"
    assert said["whole_wall_first"] == "20.0" and said["imp_wall_first"] == "0.3"
    assert said["random_error_last"] == "9.0" and said["new_permuted"] == "4.0"
    assert said["drift_first"] == "8.0" and said["step_first"] == "0.3"
    assert "as good as the whole network (matching), so" in str(said["start_sentence"])
    large = world(design, **LARGE)
    assert "unstable and not matching" in paper.start_sentence(large)
    assert paper.onset_sentence(study) == (
        "The subnetwork is stable from k = 0 on, the whole network is stable from k = 50 on."
    )
    never = world(design, heights={"whole": 9.0, "imp": {0: 9.0, 50: PERHAPS, 100: 0.3}})
    assert paper.onset_sentence(never) == (
        "The subnetwork is certainly stable from k = 100 on, and perhaps from 50, "
        "the whole network is stable at no k of this grid."
    )
    told = caption(paper.show_onset, study)["told"]
    assert "whole five-layer perceptron: 20.0 at k = 0, 0.5 at k = 50" in told
    chain = caption(paper.show_chain, study)
    assert chain["to_previous"].startswith("k = 0: 0.3 at 51.2 %")
    assert chain["to_whole"].startswith("k = 0: 8.0 at 51.2 %")
    assert "carried over" in caption(paper.show_carried, study)["told"]
    with page.captured() as none:
        paper.show_carried(world(design, changed={"carried": False}))
    assert none.entries == []
    with page.captured() as table:
        paper.show_cells(study)
    (shown,) = table.all("table")
    assert len(shown["rows"]) == len(KS) * (1 + 3 * len(LEVELS))


def test_a_difference_is_told_in_standard_deviations_of_both(design: paper.Study) -> None:
    study = world(design, errors={"imp": (2.0, 3.0, 4.0), "random": (8.0, 9.0, 10.0)})
    found = verdict("C11", study)
    assert "error +6.00 points, 4.2 standard deviations of both" in found.detail
    assert found.verdict == "reproduced"


def test_a_closed_recording_still_has_its_sentences(design: paper.Study) -> None:
    study = world(design)
    missing = Gate("measured", False, closing.WHY)
    first = study.whole.samples[0]
    hole = replace(first.result, barrier=replace(first.result.barrier, gates=(missing,)))
    samples = (replace(first, result=hole), *study.whole.samples[1:])
    study.__dict__["whole"] = replace(study.whole, samples=samples)
    with closing.closed({"device": "cpu"}):
        assert "not measured" in paper.onset_sentence(study)
        assert verdict("C09", study).note == closing.WHY
        assert verdict("C10", study).verdict == "reproduced"


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"level": 7}, ["level", "7", "control_levels"]),
        ({"control_levels": [9, 15]}, ["control_levels", "15"]),
        ({"ks": [0, 40]}, ["ks", "40", "from 0 to 39"]),
        ({"skip": ["layer9"]}, ["layer9"]),
        ({"copies": 1}, ["copies", "1"]),
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


def test_the_design_follows_the_network() -> None:
    small = paper.design(device="cpu")
    assert small.search.pruning.skip == ("head",) and small.dense_ks == (0, 40, 80)
    resnet = paper.design(net="resnet8:width=4", steps=80, device="cpu")
    assert resnet.search.pruning.skip == ()  # as in the paper's code
    assert len(small.plans()) == 3 and len(replace(small, carried=False).plans()) == 2
