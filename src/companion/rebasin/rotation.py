"""Rotations of the residual stream of a folded GPT network, with heads and MLP units permuted.

The symmetries of a transformer are more than permutations. In folded coordinates
(:mod:`companion.rebasin.folding`) the whole stream may be turned by any orthogonal Q that keeps
the all-ones direction; so may, inside a head, queries and keys together, and values. ::

    folding = fold(module, x)
    a, b = folding.apply(theta_a), folding.apply(theta_b)
    found = rotation_matching(folding, a, b)      # or activation_rotation(…, inputs)
    moved = found.apply(b)                        # B's function, close to A

How they are found is in :mod:`companion.rebasin.rotating`. Source: Theus et al. 2025 (generalised
linear mode connectivity for transformers); Schönemann 1966 for the Procrustes problem; chapter 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from companion.core.errors import BadParameter
from companion.core.theta import Theta, check_theta
from companion.rebasin.folding import Folding, same
from companion.rebasin.spec import Permutations, Spec, Use

HEADS = ("permuted", "rotated")
"""What may be done inside a head: its units are permuted; or queries and keys are turned by one
orthogonal matrix, and values by another."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """What brings a folded network B close to a folded network A.

    Arguments:
        folding: the architecture.
        stream: orthogonal, float64 (D, D), on the CPU; keeps the all-ones direction: the new stream
            is ``stream @ old``.
        perms: of heads and units (:attr:`companion.rebasin.folding.Folding.units`), made first.
        inner: group inside of heads -> orthogonal, float64 (heads, d, d), made after ``perms``;
            empty if inner units are only permuted.
        method: ``weights`` or ``activations``.
        heads: one of :data:`HEADS`.
        objective: ``<A, T(B)>`` over the weights at this transformation T.
        before: nothing done;
            bound: what it cannot exceed, ``|A| |B|`` tensor by tensor.
        history: the objective from the beginning, after every half-step.
        iterations: of both half-steps.
        converged: the last one gained nothing.
        seconds: of wall-clock time.
    """

    folding: Folding = field(repr=False)
    stream: Tensor = field(repr=False)
    perms: Permutations = field(repr=False)
    inner: Mapping[str, Tensor] = field(repr=False)
    method: str
    heads: str
    objective: float
    before: float
    bound: float
    history: tuple[float, ...] = field(repr=False)
    iterations: int
    converged: bool
    seconds: float = 0.0

    @property
    def share(self) -> float:
        """The objective as a share of its upper bound, at most 1."""
        return self.objective / self.bound if self.bound else float("nan")

    @property
    def turned(self) -> float:
        """How far the stream is turned: 1 - trace(Q) / D, 0 for no turn, about 1 for any one."""
        return 1 - float(self.stream.trace()) / len(self.stream)

    def apply(self, theta: Theta, *, check_outputs: bool = True) -> dict[str, Tensor]:
        """B in A's coordinates.

        Arguments:
            theta: B, folded. Sums are done in float64, results have its dtype.
            check_outputs: run B and the result on the example, in float64 throughout, and refuse
                if they differ.

        Returns:
            a new state dict of the folded architecture.

        Raises:
            BadParameter: ``theta`` is none of the folded architecture. Unproven: outputs differ.
        """
        check_theta(self.folding.module, theta, "B")
        wide = transform(self.folding, theta, self.stream, self.perms, self.inner)
        if check_outputs:
            same(self.folding.module, theta, self.folding.module, wide, self.folding.spec.example)
        return {k: v.to(theta[k].dtype) for k, v in wide.items()}

    def summary(self) -> dict[str, Any]:
        """Everything but the transformation itself, JSON-able."""
        return {
            "method": self.method,
            "heads": self.heads,
            "objective": self.objective,
            "before": self.before,
            "bound": self.bound,
            "share": self.share,
            "share before": self.before / self.bound if self.bound else float("nan"),
            "turned": self.turned,
            "iterations": self.iterations,
            "converged": self.converged,
            "history": list(self.history),
            "seconds": self.seconds,
        }


def procrustes(gain: Tensor) -> Tensor:
    """The orthogonal Q with ``Q 1 = 1`` that maximises ``sum_ij gain[i, j] Q[i, j]``.

    On the complement of the all-ones direction it is the orthogonal factor of the gain's polar
    decomposition, from one SVD. Reflections are allowed.

    Arguments:
        gain: float64 (D, D): inner products of coordinate i of A and coordinate j of B.

    Returns:
        float64 (D, D), on the device of ``gain``.

    Raises:
        BadParameter: ``gain`` is not square, or not finite.
    """
    if gain.dim() != 2 or gain.shape[0] != gain.shape[1]:
        raise BadParameter(f"procrustes: a square matrix expected, got {tuple(gain.shape)}.")
    if not bool(torch.isfinite(gain).all()):
        raise BadParameter("procrustes: the gains hold NaN or infinite values.")
    gain = gain.double()
    rest = _complement(len(gain)).to(gain.device)
    q = rest @ polar(rest.T @ gain @ rest) @ rest.T
    return q + 1 / len(gain)


def random_rotation(width: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal Q with ``Q 1 = 1``, float64 (width, width)."""
    return procrustes(torch.randn(width, width, generator=generator, dtype=torch.float64))


