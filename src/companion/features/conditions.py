"""The two conditions from which LLFC follows: weakly additive ReLUs, and layers that commute.

    weak_additivity(net, a, b, test).layer("layer1.relu").distance[0.5].median
    commutativity(net, a, b, test).layer("head").ratio

Both are about A and B alone: no network between them is run. Distances are the paper's
``dist(u, v) = |u - v|^2 / (|u| |v|)``. For B permuted, hand in the permuted state dict: equation 9
of the paper is :func:`commutativity` of A and pi(B). :mod:`companion.features.theorem` has networks
that meet both conditions exactly. Source: Zhou et al. 2023, Section 5; our chapter 3.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from companion.core.errors import BadParameter
from companion.core.networks import plain
from companion.core.numerics import exact_evaluation
from companion.core.theta import Theta
from companion.features.measure import Stat
from companion.features.taps import (
    KINDS,
    Examples,
    Layered,
    Site,
    batches,
    checked,
    examples_of,
    no_output,
    own_statistics,
    rates,
    sites,
    tapped,
)


@dataclass(frozen=True)
class ReluAdditivity:
    """One ReLU, on what A and B feed it: X and Y.

    Arguments:
        name: of the site.
        size: units (times positions) of one sample.
        distance: alpha -> Dist_sigma of each sample: of ``relu((1 - alpha) X + alpha Y)`` and
            ``(1 - alpha) relu(X) + alpha relu(Y)``. Undefined where one of the two is all zeros.
        whole: alpha -> the same with the features of all samples as one vector.
        opposite: percent of all X and Y, unit by unit, that are one above and one below zero. Weak
            additivity for every alpha is the same as: none.
    """

    name: str
    size: int
    distance: Mapping[float, Stat]
    whole: Mapping[float, float]
    opposite: float


@dataclass(frozen=True)
class Additivity(Layered[ReluAdditivity]):
    """Weak additivity of every ReLU, in the order they compute.

    Arguments:
        alphas: weight of B.
        n: samples.
        bn: ``own``: BatchNorm with each network's own running statistics; ``none`` without any.
    """

    layers: tuple[ReluAdditivity, ...]
    alphas: tuple[float, ...]
    n: int
    bn: str


@dataclass(frozen=True)
class LayerCommutativity:
    """One linear or convolutional layer.

    Arguments:
        name, kind: of the site.
        com: Dist_com, of ``W_A H_A + W_B H_B`` and ``W_A H_B + W_B H_A``, where H are the layer's
            inputs in either network, over all samples, as one vector.
        weights, inputs: Dist_W and Dist_H, of the weights and of the inputs. All without biases.
    """

    name: str
    kind: str
    com: float
    weights: float
    inputs: float

    @property
    def ratio(self) -> float:
        """Dist_com over the smaller of Dist_W and Dist_H (claim A07).

        NaN where that is 0 or undefined: the inputs of a first layer are the same in both networks,
        so it commutes whatever its weights, and says nothing.
        """
        least = min(self.weights, self.inputs)
        return self.com / least if least > 0 and not math.isnan(self.com) else math.nan


@dataclass(frozen=True)
class Commutativity(Layered[LayerCommutativity]):
    """Commutativity of every linear and convolutional layer; ``n`` and ``bn`` as there."""

    layers: tuple[LayerCommutativity, ...]
    n: int
    bn: str


def weak_additivity(
    module: nn.Module,
    a: Theta,
    b: Theta,
    split: Examples,
    *,
    layers: Sequence[str] | None = None,
    alphas: Sequence[float] = (0.25, 0.5, 0.75),
    batch: int | None = None,
) -> Additivity:
    """How far every ReLU is from adding up over what A and B feed it, in one pass over the data.

    Modules and functional calls alike (the released code sees modules only, so nothing of a ResNet
    with functional ones). ReLU is convex, so the mixture of outputs is never below the output of
    the mixture; it is above by ``min((1 - alpha) |x|, alpha |y|)`` where x and y have opposite
    signs, and nowhere else. That is what is summed, in float64, so units that agree add exactly 0.

    Arguments:
        a, b: state dicts of ``module``.
        split: data, on the device to compute on.
        layers: names of ReLUs, beginnings of names (``stage1``) or patterns with ``*``; None: all.
        alphas: weights of B, in [0, 1]; the paper has them of A, and symmetric sets.
        batch: samples a forward pass.

    Raises:
        BadParameter: networks that do not fit, no data, no ReLU, an alpha that is outside
            [0, 1] or given twice.

    Source: Zhou et al. 2023, Definition 3, Figures 5 and 6 (claim A06); our chapter 3.
    """
    split = examples_of(split)
    a, b = checked(module, {"A": a, "B": b}, split)
    alphas = rates(alphas)
    found = _asked(_relus(module, split), layers, "ReLU")
    rows: dict[str, list[Tensor]] = {s.name: [] for s in found}
    size = {s.name: 0 for s in found}
    opposite = {s.name: 0 for s in found}
    one, two = (tapped(module, t, found, split.x, inputs=True) for t in (a, b))
    with one, two, torch.inference_mode():
        for x, _ in batches(module, split, batch, found):
            for taps in (one, two):
                taps.run(x, no_output)
            for site in found:
                pair = [t.inputs.pop(site.name).flatten(1) for t in (one, two)]
                size[site.name] = pair[0].shape[1]
                at_once = max(1, (1 << 22) // max(size[site.name], 1))  # 32 MB of float64
                for u, v in zip(*(p.split(at_once) for p in pair), strict=True):
                    sums, count = _relu_sums(u.double(), v.double(), alphas)
                    rows[site.name].append(sums.cpu())
                    opposite[site.name] += count
    out = []
    for site in found:
        every = torch.cat(rows[site.name])  # (samples, alphas, 3): |u - v|^2, |u|^2, |v|^2
        distance = {v: Stat.of(d) for v, d in zip(alphas, _over(every).T, strict=True)}
        whole = dict(zip(alphas, _over(every.sum(0)).tolist(), strict=True))
        share = 100 * opposite[site.name] / (len(split) * size[site.name])
        out.append(ReluAdditivity(site.name, size[site.name], distance, whole, share))
    return Additivity(tuple(out), alphas, len(split), own_statistics(module))


def commutativity(
    module: nn.Module,
    a: Theta,
    b: Theta,
    split: Examples,
    *,
    layers: Sequence[str] | None = None,
    batch: int | None = None,
) -> Commutativity:
    """Does it matter which network's features a layer's weights meet? One pass over the data.

    With ``S, D`` the sum and the difference of the two weights, and ``s, d`` those of the two
    inputs, the two sides are ``(S s + D d) / 2`` and ``(S s - D d) / 2``. So the layer's own
    operation runs twice a batch, not four times, and their difference ``D d`` is computed as it
    stands: nothing cancels. Biases are left out, as in the paper. They are equal on both sides, so
    they would change the lengths that the distance is relative to, and not the difference; and a
    bias, as the weight of a feature that is one in both networks, never meets a difference.

    Where BatchNorm follows, it is no part of the layer here (nor in the paper), though in eval mode
    it could be.

    Arguments:
        a, b: state dicts of ``module``.
        split: data, on the device to compute on.
        layers: names of linear layers and convolutions that are not transposed, beginnings of
            names (``stage1``) or patterns with ``*``; None: all.
        batch: samples a forward pass.

    Raises:
        BadParameter: networks that do not fit, no data, no such layer.

    Source: Zhou et al. 2023, Section 5, Figures 7 and 16 to 19, equation 9 (claims A07, A12); our
    chapter 3.
    """
    split = examples_of(split)
    a, b = checked(module, {"A": a, "B": b}, split)
    found = _asked(_linears(module, split), layers, "linear layer or convolution")
    # Squared norms of: the difference of the two sides, one side, the other; then of the inputs.
    sums = {s.name: [0.0] * 6 for s in found}
    one, two = (tapped(module, t, found, split.x, inputs=True) for t in (a, b))
    pairs = {s.name: [t.module.get_submodule(_path(s.name)) for t in (one, two)] for s in found}
    with one, two, torch.inference_mode():
        mixed = {n: _sum_and_difference(*(_weight(m) for m in pairs[n])) for n in pairs}
        for x, _ in batches(module, split, batch, found):
            for taps in (one, two):
                taps.run(x, no_output)
            for name, (layer, _) in pairs.items():
                h_a, h_b = (t.inputs.pop(name) for t in (one, two))
                both, apart = _sum_and_difference(h_a, h_b)
                p, q = _apply(layer, both, mixed[name][0]), _apply(layer, apart, mixed[name][1])
                more = (q, (p + q) / 2, (p - q) / 2, apart, h_a, h_b)
                sums[name] = [s + _squares(t) for s, t in zip(sums[name], more, strict=True)]
    out = []
    for site in found:
        w_a, w_b = (_weight(m).double() for m in pairs[site.name])
        weights = torch.tensor([_squares(w) for w in (w_a - w_b, w_a, w_b)])
        total = torch.tensor(sums[site.name], dtype=torch.float64).view(2, 3)
        com, inputs = _over(total).tolist()
        out.append(
            LayerCommutativity(site.name, site.kind, com, float(_over(weights.double())), inputs)
        )
    return Commutativity(tuple(out), len(split), own_statistics(module))


def measurable(
    module: nn.Module, split: Examples, among: Sequence[str] | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of what the two conditions are about: ReLUs, and linear layers and convolutions.

    Arguments:
        split: data, on the device of ``module``.
        among: names of sites to choose from; None: all.

    Returns:
        the two lists; either may be empty, as the first is of a network with GELUs.
    """
    relus, linears = (
        tuple(s.name for s in found(module, split) if among is None or s.name in among)
        for found in (_relus, _linears)
    )
    return relus, linears


