"""Weak additivity and commutativity: against stored features, planted truths, and symmetries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toypairs
from hypothesis import given, settings
from hypothesis import strategies as st
from reread import reread
from torch import Tensor, nn
from toypairs import DIGITS, Examples, Theta, pair_of

from companion import models
from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.core.theta import snapshot
from companion.features.conditions import (
    LayerCommutativity,
    commutativity,
    measurable,
    weak_additivity,
)
from companion.features.measure import features
from companion.features.theorem import exact, theorem1

TEST = DIGITS.test.head(60)
ALPHAS = (0.25, 0.5, 0.9)


class Functional(nn.Module):
    """No ReLU module: functional ones, in place and not, and a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, stride=2, padding=1, padding_mode="circular")
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.twice = nn.Linear(6 * 16, 6 * 16)
        self.head = nn.Linear(6 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x), inplace=True)
        x = torch.relu(self.norm(self.grouped(x))).flatten(1)
        for _ in range(2):
            x = self.twice(x).relu()
        return self.head(x)


NETS: dict[str, Any] = {**toypairs.NETS, "functional": Functional}


def split_of(name: str) -> Any:
    return toypairs.split_of(name, 60)


def pair(name: str) -> tuple[nn.Module, Theta, Theta]:
    return pair_of(NETS[name], "conditions")


def distance(u: Tensor, v: Tensor) -> float:
    u, v = u.double().flatten(), v.double().flatten()
    return float((u - v).square().sum() / (u.norm() * v.norm()))


