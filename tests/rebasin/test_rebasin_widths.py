"""Networks of different widths: the widened one computes the same, and finds its place again."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.models import build
from companion.rebasin import weight_matching, widen
from companion.rebasin.proof import Subject, output_gap

SHAPE = (1, 8, 8)


def network(name: str, key: int = 0) -> nn.Module:
    return build(name, SHAPE, 10, Key("widths", key))


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        ("mlp:widths=6x2", "mlp:widths=9x2"),
        ("resnet8:norm=batch,width=2", "resnet8:norm=batch,width=5"),
        ("resnet8:norm=none,width=2", "resnet8:norm=none,width=3"),
    ],
)
def test_the_widened_network_computes_the_same(narrow: str, wide: str) -> None:
    small, large = network(narrow), network(wide, 1)
    for (
        name,
        tensor,
    ) in small.named_buffers():  # statistics and biases that are not those of a start
        if "running" in name:
            tensor.add_(torch.rand_like(tensor))
    kept = {n: x.clone() for n, x in small.state_dict().items()}
    example = torch.randn(3, *SHAPE)
    found = widen(small, large, small.state_dict(), example)
    before, after = (Subject(m, example, t).run() for m, t in ((small, kept), (large, found.theta)))
    assert output_gap(before, after) <= 1e-6
    assert found.gap <= 1e-6
    assert all(torch.equal(x, kept[n]) for n, x in small.state_dict().items())
    assert any(g.size > found.sizes[n] for n, g in found.spec.groups.items())


def cut(theta: dict[str, Tensor], kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """Some of a perceptron's hidden units."""
    layers = [n.removesuffix(".weight") for n in theta if n.endswith(".weight")]
    out = dict(theta)
    for layer, then in itertools.pairwise(layers):
        for name in (f"{layer}.weight", f"{layer}.bias"):
            out[name] = out[name][kept[layer]]
        out[f"{then}.weight"] = out[f"{then}.weight"][:, kept[layer]]
    return out


@pytest.mark.parametrize("wide_is_a", [True, False])
def test_a_planted_part_of_a_wide_network_is_found(wide_is_a: bool) -> None:
    small, large = network("mlp:widths=12x2"), network("mlp:widths=20x2")
    theta = {n: x + 0.1 * torch.randn(x.shape) for n, x in large.state_dict().items()}
    g = torch.Generator().manual_seed(0)
    layers = [n.removesuffix(".weight") for n in theta if n.endswith(".weight")][:-1]
    kept = {n: torch.randperm(20, generator=g)[:12] for n in layers}
    found = widen(small, large, cut(theta, kept), torch.randn(2, *SHAPE))
    if wide_is_a:
        perms = weight_matching(found.spec, theta, found.theta).perms
    else:
        perms = found.spec.inverse(weight_matching(found.spec, found.theta, theta).perms)
    places = found.places(perms)
    assert {n: p.tolist() for n, p in places.items()} == {n: p.tolist() for n, p in kept.items()}


def test_norms_across_units_are_refused_by_name() -> None:
    small, large = network("mlp:widths=6x2,norm=layer"), network("mlp:widths=9x2,norm=layer")
    with pytest.raises(BadParameter, match=r"norm.* \(LayerNorm\) goes across the units"):
        widen(small, large, small.state_dict(), torch.randn(2, *SHAPE))


class Across(nn.Module):
    """A softmax over hidden units."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(5, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(x).softmax(1))


def test_other_refusals() -> None:
    x = torch.randn(2, *SHAPE)
    with pytest.raises(BadParameter, match="units of weight 0 change the outputs"):
        widen(Across(4), Across(6), Across(4).state_dict(), torch.randn(2, 5))
    small, large = network("mlp:widths=6x2"), network("mlp:widths=9x2")
    with pytest.raises(BadParameter, match="9 units in the narrow network, and 6 in the wide one"):
        widen(large, small, large.state_dict(), x)
    with pytest.raises(BadParameter, match="must be of one family"):
        widen(small, network("mlp:widths=9x3"), small.state_dict(), x)
    with pytest.raises(BadParameter, match="cannot move"):
        widen(small, build("mlp:widths=9x2", SHAPE, 11, Key("widths")), small.state_dict(), x)
