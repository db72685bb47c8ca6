"""Instability analysis end to end on digits, and the statistics on hand-made samples."""

from __future__ import annotations

import itertools
import json
import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from companion import data
from companion.connectivity import Barrier, Curve, barrier
from companion.connectivity.gates import Gate
from companion.core.errors import BadParameter
from companion.core.runs import Store
from companion.core.seeds import Key
from companion.core.stats import Interval
from companion.core.theta import cosine_distance, distance, layout
from companion.data import Augmentation, Augmenter
from companion.experiments import measurement
from companion.experiments.instability import (
    NOISE,
    THRESHOLD,
    Instability,
    Sample,
    analyse,
    copy,
    independent_inits,
    through_training,
    trunk,
)
from companion.experiments.pairs import (
    Evaluation,
    Pair,
    PairResult,
    check_noise,
    check_null,
    measure_pairs,
)
from companion.training import Fork, Recipe, Run, build, engine, entry_of, load_weights

DIGITS = data.load("digits")
RECIPE = Recipe(net="mlp:widths=32", data="digits", steps=100, batch=60, augment="crop1")
DEAD = replace(RECIPE, lr=1e-9)
FEW = Evaluation(points=5, train_examples=300, test_examples=200)
KS, INITS, COPIES = (0, 20), 2, 3
OPTIONS: dict[str, Any] = {"evaluation": FEW, "workers": 1}


@pytest.fixture(scope="module")
def found(shared_store: Store) -> Instability:
    return analyse(
        RECIPE, [20, 0, 20], inits=INITS, copies=COPIES, max_error=60, store=shared_store, **OPTIONS
    )


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing may be trained or measured."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("worked again on what is in the store")

    monkeypatch.setattr(engine.loop, "advance_together", refuse)  # advance calls it
    monkeypatch.setattr(measurement, "_make", refuse)


# ---- end to end


def test_all_pairs_of_all_inits_at_all_ks(found: Instability) -> None:
    assert found.recipe == RECIPE and found.ks == KS, "sorted, each once"
    assert [(s.init, s.k, s.copies) for s in found.samples] == [
        (init, k, pair) for k in KS for init in range(INITS) for pair in [(1, 2), (1, 3), (2, 3)]
    ]
    assert [len(found.at(k)) for k in (0, 20, 5)] == [6, 6, 0]
    assert found.invalid() == [], [str(s.result.barrier) for s in found.invalid()]
    for k in KS:
        interval = found.interval(k)
        assert interval is not None and (interval.n, interval.clusters) == (6, INITS)
        assert found.verdict(k) in ("stable", "unstable", "undetermined")
        heights = [s.result.barrier.height("test") for s in found.at(k)]
        assert interval.value == pytest.approx(sum(heights) / 6)
        assert [v for _, v in found.values(k)] == heights


def test_a_sample_is_what_its_names_say(found: Instability, shared_store: Store) -> None:
    """Recompute one pair from the stored weights, by hand."""
    sample = found.at(20)[4]
    assert (sample.init, sample.copies) == (1, (1, 3))
    a, b = (
        load_weights(copy(RECIPE, 1, 20, number), store=shared_store) for number in sample.copies
    )
    w_0, w_k = (load_weights(trunk(RECIPE, 1), k, store=shared_store) for k in (0, 20))
    module = build(trunk(RECIPE, 1), DIGITS, torch.device("cpu"))
    names = layout(module).parameters
    result = sample.result
    assert result.distances == {
        "ab": distance(a, b, names),
        "cosine": cosine_distance(a, b, names),
        "a_init": distance(a, w_0, names),
        "b_init": distance(b, w_0, names),
        "a_start": distance(a, w_k, names),
        "b_start": distance(b, w_k, names),
        "start_init": distance(w_k, w_0, names),
    }
    splits = {"train": DIGITS.train.head(300), "test": DIGITS.test.head(200)}
    by_hand = barrier(module, a, b, splits, points=5, max_error=60)
    assert result.barrier.curves == by_hand.curves
    assert result.barrier.distance == by_hand.distance > 0
    assert result.barrier.gates[1:4] == by_hand.gates[1:]
    at_start = barrier(module, w_k, a, splits, points=3).curve
    for split in splits:
        assert result.start[split].error == at_start.ends(split)[0]
        assert result.start[split].loss == at_start.ends(split, "loss")[0]


