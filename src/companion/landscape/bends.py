"""A low path between two networks that is not straight: a Bézier curve or a polygon, trained.

Networks that no straight line connects are, as a rule, connected by such a path. It is the control
for "no linear connection": a barrier on the line is no gap between two basins. ::

    bend = fit_bend(net, a, b, data.train, steps=500, key=Key("bend"))
    bend_path(net, bend, data, bn="reestimate").height("train", "loss")

Source: Garipov et al. 2018, Section 3; our chapter 6.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from companion.connectivity import Curve, Walker
from companion.connectivity.barrier import grid, splits_of, values_of
from companion.core import deadline
from companion.core.effective import only_plain
from companion.core.errors import BadParameter, Diverged, one_of, whole
from companion.core.losses import mean_loss
from companion.core.numerics import exact_evaluation
from companion.core.seeds import Key
from companion.core.theta import Theta, affine, check_theta, distance, layout, without_aliases
from companion.data import Dataset, Split
from companion.landscape.directions import Direction

KINDS = ("bezier", "polychain")
"""``bezier``: the points between the ends pull the curve. ``polychain``: it goes through them."""

_MOST = 6  # bends; the walker takes eight networks


@dataclass(frozen=True, eq=False)
class Bend:
    """A path from the first of some networks to the last.

    Arguments:
        kind: one of :data:`KINDS`.
        anchors: A, the networks that bend the path, B.
    """

    kind: str
    anchors: tuple[Theta, ...]

    def weights(self, t: float) -> tuple[float, ...]:
        """How much of each anchor there is at t, from 0 (A) to 1 (B); they sum to one."""
        last = len(self.anchors) - 1
        if self.kind == "bezier":
            return tuple(math.comb(last, i) * (1 - t) ** (last - i) * t**i for i in range(last + 1))
        return tuple(max(0.0, 1 - abs(t * last - i)) for i in range(last + 1))

    def slopes(self, t: float) -> tuple[float, ...]:
        """The derivatives of :meth:`weights`; at a corner, those of the piece that begins."""
        last = len(self.anchors) - 1
        if self.kind == "bezier":
            inner = Bend(self.kind, self.anchors[:-1]).weights(t) if last else ()
            return tuple(
                last * (low - high) for low, high in zip((0.0, *inner), (*inner, 0.0), strict=True)
            )
        piece = min(int(t * last), last - 1)
        return tuple(float(last) * ((i == piece + 1) - (i == piece)) for i in range(last + 1))

    def at(self, t: float) -> dict[str, torch.Tensor]:
        """The network at t; statistics of BatchNorm are mixed like weights."""
        names = [n for n, v in self.anchors[0].items() if v.is_floating_point()]
        return {**self.anchors[0], **affine(self.anchors, self.weights(t), names)}

    def tangent(self, t: float) -> Direction:
        """The direction of the path at t: one step is the length it would go in a unit of t."""
        names = [n for n, v in self.anchors[0].items() if v.is_floating_point()]
        exact = [{n: a[n].double() for n in names} for a in self.anchors]
        return affine(exact, self.slopes(t), names)

    def length(self, names: tuple[str, ...], pieces: int = 64) -> float:
        """Euclidean length over the named entries, as that of a fine polygon."""
        points = [self.at(i / pieces) for i in range(pieces + 1)]
        return sum(distance(u, v, names) for u, v in itertools.pairwise(points))


def fit_bend(
    module: nn.Module,
    a: Theta,
    b: Theta,
    data: Split,
    *,
    kind: str = "bezier",
    bends: int = 1,
    steps: int = 500,
    batch: int = 128,
    lr: float = 0.05,
    momentum: float = 0.9,
    key: Key | None = None,
) -> Bend:
    """Train the networks that bend a path between A and B until the path is low.

    SGD on the loss at a random point of the path, one a step; the learning rate is constant for the
    first half and falls to 0 linearly in the second. The ends stay as they are. BatchNorm uses the
    statistics of each batch; its running statistics mean nothing afterwards, so that the path has
    to be measured with statistics estimated again (``bn="reestimate"``).

    Arguments:
        module: the architecture; copied, never changed.
        a, b: state dicts of it.
        data: what to train on, un-augmented, on the device to compute on.
        kind: one of :data:`KINDS`.
        bends: networks between the ends, at first on the straight line.
        steps, batch, lr, momentum: of SGD.
        key: of batches, points and dropout.

    Raises:
        BadParameter: settings that cannot be, or networks that do not fit the module.
        Diverged: the loss is not finite; take a smaller ``lr``.

    Source: Garipov et al. 2018, Section 3.3.
    """
    one_of("kind", kind, KINDS)
    for name, value in (("bends", bends), ("steps", steps), ("batch", batch)):
        whole(name, value, 1)
    if bends > _MOST or not (lr > 0 and 0 <= momentum < 1):
        raise BadParameter(
            f"bends: {bends}, lr: {lr}, momentum: {momentum}: at most {_MOST} bends, a learning "
            "rate above 0 and a momentum in [0, 1) are needed."
        )
    only_plain(module)
    data = data.labelled()
    key = key or Key("landscape", "bend")
    device = data.x.device
    net = copy.deepcopy(module).to(device).train()
    spec = layout(net)
    for theta, name in ((a, "A"), (b, "B")):
        check_theta(net, theta, name)
    ends = [{k: v.detach().to(device) for k, v in t.items()} for t in (a, b)]
    shares = [(i + 1) / (bends + 1) for i in range(bends)]
    middles = [{**ends[0], **affine(ends, (1 - s, s), spec.floating)} for s in shares]
    anchors = [ends[0], *middles, ends[1]]
    path = Bend(kind, tuple(anchors))
    free = [{n: m[n].clone().requires_grad_() for n in spec.parameters} for m in middles]
    leaves = [v for m in free for v in m.values()]
    optimizer = torch.optim.SGD(leaves, lr=lr, momentum=momentum)
    # Batch norm writes its running statistics somewhere; nobody reads them.
    rest = {
        n: v.clone()
        for n, v in without_aliases(ends[0], spec.ties).items()
        if n not in spec.parameters
    }
    points = key.fold("points").words(steps) / 2.0**64
    size = min(batch, len(data.x))
    each = len(data.x) // size
    for step in range(steps):
        deadline.stop_if_passed()
        epoch, number = divmod(step, each)
        if number == 0:
            order = key.fold("epoch", epoch).permutation(len(data.x)).to(device)
        rows = order[number * size : (number + 1) * size]
        weights = path.weights(float(points[step]))
        at = {
            n: ends[0][n] * weights[0]
            + ends[1][n] * weights[-1]
            + sum(w * m[n] for w, m in zip(weights[1:-1], free, strict=True))
            for n in spec.parameters
        }
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, 2 * (1 - step / steps))
        with exact_evaluation(), key.fold("dropout", step).seeded():
            loss = mean_loss(functional_call(net, {**rest, **at}, (data.x[rows],)), data.y[rows])
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    for bent, found in zip(middles, free, strict=True):
        if not all(bool(torch.isfinite(v).all()) for v in found.values()):
            raise Diverged(f"bend: its weights are not finite after {steps} steps; lower lr={lr}.")
        bent.update({n: v.detach() for n, v in found.items()})
        bent.update({alias: bent[first] for alias, first in spec.ties.items()})
    return path


def bend_path(
    module: nn.Module,
    bend: Bend,
    data: Dataset | Mapping[str, Split],
    *,
    points: int = 31,
    **how: Any,
) -> Curve:
    """Loss and error along a bent path; its alphas are t.

    Arguments:
        module, bend: the architecture, and the path.
        data: where to measure.
        points: odd.
        how: keywords of :class:`companion.connectivity.Walker`; of a network with BatchNorm
            ``bn="reestimate"`` is what Garipov et al. do.
    """
    walker = Walker(module, splits_of(data), **how)
    ts = [t for _, t in grid(points)]
    measured = walker.walk(bend.anchors, [bend.weights(t) for t in ts])
    sizes = {name: len(s) for name, s in walker.splits.items()}
    return Curve(tuple(ts), values_of(measured), walker.bn, sizes, walker.bn_examples)
