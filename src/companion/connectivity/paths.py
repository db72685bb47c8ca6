"""Segments and planes: where the walker walks, and the values it brings back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from companion.connectivity.walk import Walker
from companion.core.codec import OMIT_DEFAULT
from companion.core.errors import BadParameter, one_of
from companion.core.theta import Theta, check_theta, flatten
from companion.data import Dataset, Split

DEFINITIONS = ("mean", "linear")
"""``mean``: above the mean of the two ends (Frankle et al. 2020, Section 2). ``linear``: above the
straight line between the two ends (Entezari et al. 2022). Equal when the ends are equal."""


def grid(points: int) -> list[tuple[float, float]]:
    """``points`` pairs (1 - alpha, alpha), evenly spaced on [0, 1], symmetric bit by bit.

    Raises:
        BadParameter: an even number or fewer than 3; with an even number ½ would not be on the grid
            (the 30 points of the paper miss it).
    """
    if points < 3 or points % 2 == 0:
        raise BadParameter(f"points: {points} must be odd and 3 or more, so that ½ is on the grid.")
    last = points - 1
    return [((last - i) / last, i / last) for i in range(points)]


def splits_of(data: Dataset | Mapping[str, Split]) -> Mapping[str, Split]:
    """``{"train": …, "test": …}`` of a dataset; a mapping is passed through."""
    return {"train": data.train, "test": data.test} if isinstance(data, Dataset) else data


@dataclass(frozen=True)
class Curve:
    """Loss and error along a segment.

    Arguments:
        alphas: positions, 0 = A, 1 = B, shape (points,).
        values: split -> ``loss`` (nats) or ``error`` (percent) -> one number an alpha.
        bn: the BatchNorm mode, or ``none``.
        sizes: split -> number of examples behind each value.
        bn_examples: in mode ``reestimate``, the number of training inputs whose statistics each
            point has; else None.
    """

    alphas: tuple[float, ...]
    values: Mapping[str, Mapping[str, tuple[float, ...]]]
    bn: str
    sizes: Mapping[str, int]
    bn_examples: int | None = field(default=None, metadata=OMIT_DEFAULT)

    def ends(self, split: str = "test", metric: str = "error") -> tuple[float, float]:
        """The values at alpha = 0 and 1."""
        v = self.values[split][metric]
        return v[0], v[-1]

    def excess(self, split: str, metric: str, definition: str = "mean") -> list[float]:
        """At each alpha, the value minus what the ends lead to expect there."""
        one_of("definition", definition, DEFINITIONS)
        a, b = self.ends(split, metric)
        flat = definition == "mean" or a == b  # between equal ends exactly flat, not up to rounding
        base = [(a + b) / 2 if flat else (1 - t) * a + t * b for t in self.alphas]
        return [v - e for v, e in zip(self.values[split][metric], base, strict=True)]

    def height(
        self,
        split: str = "test",
        metric: str = "error",
        definition: str = "mean",
        *,
        signed: bool = False,
    ) -> float:
        """The barrier: the largest excess on the path, in points of error or nats of loss.

        The supremum over [0, 1] includes the ends, so it is never negative. ``signed`` looks
        between the ends only: a path that dips below them has a negative height.
        """
        excess = self.excess(split, metric, definition)
        if definition == "linear":
            excess[0] = excess[-1] = 0.0  # exactly, not up to rounding
        return max(excess[1:-1] if signed else excess)

    def peak(self, split: str = "test", metric: str = "error") -> float:
        """The alpha of the largest value."""
        v = self.values[split][metric]
        return self.alphas[v.index(max(v))]


def segment(
    module: nn.Module,
    a: Theta,
    b: Theta,
    data: Dataset | Mapping[str, Split],
    *,
    points: int = 31,
    groups: Sequence[str] | None = None,
    rest: str = "a",
    bn: str = "interpolate",
    walker: Walker | None = None,
) -> Curve:
    """Loss and error on the straight line from network A to network B.

    Arguments:
        module: the architecture.
        a, b: state dicts of it.
        data: where to measure.
        points: odd; 31 by default, so ½ is on the grid.
        groups: layers that move (names or prefixes); the others stay at network ``rest``
            (``"a"`` or ``"b"``). None: the whole network moves.
        bn: BatchNorm mode, see :data:`companion.connectivity.BN_MODES`.
        walker: reuse one (its module, data and bn then count instead).

    Source: Frankle et al. 2020, Section 2; Adilova et al. 2024 for groups; our chapters 1 and 4.
    """
    one_of("rest", rest, ("a", "b"))
    steps = grid(points)
    walker = walker or Walker(module, splits_of(data), bn=bn)
    names = None if groups is None else walker.layout.select(groups)
    measured = walker.walk((a, b), steps, names=names, rest=a if rest == "a" else b)
    values = {
        split: {
            "loss": tuple(m[split].loss for m in measured),
            "error": tuple(m[split].error for m in measured),
        }
        for split in walker.splits
    }
    sizes = {name: len(s) for name, s in walker.splits.items()}
    alphas = tuple(alpha for _, alpha in steps)
    return Curve(alphas, values, walker.bn, sizes, walker.bn_examples)


@dataclass(frozen=True)
class Plane:
    """Loss and error on a grid of the plane through three networks.

    Arguments:
        x, y: coordinates of the grid lines, in Euclidean distance of parameters from the origin
            network; the x-axis points from it to network A. Shapes (nx,), (ny,).
        values: split -> metric -> rows over y of values over x.
        points: the coordinates of the origin, A and B.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    values: Mapping[str, Mapping[str, tuple[tuple[float, ...], ...]]]
    points: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
    bn: str


