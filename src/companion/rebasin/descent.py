"""Where weight matching stands: permutations, B as they permute it, and the gains of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from companion.core.theta import Theta
from companion.rebasin.assignment import assign, assign_nested, prices
from companion.rebasin.spec import Permutations, Spec
from companion.rebasin.terms import Family, Term

THIN = 16
"""Columns up to which terms are gathered into one product: biases and norm scales have one each,
and adding n x n outer products one by one costs more than multiplying them together."""

ROOM = 0.25
"""Of the size of both networks: what gains may take that are kept from the anchored pass."""


class State:
    """Where a descent stands: permutations, and B as they permute it. Inputs are never written."""

    def __init__(self, spec: Spec, a: Theta, b: Theta, perms: Permutations):
        self.spec, self.a = spec, a
        self.perms = {n: p.detach().cpu().clone() for n, p in perms.items()}
        self.stay = spec.identity()
        self.price: dict[str, Tensor] = {}  # of B's units where they are now
        self.kept: dict[str, tuple[frozenset[Term], Tensor]] = {}
        self.last: Tensor | None = None
        size = sum(x.numel() * x.element_size() for n in spec.objective for x in (a[n], b[n]))
        self.room = size * ROOM
        moved = any(not torch.equal(self.perms[n], p) for n, p in self.stay.items())
        self.now = {
            t: spec.permute_tensor(b[t], t, self.perms) if moved else b[t] for t in spec.objective
        }

    def gram(self, terms: Sequence[Term]) -> Tensor | None:
        """Gains of all pairs of rows: what unit i of A gets from what is now at j of B. Float64."""
        total: Tensor | None = None
        thin: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        for term in terms:
            device = device_of(self.a[term.tensor])
            x = term.rows(self.a[term.tensor], device)
            y = term.rows(self.now[term.tensor], device)
            if x.shape[1] <= THIN:
                thin.setdefault(device, []).append((x, y))
                continue
            total = _add(total, x, y)
        for pairs in thin.values():
            x, y = (torch.cat(part, 1) for part in zip(*pairs, strict=True))
            total = _add(total, x, y)
        return total

    def best(
        self, family: Family, terms: Mapping[str, tuple[Term, ...]], tol: float
    ) -> tuple[dict[str, Tensor], float] | None:
        """The best step for one family from where it is now, and what ``terms`` gain by it.

        Returns:
            permutations relative to the present ones, and the rise; None if there is none
            above ``tol``.
        """
        outer = self._gains(family, terms[family.outer])
        if not family.inner:
            if outer is None:
                return None
            here = float(outer.trace())
            price = self.price.get(family.outer)
            # No assignment exceeds the sum of the rows' maxima, nor that of the columns', nor what
            # the rows can have at any prices.
            tops = [outer.amax(1).sum(), outer.amax(0).sum()]
            if price is not None:
                tops.append((outer - price).amax(1).sum() + price.sum())
            if min(map(float, tops)) - here <= tol:
                return None
            p = assign(outer, price)
            rise = float(outer[torch.arange(len(p)), p].sum()) - here
            if family.linear:
                self.price[family.outer] = prices(outer, p, price)
            return ({family.outer: p}, rise) if rise > tol else None
        grams = {g: self.gram(terms[g]) for g in family.inner}
        known = {g: m for g, m in grams.items() if m is not None}
        units = self.spec.groups[family.outer].size
        here = sum(float(m.trace()) for m in (outer, *known.values()) if m is not None)
        p, inner, value = assign_nested(outer, known, units)
        if value - here <= tol:
            return None
        step = {g: inner.get(g, self.stay[g]) for g in family.inner}
        return {family.outer: p, **step}, value - here

    def _gains(self, family: Family, terms: Sequence[Term]) -> Tensor | None:
        """:meth:`gram`, from where :meth:`keep` has left it."""
        done, total = self.kept.pop(family.outer, (frozenset(), None))
        if total is not None:
            self.room += total.nbytes
        more = self.gram([t for t in terms if t not in done])
        if total is not None and more is not None:
            total += more
        self.last = more if total is None else total
        return self.last

    def keep(self, family: Family, terms: Sequence[Term], p: Tensor | None) -> None:
        """Keep the gains just summed over ``terms`` for the next look at the family.

        They are kept for the units where they are after the step ``p`` (None: no step), as long
        as no neighbour takes one, and as far as there is room.
        """
        total, self.last = self.last, None
        if total is None or family.inner or not family.linear or total.nbytes > self.room:
            return
        self.room -= total.nbytes
        if p is not None:
            total = total[:, p.to(total.device)]
        self.kept[family.outer] = (frozenset(terms), total)

    def stepped(self, family: Family, step: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that a step of one family moves, moved."""
        relative = {**self.stay, **step}
        return {
            t: _move(self.spec, self.now[t], t, relative, (family.outer, *family.inner))
            for t in family.tensors
        }

    def product(self, tensors: Mapping[str, Tensor]) -> float:
        """``<A, tensors>`` over the given entries, in float64."""
        return sum(dot(self.a[t], x) for t, x in tensors.items())

    def take(self, family: Family, step: Mapping[str, Tensor], moved: dict[str, Tensor]) -> None:
        """Make the step."""
        self.now.update(moved)
        for outer, (terms, total) in list(self.kept.items()):
            if any(t.tensor in moved for t in terms):
                del self.kept[outer]
                self.room += total.nbytes
        p = step[family.outer]
        self.perms[family.outer] = self.perms[family.outer][p]
        if family.outer in self.price:
            self.price[family.outer] = self.price[family.outer][p]
        for g in family.inner:
            self.perms[g] = self.perms[g][p].gather(1, step[g])

    def improve(self, family: Family, tol: float) -> float:
        """Solve one family; take the step if the objective rises by more than ``tol``.

        Returns:
            by how much it rose, 0 if nothing changed.
        """
        found = self.best(family, family.terms, tol)
        if found is None:
            return 0.0
        step, rise = found
        moved = self.stepped(family, step)
        if not family.linear:  # the assignment saw the other axes as they were: look again
            rise = self.product(moved) - self.product({t: self.now[t] for t in family.tensors})
            if rise <= tol:
                return 0.0
        self.take(family, step, moved)
        return rise


def _add(total: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """``total + x @ y.T``, in place and on the device of ``total`` if there is one."""
    if total is None:
        return x @ y.T
    if total.device == x.device:
        return total.addmm_(x, y.T)
    return total.add_((x @ y.T).to(total.device))


def _move(
    spec: Spec, x: Tensor, name: str, relative: Permutations, groups: tuple[str, ...]
) -> Tensor:
    """One tensor with its axes permuted, only those that hold one of ``groups``."""
    for dim, axis in enumerate(spec.axes[name]):
        if any(f in groups for block in axis for f in block):
            whole = len(axis) == 1 and len(axis[0]) == 1
            index = relative[str(axis[0][0])] if whole else spec.index(axis, relative)
            x = x.index_select(dim, index.to(x.device))
    return x


def device_of(x: Tensor) -> torch.device:
    """Where sums over ``x`` are done: its own device, but the CPU for one without float64."""
    return torch.device("cpu") if x.device.type == "mps" else x.device


def dot(x: Tensor, y: Tensor) -> float:
    device = device_of(x)
    x = x.detach().to(device).double().reshape(-1)
    return float(x.dot(y.detach().to(device).double().reshape(-1)))
