"""Layer groups and sweeps: against segments walked plainly, closed forms and hand-made networks."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from reread import reread
from torch import Tensor, nn

from companion import data, models
from companion.connectivity import BN_MODES, segment
from companion.core.errors import BadParameter
from companion.core.runs import Store
from companion.core.seeds import Key
from companion.core.theta import distance, flatten, layout, snapshot
from companion.experiments.layers import LayerSweep, sweep_pairs
from companion.experiments.pairs import Pair
from companion.layerwise import LayerBarriers, Sweep, layer_groups, sweep
from companion.layerwise.replay import Replay
from companion.layerwise.sweep import random_end
from companion.models import parameter_count
from companion.training import Recipe, Run, State, advance, build

DIGITS = data.load("digits")
SPLITS = {"train": DIGITS.train.head(90), "test": DIGITS.test.head(50)}
ALL = Sweep(
    kinds=("single", "shallow", "deep", "random", "window"),
    window=2,
    points=5,
    draws=2,
    subsets=(("ends", ("layer1", "head")),),
)
Theta = dict[str, Tensor]


def ends(make: Any, apart: float = 0.4) -> tuple[Theta, Theta]:
    """Two networks that differ in every entry, BatchNorm's statistics included."""
    out = []
    for number in range(2):
        with Key("test", "layers", number).seeded():
            module = make().train()
            with torch.no_grad():
                module(DIGITS.train.head(60).x * (1 + number))
        out.append(snapshot(module))
    a, b = out
    return a, {k: torch.lerp(a[k], v, apart) if v.is_floating_point() else v for k, v in b.items()}


def named(spec: str) -> Any:
    return lambda: models.build(spec, DIGITS.in_shape, DIGITS.classes)


class Tied(nn.Module):
    """One weight under two names; the second use does not call its module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.first = nn.Linear(64, 64)
        self.last = nn.Linear(64, 64, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x.flatten(1)))
        x = torch.relu(self.inner(x))
        return nn.functional.linear(x, self.last.weight)[:, :10]


class Own(nn.Module):
    """What people write: in-place operations, a module called twice, weights used functionally,
    a registration order that is not the order of execution, and several inputs and outputs."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(24, 24)

        def forward(self, x: Tensor, *, scale: float) -> dict[str, Any]:
            y = self.linear(x)
            y += scale * x
            return {"both": (y, x), "name": "pair"}

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 10)
        self.free = nn.Parameter(torch.randn(24, 24) / 5)
        self.twice = Own.Pair()
        self.unused = nn.Linear(2, 2)
        self.act = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm1d(24)
        self.stem = nn.Linear(64, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x.flatten(1)))
        for scale in (0.5, 2.0):
            y, old = self.twice(x, scale=scale)["both"]
            x = self.act(self.norm(y)) + old
        x = x @ self.free.t()
        x.mul_(0.5)
        return self.head(x)


class Remembers(nn.Module):
    """Its head reads what its body left in an attribute during the pass."""

    class Body(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            self.left = out.detach().clone()
            return out

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.body = Remembers.Body(64, 10)
        self.head = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(self.flatten(x)))) + self.body.left


CASES = {
    "mlp": (named("mlp:widths=12x3"), ("interpolate",)),
    "plain cnn": (named("vgg11:width=2,norm=none"), ("interpolate",)),
    "resnet": (named("resnet8:norm=none,width=2"), ("interpolate",)),
    "layer norm": (named("resnet8:norm=layer,width=2"), ("interpolate",)),
    "batch norm": (named("resnet8:norm=batch,width=2"), BN_MODES),
    "tied": (Tied, ("interpolate",)),
    "own": (Own, BN_MODES),
}


def gap(x: LayerBarriers, y: LayerBarriers) -> float:
    assert [(r.kind, r.label, r.rest, r.draw) for r in x.rows] == [
        (r.kind, r.label, r.rest, r.draw) for r in y.rows
    ]
    return max(
        abs(p - q)
        for r, s in zip(x.rows, y.rows, strict=True)
        for split, metrics in r.curve.values.items()
        for metric, values in metrics.items()
        for p, q in zip(values, s.curve.values[split][metric], strict=True)
    )


