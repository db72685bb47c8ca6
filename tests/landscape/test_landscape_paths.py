"""Directions, lines and planes along them, trajectories, logits, and bent paths."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from commands import NET, trained
from torch import nn
from toypairs import DIGITS, NETS, Theta, pair_of, split_of

from companion import models
from companion.connectivity import Walker, segment
from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.core.theta import distance, layout, snapshot
from companion.landscape import (
    Bend,
    bend_path,
    combined,
    fit_bend,
    inner,
    length,
    line_along,
    logit_gap,
    moved,
    plane_along,
    principal_directions,
    project_path,
    random_direction,
    restricted,
    scaled,
    towards,
)
from companion.landscape.logits import decomposed

FEW = DIGITS.test.head(50)

# --- directions


@pytest.mark.parametrize("name", ["mlp", "batch norm", "tokens"])
def test_a_random_direction_is_as_long_as_each_filter(name: str) -> None:
    net, a, _ = pair_of(NETS[name])
    u = random_direction(net, a, Key("u"))
    assert set(u) == {n for n in layout(net).parameters if a[n].dim() > 1}
    for n, step in u.items():
        for row, own in zip(step.flatten(1), a[n].double().flatten(1), strict=True):
            assert float(row.norm()) == pytest.approx(float(own.norm()), rel=1e-6)
    again = random_direction(net, a, Key("u"))
    other = random_direction(net, a, Key("v"))
    assert inner(u, again) == pytest.approx(length(u) ** 2)
    assert abs(inner(u, other)) < 0.5 * length(u) * length(other)
    plain = random_direction(net, a, Key("u"), filters=False)
    assert length(plain) == pytest.approx(1) and set(plain) == set(layout(net).parameters)


def test_one_step_leads_to_the_other_network() -> None:
    net, a, b = pair_of(NETS["batch norm"])
    delta = towards(net, a, b)
    assert all(torch.equal(v, b[n]) for n, v in moved(a, delta).items() if n in delta)
    assert set(delta) == set(layout(net).floating)
    own = restricted(delta, layout(net).parameters)
    assert length(own) == pytest.approx(distance(a, b, layout(net).parameters))
    assert length(combined([(1, delta), (-0.5, scaled(delta, 2))])) == pytest.approx(0)


def bent_trajectory(net: nn.Module, a: Theta, third: float) -> tuple[list[Theta], Any, Any]:
    """States on a plane through ``a``, and ``third`` of each of them outside of it."""
    draws = [random_direction(net, a, Key(n), filters=False) for n in "uvw"]
    u = draws[0]
    v = combined([(1, draws[1]), (-inner(draws[1], u), u)])
    v = scaled(v, 1 / length(v))
    w = combined([(1, draws[2]), (-inner(draws[2], u), u), (-inner(draws[2], v), v)])
    w = scaled(w, third / length(w))
    exact = {n: t.double() for n, t in a.items()}
    return [moved(exact, combined([(t, u), (t * t, v), (t, w)])) for t in (0, 1, 2, 3)], u, v


@pytest.mark.parametrize("third", [0.0, 1.0])
def test_a_trajectory_says_how_much_of_it_the_plane_leaves_out(third: float) -> None:
    net, a, _ = pair_of(NETS["mlp"])
    path, u, v = bent_trajectory(net, a, third)
    found = project_path(net, path, path[0], u, v)
    for t, place in zip((0, 1, 2, 3), found.coordinates, strict=True):
        assert place == pytest.approx((t, t * t), abs=1e-9)
    outside = [0, *(third * t**2 / (t**2 + t**4 + third * t**2) for t in (1, 2, 3))]
    assert found.outside == pytest.approx(outside, abs=1e-9)
    total = sum(t**2 + t**4 + third * t**2 for t in (1, 2, 3))
    assert found.share == pytest.approx(third * 14 / total, abs=1e-9)
    # The same place, of axes that are not orthogonal.
    slanted = combined([(1, u), (1, v)])
    again = project_path(net, path, path[0], u, slanted)
    assert again.coordinates[2] == pytest.approx((-2, 4), abs=1e-9)
    assert again.share == pytest.approx(found.share, abs=1e-9)
    with pytest.raises(BadParameter, match="parallel"):
        project_path(net, path, path[0], u, scaled(u, -2))


def test_principal_directions_find_the_plane_of_a_trajectory() -> None:
    net, a, _ = pair_of(NETS["mlp"])
    path, u, v = bent_trajectory(net, a, 0.0)
    for origin in (None, path[-1]):
        found = principal_directions(net, path, origin=origin)
        assert sum(found.shares) == pytest.approx(1) and found.shares[0] > found.shares[1]
        first, second = found.directions
        assert length(first) == pytest.approx(1) and inner(first, second) == pytest.approx(
            0, abs=1e-9
        )
        for one in (first, second):
            assert inner(one, u) ** 2 + inner(one, v) ** 2 == pytest.approx(1)
        assert project_path(net, path, path[0], first, second).share == pytest.approx(0, abs=1e-9)
    with pytest.raises(BadParameter, match="span 2 dimensions; 3"):
        principal_directions(net, path, count=3)


# --- lines and planes


@pytest.mark.parametrize("bn", ["interpolate", "reestimate", "batch"])
def test_lines_and_planes_are_those_of_the_walker(bn: str) -> None:
    net, a, b = pair_of(NETS["batch norm"])
    splits = {"train": FEW}
    delta = towards(net, a, b)
    line = line_along(net, a, delta, splits, [0, 0.5, 1], bn=bn)
    walker = Walker(net, splits, bn=bn)
    known = segment(net, a, b, splits, points=3, walker=walker)
    assert line.bn == bn == known.bn
    assert line.values["train"]["loss"] == pytest.approx(known.values["train"]["loss"], rel=1e-5)
    v = random_direction(net, a, Key("v"))
    plane = plane_along(net, a, delta, v, splits, [0, 0.5, 1], [0, 0.1], bn=bn)
    assert plane.values["train"]["loss"][0] == pytest.approx(line.values["train"]["loss"])
    far = moved({n: t.double() for n, t in a.items()}, combined([(0.5, delta), (0.1, v)]))
    own = {n: far[n].to(t.dtype) for n, t in a.items()}
    assert plane.values["train"]["loss"][1][1] == pytest.approx(
        walker.at(own)["train"].loss, rel=1e-4
    )
    with pytest.raises(BadParameter, match="parallel"):
        plane_along(net, a, v, scaled(v, 3), splits, [0], [0])


def test_a_line_reaches_beyond_and_other_entries_stay() -> None:
    net, a, b = pair_of(NETS["mlp"])
    only = restricted(towards(net, a, b), layout(net).select(["head"]))
    line = line_along(net, a, only, {"x": FEW}, [-0.5, 0, 1])
    walker = Walker(net, {"x": FEW})
    mixed = {**a, **{n: b[n] for n in only}}
    losses = line.values["x"]["loss"]
    assert losses[1] == walker.at(a)["x"].loss
    assert losses[2] == pytest.approx(walker.at(mixed)["x"].loss, rel=1e-6)
    assert line.alphas == (-0.5, 0, 1)


# --- logits


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_the_decomposition_is_exact(name: str, alpha: float) -> None:
    net, a, b = pair_of(NETS[name])
    split = split_of(name, 40)
    found = logit_gap(net, a, b, split, alpha=alpha)
    assert found.residual <= 1e-12
    assert found.ensemble >= 0 and found.lower <= found.barrier <= found.upper
    assert sum(found.parts) / len(found.parts) == pytest.approx(found.barrier, abs=1e-12)
    assert len(found.parts) == len(split)
    walker = Walker(net, {"x": split})
    rows = [(1.0, 0.0), (1 - alpha, alpha), (0.0, 1.0)]
    low, mid, high = (m["x"].loss for m in walker.walk((a, b), rows))
    assert found.barrier == pytest.approx(mid - (1 - alpha) * low - alpha * high, abs=1e-6)


def test_without_deviation_at_the_output_there_is_no_barrier() -> None:
    # Linear in the weights: LLFC holds at the output exactly.
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    a, b = ({n: torch.randn_like(v) for n, v in snapshot(net).items()} for _ in range(2))

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.double())  # type: ignore[no-any-return]  # a module returns Any

    a, b = ({f"inner.{n}": v for n, v in t.items()} for t in (a, b))
    found = logit_gap(Cast(), a, b, FEW)
    assert found.deviation < 1e-12
    assert found.barrier == pytest.approx(-found.ensemble, abs=1e-12) and found.barrier < 0
    assert math.isnan(found.share())


def test_shifted_logits_change_nothing_and_examples_are_counted() -> None:
    draw = Key("logits").generator()
    points = [torch.randn(40, 5, generator=draw).double() for _ in range(3)]
    y = torch.randint(5, (40,), generator=draw)
    points[1] = 0.1 * points[1]
    one = decomposed(points, y, 0.5)
    other = decomposed([p + torch.randn(40, 1, generator=draw) for p in points], y, 0.5)
    for name in ("barrier", "partition", "ensemble", "target", "deviation"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-9), name
    # One example has all of it.
    z = torch.zeros(10, 3, dtype=torch.float64)
    worse = z.clone()
    worse[0, 1] = 5
    found = decomposed([z, worse, z], torch.zeros(10, dtype=torch.int64), 0.5)
    assert found.share() == 0.1 and found.barrier > 0
    assert found.parts[1:] == (0,) * 9


def test_an_end_is_no_middle() -> None:
    net, a, b = pair_of(NETS["mlp"])
    with pytest.raises(BadParameter, match="alpha"):
        logit_gap(net, a, b, FEW, alpha=1.0)


# --- bent paths


@pytest.mark.parametrize("kind", ["bezier", "polychain"])
@pytest.mark.parametrize("bends", [1, 3])
def test_the_weights_of_a_path(kind: str, bends: int) -> None:
    bend = Bend(kind, tuple({"w": torch.tensor([float(i)])} for i in range(bends + 2)))
    assert bend.weights(0) == (1, *(0,) * (bends + 1)) and bend.weights(1)[-1] == 1
    for t in (0.1, 0.37, 0.9):
        assert sum(bend.weights(t)) == pytest.approx(1)
        low, high = bend.weights(t - 1e-6), bend.weights(t + 1e-6)
        slopes = [(y - x) / 2e-6 for x, y in zip(low, high, strict=True)]
        assert bend.slopes(t) == pytest.approx(slopes, abs=1e-6)
        assert sum(bend.slopes(t)) == pytest.approx(0)
        assert float(bend.tangent(t)["w"]) == pytest.approx(bends + 1)
    assert bend.length(("w",)) == pytest.approx(bends + 1, rel=1e-5)
    if kind == "polychain":
        assert float(bend.at(1 / (bends + 1))["w"]) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bends"), [("bezier", 1), ("polychain", 2)])
def test_a_bent_path_is_lower_than_the_line(kind: str, bends: int) -> None:
    net = models.build(NET, DIGITS.in_shape, 10)
    a, b = trained(NET, 1), trained(NET, 2, init=1)
    split = DIGITS.train
    how: dict[str, Any] = {"kind": kind, "bends": bends, "steps": 250, "lr": 0.1}
    bend = fit_bend(net, a, b, split, **how, key=Key("bend"))
    bent = bend_path(net, bend, {"train": split}, points=15)
    line = segment(net, a, b, {"train": split}, points=15)
    straight = line.height("train", "loss")
    assert straight > 0.3 and bent.height("train", "loss") < 0.3 * straight
    assert bent.ends("train", "loss") == line.ends("train", "loss")
    names = layout(net).parameters
    assert bend.length(names) > distance(a, b, names)
    again = fit_bend(net, a, b, split, **how, key=Key("bend"))
    for one, two in zip(bend.anchors, again.anchors, strict=True):
        assert all(torch.equal(v, two[n]) for n, v in one.items())


def test_batchnorm_is_estimated_again_along_a_bend() -> None:
    net, a, b = pair_of(NETS["batch norm"])
    before = snapshot(net)
    bend = fit_bend(net, a, b, DIGITS.train.head(100), steps=3, batch=50)
    assert all(torch.equal(v, before[n]) for n, v in snapshot(net).items())
    splits = {"train": DIGITS.train.head(200)}
    found = {
        bn: bend_path(net, bend, splits, points=3, bn=bn) for bn in ("interpolate", "reestimate")
    }
    assert found["reestimate"].bn_examples == 200
    low, high = (found[bn].values["train"]["loss"][1] for bn in ("reestimate", "interpolate"))
    assert low != pytest.approx(high, rel=1e-3)


def test_bends_that_cannot_be() -> None:
    net, a, b = pair_of(NETS["mlp"])
    for wrong in ({"kind": "spline"}, {"bends": 0}, {"bends": 9}, {"lr": 0}, {"steps": 0}):
        with pytest.raises(BadParameter, match=next(iter(wrong))):
            fit_bend(net, a, b, FEW, **wrong)  # type: ignore[arg-type]  # wrong on purpose
