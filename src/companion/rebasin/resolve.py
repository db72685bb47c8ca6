"""What is left of the algebra after a forward pass, as a :class:`Spec`: groups, axes and sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from companion.rebasin import spec
from companion.rebasin.axes import Atom, Axes, Axis, Block

ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "sigmoid", "hardtanh", "leaky_relu", "elu", "mish")
"""Functions after which activation matching looks (Git Re-Basin, Section 3.1)."""

NATURAL = ("the input", "the output", "positions of", "entries of a vocabulary", "whole numbers")
"""How reasons begin that go without saying; all others are told, in :attr:`Spec.held`."""


@dataclass(frozen=True)
class Seen:
    """The output of one operation of the forward pass.

    Arguments:
        module, op, nth: which operation, as in :class:`companion.rebasin.spec.Site`.
        axes: of its (first) output.
        data: it depends on the input, so it could be an activation site.
    """

    module: str
    op: str
    nth: int
    axes: tuple[Axis, ...]
    data: bool


def resolve(
    algebra: Axes,
    state: Mapping[str, list[Axis]],
    read: Set[int],
    log: Sequence[Seen],
    *,
    parameters: Sequence[str],
    notes: Sequence[str],
    tolerance: float,
    example: Any,
) -> spec.Spec:
    """Read the spec off.

    Arguments:
        algebra: after the pass.
        state: entry of the state dict -> its axes; tied entries share one list.
        read: ids of the lists of ``state`` that an operation has read; the others are held.
        log: what the operations made, in their order.
        parameters: entries that count in the objective, each tied tensor once.
        notes, tolerance, example: passed on, see :class:`companion.rebasin.spec.Spec`.
    """
    found = _Resolver(algebra).read(state, read, log, parameters)
    return replace(found, notes=tuple(notes), tolerance=tolerance, example=example)


class _Resolver:
    def __init__(self, algebra: Axes):
        self.axes = algebra
        self.names: dict[Atom, str] = {}
        self.groups: dict[str, spec.Group] = {}

    def read(
        self,
        state: Mapping[str, list[Axis]],
        read: Set[int],
        log: Sequence[Seen],
        parameters: Sequence[str],
    ) -> spec.Spec:
        used = {n: axes for n, axes in state.items() if id(axes) in read}
        self._settle(used)
        for entry in log:
            for axis in entry.axes:
                self._name(axis, entry.module)
        axes = {n: tuple(self._axis(a) for a in found) for n, found in used.items()}
        moving = {n: found for n, found in axes.items() if names_in(found)}
        present = {name for found in moving.values() for name in names_in(found)}
        groups = {n: g for n, g in self.groups.items() if n in present}
        held = {n: "forward does not read it on the example" for n in parameters if n not in used}
        for name in parameters:
            for dim, axis in enumerate(used.get(name, ())):
                atoms = (a for block in self._blocks(axis) for a in block if a.size > 1)
                why = next((a.pinned for a in atoms if a.pinned), None)
                if why and not why.startswith(NATURAL):
                    held[f"{name}[{dim}]"] = why
        return spec.Spec(
            groups,
            moving,
            tuple(n for n in parameters if n in moving),
            sites=self._sites(groups, log),
            held=held,
        )

    def _settle(self, used: Mapping[str, list[Axis]]) -> None:
        """An inner atom needs its outer one in the same block of every parameter."""
        again = True
        while again:
            again = False
            for found in used.values():
                for axis in found:
                    for block in self.axes.normal(axis):
                        for atom in block:
                            outer = atom.within and self.axes.find(atom.within)
                            if atom.pinned is None and outer and outer not in block:
                                self.axes.uniform(atom)
                                again = True

    def _blocks(self, axis: Axis) -> list[Block]:
        """Normal blocks, with what lies within pinned atoms written out piece by piece."""
        out: list[Block] = []
        for block in self.axes.normal(axis):
            out += self._written_out(block)
        return out

    def _written_out(self, block: Block) -> list[Block]:
        find, lies = self.axes.find, self.axes.lies_within
        for k, atom in enumerate(block):
            inner = [a for a in block if a.pinned is None and lies(a, atom)]
            if atom.pinned is None or not inner:
                continue
            if k > 0:  # the pieces are interleaved: no sequence of blocks says that
                self.axes.pin((tuple(inner),), "pieces are interleaved")
                return self._written_out(tuple(map(find, block)))
            out = []
            for i in range(atom.size):
                piece = [self.axes.member(a, atom, i) if a in inner else a for a in block[1:]]
                out += self._blocks((tuple(piece),))
            return out
        return [block]

    def _name(self, axis: Axis, module: str) -> None:
        for block in self._blocks(axis):
            for atom in block:
                if atom.pinned is not None or atom in self.names or atom.size == 1:
                    continue
                outer = self.axes.find(atom.within) if atom.within else None
                if outer is not None and outer not in self.names:
                    if outer not in block:
                        continue  # named where both are seen together
                    self._give(outer, module, None)
                self._give(atom, module, self.names[outer] if outer else None)

    def _give(self, atom: Atom, module: str, outer: str | None) -> None:
        stem = f"{outer}/" if outer else (module or "network")
        number = 1
        name = f"{stem}{number}" if outer else stem
        while name in self.groups:
            number += 1
            name = f"{stem}{number}" if outer else f"{stem}#{number}"
        self.names[atom] = name
        self.groups[name] = spec.Group(name, atom.size, outer)

    def _axis(self, axis: Axis) -> spec.Axis:
        out: list[tuple[str | int, ...]] = []
        for block in self._blocks(axis):
            factors: list[str | int] = []
            for atom in block:
                factor = self.names.get(atom, atom.size)
                if isinstance(factor, int) and factors and isinstance(factors[-1], int):
                    factors[-1] *= factor
                elif factor != 1:
                    factors.append(factor)
            out.append(tuple(factors) or (1,))
        merged: list[tuple[str | int, ...]] = []
        for factors_ in out or [(1,)]:
            last = merged[-1] if merged else ()
            pair = (*last, *factors_)
            if len(last) == len(factors_) == 1 and all(isinstance(f, int) for f in pair):
                merged[-1] = (int(pair[0]) + int(pair[1]),)
            else:
                merged.append(factors_)
        return tuple(merged)

    def _sites(self, groups: Mapping[str, spec.Group], log: Sequence[Seen]) -> dict[str, spec.Site]:
        """For each group the last activation function on it, else the last operation at all."""
        best: dict[str, tuple[bool, spec.Site]] = {}
        for entry in log:
            if not entry.data:
                continue
            preferred = entry.op.rstrip("_") in ACTIVATIONS
            found = [self._axis(axis) if axis else () for axis in entry.axes]
            moving = [dim for dim, axis in enumerate(found) if names_in([axis])]
            if len(moving) != 1:
                continue  # another axis moves too: positions would not be the same samples
            for dim, axis in enumerate(found):
                start = 0
                for block in axis:
                    size = 1
                    for f in block:
                        size *= f if isinstance(f, int) else self.groups[f].size
                    site = spec.Site(
                        entry.module, entry.op, entry.nth, dim - len(entry.axes), start, block
                    )
                    start += size
                    for name in self._answers(block, groups):
                        if name not in best or preferred >= best[name][0]:
                            best[name] = (preferred, site)
        return {n: best[n][1] for n in groups if n in best}

    def _answers(self, block: spec.Block, groups: Mapping[str, spec.Group]) -> list[str]:
        """Groups that can be told apart in a block: an inner one only beside its outer one."""
        names = [f for f in block if isinstance(f, str)]
        return [
            n
            for n in names
            if n in groups and (groups[n].within is None or groups[n].within in names)
        ]


def names_in(axes: Sequence[spec.Axis]) -> set[str]:
    """Groups that occur in the axes of a tensor."""
    return {f for axis in axes for block in axis for f in block if isinstance(f, str)}