@pytest.mark.parametrize(
    ("name", "bn"),
    [
        pytest.param(name, bn, marks=[pytest.mark.slow] * ("norm" in name))
        for name, (_, modes) in CASES.items()
        for bn in modes
    ],
)
def test_a_replay_gives_what_the_plain_walker_gives(name: str, bn: str) -> None:
    make = CASES[name][0]
    a, b = ends(make)
    settings, splits = replace(ALL, points=3), SPLITS
    if name != "mlp":
        splits = {"train": DIGITS.train.head(20), "test": DIGITS.test.head(12)}
        settings = replace(ALL, bn=bn, subsets=(), points=1, draws=1, kinds=("single", "random"))
    if bn == "reestimate":  # both ways are the walker
        settings = replace(settings, kinds=("single",), draws=0)
    options: Any = {"batch": 32, "bn_data": DIGITS.train.head(50)}
    before = [v.clone() for v in (*a.values(), *b.values())]
    fast = sweep(make(), a, b, splits, settings, **options)
    slow = sweep(make(), a, b, splits, settings, fast=False, **options)
    assert fast.method == ("walker" if bn == "reestimate" else "replay")
    assert slow.method == "walker"
    assert gap(fast, slow) < 1e-6
    assert fast.groups == slow.groups
    after = (*a.values(), *b.values())
    assert all(torch.equal(v, w) for v, w in zip(before, after, strict=True)), "written into"
    assert reread(fast) == fast


def test_what_two_networks_share_costs_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen backbone: its hybrids are the networks themselves; only the head's are run."""
    make = named("mlp:widths=12x3")
    a, other = ends(make)
    b = {**{n: v.clone() for n, v in a.items()}, "head.weight": other["head.weight"]}
    runs: list[None] = []
    real = Replay.run

    def counted(*args: Any) -> Any:
        runs.append(None)
        return real(*args)

    monkeypatch.setattr(Replay, "run", counted)
    settings = Sweep(kinds=("single", "shallow"), points=1)
    found = sweep(make(), a, b, SPLITS, settings, max_error=100)
    passes = len(runs)
    assert gap(found, sweep(make(), a, b, SPLITS, settings, fast=False)) < 1e-6
    at_a, at_b = found.ends["train"]["loss"]
    shared = [found.worst("single", "train")[f"layer{n}.linear"] for n in (1, 2, 3)]
    assert shared == pytest.approx([abs(at_a - at_b) / 2] * 3)
    runs.clear()
    sweep(make(), a, other, SPLITS, settings)
    assert passes < len(runs) / 3, (passes, len(runs))


@pytest.mark.parametrize("rest", ["a", "b"])
def test_rows_are_the_segments_of_connectivity(rest: str) -> None:
    make = named("mlp:widths=12x3")
    a, b = ends(make)
    found = sweep(make(), a, b, SPLITS, ALL, max_error=100)
    assert found.valid
    for row in (r for r in found.rows if r.rest == rest and r.draw is None):
        plain = segment(make(), a, b, SPLITS, points=5, groups=row.groups, rest=rest)
        for split in SPLITS:
            for metric in ("loss", "error"):
                values = plain.values[split][metric]
                assert row.curve.values[split][metric] == pytest.approx(values, abs=1e-6)
                for definition in ("mean", "linear"):
                    height = found.height(row, split, metric, definition)
                    assert height == pytest.approx(
                        plain.height(split, metric, definition), abs=1e-6
                    )
                # The paper's: at ½, against the two whole networks.
                whole = segment(make(), a, b, SPLITS, points=3).ends(split, metric)
                assert found.ends[split][metric] == pytest.approx(whole, abs=1e-6)
                height = found.height(row, split, metric)
                assert height == pytest.approx(values[2] - sum(whole) / 2, abs=1e-6)


def test_the_last_cumulative_step_is_the_barrier_of_the_whole_network() -> None:
    """Claim B4, against a segment walked by connectivity."""
    make = named("resnet8:norm=layer,width=2")
    a, b = ends(make)
    settings = Sweep(kinds=("shallow", "deep", "random"), orders=2)
    found = sweep(make(), a, b, SPLITS, settings, max_error=100)
    whole = segment(make(), a, b, SPLITS, points=3)
    count = len(found.groups)
    assert len(found.select("random")) == 2 * 2 * count
    lasts = (f"first {count}", f"last {count}", f"order 1: {count}", f"order 2: {count}", "full")
    for row in (r for r in found.rows if r.label in lasts):
        for split in SPLITS:
            expected = whole.values[split]["loss"]
            assert row.curve.values[split]["loss"] == pytest.approx(expected, abs=1e-6)
    orders = {r.groups for r in found.select("random", rest="a") if r.label.endswith(": 3")}
    assert len(orders) == 2, "two orders are two orders"