def _relus(module: nn.Module, split: Examples) -> list[Site]:
    def is_relu(path: str) -> bool:
        try:
            return isinstance(plain(module).get_submodule(path), nn.ReLU)
        except AttributeError:  # no module: a functional call
            return path.removesuffix("()").rpartition(".")[2] == "relu"

    every = sites(module, split.x[:2], None, KINDS)
    return [s for s in every if not s.same and is_relu(_path(s.name))]


def _linears(module: nn.Module, split: Examples) -> list[Site]:
    def is_linear(layer: nn.Module | None) -> bool:
        if isinstance(layer, _ConvNd):
            return not isinstance(layer, _ConvTransposeNd)
        return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"

    modules = dict(module.named_modules())
    every = sites(module, split.x[:2], None, KINDS)
    return [s for s in every if is_linear(modules.get(_path(s.name)))]


def _relu_sums(x: Tensor, y: Tensor, alphas: Sequence[float]) -> tuple[Tensor, int]:
    """(rows, alphas, 3) squared norms |u - v|^2, |u|^2, |v|^2, and units of opposite sign."""
    apart = ((x > 0) & (y < 0)) | ((x < 0) & (y > 0))
    on_x, on_y, high_x, high_y = F.relu(x), F.relu(y), x.abs() * apart, y.abs() * apart
    sums = []
    for alpha in alphas:
        v = (1 - alpha) * on_x + alpha * on_y
        miss = torch.minimum((1 - alpha) * high_x, alpha * high_y)
        sums.append(torch.stack([t.square().sum(1) for t in (miss, v - miss, v)], 1))
    return torch.stack(sums, 1), int(apart.sum())


