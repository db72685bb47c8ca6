"""Points, segments, planes and barriers against closed forms, naive loops and hand-made numbers."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reread import reread
from torch import Tensor, nn

from companion import data, models
from companion.connectivity import (
    BN_EXAMPLES,
    BN_MODES,
    Curve,
    Measure,
    Plane,
    Walker,
    barrier,
    classification,
    grid,
    has_batchnorm,
    plane,
    segment,
    statistics,
)
from companion.core import codec
from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.core.theta import distance, layout, snapshot
from companion.data import Split

DIGITS = data.load("digits")
SPLITS = {"train": DIGITS.train.head(230), "test": DIGITS.test.head(110)}
PLAIN, NORMED = "mlp:widths=12-8", "mlp:norm=batch,widths=12-8"

Theta = dict[str, Tensor]


def net(init: int, spec: str = PLAIN) -> nn.Module:
    return models.build(spec, DIGITS.in_shape, DIGITS.classes, Key("test", "connectivity", init))


def theta(init: int, spec: str = PLAIN) -> Theta:
    """A network that has seen some data, so that its BatchNorm statistics are its own."""
    module = net(init, spec).train()
    for x in DIGITS.train.head(600).x.split(100):
        module(x * (1 + 0.3 * (init % 3)))
    return snapshot(module)


def lerp(a: Theta, b: Theta, alpha: float, names: Any = None) -> Theta:
    """The naive interpolation, in float32, as everybody writes it."""
    return {
        n: (1 - alpha) * v + alpha * b[n]
        if v.is_floating_point() and (names is None or n in names)
        else v
        for n, v in a.items()
    }


def naive(module: nn.Module, point: Theta, split: Split) -> Measure:
    """load_state_dict and a plain forward pass over everything at once."""
    module = copy.deepcopy(module).eval()
    module.load_state_dict(point)
    with torch.no_grad():
        logits = module(split.x)
    wrong = (logits.argmax(1) != split.y).double().mean()
    return Measure(float(F.cross_entropy(logits.double(), split.y)), 100 * float(wrong))


def close(a: Measure, b: Measure) -> bool:
    return math.isclose(a.loss, b.loss, rel_tol=2e-5) and math.isclose(
        a.error, b.error, abs_tol=1e-9
    )


# ---- a network whose loss is known in closed form


class Point(nn.Module):
    """Three weights that are their own output: the loss on a path is a formula."""

    def __init__(self, w: list[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x), -1)


TARGET = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)


def quadratic(outputs: Tensor, _: Tensor) -> tuple[Tensor, Tensor, int]:
    """Squared distance from TARGET; an error wherever the first weight is above 1/2."""
    loss = ((outputs - TARGET) ** 2).sum()
    return loss, (outputs[:, 0] > 0.5).sum(), len(outputs)


A, B = [0.0, 1.0, -2.0], [1.0, 0.5, 4.0]
END_A, END_B = ENDS = [{"w": torch.tensor(w, dtype=torch.float64)} for w in (A, B)]


def exact_loss(alpha: float) -> float:
    return sum(
        ((1 - alpha) * a + alpha * b - float(t)) ** 2 for a, b, t in zip(A, B, TARGET, strict=True)
    )


def toy(n: int = 7, **options: Any) -> Walker:
    split = Split(torch.zeros(n, 1, 1, 1), torch.zeros(n, dtype=torch.int64))
    return Walker(Point(A), {"test": split}, score=quadratic, **options)


@pytest.mark.parametrize(("n", "batch"), [(7, 500), (7, 2), (1, 1)])
def test_segment_of_a_quadratic(n: int, batch: int) -> None:
    walker = toy(n, batch=batch)
    curve = segment(Point(A), END_A, END_B, walker.splits, walker=walker)
    assert len(curve.alphas) == 31 and curve.alphas[15] == 0.5
    expected = [exact_loss(t) for t in curve.alphas]
    assert curve.values["test"]["loss"] == pytest.approx(expected, abs=1e-9)
    assert curve.values["test"]["error"] == tuple(100.0 * (t > 0.5) for t in curve.alphas)
    assert curve.sizes == {"test": n} and curve.bn == "none"
    # E_α has its largest value at an end of this parabola: barrier = |E_A - E_B| / 2 by definition.
    a, b = exact_loss(0), exact_loss(1)
    assert curve.height(metric="loss") == pytest.approx(abs(a - b) / 2, abs=1e-9)
    assert curve.height(metric="loss", definition="linear") == 0
    inner = [exact_loss(t) - (a + b) / 2 for t in curve.alphas[1:-1]]
    assert curve.height(metric="loss", signed=True) == pytest.approx(max(inner), abs=1e-9)
    chord = [exact_loss(t) - ((1 - t) * a + t * b) for t in curve.alphas[1:-1]]
    assert max(chord) < 0, "a parabola lies below its chord"
    signed = curve.height(metric="loss", definition="linear", signed=True)
    assert signed == pytest.approx(max(chord), abs=1e-9)


def test_walker_takes_any_affine_combination() -> None:
    walker = toy()
    for weights in ((1.5, -0.5), (-3.0, 4.0), (0.25, 0.75)):
        found = walker.walk(ENDS, [weights])[0]["test"]
        assert found.loss == pytest.approx(exact_loss(weights[1]), rel=1e-12)


# ---- grid and definitions


@pytest.mark.parametrize("points", [3, 5, 31, 101])
def test_grid(points: int) -> None:
    steps = grid(points)
    assert len(steps) == points and steps[0] == (1.0, 0.0) and steps[-1] == (0.0, 1.0)
    assert (0.5, 0.5) in steps
    assert steps == [(b, a) for a, b in reversed(steps)], "symmetric bit by bit"
    assert [b for _, b in steps] == sorted({b for _, b in steps})


@pytest.mark.parametrize("points", [30, 2, 1, 0, -3])
def test_a_grid_without_one_half_is_refused(points: int) -> None:
    with pytest.raises(BadParameter, match=rf"points: {points} must be odd and 3 or more.*½"):
        grid(points)


def curve_of(values: list[float], metric: str = "error") -> Curve:
    alphas = tuple(i / (len(values) - 1) for i in range(len(values)))
    other = "loss" if metric == "error" else "error"
    zeros = (0.0,) * len(values)
    return Curve(alphas, {"test": {metric: tuple(values), other: zeros}}, "none", {"test": 100})


@pytest.mark.parametrize(
    ("values", "mean", "linear", "mean_signed", "linear_signed"),
    [
        # flat ends: both definitions agree
        ([10, 15, 30, 15, 10], 20, 20, 20, 20),
        # E_B is 20 above E_A: mean 20, chord 10, 15, 20, 25, 30
        ([10, 15, 50, 25, 30], 30, 30, 30, 30),
        ([10, 15, 20, 45, 30], 25, 20, 25, 20),
        # a straight line: the end itself is 10 above the mean of the ends
        ([10, 15, 20, 25, 30], 10, 0, 5, 0),
        # a valley: never negative, unless the sign is asked for
        ([10, 5, 2, 5, 10], 0, 0, -5, -5),
        ([10, 6, 2, 4, 30], 10, 0, -14, -9),
    ],
)
def test_definitions_by_hand(
    values: list[float], mean: float, linear: float, mean_signed: float, linear_signed: float
) -> None:
    for metric in ("error", "loss"):
        curve = curve_of(values, metric)
        assert curve.height("test", metric) == pytest.approx(mean)
        assert curve.height("test", metric, "linear") == pytest.approx(linear)
        assert curve.height("test", metric, signed=True) == pytest.approx(mean_signed)
        assert curve.height("test", metric, "linear", signed=True) == pytest.approx(linear_signed)
        assert curve.ends("test", metric) == (values[0], values[-1])
        assert curve.peak("test", metric) == curve.alphas[values.index(max(values))]
    turned = curve_of(values[::-1])
    assert turned.height() == curve_of(values).height()
    assert turned.height(definition="linear") == pytest.approx(linear)
    with pytest.raises(BadParameter, match=r"definition: 'max' is not known.*mean, linear"):
        curve_of(values).height(definition="max")


# ---- against the naive loop


@pytest.mark.parametrize("spec", [PLAIN, NORMED, "resnet8:norm=group,width=4"])
def test_walking_agrees_with_a_naive_loop(spec: str) -> None:
    module, a, b = net(0, spec), theta(1, spec), theta(2, spec)
    splits = {name: s.head(60) for name, s in SPLITS.items()}
    curve = segment(module, a, b, splits, points=5)
    for i, alpha in enumerate(curve.alphas):
        for name, split in splits.items():
            expected = naive(module, lerp(a, b, alpha), split)
            found = Measure(*(curve.values[name][m][i] for m in ("loss", "error")))
            assert close(found, expected), f"{name} at {alpha}"


def test_batch_size_does_not_matter() -> None:
    module, a = net(0), theta(1)
    found = [Walker(module, SPLITS, batch=batch).at(a)["train"] for batch in (7, 229, 230, 1000)]
    assert all(close(found[0], other) for other in found[1:])
    assert {m.error for m in found} == {found[0].error}


def test_classification_counts() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 5.0, 1.0], [0.0, 0.0, 1.0]])
    targets = torch.tensor([0, 1, 1])
    loss, wrong, n = classification(logits, targets)
    by_hand = -sum(math.log(p) for p in torch.softmax(logits.double(), 1)[[0, 1, 2], targets])
    assert (float(loss), int(wrong), n) == (pytest.approx(by_hand, rel=1e-6), 1, 3)
    half = classification(logits.bfloat16(), targets)[0]
    assert half.dtype == torch.float64 and float(half) == pytest.approx(by_hand, rel=1e-6)


# ---- symmetry, self


@pytest.mark.parametrize("spec", [PLAIN, NORMED])
def test_from_b_to_a_is_from_a_to_b_turned_round(spec: str) -> None:
    module, a, b = net(0, spec), theta(1, spec), theta(2, spec)
    there = barrier(module, a, b, SPLITS, points=7, max_error=100)
    back = barrier(module, b, a, SPLITS, points=7, max_error=100)
    assert set(there.curves) == ({"none"} if spec == PLAIN else set(BN_MODES))
    for mode, split, metric in itertools.product(there.curves, SPLITS, ("loss", "error")):
        forth = there.curves[mode].values[split][metric]
        assert forth == back.curves[mode].values[split][metric][::-1], (mode, split, metric)
        assert len(set(forth)) > 1, "a flat line shows nothing"
        assert there.height(split, metric, bn=mode) == back.height(split, metric, bn=mode)
        assert there.height(split, metric, "linear", bn=mode) == pytest.approx(
            back.height(split, metric, "linear", bn=mode), abs=1e-12
        )
    assert there.distance == back.distance and there.errors == back.errors[::-1]


@pytest.mark.parametrize("bn", BN_MODES)
def test_the_barrier_of_a_network_with_itself_is_exactly_0(bn: str) -> None:
    module, a = net(0, NORMED), theta(1, NORMED)
    twin = {k: v.clone() for k, v in a.items()}
    curve = segment(module, a, twin, SPLITS, bn=bn)
    for split, metric in itertools.product(SPLITS, ("loss", "error")):
        assert len(set(curve.values[split][metric])) == 1
        assert curve.height(split, metric) == curve.height(split, metric, "linear") == 0


# ---- subsets of layers


@pytest.mark.parametrize("rest", ["a", "b"])
@pytest.mark.parametrize("groups", [["layer1"], ["layer2.linear", "head"], ["head"]])
def test_a_subset_of_layers_moves(groups: list[str], rest: str) -> None:
    module, a, b = net(0, NORMED), theta(1, NORMED), theta(2, NORMED)
    names = layout(module).select(groups)
    assert 0 < len(names) < len(layout(module).floating)
    curve = segment(module, a, b, SPLITS, points=3, groups=groups, rest=rest)
    for i, alpha in enumerate(curve.alphas):
        moved = lerp(a, b, alpha, names)
        point = moved if rest == "a" else {n: moved[n] if n in names else v for n, v in b.items()}
        expected = naive(module, point, SPLITS["test"])
        found = Measure(*(curve.values["test"][m][i] for m in ("loss", "error")))
        assert close(found, expected)


def test_all_layers_together_are_the_network() -> None:
    module, a, b = net(0, NORMED), theta(1, NORMED), theta(2, NORMED)
    every = segment(module, a, b, SPLITS, points=5, groups=list(layout(module).groups))
    assert every == segment(module, a, b, SPLITS, points=5)
    assert every == segment(
        module, a, b, SPLITS, points=5, groups=list(layout(module).groups), rest="b"
    )
    nothing = segment(module, a, b, SPLITS, points=5, groups=[])
    assert len(set(nothing.values["test"]["loss"])) == 1


def test_a_path_of_layers_starts_anew() -> None:
    """What one walk left in the private copy of the network must not show in the next."""
    module, a, b = net(0, NORMED), theta(1, NORMED), theta(2, NORMED)
    walker = Walker(module, SPLITS, bn="reestimate")
    first = segment(module, a, b, SPLITS, points=3, groups=["head"], walker=walker)
    segment(module, b, a, SPLITS, points=3, groups=["layer1"], rest="b", walker=walker)
    assert segment(module, a, b, SPLITS, points=3, groups=["head"], walker=walker) == first


# ---- BatchNorm


def with_statistics(module: nn.Module, point: Theta, split: Split, parts: int) -> Any:
    """Statistics of the split at ``point``, layer by layer, batch by batch, written out."""
    at: Any = copy.deepcopy(module).eval()
    at.load_state_dict(point)
    chunks = split.x.tensor_split(parts)
    hidden = [c.flatten(1) for c in chunks]
    with torch.no_grad():
        for layer in (at.layer1, at.layer2):
            before = [layer.linear(h) for h in hidden]
            layer.norm.running_mean.copy_(torch.stack([h.mean(0) for h in before]).mean(0))
            layer.norm.running_var.copy_(torch.stack([h.var(0) for h in before]).mean(0))
            # In training mode each batch is normalised by its own (biased) statistics.
            hidden = [
                F.relu(
                    F.batch_norm(h, None, None, layer.norm.weight, layer.norm.bias, training=True)
                )
                for h in before
            ]
    return at


@pytest.mark.parametrize("parts", [1, 3])
def test_reestimated_statistics_equal_a_direct_computation(parts: int) -> None:
    module, a, b = net(0, NORMED), theta(1, NORMED), theta(2, NORMED)
    other = DIGITS.train.head(301)
    walker = Walker(module, SPLITS, bn="reestimate", bn_data=other, batch=-(-301 // parts))
    found = walker.walk((a, b), [(0.5, 0.5)])[0]
    direct = with_statistics(module, lerp(a, b, 0.5), other, parts)
    for layer in ("layer1.norm", "layer2.norm"):
        own: Any = walker.module.get_submodule(layer)
        expected = direct.get_submodule(layer)
        torch.testing.assert_close(own.running_mean, expected.running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own.running_var, expected.running_var, rtol=1e-4, atol=1e-5)
    assert close(found["test"], naive(direct, snapshot(direct), SPLITS["test"]))
    by_default = Walker(module, SPLITS, bn="reestimate").walk((a, b), [(0.5, 0.5)])[0]
    assert by_default["test"].loss != found["test"].loss, "bn_data is what is averaged over"
    assert (
        by_default
        == Walker(module, SPLITS, bn="reestimate", bn_data=SPLITS["train"]).walk(
            (a, b), [(0.5, 0.5)]
        )[0]
    )


def test_batch_mode_uses_the_statistics_of_the_batch() -> None:
    module, a, b = net(0, NORMED), theta(1, NORMED), theta(2, NORMED)
    found = Walker(module, SPLITS, bn="batch", batch=60).walk((a, b), [(0.5, 0.5)])[0]
    live = copy.deepcopy(module).train()
    live.load_state_dict(lerp(a, b, 0.5))
    for name, split in SPLITS.items():
        loss, wrong = 0.0, 0
        parts = math.ceil(len(split) / 60)
        for x, y in zip(split.x.tensor_split(parts), split.y.tensor_split(parts), strict=True):
            logits = live(x).detach()
            loss += float(F.cross_entropy(logits.double(), y, reduction="sum"))
            wrong += int((logits.argmax(1) != y).sum())
        assert close(found[name], Measure(loss / len(split), 100 * wrong / len(split)))
    again = Walker(module, SPLITS, bn="batch", batch=60)
    other = {n: v + 1 if "running" in n else v for n, v in a.items()}
    assert again.at(a) == again.at(other), "stored statistics do not matter in this mode"


def test_the_three_modes_are_three_things() -> None:
    module, a, b = net(0, NORMED), theta(1, NORMED), theta(2, NORMED)
    found = barrier(module, a, b, SPLITS, points=3, max_error=100)
    assert (
        list(found.curves) == ["interpolate", "reestimate", "batch"] and found.bn == "interpolate"
    )
    middle = {found.curves[m].values["test"]["loss"][1] for m in BN_MODES}
    assert len(middle) == 3
    assert found.height(bn="batch") == found.curves["batch"].height()
    headline = barrier(module, a, b, SPLITS, points=3, max_error=100, bn="reestimate")
    assert headline.bn == "reestimate" and headline.curve == found.curves["reestimate"]
    assert "BatchNorm reestimate" in str(headline)
    assert headline.gate("G5").passed


@pytest.mark.parametrize("spec", [PLAIN, "mlp:norm=layer,widths=8", "resnet8:norm=group,width=4"])
@pytest.mark.parametrize("bn", BN_MODES)
def test_networks_without_running_statistics_have_no_mode(spec: str, bn: str) -> None:
    module = net(0, spec)
    assert not has_batchnorm(module) and has_batchnorm(net(0, NORMED))
    curve = segment(module, theta(1, spec), theta(2, spec), SPLITS, points=3, bn=bn)
    assert curve.bn == "none"
    found = barrier(module, theta(1, spec), theta(2, spec), SPLITS, points=3, bn=bn, max_error=100)
    assert list(found.curves) == ["none"] == [found.bn] and found.gate("G5").passed is None
    assert curve == found.curve and "BatchNorm" not in str(found)


def test_reestimation_reads_a_bounded_head_and_the_result_says_how_much() -> None:
    a, b = theta(0, NORMED), theta(1, NORMED)
    module, everything = net(0, NORMED), DIGITS.train
    head = everything.head(64)
    bounded = Walker(module, SPLITS, bn="reestimate", bn_data=everything, bn_examples=64)
    by_hand = Walker(module, SPLITS, bn="reestimate", bn_data=head, bn_examples=None)
    point = [(0.5, 0.5)]
    assert bounded.walk((a, b), point) == by_hand.walk((a, b), point)
    assert bounded.bn_examples == by_hand.bn_examples == 64
    whole = Walker(module, SPLITS, bn="reestimate", bn_data=everything, bn_examples=None)
    assert whole.bn_examples == len(everything)
    assert whole.walk((a, b), point) != bounded.walk((a, b), point)
    assert Walker(module, SPLITS, bn="interpolate", bn_data=everything).bn_examples is None

    found = barrier(
        module, a, b, SPLITS, points=3, max_error=100, bn="reestimate", bn_data=everything,
        bn_examples=64,
    )  # fmt: skip
    assert "BatchNorm reestimate on 64 inputs" in str(found)
    assert "re-estimated on 64 training inputs" in found.gate("G5").detail
    assert {m: c.bn_examples for m, c in found.curves.items()} == {
        "reestimate": 64, "interpolate": None, "batch": None,
    }  # fmt: skip
    assert reread(found) == found
    assert "bn_examples" not in codec.to_json(found.curves["batch"])


def test_reestimation_does_not_ask_the_device_for_a_counter() -> None:
    """PyTorch's own cumulative average, momentum=None, reads a counter for every norm and batch."""
    seen = []
    module = net(0, NORMED)
    walker = Walker(module, SPLITS, bn="reestimate", batch=50)
    for norm in statistics.running(walker.module):
        norm.register_forward_pre_hook(lambda m, _: seen.append(m.momentum) if m.training else None)
    before = [m.momentum for m in statistics.running(walker.module)]
    walker.at(theta(1, NORMED))
    assert seen[:2] == [1.0, 1.0] and None not in seen and len(set(seen)) == 5  # 230 images
    assert [m.momentum for m in statistics.running(walker.module)] == before


