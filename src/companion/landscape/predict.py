"""What the ends of a path say about its barrier, and what its curvature says exactly.

f(α) is the loss on a path from A to B, and B(α) = f(α) - (1 - α) f(0) - α f(1) the barrier: above
the straight line between the ends, signed. Exactly, B(α) = -∫ G(α, t) f''(t) dt with the weights
G(α, t) = min(α, t) (1 - max(α, t)): a barrier is negative curvature on the way, a ridge
(:func:`weighted_curvature`). The predictors know the ends alone. A predictor is worth something
only if it ranks pairs better than the distance between the two networks does. ::

    ends = [surface.local(theta, towards(net, a, b)) for theta in (a, b)]
    predictions(*ends)["quintic"]

Source: ours, as the theorem of Singh et al. 2024 could not be read; our chapter 6.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from companion.core.errors import BadParameter
from companion.core.theta import Theta, flatten
from companion.landscape.local import Blocks, Local


def _checked(at: float) -> float:
    if not 0 < at < 1:
        raise BadParameter(f"at: {at!r} must lie between 0 and 1, the ends of the path.")
    return at


def curvature_only(a: Local, b: Local, at: float = 0.5) -> float:
    """α(1-α)/2 (α f''(0) + (1-α) f''(1)): right if the loss is stationary at both ends.

    Never negative between two minima, though the loss may well be lower between them.
    """
    _checked(at)
    return at * (1 - at) / 2 * (at * a.curvature + (1 - at) * b.curvature)


def two_sided_taylor(a: Local, b: Local, at: float = 0.5) -> float:
    """The second-order expansions around both ends, the nearer one counting more.

    α(1-α) (f'(0) - f'(1)) + :func:`curvature_only`; at ½ it is exact up to cubics.
    """
    return at * (1 - at) * (a.slope - b.slope) + curvature_only(a, b, at)


def _hermite(a: Local, b: Local, at: float, order: int) -> float:
    from scipy.interpolate import BPoly

    rise = b.loss - a.loss  # of the straight line, which is taken off first: no digits are lost
    ends = [[0.0, v.slope - rise, v.curvature][: order + 1] for v in (a, b)]
    return float(BPoly.from_derivatives([0, 1], ends)(_checked(at)))


def cubic_hermite(a: Local, b: Local, at: float = 0.5) -> float:
    """The cubic with the values and slopes of both ends: at ½, (f'(0) - f'(1)) / 8."""
    return _hermite(a, b, at, 1)


def quintic_hermite(a: Local, b: Local, at: float = 0.5) -> float:
    """The quintic with values, slopes and curvatures of both ends.

    At ½, 5/32 (f'(0) - f'(1)) + (f''(0) + f''(1)) / 64: the same data as the Taylor expansions, and
    a remainder of order six.
    """
    return _hermite(a, b, at, 2)


PREDICTORS: Mapping[str, Callable[[Local, Local, float], float]] = {
    "taylor": two_sided_taylor,
    "curvature": curvature_only,
    "cubic": cubic_hermite,
    "quintic": quintic_hermite,
}
"""Name -> (at A, at B, α) -> the barrier that it expects; both along the direction from A to B."""


def predictions(a: Local, b: Local, at: float = 0.5) -> dict[str, float]:
    """What each of :data:`PREDICTORS` expects, in nats."""
    return {name: predict(a, b, at) for name, predict in PREDICTORS.items()}


def group_prediction(base: Blocks, other: float, labels: Collection[str]) -> float:
    """The barrier at the middle if these blocks move and the others stay at the base network.

    (L₁ - L₂)/2 + ½ g · PΔ + ⅛ Δᵀ P H P Δ, where P keeps the blocks, predicts
    L(θ₁ + PΔ/2) - (L₁ + L₂)/2. In it are the curvatures of single blocks and those between them.

    Arguments:
        base: of network 1, along Δ towards network 2.
        other: loss of network 2.
        labels: of the blocks.

    Returns:
        nats.

    Raises:
        BadParameter: a label that is no block's.
    """
    if unknown := set(labels) - set(base.labels):
        raise BadParameter(f"blocks: {min(unknown)!r} is none of {', '.join(base.labels)}.")
    rows = [i for i, label in enumerate(base.labels) if label in labels]
    slope = sum(base.slopes[i] for i in rows)
    bend = sum(base.matrix[i][j] for i in rows for j in rows)
    return (base.loss - other) / 2 + slope / 2 + bend / 8


def layer_predictions(base: Blocks, other: float) -> dict[str, float]:
    """:func:`group_prediction` of each block alone, by its label."""
    return {label: group_prediction(base, other, (label,)) for label in base.labels}


def path_curvature(alphas: Sequence[float], losses: Sequence[float]) -> tuple[float, ...]:
    """f'' at each alpha, from the losses on the path alone: a spline of degree 5.

    Unlike the derivative at a point it contains the kinks of ReLUs.

    Raises:
        BadParameter: fewer than 7 points.
    """
    from scipy.interpolate import make_interp_spline

    if len(alphas) < 7:
        raise BadParameter(f"path: {len(alphas)} points; 7 or more are needed for a spline.")
    spline = make_interp_spline(np.asarray(alphas), np.asarray(losses), k=5)
    return tuple(spline.derivative(2)(np.asarray(alphas)).tolist())


def weighted_curvature(
    alphas: Sequence[float], curvatures: Sequence[float], at: float = 0.5
) -> float:
    """-∫ G(α, t) f''(t) dt, which is the barrier B(α): negative curvature raises it.

    Arguments:
        alphas: from 0 to 1.
        curvatures: f'' there; from :func:`path_curvature`, or measured by Hessian-vector products,
            which see a ReLU network's curvature between its kinks only. The rest is theirs.
        at: α.

    Returns:
        nats.
    """
    from scipy.interpolate import make_interp_spline

    x, _ = np.asarray(alphas, dtype=float), _checked(at)
    if x[0] != 0 or x[-1] != 1:
        raise BadParameter("path: the identity needs all of it, from 0 to 1.")
    spline = make_interp_spline(x, np.asarray(curvatures, dtype=float), k=min(3, len(x) - 1))
    # Cubic, as the second derivative of a spline of degree 5 is: of the losses' own it is exact.
    nodes, weights = np.polynomial.legendre.leggauss(4)  # exact: piecewise of degree 6

    def piece(low: float, high: float) -> float:
        t: NDArray[np.float64] = low + (high - low) * (nodes + 1) / 2
        bend = np.minimum(at, t) * (1 - np.maximum(at, t)) * spline(t)
        return float(weights @ bend) * (high - low) / 2

    cuts = np.unique(np.append(x, at)).tolist()
    return -sum(piece(low, high) for low, high in itertools.pairwise(cuts))


def cos_of_branches(a: Theta, b: Theta, base: Theta, names: Sequence[str]) -> float:
    """The cosine of the angle at ``base`` between the ways to A and to B.

    Arguments:
        base: the initialisation, or the state both forked from.
        names: entries that count: the parameters.
    """
    u, v = (flatten(t, names) - flatten(base, names) for t in (a, b))
    return max(-1.0, min(1.0, float(u @ v / (u.norm() * v.norm()))))