def rotate(folding: Folding, theta: Theta, q: Tensor) -> dict[str, Tensor]:
    """A folded network with its residual stream turned by ``q``: the same function.

    Arguments:
        theta: a state dict of the folded architecture.
        q: orthogonal (D, D), keeps the all-ones
            direction.

    Returns:
        a new state dict, in float64.

    Raises:
        BadParameter: ``q`` is no such matrix.
    """
    check_rotation(q, folding.width)
    return transform(folding, theta, q)


def check_rotation(q: Tensor, width: int) -> Tensor:
    """``q`` in float64, if it is orthogonal and keeps the all-ones direction.

    Raises:
        BadParameter: it is another matrix; the message says by how much.
    """
    if q.shape != (width, width) or not bool(torch.isfinite(q).all()):
        raise BadParameter(
            f"rotation: {width} x {width} finite numbers are needed, got shape {tuple(q.shape)}"
            f"{'' if q.shape != (width, width) else ' with NaN or infinite ones'}."
        )
    q = q.detach().double()
    one = torch.ones(width, dtype=q.dtype, device=q.device)
    off = max(float((q @ q.T - one.diag()).abs().max()), float((q @ one - one).abs().max()))
    if off > 1e-9:
        raise BadParameter(
            f"rotation: the matrix is off by {off:.2g} from an orthogonal one that keeps the "
            "all-ones direction, which LayerNorm removes. procrustes() and random_rotation() make "
            "such matrices."
        )
    return q


@torch.no_grad()
def transform(
    folding: Folding,
    theta: Theta,
    q: Tensor | None = None,
    perms: Permutations | None = None,
    inner: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """A folded network with heads and units permuted, heads turned inside, and the stream turned.

    Arguments:
        theta: a state dict.
        q, perms, inner: as :class:`Rotation` has them; None leaves them out.

    Returns:
        a new state dict, floating-point entries in float64. Nothing is checked here.
    """
    units = folding.units
    out = {k: v.detach().double() if v.is_floating_point() else v for k, v in theta.items()}
    if perms is not None:
        out = {k: units.permute_tensor(v, k, perms) for k, v in out.items()}
    for group, turns in (inner or {}).items():
        for use in units.uses[group]:
            out[use.tensor] = _turn_heads(units, out[use.tensor], use, turns)
    if q is not None:
        for use in folding.spec.uses[folding.stream]:
            x = out[use.tensor].movedim(use.dim, 0)
            out[use.tensor] = torch.tensordot(q.to(x), x, 1).movedim(0, use.dim)
    return {k: v.contiguous() for k, v in out.items()}


def _turn_heads(spec: Spec, x: Tensor, use: Use, turns: Tensor) -> Tensor:
    """One tensor with the units inside of each head turned, at one place."""
    length = spec.length(use.block)
    part = x.narrow(use.dim, use.start, length).movedim(use.dim, 0)
    new = torch.einsum("hij,hj...->hi...", turns.to(x), part.unflatten(0, turns.shape[:2]))
    out = x.clone()
    out.narrow(use.dim, use.start, length).copy_(new.flatten(0, 1).movedim(0, use.dim))
    return out


def polar(x: Tensor) -> Tensor:
    """The orthogonal matrix that maximises the inner product with ``x``; batched."""
    u, _, vh = torch.linalg.svd(x)
    found: Tensor = u @ vh
    return found


def _complement(size: int) -> Tensor:
    """An orthonormal basis of the complement of the all-ones direction, float64 (size, size - 1).

    Columns of the Householder reflection that takes the first unit vector to the all-ones
    direction.
    """
    v = torch.full((size,), -(size**-0.5), dtype=torch.float64)
    v[0] += 1
    norm = float(v @ v)
    eye = torch.eye(size, dtype=torch.float64)
    return (eye - (2 / norm) * torch.outer(v, v) if norm else eye)[:, 1:]