def test_reestimation_is_bounded_by_default() -> None:
    rows = torch.arange(2500 * 64, dtype=torch.float32).view(2500, 1, 8, 8) / 1e5
    many = Split(rows, torch.zeros(2500, dtype=torch.int64))
    walker = Walker(net(0, NORMED), SPLITS, bn="reestimate", bn_data=many)
    assert walker.bn_examples == BN_EXAMPLES == 2000


@pytest.mark.parametrize("wrong", [1, 0, -5, 2.5, True, "all"])
def test_a_wrong_number_of_inputs_for_reestimation_is_refused(wrong: Any) -> None:
    with pytest.raises(BadParameter, match=r"bn_examples: .* must be a whole number of 2 or more"):
        Walker(net(0, NORMED), SPLITS, bn="reestimate", bn_examples=wrong)


@pytest.mark.parametrize("mode", ["batch", "reestimate"])
@pytest.mark.parametrize("n", [501, 1001])
def test_no_batch_is_left_with_a_single_image(mode: str, n: int) -> None:
    """BatchNorm refuses to take the statistics of one image: 501 is 251 + 250, not 500 + 1."""
    split = DIGITS.train.head(n)
    walker = Walker(net(0, NORMED), {"train": split}, bn=mode)
    assert walker.at(theta(1, NORMED))["train"].error > 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bn", BN_MODES)