def test_controls_are_recorded_with_every_barrier(found: Instability) -> None:
    for sample in found.samples:
        names = [g.name for g in sample.result.barrier.gates]
        assert names[0] == "G0 quality" and names[-2:] == [
            "G1 null control",
            "G3 noise independence",
        ]
        null, noise = sample.result.barrier.gates[-2:]
        assert null.passed is True and null.value == 0
        assert null.detail == "largest weight difference 0, barrier 0"
        assert noise.passed is True and "0 collisions" in noise.detail


def test_the_second_call_works_on_nothing(
    found: Instability, shared_store: Store, no_work: None
) -> None:
    again = analyse(
        RECIPE, KS, inits=INITS, copies=COPIES, max_error=60, store=shared_store, **OPTIONS
    )
    assert again == found
    fewer = analyse(RECIPE, [0], inits=1, copies=2, max_error=60, store=shared_store, **OPTIONS)
    assert [s.result.barrier.curves for s in fewer.samples] == [
        found.at(0)[0].result.barrier.curves
    ]


def test_other_ways_to_measure_are_other_measurements(
    found: Instability, shared_store: Store
) -> None:
    finer = replace(FEW, points=7)
    again = analyse(
        RECIPE,
        [0],
        inits=1,
        copies=2,
        max_error=60,
        store=shared_store,
        workers=1,
        evaluation=finer,
    )
    assert len(again.samples[0].result.barrier.curve.alphas) == 7
    assert len(found.samples[0].result.barrier.curve.alphas) == 5


