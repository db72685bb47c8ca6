"""Aligned pairs: measured once, under every method, with gates; merges and split data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from companion import data
from companion.cli.runs import describe_entry, is_current
from companion.connectivity import Barrier, Curve, Walker
from companion.connectivity.gates import Gate
from companion.core.errors import BadParameter
from companion.core.runs import Store
from companion.core.theta import layout
from companion.experiments.aligned import (
    Aligned,
    MatchedLine,
    Method,
    align,
    clusters,
    failures,
    independent,
    interval,
    lines_of,
    match,
    pairs_of,
    permuted,
    spec_of,
    trend,
)
from companion.experiments.budget import count
from companion.experiments.merged import merge_runs, read_logits, split_runs
from companion.experiments.methods import METHOD_KINDS, gradient, weights_of
from companion.experiments.pairs import Evaluation, Pair
from companion.rebasin.repair import repair
from companion.training import Recipe, Run, build, load_weights

METHODS = [k.name for k in METHOD_KINDS.values() if k.nets != "gpt"]
RECIPE = Recipe(net="mlp:widths=16x2", data="digits", steps=150, batch=64, lr=0.1)
FEW = Evaluation(points=5, train_examples=200)


def one(found: dict[str, list[Aligned]], name: str) -> Aligned:
    (result,) = found[name]
    return result


def test_every_method_is_measured_through_the_gates(store: Store) -> None:
    methods = [Method(n, steps=4, batch=64, examples=200) for n in METHODS]
    found = align(pairs_of(RECIPE, 1), methods, FEW, workers=1)
    assert list(found) == METHODS
    ends = [one(found, n).barrier.curve.ends("test", "loss") for n in METHODS]
    for got in ends:  # a permuted B is the same function: so are the ends of every line
        assert got == pytest.approx(ends[0], rel=1e-5)
    for n in METHODS:
        result = one(found, n)
        assert result.valid, result.barrier
        assert result.distances["before"] == one(found, "naive").distances["before"]
        assert bool(result.matching) == (n != "naive")
    naive, weights = one(found, "naive"), one(found, "weights")
    assert naive.distances["after"] == naive.distances["before"]
    assert weights.distances["after"] < weights.distances["before"]
    assert weights.matching["share"] > weights.matching["share before"]
    assert weights.barrier.height("test", "loss") < naive.barrier.height("test", "loss")


def test_a_second_call_reads_the_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = pairs_of(RECIPE, 1)
    first = align(pairs, ["weights"], FEW, extras=("temperature", "repair"), workers=1)

    def no(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(MatchedLine, "measure", no)
    monkeypatch.setattr("companion.experiments.measurement.train", no)
    again = align(pairs, ["weights"], FEW, extras=("temperature", "repair"), workers=1)
    assert one(again, "weights") == one(first, "weights")
    monkeypatch.setattr("companion.experiments.measurement.train", lambda *_, **__: None)
    with pytest.raises(AssertionError, match="measured again"):  # another question
        align(pairs, [Method("weights", starts=2)], FEW, workers=1)


def test_only_what_is_missing_is_trained_for(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """Measured pairs need no networks: those may be gone, and one new pair brings none back."""
    first, second = pairs_of(replace(RECIPE, steps=20), 2)
    align([first], ["naive"], FEW, max_error=100.0, workers=1)
    runs = [e for e in store.entries() if e.identity["kind"] == "run"]
    for entry in runs:
        entry.discard()
    align([first, second], ["naive"], FEW, max_error=100.0, workers=1)
    there = {e.key for e in store.entries() if e.identity["kind"] == "run"}
    assert len(there) == 2 and there.isdisjoint(e.key for e in runs)
    # A damaged entry is said, and measured again.
    damaged = next(e for e in store.entries() if e.identity["kind"] == "aligned")
    next(damaged.path.glob("value*")).write_text("{")
    align([first, second], ["naive"], FEW, max_error=100.0, workers=1)
    assert "discarded and measured again" in caplog.text


def test_extras_a_temperature_never_hurts_and_repair_is_read_at_the_midpoint(store: Store) -> None:
    found = align(pairs_of(RECIPE, 1), ["naive"], FEW, extras=("temperature", "repair"), workers=1)
    result = one(found, "naive")
    assert result.calibrated is not None and result.repaired is not None
    plain = result.barrier.curve.values["test"]
    fitted = result.calibrated.values["test"]
    assert all(f <= p + 1e-9 for f, p in zip(fitted["loss"], plain["loss"], strict=True))
    assert fitted["error"] == plain["error"]
    images = data.load("digits")
    module = build(result.pair.a, images, torch.device("cpu"))
    a, b = (load_weights(r) for r in (result.pair.a, result.pair.b))
    theta = repair(module, a, b, images.train.x).theta
    walker = Walker(module, {"test": images.test})
    assert result.repaired["test"].loss == pytest.approx(walker.at(theta)["test"].loss, rel=1e-5)
    assert result.repaired["test"].error != result.midpoint("test", "error")


def test_pairs_share_no_network_and_those_that_do_are_one_cluster() -> None:
    pairs = pairs_of(RECIPE, 3)
    runs = [r for p in pairs for r in (p.a, p.b)]
    assert len({(r.init, r.order) for r in runs}) == 6
    assert len(set(clusters(pairs))) == 3
    a, b, c, d = (independent(RECIPE, n) for n in range(4))
    assert len(set(clusters([Pair(a, b), Pair(c, d)]))) == 2
    assert len(set(clusters([Pair(a, b), Pair(c, d), Pair(b, c)]))) == 1


def test_invalid_pairs_count_nowhere(store: Store) -> None:
    dead = replace(RECIPE, steps=1, lr=1e-6)
    found = align([*pairs_of(dead, 1)], ["naive"], FEW, workers=1)
    assert not one(found, "naive").valid
    assert math.isnan(one(found, "naive").midpoint())
    assert interval(found["naive"], lambda r: r.barrier.height()) is None


def given(pair: Pair, test: Sequence[float], train: Sequence[float], valid: bool = True) -> Aligned:
    """A result with these losses on its line; the test error is ten times the test loss."""
    grid = tuple(i / (len(test) - 1) for i in range(len(test)))
    values = {
        "train": {"loss": tuple(train), "error": tuple(train)},
        "test": {"loss": tuple(test), "error": tuple(10 * v for v in test)},
    }
    curve = Curve(grid, values, "none", {"train": 1, "test": 1})
    gates = (Gate("G0", valid, ""),)
    line = Barrier({"none": curve}, "none", gates, 1.0, 10, (0.0, 0.0))
    return Aligned(pair, Method("weights"), line, {})


def test_a_point_chosen_on_train_can_be_worse_than_an_end_on_test() -> None:
    (pair,) = pairs_of(RECIPE, 1)
    result = given(pair, test=[1.0, 3.0, 2.0], train=[2.0, 0.5, 1.0])
    assert result.chosen() == 3.0 and result.chosen("test", "error") == 30.0
    assert result.chosen() > result.best_end()
    assert result.chosen(by="test") == 1.0
    assert math.isnan(given(pair, [1.0, 3.0, 2.0], [2.0, 0.5, 1.0], valid=False).chosen())


def test_a_trend_is_read_pair_by_pair() -> None:
    pairs = pairs_of(RECIPE, 3)
    falls = {4: 9.0, 8: 5.0, 16: 3.0, 32: 1.0}
    per_pair = [falls, {k: -v for k, v in falls.items()}, dict.fromkeys(falls, 1.0)]
    found = {
        k: [given(p, [v[k], 0.0, 0.0], [0.0] * 3) for p, v in zip(pairs, per_pair, strict=True)]
        for k in falls
    }
    got = trend(found, lambda r: r.barrier.curve.values["test"]["loss"][0])
    assert got is not None
    # One falls, one rises, one does not move: a mean over pairs would have called it a trend.
    assert (got.value, got.n) == (0.0, 3) and got.low < -1 and got.high > 1
    assert trend(dict(list(found.items())[:3]), lambda r: r.midpoint()) is None


def test_a_trend_leaves_out_pairs_with_too_few_valid_lines() -> None:
    pairs = pairs_of(RECIPE, 2)
    found = {
        k: [
            given(p, [10.0 - k] * 3, [0.0] * 3, valid=not (k == 3 and i))
            for i, p in enumerate(pairs)
        ]
        for k in range(4)
    }
    got = trend(found, lambda r: r.midpoint())
    assert got is not None and got.n == 1 and got.value == -1.0


def test_failures_count_only_settings_that_trained_under_both_conditions() -> None:
    nan = math.nan
    got = failures([5.0, 2.0, nan, 9.0, 1.0], [1.9, 0.0, 0.0, nan, 1.0])
    assert got is not None and got.n == 3 and got.value == pytest.approx(2 / 3)
    assert got.low < 0 < got.high  # one of three settings does not differ: not decided
    same = failures([5.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert same is not None and (same.low, same.value, same.high) == (1.0, 1.0, 1.0)
    assert failures([nan], [1.0]) is None


def test_the_permuted_network_is_the_same_function(store: Store) -> None:
    found = align(pairs_of(RECIPE, 1), ["weights"], FEW, workers=1)
    result = one(found, "weights")
    images = data.load("digits")
    module = build(result.pair.b, images, torch.device("cpu"))
    b, moved = load_weights(result.pair.b), permuted(result)
    assert any(not torch.equal(b[n], moved[n]) for n in b)
    walker = Walker(module, {"test": images.test})
    assert walker.at(moved)["test"].loss == pytest.approx(walker.at(b)["test"].loss, rel=1e-5)


def test_gradient_is_the_slope_of_the_training_loss(store: Store) -> None:
    images = data.load("digits")
    run = independent(replace(RECIPE, steps=20), 0)
    module = build(run, images, torch.device("cpu"))
    theta = {n: v.double() for n, v in load_weights(run).items()}
    module = module.double()
    whole = replace(images, train=images.train.head(64))
    wide = replace(whole)
    object.__setattr__(wide.train, "x", whole.train.x.double())
    g = gradient(module, theta, wide.train)
    assert set(g) == set(layout(module).parameters)
    step = {n: theta[n] - 1e-4 * g[n] for n in theta}
    walker = Walker(module, {"train": wide.train})
    fall = walker.at(theta)["train"].loss - walker.at(step)["train"].loss
    size = sum(float((v**2).sum()) for v in g.values())
    assert fall == pytest.approx(1e-4 * size, rel=0.01)


def test_steepest_descent_beats_other_permutations_at_its_own_game(store: Store) -> None:
    """What A.11 minimises, the product of gradient and pi(B), is lower than for random ones."""
    images = data.load("digits")
    pair = pairs_of(replace(RECIPE, steps=40), 1)[0]
    module = build(pair.a, images, torch.device("cpu"))
    a, b = (weights_of(r, 40, store, "cpu") for r in (pair.a, pair.b))
    g = gradient(module, a, images.train)

    def slope(method: Method) -> float:
        moved = match(method, module, a, b, images).apply(module, b)
        return sum(float((g[n] * moved[n]).sum()) for n in g)

    randoms = [slope(Method("random", label=i)) for i in range(5)]
    assert slope(Method("steepest")) < min(randoms)


def test_a_network_of_convolutions_is_measured_in_all_batchnorm_modes(store: Store) -> None:
    recipe = Recipe(net="resnet8:width=4,norm=batch", data="digits", steps=10, batch=32, lr=0.05)
    few = Evaluation(points=3, train_examples=64, test_examples=64)
    found = align(pairs_of(recipe, 1), ["weights"], few, max_error=100.0, workers=1)
    barrier = one(found, "weights").barrier
    assert set(barrier.curves) == {"interpolate", "reestimate", "batch"}
    assert barrier.valid


def test_merging_reads_inputs_mean_merged_and_ensemble(store: Store) -> None:
    runs = [independent(RECIPE, n) for n in range(3)]
    (found,) = merge_runs([runs], FEW, workers=1)
    assert set(found) == {"input 0", "input 1", "input 2", "mean", "merged", "ensemble"}
    assert found["merged"]["test"].loss < found["mean"]["test"].loss
    assert found["ensemble"]["test"].error < 10
    # Copies of one network merge into that network, whatever the order of their units.
    copies = [Run(RECIPE, init=0, order="0", augment=i) for i in range(2)]
    (same,) = merge_runs([copies], FEW, workers=1)
    assert same["merged"]["test"].loss == pytest.approx(same["input 0"]["test"].loss, rel=1e-4)
    with pytest.raises(BadParameter, match="two runs or more"):
        merge_runs([runs[:1]], FEW)


def test_a_mean_with_batchnorm_reads_as_many_images_as_its_lines(store: Store) -> None:
    recipe = Recipe(net="mlp:widths=16,norm=batch", data="digits", steps=30, batch=64)
    runs = [independent(recipe, n) for n in range(2)]
    found = [
        merge_runs([runs], replace(FEW, bn_examples=n), workers=1)[0]["mean"]["test"].loss
        for n in (64, None)
    ]
    assert found[0] != found[1]


def test_split_data_is_read_on_the_whole_and_corrected_for_its_classes(store: Store) -> None:
    parts = [replace(RECIPE, data=f"digits@split-{p}") for p in "ab"]
    pairs = pairs_of(parts[0], 1, other=parts[1])
    (found,) = split_runs(pairs, [independent(RECIPE, 0)], FEW, workers=1)
    a = data.load("digits@split-a").train.y
    assert int((a < 5).sum()) * 3 < int((a >= 5).sum())  # A is biased
    for half in "AB":
        assert found[half]["test"].loss > found["full data"]["test"].loss
        assert found[f"{half} corrected"]["test"].loss < found[half]["test"].loss
    lines = align(pairs, ["naive"], FEW, on="digits", max_error=50.0, workers=1)
    ends = lines["naive"][0].barrier.curve.ends("test", "loss")
    assert ends == pytest.approx([found[h]["test"].loss for h in "AB"], rel=1e-5)
    with pytest.raises(BadParameter, match="one network of the whole dataset"):
        split_runs(pairs, [], FEW)


def test_a_reading_of_known_probabilities() -> None:
    p = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.8, 0.2], [0.8, 0.2], [0.8, 0.2]])
    found = read_logits(p.log(), torch.tensor([0, 0, 0, 0, 1]))
    assert found.error == pytest.approx(20.0)
    assert found.ece == pytest.approx(0.0, abs=1e-4)
    assert found.count == (5, 5)
    assert found.fraction == pytest.approx((0.2, 0.8))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Method("weihgts"), "weights"),
        (lambda: Method("activations", statistic="mean"), "moment"),
        (lambda: align(pairs_of(RECIPE, 1), ["naive", "naive"]), "twice"),
        (lambda: align(pairs_of(RECIPE, 1), ["naive"], extras=["temprature"]), "temperature"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_trains(
    store: Store, make: object, words: str
) -> None:
    with pytest.raises(BadParameter, match=words):
        make()  # type: ignore[operator]  # any callable
    assert list(store.entries()) == []


def test_naive_has_no_permutation(store: Store) -> None:
    images = data.load("digits")
    module = build(independent(RECIPE, 0), images, torch.device("cpu"))
    assert list(spec_of(module, images).groups) == ["layer1.linear", "layer2.linear"]
    with pytest.raises(BadParameter, match="nothing is matched"):
        match(Method("naive"), module, {}, {}, images)


def test_a_plan_counts_the_runs_of_what_is_matched(store: Store) -> None:
    """The budget of a chapter that matches before it measures is not empty, and shrinks."""
    pairs = pairs_of(RECIPE, 2)
    plans = [lines_of(pairs, ["weights"], FEW)]
    (before,) = count(plans, store=store, device="cpu")
    assert (before.whole.runs, before.whole.steps, before.missing.runs) == (4, 600, 4)
    load_weights(pairs[0].a, store=store)
    (after,) = count(plans, store=store, device="cpu")
    assert (after.missing.runs, after.missing.steps) == (3, 450)


def test_the_store_says_what_its_entries_are(store: Store) -> None:
    align(pairs_of(RECIPE, 1), ["weights"], FEW, workers=1)
    runs = [independent(RECIPE, 0), independent(RECIPE, 1)]
    merge_runs([runs], FEW, workers=1)
    said = {e.identity["kind"]: describe_entry(e.identity) for e in store.entries()}
    assert "units matched by weights" in said["aligned"]
    assert said["merged"] == "2 networks merged into one"
    current = is_current(store)
    for entry in store.entries():
        assert current(entry.identity)
        if entry.identity["kind"] in ("aligned", "merged"):
            assert not current({**entry.identity, "semantics": 0})
