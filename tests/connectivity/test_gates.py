"""Gates: each passes where all is well and fails on the case it is there for."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from companion import data, models
from companion.connectivity import Barrier, barrier, gates
from companion.connectivity.gates import Gate
from companion.core.seeds import Key
from companion.core.theta import Theta, layout, snapshot
from companion.data import Split

DIGITS = data.load("digits")
SPLITS = {"train": DIGITS.train.head(150), "test": DIGITS.test.head(100)}


def net(init: int, spec: str = "mlp:widths=12") -> nn.Module:
    return models.build(spec, DIGITS.in_shape, DIGITS.classes, Key("test", "gates", init))


def theta(init: int) -> dict[str, Tensor]:
    return snapshot(net(init))


NAMES = layout(net(0)).floating


def test_a_gate_prints_its_outcome() -> None:
    assert str(Gate("G9", True, "fine")) == "G9 pass: fine"
    assert str(Gate("G9", False, "not")) == "G9 FAIL: not"
    assert str(Gate("G9", None, "elsewhere")) == "G9 n/a: elsewhere"


# ---- G0


@pytest.mark.parametrize(
    ("errors", "bounds", "passed"),
    [
        ((2.0, 3.0), {"reference": 2.0}, True),
        ((2.0, 3.1), {"reference": 2.0}, False),
        ((3.1, 2.0), {"reference": 2.0}, False),
        ((2.0, 3.1), {"reference": 2.0, "max_error": 5.0}, True),
        ((2.0, 5.1), {"reference": 2.0, "max_error": 5.0}, False),
        ((8.0, 8.0), {"reference": 6.0, "max_error": 5.0}, True),
        ((5.0, 4.0), {"max_error": 5.0}, True),
        ((44.0, 45.0), {}, True),
        ((44.0, 45.1), {}, False),
        ((0.0, 0.0), {"reference": 0.0}, True),
        ((0.0, 0.1), {"reference": 0.0}, False),
        ((0.0, math.nan), {}, False),
        ((math.nan, 0.0), {"max_error": 5.0}, False),
    ],
)
def test_quality(errors: tuple[float, float], bounds: dict[str, float], passed: bool) -> None:
    found = gates.quality(errors, 10, **bounds)
    assert found.passed is passed, found


def test_quality_without_bounds_asks_for_half_of_guessing() -> None:
    assert gates.quality((49.4,), 100).passed
    assert not gates.quality((49.6,), 100).passed
    assert not gates.quality((26.0,), 2).passed


def test_dead_networks_are_invalid_not_stable() -> None:
    """The trap: two networks at 88 % error have a barrier near 0, and it means nothing."""
    found = barrier(net(0), theta(1), theta(2), SPLITS, points=5)
    a, b = found.curve.ends("test")
    assert min(a, b) > 70 and found.curve.height("test") < 10, "the case is planted as it should be"
    assert not found.valid
    assert math.isnan(found.height("test")) and math.isnan(found.height("train", "loss"))
    assert math.isnan(found.height("test", signed=True, definition="linear"))
    assert str(found).startswith("INVALID") and "G0 quality FAIL" in str(found)
    assert "barrier 0" not in str(found) and "points" not in str(found)


def uneven(rare: float, classes: int = 2, n: int = 400) -> Split:
    """Images of which all but a share ``rare`` are of class 0."""
    draw = Key("test", "gates", "uneven").generator()
    y = torch.randint(1, classes, (n,), generator=draw)
    y[torch.rand(n, generator=draw) >= rare] = 0
    return Split(torch.randn(n, 1, 3, 3, generator=draw), y)


def constant(answer: int, classes: int, number: int) -> dict[str, Tensor]:
    """A network that says one class whatever it sees."""
    draw = Key("test", "gates", "constant", number).generator()
    bias = torch.randn(classes, generator=draw)
    bias[answer] = 5.0
    return {"1.weight": 1e-4 * torch.randn(classes, 9, generator=draw), "1.bias": bias}


@pytest.mark.parametrize(("rare", "classes", "answer"), [(0.1, 2, 0), (0.3, 5, 0), (0.04, 3, 0)])
def test_constant_networks_have_not_trained_where_one_class_is_common(
    rare: float, classes: int, answer: int
) -> None:
    split = uneven(rare, classes)
    module = nn.Sequential(nn.Flatten(), nn.Linear(9, classes))
    a, b = (constant(answer, classes, i) for i in range(2))
    found = barrier(module, a, b, {"test": split}, points=3, classes=classes)
    share = 100 * float((split.y != 0).double().mean())
    assert found.errors == pytest.approx((share, share)) and found.commonest == found.errors[0]
    assert not found.valid and "always the commonest class" in found.gate("G0").detail
    assert not found.judged(reference_error=share).valid, "their own error is not normal"
    assert found.judged(max_error=share + 1).valid, "whoever names a bound is believed"


def test_networks_that_beat_the_commonest_class_have_trained() -> None:
    found = gates.quality((9.0, 9.5), 2, commonest=10.0)
    assert found.passed and "below 10.00 %" in found.detail
    assert not gates.quality((9.0, 10.0), 2, commonest=10.0).passed
    assert not gates.quality((math.nan, 9.0), 2, commonest=10.0).passed
    even = gates.quality((40.0, 44.0), 10, commonest=89.0)
    assert even == gates.quality((40.0, 44.0), 10), "nothing changes where classes are even"
    assert gates.commonest(uneven(0.2)) == pytest.approx(
        100 * float((uneven(0.2).y != 0).double().mean())
    )


# ---- G0b


def test_different_networks_are_distinct() -> None:
    assert gates.distinct(theta(1), theta(2), NAMES).passed


def test_one_network_under_two_names_is_caught() -> None:
    """A published reproduction trained one object twice and called the two results stable."""
    same = net(1)
    found = gates.distinct(same.state_dict(), same.state_dict(), NAMES)
    assert found.passed is False and "share memory" in found.detail
    equal = gates.distinct(theta(1), theta(1), NAMES)
    assert equal.passed is False and "distance 0" in equal.detail
    shared = {**theta(2), "head.bias": same.get_parameter("head.bias")}
    assert gates.distinct(same.state_dict(), shared, NAMES).passed is False


def test_a_null_control_may_be_equal() -> None:
    assert gates.distinct(theta(1), theta(1), NAMES, same_noise=True).passed is None


@pytest.mark.parametrize("copy", [False, True], ids=["one object", "equal copies"])
def test_barrier_of_a_network_with_itself_is_invalid(copy: bool) -> None:
    a = net(1).state_dict()
    b = {k: v.clone() for k, v in a.items()} if copy else a
    found = barrier(net(0), a, b, SPLITS, points=3, max_error=100)
    assert [g.name for g in found.gates if g.passed is False] == ["G0b distinct"]
    assert math.isnan(found.height()) and "INVALID" in str(found)
    control = barrier(net(0), a, b, SPLITS, points=3, max_error=100, same_noise=True)
    assert control.valid and control.height("test") == control.height("train", "loss") == 0


# ---- G1, G2


def test_null_control() -> None:
    a, b = theta(1), theta(1)
    assert gates.null_control(a, b, NAMES, 0.0).passed
    assert not gates.null_control(a, b, NAMES, 1e-12).passed
    assert not gates.null_control(a, b, NAMES, math.nan).passed
    b["head.bias"][3] += 1e-7
    found = gates.null_control(a, b, NAMES, 0.0)
    assert found.passed is False and "1e-07" in found.detail.replace("9.99999e-08", "1e-07")


def test_symmetry(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = theta(1), theta(2)
    assert gates.symmetry(a, b, NAMES, 0.0).passed
    assert not gates.symmetry(a, b, NAMES, 1e-15).passed
    assert not gates.symmetry(a, b, NAMES, math.nan).passed

    def lerp(thetas: tuple[Theta, Theta], weights: tuple[float, float], names: object) -> Theta:
        x, y = thetas
        return {n: x[n] + weights[1] * (y[n] - x[n]) for n in NAMES}  # what everybody writes

    monkeypatch.setattr(gates, "affine", lerp)
    found = gates.symmetry(a, b, NAMES, 0.0)
    assert found.passed is False and "A→B equals B→A: no" in found.detail


def test_self_gap_is_measured_on_a_real_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """If mixing A with itself moved A by one bit, the barrier must say so."""
    from companion.connectivity import walk

    real = walk.affine

    def careless(thetas: list[Theta], weights: list[float], names: list[str]) -> Theta:
        mixed = real(thetas, weights, names)
        return {n: v * (1 + 1e-6 * (0 < weights[0] < 1)) for n, v in mixed.items()}

    monkeypatch.setattr(walk, "affine", careless)
    found = barrier(net(0), theta(1), theta(2), SPLITS, points=5, max_error=100)
    assert [g.name for g in found.gates if g.passed is False] == ["G2 self and symmetry"]


# ---- G3


def orders(key_of: object, n: int = 60) -> dict[str, Tensor]:
    return {
        f"seed {seed} epoch {epoch}": key_of(seed, epoch, n)  # type: ignore[operator]  # one of several functions
        for seed, epoch in itertools.product(range(4), range(5))
    }


def keyed(seed: int, epoch: int, n: int) -> Tensor:
    return Key("order", seed).fold("epoch", epoch).permutation(n)


def seed_plus_epoch(seed: int, epoch: int, n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch))


def one_order_shifted(seed: int, epoch: int, n: int) -> Tensor:
    return torch.roll(Key("one order").permutation(n), 7 * seed + 13 * epoch)


def test_keyed_orders_are_independent() -> None:
    found = gates.noise_independence(orders(keyed))
    assert found.passed and found.detail == "0 collisions among 20 data orders"


def test_seed_plus_epoch_is_caught() -> None:
    found = gates.noise_independence(orders(seed_plus_epoch))
    assert found.passed is False
    assert found.detail.startswith("12 collisions among 20"), "20 orders, 8 of them different"
    assert "seed 0 epoch 1 = seed 1 epoch 0" in found.detail


def test_draws_are_compared_as_well() -> None:
    draws = {"draws 1 epoch 0": b"same", "draws 2 epoch 0": b"same", "draws 2 epoch 1": b"other"}
    found = gates.noise_independence(orders(keyed), draws)
    assert found.passed is False
    assert found.detail.startswith("1 collisions among 20 data orders and 3 draws")
    assert "draws 1 epoch 0 = draws 2 epoch 0" in found.detail


def test_a_shifted_copy_is_caught() -> None:
    found = gates.noise_independence(orders(one_order_shifted))
    assert found.passed is False and found.detail.startswith("19 collisions")


# ---- G4


def pruned(rounds: int = 3) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Global magnitude pruning of 20 % a round, as it should be."""
    weights = {n: theta(1)[n] for n in ("layer1.linear.weight", "head.weight")}
    total = sum(v.numel() for v in weights.values())
    flat = torch.cat([v.abs().flatten() for v in weights.values()]).sort().values
    levels = []
    for number in range(1, rounds + 1):
        bound = flat[total - round(total * 0.8**number)]
        levels.append({n: v.abs() >= bound for n, v in weights.items()})
    return {n: v * levels[-1][n] for n, v in weights.items()}, levels


