"""Directions in weight space, and steps along them.

A direction is a mapping like a state dict: entry -> step, float64. Entries that it does not name
stay where they are. ::

    u = towards(net, a, b)                            # to another network
    v = random_direction(net, a, Key("v"))            # filter by filter as long as a's weights
    theta = moved(a, u, 0.5)                          # the middle between a and b

The leading eigenvectors of the Hessian come from :func:`companion.landscape.top_eigenvalues`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from companion.core.effective import only_plain
from companion.core.errors import BadParameter, whole
from companion.core.seeds import Key
from companion.core.theta import Theta, check_theta, flatten, layout

Direction = Theta
"""Entry -> step. In mode ``interpolate`` BatchNorm's statistics are entries that move, too."""


def towards(module: nn.Module, a: Theta, b: Theta) -> dict[str, torch.Tensor]:
    """``b - a``: one step leads from network A to network B.

    Arguments:
        module: the architecture.
        a, b: state dicts of it.

    Returns:
        the direction, over parameters and floating-point buffers: all that a path moves.

    Raises:
        BadParameter: a network that does not fit the module.
    """
    only_plain(module)
    for theta, name in ((a, "A"), (b, "B")):
        check_theta(module, theta, name)
    return {n: b[n].double() - a[n].double() for n in layout(module).floating}


def random_direction(
    module: nn.Module, theta: Theta, key: Key, *, filters: bool = True
) -> dict[str, torch.Tensor]:
    """A Gaussian direction over the parameters.

    Arguments:
        module, theta: the network it starts from.
        key: equal keys, equal directions.
        filters: scale each filter (what makes one output: a row of a matrix, a slice of a
            convolution) to the length of ``theta``'s own filter, and leave biases and norms where
            they are, so that networks of other scales can be compared. Else the whole direction has
            length 1.

    Source: Li et al. 2018, Section 4.
    """
    only_plain(module)
    check_theta(module, theta, "theta")
    generator = key.generator()
    out: dict[str, torch.Tensor] = {}
    for name in layout(module).parameters:
        own = theta[name].double()
        draw = torch.randn(own.shape, generator=generator, dtype=torch.float64).to(own.device)
        if filters:
            if own.dim() < 2:
                continue
            rows, sizes = draw.flatten(1), own.flatten(1).norm(dim=1, keepdim=True)
            draw = (rows / rows.norm(dim=1, keepdim=True) * sizes).view_as(own)
        out[name] = draw
    return out if filters else scaled(out, 1 / length(out))


@dataclass(frozen=True, eq=False)
class Principal:
    """The principal components of a trajectory.

    Arguments:
        directions: orthonormal, the largest variance first.
        shares: of the squared distances from the origin that each of them holds.
    """

    directions: tuple[Direction, ...]
    shares: tuple[float, ...]


def principal_directions(
    module: nn.Module, trajectory: Sequence[Theta], *, origin: Theta | None = None, count: int = 2
) -> Principal:
    """The orthonormal directions in which a trajectory spreads most, over the parameters.

    Arguments:
        module: the architecture.
        trajectory: state dicts along training.
        origin: what distances are measured from, such as the last state (Li et al. 2018, Section
            7); None: the mean of the trajectory, as PCA is usually done.
        count: how many directions.

    Raises:
        BadParameter: the trajectory spans fewer dimensions than that.
    """
    whole("count", count, 1)
    only_plain(module)
    names = layout(module).parameters
    for number, theta in enumerate(trajectory):
        check_theta(module, theta, f"{number} of the trajectory")
    rows = torch.stack([flatten(theta, names) for theta in trajectory])
    rows = rows - (rows.mean(0) if origin is None else flatten(origin, names).to(rows.device))
    squares, vectors = torch.linalg.eigh(rows @ rows.T)  # of n × n: cheaper than an SVD of n × P
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    rank = int((squares > 1e-12 * squares[0]).sum()) if squares[0] > 0 else 0
    if rank < count:
        raise BadParameter(
            f"trajectory: {len(rows)} states span {rank} dimensions; {count} were asked for."
        )
    basis = torch.linalg.qr((vectors[:, :count].T @ rows).T).Q.T
    found = tuple(unflattened(row, trajectory[0], names) for row in basis)
    return Principal(found, tuple((squares[:count] / squares.sum()).tolist()))


def unflattened(vector: torch.Tensor, like: Theta, names: Sequence[str]) -> Direction:
    """What :func:`companion.core.theta.flatten` made one vector of, entry by entry again."""
    parts = vector.split([like[n].numel() for n in names])
    return {n: part.view(like[n].shape) for n, part in zip(names, parts, strict=True)}


def inner(u: Direction, v: Direction) -> float:
    """The inner product; an entry that one of the two does not name is 0 there."""
    return float(sum(float((u[n].double() * v[n].to(u[n].device)).sum()) for n in u if n in v))


def length(u: Direction) -> float:
    """The Euclidean length."""
    return math.sqrt(inner(u, u))


def scaled(u: Direction, factor: float) -> dict[str, torch.Tensor]:
    """``factor`` times the direction."""
    return {n: factor * v for n, v in u.items()}


def combined(terms: Iterable[tuple[float, Direction]]) -> dict[str, torch.Tensor]:
    """The sum of weighted directions."""
    out: dict[str, torch.Tensor] = {}
    for weight, u in terms:
        for name, step in u.items():
            out[name] = out[name] + weight * step if name in out else weight * step
    return out


def restricted(u: Direction, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The part of the direction that moves the named entries only."""
    return {n: u[n] for n in names if n in u}


def moved(theta: Theta, u: Direction, step: float = 1.0) -> dict[str, torch.Tensor]:
    """``theta + step * u``, in float64 and then rounded to the types of ``theta``.

    Raises:
        BadParameter: the direction has an entry that the network lacks, or of another shape.
    """
    out = dict(theta)
    for name, value in u.items():
        if name not in theta or theta[name].shape != value.shape:
            raise BadParameter(
                f"direction: {name} {tuple(value.shape)} is no entry of the network."
            )
        own = theta[name]
        out[name] = (own.double() + step * value.double().to(own.device)).to(own.dtype)
    return out
