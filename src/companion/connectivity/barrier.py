"""Segments, planes, and the barrier: a segment that has passed its gates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from companion.connectivity import gates
from companion.connectivity.gates import Gate
from companion.connectivity.walk import (
    BN_EXAMPLES,
    BN_MODES,
    Measure,
    Walker,
    has_batchnorm,
    sizes_of,
)
from companion.core.codec import OMIT_DEFAULT
from companion.core.errors import BadParameter, one_of, whole
from companion.core.losses import is_label
from companion.core.theta import Layout, Theta, check_theta, distance, flatten
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
    whole("points", points, 3, most=100_001)
    last = points - 1
    return [((last - i) / last, i / last) for i in range(points)]


def splits_of(data: Dataset | Mapping[str, Any] | Any) -> Mapping[str, Split]:
    """``{"train": …, "test": …}`` of a dataset; of a mapping its splits, by name.

    In place of a split: whatever :meth:`companion.data.Split.of` takes, such as a ``DataLoader``.
    One of these alone is called ``test``.
    """
    if isinstance(data, Dataset):
        return {"train": data.train, "test": data.test}
    named = data if isinstance(data, Mapping) else {"test": data}
    return {name: Split.of(part) for name, part in named.items()}


@dataclass(frozen=True)
class Curve:
    """Loss and error along a segment.

    Arguments:
        alphas: positions, 0 = A, 1 = B, shape (points,).
        values: split -> ``loss`` (nats) or ``error`` (percent) -> one number an alpha.
        bn: the BatchNorm mode, or ``none``.
        sizes: split -> number of examples (with a label) behind each value.
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
        between the ends only: a path that dips below them has a negative height. NaN where an end
        has no finite value.
        """
        if not all(map(math.isfinite, self.ends(split, metric))):
            return math.nan  # above an infinite loss is nothing
        excess = self.excess(split, metric, definition)
        if definition == "linear":
            excess[0] = excess[-1] = 0.0  # exactly, not up to rounding
        return max(excess[1:-1] if signed else excess)

    def peak(self, split: str = "test", metric: str = "error") -> float:
        """The alpha of the largest value."""
        v = self.values[split][metric]
        return self.alphas[v.index(max(v))]


def values_of(measured: Sequence[Mapping[str, Measure]]) -> dict[str, dict[str, tuple[float, ...]]]:
    """The ``values`` of a :class:`Curve`, from what the walker found at each of its points."""
    return {
        split: {
            metric: tuple(getattr(m[split], metric) for m in measured)
            for metric in ("loss", "error")
        }
        for split in measured[0]
    }


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
    a, b = walker.enter(a, "A"), walker.enter(b, "B")
    names = None if groups is None else walker.layout.select(groups)
    measured = walker.walk((a, b), steps, names=names, rest=a if rest == "a" else b)
    sizes = sizes_of(walker.splits)
    alphas = tuple(alpha for _, alpha in steps)
    return Curve(alphas, values_of(measured), walker.bn, sizes, walker.bn_examples)


@dataclass(frozen=True)
class Barrier:
    """Curves under each BatchNorm mode, the headline mode, and the gates they passed or failed.

    Arguments:
        curves: mode -> curve; one entry ``none`` for networks without running statistics.
        bn: the headline mode.
        gates: outcomes of G0, G0b, G2, G5 and of the controls that were :meth:`recorded` (G1, G3).
        distance: Euclidean distance of the two networks' parameters.
        classes: number of classes, for the default bound on errors.
        errors: of the two networks themselves, in percent, as the gates saw them. Where only some
            layers move, the ends of the curve are other networks.
        guess: of a text, the error of always saying its commonest token; else None.
        commonest: of images, the error of always saying their commonest class; None: not known.
        notes: what was done to the networks before they were measured (effective weights in place
            of what is stored, another precision).
    """

    curves: Mapping[str, Curve]
    bn: str
    gates: tuple[Gate, ...]
    distance: float
    classes: int
    errors: tuple[float, float]
    guess: float | None = field(default=None, metadata=OMIT_DEFAULT)
    commonest: float | None = field(default=None, metadata=OMIT_DEFAULT)
    notes: tuple[str, ...] = field(default=(), metadata=OMIT_DEFAULT)

    @property
    def valid(self) -> bool:
        """True if no gate failed."""
        return all(g.passed is not False for g in self.gates)

    def gate(self, name: str) -> Gate:
        """The gate called ``name``, such as ``"G1"``. KeyError if it was not asked."""
        for gate in self.gates:
            if gate.name.split()[0] == name:
                return gate
        raise KeyError(f"{name} is not among the gates {[g.name for g in self.gates]}")

    @property
    def metric(self) -> str:
        """What barriers of these data are spoken of in: ``loss`` for text, ``error`` for images."""
        return "error" if self.guess is None else "loss"

    @property
    def curve(self) -> Curve:
        """The curve under the headline mode."""
        return self.curves[self.bn]

    def height(
        self,
        split: str = "test",
        metric: str | None = None,
        definition: str = "mean",
        *,
        bn: str | None = None,
        signed: bool = False,
    ) -> float:
        """The barrier (points of error, or nats), or NaN if a gate failed. See :class:`Curve`.

        Arguments:
            metric: ``error`` or ``loss``; None: :attr:`metric`.
        """
        if not self.valid:
            return math.nan
        metric = metric or self.metric
        return self.curves[bn or self.bn].height(split, metric, definition, signed=signed)

    def heights(self) -> dict[str, dict[str, dict[str, float]]]:
        """Split -> metric -> definition -> barrier, under the headline mode."""
        return {
            split: {m: {d: self.height(split, m, d) for d in DEFINITIONS} for m in metrics}
            for split, metrics in self.curve.values.items()
        }

    def judged(
        self, *, reference_error: float | None = None, max_error: float | None = None
    ) -> Barrier:
        """This barrier with its ends' quality checked again, under other bounds.

        An experiment knows what error is normal for its recipe only after all ends are measured.
        """
        bounds = {"reference": reference_error, "max_error": max_error, "guess": self.guess}
        first = gates.quality(self.errors, self.classes, commonest=self.commonest, **bounds)
        return replace(self, gates=(first, *self.gates[1:]))

    def recorded(self, controls: Sequence[Gate]) -> Barrier:
        """This barrier with the outcomes of controls of the whole experiment (G1, G3)."""
        return replace(self, gates=(*self.gates, *controls))

    def __str__(self) -> str:
        failed = [str(g) for g in self.gates if g.passed is False]
        if failed:
            return "INVALID (" + "; ".join(failed) + ")"
        average = self.curve.bn_examples
        named = "" if self.bn == "none" else f", BatchNorm {self.bn}"
        named += "" if average is None else f" on {average:,} inputs"
        form, unit = (".4f", "nats") if self.metric == "loss" else (".2f", "points")
        heights = [f"{s} {self.height(s):{form}} {unit}" for s in self.curve.values]
        return f"barrier {', '.join(heights)}{named}"


def barrier(
    module: nn.Module,
    a: Theta,
    b: Theta,
    data: Dataset | Mapping[str, Split],
    *,
    points: int = 31,
    groups: Sequence[str] | None = None,
    rest: str = "a",
    bn: str = "interpolate",
    bn_data: Split | None = None,
    bn_examples: int | None = BN_EXAMPLES,
    classes: int | None = None,
    max_error: float | None = None,
    same_noise: bool = False,
) -> Barrier:
    """The error and loss barrier between networks A and B, gates included.

    Arguments:
        module: the architecture.
        a, b: state dicts of it.
        data, points, groups, rest: as :func:`segment`.
        bn: the headline BatchNorm mode; all three are measured where the network has BatchNorm
            (or InstanceNorm) with running statistics. One without measures by the batch.
        bn_data, bn_examples: as :class:`Walker` takes them.
        classes: number of classes, for the default of ``max_error`` (default: the dataset's own,
            or one more than the largest label).
        max_error: percent, of a trained end (:func:`companion.connectivity.gates.quality`), on the
            split ``test`` (or the last one).
        same_noise: the two are a null control and may be equal.

    Returns:
        a :class:`Barrier`; one that fails a gate prints as INVALID and its heights are NaN.

    Source: Frankle et al. 2020, Section 2 (instability); our chapter 1.
    """
    one_of("bn", bn, BN_MODES)
    splits = splits_of(data)
    a, b = check_theta(module, a, "A"), check_theta(module, b, "B")
    if isinstance(data, Dataset):
        classes = classes or data.classes
    modes = [bn, *(m for m in BN_MODES if m != bn)] if has_batchnorm(module) else [bn]
    curves: dict[str, Curve] = {}
    for mode in modes:
        walker = Walker(module, splits, bn=mode, bn_data=bn_data, bn_examples=bn_examples)
        curve = segment(module, a, b, data, points=points, groups=groups, rest=rest, walker=walker)
        curves[curve.bn] = curve
        if mode == bn:
            first, headline = walker, walker.bn
            ends = walker.walk((a, b), [(1.0, 0.0), (0.0, 1.0)])
            mixed = walker.walk((a, a), [grid(points)[points // 3]])[0]
            pairs = [(mixed[s].loss, ends[0][s].loss) for s in splits]
            self_gap = max(0.0 if m == end else abs(m - end) for m, end in pairs)  # both may be ∞
    return gated(
        *(curves, headline, first.enter(a, "A"), first.enter(b, "B"), first.layout, splits),
        *(ends, self_gap),
        classes=classes,
        max_error=max_error,
        same_noise=same_noise,
        apart=first.apart,
        notes=first.notes,
    )


def gated(
    curves: Mapping[str, Curve],
    headline: str,
    a: Theta,
    b: Theta,
    entries: Layout,
    splits: Mapping[str, Split],
    ends: Sequence[Mapping[str, Measure]],
    self_gap: float,
    *,
    classes: int | None = None,
    max_error: float | None = None,
    same_noise: bool = False,
    apart: int | None = None,
    notes: tuple[str, ...] = (),
) -> Barrier:
    """The barrier of curves that are measured already: the one place where all gates are asked.

    Arguments:
        headline: the BatchNorm mode that is reported.
        entries: the layout of the network.
        ends: what was measured of A and of B, split -> measure.
        self_gap: as :func:`companion.connectivity.gates.symmetry` takes it.
        apart: as :func:`companion.connectivity.gates.batchnorm` takes it.
        notes: as :class:`Barrier` has them.
        curves, splits: as of :func:`barrier`; so is what is not named here.
    """
    held_out = "test" if "test" in splits else list(splits)[-1]
    if classes is None:
        labels = [s.y[is_label(s.y)] for s in splits.values()]
        classes = 1 + max((int(y.max()) for y in labels if len(y)), default=1)
    errors = (ends[0][held_out].error, ends[1][held_out].error)
    average = curves["reestimate"].bn_examples if "reestimate" in curves else None
    names = entries.parameters
    found = (
        *gates.of_ends(a, b, names, errors, classes, splits[held_out], max_error, same_noise),
        gates.symmetry(a, b, entries.floating, self_gap),
        gates.batchnorm(headline, list(curves), average, apart),
    )
    guess, commonest = gates.guessing(splits[held_out]), gates.commonest(splits[held_out])
    about = (distance(a, b, names), classes, errors, guess)
    return Barrier(curves, headline, found, *about, None if guess else commonest, notes)


@dataclass(frozen=True)
class Plane:
    """Loss and error on a grid of the plane through three networks.

    Arguments:
        x, y: coordinates of the grid lines, in Euclidean distance of parameters from the origin
            network; the x-axis points from it to network A. Shapes (nx,), (ny,).
        values: split -> metric -> rows over y of values over x.
        points: the coordinates of the networks in it: the origin, A and B.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    values: Mapping[str, Mapping[str, tuple[tuple[float, ...], ...]]]
    points: tuple[tuple[float, float], ...]
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
    ends = ((origin, "origin"), (a, "A"), (b, "B"))
    origin, a, b = (walker.enter(theta, name) for theta, name in ends)
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
        ticks = torch.linspace(low - pad, high + pad, points, dtype=torch.float64)
        return [float(t) for t in ticks]

    xs, ys = axis([c[0] for c in corners]), axis([c[1] for c in corners])
    rows = [
        (1 - wa - wb, wa, wb)
        for wb in (y / by for y in ys)
        for wa in ((x - wb * bx) / ax for x in xs)
    ]
    measured = walker.walk((origin, a, b), rows)

    values = {
        split: {
            metric: tuple(tuple(flat[i : i + points]) for i in range(0, len(flat), points))
            for metric, flat in found.items()
        }
        for split, found in values_of(measured).items()
    }
    return Plane(tuple(xs), tuple(ys), values, corners, walker.bn)