def _over(sums: Tensor) -> Tensor:
    """The distance from (…, 3) squared norms of difference, one and other; NaN if undefined."""
    lengths = sums[..., 1].sqrt() * sums[..., 2].sqrt()
    return torch.where(lengths > 0, sums[..., 0] / lengths, math.nan)


def _sum_and_difference(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    return one + other, one - other


def _path(name: str) -> str:
    """The module of a site: ``layer#2`` is the second run of ``layer``."""
    return name.rpartition("#")[0] or name


def _asked(every: Sequence[Site], layers: Sequence[str] | None, what: str) -> list[Site]:
    """The sites that are asked for, of those that take part."""
    if not every:
        raise BadParameter(f"this network runs no {what}.")
    if layers is None:
        return list(every)
    wanted = set()
    for pattern in (layers,) if isinstance(layers, str) else layers:
        hits = [
            s.name
            for s in every
            if pattern in (s.name, _path(s.name))
            or s.name.startswith(pattern + ".")
            or fnmatch.fnmatchcase(s.name, pattern)
        ]
        if not hits:
            raise BadParameter(
                f"layers: {pattern!r} fits no {what}. Those are: "
                f"{', '.join(s.name for s in every)}."
            )
        wanted.update(hits)
    return [s for s in every if s.name in wanted]


def _weight(layer: nn.Module) -> Tensor:
    """What the layer multiplies with, whatever it is computed from."""
    found = layer.weight
    assert isinstance(found, Tensor)
    return found.detach()


@exact_evaluation()
def _apply(layer: nn.Module, h: Tensor, weight: Tensor) -> Tensor:
    """The layer's operation with another weight and no bias."""
    if isinstance(layer, _ConvNd):
        return layer._conv_forward(h, weight, None)  # strides, padding and groups are its own
    if isinstance(layer, nn.Linear):
        return F.linear(h, weight)
    return h @ weight  # transformers' Conv1D


def _squares(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