def test_masks_that_are_right() -> None:
    weights, levels = pruned()
    start = {n: v.clone() for n, v in theta(2).items()}
    rewound = {n: start[n] * levels[-1][n] for n in weights}
    found = gates.masks(weights, levels, rewound=rewound, start=start)
    assert found.passed, found
    assert gates.masks(weights, levels).passed


def test_a_pruned_weight_that_moved_is_caught() -> None:
    weights, levels = pruned()
    dead = (~levels[-1]["head.weight"]).nonzero()[0]
    weights["head.weight"][tuple(dead)] = 1e-30
    found = gates.masks(weights, levels)
    assert found.passed is False and "head.weight: a pruned weight is not 0" in found.detail


def test_a_wrong_density_is_caught() -> None:
    weights, levels = pruned()
    assert not gates.masks(weights, levels[1:]).passed, "a round is missing"
    assert not gates.masks(weights, levels, keep=0.7).passed
    flat = levels[-1]["layer1.linear.weight"].view(-1)
    alive = flat.nonzero().flatten()
    flat[alive[:5]] = False  # prunes five weights too many; three rounds may be off by three
    weights = {n: v * levels[-1][n] for n, v in weights.items()}
    found = gates.masks(weights, levels)
    assert found.passed is False and "round 3" in found.detail and "weights alive" in found.detail


