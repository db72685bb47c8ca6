"""Intervals that respect clusters, and two statistics."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from companion.core.stats import Interval, auc, clustered, spearman

numbers = st.floats(-1e3, 1e3)


def by_hand(groups: list[list[float]], level: float = 0.95) -> tuple[float, float]:
    """All draws of whole groups, their means sorted, and the smallest that covers the tail."""
    means = []
    for draw in itertools.product(groups, repeat=len(groups)):
        pooled = [v for group in draw for v in group]
        means.append(sum(pooled) / len(pooled))
    means.sort()
    tail = (1 - level) / 2

    def quantile(q: float) -> float:
        return means[max(math.ceil(q * len(means) - 1e-9) - 1, 0)]

    return quantile(tail), quantile(1 - tail)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(numbers, min_size=1, max_size=4), min_size=1, max_size=4),
    st.sampled_from([0.5, 0.8, 0.95]),
)
def test_exact_interval_equals_brute_force(groups: list[list[float]], level: float) -> None:
    values = [v for g in groups for v in g]
    labels = [f"init {i}" for i, g in enumerate(groups) for _ in g]
    found = clustered(values, labels, level=level)
    low, high = by_hand(groups, level)
    assert found.value == pytest.approx(np.mean(values), abs=1e-9)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)
    assert (found.n, found.clusters, found.level) == (len(values), len(groups), level)


def test_three_inits_span_from_the_lowest_to_the_highest() -> None:
    values = [1.0, 2.0, 3.0, 10.0, 10.0, 10.0, 4.0, 5.0, 6.0]
    found = clustered(values, [0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert (found.low, found.high) == (2.0, 10.0)
    assert found.value == pytest.approx(51 / 9)
    assert str(found) == "5.67 [2.00, 10.00]"


def test_pairs_of_one_init_are_not_independent() -> None:
    """Nine equal values of three inits are three observations, not nine."""
    values = [0.0] * 3 + [5.0] * 3 + [10.0] * 3
    inits = [0] * 3 + [1] * 3 + [2] * 3
    wide = clustered(values, inits)
    narrow = clustered(values, range(9))
    assert wide.high - wide.low == 10 > narrow.high - narrow.low


def test_order_of_the_values_does_not_matter() -> None:
    values, inits = [1.0, 5.0, 2.0, 8.0, 3.0], ["a", "b", "a", "c", "b"]
    first = clustered(values, inits)
    for order in itertools.permutations(range(5)):
        again = clustered([values[i] for i in order], [inits[i] for i in order])
        assert again == first


def test_unequal_clusters_weigh_as_they_are() -> None:
    found = clustered([0.0, 9.0, 9.0], ["a", "b", "b"])
    assert found.value == 6.0
    assert (found.low, found.high) == (0.0, 9.0)
    half = clustered([0.0, 9.0, 9.0], ["a", "b", "b"], level=0.5)
    assert (half.low, half.high) == (0.0, 6.0), "draws ab and ba have the mean of all three"


def test_one_cluster_has_no_spread() -> None:
    """One init says nothing about others: whoever reads the interval has to look at clusters."""
    found = clustered([1.0, 3.0], ["a", "a"])
    assert found == Interval(2.0, 2.0, 2.0, 2, 1)


def test_many_clusters_are_sampled_the_same_way_every_time() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(5, 1, 40).tolist()
    found = clustered(values, range(40))
    assert found == clustered(values, range(40))
    assert found.clusters == 40
    # Close to what normal theory says: 5 ± 1.96 / sqrt(40).
    spread = 1.96 * np.std(values) / math.sqrt(40)
    assert found.low == pytest.approx(np.mean(values) - spread, abs=0.04)
    assert found.high == pytest.approx(np.mean(values) + spread, abs=0.04)


def test_sampling_takes_over_where_it_should_and_agrees() -> None:
    values = [float(i) for i in range(7)]
    sampled = clustered(values, range(7))
    low, high = by_hand([[v] for v in values])
    assert (sampled.low, sampled.high) == pytest.approx((low, high), abs=0.15)


def test_other_statistics() -> None:
    found = clustered([1.0, 2.0, 9.0], [0, 1, 2], statistic=lambda v: float(np.median(v)))
    assert (found.value, found.low, found.high) == (2.0, 1.0, 9.0)


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
