"""Intervals that respect what is independent: pairs that share an init are one cluster."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Statistic = Callable[[NDArray[np.float64]], float]


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Arguments:
        value: the statistic of all values (same unit as they).
        low, high: Student's t interval at ``level``; both the value where there is one cluster
            only, which says nothing about others. At 90 % each end is a bound that the truth
            passes in 5 of 100 cases, which is what a rule ("below 2 points") asks for.
        n: number of values (pairs).
        clusters: number of independent groups (inits).
    """

    value: float
    low: float
    high: float
    n: int
    clusters: int
    level: float = 0.9

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean())


def clustered(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    statistic: Statistic = _mean,
    level: float = 0.9,
    of: int = 1,
) -> Interval:
    """Student's t interval from a jackknife that leaves out one whole cluster at a time.

    For the mean of clusters of one size it is the t interval of the cluster means. With three
    clusters it reaches 1.7 times their standard deviation to either side, and holds the true mean
    of normal values in 90 of 100 cases; from the lowest to the highest of three it would be 75.

    Arguments:
        values: one number a pair.
        clusters: the init (any label) of each, same length.
        statistic: of a 1-d array, smooth; default the mean.
        of: how many such intervals are looked at together, of which any may decide: each is
            wider then (Bonferroni), so that the level holds for all of them.

    Raises:
        ValueError: no values, or lengths that differ.

    Source: Miller 1974, The jackknife (Biometrika 61).
    """
    if not values or len(values) != len(clusters):
        raise ValueError(f"{len(values)} values in {len(clusters)} clusters")
    names = list(dict.fromkeys(clusters))
    place = np.asarray([names.index(c) for c in clusters])
    return _jackknife(values, [place != i for i in range(len(names))], statistic, level, of)


def shared(
    values: Sequence[float],
    parts: Sequence[Sequence[Hashable]],
    *,
    statistic: Statistic = _mean,
    level: float = 0.9,
) -> Interval:
    """Student's t interval where one init has part in several pairs, as in a cycle of inits.

    The jackknife leaves out one init at a time, with every pair that it has part in. In a cycle of
    three it holds the true mean in about 90 of 100 cases if what differs is the inits, and in more
    if it is the pairs.

    Arguments:
        values: one number a pair.
        parts: the inits of each, same length.
        statistic, level: as for :func:`clustered`.

    Raises:
        ValueError: no values, or lengths that differ.

    Source: Arvesen 1969, Jackknifing U-statistics (Annals of Mathematical Statistics 40).
    """
    if not values or len(values) != len(parts):
        raise ValueError(f"{len(values)} values of {len(parts)} pairs")
    names = list(dict.fromkeys(name for pair in parts for name in pair))
    kept = [np.asarray([name not in pair for pair in parts]) for name in names]
    if not any(k.any() for k in kept):  # two inits, which both have part in every pair
        kept = kept[:1]
    return _jackknife(values, kept, statistic, level, 1)


def _jackknife(
    values: Sequence[float],
    kept: Sequence[NDArray[np.bool_]],
    statistic: Statistic,
    level: float,
    of: int,
) -> Interval:
    """The interval from the statistic of what is kept in turn."""
    every = np.asarray(values, dtype=np.float64)
    value, count = statistic(every), len(kept)
    if count < 2:
        return Interval(value, value, value, len(every), count, level)
    from scipy.stats import t

    without = np.asarray([statistic(every[k]) if k.any() else math.nan for k in kept])
    spread = float(np.sqrt((count - 1) / count * np.sum((without - without.mean()) ** 2)))
    reach = spread * float(t.ppf(1 - (1 - level) / (2 * of), count - 1))
    reach = math.inf if math.isnan(reach) else reach  # without one cluster there is no value
    return Interval(value, value - reach, value + reach, len(every), count, level)


def from_range(value: float, low: float, high: float, n: int) -> Interval:
    """The interval of up to three clusters of which the mean and the range are known.

    Records made until 2026-11-27 hold the range: the third cluster's mean follows from it.

    Arguments:
        value: mean of the clusters' means.
        low, high: the smallest and the largest of them.
        n: values in all.
    """
    if low == high:
        means = [value] * min(n, 3)
    elif n == 2 or math.isclose(value, (low + high) / 2, rel_tol=1e-9, abs_tol=1e-12):
        means = [low, high]  # the third may lie in the middle: two are wider
    else:
        means = [low, 3 * value - low - high, high]
    return replace(clustered(means, range(len(means))), n=n)


def over_pairs(values: Iterable[float]) -> Interval | None:
    """Mean and interval over independent pairs, of the finite values; None without any."""
    good = [v for v in values if math.isfinite(v)]
    return clustered(good, range(len(good))) if good else None


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN if either side is constant."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return math.nan
    from scipy.stats import spearmanr

    return float(spearmanr(x, y).statistic)


def auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Probability that a positive has the higher score than a negative (ties count half).

    NaN if one of the classes is empty.
    """
    positive = [s for s, flag in zip(scores, labels, strict=True) if flag]
    negative = [s for s, flag in zip(scores, labels, strict=True) if not flag]
    if not positive or not negative:
        return math.nan
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return wins / (len(positive) * len(negative))
