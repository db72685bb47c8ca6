"""The linear assignment problem, plain and nested: which unit goes where, given all pairs' gains.

Git Re-Basin (Ainsworth et al. 2023), Section 3.1 and 3.2: with all other permutations fixed, the
best permutation of one group is a linear assignment. The nested problem is that of heads and of the
units inside of them: every pair of heads has an assignment of its own. Our chapter 2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from companion.core.errors import BadParameter

SWEEPS = 8
"""Sweeps of :func:`prices`. More make the next assignment faster still, but cost more than that."""


def assign_units(gain: Tensor, price: Tensor | None = None) -> Tensor:
    """The permutation p that maximises ``sum_i gain[i, p[i]]``.

    Where every row has its maximum in another column, those maxima are the answer, as no sum can
    exceed theirs; only otherwise is the assignment problem solved (SciPy's shortest augmenting
    paths, cubic in n).

    Arguments:
        gain: shape (n, n), on any device.
        price: shape (n,), for each column, from :func:`prices` of a problem much like this one.
            Prices taken off columns change no optimum, only how fast it is found.

    Returns:
        int64, shape (n,), on the CPU.
    """
    if gain.dim() != 2 or gain.shape[0] != gain.shape[1]:
        raise BadParameter(f"assignment: a square matrix expected, got {tuple(gain.shape)}.")
    if not bool(torch.isfinite(gain).all()):
        raise BadParameter("assignment: the gains hold NaN or infinite values.")
    if gain.shape[0] == 0:
        return torch.empty(0, dtype=torch.int64)
    if price is not None:
        gain = gain - price
    top = gain.argmax(1)
    if bool(top.bincount(minlength=len(top)).eq(1).all()):
        return top.cpu()
    if price is not None:
        gain -= gain.gather(1, top.unsqueeze(1))
    return _solved(gain.cpu())


def prices(gain: Tensor, p: Tensor, price: Tensor | None = None) -> Tensor:
    """Prices of columns at which the assignment ``p`` is (nearly) every row's own best choice.

    They are the dual of the assignment problem: at the right prices each row prefers the column it
    has. Found by Bellman-Ford sweeps over ``price[p[k]] >= price[p[i]] + gain[i, p[k]] -
    gain[i, p[i]]``; ended early they are no worse for :func:`assign_units`, exact at any prices.

    Arguments:
        gain: shape (n, n).
        p: its best assignment.
        price: to begin with, default 0.
    """
    p = p.to(gain.device)
    loss = gain[:, p]
    loss -= loss.diagonal().clone().unsqueeze(1)
    new = torch.zeros_like(loss[0]) if price is None else price[p]
    room = torch.empty_like(loss)
    for _ in range(SWEEPS):
        new = torch.maximum(new, torch.add(loss, new.unsqueeze(1), out=room).amax(0))
    out = torch.empty_like(new)
    out[p] = new
    return out


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