def test_a_corrupt_measurement_is_reported_and_made_again(
    found: Instability, shared_store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    entries = [e for e in shared_store.entries() if e.identity["kind"] == "pair"]
    assert len(entries) >= len(found.samples)
    entry = next(e for e in entries if e.identity["start"][1] == 20)
    kept = entry.read_json("pair.json")
    (entry.path / "pair.json").write_text(json.dumps(kept)[:-5])
    with caplog.at_level(logging.WARNING, logger="companion"):
        again = analyse(
            RECIPE, KS, inits=INITS, copies=COPIES, max_error=60, store=shared_store, **OPTIONS
        )
    assert again == found and entry.read_json("pair.json") == kept
    assert [r.getMessage().endswith("measured again") for r in caplog.records] == [True]


def test_everything_in_the_store_is_whole(found: Instability, shared_store: Store) -> None:
    kinds = [e.identity["kind"] for e in shared_store.entries()]
    assert {"run", "pair", "null"} <= set(kinds)
    assert [p for e in shared_store.entries() for p in e.verify()] == []


def test_device_auto(store: Store) -> None:
    short = replace(RECIPE, steps=2)
    found = analyse(short, [0], inits=1, copies=2, device="auto", store=store, **OPTIONS)
    assert len(found.samples) == 1


@pytest.mark.slow
def test_two_workers_measure_the_same(found: Instability, store: Store) -> None:
    again = analyse(
        RECIPE, [0], inits=INITS, copies=2, max_error=60, store=store, evaluation=FEW, workers=2
    )
    assert [s.result.barrier.curves for s in again.samples] == [
        s.result.barrier.curves for s in found.at(0) if s.copies == (1, 2)
    ]
    assert again.invalid() == []


# ---- noise


def noise_of(run: Run) -> tuple[bytes, bytes]:
    """The data order and the crops of the run's second epoch."""
    n = len(DIGITS.train)
    augmenter = Augmenter(DIGITS.train, Augmentation.parse("crop1"), DIGITS.black)
    draws = augmenter.draw(run.augment_key(), 1)
    assert draws.top is not None and draws.left is not None
    order = run.order_key().fold("epoch", 1).permutation(n)
    return order.numpy().tobytes(), torch.stack([draws.top, draws.left]).numpy().tobytes()


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("k", [0, 20])
def test_only_the_wanted_noise_differs(noise: str, k: int) -> None:
    a, b = (noise_of(copy(RECIPE, 0, k, number, noise=noise)) for number in (1, 2))
    assert (a[0] != b[0]) == (noise in ("both", "order"))
    assert (a[1] != b[1]) == (noise in ("both", "augment"))
    assert noise_of(copy(RECIPE, 0, k, 1, noise=noise)) == a, "and it is the same every time"


@pytest.mark.parametrize("k", [0, 20])
def test_a_perturbed_copy_differs_in_one_weight_at_its_start(k: int, store: Store) -> None:
    short = replace(RECIPE, steps=30)
    plain = load_weights(trunk(short, 0), k, store=store)
    starts = [
        load_weights(copy(short, 0, k, number, noise="perturb"), k, store=store)
        for number in (1, 2, 1)
    ]
    for start in starts:
        changed = {n: (v - plain[n])[v != plain[n]] for n, v in start.items()}
        (name,) = [n for n, v in changed.items() if len(v)]
        size = float(plain[name].square().mean().sqrt())
        assert changed[name].abs().tolist() == [pytest.approx(size, 1e-4)]
        assert plain[name].dim() == 2
    first, second, again = starts
    assert all(torch.equal(v, again[n]) for n, v in first.items())
    assert not all(torch.equal(v, second[n]) for n, v in first.items())


def test_a_perturbation_is_part_of_a_run_and_other_runs_keep_their_keys() -> None:
    plain = Run(RECIPE, init=0, order=1)
    assert "perturb" not in plain.identity("x", "cpu")
    run = replace(plain, perturb=3)
    assert run.identity("x", "cpu") == {**plain.identity("x", "cpu"), "perturb": 3}
    # A fork at 0 of a perturbed run starts where that did: it is no run of its own from the init.
    assert Run(RECIPE, order=2, fork=Fork(run, 0)).fork is not None
    assert Run(RECIPE, order=2, fork=Fork(plain, 0)).fork is None
    with pytest.raises(BadParameter, match="perturb"):
        replace(plain, perturb=True)


@pytest.mark.parametrize("noise", ["order", "augment", "perturb"])
def test_one_source_of_noise_is_enough_to_part(noise: str, store: Store) -> None:
    short = replace(RECIPE, steps=30)
    found = analyse(
        short, [0], inits=1, copies=2, noise=noise, max_error=99, store=store, **OPTIONS
    )
    (sample,) = found.samples
    assert sample.result.barrier.valid and sample.result.distances["ab"] > 0.01


def test_noise_is_new_for_every_init_copy_and_trunk() -> None:
    runs = [trunk(RECIPE, i) for i in range(3)]
    runs += [copy(RECIPE, i, 20, number) for i in range(3) for number in range(1, 4)]
    found = [noise_of(r) for r in runs]
    assert len({order for order, _ in found}) == len({crops for _, crops in found}) == len(runs)
    assert {r.init for r in runs} == {0, 1, 2}
    # The same copy sees the same noise whatever k: only what came before differs.
    assert noise_of(copy(RECIPE, 0, 20, 1)) == noise_of(copy(RECIPE, 0, 40, 1))
    first = copy(RECIPE, 0, 20, 1, optimizer="restore", schedule="restart")
    assert first.fork is not None and first.fork.parent == trunk(RECIPE, 0)
    assert (first.fork.step, first.fork.optimizer, first.fork.schedule) == (
        20,
        "restore",
        "restart",
    )


def test_a_restarted_schedule_trains_all_steps_again(store: Store) -> None:
    short = replace(RECIPE, steps=30)
    found = analyse(
        short, [10], inits=1, copies=2, schedule="restart", max_error=99, store=store, **OPTIONS
    )
    assert found.samples[0].result.barrier.valid
    run = copy(short, 0, 10, 1, schedule="restart")
    tensors = entry_of(run, DIGITS, "cpu", store).read_tensors("weights-00000030.safetensors")
    assert len(tensors["trace"]) == 30


# ---- the null control and the control of noise


def test_a_null_control_that_fails_spoils_every_pair(
    found: Instability, shared_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engine.loop.advance

    def trembling(*args: Any, **options: Any) -> Any:
        state = real(*args, **options)
        state.theta["head.bias"] = state.theta["head.bias"] + 1e-6
        return state

    run = copy(RECIPE, 1, 20, 2)  # its control has not been asked for yet
    with monkeypatch.context() as patch:
        patch.setattr(engine.loop, "advance", trembling)
        gate = check_null(run, FEW, store=shared_store)
    assert gate.passed is False and "largest weight difference 0," not in gate.detail
    assert check_null(run, FEW, store=shared_store).passed, "a failure is not kept"

    failed = Gate("G1 null control", False, "planted")
    monkeypatch.setattr("companion.experiments.instability.check_null", lambda *_, **__: failed)
    spoiled = analyse(
        RECIPE, KS, inits=INITS, copies=COPIES, max_error=60, store=shared_store, **OPTIONS
    )
    assert len(spoiled.invalid()) == len(found.samples)
    assert all("G1 null control FAIL" in str(s.result.barrier) for s in spoiled.samples)
    assert [spoiled.verdict(k) for k in KS] == ["invalid", "invalid"]
    without = analyse(
        RECIPE,
        KS,
        inits=INITS,
        copies=COPIES,
        max_error=60,
        store=shared_store,
        controls=False,
        **OPTIONS,
    )
    assert without.invalid() == [] and len(without.samples[0].result.barrier.gates) == 4


def test_the_null_control_of_a_fork_needs_no_parent_in_the_store(store: Store) -> None:
    short = replace(RECIPE, steps=20)
    run = copy(short, 0, 10, 1)
    load_weights(run, store=store)
    entry_of(trunk(short, 0), DIGITS, "cpu", store).discard()  # as `companion runs gc` might
    assert check_null(run, FEW, store=store).passed


def test_pairs_of_the_same_run_are_a_null_control(store: Store) -> None:
    run = trunk(replace(RECIPE, steps=20), 0)
    (result,) = measure_pairs([Pair(run, run)], FEW, store=store, max_error=99, workers=1)
    assert result.barrier.valid and result.barrier.height() == 0 == result.distances["ab"]
    assert result.barrier.gate("G0b").passed is None


def test_noise_that_seeds_by_addition_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [Run(RECIPE, order=i) for i in range(3)]
    assert check_noise(runs).passed
    assert "15 data orders" in check_noise(runs).detail, "100 steps of 3 runs: 5 epochs each"

    class Added:
        def __init__(self, seed: int):
            self.seed = seed

        def fold(self, _: str, epoch: int) -> Key:
            return Key("order", self.seed + epoch)  # what open_lth does

    monkeypatch.setattr(Run, "order_key", lambda run: Added(run.order))
    gate = check_noise(runs)
    assert gate.passed is False and "order 0 epoch 1 = order 1 epoch 0" in gate.detail


def test_copies_that_differ_in_augmentation_alone_are_compared_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = [copy(RECIPE, 0, 10, i, noise="augment") for i in (1, 2, 3)]
    gate = check_noise(runs)
    assert gate.passed and gate.detail == "0 collisions among 5 data orders and 15 draws"
    for noise in ("both", "order"):
        others = [copy(RECIPE, 0, 10, i, noise=noise) for i in (1, 2, 3)]
        assert check_noise(others).detail == "0 collisions among 15 data orders"
    monkeypatch.setattr(Run, "augment_key", lambda run: Key("one for all"))
    gate = check_noise(runs)
    assert gate.passed is False and "draws 0/1 epoch 0 = draws 0/2 epoch 0" in gate.detail


# ---- dead networks


def test_dead_networks_count_nowhere(store: Store) -> None:
    """All of them dead: there is no good run to tell what is normal, and the barrier is 0."""
    found = analyse(DEAD, [0, 10], inits=2, copies=2, store=store, **OPTIONS)
    assert len(found.samples) == 4 == len(found.invalid())
    for sample in found.samples:
        flat = sample.result.barrier
        assert min(flat.errors) > 60 and flat.curve.height() < THRESHOLD, "the case is as planted"
        assert sample.result.distances["ab"] > 0
        assert math.isnan(flat.height()) and str(flat).startswith("INVALID (G0 quality FAIL")
    for k in found.ks:
        assert found.values(k) == [] and found.interval(k) is None
        assert found.verdict(k) == "invalid"
    assert found.onset().value == found.onset().high == math.inf


def test_a_dead_pair_among_good_ones(found: Instability, shared_store: Store) -> None:
    good = [Pair(copy(RECIPE, i, 0, 1), copy(RECIPE, i, 0, 2)) for i in range(2)]
    dead = Pair(copy(DEAD, 0, 0, 1), copy(DEAD, 0, 0, 2))
    half = Pair(copy(RECIPE, 0, 0, 1), copy(DEAD, 0, 0, 1))
    results = measure_pairs([*good, dead, half], FEW, store=shared_store, workers=1)
    assert [r.barrier.valid for r in results] == [True, True, False, False]
    most = measure_pairs([good[0], dead, half], FEW, store=shared_store, workers=1)
    assert [r.barrier.valid for r in most] == [True, False, False], "nor if most are dead"


def test_the_reference_of_gate_g0(found: Instability, shared_store: Store) -> None:
    pair = Pair(copy(RECIPE, 0, 0, 1), copy(RECIPE, 0, 0, 2))

    def valid(**bounds: Any) -> bool:
        return measure_pairs([pair], FEW, store=shared_store, workers=1, **bounds)[0].barrier.valid

    (result,) = measure_pairs([pair], FEW, store=shared_store, workers=1)
    worst = max(result.barrier.errors)
    assert 0 < worst < 45
    assert valid(reference_error=worst / 1.49) and not valid(reference_error=worst / 1.51)
    assert valid(reference_error=worst / 10, max_error=worst)


# ---- controls of the chapter


def test_independent_inits(found: Instability, shared_store: Store) -> None:
    results = independent_inits(RECIPE, inits=3, max_error=60, store=shared_store, **OPTIONS)
    assert len(results) == 3
    for (i, j), result in zip(itertools.combinations(range(3), 2), results, strict=True):
        a, b = (load_weights(copy(RECIPE, n, 0, 1), store=shared_store) for n in (i, j))
        names = layout(build(trunk(RECIPE, 0), DIGITS, torch.device("cpu"))).parameters
        assert result.distances["ab"] == distance(a, b, names)
        w = load_weights(trunk(RECIPE, j), 0, store=shared_store)
        assert result.distances["b_init"] == distance(b, w, names)
        assert result.start == {} and "a_start" not in result.distances
    forks = [s.result.barrier.height("test", "loss") for s in found.at(20)]
    strangers = [r.barrier.height("test", "loss") for r in results]
    assert min(strangers) > max(forks)


def test_through_training(found: Instability, shared_store: Store) -> None:
    early = through_training(RECIPE, 20, [21, 100], inits=2, store=shared_store, **OPTIONS)
    assert {step: [init for init, _ in rows] for step, rows in early.items()} == {
        21: [0, 1],
        100: [0, 1],
    }
    for init, result in early[100]:
        same = next(s for s in found.at(20) if s.init == init and s.copies == (1, 2))
        assert result.barrier.curves == same.result.barrier.curves
        assert result.distances == same.result.distances
    for init, result in early[21]:
        later = dict(early[100])[init]
        assert result.distances["ab"] < later.distances["ab"], "they part as they train"
        assert result.distances["a_start"] < later.distances["a_start"]


def test_half_trained_networks_are_invalid(store: Store) -> None:
    found = through_training(RECIPE, 0, [1, 2], inits=1, store=store, **OPTIONS)
    for rows in found.values():
        for _, result in rows:
            assert min(result.barrier.errors) > 50 and not result.barrier.valid


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ks": []}, "ks: give at least one fork step"),
        ({"ks": [0, 100]}, r"ks: 100 must be a step from 0 to 99 \(T = 100\)"),
        ({"ks": [-1]}, "ks: -1 must be a step"),
        ({"ks": [0.5]}, r"ks: 0\.5 must be a step"),
        ({"ks": [True]}, "ks: True must be a step"),
        ({"inits": 0}, "inits: 0 must be a whole number of 1 or more"),
        ({"copies": 1}, "copies: 1 must be a whole number of 2 or more"),
        ({"copies": 2.0}, r"copies: 2\.0 must be a whole number"),
        ({"noise": "batches"}, "noise: 'batches' is not known.*both, order, augment"),
        ({"optimizer": "keep"}, "fork optimizer: 'keep' is not known.*reset, restore"),
        ({"schedule": "again"}, "fork schedule: 'again' is not known.*continue, restart"),
        ({"workers": -1}, "workers: -1"),
        ({"device": "gpu"}, "device: 'gpu' is not known"),
        (
            {"noise": "augment", "recipe": replace(RECIPE, augment="none")},
            "noise: 'augment' needs a recipe with augmentation",
        ),
        ({"recipe": replace(RECIPE, batch=5000)}, "batch: 5000 is more than"),
        ({"recipe": replace(RECIPE, data="digit")}, "Did you mean 'digits'"),
    ],
)
def test_bad_parameters_are_refused_before_any_training(
    arguments: dict[str, Any], message: str, store: Store, no_work: None
) -> None:
    given = {"recipe": RECIPE, "ks": [10], "inits": 1, "copies": 2, **arguments}
    with pytest.raises(BadParameter, match=message):
        analyse(**{**OPTIONS, **given}, store=store)
    assert list(store.entries()) == []


