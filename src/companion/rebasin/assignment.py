"""The linear assignment problem, plain and nested: which unit goes where, given all pairs' gains.

Git Re-Basin (Ainsworth et al. 2023), Section 3.1 and 3.2: with all other permutations fixed, the
best permutation of one group is a linear assignment. The nested problem is that of heads and of the
units inside of them: every pair of heads has an assignment of its own. Our chapter 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from companion.core.errors import BadParameter

SWEEPS = 6
"""Of :func:`prices`: more make the next assignment faster still, but cost more than that."""

EPSILON = 0.01
"""The least bid of the auction before an exact assignment, in standard deviations of the gains."""

ROUNDS = 200
"""Of an auction, at most."""

LEFT = 0.05
"""Share of the rows at which an auction ends: the last few bid for long, and the solver has them
at once."""


def assign_units(gain: Tensor) -> Tensor:
    """The permutation p that maximises ``sum_i gain[i, p[i]]``.

    Where every row has its maximum in another column, those maxima are the answer, as no sum can
    exceed theirs; only otherwise is the assignment problem solved (SciPy's shortest augmenting
    paths, cubic in n).

    Arguments:
        gain: shape (n, n), on any device.

    Returns:
        int64, shape (n,), on the CPU.
    """
    if gain.dim() != 2 or gain.shape[0] != gain.shape[1]:
        raise BadParameter(f"assignment: a square matrix expected, got {tuple(gain.shape)}.")
    if not bool(torch.isfinite(gain).all()):
        raise BadParameter("assignment: the gains hold NaN or infinite values.")
    return assign_again(gain)[0]


def assign_again(
    gain: Tensor, price: Tensor | None = None, epsilon: float = 0.0
) -> tuple[Tensor, Tensor, bool]:
    """:func:`assign_units` for a problem that comes again and again, each time a little changed.

    Prices taken off columns change no optimum, only how fast it is found: at the right ones, the
    dual of the assignment problem, each row's best column is the one it gets. Where many rows want
    the same columns these are first sold by auction (Bertsekas 1979), all rows bidding at once,
    which finds prices that are nearly right. The solver then is exact at any prices.

    Arguments:
        gain: shape (n, n), on any device.
        price: shape (n,), for each column, from the last time; default 0.
        epsilon: where columns are contested, take the auction's own assignment, in standard
            deviations of the gains: each row it serves has a column within that of its best one.
            0: the exact assignment.

    Returns:
        the permutation, int64, on the CPU; prices for the next time, float64; and whether it is
        the exact one: with ``epsilon`` too, where no column is contested.

    Raises:
        BadParameter: the gains hold NaN or infinite values.
    """
    n = len(gain)
    new = torch.zeros(n, dtype=torch.float64, device=gain.device) if price is None else price
    net = gain if price is None else gain - price
    highest, top = net.max(1)
    if not bool(torch.isfinite(highest.sum())):
        raise BadParameter("assignment: the gains hold NaN or infinite values.")
    contested = n - len(top.unique())
    if not contested:
        p = top.cpu()
    elif epsilon:
        more, p = _auction(net.cpu().numpy(), epsilon)
        return p, new + more.to(new), False
    else:
        if 8 * contested > n:
            new = new + _auction(net.cpu().numpy(), EPSILON, whole=False)[0].to(new)
            net = gain - new
            highest = net.amax(1)
        p = _solved((net - highest.unsqueeze(1)).cpu())
    return p, new + prices(net, p.to(net.device)), True


def _auction(gain: Any, epsilon: float, whole: bool = True) -> tuple[Tensor, Tensor]:
    """Prices at which most rows have a column of their own that they like best, or nearly so.

    Each row without a column bids for its best what makes that as good as its second best, and
    ``epsilon`` standard deviations on top; the highest bid gets it, and whoever had it bids again.
    With ``whole`` also that assignment, in which the rows left over share what is not sold.
    """
    n, exact = len(gain), gain
    gain = gain.astype("float32")
    price = np.zeros(n, dtype="float32")
    least = epsilon * gain.std()
    waiting, owner = np.arange(n), np.full(n, -1)
    for _ in range(ROUNDS):
        if len(waiting) <= LEFT * n:
            break
        net = gain[waiting]
        net -= price
        rows, best = np.arange(len(waiting)), net.argmax(1)
        first = net[rows, best]
        net[rows, best] = -np.inf
        bid = price[best] + (first - net.max(1) + least)
        order = bid.argsort()
        price[best[order]] = bid[order]  # of several for one column the last one stays
        before = owner[best]
        owner[best[order]] = waiting[order]
        won = owner[best] == waiting
        lost = before[won]
        waiting = np.concatenate([waiting[~won], lost[lost >= 0]])
    p = np.empty(n, dtype="int64")
    if whole:
        sold, free = np.flatnonzero(owner >= 0), np.flatnonzero(owner < 0)
        p[owner[sold]] = sold
        p[waiting] = free[linear_sum_assignment(exact[np.ix_(waiting, free)], maximize=True)[1]]
    return torch.from_numpy(price.astype("float64")), torch.from_numpy(p)


def prices(net: Tensor, p: Tensor) -> Tensor:
    """Prices, on top of those taken off, at which ``p`` is (nearly) every row's best by a margin.

    At the prices a solver ends with, many rows have a second choice that is as good, and the least
    change of the gains makes them prefer it. So each sweep moves every price towards the middle
    between the highest at which its own row still prefers it and the lowest at which no other does:
    two thirds of the way, as all of them at once, moved all the way, can swing for ever.
    """
    n, rows = len(net), torch.arange(len(net), device=net.device)
    change = torch.zeros(n, dtype=torch.float64, device=net.device)
    if n < 2:
        return change
    margin = (net[rows, p].unsqueeze(1) - net).float()
    margin[rows, p] = math.inf
    of_column = torch.empty(n, device=net.device)
    for _ in range(SWEEPS):
        step = (margin.amin(1) - margin.amin(0)[p]) / 3
        of_column[p] = step
        change += of_column
        margin -= step.unsqueeze(1)
        margin += of_column
    return change


def assign_nested(
    outer: Tensor | None, grams: Mapping[str, Tensor], units: int
) -> tuple[Tensor, dict[str, Tensor], float]:
    """The best permutation of outer units, and one of inner units for each of them.

    With outer unit i of A matched with p[i] of B, the best order of the inner units is an
    assignment of its own, whose value is the gain of that pair; then the outer units are assigned.
    Exact, since inner permutations of different outer units do not touch each other.

    Arguments:
        outer: gains of matching outer units as they are, shape (units, units), or None.
        grams: for each inner group, with s units in each outer one, the gains of all pairs of
            inner units, shape (units * s, units * s), outer unit first.
        units: number of outer units.

    Returns:
        p, shape (units,); inner group -> q, shape (units, s), with q[i] an order of the inner units
        of outer unit p[i] of B; and the value reached. Index vectors are int64, on the CPU.
    """
    value = torch.zeros(units, units, dtype=torch.float64)
    if outer is not None:
        if outer.shape != value.shape:
            raise BadParameter(
                f"assignment: {(units, units)} gains of outer units expected, "
                f"got {tuple(outer.shape)}."
            )
        value += outer.cpu()
    inner = {}
    for name, gram in grams.items():
        side = gram.shape[0]
        if gram.dim() != 2 or gram.shape[1] != side or side % units:
            raise BadParameter(
                f"assignment: {name!r} has gains of shape {tuple(gram.shape)}; a square with "
                f"a multiple of {units} rows expected."
            )
        if not bool(torch.isfinite(gram).all()):
            raise BadParameter(f"assignment: the gains of {name!r} hold NaN or infinite values.")
        pairs = gram.reshape(units, side // units, units, side // units).transpose(1, 2).cpu()
        best = pairs.argmax(3)
        done = (best.sort(-1).values == torch.arange(pairs.shape[3])).all(-1)
        for i, j in (~done).nonzero().tolist():
            best[i, j] = _solved(pairs[i, j])
        inner[name] = best
        value += pairs.gather(3, best.unsqueeze(3)).sum((2, 3))
    p = assign_units(value)
    at = torch.arange(units)
    return p, {name: q[at, p] for name, q in inner.items()}, float(value[at, p].sum())


def _solved(gain: Tensor) -> Tensor:
    columns = linear_sum_assignment(gain.numpy(), maximize=True)[1]
    return torch.from_numpy(columns.astype("int64"))