def test_a_mask_that_is_not_nested_is_caught() -> None:
    weights, levels = pruned()
    level, before = levels[2]["head.weight"].view(-1), levels[1]["head.weight"].view(-1)
    level[(~before).nonzero()[0]] = True
    level[level.nonzero()[-1]] = False  # as many as before
    weights = {n: v * levels[-1][n] for n, v in weights.items()}
    found = gates.masks(weights, levels)
    assert found.passed is False and found.detail == "round 3: a pruned weight came back"


def test_a_wrong_rewind_is_caught() -> None:
    weights, levels = pruned()
    start = theta(2)
    for spoil in (
        lambda r: (
            r["head.weight"]
            .view(-1)
            .__setitem__(int(levels[-1]["head.weight"].flatten().nonzero()[0]), 3.0)
        ),
        lambda r: r.update({"head.weight": start["head.weight"]}),
    ):
        rewound = {n: start[n] * levels[-1][n] for n in weights}
        spoil(rewound)
        found = gates.masks(weights, levels, rewound=rewound, start=start)
        assert found.passed is False and found.detail == "head.weight: not rewound to W_k"


# ---- G5


def test_batchnorm_modes_must_all_be_there() -> None:
    every = ["interpolate", "reestimate", "batch"]
    assert gates.batchnorm("reestimate", every).passed
    assert gates.batchnorm("none", ["none"]).passed is None
    for missing in every:
        left = [m for m in every if m != missing]
        found = gates.batchnorm(left[0], left)
        assert found.passed is False and f"not logged: {missing}" in found.detail


