"""Intervals that respect clusters, and two statistics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu
from scipy.stats import t as student

from companion.core.stats import (
    Interval,
    auc,
    clustered,
    from_range,
    highest,
    over_networks,
    spearman,
)

numbers = st.floats(-1e3, 1e3)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 4),
    st.lists(st.lists(numbers, min_size=4, max_size=4), min_size=2, max_size=6),
    st.sampled_from([0.5, 0.8, 0.95]),
)
def test_the_interval_is_that_of_the_cluster_means(
    size: int, groups: list[list[float]], level: float
) -> None:
    groups = [g[:size] for g in groups]
    labels = [f"init {i}" for i, g in enumerate(groups) for _ in g]
    found = clustered([v for g in groups for v in g], labels, level=level)
    means = [float(np.mean(g)) for g in groups]
    reach = student.ppf((1 + level) / 2, len(means) - 1) * np.std(means, ddof=1)
    reach /= math.sqrt(len(means))
    assert found.value == pytest.approx(np.mean(means), abs=1e-6)
    assert (found.low, found.high) == pytest.approx(
        (found.value - reach, found.value + reach), rel=1e-6, abs=1e-6
    )
    assert (found.n, found.clusters, found.level) == (len(labels), len(groups), level)


def coverage(n: int, make: Callable[..., Interval], truth: float, times: int = 2000) -> float:
    """Share of simulated intervals that hold the truth."""
    rng = np.random.default_rng(n)
    found = [make(rng, n) for _ in range(times)]
    return float(np.mean([one.low <= truth <= one.high for one in found]))


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_interval_holds_its_level(n: int) -> None:
    """Two pairs an init that share its luck: 90 of 100 intervals hold the mean, for any number of
    inits, and each end is passed in 5. The range of three would hold it in 75."""

    def one(rng: np.random.Generator, n: int) -> Interval:
        luck = rng.normal(5, 1, n).repeat(2) + rng.normal(0, 0.5, 2 * n)
        return clustered(luck.tolist(), np.arange(n).repeat(2).tolist())

    assert coverage(n, one, 5.0) == pytest.approx(0.9, abs=0.02)


def test_a_ratio_of_means_holds_its_level_about() -> None:
    def one(rng: np.random.Generator, n: int) -> Interval:
        above, below = rng.normal(1, 0.2, n), rng.normal(2, 0.3, n)
        rows = range(n)

        def ratio(at: np.ndarray) -> float:
            return float(above[at.astype(int)].mean() / below[at.astype(int)].mean())

        return clustered(list(rows), rows, statistic=ratio)

    for n in (3, 6):
        assert 0.86 <= coverage(n, one, 0.5) <= 0.94


def test_any_of_several_intervals_holds_the_level_together() -> None:
    rng = np.random.default_rng(0)

    def hit() -> bool:
        four = [clustered(rng.normal(0, 1, 3).tolist(), range(3), of=4) for _ in range(4)]
        return any(not one.low <= 0 <= one.high for one in four)

    assert np.mean([hit() for _ in range(1000)]) <= 0.12


@pytest.mark.parametrize(
    ("n", "noise", "share"), [(3, 0, 0.9), (5, 0, 0.9), (3, 1, 0.9), (6, 1, 0.9)]
)
def test_pairs_that_share_networks(n: int, noise: float, share: float) -> None:
    """Each pair has the luck of its two networks, and its own. As if pairs were independent, the
    intervals would hold the mean in fewer than 80 of 100 cases."""
    pairs = list(itertools.combinations(range(n), 2))

    def values(rng: np.random.Generator, n: int) -> list[float]:
        luck, own = rng.normal(0, 1, n), rng.normal(0, 1, len(pairs))
        return [float(luck[i] + luck[j] + noise * e) for (i, j), e in zip(pairs, own, strict=True)]

    held = coverage(n, lambda rng, n: over_networks(values(rng, n), pairs), 0.0)
    assert share - 0.02 <= held <= (0.92 if not noise else 0.98)
    naive = coverage(n, lambda rng, n: clustered(values(rng, n), range(len(pairs))), 0.0)
    assert naive < 0.8 < held


def test_one_network_is_left_out_at_a_time() -> None:
    found = over_networks([1.0, 2.0, 6.0], [("a", "b"), ("a", "c"), ("b", "c")])
    left = np.asarray([6.0, 2.0, 1.0])  # without a, b, c
    reach = student.ppf(0.95, 2) * math.sqrt(2 / 3 * np.sum((left - 3) ** 2))
    assert (found.value, found.n, found.clusters) == (3.0, 3, 3)
    assert (found.low, found.high) == pytest.approx((3 - reach, 3 + reach))
    assert over_networks([4.0], [("a", "b")]) == Interval(4.0, 4.0, 4.0, 1, 1)
    star = over_networks([1.0, 2.0], [("a", "b"), ("a", "c")])
    assert (star.low, star.high) == (-math.inf, math.inf), "without a there is no pair left"
    with pytest.raises(ValueError, match="1 values of 0 pairs"):
        over_networks([1.0], [])
    with pytest.raises(ValueError, match="0 values of 0 pairs"):
        over_networks([], [])


def test_the_highest_of_several_means_holds_its_level() -> None:
    """Means that are all 0: each end is passed in at most 5 of 100 cases."""
    rng = np.random.default_rng(0)

    def draw() -> Interval:
        return highest([(rng.normal(0, 1, 4).tolist(), range(4)) for _ in range(5)])

    found = [draw() for _ in range(1000)]
    assert np.mean([one.low > 0 for one in found]) <= 0.065
    assert np.mean([one.high < 0 for one in found]) <= 0.065
    assert all(one.low <= one.value <= one.high for one in found)


def test_the_highest_reaches_as_high_as_any() -> None:
    steady, wide = ([1.0, 1.0, 1.1], range(3)), ([0.0, 0.5, 1.9], range(3))
    found = highest([steady, wide])
    assert found.value == pytest.approx(31 / 30) and found.high == clustered(*wide).high
    assert found.low == clustered(*steady, of=2).low and found.clusters == 3
    assert highest([steady]) == clustered(*steady)
    assert highest([steady, ([0.1], ["a"])]).clusters == 1
    with pytest.raises(ValueError, match="no means"):
        highest([])


def test_pairs_of_one_init_are_not_independent() -> None:
    """Nine equal values of three inits are three observations, not nine."""
    values = [0.0] * 3 + [5.0] * 3 + [10.0] * 3
    wide, narrow = clustered(values, [0] * 3 + [1] * 3 + [2] * 3), clustered(values, range(9))
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_order_of_the_values_does_not_matter() -> None:
    values, inits = [1.0, 5.0, 2.0, 8.0, 3.0], ["a", "b", "a", "c", "b"]
    first = clustered(values, inits)
    for order in itertools.permutations(range(5)):
        again = clustered([values[i] for i in order], [inits[i] for i in order])
        assert (again.low, again.high) == pytest.approx((first.low, first.high))


def test_one_cluster_has_no_spread() -> None:
    """One init says nothing about others: whoever reads the interval has to look at clusters."""
    found = clustered([1.0, 3.0], ["a", "a"])
    assert found == Interval(2.0, 2.0, 2.0, 2, 1)


@pytest.mark.parametrize("means", [[1.0, 4.0], [1.0, 2.0, 6.0], [3.0], [-1.0, -1.0, -1.0]])
def test_an_interval_follows_from_mean_and_range(means: list[float]) -> None:
    asked = clustered(means, range(len(means)))
    found = from_range(float(np.mean(means)), min(means), max(means), len(means))
    assert (found.n, found.clusters) == (asked.n, asked.clusters)
    assert (found.low, found.high) == pytest.approx((asked.low, asked.high))


def test_a_statistic_that_one_cluster_carries_alone_has_no_bounds() -> None:
    def first_known(values: np.ndarray) -> float:
        return float(values[0]) if len(values) > 2 else math.nan

    found = clustered([1.0, 2.0, 3.0], range(3), statistic=first_known)
    assert (found.value, found.low, found.high) == (1.0, -math.inf, math.inf)
    assert str(clustered([1.0, 2.0, 3.0], range(3))) == "2.00 [0.31, 3.69]"


def test_clustered_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="0 values"):
        clustered([], [])
    with pytest.raises(ValueError, match="2 values in 1 clusters"):
        clustered([1.0, 2.0], [0])


def test_spearman() -> None:
    assert spearman([0, 25, 50, 100], [29, 9.5, 4.9, 0.3]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)  # 1 - 6·4/(5·24)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486832980505138)
    assert spearman([1, 2], [2, 1]) == pytest.approx(-1)
    for x, y in (([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [0, 0, 0]), ([1], [1]), ([], [])):
        assert math.isnan(spearman(x, y))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=20))
def test_auc_against_mann_whitney(cases: list[tuple[int, bool]]) -> None:
    scores, labels = [float(s) for s, _ in cases], [flag for _, flag in cases]
    positive = [s for s, flag in zip(scores, labels, strict=True) if flag]
    negative = [s for s, flag in zip(scores, labels, strict=True) if not flag]
    if not positive or not negative:
        assert math.isnan(auc(scores, labels))
        return
    u = mannwhitneyu(positive, negative).statistic
    assert auc(scores, labels) == pytest.approx(u / (len(positive) * len(negative)))


def test_auc_by_hand() -> None:
    assert auc([1, 2, 3, 4], [False, False, True, True]) == 1
    assert auc([4, 3, 2, 1], [False, False, True, True]) == 0
    assert auc([1, 1], [False, True]) == 0.5
    with pytest.raises(ValueError):
        auc([1, 2], [True])
