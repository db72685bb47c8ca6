"""What the positions of a tensor's axis are made of, symbolically, while a network is watched.

An axis is a sequence of blocks, a block a product of :class:`Atom`, row-major. An atom stands for
units that can be reordered, until an operation says that they cannot (:meth:`Axes.pin`) or that
they are the units of another axis (:meth:`Axes.unify`). Atoms come apart when a network takes them
apart: into a *product* when an axis is reshaped (768 = 12 heads x 64), into a *sum* when it is cut
(a fused projection into queries, keys and values). Everything here only ever adds constraints,
so what is left at the end is safe, and where the algebra does not know it pins.

Source: our chapter 2 ("Which units may move"); no paper has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

AtomBlock = tuple["Atom", ...]
AtomAxis = tuple[AtomBlock, ...]
"""Blocks one behind the other; an axis of one position is ``()``."""


@dataclass(eq=False)
class Atom:
    """Units of one kind."""

    size: int
    pinned: str | None = None  # why they stay in order
    within: Atom | None = None  # each unit of that atom has its own copy of these, with its order
    link: Atom | None = None  # where the union went
    parts: AtomAxis | None = None  # what the atom was taken apart into
    inner: bool = False  # another atom lies within this one
    family: list[Atom] | None = None  # with a pinned ``within``: one atom for each of its units


def length(block: AtomBlock) -> int:
    """Positions of a block."""
    return math.prod(a.size for a in block)


def total(axis: AtomAxis) -> int:
    """Positions of an axis."""
    return sum(map(length, axis)) if axis else 1


class Axes:
    """The algebra. ``where`` is what it writes on what it pins; the watcher keeps it current."""

    def __init__(self) -> None:
        self.where = ""

    def free(self, size: int) -> AtomAxis:
        """An axis of new units that may be reordered."""
        return ((Atom(size),),) if size > 1 else ()

    def fixed(self, size: int, why: str) -> AtomAxis:
        """An axis whose positions stay in order."""
        return ((Atom(size, pinned=why),),) if size > 1 else ()

    def find(self, atom: Atom) -> Atom:
        """The representative of all atoms that were unified with this one."""
        while atom.link is not None:
            atom = atom.link
        return atom

    def normal(self, axis: AtomAxis) -> AtomAxis:
        """The axis in representatives, with everything that was taken apart in its parts."""
        return tuple(b for block in axis for b in self._normal(block))

    def _normal(self, block: AtomBlock) -> list[AtomBlock]:
        done: list[Atom] = []
        for i, atom in enumerate(block):
            root = self.find(atom)
            if root.parts is None:
                done.append(root)
                continue
            rest = block[i + 1 :]
            if len(root.parts) == 1:
                return self._normal((*done, *root.parts[0], *rest))
            if not done:
                return [b for part in root.parts for b in self._normal((*part, *rest))]
            # A sum inside of a product is no sequence of blocks: its units have to stay.
            self.pin(root.parts, f"its units are cut apart in {self.where}")
            done.append(Atom(root.size, pinned=f"its units are cut apart in {self.where}"))
        return [tuple(done)]

    def atoms(self, axis: AtomAxis) -> Iterator[Atom]:
        """The representatives that the axis is made of."""
        for block in self.normal(axis):
            yield from block

    def pin(self, axis: AtomAxis, why: str) -> None:
        """These positions stay in order."""
        for atom in list(self.atoms(axis)):
            self._pin_atom(atom, why)

    def _pin_atom(self, atom: Atom, why: str) -> None:
        if atom.pinned is None:
            atom.pinned = why
        members, atom.family = atom.family, None
        for member in members or ():
            self.pin(((member,),), why)

    # Taking apart

    def _product(self, atom: Atom, outer: int) -> AtomBlock:
        """``atom`` as ``outer`` times the rest, row-major; the rest lies within the outer part."""
        rest = atom.size // outer
        if atom.pinned is None and (within := atom.within) is not None:
            holder = self.find(within)
            if holder.pinned is not None:  # as many atoms as it has units: take each apart
                members = [self.member(atom, holder, i) for i in range(holder.size)]
                pairs = [self._product(m, outer) for m in members]
                split = tuple(
                    Atom(size, within=holder, family=[pair[k] for pair in pairs])
                    for k, size in enumerate((outer, rest))
                )
                atom.parts = (split,)
                return split
        if atom.pinned is None and (atom.inner or atom.within is not None):
            self._pin_atom(atom, f"three levels of units in {self.where}")
        if atom.pinned is not None:  # nothing depends on the parts of what does not move
            return (Atom(outer, pinned=atom.pinned), Atom(rest, pinned=atom.pinned))
        first = Atom(outer, inner=True)
        parts = (first, Atom(rest, within=first))
        atom.parts = (parts,)
        return parts

    def _sum(self, atom: Atom, first: int) -> tuple[Atom, Atom]:
        """``atom`` as its first units and the others."""
        if atom.pinned is None and atom.inner:
            self._pin_atom(atom, f"outer units are cut apart in {self.where}")
        if atom.pinned is not None:
            return Atom(first, pinned=atom.pinned), Atom(atom.size - first, pinned=atom.pinned)
        parts = Atom(first, within=atom.within), Atom(atom.size - first, within=atom.within)
        if atom.family is not None:  # cut each member alike
            cut = [self._sum(self.find(m), first) for m in atom.family]
            parts[0].family, parts[1].family = [c[0] for c in cut], [c[1] for c in cut]
        atom.parts = ((parts[0],), (parts[1],))
        return parts

    def cut(self, axis: AtomAxis, at: int) -> tuple[AtomAxis, AtomAxis]:
        """The axis before and from position ``at``."""
        blocks, start = self.normal(axis), 0
        for i, block in enumerate(blocks):
            end = start + length(block)
            if at == start:
                return blocks[:i], blocks[i:]
            if at < end:
                head, tail = self._cut_block(block, at - start)
                return (*blocks[:i], head), (tail, *blocks[i + 1 :])
            start = end
        return blocks, ()

    def _cut_block(self, block: AtomBlock, at: int) -> tuple[AtomBlock, AtomBlock]:
        inner = length(block[1:])
        if at % inner:
            self.pin((block,), f"its units are cut apart in {self.where}")
            why = block[0].pinned
            return (Atom(at, pinned=why),), (Atom(length(block) - at, pinned=why),)
        first, second = self._sum(block[0], at // inner)
        return (first, *block[1:]), (second, *block[1:])

    # Making equal

    def unify(self, x: AtomAxis, y: AtomAxis) -> None:
        """Position i of both axes is the same unit, for every i."""
        left, right = list(self.normal(x)), list(self.normal(y))
        while left and right:
            short = min(length(left[0]), length(right[0]))
            for side in (left, right):
                if length(side[0]) > short:
                    side[:1] = self._cut_block(side[0], short)
            self._unify_block(left.pop(0), right.pop(0))
            left, right = list(self.normal(tuple(left))), list(self.normal(tuple(right)))

    def _unify_block(self, x: AtomBlock, y: AtomBlock) -> None:
        xs, ys = list(x), list(y)
        while xs and ys:
            a, b = self.find(xs[0]), self.find(ys[0])
            if a.parts is not None or b.parts is not None:  # something taken apart on the way
                sums = [s for s in (tuple(xs), tuple(ys)) if len(self._normal(s)) > 1]
                if sums:
                    self.unify((tuple(xs),), (tuple(ys),))
                    return
                xs, ys = list(self._normal(tuple(xs))[0]), list(self._normal(tuple(ys))[0])
                continue
            if a.size == b.size:
                self._unify_atoms(a, b)
                xs.pop(0)
                ys.pop(0)
                continue
            big, small, rest = (a, b, xs) if a.size > b.size else (b, a, ys)
            if big.size % small.size:
                why = f"its units are regrouped in {self.where}"
                self.pin((tuple(xs),), why)
                self.pin((tuple(ys),), why)
                return
            if small.pinned is not None and (big.inner or big.within is not None):
                self._pin_atom(big, small.pinned)
            rest[:1] = self._product(big, small.size)

    def _unify_atoms(self, x: Atom, y: Atom) -> None:
        x, y = self.find(x), self.find(y)
        if x is y:
            return
        if x.parts is not None or y.parts is not None:
            self.unify(((x,),), ((y,),))
            return
        if x.pinned is None and y.pinned is None:
            outer = [self.find(a.within) if a.within else None for a in (x, y)]
            if outer[0] is not outer[1]:
                self.uniform(x)
                self.uniform(y)
        x, y = self.find(x), self.find(y)
        if x is y:
            return
        members = (x.family, y.family)
        y.link = x
        x.inner |= y.inner
        x.family = members[0] or members[1]
        for a, b in zip(members[0] or (), members[1] or (), strict=False):
            self._unify_atoms(a, b)
        if (why := x.pinned if x.pinned is not None else y.pinned) is not None:
            self._pin_atom(x, why)

    def uniform(self, atom: Atom) -> None:
        """An atom within another has the same order in every unit of that other one."""
        atom = self.find(atom)
        family, atom.within, atom.family = atom.family, None, None
        for member in family or ():
            self._unify_atoms(atom, member)

    def member(self, atom: Atom, outer: Atom, i: int) -> Atom:
        """Of an atom within the pinned ``outer``, the units that lie in its unit ``i``."""
        atom = self.find(atom)
        if atom.pinned is not None:
            return atom
        if atom.family is None:
            atom.family = [Atom(atom.size) for _ in range(self.find(outer).size)]
        return self.find(atom.family[i])

    def lies_within(self, atom: Atom, outer: Atom) -> bool:
        """True if the two are an inner and its outer atom."""
        inner = self.find(atom).within
        return inner is not None and self.find(inner) is self.find(outer)

    def close(self, axes: Sequence[AtomAxis]) -> None:
        """Inner units whose outer ones are no longer in the tensor have one order for all."""
        present = {atom for axis in axes for atom in self.atoms(axis)}
        for atom in present:
            if atom.pinned is None and atom.within and self.find(atom.within) not in present:
                self.uniform(atom)

    # Reshaping

    def reshape(
        self, axes: Sequence[AtomAxis], shape: Sequence[int], new: Sequence[int]
    ) -> list[AtomAxis]:
        """The axes of a tensor of ``shape`` after a view as ``new``, row-major."""
        old = [(axis, size) for axis, size in zip(axes, shape, strict=True) if size != 1]
        wanted = [(i, size) for i, size in enumerate(new) if size != 1]
        out: list[AtomAxis] = [() for _ in new]
        while wanted:
            taken, targets = [old.pop(0)], [wanted.pop(0)]
            have, need = taken[0][1], targets[0][1]
            while have != need:
                if have < need:
                    taken.append(old.pop(0))
                    have *= taken[-1][1]
                else:
                    targets.append(wanted.pop(0))
                    need *= targets[-1][1]
            merged = self.merge([axis for axis, _ in taken])
            parts = self.divide(merged, [s for _, s in targets])
            for (i, _), part in zip(targets, parts, strict=True):
                out[i] = part
        return out

    def merge(self, axes: Sequence[AtomAxis]) -> AtomAxis:
        """Several axes as one, row-major: the first one moves slowest."""
        first, *others = [self.normal(a) for a in axes]
        rest: AtomBlock = ()
        for axis in others:
            if len(axis) != 1:
                why = f"pieces are interleaved in {self.where}"
                self.pin(axis, why)
                axis = ((Atom(total(axis), pinned=why),),)
            rest += axis[0]
        return tuple((*block, *rest) for block in first)

    def divide(self, axis: AtomAxis, sizes: Sequence[int]) -> list[AtomAxis]:
        """One axis as several, row-major."""
        if len(sizes) == 1:
            return [axis]
        axis = self.normal(axis)
        if len(axis) > 1:
            return self._stacked(axis, sizes)
        factors: list[Atom] = list(axis[0])
        out: list[AtomAxis] = []
        made: dict[Atom, Atom] = {}  # the rest of an atom taken apart here -> its outer part
        for size in sizes:
            block: list[Atom] = []
            while size > 1:
                # An atom may have been taken apart by now.
                expanded = self._normal(tuple(factors))
                if len(expanded) > 1:
                    return self._give_up(axis, sizes)
                factors = list(expanded[0])
                atom = factors.pop(0)
                if atom.size > size and atom.size % size == 0:
                    if atom in made and atom.pinned is None:
                        # Three factors of one axis in one stroke: (3, heads, units). What lies
                        # outermost is a stack of pieces, each with units of its own.
                        self.pin(((made[atom],),), f"pieces are stacked in {self.where}")
                    atom, rest = self._product(atom, size)
                    made[rest] = atom
                    factors.insert(0, rest)
                if size % atom.size:
                    return self._give_up(axis, sizes)
                block.append(atom)
                size //= atom.size
            out.append((tuple(block),))
        return out

    def _stacked(self, axis: AtomAxis, sizes: Sequence[int]) -> list[AtomAxis]:
        """Equal pieces, one behind the other, seen as rows: row i has the units of piece i."""
        rows, width = sizes[0], math.prod(sizes[1:])
        alike = len(axis) == rows and all(len(b) == 1 and b[0].size == width for b in axis)
        if len(sizes) != 2 or not alike:
            return self._give_up(axis, sizes)
        outer = Atom(rows, pinned=f"pieces are stacked in {self.where}", inner=True)
        inner = Atom(width, within=outer, family=[b[0] for b in axis])
        return [((outer,),), ((inner,),)]

    def _give_up(self, axis: AtomAxis, sizes: Sequence[int]) -> list[AtomAxis]:
        why = f"its units are regrouped in {self.where}"
        self.pin(axis, why)
        return [self.fixed(s, why) for s in sizes]
