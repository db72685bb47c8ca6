"""The bridge from stored runs to features: what is measured, what is stored, what is judged."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from companion import data
from companion.cli.runs import describe_entry, is_current
from companion.core.errors import BadParameter
from companion.core.runs import Store
from companion.experiments import featured
from companion.experiments.aligned import pairs_of
from companion.experiments.featured import (
    STATISTICS,
    Featured,
    FeaturesOfPair,
    Lemma,
    Scope,
    after_first,
    averaged,
    comparable,
    examine,
    mean_gap,
    mixed,
    over_pairs,
    rank_correlation,
    ratios,
    separation,
    survey,
)
from companion.experiments.instability import copy
from companion.experiments.methods import Method
from companion.experiments.pairs import Pair
from companion.training import Recipe, Run, build

MLP = Recipe(
    net="mlp:widths=24x2",
    data="digits",
    steps=60,
    batch=60,
    lr=0.1,
    schedule="step",
    milestones=(0.85,),
)
CONV = Recipe(net="vgg11:width=2", data="digits", steps=6, batch=48, lr=0.05)
SCOPE = Scope(points=5, test_examples=120)
how: dict[str, Any] = {"workers": 1, "max_error": 100.0}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def found(shared: Store) -> dict[str, list[Featured]]:
    pairs = pairs_of(MLP, 2)
    a, b = (copy(MLP, 0, 40, n, optimizer="restore") for n in (1, 2))
    late = Pair(a, b)
    groups: dict[str, list[tuple[Pair, Method | None]]] = {
        "naive": [(p, None) for p in pairs],
        "weights": [(p, Method("weights")) for p in pairs],
        "spawned": [(late, None)],
    }
    scope = replace(SCOPE, parts=featured.PARTS)
    return survey(groups, scope, store=shared, **how)


def test_all_parts_are_measured_and_survive_the_store(
    found: dict[str, list[Featured]], shared: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = found["naive"][0]
    assert list(one.gaps()) == [
        "layer1.linear",
        "layer1.relu",
        "layer2.linear",
        "layer2.relu",
        "head",
    ]
    assert one.modes == ("none",) and one.examples == 120
    assert one.additivity and one.commutativity and one.stitching
    assert set(one.spectra) == {"a", "b"}
    # A second call reads: nothing is trained, nothing measured.
    monkeypatch.setattr(FeaturesOfPair, "measure", lambda *_: pytest.fail("measured again"))
    scope = replace(SCOPE, parts=featured.PARTS)
    again = examine([(one.pair, None)], scope, store=shared, **how)
    assert again[0].features == one.features
    assert again[0].stitching == one.stitching and again[0].spectra == one.spectra


def test_matching_brings_features_together(found: dict[str, list[Featured]]) -> None:
    for before, after in zip(found["naive"], found["weights"], strict=True):
        for layer, gap in after_first(before.gaps()).items():
            assert after.gaps()[layer] < gap
        # The permuted network is the same function.
        assert after.look().errors == before.look().errors
        assert after.height() < before.height() / 2
    # The first linear map is linear in its weights, so it is connected for any two networks.
    assert max(found["naive"][0].look().layers[0].gap[0.5].mean, 0) < 1e-9


def test_copies_that_part_late_meet_the_rule_and_independent_ones_do_not(
    found: dict[str, list[Featured]],
) -> None:
    assert ratios(found["spawned"][0]).near >= 0.9
    assert all(ratios(f).near < 0.9 for f in found["naive"])


def test_mixed_logits_never_exceed_the_bound_and_the_path_may(
    found: dict[str, list[Featured]],
) -> None:
    for results in found.values():
        for f in results:
            lemma = f.lemma()
            assert lemma.violations == 0 and len(lemma.mixture) == len(lemma.path) == SCOPE.points
            assert lemma.bound == pytest.approx(sum(f.barrier.errors))
            # The features' own mixture, of another computation, at the alphas both have.
            for alpha, error in f.look().mixture.items():
                assert error == pytest.approx(lemma.mixture[lemma.alphas.index(alpha)])
    assert found["naive"][0].lemma().images_above > 0.1 * found["naive"][0].examples


def test_a_violation_would_be_seen() -> None:
    broken = Lemma((0.0, 0.5, 1.0), (1.0, 3.0, 1.0), (1.0, 2.0, 1.0), 2.0, 100)
    assert broken.violations == 1 and broken.images_above == 0
    assert broken.mixed_excess == pytest.approx(1)
    assert Lemma((0.0, 1.0), (1.0, 1.0), (1.0, 5.0), 2.0, 200).images_above == 6


def test_mixed_logits_are_those_of_both_networks() -> None:
    images = data.load("digits")
    split = images.test.head(64)
    a, b = (build(Run(MLP, init=i), images, torch.device("cpu")).state_dict() for i in range(2))
    module = build(Run(MLP), images, torch.device("cpu"))
    at_ends = mixed(module, a, b, split, (0.0, 0.25, 1.0))
    logits = []
    for theta in (a, b):
        module.load_state_dict(theta)
        with torch.no_grad():
            logits.append(module(split.x).double())
    wanted = [
        100 * float(((1 - t) * logits[0] + t * logits[1]).argmax(1).ne(split.y).double().mean())
        for t in (0.0, 0.25, 1.0)
    ]
    assert at_ends == pytest.approx(wanted)


def test_batchnorm_is_measured_in_both_modes_and_invalid_pairs_have_no_barrier(
    store: Store,
) -> None:
    scope = replace(SCOPE, parts=("stitching",), layers=("stage1", "head"))
    (one,) = examine([(pairs_of(CONV, 1)[0], None)], scope, store=store, workers=1)
    assert one.modes == ("interpolate", "reestimate")
    assert one.gaps(bn="interpolate") != one.gaps(bn="reestimate")
    assert one.stitching is not None and one.stitching.closed and one.additivity is None
    assert not one.valid and math.isnan(one.height()) and math.isnan(mean_gap(one))
    assert over_pairs([one], lambda f: 1.0) is None and averaged([one], lambda f: f.gaps()) == {}


def test_statistics_count_valid_pairs_and_leave_out_the_first_layer(
    found: dict[str, list[Featured]],
) -> None:
    both = [*found["naive"], *found["weights"], *found["spawned"]]
    high = [f.height() > 2 for f in both]
    assert any(high) and not all(high)
    for name in ("E[1 − cos½]", "Dist_com", "Dist_σ"):
        one = separation(both, STATISTICS[name])
        assert one.pairs == (sum(high), len(high) - sum(high))
        assert 0 <= one.pooled <= 1
    reversed_ = separation(both, lambda f: {k: -v for k, v in f.gaps().items()})
    one = separation(both, lambda f: f.gaps())
    assert reversed_.pooled == pytest.approx(1 - one.pooled)
    # Planted: a number that is the barrier separates perfectly, in every layer.
    planted = separation(both, lambda f: {k: f.height() for k in f.gaps()})
    assert (planted.pooled, planted.worst, planted.output) == (1, 1, 1)
    grid = {1: found["naive"], 2: found["weights"], 3: found["naive"], 4: found["weights"]}
    rising = rank_correlation(grid, lambda k, f: k, lambda k, f: 2.0 * k)
    assert rising is not None and (rising.value, rising.n) == (1, 2)
    assert rank_correlation({1: found["naive"]}, lambda k, f: k, lambda k, f: k) is None


def test_a_mode_that_was_not_measured_is_refused(found: dict[str, list[Featured]]) -> None:
    one = found["naive"][0]
    assert one.look("reestimate") is one.look()  # there is no BatchNorm
    for read in (one.look, one.height):
        with pytest.raises(BadParameter, match="bn"):
            read("re-estimate")


def test_the_coefficient_is_a_ratio_of_lengths_times_the_cosine(
    found: dict[str, list[Featured]],
) -> None:
    for one in (*found["naive"], *found["weights"]):
        for x in one.layers():
            cosine = math.sqrt(x.c[0.5].median * x.twin[0.5].median)
            assert one.lengths()[x.name] * cosine == pytest.approx(x.c[0.5].median)
    assert found["naive"][0].lengths()["head"] > found["naive"][0].coefficients()["head"]


def test_means_leave_out_the_first_layer_and_count_a_feature_once(
    found: dict[str, list[Featured]],
) -> None:
    one = found["naive"][0]
    later = list(one.gaps().values())[1:]
    assert mean_gap(one) == pytest.approx(sum(later) / len(later))
    look = one.look()
    twice = replace(look, layers=(*look.layers, replace(look.layers[-1], name="block")))
    doubled = replace(one, features={"none": twice})
    assert doubled.gaps() == one.gaps() and ratios(doubled) == ratios(one)


def test_only_pairs_with_every_number_are_compared(found: dict[str, list[Featured]]) -> None:
    one = found["naive"][0]
    assert comparable([one, replace(one, commutativity=None)]) == [one]


def test_the_store_knows_the_kind(found: dict[str, list[Featured]], shared: Store) -> None:
    entries = [e for e in shared.entries() if e.identity["kind"] == "features"]
    assert len(entries) == 5
    assert any("weights" in describe_entry(e.identity) for e in entries)
    current = is_current(shared)
    assert all(current(e.identity) for e in entries)
    assert not current({**entries[0].identity, "semantics": -1})
    task = FeaturesOfPair(found["naive"][0].pair, Method("naive"), SCOPE)

    def key(**change: Any) -> str:
        return replace(task, scope=replace(SCOPE, **change)).entry(shared, "cpu").key

    assert key() != key(points=7)
    assert key() == key(batch=7), "how many images go through at a time changes nothing"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"points": 4}, "odd"),
        ({"parts": ("spectrum",)}, "spectra"),
        ({"bn": ("batch",)}, "interpolate"),
        ({"bn": ()}, "at least one"),
    ],
)
def test_a_scope_that_cannot_be_measured_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(BadParameter, match=words):
        Scope(**wrong)
