"""The permutation symmetries of a network, as a value: which axes share which permutation.

A :class:`Spec` is derived from a network (:func:`companion.rebasin.derive`), never typed in. It
knows *groups*, each a set of units that may be reordered, and for every tensor of the state dict
and each of its axes, what the positions of that axis are made of.

An **axis** is a sequence of blocks, one behind the other (a concatenation has several). A **block**
is a product of factors in row-major order; a factor is the name of a group or a whole number, a
stretch of positions that stay in order. So, of a network with 64 channels ``c``::

    (("c",),)                   the channels of a convolution
    (("c", 49),)                a linear layer behind a flattened 7x7 map: channels move as blocks
    (("c",), ("d",))            the concatenation of two layers' channels
    (("heads", "heads.inner"),) a projection of an attention layer: units inside of heads

A group may lie ``within`` another: every unit of the outer group (a head) then has a permutation of
the inner units of its own. An inner group occurs only in blocks that hold its outer group as well.

Where a tensor does not have its units in blocks, a :class:`View` lays it out so: queries, keys and
values that alternate from head to head, or experts on one axis and their units on another.

A permutation is an index vector p, ``new[i] = old[p[i]]``: unit i of network A is matched with unit
p[i] of network B. Source: Git Re-Basin (Ainsworth et al. 2023), Sections 2 and 3.2; our chapter 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from companion.core.errors import BadParameter, one_of
from companion.core.theta import Theta

UNKNOWN = "no rule for the operation"
"""How reasons begin that come from an operation which the derivation does not know."""

PART = 1 << 20
"""Numbers of a tensor above which it is reordered in parts, where it is so in place."""

Factor = str | int
Block = tuple[Factor, ...]
Axis = tuple[Block, ...]

Permutations = Mapping[str, Tensor]
"""Group -> index vector, int64 on the CPU: shape (size,), or (outer size, size) for a group within
another, whose row i says which unit of the *old* outer unit goes where in the new outer unit i."""


@dataclass(frozen=True)
class Group:
    """Units that may be reordered.

    Arguments:
        name: after the layer that makes them, such as ``"layer1.linear"``.
        size: number of units (of an inner group: of each outer unit).
        within: the group whose units hold a copy of this one each, or None.
    """

    name: str
    size: int
    within: str | None = None


@dataclass(frozen=True)
class View:
    """A tensor laid out so that its units lie in blocks.

    Arguments:
        shape: of the tensor.
        dims: for each axis of the view the dimensions that it is made of, row-major.
        order: for each axis of the view the order in which its positions are taken, or None.
    """

    shape: tuple[int, ...]
    dims: tuple[tuple[int, ...], ...]
    order: tuple[tuple[int, ...] | None, ...]

    @cached_property
    def _flat(self) -> tuple[int, ...]:
        return tuple(d for dims in self.dims for d in dims)

    @cached_property
    def _taken(self) -> tuple[tuple[int, Tensor], ...]:
        orders = enumerate(self.order)
        return tuple((i, torch.tensor(order)) for i, order in orders if order is not None)

    def lay_out(self, x: Tensor) -> Tensor:
        """The tensor in this view; a copy where its order says so."""
        sizes = [math.prod(self.shape[d] for d in dims) for dims in self.dims]
        x = x.permute(self._flat).reshape(sizes)
        for i, order in self._taken:
            x = x.index_select(i, order.to(x.device))
        return x

    def put_back(self, x: Tensor) -> Tensor:
        """A tensor in this view as it was."""
        for i, order in self._taken:
            x = x.index_select(i, order.argsort().to(x.device))
        x = x.reshape([self.shape[d] for d in self._flat])
        return x.permute([self._flat.index(d) for d in range(len(self.shape))])


@dataclass(frozen=True)
class Use:
    """One place where a block with a certain group lies."""

    tensor: str
    dim: int
    start: int  # first position of the block there
    block: Block


@dataclass(frozen=True)
class ActivationSite:
    """An activation whose units are those of a group: where activation matching looks."""

    module: str  # path of the module that was running ("": the network itself)
    op: str  # name of the operation, such as "relu"
    nth: int  # how many of that name came before it in this module, in one forward pass
    dim: int  # axis of the activation, counted from the end (negative)
    start: int  # the block's position
    block: Block
    order: tuple[int, ...] | None = None  # in which that axis is taken first, as in a view


@dataclass(frozen=True)
class Spec:
    """Which axes of which tensors share a permutation. Made by :func:`companion.rebasin.derive`.

    Arguments:
        groups: name -> group, in the order in which the forward pass makes their units; an inner
            group comes after its outer one.
        axes: name in the state dict -> one :data:`Axis` for each of its dimensions. Holds every
            entry that at least one permutation moves: parameters (tied ones under each of their
            names) and buffers.
        objective: entries whose inner products count in weight matching: parameters, each tied
            tensor once. Buffers are permuted but do not count.
        sites: group -> where its activations are. An inner group's is a block that holds its outer
            group as well; an outer group is told apart by the sites of its inner ones.
        held: axis of a parameter (``"conv.weight[0]"``) -> why its units stay in place.
        notes: what the proof does not cover, such as a forward pass that branches on its data.
        tolerance: relative difference of outputs up to which the spec was proven: 1e-8 in float64,
            more only where the forward pass itself computes in less.
        example: what forward took when the spec was derived.
        views: name in the state dict -> how the tensor is laid out for its ``axes``, where that is
            not as it is.
    """

    groups: Mapping[str, Group]
    axes: Mapping[str, tuple[Axis, ...]]
    objective: tuple[str, ...]
    sites: Mapping[str, ActivationSite] = field(default_factory=dict)
    held: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tolerance: float = 1e-8
    example: Any = field(default=None, repr=False, compare=False)
    views: Mapping[str, View] = field(default_factory=dict)

    @cached_property
    def uses(self) -> Mapping[str, tuple[Use, ...]]:
        """Group -> every place where it moves something, tied tensors and buffers included."""
        found: dict[str, list[Use]] = {name: [] for name in self.groups}
        for tensor, axes in self.axes.items():
            for dim, axis in enumerate(axes):
                for start, block in self.blocks(axis):
                    for factor in block:
                        if isinstance(factor, str):
                            found[factor].append(Use(tensor, dim, start, block))
        return {name: tuple(uses) for name, uses in found.items()}

    @cached_property
    def families(self) -> tuple[tuple[str, ...], ...]:
        """Groups that have to be matched together: each outer group with its inner ones."""
        groups = self.groups.values()
        return tuple(
            (outer.name, *(g.name for g in groups if g.within == outer.name))
            for outer in groups
            if outer.within is None
        )

    def why_none(self) -> str:
        """Why there are no groups, as a sentence: units cannot move, or nobody knows of them.

        An operation without a rule holds whatever it touches, and that says nothing of symmetries.
        """
        unknown = dict.fromkeys(why for why in self.held.values() if why.startswith(UNKNOWN))
        if unknown:
            return (
                "no unit is known to move without changing the outputs, but there may be some: "
                f"{'; '.join(list(unknown)[:3])}. Units that such an operation touches are held"
            )
        shown = [f"{axis}: {reason}" for axis, reason in list(self.held.items())[:3]]
        reason = "; ".join(shown) or "all of its axes belong to the input or to the output"
        return f"no unit can be reordered without changing the outputs ({reason})"

    def hold(self, *names: str) -> Spec:
        """The same spec with the units of these groups, and of groups within them, left in place.

        Such as the residual stream, to match nothing but heads and units of the layers between.

        Raises:
            BadParameter: no such group.
        """
        for name in names:
            one_of("group", name, self.groups)
        out = {n for n, g in self.groups.items() if n in names or g.within in names}

        def still(block: Block) -> Block:
            return tuple(self.groups[f].size if f in out else f for f in block)

        axes = {t: tuple(tuple(map(still, x)) for x in xs) for t, xs in self.axes.items()}
        sites = {n: replace(s, block=still(s.block)) for n, s in self.sites.items()}
        asked = {
            f"{u.tensor}[{dim}]": "held on request"
            for g in out
            for u in self.uses[g]
            for dim in (self.views[u.tensor].dims[u.dim] if u.tensor in self.views else (u.dim,))
        }
        return replace(
            self,
            groups={n: g for n, g in self.groups.items() if n not in out},
            axes={t: xs for t, xs in axes.items() if any(map(self.moves, xs))},
            sites={n: s for n, s in sites.items() if n not in out},
            held={**self.held, **asked},
        )

    def sizes(self, block: Block) -> tuple[int, ...]:
        """Of the block's factors."""
        return tuple(f if isinstance(f, int) else self.groups[f].size for f in block)

    def length(self, block: Block) -> int:
        """Positions of a block."""
        return math.prod(self.sizes(block))

    def blocks(self, axis: Axis) -> Iterator[tuple[int, Block]]:
        """The blocks of an axis, each with its first position."""
        start = 0
        for block in axis:
            yield start, block
            start += self.length(block)

    def identity(self) -> dict[str, Tensor]:
        """The permutations that leave everything in place."""
        return self._each(torch.arange)

    def random(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Uniformly random permutations."""
        return self._each(lambda size: torch.randperm(size, generator=generator))

    def _each(self, draw: Callable[[int], Tensor]) -> dict[str, Tensor]:
        """One permutation for each group; for one within another, of each outer unit."""
        out = {}
        for name, group in self.groups.items():
            if group.within is None:
                out[name] = draw(group.size)
            else:
                rows = self.groups[group.within].size
                out[name] = torch.stack([draw(group.size) for _ in range(rows)])
        return out

    def check(self, perms: Permutations) -> None:
        """Refuse what is no set of permutations of this spec.

        Raises:
            BadParameter: a group is missing or unknown, of another shape or type, or repeats units.
        """
        if perms.keys() != self.groups.keys():
            missing = [n for n in self.groups if n not in perms]
            extra = [n for n in perms if n not in self.groups]
            raise BadParameter(
                f"permutations: missing {missing[:5] or 'none'}, not in the spec "
                f"{extra[:5] or 'none'}."
            )
        for name, like in self.identity().items():
            p = perms[name]
            if p.shape != like.shape or p.dtype != torch.int64:
                raise BadParameter(
                    f"permutation {name!r}: int64 {tuple(like.shape)} expected, "
                    f"got {p.dtype} {tuple(p.shape)}."
                )
            if not torch.equal(p.cpu().sort(-1).values, like):
                raise BadParameter(f"permutation {name!r} repeats units: it is no permutation.")

    def compose(self, first: Permutations, then: Permutations) -> dict[str, Tensor]:
        """``first``, then ``then``, as one set: permute(permute(x, first), then)."""
        out = {}
        for name, group in self.groups.items():
            if group.within is None:
                out[name] = first[name][then[name]]
            else:
                out[name] = first[name][then[group.within]].gather(1, then[name])
        return out

    def inverse(self, perms: Permutations) -> dict[str, Tensor]:
        """The set that undoes ``perms``."""
        out = {}
        for name, group in self.groups.items():
            p = perms[name]
            out[name] = p.argsort(-1)
            if group.within is not None:
                out[name] = out[name][perms[group.within].argsort()]
        return out

    def index(self, axis: Axis, perms: Permutations) -> Tensor:
        """The index vector of a whole axis, int64 (positions,): ``new[i] = old[index[i]]``."""
        parts = [start + self.block_index(block, perms) for start, block in self.blocks(axis)]
        return torch.cat(parts)

    def block_index(self, block: Block, perms: Permutations) -> Tensor:
        """The index vector of one block, counted from its start."""
        sizes = self.sizes(block)
        new = torch.meshgrid(*(torch.arange(s) for s in sizes), indexing="ij")
        out = torch.zeros(sizes, dtype=torch.int64)
        for factor, size, at in zip(block, sizes, new, strict=True):
            old = at
            if isinstance(factor, str):
                outer = self.groups[factor].within
                p = perms[factor]
                old = p[at] if outer is None else p[new[block.index(outer)], at]
            out = out * size + old
        return out.flatten()

    def moves(self, axis: Axis) -> bool:
        """True if any factor of the axis is a group."""
        return any(isinstance(f, str) for block in axis for f in block)

    def lay_out(self, tensor: Tensor, name: str) -> Tensor:
        """One entry as its ``axes`` see it."""
        return self.views[name].lay_out(tensor) if name in self.views else tensor

    def put_back(self, tensor: Tensor, name: str) -> Tensor:
        """What :meth:`lay_out` made, as it is in the state dict."""
        return self.views[name].put_back(tensor).contiguous() if name in self.views else tensor

    def permute_tensor(self, tensor: Tensor, name: str, perms: Permutations) -> Tensor:
        """One entry with the permutations of its axes applied."""
        moved = [
            (dim, axis) for dim, axis in enumerate(self.axes.get(name, ())) if self.moves(axis)
        ]
        if not moved:
            return tensor
        tensor = self.lay_out(tensor, name)
        for dim, axis in moved:
            tensor = tensor.index_select(dim, self.index(axis, perms).to(tensor.device))
        return self.put_back(tensor, name)

    def permute_(self, tensor: Tensor, name: str, perms: Permutations) -> None:
        """:meth:`permute_tensor` in place: a large one in parts, along an axis that stays."""
        axes = self.axes.get(name, ())
        still = [d for d, axis in enumerate(axes) if not self.moves(axis)]
        if name in self.views or not still or tensor.numel() <= PART:
            tensor.copy_(self.permute_tensor(tensor, name, perms))
            return
        dim = max(still, key=lambda d: tensor.shape[d])
        for part in tensor.split(max(1, PART * tensor.shape[dim] // tensor.numel()), dim):
            part.copy_(self.permute_tensor(part, name, perms))

    def permute(self, theta: Theta, perms: Permutations) -> dict[str, Tensor]:
        """``theta`` with its units in another order; entries that do not move are the same tensors.

        The function that the network computes stays the same. Nothing is checked here:
        :meth:`companion.rebasin.Matching.apply` does.
        """
        return {name: self.permute_tensor(value, name, perms) for name, value in theta.items()}

    def log10_count(self) -> float:
        """log10 of the number of permutations, the paper's Table 1 (Section 2)."""
        total = 0.0
        for group in self.groups.values():
            copies = self.groups[group.within].size if group.within else 1
            total += copies * math.lgamma(group.size + 1) / math.log(10)
        return total

    def to_json(self) -> dict[str, Any]:
        """Groups and axes as JSON-able values, to tell whether two specs are the same."""
        out = {
            "groups": [[g.name, g.size, g.within] for g in self.groups.values()],
            "axes": {n: [[list(b) for b in a] for a in axes] for n, axes in self.axes.items()},
            "objective": list(self.objective),
        }
        if self.views:
            out["views"] = {
                n: [[list(d) for d in v.dims], [list(o) if o else None for o in v.order]]
                for n, v in self.views.items()
            }
        return out

    def _place(self, use: Use) -> str:
        dims = self.views[use.tensor].dims[use.dim] if use.tensor in self.views else (use.dim,)
        return f"{use.tensor}[{', '.join(map(str, dims))}]"

    def __str__(self) -> str:
        lines = [
            f"{len(self.groups)} permutations, 10^{self.log10_count():.0f} ways to order the units"
        ]
        for name, group in self.groups.items():
            where = f" within each unit of {group.within}" if group.within else ""
            places = list(dict.fromkeys(map(self._place, self.uses[name])))
            more = f" and {len(places) - 4} more" if len(places) > 4 else ""
            lines.append(f"  {name}: {group.size} units{where}; {', '.join(places[:4])}{more}")
        if self.held:
            lines.append(f"  held in place: {len(self.held)} axes")
            lines += [f"    {axis}: {why}" for axis, why in list(self.held.items())[:6]]
        lines += [f"  note: {text}" for text in self.notes]
        return "\n".join(lines)


def chain(*sizes: int, names: Sequence[str] | None = None, bias: bool = True) -> Spec:
    """The spec of a stack of linear layers, written down directly, for exact toy examples.

    Arguments:
        sizes: units of input, of each hidden layer, and of the output.
        names: of the layers, default ``"0"``, ``"1"``, …; weights are ``"0.weight"`` and so on.
    """
    layers = list(names or map(str, range(len(sizes) - 1)))
    groups = {layers[i]: Group(layers[i], n) for i, n in enumerate(sizes[1:-1])}
    axes: dict[str, tuple[Axis, ...]] = {}
    for i, layer in enumerate(layers):
        rows: Axis = ((layer if layer in groups else sizes[i + 1],),)
        cols: Axis = ((layers[i - 1] if i else sizes[0],),)
        axes[f"{layer}.weight"] = (rows, cols)
        if bias:
            axes[f"{layer}.bias"] = (rows,)
    kept = {n: a for n, a in axes.items() if any(isinstance(f, str) for x in a for f in x[0])}
    return Spec(groups, kept, tuple(kept))