@pytest.mark.parametrize("steps", [[20], [19, 30], [101]])
def test_through_training_looks_after_k(steps: list[int], store: Store, no_work: None) -> None:
    with pytest.raises(BadParameter, match=r"must lie above k = 20 and at most at T = 100"):
        through_training(RECIPE, 20, steps, store=store, **OPTIONS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points": 30}, "points: 30 must be odd"),
        ({"bn": "reset"}, "bn: 'reset' is not known"),
        ({"train_examples": 0}, "train_examples: 0 must be a whole number of 1 or more, or null"),
        ({"test_examples": 2.5}, r"test_examples: 2\.5 must be a whole number"),
    ],
)
def test_evaluations_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BadParameter, match=message):
        Evaluation(**arguments)


# ---- the statistics, on samples made by hand


def sample(init: int, k: int, height: float, pair: int = 0, *, valid: bool = True) -> Sample:
    values = {"error": (4.0, 4.0 + height, 4.0), "loss": (0.1, 0.1 + height / 10, 0.1)}
    curve = Curve((0.0, 0.5, 1.0), {"train": values, "test": values}, "none", {"test": 100})
    gates = (Gate("G0 quality", valid, "planted"),)
    planted = Barrier({"none": curve}, "none", gates, 1.0, 10, (4.0, 4.0))
    numbers = [(1, 2), (1, 3), (2, 3)][pair]
    return Sample(init, k, numbers, PairResult(planted, {}, {}))