# ---- together


def test_a_barrier_asks_all_gates() -> None:
    control = Gate("G1 null control", True, "equal")
    found = barrier(net(0), theta(1), theta(2), SPLITS, points=3, max_error=100)
    found = found.recorded([control])
    assert [g.name[:3].strip() for g in found.gates] == ["G0", "G0b", "G2", "G5", "G1"]
    assert found.valid and found.gates[-1] is control
    spoiled = found.recorded([Gate("G3 noise independence", False, "1 collision")])
    assert found.valid and not spoiled.valid and math.isnan(spoiled.height())
    assert "G3 noise independence FAIL: 1 collision" in str(spoiled)


def test_judging_again_changes_g0_only() -> None:
    found = barrier(net(0), theta(1), theta(2), SPLITS, points=3)
    assert not found.valid
    kind = found.judged(max_error=100.0)
    assert kind.valid and kind.gates[1:] == found.gates[1:]
    strict = kind.judged(reference_error=1.0)
    assert not strict.valid and isinstance(strict, Barrier)
    assert found.judged().gates == found.gates


def test_g0_asks_about_the_networks_not_about_the_ends_of_a_path_of_layers() -> None:
    """With ``groups``, the far end is a hybrid of both networks: what it costs is the result."""
    module = net(1)
    a: Any = net(1)
    x, y = SPLITS["train"].x.flatten(1), SPLITS["train"].y
    hidden = a.layer1(x)
    target = 6.0 * torch.nn.functional.one_hot(y, 10) - 3.0
    with torch.no_grad():
        solved = torch.linalg.lstsq(torch.cat([hidden, torch.ones(len(x), 1)], 1), target).solution
        a.head.weight.copy_(solved[:-1].T)
        a.head.bias.copy_(solved[-1])
    good = snapshot(a)
    turned = {  # the same function with the hidden units in another order
        "layer1.linear.weight": good["layer1.linear.weight"].flip(0),
        "layer1.linear.bias": good["layer1.linear.bias"].flip(0),
        "head.weight": good["head.weight"].flip(1),
        "head.bias": good["head.bias"].clone(),
    }
    splits = {"train": SPLITS["train"]}
    whole = barrier(module, good, turned, splits, points=3)
    assert whole.valid and max(whole.errors) < 45, "both are trained"
    part = barrier(module, good, turned, splits, points=3, groups=["layer1"])
    assert part.curve.ends("train")[1] > 60, "the hybrid is not"
    assert part.valid and part.errors == whole.errors
    assert part.height("train") > 10
    assert part.judged(reference_error=max(whole.errors)).valid
