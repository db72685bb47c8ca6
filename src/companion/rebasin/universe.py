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
from companion.rebasin.assignment import assign_units
from companion.rebasin.spec import Permutations, Spec

AT = (0.25, 0.5, 0.75, 1.0)
"""Where along a step the objective is computed. It is a polynomial there, of degree 4 where no
tensor has more than two axes that move."""

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
    soft = [{g: (_matrix(p) + 1 / len(p)) / 2 for g, p in own.items()} for own in start]
    value = float(_objective(spec, thetas, soft))
    for _ in range(max_steps):
        deadline.stop_if_passed()
        goal = [
            {g: _matrix(assign_units(slope)) for g, slope in own.items()}
            for own in _slopes(spec, thetas, soft)
        ]
        found = [float(_objective(spec, thetas, _between(soft, goal, alpha))) for alpha in AT]
        curve = np.polynomial.Polynomial.fit((0.0, *AT), (value, *found), len(AT))
        places = np.linspace(0, 1, 101)
        new = _between(soft, goal, float(places[curve(places).argmax()]))
        before, value = value, float(_objective(spec, thetas, new))
        if value <= before:
            break
        soft = new
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


def _slopes(spec: Spec, thetas: Sequence[Theta], soft: Soft) -> Soft:
    """The gradient of the objective at each matrix."""
    soft = [{g: x.clone().requires_grad_() for g, x in own.items()} for own in soft]
    with torch.enable_grad():
        flat = [x for own in soft for x in own.values()]
        found = iter(torch.autograd.grad(_objective(spec, thetas, soft), flat))
    return [{g: next(found) for g in own} for own in soft]


def _objective(spec: Spec, thetas: Sequence[Theta], soft: Soft) -> Tensor:
    """The sum over pairs of ``<P_i(theta_i), P_j(theta_j)>``, a number with a gradient."""
    total = torch.zeros((), dtype=torch.float64)
    for name in spec.objective:
        mixed = [_mixed(spec, t[name], name, own) for t, own in zip(thetas, soft, strict=True)]
        squares = [x.square().sum() for x in mixed]
        total = total + (torch.stack(mixed).sum(0).square().sum() - torch.stack(squares).sum()) / 2
    return total


def _mixed(spec: Spec, tensor: Tensor, name: str, soft: dict[str, Tensor]) -> Tensor:
    """A tensor as its axes see it, with each factor that moves multiplied by its matrix."""
    x = spec.lay_out(tensor.detach().cpu().double(), name)
    for dim, axis in enumerate(spec.axes.get(name, ())):
        parts = []
        for start, block in spec.blocks(axis):
            part = x.narrow(dim, start, spec.length(block)).unflatten(dim, spec.sizes(block))
            for at, factor in enumerate(block, dim):
                if isinstance(factor, str):
                    part = torch.tensordot(soft[factor], part, ([1], [at])).movedim(0, at)
            parts.append(part.flatten(dim, dim + len(block) - 1))
        x = torch.cat(parts, dim)
    return x