def made_of(heights: dict[int, list[list[float]]]) -> Instability:
    """k -> init -> heights of its pairs; NaN plants an invalid pair of height 0."""
    samples = [
        sample(init, k, 0 if math.isnan(h) else h, number, valid=not math.isnan(h))
        for k, inits in heights.items()
        for init, row in enumerate(inits)
        for number, h in enumerate(row)
    ]
    return Instability(RECIPE, tuple(sorted(heights)), tuple(samples))


NONE = math.nan


@pytest.mark.parametrize(
    ("inits", "verdict"),
    [
        ([[0.1, 0.2], [0.5, 0.4], [0.9, 0.9]], "stable"),
        ([[0.1, 0.2], [0.5, 0.4], [1.9, 1.9]], "undetermined"),  # all below 2, but few
        ([[0.0, 0.0], [30.0, 40.0], [25.0, 20.0]], "undetermined"),
        ([[30.0, 31.0], [30.0, 40.0], [25.0, 20.0]], "unstable"),
        ([[1.0, 3.1], [30.0, 40.0], [25.0, 20.0]], "undetermined"),
        ([[NONE, NONE], [NONE, NONE], [NONE, NONE]], "invalid"),
        ([[NONE, 30.0], [NONE, 40.0], [25.0, 20.0]], "unstable"),
        ([[NONE, 0.1], [NONE, 0.2], [0.3, NONE]], "stable"),
    ],
)
def test_verdict(inits: list[list[float]], verdict: str) -> None:
    assert made_of({0: inits}).verdict(0) == verdict
    assert made_of({0: inits}).verdict(0, "train") == verdict


