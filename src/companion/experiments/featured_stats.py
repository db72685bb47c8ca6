"""Statistics of featured pairs: does LLFC hold, and which number tells connected pairs apart?

What becomes a verdict of chapter 3 is computed here from what
:func:`companion.experiments.featured.examine` returns. The first linear map is left out everywhere:
its output is linear in the weights, so it is linearly connected for any two networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from companion.core.stats import Interval, auc, clustered, spearman
from companion.experiments.aligned import clusters
from companion.experiments.featured import Featured

CONNECTED = 2.0
"""Points of test error below which a line counts as connected, as in chapter 1."""


def after_first(values: Mapping[str, float]) -> dict[str, float]:
    """Layer -> value, without the first site that was measured."""
    return dict(list(values.items())[1:])


@dataclass(frozen=True)
class Ratios:
    """R = E[1 - cos_alpha] / E[1 - cos(A, B)] over the layers of one pair (claim A02).

    Arguments:
        median: over the layers, the largest over the alphas.
        low: share of the layers with R of at most a half at every alpha.
    """

    median: float
    low: float

    @property
    def holds(self) -> bool:
        """Claim A02's rule, fixed before the runs: a median of 0.25, 90 % of layers below 0.5."""
        return self.median <= 0.25 and self.low >= 0.9


def ratios(found: Featured, bn: str | None = None) -> Ratios:
    """:class:`Ratios` of a pair. Layers without a ratio (parallel features) are left out."""
    seen = found.look(bn)
    rows = np.asarray([[x.ratio(t) for t in seen.alphas] for x in found.layers(bn)[1:]])
    rows = rows.reshape(-1, len(seen.alphas))
    rows = rows[np.isfinite(rows).all(1)]
    if not len(rows):
        return Ratios(math.nan, math.nan)
    return Ratios(float(np.median(rows, 0).max()), float((rows <= 0.5).all(1).mean()))


def over_pairs(found: Sequence[Featured], value: Callable[[Featured], float]) -> Interval | None:
    """Mean and interval of ``value`` over the valid pairs; None without one."""
    good = [f for f in found if f.valid and math.isfinite(value(f))]
    if not good:
        return None
    return clustered([value(f) for f in good], clusters([f.pair for f in good]))


def averaged(
    found: Sequence[Featured], value: Callable[[Featured], Mapping[str, float]]
) -> dict[str, float]:
    """Layer -> mean of ``value`` over the valid pairs, of one network."""
    good = [value(f) for f in found if f.valid]
    return {n: float(np.mean([g[n] for g in good])) for n in good[0]} if good else {}


def trend(
    found: Mapping[int, Sequence[Featured]],
    x: Callable[[int, Featured], float],
    y: Callable[[int, Featured], float],
    least: int = 4,
) -> Interval | None:
    """Spearman's rank correlation of two numbers along a grid: each pair's own, and its interval.

    Arguments:
        found: number of the grid (fork step, width) -> pairs, the same in the same order.
        x, y: of (number, pair).
        least: fewest numbers at which a pair has to be valid to count.
    """
    values, pairs = [], []
    for column in zip(*found.values(), strict=True):
        good = [(k, f) for k, f in zip(found, column, strict=True) if f.valid]
        if len(good) < least:
            continue
        rank = spearman([x(k, f) for k, f in good], [y(k, f) for k, f in good])
        values.append(0.0 if math.isnan(rank) else rank)
        pairs.append(good[0][1].pair)
    return clustered(values, clusters(pairs)) if values else None


def _lengths(f: Featured) -> dict[str, float]:
    """How far a feature's length is from that of the interpolated feature, as a |log|."""
    return {n: abs(math.log(v)) for n, v in f.lengths().items()}


def _additivity(f: Featured) -> dict[str, float]:
    return {x.name: x.distance[0.5].median for x in f.additivity.layers} if f.additivity else {}


def _commutativity(f: Featured, relative: bool = False) -> dict[str, float]:
    layers = f.commutativity.layers if f.commutativity else ()
    return {x.name: x.ratio if relative else x.com for x in layers}


STATISTICS: Mapping[str, Callable[[Featured], Mapping[str, float]]] = {
    "E[1 − cos½]": lambda f: f.gaps(),
    "E[1 − cos(A, B)]": lambda f: f.baselines(),
    "R, their ratio": lambda f: f.ratios(),
    "|log of the lengths’ ratio|": _lengths,
    "Dist_σ": _additivity,
    "Dist_com": _commutativity,
    "Dist_com / min(Dist_W, Dist_H)": lambda f: _commutativity(f, relative=True),
}
"""Numbers of one layer of one pair that may tell connected pairs from others."""


@dataclass(frozen=True)
class Separation:
    """How well one number tells unconnected pairs from connected ones: areas under ROC curves.

    1 separates perfectly, 1/2 is chance, and below 1/2 the connected ones have the larger number.

    Arguments:
        pooled: hidden layers of all pairs thrown together: one threshold for all layers.
        worst: the smallest area of a single hidden layer: a threshold for each layer.
        output: of the last layer alone; NaN for a number that it does not have.
        pairs: unconnected, connected, of those that this number was measured of.
    """

    pooled: float
    worst: float
    output: float
    pairs: tuple[int, int]


def comparable(found: Sequence[Featured]) -> list[Featured]:
    """The valid pairs of which every one of :data:`STATISTICS` was measured, so that areas under
    ROC curves are about the same pairs."""
    return [f for f in found if f.valid and all(value(f) for value in STATISTICS.values())]


def separation(
    found: Sequence[Featured], statistic: Callable[[Featured], Mapping[str, float]]
) -> Separation:
    """Areas under the ROC curve of a statistic, over the valid pairs of networks of one depth."""
    good = [f for f in found if f.valid and statistic(f)]
    labels = [f.height() > CONNECTED for f in good]
    end = list(good[0].gaps())[-1] if good else ""
    by_layer: dict[str, list[tuple[float, bool]]] = {}
    for f, label in zip(good, labels, strict=True):
        first = next(iter(f.gaps()))
        for name, value in statistic(f).items():
            if name != first and not math.isnan(value):
                by_layer.setdefault(name, []).append((value, label))
    areas = {n: auc(*zip(*v, strict=True)) for n, v in by_layer.items()}
    pooled = [item for n, v in by_layer.items() if n != end for item in v]
    hidden = [a for n, a in areas.items() if n != end and not math.isnan(a)]
    return Separation(
        auc(*zip(*pooled, strict=True)) if pooled else math.nan,
        min(hidden, default=math.nan),
        areas.get(end, math.nan),
        (sum(labels), len(labels) - sum(labels)),
    )
