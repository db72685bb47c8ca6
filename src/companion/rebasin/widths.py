"""Networks of different widths: the narrow one, widened, computes the same and can be matched.

A unit whose incoming and outgoing weights are 0 adds nothing. With as many of them as it lacks, a
narrow network is a point of the wide one's space, where all that holds for networks of one
architecture holds: each method matches it, lines lead to it. A permutation of the widened network
is a *semi-permutation* of the narrow one: each of its units goes to a unit of its own of the wide
network, and some of these get none. What goes across units (LayerNorm) would see the zeros, and is
refused. Our chapter 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from companion.core.errors import BadParameter
from companion.core.theta import Theta, check_theta
from companion.rebasin.derive import derive
from companion.rebasin.proof import STRICT, Subject, output_gap
from companion.rebasin.spec import Axis, Permutations, Spec

ACROSS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
"""Modules whose output for one unit depends on others."""


@dataclass(frozen=True, eq=False)
class Widened:
    """A narrow network in a wide one's space.

    Arguments:
        spec: of the wide architecture, for matching.
        theta: the narrow network as a state dict of it; units that were added come last, and all
            their entries are 0.
        sizes: group -> units of the narrow network (for units inside of others, of each outer one).
        gap: largest difference of the outputs, as a share of the largest, in float64.
    """

    spec: Spec
    theta: dict[str, Tensor]
    sizes: Mapping[str, int]
    gap: float

    def places(self, perms: Permutations) -> dict[str, Tensor]:
        """Which unit of the wide network each unit of the narrow one is matched with.

        Arguments:
            perms: for the widened network as B: ``weight_matching(spec, wide, theta).perms``.
                Where the wide network was B, their ``spec.inverse``.

        Returns:
            group -> int64, shape (units of the narrow network,), all different; for units inside of
            others (outer units, units).
        """
        self.spec.check(perms)
        there = self.spec.inverse(perms)
        out = {}
        for name, size in self.sizes.items():
            outer = self.spec.groups[name].within
            out[name] = there[name][..., :size]
            if outer is not None:
                out[name] = out[name][: self.sizes[outer]]
        return out


def widen(narrow: nn.Module, wide: nn.Module, theta: Theta, example: Any) -> Widened:
    """Add units of weight 0 to a narrow network until it has the shape of a wide one.

    Arguments:
        narrow: its architecture.
        wide: the same family with at least as many units in each group.
        theta: state dict of ``narrow``; not changed.
        example: as for :func:`companion.rebasin.derive`; both networks take it.

    Raises:
        BadParameter: ``theta`` is none of ``narrow``; the networks differ in more than the number
            of units that can move, or a group has fewer in ``wide``; a norm goes across them, or
            outputs change for another reason. Unproven: see :func:`companion.rebasin.derive`.
    """
    theta = check_theta(narrow, theta, "the narrow network")
    small, spec = derive(narrow, example, unread="hold"), derive(wide, example, unread="hold")
    own = wide.state_dict()
    _check_same(small, spec, theta, own)
    grown = {n for n, group in spec.groups.items() if group.size > small.groups[n].size}
    _check_norms(wide, spec, grown)
    out = {}
    for name, tensor in theta.items():
        x = small.lay_out(tensor, name)
        for dim, axis in enumerate(spec.axes.get(name, ())):
            parts = [
                _padded(x, dim, start, small.sizes(block), spec.sizes(other))
                for (start, block), other in zip(
                    small.blocks(small.axes[name][dim]), axis, strict=True
                )
            ]
            x = torch.cat(parts, dim)
        out[name] = spec.put_back(x, name)
        if out[name].shape != own[name].shape:
            raise BadParameter(
                f"{name} has shape {tuple(tensor.shape)} in the narrow network and "
                f"{tuple(own[name].shape)} in the wide one, and these positions cannot move."
            )
    before, after = (Subject(m, example, t).run() for m, t in ((narrow, theta), (wide, out)))
    gap = output_gap(before, after)
    if not gap <= STRICT:
        raise BadParameter(
            f"units of weight 0 change the outputs (by {gap:.2g} of their size): something works "
            f"across the units of {', '.join(sorted(grown)[:5])}, such as a norm or a softmax, or "
            "depends on their number."
        )
    return Widened(spec, out, {n: g.size for n, g in small.groups.items()}, gap)


def _padded(
    x: Tensor, dim: int, start: int, sizes: tuple[int, ...], wide: tuple[int, ...]
) -> Tensor:
    """One block of an axis, each of its factors with zeros up to its size in the wide network."""
    length = torch.Size(sizes).numel()
    part = x.narrow(dim, start, length).unflatten(dim, sizes)
    shape = list(part.shape)
    shape[dim : dim + len(sizes)] = wide
    out = part.new_zeros(shape)
    out[tuple(slice(n) for n in part.shape)] = part
    padded: Tensor = out.flatten(dim, dim + len(sizes) - 1)
    return padded


def _check_same(small: Spec, spec: Spec, theta: Theta, own: Theta) -> None:
    """Refuse architectures that differ in more than sizes of groups."""

    def groups_of(one: Spec) -> dict[str, list[list[list[str | None]]]]:
        def factors(axis: Axis) -> list[list[str | None]]:
            return [[f if isinstance(f, str) else None for f in block] for block in axis]

        return {n: [factors(axis) for axis in axes] for n, axes in one.axes.items()}

    if theta.keys() != own.keys():
        other = sorted(theta.keys() ^ own.keys())
        raise BadParameter(
            f"only one of the two networks has {', '.join(other[:5])}: they must be of one family."
        )
    here, there = groups_of(small), groups_of(spec)
    if small.groups.keys() != spec.groups.keys() or here != there:
        apart = [n for n in own if here.get(n) != there.get(n)] or ["their groups"]
        raise BadParameter(
            f"the units of the two networks are not used alike: they differ at {apart[0]}."
        )
    for name, group in spec.groups.items():
        if small.groups[name].size > group.size:
            raise BadParameter(
                f"{name} has {small.groups[name].size} units in the narrow network, and "
                f"{group.size} in the wide one."
            )


def _check_norms(wide: nn.Module, spec: Spec, grown: set[str]) -> None:
    """Refuse by name what would see the zeros."""
    for name, module in wide.named_modules():
        weights = [f"{name}.{n}" if name else n for n, _ in module.named_parameters(recurse=False)]
        axes = [axis for w in weights for axis in spec.axes.get(w, ())]
        factors = sorted(
            {f for axis in axes for block in axis for f in block if f in grown}, key=str
        )
        if isinstance(module, ACROSS) and factors:
            raise BadParameter(
                f"{name} ({type(module).__name__}) goes across the units of {factors[0]}, and "
                "would see those that are added: networks with it have one width."
            )