def test_verdict_at_another_threshold() -> None:
    found = made_of({0: [[1.8], [2.0], [2.2]]})  # 2 ± 0.34
    assert [found.verdict(0, threshold=t) for t in (0.5, 1.65, 1.7, 2.3, 2.35)] == [
        "unstable",
        "unstable",
        "undetermined",
        "undetermined",
        "stable",
    ]


def test_interval_takes_valid_pairs_by_init() -> None:
    found = made_of({5: [[1.0, NONE], [NONE, NONE], [4.0, 6.0]]})
    interval = found.interval(5)
    assert interval is not None
    assert (interval.n, interval.clusters) == (3, 2)
    assert interval.value == pytest.approx(11 / 3)
    # Without one init the mean is 5, without the other 1: Student's t of two.
    assert (interval.low, interval.high) == pytest.approx(
        (11 / 3 - 12.63, 11 / 3 + 12.63), abs=0.01
    )
    loss = found.interval(5, "train", "loss")
    assert loss is not None and loss.value == pytest.approx(1.1 / 3)
    assert found.values(5) == [(0, 1.0), (2, 4.0), (2, 6.0)]
    assert len(found.invalid()) == 3 and found.interval(6) is None


NEVER = math.inf


@pytest.mark.parametrize(
    ("means", "onset"),
    [
        ([30.0, 9.0, 1.9, 0.3], 50),
        ([30.0, 1.0, 9.0, 0.3], 100),  # it has to stay below
        ([1.0, 1.0, 1.0, 1.0], 0),
        ([30.0, 1.0, 1.0, 2.0], NEVER),
        ([30.0, 9.0, 0.3, NONE], NEVER),
        ([NONE, NONE, NONE, NONE], NEVER),
    ],
)
def test_onset(means: list[float], onset: float) -> None:
    found = made_of({k: [[m], [m]] for k, m in zip((0, 25, 50, 100), means, strict=True)})
    assert found.onset() == found.onset("train")
    assert (found.onset().value, found.onset().high) == (onset, onset)
    assert (found.onset().n, found.onset().clusters) == (2, 2)


