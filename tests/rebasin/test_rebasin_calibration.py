"""Temperature, calibration error, reliability and the two ensemble controls, on hand examples."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion import data, models
from companion.connectivity import Walker, segment
from companion.core import codec
from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.core.theta import snapshot
from companion.data import Split
from companion.rebasin.calibration import (
    calibrated_curve,
    ece,
    ensemble_logprobs,
    nll,
    prior_shift,
    reliability,
    temperature,
)
from companion.training import Recipe, Run, State, advance, build

DIGITS = data.load("digits")
SPLITS = {"train": DIGITS.train.head(300), "test": DIGITS.test.head(150)}
FIT = Split(DIGITS.train.x[-200:], DIGITS.train.y[-200:])

Theta = dict[str, Tensor]


def seeded(*label: int | str) -> torch.Generator:
    return Key("test", "calibration", *label).generator()


def planted(n: int, t: float, classes: int = 6) -> tuple[Tensor, Tensor]:
    """Logits, and labels drawn from softmax(logits / t): at T = t they are calibrated."""
    g = seeded("planted", n)
    z = 3 * torch.randn(n, classes, generator=g, dtype=torch.float64)
    return z, torch.multinomial((z / t).softmax(1), 1, generator=g)[:, 0]


# ---- temperature


@pytest.mark.parametrize("t", [0.3, 1.0, 4.0])
def test_a_planted_temperature_is_found(t: float) -> None:
    assert temperature(*planted(40_000, t)) == pytest.approx(t, rel=0.04)


@pytest.mark.parametrize("factor", [1e-6, 0.2, 1.0, 1e6])
def test_it_is_the_minimum_and_scales_with_the_logits(factor: float) -> None:
    z, y = planted(500, 1.7)
    t = temperature(factor * z, y)
    assert t == pytest.approx(factor * temperature(z, y), rel=1e-6)
    best = nll(factor * z, y, t)
    assert all(best < nll(factor * z, y, t * step) for step in (0.99, 1.01))
    # Where the derivative vanishes the mean true logit is the mean expected one.
    p = (factor * z / t).softmax(1)
    expected = float((p * factor * z).sum(1).mean())
    assert expected == pytest.approx(
        float((factor * z).gather(1, y[:, None]).mean()), rel=1e-6, abs=1e-6 * factor
    )


def test_without_a_minimum_it_is_the_end_of_the_range() -> None:
    y = planted(200, 1.0)[1]
    sure = F.one_hot(y, 6).double()
    assert nll(sure, y, temperature(sure, y)) < 1e-12
    wrong = -sure  # the less of it the better
    assert nll(wrong, y, temperature(wrong, y)) == pytest.approx(math.log(6), abs=1e-3)
    assert temperature(torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64)) == 1.0
    # One is always in the range, however large the logits: fitting cannot do worse than not.
    for scale in (1e-9, 1e9):
        for logits in (sure * scale, wrong * scale):
            assert nll(logits, y, temperature(logits, y)) <= nll(logits, y)


def test_half_precision_logits_are_taken_in_float64() -> None:
    z, y = planted(300, 2.0)
    assert temperature(z.half(), y) == temperature(z.half().double(), y)


def test_a_temperature_helps_on_other_data_and_changes_no_decision() -> None:
    z, y = planted(4000, 2.5)
    t = temperature(z[:2000], y[:2000])
    before = nll(z[2000:], y[2000:])
    assert before == pytest.approx(float(F.cross_entropy(z[2000:], y[2000:])))
    assert nll(z[2000:], y[2000:], t) < before
    assert torch.equal((z / t).argmax(1), z.argmax(1))
    assert ece((z / t).softmax(1), y) < 0.03 < ece(z.softmax(1), y)


# ---- on the line


def ends(spec: str, steps: int = 60) -> tuple[nn.Module, Theta, Theta]:
    found = []
    for init in (1, 2):
        recipe = Recipe(net=spec, data="digits", steps=steps, batch=60, lr=0.1)
        run = Run(recipe, init=init, order=init)
        module = build(run, DIGITS, torch.device("cpu"))
        found.append(advance(run, State(0, snapshot(module)), steps, DIGITS, module=module).theta)
    return module, found[0], found[1]


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, Theta, Theta]:
    return ends("mlp:widths=16-16")


@pytest.mark.parametrize("bn", ["interpolate", "reestimate", "batch"])
def test_at_temperature_one_it_is_the_walkers_curve(bn: str) -> None:
    module, a, b = ends("mlp:norm=batch,widths=12", 20)
    got = calibrated_curve(
        module, a, b, FIT, SPLITS, points=5, bn=bn, bn_data=FIT, temperature_at=1.0
    )
    walker = Walker(module, SPLITS, bn=bn, bn_data=FIT)
    want = segment(module, a, b, SPLITS, points=5, walker=walker)
    assert got.plain == want
    assert got.temperatures == (1.0,) * 5
    assert (got.curve.alphas, got.curve.bn, got.curve.sizes) == (want.alphas, bn, want.sizes)
    for split, metrics in want.values.items():
        assert got.curve.values[split]["error"] == metrics["error"]
        assert got.curve.values[split]["loss"] == pytest.approx(metrics["loss"], rel=1e-5)


def test_calibration_lowers_the_loss_where_it_is_fitted_and_changes_no_error(
    pair: tuple[nn.Module, Theta, Theta],
) -> None:
    module, a, b = pair
    got = calibrated_curve(module, a, b, FIT, {"fit": FIT, **SPLITS}, points=11)
    own, plain = got.curve.values["fit"]["loss"], got.plain.values["fit"]["loss"]
    assert all(c <= p + 1e-6 for c, p in zip(own, plain, strict=True))
    assert min(c / p for c, p in zip(own, plain, strict=True)) < 0.95
    for split in got.curve.values:
        assert got.curve.values[split]["error"] == got.plain.values[split]["error"]
    # Between the networks logits shrink, or say nothing: the loss never exceeds that of a guess.
    assert max(own) <= math.log(10) + 1e-3
    assert got.curve.height("test", "error") == got.plain.height("test", "error")
    json.dumps(codec.to_json(got), allow_nan=False)


def test_each_point_has_the_temperature_of_its_own_logits(
    pair: tuple[nn.Module, Theta, Theta],
) -> None:
    module, a, b = pair
    # More than a batch, and a split called "fit" that is not what is fitted on.
    fit = DIGITS.train.head(1100)
    held = {"fit": SPLITS["test"], "test": SPLITS["train"]}
    got = calibrated_curve(module, a, b, fit, held, points=3)
    assert list(got.curve.values) == ["fit", "test"]
    for i, alpha in enumerate((0.0, 0.5, 1.0)):
        at = copy.deepcopy(module).eval()
        at.load_state_dict({n: (1 - alpha) * v + alpha * b[n] for n, v in a.items()})
        with torch.no_grad():
            t = temperature(at(fit.x), fit.y)
            logits = {n: at(s.x) for n, s in held.items()}
        assert got.temperatures[i] == pytest.approx(t, rel=1e-4)
        for name, split in held.items():
            loss = nll(logits[name], split.y, t)
            assert got.curve.values[name]["loss"][i] == pytest.approx(loss, rel=1e-4)


def test_a_point_without_finite_logits_has_infinite_loss() -> None:
    module = models.build("mlp:widths=4", DIGITS.in_shape, 10, Key("test", "inf"))
    a = snapshot(module)
    b = {n: v * 1e25 if v.ndim == 2 else v for n, v in a.items()}
    got = calibrated_curve(module, a, b, FIT, {"test": SPLITS["test"]}, points=3)
    assert math.isfinite(got.temperatures[0]) and math.isnan(got.temperatures[2])
    assert got.curve.values["test"]["loss"][2] == math.inf
    json.dumps(codec.to_json(got), allow_nan=False)


def test_the_networks_are_not_changed(pair: tuple[nn.Module, Theta, Theta]) -> None:
    module, a, b = pair
    before = [copy.deepcopy(t) for t in (a, b, snapshot(module))]
    calibrated_curve(module, a, b, FIT, SPLITS, points=3)
    for was, now in zip(before, (a, b, module.state_dict()), strict=True):
        assert all(torch.equal(v, now[n]) for n, v in was.items())


def test_networks_that_do_not_fit_are_named(pair: tuple[nn.Module, Theta, Theta]) -> None:
    module, a, b = pair
    with pytest.raises(BadParameter, match="network B does not fit"):
        calibrated_curve(module, a, {}, FIT, SPLITS)
    with pytest.raises(BadParameter, match="points"):
        calibrated_curve(module, a, b, FIT, SPLITS, points=4)
    with pytest.raises(BadParameter, match="temperature_at: 0"):
        calibrated_curve(module, a, b, FIT, SPLITS, temperature_at=0)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Unflatten(1, (2, 5)))
    state = snapshot(flat)
    with pytest.raises(BadParameter, match="needs logits"):
        calibrated_curve(flat, state, state, FIT, SPLITS)


# ---- calibration error and reliability


def test_calibration_error_of_a_hand_example() -> None:
    rows = [[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.35, 0.65]]
    p = torch.tensor(rows, dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 1])
    # Two bins: all four tops are in (0.5, 1]: mean confidence 0.7375, accuracy 0.75.
    assert ece(p, y, 2) == pytest.approx(0.0125, abs=1e-12)
    # Five: 0.8 (wrong) and 0.65 share (0.6, 0.8]; 0.9 and 0.6 have a bin each.
    want = (abs(0.8 + 0.65 - 1) + abs(0.9 - 1) + abs(0.6 - 1)) / 4
    assert ece(p, y, 5) == pytest.approx(want, abs=1e-12)


def test_calibration_error_of_calibrated_and_overconfident_predictions() -> None:
    z, y = planted(40_000, 1.0)
    assert ece(z.softmax(1), y) < 0.01
    assert ece((3 * z).softmax(1), y) > 0.1
    certain = F.one_hot((y + 1) % 6, 6).double()
    assert ece(certain, y) == 1.0


def test_reliability_counts_every_class_of_a_hand_example() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.5, 0.25]], dtype=torch.float64)
    got = reliability(p, torch.tensor([0, 2]), bins=4)
    assert got.centres == (0.125, 0.375, 0.625, 0.875)
    # (0, .25]: .2, .1, .25, .25 of which the last is true; an edge belongs to the lower bin.
    assert got.counts == (4, 1, 1, 0)
    assert got.confidence[:3] == pytest.approx((0.2, 0.5, 0.7))
    assert got.fraction[:3] == (0.25, 0.0, 1.0)
    assert math.isnan(got.confidence[3]) and math.isnan(got.fraction[3])


def test_probabilities_of_exactly_zero_and_one_are_counted() -> None:
    got = reliability(torch.tensor([[0.0, 1.0]]), torch.tensor([1]), bins=15)
    assert got.counts == (1, *[0] * 13, 1)
    assert (got.fraction[0], got.fraction[-1]) == (0.0, 1.0)


def test_calibrated_predictions_lie_on_the_diagonal() -> None:
    z, y = planted(40_000, 1.0)
    got = reliability(z.softmax(1), y, 10)
    assert sum(got.counts) == z.numel()
    assert got.fraction == pytest.approx(got.confidence, abs=0.02)


# ---- controls


def test_a_prior_shift_is_bayes_rule() -> None:
    # p(x | class) of a coin with three sides; posteriors under two priors, exactly.
    given = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]], dtype=torch.float64)
    train, test = (torch.tensor(p, dtype=torch.float64) for p in ([0.8, 0.2], [0.3, 0.7]))

    def posterior(prior: Tensor) -> Tensor:
        joint = (given * prior[:, None]).T
        return joint / joint.sum(1, keepdim=True)

    logits = posterior(train).log() + 5  # a constant says nothing
    got = prior_shift(logits, train, test)
    torch.testing.assert_close(got.softmax(1), posterior(test))
    torch.testing.assert_close(prior_shift(logits, 10 * train, (100 * test).long()), got)
    assert prior_shift(logits.half(), train, test).dtype == torch.float16


def test_an_ensemble_is_the_geometric_mean() -> None:
    z = [torch.randn(5, 4, generator=seeded("e", i)) for i in range(3)]
    got = ensemble_logprobs(z, [0.5, 0.3, 0.2])
    mean = torch.stack(
        [x.double().softmax(1) ** w for x, w in zip(z, (0.5, 0.3, 0.2), strict=True)]
    ).prod(0)
    torch.testing.assert_close(got.exp(), mean / mean.sum(1, keepdim=True))
    alone = ensemble_logprobs([z[0], z[0] + 7])  # a constant says nothing
    torch.testing.assert_close(alone, z[0].double().log_softmax(1))


# ---- bad input

Z, Y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
P = Z.softmax(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: temperature(Z[0], Y), "logits: shape"),
        (lambda: temperature(Z, Y[:2]), r"y: int64 \(4,\) expected"),
        (lambda: temperature(Z, Y.float()), "y: int64"),
        (lambda: temperature(Z, Y + 3), "classes 0 to 2 expected"),
        (lambda: temperature(Z / 0, Y), "logits: they hold NaN"),
        (lambda: ece(Z + 2, Y), "sum to 1"),
        (lambda: ece(P, Y, 0), "bins: 0"),
        (lambda: reliability(P, Y, 1.5), "bins: 1.5"),  # type: ignore[arg-type]  # wrong on purpose
        (lambda: prior_shift(Z, torch.ones(2), torch.ones(3)), r"train_prior: \(3,\)"),
        (lambda: prior_shift(Z, torch.ones(3), torch.zeros(3)), "test_prior.*above 0"),
        (lambda: ensemble_logprobs([]), "a list of logits"),
        (lambda: ensemble_logprobs([Z, Z[:2]]), "of one shape"),
        (lambda: ensemble_logprobs([Z, Z], [1.0, 1.0]), "sum to 1"),
        (lambda: ensemble_logprobs([Z, Z], [1.0]), "one for each model"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(BadParameter, match=message):
        call()
