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
    parts = [np.asarray([c == name for c in clusters]) for name in names]
    return _jackknife(values, parts, statistic, level, of)


def over_networks(
    values: Sequence[float],
    pairs: Sequence[tuple[Hashable, Hashable]],
    *,
    statistic: Statistic = _mean,
    level: float = 0.9,
) -> Interval:
    """The same where pairs share networks: leaves out a network, with all of its pairs, at a time.

    All pairs of n networks are not independent, and have no clusters either. If pairs differ by
    more than their two networks do, the interval is wider than it need be.

    Arguments:
        values: one number a pair.
        pairs: the two networks (any labels) of each, same length.
        statistic, level: as :func:`clustered`.

    Raises:
        ValueError: no values, or lengths that differ.

    Source: Arvesen 1969, Jackknifing U-statistics (Annals of Mathematical Statistics 40).
    """
    if not values or len(values) != len(pairs):
        raise ValueError(f"{len(values)} values of {len(pairs)} pairs")
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    parts = [np.asarray([name in pair for pair in pairs]) for name in names]
    return _jackknife(values, parts if len(pairs) > 1 else parts[:1], statistic, level, 1)


def _jackknife(
    values: Sequence[float],
    parts: Sequence[NDArray[np.bool_]],
    statistic: Statistic,
    level: float,
    of: int,
) -> Interval:
    """``parts``: for each independent thing, which of the values go with it."""
    every, count = np.asarray(values, dtype=np.float64), len(parts)
    value = statistic(every)
    if count < 2:
        return Interval(value, value, value, len(every), count, level)
    from scipy.stats import t

    left = [every[~part] for part in parts]
    without = np.asarray([statistic(one) if one.size else math.nan for one in left])
    spread = float(np.sqrt((count - 1) / count * np.sum((without - without.mean()) ** 2)))
    reach = spread * float(t.ppf(1 - (1 - level) / (2 * of), count - 1))
    reach = math.inf if math.isnan(reach) else reach  # without one part there is no value
    return Interval(value, value - reach, value + reach, len(every), count, level)


def highest(groups: Sequence[tuple[Sequence[float], Sequence[Hashable]]]) -> Interval:
    """The largest of several means, such as those at several steps of training.

    Its high end is the highest of theirs: all lie below a line where it does. One that lies above a
    line is enough, so the low end is the highest of theirs as well, each as low as several need.

    Arguments:
        groups: values and clusters of each, as :func:`clustered` takes them.

    Raises:
        ValueError: no group, or one without values.
    """
    plain = [clustered(*group) for group in groups]
    if not plain:
        raise ValueError("the highest of no means")
    top = max(plain, key=lambda one: one.value)
    low = max(clustered(*group, of=len(groups)).low for group in groups)
    clusters = min(one.clusters for one in plain)
    return replace(top, low=low, high=max(one.high for one in plain), clusters=clusters)


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


def partial_spearman(x: Sequence[float], y: Sequence[float], given: Sequence[float]) -> float:
    """Spearman's rank correlation of x and y with what ``given`` tells of both taken out.

    NaN if one of the three is constant, or if x or y has the order of ``given``: nothing is left.
    """
    xy, xz, yz = spearman(x, y), spearman(x, given), spearman(y, given)
    left = (1 - xz**2) * (1 - yz**2)
    return (xy - xz * yz) / math.sqrt(left) if left > 1e-12 else math.nan


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
