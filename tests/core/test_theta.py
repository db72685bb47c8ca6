"""Points of weight space: what counts, sums that are exact where they must be, messages."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from companion.core.errors import BadParameter
from companion.core.theta import (
    affine,
    check_theta,
    cosine_distance,
    distance,
    flatten,
    layout,
    shares_storage,
    snapshot,
)


class Tied(nn.Module):
    """One of everything: BatchNorm, a tied embedding, a root parameter, an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.embed = nn.Embedding(7, 4)
        self.stage1 = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
        self.stage10 = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def test_layout_sorts_entries() -> None:
    found = layout(Tied())
    assert found.parameters == (
        "scale",
        "embed.weight",
        "stage1.0.weight",
        "stage1.1.weight",
        "stage1.1.bias",
        "stage10.weight",
        "stage10.bias",
        "head.bias",
    )
    assert found.buffers == ("stage1.1.running_mean", "stage1.1.running_var")
    assert found.integers == ("mask", "stage1.1.num_batches_tracked")
    assert found.ties == {"head.weight": "embed.weight"}
    assert found.floating == found.parameters + found.buffers
    assert dict(found.groups) == {
        "scale": ("scale",),
        "embed": ("embed.weight",),
        "stage1.0": ("stage1.0.weight",),
        "stage1.1": (
            "stage1.1.weight",
            "stage1.1.bias",
            "stage1.1.running_mean",
            "stage1.1.running_var",
        ),
        "stage10": ("stage10.weight", "stage10.bias"),
        "head": ("head.bias",),
    }
    assert list(found.groups) == ["scale", "embed", "stage1.0", "stage1.1", "stage10", "head"]


def test_frozen_and_repeated_modules() -> None:
    shared = nn.Linear(2, 2)
    net = nn.Sequential(shared, nn.ReLU(), shared).requires_grad_(False)
    found = layout(net)
    assert found.parameters == ("0.weight", "0.bias"), "a frozen parameter is still a parameter"
    assert found.ties == {"2.weight": "0.weight", "2.bias": "0.bias"}


def test_select_takes_layers_and_prefixes() -> None:
    found = layout(Tied())
    assert found.select(None) == found.floating
    assert found.select(["stage1"]) == (
        "stage1.0.weight",
        "stage1.1.weight",
        "stage1.1.bias",
        "stage1.1.running_mean",
        "stage1.1.running_var",
    ), "stage1 is not stage10"
    assert found.select(["head", "scale", "head"]) == ("scale", "head.bias"), "the module's order"
    assert set(found.select(list(found.groups))) == set(found.floating), "groups leave nothing out"
    with pytest.raises(BadParameter, match=r"'stage2' fits no layer.*stage10"):
        found.select(["stage1", "stage2"])


def test_snapshot_is_not_touched_by_training() -> None:
    net = Tied()
    before = snapshot(net)
    kept = before["stage10.weight"].clone()
    with torch.no_grad():
        net.stage10.weight += 1
        net.get_buffer("mask").logical_not_()
    assert (
        torch.equal(before["stage10.weight"], kept) and not before["stage10.weight"].requires_grad
    )
    assert before["mask"].tolist() == [True, False]
    assert not shares_storage(before, net.state_dict())


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
pairs = st.lists(st.tuples(finite, finite), min_size=1, max_size=8)
thirtieths = st.integers(0, 30)


def bits(x: torch.Tensor) -> list[int]:
    return x.view(torch.int32).tolist()


@settings(deadline=None, max_examples=300)
@given(st.lists(finite, min_size=1, max_size=8), thirtieths, st.integers(0, 30))
def test_a_mixture_of_equal_networks_is_that_network(values: list[float], i: int, j: int) -> None:
    theta = {"w": torch.tensor(values)}
    twin = {"w": theta["w"].clone()}
    mixed = affine((theta, twin), ((30 - i) / 30, i / 30), ["w"])
    assert bits(mixed["w"]) == bits(theta["w"])
    three = affine((theta, twin, twin), (1 - (i + j) / 60, i / 60, j / 60), ["w"])
    assert bits(three["w"]) == bits(theta["w"])


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=8), thirtieths)
def test_so_it_is_in_float64(values: list[float], i: int) -> None:
    theta = {"w": torch.tensor(values, dtype=torch.float64)}
    twin = {"w": theta["w"].clone()}
    mixed = affine((theta, twin), ((30 - i) / 30, i / 30), ["w"])
    assert torch.equal(mixed["w"], theta["w"])


@settings(deadline=None, max_examples=300)
@given(pairs, thirtieths)
def test_swapping_networks_and_weights_changes_no_bit(
    values: list[tuple[float, float]], i: int
) -> None:
    a, b = ({"w": torch.tensor(column)} for column in zip(*values, strict=True))
    weights = ((30 - i) / 30, i / 30)
    there, back = affine((a, b), weights, ["w"]), affine((b, a), weights[::-1], ["w"])
    assert bits(there["w"]) == bits(back["w"])


@settings(deadline=None, max_examples=300)
@given(finite, finite, thirtieths)
def test_affine_is_the_exact_sum_rounded_once(a: float, b: float, i: int) -> None:
    weights = ((30 - i) / 30, i / 30)
    got = affine(({"w": torch.tensor([a])}, {"w": torch.tensor([b])}), weights, ["w"])["w"]
    assert got.dtype == torch.float32
    exact = Fraction(a) * Fraction(weights[0]) + Fraction(b) * Fraction(weights[1])
    size = max(abs(float(exact)), 2.0**-126)
    half_ulp = Fraction(2) ** (math.frexp(size)[1] - 25)
    slack = (abs(Fraction(a)) + abs(Fraction(b))) / 2**51
    assert abs(Fraction(float(got)) - exact) <= half_ulp + slack


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_affine_in_parts_is_the_same(layout: torch.memory_format) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (
        {"w": torch.randn(90, 90, 3, 3, generator=g).to(memory_format=layout)} for _ in range(2)
    )
    got = affine((a, b), (0.3, 0.7), ["w"])["w"]
    assert torch.equal(got, (a["w"].double() * 0.3 + b["w"].double() * 0.7).float())


