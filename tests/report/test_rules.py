"""What the rules do by chance: under the null, few of them may come out "reproduced".

Three independent samples, as on most pages, and results without any effect: the true value lies on
the threshold (a sign, a size), or there is no order in it (a trend), or none of many is there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from test_claims import ENTRY, write

from companion.core import stats
from companion.core.stats import Interval
from companion.report import claims, claims_file

TIMES = 600
LIMIT = 0.05 + 2 * (0.05 * 0.95 / TIMES) ** 0.5  # two standard errors of the simulation
N = 3


def normal(rng: np.random.Generator) -> list[float]:
    return rng.normal(0, 1, N).tolist()


def skewed(rng: np.random.Generator) -> list[float]:
    """Barriers are mostly low and sometimes high; the mean is 0."""
    return (rng.exponential(1, N) - 1).tolist()


def paired(rng: np.random.Generator) -> list[float]:
    """Differences of two methods on one pair of networks, three pairs an initialisation."""
    return (rng.normal(0, 1, N).repeat(3) + rng.normal(0, 1, 3 * N)).tolist()


def mean(values: list[float]) -> Interval:
    return stats.clustered(values, np.arange(N).repeat(len(values) // N).tolist())


def all_pairs(rng: np.random.Generator) -> Interval:
    """Every pair of three networks, each of which has the luck of both."""
    luck, pairs = rng.normal(0, 1, N), list(itertools.combinations(range(N), 2))
    return stats.over_networks([float(luck[i] + luck[j]) for i, j in pairs], pairs)


def largest(rng: np.random.Generator) -> Interval:
    """The largest of five means, all of which lie on the threshold."""
    return stats.highest([(normal(rng), range(N)) for _ in range(5)])


def trend(rng: np.random.Generator) -> Interval:
    """Rank correlation of four widths with numbers that have no order, a pair each."""
    found = [stats.spearman(range(4), rng.normal(0, 1, 4).tolist()) for _ in range(N)]
    return mean(found)


def any_of_four(rng: np.random.Generator) -> float:
    """Whether any of four groups is better, each by an interval that is as wide as four need."""
    four = [stats.clustered(normal(rng), range(N), of=4) for _ in range(4)]
    return float(any(one.low > 0 for one in four))


CASES: dict[str, tuple[dict[str, object], Callable[[np.random.Generator], Interval | float]]] = {
    "sign": ({"op": ">", "value": 0.0}, lambda rng: mean(normal(rng))),
    "size": ({"op": "<=", "value": 0.0}, lambda rng: mean(normal(rng))),
    "pairs of shared networks": ({"op": "<", "value": 0.0}, lambda rng: mean(paired(rng))),
    "all pairs of some networks": ({"op": ">", "value": 0.0}, all_pairs),
    "the largest lies below": ({"op": "<", "value": 0.0}, largest),
    "band": ({"op": "between", "low": 0.0, "high": 9.0}, lambda rng: mean(normal(rng))),
    "trend": ({"op": "<", "value": -0.5}, trend),
    "any of many": ({"op": "true"}, any_of_four),
}


@pytest.mark.parametrize("name", CASES)
def test_by_chance_at_most_one_in_twenty_comes_out_reproduced(tmp_path, monkeypatch, name):
    test, draw = CASES[name]
    path = write(tmp_path, {**ENTRY, "test": test})
    monkeypatch.setattr(claims, "registry", lambda: claims_file.registry(path))
    rng = np.random.default_rng(0)
    found = [claims.judge("X1", draw(rng)).verdict for _ in range(TIMES)]
    assert found.count("reproduced") / TIMES <= LIMIT
    if test["op"] != "true":
        assert {"undetermined", "not reproduced"} <= set(found)


def test_skewed_results_are_no_worse_from_below(tmp_path, monkeypatch):
    """An interval that forgets the tail of barriers: "below" comes out more often, here counted."""
    path = write(tmp_path, {**ENTRY, "test": {"op": ">", "value": 0.0}})
    monkeypatch.setattr(claims, "registry", lambda: claims_file.registry(path))
    rng = np.random.default_rng(0)
    found = [claims.judge("X1", mean(skewed(rng))).verdict for _ in range(TIMES)]
    assert found.count("reproduced") / TIMES <= LIMIT