def recorded(module: nn.Module, theta: Theta, x: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Module -> (input, output) of each run, cloned, plainly with hooks."""
    module.load_state_dict(theta)
    module.eval()
    out: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def note(name: str) -> Any:
        def hook(m: nn.Module, args: Any, result: Tensor) -> None:
            out.setdefault(name, []).append((args[0].clone(), result.clone()))

        return hook

    hooks = [m.register_forward_hook(note(n)) for n, m in module.named_modules() if n]
    with torch.no_grad():
        module(x)
    for h in hooks:
        h.remove()
    return out


# Site of a ReLU -> the module before it (name, run), where the ReLU itself has no module.
BEFORE = {
    "relu#1": ("conv", 0),
    "relu#2": ("norm", 0),
    "relu#3": ("twice", 0),
    "relu#4": ("twice", 1),
}


@pytest.mark.parametrize("name", NETS)
def test_weak_additivity_is_what_stored_features_give(name: str) -> None:
    module, a, b = pair(name)
    split = split_of(name)
    found = weak_additivity(module, a, b, split, alphas=ALPHAS, batch=17)
    at = [recorded(NETS[name](), t, split.x) for t in (a, b)]
    modules = dict(module.named_modules())
    names = [n for n, m in modules.items() if isinstance(m, nn.ReLU)] or list(BEFORE)
    assert [x.name for x in found.layers] == names, "every ReLU, module or function"
    assert found.n == len(split)
    assert found.bn == ("own" if name in ("batch norm", "vgg", "functional") else "none")
    for layer in found.layers:
        if name == "functional":
            before, run = BEFORE[layer.name]
            x, y = (r[before][run][1].double() for r in at)
        else:
            x, y = (r[layer.name][0][0].double() for r in at)
        assert layer.size == x[0].numel()
        assert layer.opposite == pytest.approx(100 * float((x * y < 0).double().mean()))
        for alpha in ALPHAS:
            u = F.relu((1 - alpha) * x + alpha * y)
            v = (1 - alpha) * F.relu(x) + alpha * F.relu(y)
            each = [distance(p, q) for p, q in zip(u, v, strict=True)]
            stat = layer.distance[alpha]
            good = [e for e in each if math.isfinite(e)]
            assert (stat.n, stat.undefined) == (len(good), len(each) - len(good))
            assert stat.mean == pytest.approx(sum(good) / len(good), rel=1e-4)
            assert layer.whole[alpha] == pytest.approx(distance(u, v), rel=1e-4)
    assert reread(found) == found


@pytest.mark.parametrize("name", NETS)
def test_commutativity_is_what_four_products_give(name: str) -> None:
    module, a, b = pair(name)
    split = split_of(name)
    before = {k: v.clone() for k, v in (*a.items(), *((f"b.{k}", v) for k, v in b.items()))}
    found = commutativity(module, a, b, split, batch=17)
    after = {**a, **{f"b.{k}": v for k, v in b.items()}}
    assert all(torch.equal(before[k], after[k]) for k in before), "written into"
    at = [recorded(NETS[name](), t, split.x) for t in (a, b)]
    wanted = {n for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert {x.name.split("#")[0] for x in found.layers} == wanted
    if name == "functional":
        assert {"twice", "twice#2"} <= {x.name for x in found.layers}
    for layer in found.layers:
        path, _, run = layer.name.partition("#")
        h_a, h_b = (r[path][int(run or 1) - 1][0].double() for r in at)
        op = NETS[name]().get_submodule(path).double()
        if op.bias is not None:
            nn.init.zeros_(op.bias)

        def product(w: Tensor, h: Tensor, op: Any = op) -> Tensor:
            op.weight.data = w.double()
            with torch.no_grad():
                return op(h)

        w_a, w_b = a[f"{path}.weight"], b[f"{path}.weight"]
        own, crossed = (product(w_a, p) + product(w_b, q) for p, q in ((h_a, h_b), (h_b, h_a)))
        assert layer.com == pytest.approx(distance(own, crossed), rel=1e-3, abs=1e-12)
        assert layer.weights == pytest.approx(distance(w_a, w_b), rel=1e-5)
        assert layer.inputs == pytest.approx(distance(h_a, h_b), rel=1e-4, abs=1e-12)
    if name != "tokens":
        first = found.layers[0]
        assert first.com == 0 and first.inputs == 0 and math.isnan(first.ratio)
    again = reread(found)
    assert again == found


def test_networks_built_for_the_theorem_meet_both_conditions() -> None:
    """And broken ones are as far off as plain algebra on their features says."""
    for kw in ({}, {"additive": False}, {"commuting": False}):
        built = exact((20, 48, 32, 5), samples=70, **kw)  # type: ignore[arg-type]  # options by name
        split = Examples(built.x, torch.zeros(len(built.x), dtype=torch.int64))
        one = weak_additivity(built.module, built.a, built.b, split, alphas=ALPHAS, batch=32)
        two = commutativity(built.module, built.a, built.b, split, batch=32)
        plain = theorem1(built, ALPHAS)
        for relu, row in zip(one.layers, plain.layers, strict=False):
            high = [s.high for s in relu.distance.values()]
            assert row.additivity is not None and max(high) <= row.additivity + 1e-15
            assert (relu.opposite == 0) == kw.get("additive", True)
            assert (max(relu.whole.values()) == 0) == kw.get("additive", True)
        for layer, row in zip(two.layers, plain.layers, strict=True):
            assert layer.name == row.name
            assert layer.weights == pytest.approx(row.weights)
            assert layer.inputs == pytest.approx(row.inputs)
            assert layer.com == pytest.approx(row.commutativity, rel=1e-6, abs=1e-20)
            assert (layer.com < 1e-24) == (kw.get("commuting", True) or layer.inputs == 0)


def test_a_network_and_itself() -> None:
    module, a, _ = pair("batch norm")
    one = weak_additivity(module, a, a, TEST)
    assert all(x.opposite == 0 and s.mean == 0 for x in one.layers for s in x.distance.values())
    two = commutativity(module, a, a, TEST)
    assert all((x.com, x.weights, x.inputs) == (0, 0, 0) for x in two.layers)
    assert all(math.isnan(x.ratio) for x in two.layers)


def test_equation_9_units_in_another_order() -> None:
    """B = pi(A) is A and looks unlike it, unit by unit; undone by the right permutation, it is."""
    module, a, b = pair("mlp")
    order = Key("test", "order").permutation(12)
    moved = permuted(a, order)
    asked = commutativity(module, a, moved, TEST)
    assert asked.layer("layer2.linear").com > 0.01
    assert weak_additivity(module, a, moved, TEST).layer("layer1.relu").opposite > 5
    back = commutativity(module, a, permuted(moved, order.argsort()), TEST)
    assert max(x.com for x in back.layers) == 0
    # The same order in both networks changes nothing.
    one, two = (
        commutativity(module, p, q, TEST)
        for p, q in ((a, b), (permuted(a, order), permuted(b, order)))
    )
    for x, y in zip(one.layers, two.layers, strict=True):
        assert (y.com, y.weights, y.inputs) == pytest.approx((x.com, x.weights, x.inputs), rel=1e-4)


def permuted(theta: Theta, order: Tensor) -> Theta:
    """The units of the first hidden layer in another order."""
    out = dict(theta)
    for entry in ("layer1.linear.weight", "layer1.linear.bias"):
        out[entry] = theta[entry][order]
    out["layer2.linear.weight"] = theta["layer2.linear.weight"][:, order]
    return out


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.integers(1, 30), st.floats(0.1, 5))
def test_properties(seed: int, alpha: float, batch: int, scale: float) -> None:
    with Key("test", seed).seeded():
        nets = [models.build("mlp:widths=6x2", DIGITS.in_shape, 10).double() for _ in range(2)]
    a, b = map(snapshot, nets)
    split = Examples(TEST.x[:30].double(), TEST.y[:30])
    one = weak_additivity(nets[0], a, b, split, alphas=(alpha,), batch=batch)
    two = weak_additivity(nets[0], b, a, split, alphas=(1 - alpha,), batch=30)
    for x, y in zip(one.layers, two.layers, strict=True):
        assert x.whole[alpha] == pytest.approx(y.whole[1 - alpha], nan_ok=True, abs=1e-12)
        assert x.opposite == y.opposite
        assert all(v >= 0 or math.isnan(v) for v in x.whole.values())
    for p, q in ((a, b), (b, a)):
        found = commutativity(nets[0], p, q, split, batch=batch)
        rows = [(x.com, x.weights, x.inputs) for x in found.layers]
        if p is a:
            first = rows
        assert rows == [pytest.approx(r, nan_ok=True) for r in first]
    # ReLU and all distances are blind to one positive scale of both networks' first layers.
    c, d = ({k: v * scale if k.startswith("layer1") else v for k, v in t.items()} for t in (a, b))
    scaled = weak_additivity(nets[0], c, d, split, alphas=(alpha,)).layers[0]
    assert scaled.whole[alpha] == pytest.approx(one.layers[0].whole[alpha], nan_ok=True, abs=1e-12)
    # A positive multiple of a unit is on exactly where the unit is.
    longer = {k: v * scale if k.startswith("layer1") else v for k, v in a.items()}
    assert weak_additivity(nets[0], a, longer, split).layers[0].opposite == 0


def test_ratio_is_undefined_where_nothing_differs() -> None:
    assert LayerCommutativity("x", "linear", 0.02, 0.5, 0.4).ratio == pytest.approx(0.05)
    for com, weights, inputs in ((0, 1.0, 0.0), (math.nan, 1.0, 1.0), (0.1, math.nan, 1.0)):
        assert math.isnan(LayerCommutativity("x", "linear", com, weights, inputs).ratio)


def test_messages() -> None:
    module, a, b = pair("mlp")
    with pytest.raises(BadParameter, match=r"from 0 \(A\) to 1"):
        weak_additivity(module, a, b, TEST, alphas=(0.5, 1.5))
    with pytest.raises(BadParameter, match=r"'head' fits no ReLU.*Those are: layer1\.relu, layer2"):
        weak_additivity(module, a, b, TEST, layers=["head"])
    with pytest.raises(BadParameter, match="'layer9' fits no linear layer or convolution"):
        commutativity(module, a, b, TEST, layers=["layer2", "layer9"])
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Tanh())
    with pytest.raises(BadParameter, match="this network runs no ReLU"):
        weak_additivity(smooth, snapshot(smooth), snapshot(smooth), TEST)
    with pytest.raises(BadParameter, match="batch: 0"):
        commutativity(module, a, b, TEST, batch=0)
    with pytest.raises(BadParameter, match="network B"):
        weak_additivity(module, a, {**b, "head.bias": b["head.bias"] * math.nan}, TEST)
    with pytest.raises(BadParameter, match="no data"):
        weak_additivity(module, a, b, Examples(TEST.x[:0], TEST.y[:0]))
    found = commutativity(module, a, b, TEST, layers=["layer2"])
    assert [x.name for x in found.layers] == ["layer2.linear"]
    found = commutativity(module, a, b, TEST, layers=["*.linear"])
    assert [x.name for x in found.layers] == ["layer1.linear", "layer2.linear"]
    with pytest.raises(BadParameter, match="was not measured"):
        found.layer("head")


class Both(nn.Module):
    """A module called relu and a functional ReLU, in one block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.relu, self.head = nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.relu(self.up(x.flatten(1))) - 0.2))


def test_a_functional_relu_beside_a_module_of_that_name_is_seen() -> None:
    one, two = Both(), Both()
    found = weak_additivity(one, snapshot(one), snapshot(two), TEST)
    assert len(found.layers) == 2 and found.layers[0].name == "relu"
    relus, linears = measurable(one, TEST)
    assert relus == tuple(x.name for x in found.layers) and linears == ("up", "head")
    assert measurable(one, TEST, ["relu", "head"]) == (("relu",), ("head",))
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Tanh())
    assert measurable(smooth, TEST) == ((), ("1",))


def test_alphas_are_refused_as_features_refuses_them() -> None:
    module, a, b = pair("mlp")
    for measure in (weak_additivity, features):
        with pytest.raises(BadParameter, match="different numbers"):
            measure(module, a, b, TEST, alphas=(0.5, 0.5))