def test_a_network_that_keeps_state_beside_its_outputs_falls_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    a, b = ends(Remembers)
    found = sweep(Remembers(), a, b, SPLITS, Sweep())
    assert found.method == "walker"
    assert "keeps state outside the outputs" in caplog.text
    assert gap(found, sweep(Remembers(), a, b, SPLITS, fast=False)) == 0


class Stubborn(nn.Sequential):
    """A forward that cannot be replaced, as that of a scripted module."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            raise AttributeError("can't set attribute 'forward'")
        super().__setattr__(name, value)


def test_a_network_that_cannot_be_patched_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    def make() -> nn.Module:
        return Stubborn(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 10))

    a, b = ends(make)
    found = sweep(make(), a, b, SPLITS)
    assert found.method == "walker" and list(found.groups) == ["1", "3"]
    assert "replays of this network fail" in caplog.text
    assert gap(found, sweep(make(), a, b, SPLITS, fast=False)) == 0


def test_a_replay_computes_nothing_below_the_first_changed_layer() -> None:
    make = named("mlp:widths=8x3")
    replay = Replay(make().eval())
    run: list[str] = []
    for name, part in replay.module.named_modules():
        if isinstance(part, nn.Linear):
            part.__dict__.pop("forward")

            def counted(x: Tensor, part: Any = part, name: str = name) -> Tensor:
                run.append(name)
                return nn.Linear.forward(part, x)

            part.__dict__["forward"] = counted
            replay._patch(part)
    x = SPLITS["test"].x
    tape = replay.record(x)
    assert run == ["layer1.linear", "layer2.linear", "layer3.linear", "head"]
    for layer, expected in (
        ("layer3.linear", ["layer3.linear", "head"]),
        ("head", ["head"]),
        ("layer1.linear", ["layer1.linear", "layer2.linear", "layer3.linear", "head"]),
    ):
        run.clear()
        again = replay.run(x, tape, tape.cut([f"{layer}.weight", f"{layer}.bias"]))
        assert run == expected
        assert torch.equal(again, tape.output)
    run.clear()
    assert torch.equal(replay.run(x, tape, tape.cut([])), tape.output) and run == []


# ---- groups


def test_groups_are_modules_in_the_order_of_execution() -> None:
    net = Own().eval()
    registered = layer_groups(net)
    executed = layer_groups(net, example=SPLITS["test"].x)
    assert sorted(registered) == sorted(executed)
    assert list(registered)[-1] == "stem" and next(iter(registered)) in ("free", "head")
    assert list(executed) == ["stem", "twice.linear", "norm", "free", "head", "unused"]
    assert set(executed["norm"]) == {
        f"norm.{n}" for n in ("weight", "bias", "running_mean", "running_var")
    }


def test_tied_tensors_are_one_group_and_move_together() -> None:
    groups = layer_groups(Tied(), example=SPLITS["test"].x)
    assert dict(groups) == {
        "first": ("first.weight", "first.bias"),
        "inner": ("inner.weight", "inner.bias"),
    }
    a, b = ends(Tied)
    found = sweep(Tied(), a, b, SPLITS, Sweep(kinds=("single",)))
    row = found.select("single", rest="a")[0]
    net = Tied().eval()
    net.load_state_dict({**a, **{k: v for k, v in b.items() if not k.startswith("inner")}})
    with torch.no_grad():
        out = net(SPLITS["test"].x).double()
    expected = float(nn.functional.cross_entropy(out, SPLITS["test"].y))
    assert row.curve.values["test"]["loss"][-1] == pytest.approx(expected, abs=1e-6)


def test_groups_by_depth_and_by_prefix() -> None:
    net = models.build("resnet18:width=2", DIGITS.in_shape, DIGITS.classes)
    assert list(layer_groups(net, 1)) == ["stem", "stage1", "stage2", "stage3", "stage4", "head"]
    blocks = layer_groups(net, 2)
    assert list(blocks)[:3] == ["stem.conv", "stage1.0", "stage1.1"] and len(blocks) == 10
    own = layer_groups(net, ["head", "stage1"])
    assert list(own) == ["head", "stage1"] and len(own["stage1"]) == 4
    everything = [n for names in layer_groups(net).values() for n in names]
    assert sorted(everything) == sorted(layout(net).floating)
    for by, message in (
        (["stage1", "stage1.0"], "in 'stage1' and in 'stage1.0'"),
        (["stage"], "fits no layer"),
        ("layer", "'layer' is not known"),
        (0, "must be 1 or more"),
    ):
        with pytest.raises(BadParameter, match=message):
            layer_groups(net, by)


def test_the_papers_network_has_21_groups() -> None:
    """ResNet-18 without norms: 11,164,362 parameters (Adilova et al. 2024)."""
    net = models.build("resnet18", (3, 32, 32), 10)
    assert parameter_count(net) == 11_164_362
    groups = layer_groups(net, example=torch.zeros(1, 3, 32, 32))
    assert len(groups) == 21
    order = list(groups)
    assert order[0] == "stem.conv" and order[-1] == "head"
    assert order.index("stage2.0.conv2") < order.index("stage2.0.shortcut.conv")


# ---- random directions


def test_random_directions_have_the_length_of_the_difference() -> None:
    make = named("resnet8:norm=batch,width=2")
    a, b = ends(make)
    spec = layout(make())
    names = spec.parameters
    end = random_end(a, a, b, [names], Key("x"))
    assert set(end) == set(names)
    assert distance(a, end, names) == pytest.approx(distance(a, b, names), rel=1e-5)
    layers = [[n for n in g if n in names] for g in spec.groups.values()]
    end = random_end(b, a, b, layers, Key("x"))
    for layer in layers:
        assert distance(b, end, layer) == pytest.approx(distance(a, b, layer), rel=1e-5)
    u, v = (flatten(random_end(a, a, b, [names], Key("x", i)), names) for i in range(2))
    o = flatten(a, names)
    cosine = float((u - o) @ (v - o) / (u - o).norm() / (v - o).norm())
    assert abs(cosine) < 0.2, "two draws are two directions"


def test_random_rows_start_at_the_default_network_and_are_keyed() -> None:
    make = named("mlp:widths=12x2")
    a, b = ends(make)
    settings = Sweep(kinds=("single",), draws=3, points=5)
    found = sweep(make(), a, b, SPLITS, settings, max_error=100)
    draws = [*found.select("single", draws=True), *found.select("full", draws=True)]
    assert len(draws) == 3 * 2 * (3 + 1)
    for row in draws:
        start = row.curve.values["test"]["loss"][0 if row.rest == "a" else -1]
        base = found.ends["test"]["loss"]["ab".index(row.rest)]
        assert start == pytest.approx(base, abs=1e-6)
        assert row.length == pytest.approx(
            next(r.length for r in found.select(row.kind) if r.label == row.label)
        )
    rises = found.rises("single")
    assert {len(r.random) for r in rises} == {3}
    assert {(r.label, r.rest) for r in rises} == {(g, r) for g in found.groups for r in "ab"}
    first = rises[0]
    row = next(r for r in found.select("single") if (r.label, r.rest) == (first.label, first.rest))
    base = found.ends["test"]["loss"]["ab".index(row.rest)]
    assert first.averaging == pytest.approx(row.half("test", "loss") - base)
    assert len(set(first.random)) == 3 and first.mean == pytest.approx(sum(first.random) / 3)
    again = sweep(make(), a, b, SPLITS, settings, max_error=100)
    other = sweep(make(), a, b, SPLITS, replace(settings, seed=1), max_error=100)
    assert gap(found, again) == 0
    assert found.rises("full")[0].random != other.rises("full")[0].random


# ---- values


def test_additivity_and_half_points_by_hand() -> None:
    make = named("mlp:widths=12x2")
    a, b = ends(make)
    found = sweep(make(), a, b, SPLITS, Sweep(points=1), max_error=100)
    both = found.heights("single", "train")
    total = sum(max(0.0, *v.values()) for v in both.values())
    sum_ = found.additivity("train")
    assert sum_.total == pytest.approx(total)
    assert sum_.full == found.full_height("train")
    assert sum_.ratio == (pytest.approx(sum_.full / total) if total else math.inf)
    three = sweep(make(), a, b, SPLITS, Sweep(points=3), max_error=100)
    assert found.worst("deep", "train") == pytest.approx(three.worst("deep", "train"), abs=1e-6)
    with pytest.raises(BadParameter, match="needs the ends"):
        found.full_height(definition="mean")


def test_a_failed_gate_makes_every_height_nan() -> None:
    make = named("mlp:widths=12x2")
    a, b = ends(make)
    found = sweep(make(), a, b, SPLITS, Sweep(kinds=("single",), draws=1))
    assert not found.valid, "nobody trained these networks"
    assert all(math.isnan(v) for v in found.worst().values())
    assert math.isnan(found.additivity().ratio) and math.isnan(found.rises()[0].averaging)
    assert found.judged(max_error=100).valid
    same = sweep(make(), a, a, SPLITS, Sweep(kinds=("single",)), max_error=100)
    assert not same.valid, "one network twice"


def test_two_equal_networks_have_no_barrier_anywhere() -> None:
    make = named("resnet8:norm=layer,width=2")
    a, _ = ends(make)
    copy = {k: v.clone() for k, v in a.items()}
    found = sweep(make(), a, copy, SPLITS, Sweep(), same_noise=True, max_error=100)
    assert set(found.worst().values()) == {0.0} and found.full_height() == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ("singel",)}, "Did you mean 'single'"),
        ({"rest": "c"}, "rest: 'c'"),
        ({"points": 4}, "must be odd"),
        ({"draws": -1}, "draws: -1"),
        ({"window": 0}, "window: 0"),
        ({"match": "tensor"}, "match"),
        ({"bn": "eval"}, "bn: 'eval'"),
        ({"train_examples": 0}, "train_examples"),
    ],
)
def test_settings_are_checked_when_they_are_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadParameter, match=message):
        Sweep(**options)


def test_sets_that_do_not_fit_the_network() -> None:
    make = named("mlp:widths=12x2")
    a, b = ends(make)
    with pytest.raises(BadParameter, match="window: 9 layers, but the network has 3 groups"):
        sweep(make(), a, b, SPLITS, Sweep(kinds=("window",), window=9))
    with pytest.raises(BadParameter, match="fits no layer"):
        sweep(make(), a, b, SPLITS, Sweep(subsets=(("x", ("layer9",)),)))
    with pytest.raises(BadParameter, match="network B"):
        sweep(make(), a, {k: v for k, v in b.items() if "head" not in k}, SPLITS)


def test_identity_leaves_defaults_out_and_tells_settings_apart() -> None:
    assert Sweep().identity() == {}
    json.dumps(Sweep(by=("stem", "head"), subsets={"x": ["stem"]}).identity())  # type: ignore[arg-type]  # as people write it
    assert Sweep(by=["head"]).identity() == {"by": ["head"]}  # type: ignore[arg-type]  # as people write it
    assert hash(Sweep(subsets={"x": ["stem"]}))  # type: ignore[arg-type]  # as people write it


# ---- stored pairs


def test_stored_pairs_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(net="mlp:widths=16", data="digits", steps=60, batch=60)
    a, b = (Run(recipe, init=1, order=order) for order in (1, 2))
    pairs = [Pair(a, b), Pair(a, b, step=0)]
    settings = Sweep(kinds=("single",), train_examples=200, test_examples=100)
    found, at_init = sweep_pairs(pairs, settings, workers=1)
    assert found.valid and list(found.groups) == ["layer1.linear", "head"]
    assert found.rows[0].curve.sizes == {"train": 200, "test": 100}
    assert not at_init.valid
    zero = at_init.judged(max_error=100)
    assert zero.valid and zero.full_height("train") == 0 and set(zero.worst().values()) == {0.0}
    monkeypatch.setattr("companion.experiments.layers.sweep", None)  # not called again
    assert sweep_pairs(pairs, settings, workers=1) == [found, at_init]
    store = Store()
    other = replace(settings, points=5)
    keys = {LayerSweep(pairs[0], s).entry(store, "cpu").key for s in (settings, other)}
    assert len(keys) == 2


# ---- the paper's network on real images


@pytest.mark.slow
def test_every_layer_of_the_papers_network_on_cifar(few_of_cifar: None) -> None:
    """ResNet-18 without norms, two steps on CIFAR-10 (JPEG), all 21 layers, 4 images."""
    cifar = data.load("cifar10-jpeg")
    recipe = Recipe(net="resnet18", data="cifar10-jpeg", steps=2, batch=8, lr=1e-4)
    a, b = (
        advance(run, State(0, snapshot(build(run, cifar, torch.device("cpu")))), 2, cifar).theta
        for run in (Run(recipe, init=1, order=order) for order in (1, 2))
    )
    net = models.build("resnet18", cifar.in_shape, cifar.classes)
    settings = Sweep(kinds=("single",), points=1, rest="a")
    images = {"test": cifar.test.head(4)}
    found = sweep(net, a, b, images, settings, max_error=100)
    assert found.method == "replay" and len(found.worst()) == 21
    assert all(math.isfinite(v) for v in found.worst().values())
    assert gap(found, sweep(net, a, b, images, settings, max_error=100, fast=False)) < 1e-6
