"""Intervals that respect what is independent: pairs that share an init are one cluster."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from companion.core.seeds import Key

Statistic = Callable[[NDArray[np.float64]], float]


@dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap interval.

    Arguments:
        value: the statistic of all values (same unit as they).
        low, high: percentile interval at ``level``.
        n: number of values (pairs).
        clusters: number of independent groups (inits).
    """

    value: float
    low: float
    high: float
    n: int
    clusters: int
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean())


def clustered(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    statistic: Statistic = _mean,
    level: float = 0.95,
) -> Interval:
    """Cluster bootstrap: whole clusters are drawn with replacement, their values kept together.

    With six clusters or fewer every possible draw is enumerated (27 for three inits), so the
    interval is exact and the same on every machine; with three clusters it spans from the lowest
    to the highest cluster mean, which is as wide as three inits deserve.

    Arguments:
        values: one number a pair.
        clusters: the init (any label) of each, same length.
        statistic: of a 1-d array; default the mean.

    Raises:
        ValueError: no values, or lengths that differ.
    """
    if not values or len(values) != len(clusters):
        raise ValueError(f"{len(values)} values in {len(clusters)} clusters")
    groups: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        groups.setdefault(cluster, []).append(float(value))
    members = [np.asarray(g) for g in groups.values()]
    count = len(members)
    if count**count <= 50_000:
        draws: Sequence[Sequence[int]] = list(itertools.product(range(count), repeat=count))
    else:
        flat = Key("bootstrap", count).integers(10_000 * count, count)
        draws = flat.reshape(10_000, count).tolist()
    samples = [statistic(np.concatenate([members[i] for i in draw])) for draw in draws]
    tail = (1 - level) / 2
    low, high = np.quantile(samples, [tail, 1 - tail], method="inverted_cdf")
    value = statistic(np.asarray([float(v) for v in values]))
    return Interval(value, float(low), float(high), len(values), count, level)


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
