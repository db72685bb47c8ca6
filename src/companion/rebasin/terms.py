"""The objective of weight matching taken apart: which blocks of which tensors a group is seen in.

``<A, P(B)>`` is a sum over tensors. As a function of one group's permutation alone it is a sum over
*terms*, one for each block with that group, and each term is linear: row i of A's block, made of
everything that belongs to unit i, times row p[i] of B's. Source: Git Re-Basin (Ainsworth et al.
2023), Section 3.2, written out for any network; our chapter 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from companion.rebasin.spec import Block, Spec


@dataclass(frozen=True)
class Term:
    """A block of one axis, seen as rows to be matched: those of its factors ``front``.

    Arguments:
        tensor, dim, start: where the block lies.
        sizes: of its factors.
        front: positions of the factors that make up the rows. The other
            factors, other blocks' positions aside, join the columns: they stay as they are now.
    """

    tensor: str
    dim: int
    start: int
    sizes: tuple[int, ...]
    front: tuple[int, ...]

    def rows(self, x: Tensor, device: torch.device) -> Tensor:
        """The block as a float64 matrix, (units, everything else). Copied only where it has to."""
        x = x.detach().narrow(self.dim, self.start, math.prod(self.sizes)).movedim(self.dim, 0)
        x = x.to(device)
        if len(self.sizes) > 1:
            x = x.unflatten(0, self.sizes)
            rest = [d for d in range(x.dim()) if d not in self.front]
            x = x.permute(*self.front, *rest)
        n = math.prod(self.sizes[f] for f in self.front)
        if x.dim() > 1 and len(self.front) == 1 and math.prod(x.shape[2:]) == 1:
            return x.reshape(x.shape[:2]).double()  # a transposed matrix stays a view of one
        if x.dtype != torch.float64:
            # One pass for both: the axes into row-major order, and the numbers into float64.
            x = torch.empty(x.shape, dtype=torch.float64, device=device).copy_(x)
        return x.reshape(n, -1)


@dataclass(frozen=True)
class Family:
    """An outer group, its inner groups, and where in the objective they occur.

    Arguments:
        outer, inner: names.
        tensors: of the objective that one of them moves.
        terms: group -> its blocks. An inner group's have outer and inner units as rows; the outer
            group's are those without inner units.
        twice: tensors that it moves along two axes, or by two factors of one block. The objective
            is quadratic there, and a term is its linear part with the family where it is now.
        others: tensor -> the other families that move it.
        readers: of the tensors, those that take the units in and do not make them: weights with
            the family on another axis than the first, that are not of the layer it is named after.
    """

    outer: str
    inner: tuple[str, ...]
    tensors: tuple[str, ...]
    terms: Mapping[str, tuple[Term, ...]]
    twice: frozenset[str]
    others: Mapping[str, frozenset[int]]
    readers: frozenset[str]

    @property
    def linear(self) -> bool:
        """True if the gain of an assignment is by how much the objective rises."""
        return not self.twice

    @property
    def neighbours(self) -> frozenset[int]:
        """Families whose best permutation depends on this one's."""
        return frozenset().union(*self.others.values())


def families(spec: Spec) -> tuple[Family, ...]:
    """The families of ``spec`` in forward order, with all places where the objective sees them."""
    owner = {g: k for k, names in enumerate(spec.families) for g in names}
    terms: list[dict[str, list[Term]]] = [{g: [] for g in names} for names in spec.families]
    places: list[dict[str, set[int]]] = [{} for _ in spec.families]
    twice: list[set[str]] = [set() for _ in terms]
    for tensor in spec.objective:
        for dim, axis in enumerate(spec.axes.get(tensor, ())):
            start = 0
            for block in axis:
                sizes = tuple(f if isinstance(f, int) else spec.groups[f].size for f in block)
                for k in {owner[f] for f in block if isinstance(f, str)}:
                    places[k].setdefault(tensor, set()).add(dim)
                    fronts = _fronts(block, spec.families[k])
                    for group, front in fronts:
                        terms[k][group].append(Term(tensor, dim, start, sizes, front))
                    if len(fronts) > 1 or len(places[k][tensor]) > 1:
                        twice[k].add(tensor)
                start += spec.length(block)
    out = []
    for k, (outer, *inner) in enumerate(spec.families):
        others = {
            t: frozenset(j for j in range(len(terms)) if j != k and t in places[j])
            for t in places[k]
        }
        mine = {g: tuple(found) for g, found in terms[k].items()}
        readers = frozenset(
            t for t, dims in places[k].items() if max(dims) and t.rpartition(".")[0] != outer
        )
        out.append(
            Family(
                outer,
                tuple(inner),
                tuple(places[k]),
                mine,
                frozenset(twice[k]),
                others,
                readers,
            )
        )
    return tuple(out)


def _fronts(block: Block, names: Sequence[str]) -> list[tuple[str, tuple[int, ...]]]:
    """How a family occurs in a block: (group, positions of the factors that make its rows)."""
    outer, *inner = names
    at = [i for i, f in enumerate(block) if f in inner]
    if at:
        return [(str(block[i]), (block.index(outer), i)) for i in at]
    return [(outer, (i,)) for i, f in enumerate(block) if f == outer]
