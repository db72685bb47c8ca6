"""Statistics of aligned pairs: intervals over pairs, trends pair by pair, shares of settings.

What becomes a verdict of chapter 2 is computed here from what :func:`companion.aligned.align`
returns. Pairs whose gates failed count nowhere. With three pairs or fewer an interval reaches from
the lowest to the highest (:func:`companion.stats.clustered`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from companion.stats import Interval, clustered, spearman

if TYPE_CHECKING:
    from companion.aligned import Aligned
    from companion.pairs import Pair


def interval(results: Sequence[Aligned], value: Callable[[Aligned], float]) -> Interval | None:
    """Mean and interval of ``value`` over the valid pairs; None without one.

    Pairs that share a network are not independent: chains of them are one cluster.
    """
    good = [r for r in results if r.valid and not math.isnan(value(r))]
    if not good:
        return None
    return clustered([value(r) for r in good], clusters([r.pair for r in good]))


def clusters(pairs: Sequence[Pair]) -> list[int]:
    """A label for every pair: equal for pairs that share a network, directly or by a chain."""
    labels = list(range(len(pairs)))
    ends = [{(p.a.init, p.a.order), (p.b.init, p.b.order)} for p in pairs]
    changed = True
    while changed:
        changed = False
        for i in range(len(pairs)):
            for j in range(i):
                if ends[i] & ends[j] and labels[i] != labels[j]:
                    labels[i] = labels[j] = min(labels[i], labels[j])
                    changed = True
    return labels


def trend(
    found: Mapping[int, Sequence[Aligned]], value: Callable[[Aligned], float], least: int = 4
) -> Interval | None:
    """Spearman's rank correlation of a number and a pair's value: mean and interval over pairs.

    A rank correlation of means has no interval, and few points give a strong one by chance; here
    every pair has its own. A pair whose value never changes has no trend: 0.

    Arguments:
        found: number (width, step) -> results, the same pairs in the same order under each.
        value: of a result, such as its loss barrier.
        least: fewest numbers at which a pair has to be valid to count.

    Returns:
        None if no pair counts.
    """
    values: list[float] = []
    pairs: list[Pair] = []
    for results in zip(*found.values(), strict=True):
        each = [(x, value(r)) for x, r in zip(found, results, strict=True) if r.valid]
        each = [(x, v) for x, v in each if not math.isnan(v)]
        if len(each) < least:
            continue
        rank = spearman([x for x, _ in each], [v for _, v in each])
        values.append(0.0 if math.isnan(rank) else rank)
        pairs.append(results[0].pair)
    return clustered(values, clusters(pairs)) if values else None


def failures(bad: Sequence[float], good: Sequence[float], limit: float = 2.0) -> Interval | None:
    """Share of settings that fail in one condition minus the share that fails in the other.

    Arguments:
        bad, good: a barrier for each setting under both conditions; NaN where nothing is valid,
            and a setting that has one counts in neither share.
        limit: a barrier of as much or more is a failure.

    Returns:
        difference and interval, each setting a cluster of its own; None without a setting.
    """
    both = [
        float(b >= limit) - float(g >= limit)
        for b, g in zip(bad, good, strict=True)
        if not (math.isnan(b) or math.isnan(g))
    ]
    return clustered(both, range(len(both))) if both else None