def test_affine_takes_the_named_entries_only_and_keeps_their_type() -> None:
    a = {"w": torch.tensor([1.0, 2.0]), "h": torch.tensor([1.0], dtype=torch.bfloat16)}
    b = {"w": torch.tensor([3.0, 4.0]), "h": torch.tensor([2.0], dtype=torch.bfloat16)}
    assert affine((a, b), (0.5, 0.5), ["w"]).keys() == {"w"}
    assert affine((a, b), (0.5, 0.5), ["h"])["h"].dtype == torch.bfloat16
    beyond = affine((a, b), (-1.0, 2.0), ["w"])["w"]
    assert beyond.tolist() == [5.0, 6.0], "weights may lie outside [0, 1]"
    assert a["w"].tolist() == [1.0, 2.0], "the anchors stay as they are"


def test_affine_with_a_weight_of_one_copies_bits() -> None:
    a, b = ({"w": torch.randn(50, generator=torch.Generator().manual_seed(s))} for s in (1, 2))
    assert bits(affine((a, b), (1.0, 0.0), ["w"])["w"]) == bits(a["w"])
    assert bits(affine((a, b), (0.0, 1.0), ["w"])["w"]) == bits(b["w"])


def test_distances_against_their_definition() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = ({n: torch.randn(5, 3, generator=g) for n in "xyz"} for _ in range(2))
    x, y = (torch.cat([t[n].flatten() for n in "xz"]).double() for t in (a, b))
    assert flatten(a, "xz").dtype == torch.float64
    assert torch.equal(flatten(a, "xz"), x)
    assert distance(a, b, "xz") == pytest.approx(float((x - y).norm()), rel=1e-14)
    assert distance(a, a, "xz") == 0
    angle = float((x * y).sum() / (x.norm() * y.norm()))
    assert cosine_distance(a, b, "xz") == pytest.approx(1 - angle, rel=1e-13)
    minus = {n: -v for n, v in a.items()}
    assert cosine_distance(a, minus, "xyz") == pytest.approx(2, abs=1e-14)
    assert cosine_distance(a, a, "xyz") == pytest.approx(0, abs=1e-14)


def test_small_differences_of_large_weights_are_not_lost() -> None:
    a = {"w": torch.full((10_000,), 1000.0)}
    b = {"w": torch.full((10_000,), 1000.0 + 2**-13)}
    assert distance(a, b, ["w"]) == pytest.approx(100 * 2**-13, rel=1e-12)


def test_check_accepts_what_fits() -> None:
    net = Tied()
    check_theta(net, net.state_dict(), "A")
    without_alias = {k: v for k, v in net.state_dict().items() if k != "head.weight"}
    check_theta(net, without_alias, "A")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("stage10.bias"), r"network A .*missing \['stage10.bias'\].*same arch"),
        (lambda t: t.update(extra=torch.zeros(1)), r"not in the model \['extra'\]"),
        (
            lambda t: t.update({"head.bias": torch.zeros(3)}),
            r"network A: head.bias has shape \(3,\), the model \(7,\)",
        ),
        (
            lambda t: t["stage10.weight"].__setitem__((1, 2), float("nan")),
            "network A: stage10.weight holds NaN or infinite.*diverged",
        ),
        (
            lambda t: t["stage1.1.running_var"].__setitem__(0, float("inf")),
            "stage1.1.running_var holds NaN or infinite",
        ),
    ],
    ids=["missing", "extra", "shape", "NaN", "infinite buffer"],
)
def test_check_says_which_entry_is_wrong(change, message: str) -> None:
    net = Tied()
    theta = snapshot(net)
    change(theta)
    with pytest.raises(BadParameter, match=message):
        check_theta(net, theta, "A")


def test_what_is_no_state_dict_is_recognised() -> None:
    net = nn.Linear(2, 2)
    for wrong, advice in (
        (net, r"network B: .*the module itself \(Linear\).*state_dict\(\)"),
        ([net.weight], r"network B: .* got a list"),
        ({"state_dict": snapshot(net), "epoch": 3}, r"'state_dict' holds a dict.*\['state_dict'\]"),
        ({"model": net}, r"'model' holds a Linear.*\['model'\]\.state_dict\(\)"),
    ):
        with pytest.raises(BadParameter, match=advice):
            check_theta(net, wrong, "B")  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(BadParameter, match=r"an nn\.Module, is needed, got a dict"):
        check_theta(snapshot(net), net, "A")  # type: ignore[arg-type]  # wrong on purpose


def test_one_tensor_has_one_value() -> None:
    net = Tied()
    theta = snapshot(net)
    check_theta(net, {k: v for k, v in theta.items() if k != "head.weight"}, "A")
    theta["head.weight"] = theta["head.weight"] + 1
    with pytest.raises(BadParameter, match=r"network A: head.weight and embed.weight differ"):
        check_theta(net, theta, "A")


def test_shares_storage() -> None:
    a = {"w": torch.zeros(4), "none": torch.zeros(0)}
    assert not shares_storage(a, {"w": torch.zeros(4), "none": torch.zeros(0)})
    assert shares_storage(a, {"other": a["w"][1:3]}), "a view of it is the same memory"
    net = nn.Linear(2, 2)
    assert shares_storage(net.state_dict(), net.state_dict())
    assert not shares_storage(snapshot(net), snapshot(net))
