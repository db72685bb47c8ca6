"""The largest eigenvalues of the Hessian, and its trace, from products with vectors alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from companion.core.errors import BadParameter, whole
from companion.core.seeds import Key
from companion.core.theta import Theta
from companion.landscape.directions import Direction, unflattened
from companion.landscape.local import Surface


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The largest eigenvalues of the Hessian.

    Arguments:
        values: the largest first, in nats per unit of squared distance.
        errors: ‖H v - λ v‖ of each: so near to each value there is an eigenvalue.
        vectors: of length 1, over the parameters.
        products: how many times the Hessian was multiplied.
        lowest: the smallest Ritz value: an upper bound on the smallest eigenvalue, which is not
            positive where the network can still go downhill by curvature.
    """

    values: tuple[float, ...]
    errors: tuple[float, ...]
    vectors: tuple[Direction, ...]
    products: int
    lowest: float


def top_eigenvalues(
    surface: Surface,
    theta: Theta,
    count: int = 5,
    *,
    key: Key | None = None,
    tolerance: float = 1e-3,
    most: int = 200,
    kept: int | None = None,
) -> Spectrum:
    """The largest eigenvalues of the Hessian over the parameters, with eigenvectors.

    Lanczos with full reorthogonalisation; when ``kept`` vectors are there it begins again from the
    best of them (thick restart), so memory stays bounded.

    Arguments:
        count: how many.
        key: of the random start.
        tolerance: stop when every error is below this times the largest value.
        most: stop after so many products all the same; the errors say how far it came.
        kept: vectors in memory, at least ``count`` + 2; default twice ``count`` + 10.

    Raises:
        BadParameter: more than there are parameters, or too few kept.

    Source: Golub & Van Loan, Section 10.1; Wu & Simon 2000 for the restart.
    """
    whole("count", count, 1)
    names = surface.layout.parameters
    size = sum(theta[n].numel() for n in names)
    room = min(2 * count + 10 if kept is None else kept, size)
    if count > size or (room < count + 2 and room < size):
        raise BadParameter(
            f"count: {count} eigenvalues of {size} parameters with {room} vectors kept; "
            f"at least {count + 2} have to be kept."
        )
    times = surface.hessian(theta)
    basis = torch.zeros(room, size, dtype=surface.dtype, device=surface.device)
    generator = (key or Key("landscape", "lanczos")).generator()
    first = torch.randn(size, generator=generator, dtype=torch.float64)
    basis[0] = (first / first.norm()).to(basis)
    matrix = torch.zeros(room, room, dtype=torch.float64)
    at, products, lowest = 0, 0, math.inf
    while True:
        w = times(basis[at])
        products += 1
        column = torch.zeros(at + 1, dtype=torch.float64)
        for _ in range(2):  # twice is enough
            part = basis[: at + 1] @ w
            w = w - part @ basis[: at + 1]
            column += part.double().cpu()
        matrix[at, : at + 1] = matrix[: at + 1, at] = column
        at += 1
        beta = float(w.norm())
        values, weights = torch.linalg.eigh(matrix[:at, :at])
        values, weights = values.flip(0), weights.flip(1)
        lowest = min(lowest, float(values[-1]))
        errors = (beta * weights[-1].abs())[:count]
        scale = float(values.abs().max())
        closed = beta <= 1e-10 * max(scale, 1e-300)  # what is spanned is all that H reaches
        done = at >= count and bool((errors <= tolerance * scale).all())
        if done or closed or products >= max(most, count) or at == size:
            break
        if at == room:
            at = min(count + (room - count) // 2, room - 1)
            for part in basis.split(1 << 20, dim=1):  # in place: a second basis would not fit
                part[:at] = weights[:, :at].T.to(basis) @ part
            matrix.zero_()
            matrix.diagonal()[:at] = values[:at]
        basis[at] = w / beta
    vectors = weights[:, :count].T.to(basis) @ basis[: len(weights)]
    found = tuple(unflattened(v, theta, names) for v in vectors)
    return Spectrum(tuple(values[:count].tolist()), tuple(errors.tolist()), found, products, lowest)


@dataclass(frozen=True)
class Estimate:
    """A mean of random draws, and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Trace:
    """The trace of the Hessian, of the whole network and of each block on the diagonal."""

    whole: Estimate
    blocks: Mapping[str, Estimate]


def hessian_trace(
    surface: Surface,
    theta: Theta,
    *,
    probes: int = 30,
    key: Key | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Trace:
    """The trace of the Hessian over the parameters: Hutchinson's estimate with random signs.

    Arguments:
        probes: products with the Hessian, 2 or more; the error falls with their square root.
        key: of the signs.
        groups: label -> entries, for the blocks.

    Source: Hutchinson 1989.
    """
    whole("probes", probes, 2)
    names = surface.layout.parameters
    times, size = surface.hessian(theta), sum(theta[n].numel() for n in names)
    found: dict[str, list[float]] = {label: [] for label in ("", *(groups or {}))}
    for number in range(probes):
        generator = (key or Key("landscape", "trace")).fold(number).generator()
        signs = 2 * torch.randint(2, (size,), generator=generator).to(surface.device) - 1
        terms = unflattened(signs * times(signs).double(), theta, names)
        sums = {n: float(v.sum()) for n, v in terms.items()}
        found[""].append(sum(sums.values()))
        for label, entries in (groups or {}).items():
            found[label].append(sum(sums.get(n, 0.0) for n in entries))
    made = {label: _estimate(values) for label, values in found.items()}
    return Trace(made.pop(""), made)


def _estimate(values: Sequence[float]) -> Estimate:
    v = torch.tensor(values, dtype=torch.float64)
    return Estimate(float(v.mean()), float(v.std()) / math.sqrt(len(v)))
