"""Noise inside and outside the space that training moved through.

Take snapshots of networks while they train. What they span, around where they began, is the
*training space*; everything orthogonal to it is its null space. How much does a step of a given
length raise the loss, inside and outside? ::

    basis = span([difference(s, start, names) for s in snapshots])
    inside, outside = project(noise, basis), noise - project(noise, basis)

Snapshots have to be copies: views of live parameters all show the last step, and then the "span" of
a hundred snapshots has two dimensions. Source: Adilova et al. 2024, Section 5.2; our chapter 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from companion.connectivity import Walker
from companion.core.errors import BadParameter
from companion.core.seeds import Key
from companion.core.theta import Theta, flatten, snapshot
from companion.data import Dataset
from companion.training import Run, State, advance, build


def snapshots(run: Run, data: Dataset, count: int) -> list[dict[str, torch.Tensor]]:
    """The start of a run and ``count`` evenly spaced states of its training, each a copy.

    Raises:
        BadParameter: more snapshots than steps, or none.
    """
    if not 1 <= count <= run.last_step:
        raise BadParameter(f"snapshots: {count} of a run with {run.last_step} steps.")
    steps = [round(run.last_step * (i + 1) / count) for i in range(count)]
    module = build(run, data, data.train.x.device)
    start = snapshot(module)
    kept = [start]
    state = State(0, {k: v.clone() for k, v in start.items()})
    last = advance(
        *(run, state, run.last_step, data),
        module=module,
        checkpoints=steps[:-1],
        save=lambda reached: kept.append(reached.theta),
    )
    return [*kept, last.theta]


def difference(theta: Theta, origin: Theta, names: Sequence[str]) -> torch.Tensor:
    """``theta - origin`` over the named entries, one float64 vector, shape (P,)."""
    return flatten(theta, names) - flatten(origin, names)


def span(vectors: Sequence[torch.Tensor], tolerance: float = 1e-9) -> torch.Tensor:
    """An orthonormal basis of what the vectors span, shape (rank, P), float64.

    Arguments:
        tolerance: singular values below this times the largest count as zero.

    Raises:
        BadParameter: no vector, or zeros only.
    """
    if not vectors or not any(bool((v != 0).any()) for v in vectors):
        raise BadParameter("span: at least one vector that is not zero is needed.")
    matrix = torch.stack([v.double() / max(float(v.norm()), 1e-300) for v in vectors])
    _, sizes, rows = torch.linalg.svd(matrix, full_matrices=False)
    kept: torch.Tensor = rows[sizes > tolerance * sizes[0]]
    return kept


def project(vectors: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The part of each row of ``vectors`` (n, P) that lies in the span of ``basis`` (rank, P)."""
    return vectors @ basis.T @ basis


def noise(
    basis: torch.Tensor, draws: int, length: float, key: Key
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian directions inside a span and in its null space, each scaled to ``length``.

    A Gaussian vector's projection on a subspace is Gaussian there, so both are isotropic.

    Returns:
        the two, of shape (draws, P).

    Raises:
        BadParameter: the span is the whole space, so nothing is outside.
    """
    rank, size = basis.shape
    if rank >= size:
        raise BadParameter(f"noise: the span has all {size} dimensions; nothing is outside it.")
    drawn = torch.randn(draws, size, dtype=torch.float64, generator=key.generator())
    drawn = drawn.to(basis.device)
    inside = project(drawn, basis)
    outside = drawn - inside
    outside = outside - project(outside, basis)  # once more: what rounding left inside

    def scaled(rows: torch.Tensor) -> torch.Tensor:
        unit: torch.Tensor = rows / rows.norm(dim=1, keepdim=True)
        return length * unit

    return scaled(inside), scaled(outside)


def shifted(theta: Theta, direction: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """``theta`` moved by a vector (P,) over the named entries; the others as they are.

    Raises:
        BadParameter: a vector of another length.
    """
    size = sum(theta[name].numel() for name in names)
    if size != len(direction):
        raise BadParameter(f"shifted: the direction has {len(direction)} numbers, needed: {size}.")
    out = dict(theta)
    at = 0
    for name in names:
        entry = theta[name]
        step = direction[at : at + entry.numel()].view(entry.shape).to(entry.device)
        out[name] = (entry.double() + step).to(entry.dtype)
        at += entry.numel()
    return out


def rises(
    walker: Walker, theta: Theta, directions: torch.Tensor, names: Sequence[str]
) -> Mapping[str, list[float]]:
    """Loss after each shift minus the loss before, in nats: split -> one number a direction."""
    base = walker.at(theta)
    moved = [walker.at(shifted(theta, d, names)) for d in directions]
    return {s: [m[s].loss - base[s].loss for m in moved] for s in base}
