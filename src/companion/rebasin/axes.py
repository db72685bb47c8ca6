"""What the positions of a tensor's axis are made of, symbolically, while a network is watched.

An axis is a sequence of blocks, a block a product of :class:`Atom`, row-major. An atom stands for
units that can be reordered, until an operation says that they cannot (:meth:`Axes.pin`) or that
they are the units of another axis (:meth:`Axes.unify`). Atoms come apart when a network takes them
apart: into a *product* when an axis is reshaped (768 = 12 heads x 64), into a *sum* when it is cut
(a fused projection into queries, keys and values). Units may lie *within* others: each head has an
order of its own for what is inside of it, each expert one for its hidden units. Where those others
stay in order, or were cut apart, there is a *share* for each of their units or parts.

Everything here only ever adds constraints, so what is left at the end is safe, and where the
algebra does not know it pins.

Source: our chapter 2 ("Which units may move"); no paper has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

PICKED = "one unit is picked out"
"""How the reason begins of what is only chosen by number."""

AtomBlock = tuple["Atom", ...]
AtomAxis = tuple[AtomBlock, ...]
"""Blocks one behind the other; an axis of one position is ``()``."""


@dataclass(eq=False)
class Atom:
    """Units of one kind."""

    size: int
    pinned: str | None = None  # why they stay in order
    within: AtomBlock = ()  # each unit of those atoms has its own copy of these, with its order
    link: Atom | None = None  # where the union went
    parts: AtomAxis | None = None  # what the atom was taken apart into
    # (outer atom, unit or part of it) -> the units in there, once these are told apart
    shares: dict[tuple[Atom, int], Atom] = field(default_factory=dict)
    equal: bool = False  # the tensor has the same numbers at all of its positions
    tells: AtomBlock = ()  # atoms of which each position here belongs to one unit
    by_number: bool = False  # pinned only since its units are chosen by their numbers
    reached: set[int] = field(default_factory=set)  # those that were, one at a time


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

    def alike(self, size: int) -> AtomAxis:
        """An axis along which all numbers are equal: whatever it meets may move."""
        return ((Atom(size, equal=True),),) if size > 1 else ()

    def fixed(self, size: int, why: str) -> AtomAxis:
        """An axis whose positions stay in order."""
        return ((Atom(size, pinned=why),),) if size > 1 else ()

    def find(self, atom: Atom) -> Atom:
        """The representative of all atoms that were unified with this one."""
        while atom.link is not None:
            atom = atom.link
        return atom

    def context(self, atom: Atom) -> list[Atom]:
        """The atoms it lies within, representatives, products in their factors."""
        out: list[Atom] = []
        todo = list(self.find(atom).within)
        while todo:
            outer = self.find(todo.pop(0))
            if outer.parts is not None and len(outer.parts) == 1:
                todo = [*outer.parts[0], *todo]
            elif outer.size > 1 and outer not in out:
                out.append(outer)
        return out

    # Normal form

    def normal(self, axis: AtomAxis) -> AtomAxis:
        """The axis in representatives, with everything that was taken apart in its parts.

        Only a sum that is not the first factor of its block stays one atom: (heads, q + k + v).
        """
        return tuple(b for block in axis for b in self._normal(block))

    def _normal(self, block: AtomBlock) -> list[AtomBlock]:
        done: list[Atom] = []
        for i, atom in enumerate(block):
            root, rest = self.find(atom), block[i + 1 :]
            if root.parts is None:
                if root.size > 1 or len(block) == 1:
                    done.append(root)
            elif len(root.parts) == 1:
                return self._normal((*done, *root.parts[0], *rest))
            elif not done:
                out = []
                for k, part in enumerate(root.parts):
                    out += self._normal((*part, *self.members(rest, root, k)))
                return out
            else:
                done.append(root)
        return [tuple(done) or (Atom(1, pinned="one unit"),)]

    def beside(self, block: AtomBlock, beside: Iterable[Atom]) -> AtomBlock:
        """Factors within an atom that was cut, as their share of that part that is beside them."""
        here: set[Atom] | None = None
        out = []
        for atom in block:
            for outer in self._contexts(atom):
                if outer.parts is None:
                    continue
                here = set(self.leaves(beside)) if here is None else here
                parts = [k for k, p in enumerate(outer.parts) if here & set(self.leaves(p))]
                if len(parts) == 1:
                    atom = self.member(atom, outer, parts[0])
                    break
            out.append(atom)
        return tuple(out)

    def _contexts(self, atom: Atom) -> list[Atom]:
        """Of the atom, or of all that it is the sum of."""
        root = self.find(atom)
        if root.parts is None:
            return self.context(root) if root.within else []
        return list(dict.fromkeys(c for leaf in self.leaves((root,)) for c in self.context(leaf)))

    def leaves(self, block: Iterable[Atom]) -> Iterator[Atom]:
        """Representatives that are not taken apart any further."""
        for atom in block:
            root = self.find(atom)
            if root.parts is None:
                yield root
            else:
                for part in root.parts:
                    yield from self.leaves(part)

    def atoms(self, axis: AtomAxis) -> Iterator[Atom]:
        """The representatives that the axis is made of."""
        for block in self.normal(axis):
            yield from self.leaves(block)

    def pin(self, axis: AtomAxis, why: str, by_number: bool = False) -> None:
        """These positions stay in order.

        Arguments:
            by_number: their units are only chosen by number, as experts are.
        """
        for atom in list(self.atoms(axis)):
            self._pin_atom(atom, why, by_number)

    def _pin_atom(self, atom: Atom, why: str, by_number: bool = False) -> None:
        atom = self.find(atom)
        if atom.parts is not None:
            self.pin(atom.parts, why, by_number)
            return
        if atom.pinned is None or (atom.by_number and not by_number):
            atom.pinned, atom.by_number = why, by_number
        if by_number:
            return
        shares, atom.shares = atom.shares, {}
        for share in shares.values():
            self.pin(((share,),), why)

    def written(self, axis: AtomAxis) -> None:
        """Something is written into a tensor: its numbers are no longer equal along the axis."""
        for atom in self.atoms(axis):
            atom.equal = False

    # Taking apart

    def _wrapped(self, axis: AtomAxis) -> Atom:
        """An axis as one atom."""
        if len(axis) == 1 and len(axis[0]) == 1:
            return axis[0][0]
        if not axis:
            return Atom(1, pinned="one unit")
        return Atom(total(axis), parts=axis)

    def _product(self, atom: Atom, outer: int, flipped: bool = False) -> AtomBlock:
        """``atom`` as ``outer`` times the rest, row-major; the rest lies within the outer part.

        Or, ``flipped``, the outer part within the rest.
        """
        rest = atom.size // outer
        if atom.pinned is not None and not atom.equal:  # nothing depends on its parts
            return (Atom(outer, pinned=atom.pinned), Atom(rest, pinned=atom.pinned))
        first = Atom(outer, within=atom.within, equal=atom.equal)
        second = Atom(rest, within=atom.within, equal=atom.equal)
        inner, holder = (first, second) if flipped else (second, first)
        inner.within = (*atom.within, holder)
        shares, atom.shares = self._shares(atom), {}
        atom.parts = ((first, second),)
        for key, share in shares.items():
            pair = self.divide(((share,),), [outer, rest])
            first.shares[key], second.shares[key] = map(self._wrapped, pair)
        return (first, second)

    def _sum(self, atom: Atom, first: int) -> AtomBlock:
        """``atom`` as its first units and the others."""
        sizes = (first, atom.size - first)
        if atom.pinned is not None and not atom.equal:
            low, high = (Atom(size, pinned=atom.pinned) for size in sizes)
            return low, high
        low, high = (Atom(size, within=atom.within, equal=atom.equal) for size in sizes)
        shares, atom.shares = self._shares(atom), {}
        atom.parts = ((low,), (high,))
        for key, share in shares.items():
            cut = self.cut(((share,),), first)
            low.shares[key], high.shares[key] = map(self._wrapped, cut)
        return low, high

    def cut(self, axis: AtomAxis, at: int) -> tuple[AtomAxis, AtomAxis]:
        """The axis before and from position ``at``."""
        blocks, start = self.normal(axis), 0
        for i, block in enumerate(blocks):
            end = start + length(block)
            if at == start:
                return blocks[:i], blocks[i:]
            if at < end:
                head, tail = self._cut_block(block, at - start)
                return (*blocks[:i], *head), (*tail, *blocks[i + 1 :])
            start = end
        return blocks, ()

    def _cut_block(self, block: AtomBlock, at: int) -> tuple[AtomAxis, AtomAxis]:
        units, rest = divmod(at, length(block[1:]))
        if rest and all(a.pinned is not None for a in self.leaves(block)):
            why = block[0].pinned
            return ((Atom(at, pinned=why),),), ((Atom(length(block) - at, pinned=why),),)
        low, high = self._split(block, units)
        if not rest:
            return low, high
        one, high = self._split(high[0], 1)  # the unit that is cut itself
        head, tail = self.cut(one, rest)
        return (*low, *head), (*tail, *high)

    def _split(self, block: AtomBlock, units: int) -> tuple[AtomAxis, AtomAxis]:
        """A block before and from a unit of its first factor."""
        head, rest = self.find(block[0]), block[1:]
        if units in (0, head.size):
            return ((), (block,)) if units == 0 else ((block,), ())
        first, second = self._sum(head, units)
        if head.parts is not None:
            low, high = (self.members(rest, head, k) for k in (0, 1))
        else:
            low = tuple(self._stretch(a, head, first, 0) for a in rest)
            high = tuple(self._stretch(a, head, second, units) for a in rest)
        return self.normal(((first, *low),)), self.normal(((second, *high),))

    def _stretch(self, atom: Atom, outer: Atom, part: Atom, start: int) -> Atom:
        """Of an atom within the pinned ``outer``, what lies in the stretch ``part`` of it."""
        atom = self.find(atom)
        if outer not in self._contexts(atom) or atom.pinned is not None:
            return atom
        members = [self.member(atom, outer, start + i) for i in range(part.size)]
        if part.size == 1:
            return members[0]
        others = tuple(c for c in self._contexts(atom) if c is not outer)
        shares = {(part, i): m for i, m in enumerate(members)}
        return Atom(atom.size, within=(*others, part), shares=shares)

    def piece(self, axes: Sequence[AtomAxis], dim: int, start: int, size: int) -> list[AtomAxis]:
        """The axes of a tensor cut down to a stretch of one of them."""
        out = list(axes)
        if size == total(axes[dim]):
            return out
        whole = self.normal(axes[dim])
        _, rest = self.cut(whole, start)
        out[dim], _ = self.cut(rest, size)
        if len(whole) == 1 and len(whole[0]) == 1 and (outer := whole[0][0]).pinned is not None:
            part = out[dim][0][0]
            for i, axis in enumerate(out):
                if i != dim:
                    own = (tuple(self._stretch(a, outer, part, start) for a in b) for b in axis)
                    out[i] = tuple(own)
        return self._parts_here(out)

    def _parts_here(self, axes: Sequence[AtomAxis]) -> list[AtomAxis]:
        """Atoms within one that was cut, as their share of the part that is left in the tensor."""
        here = [a for axis in axes for a in self.atoms(axis)]
        return [tuple(self.beside(b, here) for b in self.normal(axis)) for axis in axes]

    def pick(self, axes: Sequence[AtomAxis], dim: int, i: int) -> list[AtomAxis]:
        """The axes of a tensor at position ``i`` of one of them, without that one."""
        out, start = list(axes), 0
        for block in self.normal(out[dim]):
            if i < start + length(block):
                out = self.piece(out, dim, start, length(block))
                break
            start += length(block)
        why = f"{PICKED} in {self.where}"
        axis = self.normal(out.pop(dim))
        self.pin(axis, why, by_number=True)
        if len(axis) != 1 or len(axis[0]) != 1:
            return out
        outer = axis[0][0]
        outer.reached.add(i - start)
        return [
            tuple(self.members(block, outer, i - start) for block in self.normal(other))
            for other in out
        ]

    # Making equal

    def join(self, x: AtomAxis, y: AtomAxis) -> AtomAxis:
        """:meth:`unify`; returns the one that says more of the units."""
        uneven = [any(a.equal for a in self.atoms(axis)) for axis in (x, y)]
        if all(uneven):
            if all(a.equal for a in self.atoms(x)):
                return y
            if all(a.equal for a in self.atoms(y)):
                return x
            self.written(x)
            self.written(y)
        self.unify(x, y)
        return y if uneven[0] and not uneven[1] else x

    def unify(self, x: AtomAxis, y: AtomAxis) -> None:
        """Position i of both axes is the same unit, for every i."""
        left, right = list(x), list(y)
        while left and right:
            left[:1], right[:1] = self._normal(left[0]), self._normal(right[0])
            a, b = length(left[0]), length(right[0])
            if a == b:
                self._unify_block(left.pop(0), right.pop(0))
                continue
            side = left if a > b else right
            head, tail = self._cut_block(side[0], min(a, b))
            side[:1] = [*head, *tail]

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
            later = {*self.leaves(xs[1:]), *self.leaves(ys[1:])}
            flipped = bool(later & {*self._contexts(a), *self._contexts(b)})
            if a.size == b.size:
                if flipped:  # outer units first: whether inner ones share an order depends on them
                    self._unify_block(tuple(xs[1:]), tuple(ys[1:]))
                self._unify_atoms(a, b)
                if flipped:
                    return
                xs.pop(0)
                ys.pop(0)
                continue
            big, small, rest = (a, b, xs) if a.size > b.size else (b, a, ys)
            if big.size % small.size:
                why = f"its units are regrouped in {self.where}"
                self.pin((tuple(xs),), why)
                self.pin((tuple(ys),), why)
                return
            rest[:1] = self._product(big, small.size, flipped)

    def _unify_atoms(self, x: Atom, y: Atom) -> None:
        while True:
            x, y = self.find(x), self.find(y)
            if x is y:
                return
            if x.parts is not None or y.parts is not None:
                self._unify_parts(x, y)
                return
            if x.equal or y.equal:
                return
            if x.pinned is not None or y.pinned is not None:
                break
            left, right = self.context(x), self.context(y)
            gone = [(x, c) for c in left if c not in right] + [
                (y, c) for c in right if c not in left
            ]
            if not gone:
                break
            self.uniform(*gone[0])
        shares = self._shares(x)
        pairs = [(shares[k], s) for k, s in self._shares(y).items() if k in shares]
        y.link = x
        x.shares = {**self._shares(y), **shares}
        x.reached |= y.reached
        x.tells = (*x.tells, *y.tells)
        reasons = [(a.pinned, a.by_number) for a in (x, y) if a.pinned is not None]
        for why, by_number in reasons:
            self._pin_atom(x, why, by_number)
        for a, b in pairs:
            self._unify_atoms(a, b)

    def _unify_parts(self, x: Atom, y: Atom) -> None:
        self.unify(((x,),), ((y,),))
        x, y = self.find(x), self.find(y)
        if x is y or x.parts is None or y.parts is None:
            return
        if [length(b) for b in x.parts] == [length(b) for b in y.parts]:
            y.link = x  # what lies within one lies within the other

    def uniform(self, atom: Atom, outer: Atom) -> None:
        """An atom within another has the same order in every unit of that other one."""
        atom, outer = self.find(atom), self.find(outer)
        atom.within = tuple(c for c in self.context(atom) if c is not outer)
        shares = self._shares(atom)
        atom.shares = {key: s for key, s in shares.items() if key[0] is not outer}
        for key, share in shares.items():
            if key[0] is outer:
                self._unify_atoms(atom, share)

    def _shares(self, atom: Atom) -> dict[tuple[Atom, int], Atom]:
        """With representatives as keys."""
        out: dict[tuple[Atom, int], Atom] = {}
        for (outer, i), share in list(atom.shares.items()):
            key = (self.find(outer), i)
            if key in out:
                self._unify_atoms(out[key], share)
            else:
                out[key] = share
        return out

    def members(self, block: AtomBlock, outer: Atom, i: int) -> AtomBlock:
        """:meth:`member` of each factor of a block."""
        return tuple(self.member(a, outer, i) for a in block)

    def member(self, atom: Atom, outer: Atom, i: int) -> Atom:
        """Of an atom within ``outer``, the units that lie in unit ``i`` of it; or in its part."""
        atom, outer = self.find(atom), self.find(outer)
        if atom.pinned is not None or atom.equal or outer not in self._contexts(atom):
            return atom
        if atom.parts is not None:
            parts = (tuple(self.member(a, outer, i) for a in block) for block in atom.parts)
            return Atom(atom.size, parts=tuple(parts))
        atom.shares = self._shares(atom)
        if (outer, i) not in atom.shares:
            others = [self.member(c, outer, i) for c in self.context(atom) if c is not outer]
            beside = outer.parts[i] if outer.parts is not None else ()
            new = Atom(atom.size, within=(*beside, *others))
            # Unit i of one outer atom, and then unit k of another: the same as the other way round.
            for (other, k), share in self._shares(atom).items():
                if other is not outer:
                    new.shares[other, k] = self.member(share, outer, i)
            atom.shares[outer, i] = new
        return self.find(atom.shares[outer, i])

    def alike_in_all(self, outer: Atom, atoms: Iterable[Atom]) -> None:
        """What holds in each unit of ``outer`` that was looked into, holds in all of them.

        Atoms within it were told apart unit by unit; they are taken apart and unified as those are.
        """
        outer, todo = self.find(outer), list(dict.fromkeys(atoms))
        met: dict[tuple[tuple[int, Atom], ...], Atom] = {}
        while todo:
            atom = self.find(todo.pop())
            if atom.parts is not None:
                todo += self.leaves((atom,))
                continue
            shares = [(k, self.find(s)) for (o, k), s in self._shares(atom).items() if o is outer]
            shares.sort(key=lambda pair: pair[0])
            if not shares or atom.pinned is not None:
                continue
            if reasons := [s.pinned for _, s in shares if s.pinned is not None]:
                self._pin_atom(atom, reasons[0])
            elif any(s.parts is not None for _, s in shares):
                cuts = {tuple(length(b) for b in self.normal(((s,),))) for _, s in shares}
                first = min(cuts)[0] if len(cuts) == 1 and len(min(cuts)) > 1 else 0
                if not first:
                    self.uniform(atom, outer)
                else:
                    todo += self._sum(atom, first)
            elif len({s for _, s in shares}) == 1 and len(shares) > 1:
                self.uniform(atom, outer)
            else:
                self._unify_atoms(met.setdefault(tuple(shares), atom), atom)

    def lies_within(self, atom: Atom, outer: Atom) -> bool:
        """True if the two are an inner and an outer atom of it."""
        return self.find(outer) in self._contexts(atom)

    def close(self, axes: Sequence[AtomAxis]) -> None:
        """Inner units whose outer ones are no longer in the tensor have one order for all."""
        present = list(dict.fromkeys(a for axis in axes for a in self.atoms(axis)))
        inner = [a for a in present if a.within]
        if not inner:
            return
        here = {*present, *(self.find(t) for a in present for t in a.tells)}
        for atom in inner:
            for outer in self.context(atom):
                parts = {a for a in self.leaves([outer]) if a.size > 1} if outer.parts else {outer}
                if not here >= parts:
                    self.uniform(atom, outer)

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
            if len(axis) == 1:
                rest += axis[0]
            elif axis:
                rest += (self._wrapped(axis),)
        return tuple((*block, *rest) for block in first or ((),))

    def divide(self, axis: AtomAxis, sizes: Sequence[int]) -> list[AtomAxis]:
        """One axis as several, row-major."""
        if len(sizes) == 1:
            return [axis]
        axis = self.normal(axis)
        if len(axis) > 1:
            rows = self._stacked(axis, sizes[0])
            if rows is None:
                return self._give_up(axis, sizes)
            return [rows[0], *self.divide(rows[1], sizes[1:])]
        factors: list[Atom] = list(axis[0])
        out: list[AtomAxis] = []
        for size in sizes:
            block: list[Atom] = []
            while size > 1:
                atom = self.find(factors[0])
                if atom.parts is not None and len(atom.parts) == 1:
                    factors[:1] = atom.parts[0]
                    continue
                if max(atom.size, size) % min(atom.size, size):
                    return self._give_up(axis, sizes)
                if atom.size <= size:
                    block.append(factors.pop(0))
                    size //= atom.size
                elif atom.parts is None:
                    factors[:1] = self._product(atom, size)
                else:
                    rows = self._stacked(self.normal(((atom,),)), size)
                    if rows is None:
                        return self._give_up(axis, sizes)
                    factors[:1] = map(self._wrapped, rows)
            out.append((tuple(block),) if block else ())
        return out

    def _stacked(self, axis: AtomAxis, rows: int) -> tuple[AtomAxis, AtomAxis] | None:
        """Pieces one behind the other, seen as rows: each row has the units of its piece."""
        width, rest = total(axis) // rows, axis
        found: list[tuple[AtomAxis, AtomAxis]] = []  # rows of a block, and what lies within
        while rest := self.normal(rest):
            count = length(rest[0]) // width
            if count > 1 and length(rest[0]) % width == 0:
                outer, inner = self.divide(rest[:1], [count, width])
                if len(self.normal(outer)) != 1:
                    return None
                rest = rest[1:]
            else:
                outer = ((Atom(1, pinned="one unit"),),)
                inner, rest = self.cut(rest, width)
            found.append((outer, inner))
        if all(total(outer) == 1 for outer, _ in found):
            whole = Atom(rows, pinned=f"pieces are stacked in {self.where}")
        else:
            whole = Atom(rows, parts=tuple(outer[0] for outer, _ in found))
        shares = {(whole, i): self._wrapped(inner) for i, (_, inner) in enumerate(found)}
        return ((whole,),), ((Atom(width, within=(whole,), shares=shares),),)

    def rows(self, outer: AtomAxis, pieces: Sequence[AtomAxis]) -> AtomAxis:
        """An axis with the units of one piece in each unit of ``outer``, which stays in order."""
        whole = outer[0][0]
        shares = {(whole, i): self._wrapped(piece) for i, piece in enumerate(pieces)}
        return ((Atom(total(pieces[0]), within=(whole,), shares=shares),),)

    def _give_up(self, axis: AtomAxis, sizes: Sequence[int]) -> list[AtomAxis]:
        why = f"its units are regrouped in {self.where}"
        self.pin(axis, why)
        return [self.fixed(s, why) for s in sizes]
