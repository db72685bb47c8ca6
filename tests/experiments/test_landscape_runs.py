"""The landscape between stored runs: the values of the instruments, and what they must agree on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from companion import data
from companion.core.errors import BadParameter
from companion.core.runs import Store
from companion.core.theta import layout
from companion.experiments.budget import count
from companion.experiments.instability import copy, trunk
from companion.experiments.landscape import (
    Bending,
    Gap,
    Geometry,
    Survey,
    bend_pairs,
    bends_of,
    decompose_pairs,
    gaps_of,
    survey_pairs,
    surveys_of,
)
from companion.experiments.layers import sweep_pairs
from companion.experiments.pairs import Evaluation, Pair, measure_pairs
from companion.landscape import Surface, cos_of_branches, towards
from companion.layerwise import Sweep
from companion.training import Recipe, Run, build, load_weights

DIGITS = data.load("digits")
RECIPE = Recipe(net="mlp:widths=20x2", data="digits", steps=60, batch=60, lr=0.1)
OPTIONS: dict[str, Any] = {"workers": 1}
FEW: dict[str, Any] = {"train_examples": 200, "test_examples": 100}


def pair_at(k: int, step: int | None = None) -> Pair:
    one, two = (copy(RECIPE, 0, k, number) for number in (1, 2))
    return Pair(one, two, step, start=(trunk(RECIPE, 0), k))


@pytest.fixture(scope="module")
def found(shared_store: Store) -> list[Geometry]:
    pairs = [pair_at(0), pair_at(20)]
    return survey_pairs(pairs, Survey(**FEW), store=shared_store, **OPTIONS)


def test_the_barrier_is_that_of_every_other_measurement(
    found: list[Geometry], shared_store: Store
) -> None:
    how = Evaluation(**FEW)
    pairs = [pair_at(0), pair_at(20)]
    known = measure_pairs(pairs, how, store=shared_store, max_error=100, **OPTIONS)
    for one, other in zip(found, known, strict=True):
        curve = other.barrier.curve
        for split in ("train", "test"):
            mine, theirs = (c.values[split]["loss"] for c in (one.curve, curve))
            assert mine == pytest.approx(theirs, abs=1e-6)
            middle = theirs[15] - (theirs[0] + theirs[-1]) / 2
            assert one.barrier(split) == pytest.approx(middle, abs=1e-6)
        assert one.distances["ab"] == pytest.approx(other.distances["ab"])
        for name in ("a_init", "b_start"):
            assert one.distances[name] == pytest.approx(other.distances[name])


def test_slopes_blocks_and_angles_are_of_the_stored_networks(
    found: list[Geometry], shared_store: Store
) -> None:
    pair, geometry = pair_at(20), found[1]
    a, b, w0, w20 = (
        load_weights(run, step, store=shared_store)
        for run, step in ((pair.a, 60), (pair.b, 60), (trunk(RECIPE, 0), 0), (trunk(RECIPE, 0), 20))
    )
    module = build(pair.a, DIGITS, torch.device("cpu"))
    names = layout(module).parameters
    surface, delta = Surface(module, DIGITS.train.head(200)), towards(module, a, b)
    assert surface.local(b, delta) == geometry.b
    assert geometry.middle.loss == pytest.approx(geometry.mid(), rel=1e-9)
    assert geometry.cosines["init"] == pytest.approx(cos_of_branches(a, b, w0, names))
    assert geometry.cosines["start"] == pytest.approx(cos_of_branches(a, b, w20, names))
    assert geometry.end("a").local.curvature == pytest.approx(geometry.a.curvature)
    assert geometry.stepped[0].slope == pytest.approx(geometry.a.slope, rel=0.2)
    assert geometry.controls() == {
        "distance": pytest.approx(sum(geometry.end().squares)),
        "angle": -geometry.cosines["init"],
    }
    assert geometry.predictions(kinks=True) != geometry.predictions()
    by_losses, error = geometry.identity()
    assert by_losses == pytest.approx(geometry.barrier(), abs=1e-4) and error < 1e-2


def test_layers_are_those_of_a_sweep(found: list[Geometry], shared_store: Store) -> None:
    sweep = Sweep(kinds=("single",), train_examples=200, test_examples=100)
    measured = sweep_pairs([pair_at(0)], sweep, store=shared_store, max_error=100, **OPTIONS)
    heights = measured[0].heights("single", "train", "loss")
    for end in ("a", "b"):
        assert list(found[0].layers(end)) == list(heights)


def test_equal_networks_have_no_barrier_and_pairs_without_start_no_angle(
    shared_store: Store,
) -> None:
    strangers = Pair(Run(RECIPE, init=0, order="x"), Run(RECIPE, init=1, order="y"))
    same = Pair(strangers.a, strangers.a)
    survey = Survey(points=7, by=None, **FEW)
    other, null = survey_pairs([strangers, same], survey, store=shared_store, **OPTIONS)
    assert null.barrier() == 0 and null.a.slope == 0 and null.predictions()["quintic"] == 0
    assert other.cosines == {} and "angle" not in other.controls()
    assert other.blocks == () and set(other.distances) == {"ab", "a_init", "b_init"}
    with pytest.raises(BadParameter, match="by='module'"):
        other.layers()


def test_matching_changes_the_logits(shared_store: Store) -> None:
    pair = Pair(Run(RECIPE, init=0, order="x"), Run(RECIPE, init=1, order="y"))
    naive, matched = decompose_pairs(
        [(pair, None), (pair, "weights")], Gap(examples=300), store=shared_store, **OPTIONS
    )
    assert naive.residual < 1e-12 and matched.residual < 1e-12
    assert matched.barrier < 0.5 * naive.barrier and matched.deviation < naive.deviation
    assert matched.ensemble == pytest.approx(naive.ensemble, abs=1e-6), "B's outputs stay"
    assert 0 < naive.share() < 1


def test_a_bend_is_lower_and_longer(shared_store: Store) -> None:
    pair = Pair(Run(RECIPE, init=0, order="x"), Run(RECIPE, init=1, order="y"))
    how = Bending(steps=150, lr=0.1, points=7, at=(0.0, 0.5), sharp_examples=100, **FEW)
    (bent,) = bend_pairs([pair], how, store=shared_store, **OPTIONS)
    assert bent.bend.height("train", "loss") < 0.5 * bent.line.height("train", "loss")
    assert bent.lengths[1] > bent.lengths[0]
    assert bent.line_sharpness[0] == bent.bend_sharpness[0] and bent.line_sharpness[0].value > 0
    assert bent.line_sharpness[1] != bent.bend_sharpness[1]


def test_a_plan_counts_what_is_missing(found: list[Geometry], shared_store: Store) -> None:
    there, gone = [pair_at(0)], [pair_at(0, 30)]
    plans: list[Any] = [
        surveys_of(there + gone, Survey(**FEW)),
        gaps_of([(gone[0], None)]),
        bends_of(gone),
    ]
    (cost,) = count(plans, store=shared_store, device="cpu")
    assert cost.missing.measured == {"landscape": 1, "logits": 1, "bend": 1}


def test_settings_that_cannot_be() -> None:
    for wrong in (
        lambda: Survey(points=4),
        lambda: Survey(inside=2),
        lambda: Survey(bn="reestimate"),
        lambda: Survey(step=0),
        lambda: Survey(train_examples=0),
        lambda: Gap(alpha=1.0),
        lambda: Gap(split="both"),
        lambda: Bending(kind="spline"),
        lambda: Bending(points=2),
    ):
        with pytest.raises(BadParameter):
            wrong()


def test_batchnorm_settings_count_only_where_there_is_batchnorm() -> None:
    plain, batch = "mlp:widths=8", "mlp:widths=8,norm=batch"
    for one, other in (
        (Survey(), Survey(bn="batch")),
        (Gap(), Gap(bn="batch")),
        (Bending(), Bending(bn="batch")),
        (Bending(), Bending(bn_examples=100)),
    ):
        assert one.identity(plain) == other.identity(plain)
        assert one.identity(batch) != other.identity(batch)
    assert Survey().identity(plain) != replace(Survey(), inside=5).identity(plain)