def test_a_step_without_a_valid_pair_proves_nothing() -> None:
    found = made_of({k: [[m], [m]] for k, m in ((0, 30.0), (25, 9.0), (50, NONE), (100, 0.3))})
    assert found.onset() == Interval(100, 50, 100, 2, 2) and found.onset_is_told()
    assert found.onset_is_told("train", "loss")


def test_without_a_valid_pair_at_the_last_step_no_onset_is_told() -> None:
    for last, told in ((NONE, False), (9.0, True), (0.3, True)):
        found = made_of({k: [[m], [m]] for k, m in ((0, NONE), (25, 9.0), (50, last))})
        assert found.onset_is_told() is told


LOW, OPEN, HIGH = [0.3, 0.3, 0.4], [0.5, 1.5, 3.5], [30.0, 31.0, 32.0]


@pytest.mark.parametrize(
    ("inits", "onset"),
    [
        ([HIGH, HIGH, LOW, LOW], (50, 50, 50)),
        ([HIGH, OPEN, OPEN, LOW], (25, 25, 100)),  # its mean lies below
        ([HIGH, OPEN, HIGH, LOW], (100, 100, 100)),  # no later k may be unstable
        ([HIGH, LOW, OPEN, OPEN], (25, 25, NEVER)),
        ([HIGH, LOW, LOW, HIGH], (NEVER, NEVER, NEVER)),
        ([OPEN, OPEN, OPEN, OPEN], (0, 0, NEVER)),
        ([LOW, LOW, LOW, LOW], (0, 0, 0)),
    ],
)
def test_the_interval_of_the_onset_agrees_with_the_verdicts(
    inits: list[list[float]], onset: tuple[float, float, float]
) -> None:
    ks = (0, 25, 50, 100)
    found = made_of({k: [[h] for h in of] for k, of in zip(ks, inits, strict=True)})
    got = found.onset()
    assert (got.value, got.low, got.high) == onset and got.clusters == 3
    words = [found.verdict(k) for k in ks]
    assert all(word == "stable" for k, word in zip(ks, words, strict=True) if k >= got.high)
    assert all(word != "unstable" for k, word in zip(ks, words, strict=True) if k >= got.low)


def test_onset_looks_at_the_mean_and_the_threshold() -> None:
    found = made_of({0: [[3.0], [0.5]], 10: [[3.0], [1.5]]})
    assert found.onset().value == NEVER and found.onset(threshold=2.5).value == 0
    assert made_of({0: [[3.0], [0.5]], 10: [[2.0], [1.5]]}).onset().value == 0


def test_one_init_decides_nothing_about_the_onset() -> None:
    assert made_of({0: [[30.0]], 10: [[0.1]]}).onset() == Interval(10, 0, NEVER, 1, 1)


def test_only_networks_with_batchnorm_are_stored_by_what_it_averages_over() -> None:
    """Entries of other networks keep the keys that they had before it was bounded."""
    usual, all_of_them = Evaluation(), Evaluation(bn_examples=None)
    for net in ("mlp", "resnet20:norm=layer", "vgg11:norm=none", "gpt"):
        assert usual.identity(net) == all_of_them.identity(net)
        assert "bn_examples" not in usual.identity(net)
    for net in ("resnet20", "mlp:norm=batch", "my.module:make"):
        assert usual.identity(net)["bn_examples"] == 2000
        assert all_of_them.identity(net)["bn_examples"] is None