def test_the_module_that_is_passed_in_is_not_touched(bn: str, training: bool) -> None:
    module = net(0, NORMED).train(training)
    before, version = snapshot(module), [p._version for p in module.parameters()]
    a, b = theta(1, NORMED), theta(2, NORMED)
    kept = {n: v.clone() for n, v in a.items()}
    segment(module, a, b, SPLITS, points=3, bn=bn)
    barrier(module, a, b, SPLITS, points=3, bn=bn, groups=["head"])
    plane(module, before, a, b, SPLITS, points=2, bn=bn)
    assert all(torch.equal(v, before[n]) for n, v in module.state_dict().items())
    assert [p._version for p in module.parameters()] == version
    assert all(m.training is training for m in module.modules())
    assert all(p.requires_grad for p in module.parameters())
    assert all(torch.equal(v, kept[n]) for n, v in a.items()), "nor is the network on the path"


# ---- tied weights


class Tied(nn.Module):
    """An autoencoder with one matrix both ways, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(64, 64, bias=False)
        self.decode = nn.Linear(64, 64, bias=False)
        self.decode.weight = self.encode.weight
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decode(F.relu(self.encode(x.flatten(1)))))


def tied(seed: int) -> Tied:
    with Key("tied", seed).seeded():
        return Tied()


def test_tied_weights_move_as_one() -> None:
    module, a, b = tied(0), snapshot(tied(1)), snapshot(tied(2))
    for groups in (None, ["encode"]):
        names = None if groups is None else {"encode.weight", "decode.weight"}
        curve = segment(module, a, b, SPLITS, points=5, groups=groups)
        for i, alpha in enumerate(curve.alphas):
            expected = naive(module, lerp(a, b, alpha, names), SPLITS["test"])
            point = Measure(*(curve.values["test"][m][i] for m in ("loss", "error")))
            assert close(point, expected)
    assert module.decode.weight is module.encode.weight
    c, d = ({n: v for n, v in t.items() if n != "decode.weight"} for t in (a, b))
    assert segment(module, c, d, SPLITS, points=3) == segment(module, a, b, SPLITS, points=3)
    found = barrier(module, a, b, SPLITS, points=3, max_error=100)
    once = distance(a, b, ["encode.weight", "head.weight", "head.bias"])
    assert found.distance == pytest.approx(once, rel=1e-12), "a tied tensor counts once"


# ---- planes


def corner(x: float, y: float) -> Theta:
    """Networks in a plane: A is at (2, 0), B at (1, 3), half-way along the x-axis."""
    origin = theta(0)
    u, w = (snapshot(net(i)) for i in (5, 6))
    names = layout(net(0)).parameters
    dot = sum(float((u[n].double() * w[n].double()).sum()) for n in names)
    uu = sum(float((u[n].double() ** 2).sum()) for n in names)
    w = {n: w[n].double() - dot / uu * u[n].double() for n in names}
    ww = sum(float((w[n] ** 2).sum()) for n in names)
    return {
        n: (v.double() + x * u[n].double() / uu**0.5 + y * w[n] / ww**0.5).float()
        for n, v in origin.items()
    }


def test_plane() -> None:
    module, o, a, b = net(0), corner(0, 0), corner(2, 0), corner(1, 3)
    names = layout(module).parameters
    found = plane(module, o, a, b, SPLITS, points=5, margin=0)
    assert found.points[0] == (0, 0)
    assert found.points[1] == pytest.approx((2, 0), abs=1e-5)
    assert found.points[2] == pytest.approx((1, 3), abs=1e-5)
    for (p, q), (x, y) in zip(
        itertools.combinations(found.points, 2), itertools.combinations((o, a, b), 2), strict=True
    ):
        assert math.dist(p, q) == pytest.approx(distance(x, y, names), rel=1e-9)
    assert found.x == pytest.approx([0, 0.5, 1, 1.5, 2], abs=1e-5)
    assert found.y == pytest.approx([0, 0.75, 1.5, 2.25, 3], abs=1e-5)
    for split, metric in itertools.product(SPLITS, ("loss", "error")):
        table = found.values[split][metric]
        assert len(table) == 5 and {len(row) for row in table} == {5}
        for network, (row, column) in ((o, (0, 0)), (a, (0, 4)), (b, (4, 2))):
            own = Walker(module, SPLITS).at(network)[split]
            assert table[row][column] == pytest.approx(getattr(own, metric), rel=1e-6, abs=1e-9)
        # Any other place is what it says it is: (0.5, 2.25), left of B.
        own = Walker(module, SPLITS).at(corner(0.5, 2.25))[split]
        assert table[3][1] == pytest.approx(getattr(own, metric), rel=1e-4, abs=1e-9)


@pytest.mark.gpu
def test_a_plane_takes_networks_from_any_device() -> None:
    """One network as loaded, on the CPU, another as matched, on the GPU."""
    module = nn.Linear(2, 3)
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    split = Split(x, torch.arange(8) % 3)
    o, a, b = ({k: torch.randn_like(v) for k, v in module.state_dict().items()} for _ in range(3))
    there = Split(split.x.cuda(), split.y.cuda())
    found = plane(module, o, {k: v.cuda() for k, v in a.items()}, b, {"test": there}, points=3)
    expected = plane(module, o, a, b, {"test": split}, points=3)
    assert found.x == pytest.approx(expected.x)


def test_plane_reaches_beyond_its_networks() -> None:
    found = plane(net(0), corner(0, 0), corner(2, 0), corner(1, 3), SPLITS, points=3, margin=0.25)
    assert found.x == pytest.approx([-0.5, 1, 2.5], abs=1e-5)
    assert found.y == pytest.approx([-0.75, 1.5, 3.75], abs=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda o, a: (o, a, a),
        lambda o, a: (o, o, a),
        lambda o, a: (o, a, o),
        lambda o, a: (o, o, o),
        lambda o, a: (o, a, lerp(o, a, 0.5)),
        lambda o, a: (o, a, lerp(o, a, 1 / 3)),
        lambda o, a: (o, lerp(o, a, 0.7), a),
        lambda o, a: (lerp(o, a, 0.1), a, o),
    ],
)
def test_networks_on_one_line_span_no_plane(make: Callable[..., Any]) -> None:
    with pytest.raises(BadParameter, match=r"on one line; they span no plane"):
        o, a, b = make(theta(1), theta(2))
        plane(net(0), o, a, b, SPLITS, points=2)


def test_a_variance_below_0_beyond_the_networks_is_0() -> None:
    """Variances of 1 at the init and 0.01 later: a quarter beyond, they would be negative."""
    module, o, a, b = net(0, NORMED), *(theta(i, NORMED) for i in (1, 2, 3))
    for t in (a, b):
        t["layer1.norm.running_var"] = o["layer1.norm.running_var"] / 100
    found = plane(module, o, a, b, SPLITS, points=5, margin=0.5)
    for metric in ("loss", "error"):
        assert all(math.isfinite(v) for row in found.values["test"][metric] for v in row)


# ---- what is refused, what cannot be computed


def test_networks_that_do_not_fit_are_refused() -> None:
    module, a = net(0), theta(1)
    other = theta(1, "mlp:widths=12-9")
    broken = {**a, "head.bias": torch.full((10,), math.nan)}
    extra = {**a, "more": torch.zeros(1)}
    for bad, message in (
        (other, r"network B: layer2\.linear\.weight has shape \(9, 12\), the model \(8, 12\)"),
        (broken, r"network B: head\.bias holds NaN"),
        (extra, r"network B does not fit.*\['more'\]"),
    ):
        with pytest.raises(BadParameter, match=message):
            segment(module, a, bad, SPLITS)
        with pytest.raises(BadParameter, match="network A"):
            barrier(module, bad, a, SPLITS)
        with pytest.raises(BadParameter, match="network A"):
            plane(module, theta(2), bad, a, SPLITS)


def test_options_that_do_not_exist_are_refused() -> None:
    module, a, b = net(0), theta(1), theta(2)
    with pytest.raises(BadParameter, match=r"bn: 'reset' is not known.*interpolate"):
        barrier(module, a, b, SPLITS, bn="reset")
    with pytest.raises(BadParameter, match=r"rest: 'c'.*a, b"):
        segment(module, a, b, SPLITS, rest="c")
    with pytest.raises(BadParameter, match=r"'layer3' fits no layer.*layer1\.linear"):
        segment(module, a, b, SPLITS, groups=["layer3"])
    with pytest.raises(BadParameter, match=r"points: 10"):
        barrier(module, a, b, SPLITS, points=10)
    for empty in ({}, {"test": Split(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64))}):
        with pytest.raises(BadParameter, match="no data to evaluate on"):
            Walker(module, empty)
    with pytest.raises(BadParameter, match=r"all three modes.*needs bn_data=, or a split"):
        Walker(net(0, NORMED), {"test": SPLITS["test"]}, bn="reestimate")


def test_a_loss_that_overflows_is_infinite_not_invisible() -> None:
    """As NaN it would hide: max((0, nan, 0)) is 0, and the barrier would be too."""
    a, b = theta(1), theta(2)
    far = {n: v * 1e30 for n, v in b.items()}
    found = Walker(net(0), SPLITS).walk((a, far), [(0.5, 0.5)])[0]
    assert found["test"].loss == math.inf and math.isfinite(found["test"].error)


def test_a_dataset_is_its_two_splits() -> None:
    a, b = theta(1), theta(2)
    whole = barrier(net(0), a, b, DIGITS, points=3, max_error=100)
    assert whole.curve.sizes == {"train": len(DIGITS.train), "test": len(DIGITS.test)}
    assert whole.classes == 10
    splits = {"train": DIGITS.train, "test": DIGITS.test}
    assert barrier(net(0), a, b, splits, points=3, max_error=100) == whole


# ---- JSON


numbers = st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=50)
@given(st.lists(numbers, min_size=3, max_size=9), st.lists(numbers, min_size=9, max_size=9))
def test_curves_and_planes_survive_json(values: list[float], table: list[float]) -> None:
    curve = curve_of(values)
    assert reread(curve) == curve
    rows = tuple(tuple(table[i : i + 3]) for i in (0, 3, 6))
    flat = Plane(
        (0.0, 1.0, 2.0),
        (-1.0, 0.0, table[0]),
        {"train": {"loss": rows, "error": rows}},
        ((0.0, 0.0), (table[1], 0.0), (table[2], table[3])),
        "batch",
    )
    assert reread(flat) == flat


@pytest.mark.parametrize("spec", [PLAIN, NORMED])
def test_barriers_survive_json(spec: str) -> None:
    found = barrier(net(0, spec), theta(1, spec), theta(2, spec), SPLITS, points=3)
    again = reread(found)
    assert again == found and str(again) == str(found)
    assert again.judged(max_error=100).height() == found.judged(max_error=100).height() > 0