def plane(
    module: nn.Module,
    origin: Theta,
    a: Theta,
    b: Theta,
    data: Dataset | Mapping[str, Split],
    *,
    points: int = 21,
    margin: float = 0.25,
    bn: str = "interpolate",
) -> Plane:
    """Loss and error on the plane through three networks, on an orthonormal grid.

    Arguments:
        origin, a, b: state dicts; for instability the init (or W_k) and the two copies.
        points: grid lines along each axis.
        margin: how far the grid reaches beyond the three networks, as a share of their extent.

    Raises:
        BadParameter: the three networks lie on one line, so they span no plane; or one of them is
            no finite point of this network's weight space.

    Source: the construction of Garipov et al. 2018; our chapter 1.
    """
    walker = Walker(module, splits_of(data), bn=bn)
    names = walker.layout.parameters
    for theta, name in ((origin, "origin"), (a, "A"), (b, "B")):
        check_theta(walker.module, theta, name)
    o, u, v = (flatten(t, names).to(walker.device) for t in (origin, a, b))
    u, v = u - o, v - o
    ax = float(u.norm())
    bx = float(u @ v) / ax if ax else 0.0
    by = float((v - (bx / ax) * u).norm()) if ax else 0.0
    if by <= 1e-6 * max(ax, float(v.norm())):  # float32 weights cannot tell them from a line
        raise BadParameter("plane: the three networks lie on one line; they span no plane.")
    corners = ((0.0, 0.0), (ax, 0.0), (bx, by))

    def axis(values: Sequence[float]) -> list[float]:
        low, high = min(values), max(values)
        pad = margin * (high - low)
        return [
            float(t) for t in torch.linspace(low - pad, high + pad, points, dtype=torch.float64)
        ]

    xs, ys = axis([c[0] for c in corners]), axis([c[1] for c in corners])
    rows = []
    for y in ys:
        for x in xs:
            wb = y / by
            wa = (x - wb * bx) / ax
            rows.append((1 - wa - wb, wa, wb))
    measured = walker.walk((origin, a, b), rows)

    def table(split: str, metric: str) -> tuple[tuple[float, ...], ...]:
        flat = [getattr(m[split], metric) for m in measured]
        return tuple(tuple(flat[i : i + points]) for i in range(0, len(flat), points))

    values = {s: {m: table(s, m) for m in ("loss", "error")} for s in walker.splits}
    return Plane(tuple(xs), tuple(ys), values, corners, walker.bn)
