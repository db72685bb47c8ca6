"""Lines and planes along any directions, and trajectories drawn on a plane.

Everything is measured by the one walker, in the BatchNorm mode that is named. A picture of a plane
says nothing of what lies outside of it, so a trajectory comes with the share that does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from companion.connectivity import Curve, Plane, Walker
from companion.connectivity.barrier import splits_of, values_of
from companion.core.effective import only_plain
from companion.core.errors import BadParameter
from companion.core.theta import Theta, check_theta, flatten, layout
from companion.data import Dataset, Split
from companion.landscape.directions import Direction, inner, moved


def _exact(theta: Theta) -> dict[str, torch.Tensor]:
    """In float64, so that a small step is not rounded away before it is scaled."""
    return {n: v.double() if v.is_floating_point() else v for n, v in theta.items()}


def line_along(
    module: nn.Module,
    theta: Theta,
    direction: Direction,
    data: Dataset | Mapping[str, Split],
    steps: Sequence[float],
    **how: Any,
) -> Curve:
    """Loss and error on the line ``theta + step * direction``.

    Arguments:
        module, theta: the network.
        data: where to measure.
        steps: the alphas of the curve; 0 is ``theta``.
        how: keywords of :class:`companion.connectivity.Walker`, such as ``bn``.
    """
    walker = Walker(module, splits_of(data), **how)
    start = _exact(theta)
    anchors = (start, moved(start, direction))
    measured = walker.walk(anchors, [(1 - t, t) for t in steps], names=tuple(direction))
    sizes = {name: len(s) for name, s in walker.splits.items()}
    return Curve(tuple(steps), values_of(measured), walker.bn, sizes, walker.bn_examples)


def plane_along(
    module: nn.Module,
    theta: Theta,
    u: Direction,
    v: Direction,
    data: Dataset | Mapping[str, Split],
    xs: Sequence[float],
    ys: Sequence[float],
    **how: Any,
) -> Plane:
    """Loss and error on the plane ``theta + x * u + y * v``.

    Arguments:
        module, theta: the network at (0, 0).
        u, v: the axes; they need not be orthogonal, but then neither is the picture.
        data: where to measure.
        xs, ys: the grid, in units of ``u`` and ``v``.
        how: keywords of :class:`companion.connectivity.Walker`, such as ``bn``.

    Raises:
        BadParameter: ``u`` and ``v`` are parallel.
    """
    if _dependent(u, v):
        raise BadParameter("plane: the two directions are parallel; they span no plane.")
    walker = Walker(module, splits_of(data), **how)
    start = _exact(theta)
    names = tuple(n for n in walker.layout.floating if n in u or n in v)
    rows = [(1 - x - y, x, y) for y in ys for x in xs]
    measured = walker.walk((start, moved(start, u), moved(start, v)), rows, names=names)
    values = {
        split: {
            metric: tuple(tuple(flat[i : i + len(xs)]) for i in range(0, len(flat), len(xs)))
            for metric, flat in found.items()
        }
        for split, found in values_of(measured).items()
    }
    return Plane(tuple(xs), tuple(ys), values, ((0.0, 0.0),), walker.bn)


def _dependent(u: Direction, v: Direction) -> bool:
    uu, vv, uv = inner(u, u), inner(v, v), inner(u, v)
    return uu * vv - uv**2 <= 1e-12 * uu * vv


@dataclass(frozen=True)
class Projected:
    """A trajectory as its shadow on a plane.

    Arguments:
        coordinates: (x, y) of each state, in units of the two directions.
        outside: of each state, the share of its squared distance from the origin that is outside of
            the plane; 0 for the origin itself.
        share: the same of all states together.
    """

    coordinates: tuple[tuple[float, float], ...]
    outside: tuple[float, ...]
    share: float


def project_path(
    module: nn.Module, trajectory: Sequence[Theta], origin: Theta, u: Direction, v: Direction
) -> Projected:
    """Where the states of a trajectory lie on the plane ``origin + x * u + y * v``.

    The nearest point of the plane, over the parameters, also if ``u`` and ``v`` are not orthogonal.

    Raises:
        BadParameter: ``u`` and ``v`` are parallel, or a state does not fit the module.
    """
    if _dependent(u, v):
        raise BadParameter("plane: the two directions are parallel; they span no plane.")
    only_plain(module)
    names = layout(module).parameters
    check_theta(module, origin, "origin")
    base = flatten(origin, names)
    zero = {n: torch.zeros_like(origin[n]) for n in names}
    axes = torch.stack([flatten({**zero, **d}, names).to(base.device) for d in (u, v)])
    places, missed, far = [], [], []
    for number, theta in enumerate(trajectory):
        check_theta(module, theta, f"{number} of the trajectory")
        step = flatten(theta, names).to(base.device) - base
        x = torch.linalg.solve(axes @ axes.T, axes @ step)
        missed.append(float(((step - x @ axes) ** 2).sum()))
        far.append(float((step**2).sum()))
        places.append((float(x[0]), float(x[1])))
    shares = tuple(m / d if d else 0.0 for m, d in zip(missed, far, strict=True))
    return Projected(tuple(places), shares, sum(missed) / sum(far) if sum(far) else 0.0)
