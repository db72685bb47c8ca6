"""Cycle-consistent matching: all networks and all layers at once, into one universe (C2M3).

Each network has for each group of units a doubly stochastic matrix into a universe, an order of
units that belongs to none of them. The sum over all pairs of ``<P_i(theta_i), P_j(theta_j)>`` rises
by Frank-Wolfe steps: the gradient at each matrix is the gain of a linear assignment, and all
matrices move towards the solutions together, as far as the objective rises. In the end each goes to
the permutation that it is next to. No layer is decided before another, and permutations between two
networks agree with those by way of a third. Source: Crisostomi et al. 2024, Section 3.2; our
chapter 2b.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from companion.core import deadline
from companion.core.errors import BadParameter
from companion.core.theta import Theta
from companion.rebasin.assignment import assign_again, assign_units
from companion.rebasin.spec import Permutations, Spec

AT = (1 / 3, 2 / 3, 1.0)
"""Where along a step the objective is computed. It is a polynomial there, of degree 4 where no
tensor has more than two axes that move, and at 0 its value and its slope are known."""

Soft = list[dict[str, Tensor]]
"""For each network: group -> matrix (units of the universe, units of the network), float64."""


def frank_wolfe(
    spec: Spec,
    thetas: Sequence[Theta],
    start: Sequence[Permutations],
    *,
    max_steps: int = 100,
    rtol: float = 1e-4,
) -> list[dict[str, Tensor]]:
    """Permutations of all networks into a universe, sought together.

    Arguments:
        thetas: state dicts that fit the spec.
        start: one set of permutations each. The matrices begin half-way between these and the
            mean of all orders: from permutations themselves, no step may lead away.
        max_steps: at most.
        rtol: it ends where a step raises the objective by less than this share of it.

    Returns:
        one set of permutations for each network, into the universe.

    Raises:
        BadParameter: see :func:`check_plain`.
    """
    check_plain(spec)
    laid = [
        {t: spec.lay_out(theta[t].detach().cpu().double(), t) for t in spec.objective}
        for theta in thetas
    ]
    soft = [{g: (_matrix(p) + 1 / len(p)) / 2 for g, p in own.items()} for own in start]
    prices: dict[tuple[int, str], Tensor] = {}  # of the last assignments: the next ones are near
    value, slopes = _slopes(spec, laid, soft)
    for _ in range(max_steps):
        deadline.stop_if_passed()
        goal: Soft = [{} for _ in slopes]
        for i, own in enumerate(slopes):
            for g, x in own.items():
                p, prices[i, g], _ = assign_again(x, prices.get((i, g)))
                goal[i][g] = _matrix(p)
        slope = sum(
            float((x * (to[g] - at[g])).sum())
            for own, to, at in zip(slopes, goal, soft, strict=True)
            for g, x in own.items()
        )
        found = [float(_objective(spec, laid, _between(soft, goal, alpha))) for alpha in AT]
        bent = [(v - value - slope * t) / t**2 for t, v in zip(AT, found, strict=True)]
        rest = np.polynomial.Polynomial.fit(AT, bent, len(AT) - 1)
        places = np.linspace(0, 1, 101)
        curve = value + slope * places + rest(places) * places**2
        soft, kept = _between(soft, goal, float(places[curve.argmax()])), soft
        before, (value, slopes) = value, _slopes(spec, laid, soft)
        if value <= before:
            soft = kept
            break
        if value - before <= rtol * abs(value):
            break
    return [{g: assign_units(x) for g, x in own.items()} for own in soft]


def check_plain(spec: Spec) -> None:
    """Refuse units inside of units, which one matrix does not move.

    Raises:
        BadParameter: the spec has some (attention heads, groups of GroupNorm).
    """
    if inner := [name for name, group in spec.groups.items() if group.within]:
        raise BadParameter(
            f"c2m3 is for networks without units inside of others, and here {inner[0]!r} are "
            "(of attention heads, or groups of GroupNorm). Match by passes (the command line: "
            "--method weights)."
        )


def _matrix(p: Tensor) -> Tensor:
    return torch.eye(len(p), dtype=torch.float64)[p]


def _between(here: Soft, there: Soft, alpha: float) -> Soft:
    pairs = zip(here, there, strict=True)
    return [{g: torch.lerp(x, goal[g], alpha) for g, x in own.items()} for own, goal in pairs]


def _slopes(spec: Spec, laid: Sequence[Theta], soft: Soft) -> tuple[float, Soft]:
    """The objective, and its gradient at each matrix."""
    soft = [{g: x.clone().requires_grad_() for g, x in own.items()} for own in soft]
    with torch.enable_grad():
        value = _objective(spec, laid, soft)
        found = iter(torch.autograd.grad(value, [x for own in soft for x in own.values()]))
    return float(value.detach()), [{g: next(found) for g in own} for own in soft]


def _objective(spec: Spec, laid: Sequence[Theta], soft: Soft) -> Tensor:
    """The sum over pairs of ``<P_i(theta_i), P_j(theta_j)>``, a number with a gradient.

    Arguments:
        laid: the networks' tensors in float64 as their axes see them.
    """
    total = torch.zeros((), dtype=torch.float64)
    for name in spec.objective:
        mixed = [_mixed(spec, t[name], name, own) for t, own in zip(laid, soft, strict=True)]
        squares = [x.square().sum() for x in mixed]
        total = total + (torch.stack(mixed).sum(0).square().sum() - torch.stack(squares).sum()) / 2
    return total


def _mixed(spec: Spec, x: Tensor, name: str, soft: dict[str, Tensor]) -> Tensor:
    """A tensor with each factor of its axes that moves multiplied by its matrix."""
    for dim, axis in enumerate(spec.axes.get(name, ())):
        if not spec.moves(axis):
            continue
        parts = []
        for start, block in spec.blocks(axis):
            part = x.narrow(dim, start, spec.length(block)).unflatten(dim, spec.sizes(block))
            for at, factor in enumerate(block, dim):
                if isinstance(factor, str):
                    part = torch.tensordot(soft[factor], part, ([1], [at])).movedim(0, at)
            parts.append(part.flatten(dim, dim + len(block) - 1))
        x = torch.cat(parts, dim) if len(parts) > 1 else parts[0]
    return x
