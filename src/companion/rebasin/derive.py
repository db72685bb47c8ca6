"""From a network to its permutation spec: watch one forward pass, then prove what was seen.

    spec = derive(module, example)      # example: what forward takes, such as a batch of two images

Nothing about any network is written down. Each axis of each parameter starts out as units of their
own; the operations of one real forward pass (:mod:`companion.rebasin.rules`) say which of them are
the same units, and which cannot move. What is left is proven with random permutations
(:mod:`companion.rebasin.proof`) before anybody gets to see it. Source: our chapter 2.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, groupby
from typing import Any

import torch
from torch import Tensor, nn

from companion.core.errors import BadParameter, one_of
from companion.core.theta import layout
from companion.rebasin import proof, rules, spec
from companion.rebasin.axes import Atom, AtomAxis, AtomBlock, length, total
from companion.rebasin.trace import Tracer, taken_apart

logger = logging.getLogger("companion")

ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "sigmoid", "hardtanh", "leaky_relu", "elu", "mish")
"""Functions after which activation matching looks (Git Re-Basin, Section 3.1)."""

NATURAL = (
    *("the input", "the output", "positions of", "entries of a vocabulary", "entries of a table"),
    "whole numbers",
)
"""How reasons begin that go without saying; all others are told, in :attr:`Spec.held`."""

PIECES = (rules.PICKED, "pieces are stacked", "stacked in order")
"""Reasons of an axis of pieces that have units of their own, such as queries, keys and values."""


def derive(module: nn.Module, example: Any, *, unread: str = "refuse") -> spec.Spec:
    """Which units of ``module`` can be reordered without changing what it computes.

    Arguments:
        module: any network; not changed. Watched in eval mode, in float64, on its own device.
        example: what its forward takes: a tensor, a tuple of positional arguments, or a mapping of
            named ones. Two images are enough. Shapes matter where the network's operations depend
            on them.
        unread: what is to be done about parameters that forward does not read on this example
            (heads of other tasks, auxiliary outputs of training): ``refuse``, since whatever reads
            them would see reordered units without knowing; or ``hold``, which leaves them as they
            are and says so in ``held``.

    Returns:
        the spec, proven by random permutations. Axes on which nothing can move are not in it;
        ``held`` says why where that does not go without saying (grouped convolutions, operations
        without a rule), and ``notes`` what the proof does not cover.

    Raises:
        BadParameter: forward fails on the example, or makes no floating-point output; parameters
            are not read.
        Unproven: outputs change under the permutations found; the message names the layers.

    Source: the spec is Git Re-Basin's (Section 3.2, its weight_matching code writes one by hand for
    each network); deriving and proving it is ours. Chapter 2.
    """
    one_of("unread", unread, ("refuse", "hold"))
    first: BaseException | None = None
    # What lies within other units, and experts that are chosen by number, are guesses that the
    # proof decides: if it does not agree, then without them.
    for nested in (True, False):
        # Noise can make a deep network chaotic: then with less of it.
        for strength in (1.0, 0.1, 0.0):
            try:
                return _derived(module, example, unread, nested, strength)
            except proof.Chaotic as e:
                first = first or e
            except proof.Unproven as e:
                first = first or e
                break
    assert first is not None
    raise first


def _derived(
    module: nn.Module, example: Any, unread: str, nested: bool, strength: float
) -> spec.Spec:
    net, watcher, reference = _watched(module, example, nested, strength)
    for tensor in net.raw:
        watcher.axes.pin_all(watcher.axes.of(tensor), "the output")
    parameters = layout(module).parameters
    missed = [n for n in parameters if id(watcher.state[n]) not in watcher.read]
    if missed and unread == "refuse":
        raise BadParameter(
            f"forward does not read {', '.join(missed[:3])}"
            f"{f' and {len(missed) - 3} more' if len(missed) > 3 else ''} on this example, so "
            "nothing is known of their units. Give an example that runs them, or say "
            'unread="hold" to leave them as they are.'
        )
    found = _Reading(watcher, parameters).read(example)
    proof.prove_spec(net, found, reference)
    return found


def _watched(
    module: nn.Module, example: Any, nested: bool, strength: float
) -> tuple[proof.Subject, Watcher, list[Tensor]]:
    """One forward pass under watch, with as much noise as the network bears.

    In float64; in float32 where a layer takes nothing else.
    """
    first: BadParameter | None = None
    for precision in (torch.float64, torch.float32):
        # Some inputs must stay what they are (logarithms, numbers of categories), some weights too.
        for shake in (("weights", "inputs"), ("weights",), ()) if strength else ((),):
            how: Any = {"shake": shake, "precision": precision, "strength": strength}
            net = proof.Subject(module, example, **how)
            watcher = Watcher(net, nested)
            try:
                # Fused attention and recurrent layers are one operation; taken apart many known.
                with taken_apart(recurrent=True), watcher:
                    reference = net.run()
            except BadParameter as e:
                first = first or e
                last = e
                continue
            if not shake or all(bool(torch.isfinite(t).all()) for t in reference):
                return net, watcher, reference
    raise (last if "no floating-point" in str(last) else first)  # type: ignore[misc]  # one failed at least


@dataclass(frozen=True)
class Seen:
    """The first output of one operation, named as in a :class:`spec.ActivationSite`."""

    module: str
    op: str
    nth: int
    axes: tuple[AtomAxis, ...]
    data: bool  # it depends on the input, so it could be an activation site


class Watcher(Tracer):
    """Keeps the axes of every tensor of a forward pass of ``net``."""

    def __init__(self, net: proof.Subject, nested: bool = True):
        super().__init__(net.module)
        self.nested = nested
        self.axes = rules.TensorAxes()
        self.log: list[Seen] = []
        self.low_precision = False
        self.state: dict[str, list[AtomAxis]] = {}  # tied entries share one list
        self.read: set[int] = set()  # ids of the lists that an operation has read
        self.notes: list[str] = []
        self.routers: list[Atom] = []  # units of which the largest were looked for, by their number
        self.routed: Any = type(self.axes.known)()  # the network's tensors -> the last one before
        self.computes: dict[str, list[str]] = {}  # in which types less than float64, where
        self._storages: dict[int, list[list[AtomAxis]]] = {}  # of tensors with equal numbers
        known = self.axes.known
        for name, tensor in net.state.items():
            if tensor not in known:
                movable = tensor.is_floating_point()
                numbers = "complex" if tensor.is_complex() else "whole"
                fixed = self.axes.fix(tensor.shape, f"{numbers} numbers")
                known[tensor] = self._units(tensor.shape) if movable else fixed
                self.axes.own[tensor] = True
            self.state[name] = known[tensor]
        self._live: Any = type(known)()  # what is made of the input
        for tensor in net.tensors:
            known[tensor] = self.axes.fix(tensor.shape, "the input")
            self._live[tensor] = True

    def _units(self, shape: Sequence[int]) -> list[AtomAxis]:
        """Units of their own on each axis; on the later ones in an order for each of the first."""
        first, *others = [self.axes.free(n) for n in shape] or [()]
        outer = first[0] if first and self.nested else ()
        inner = [((Atom(a[0][0].size, within=outer),),) if a else () for a in others]
        return [first, *inner][: len(shape)]

    def _written(self, func: Any, named: Mapping[str, Any]) -> None:
        """What is written into loses the equality of its numbers, in all of its views."""
        for argument in func._schema.arguments:
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for tensor in rules.tensors_in([named.get(argument.name)]):
                places = self._storages.pop(tensor.untyped_storage().data_ptr(), [])
                for axes in (*places, self.axes.of(tensor)):
                    for axis in axes:
                        self.axes.written(axis)

    def _note_routing(self, tensor: Tensor) -> None:
        """Who reads positions on an axis sees its order; stacks of as many tensors follow it."""
        axes = self.axes
        if tensor in axes.positions:
            axis = axes.numbers[tensor] = axes.positions.pop(tensor)
            if len(found := list(axes.atoms(axis))) == 1:
                self.routers.append(found[0])
            axes.pin(axis, f"its order is seen in {axes.where}", by_number=True)
        if tensor in axes.own and tensor.ndim > 1 and tensor not in self.routed:
            like = [a for a in reversed(self.routers) if a.size == tensor.shape[0]]
            if self.nested and like:
                self.routed[tensor] = like[0]

    def follows(self, tensor: Tensor) -> Atom | None:
        """The choice by number that a stack follows, if its first axis is itself chosen from."""
        find, axis = self.axes.find, self.axes.normal(self.axes.known[tensor][0])
        router = find(self.routed[tensor])
        if len(axis) != 1 or len(axis[0]) != 1 or not (axis[0][0].by_number and router.by_number):
            return None
        others = {find(r) for r in self.routers} - {router}
        if axis[0][0] in others:
            return None  # the scores of a later choice
        self.axes.unify(((router,),), axis)
        return find(router)

    def seen(
        self, func: Any, op: str, nth: int, args: tuple[Any, ...], kwargs: Any, out: Any
    ) -> None:
        axes = self.axes
        axes.where = where = self.where or "the network"
        names = [a.name for a in func._schema.arguments]
        named = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
        named = {n: named.get(n) for n in names} | dict(zip(names, args, strict=False)) | kwargs
        given = rules.tensors_in(named.values())
        made = rules.tensors_in([out])
        if not given and not made:
            return
        self.read.update(id(axes.known[t]) for t in given if t in axes.known)
        # Where numbers go to, or come from, the positions they hold: in any order, too (rules).
        where_to = [named.get("index"), named.get("indices")]
        known = op.rstrip("_") in rules.BY_POSITION
        own = set(map(id, rules.tensors_in(where_to))) if known else ()
        for tensor in sorted(given, key=lambda t: t not in axes.positions):
            if id(tensor) not in own:
                self._note_routing(tensor)
        if func._schema.is_mutable:
            self._written(func, named)
        rule = rules.RULES.get(op.rstrip("_"))
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = rules.pointwise
        found: Any = rule and rule(axes, named, out)
        if found is None:
            if given:
                logger.debug("no rule for %s in %s", op, where)
            why = f"{spec.UNKNOWN} {op} in {where}"
            for tensor in given:
                axes.pin_all(axes.of(tensor), why)
            constant = f"{rules.CONSTANT}, made by {op}, in {where}"
            found = [axes.fix(t.shape, why if given else constant) for t in made]
        elif isinstance(out, Tensor):
            found = [found]
        for tensor in given:
            if tensor in self.routed:
                self.follows(tensor)
        if op in rules.SAME_NUMBERS and given[0] in axes.numbers:
            axes.numbers[made[0]] = axes.numbers[given[0]]
        live = any(t in self._live for t in given)
        if live and op == "_local_scalar_dense":
            self._note(f"forward reads a number out of its data in {where}: proven for this path")
        for tensor, mine in zip(made, found, strict=True):
            sizes = zip(mine, tensor.shape, strict=True)
            if len(mine) != tensor.ndim or any(n and n != total(axis) for axis, n in sizes):
                raise AssertionError(f"rule for {op}: {mine} for shape {tuple(tensor.shape)}")
            axes.close(mine)
            axes.known[tensor] = mine
            if any(a.equal for axis in mine for a in axes.atoms(axis)):
                where_it_is = tensor.untyped_storage().data_ptr()
                self._storages.setdefault(where_it_is, []).append(mine)
            if live:
                self._live[tensor] = True
                if tensor.dtype in (torch.float32, torch.float16, torch.bfloat16):
                    self.low_precision = True
                    kind = str(tensor.dtype).removeprefix("torch.")
                    places = self.computes.setdefault(kind, [])
                    if where not in places:
                        places.append(where)
        if found:
            self.log.append(Seen(self.where, op, nth, tuple(found[0]), live))

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def told(self) -> list[str]:
        """The notes; where the forward pass computes in less than float64 is one for each type."""
        places = [
            f"forward computes in {kind} in {where[0]}"
            f"{f' and {len(where) - 1} more' if len(where) > 1 else ''}: proven to 1e-4"
            for kind, where in self.computes.items()
        ]
        return [*self.notes, *places]


Piece = tuple[AtomBlock, Tensor | None]
"""A block without anything that was taken apart, and where its positions are (None: in order)."""


class _Reading:
    """What is left of the algebra after a forward pass, read off as groups, axes and sites."""

    def __init__(self, watcher: Watcher, parameters: Sequence[str]):
        self.watcher, self.axes, self.parameters = watcher, watcher.axes, parameters
        self.names: dict[Atom, str] = {}
        self.groups: dict[str, spec.Group] = {}

    def read(self, example: Any) -> spec.Spec:
        seen = self.watcher
        used = {n: axes for n, axes in seen.state.items() if id(axes) in seen.read}
        self._settle(used)
        for entry in seen.log:
            for axis in entry.axes:
                self._name(axis, entry.module)
        for name, found in used.items():  # what no operation has seen as a whole
            for axis in found:
                self._name(axis, name.rpartition(".")[0])
        axes, views = {}, {}
        for name, found in used.items():
            dims, pieces = self._laid_out(found)
            axes[name] = tuple(map(self._axis, pieces))
            orders = tuple(map(_order, pieces))
            if names_in(axes[name]) and (any(orders) or any(len(d) > 1 for d in dims)):
                shape = tuple(total(axis) for axis in found)
                views[name] = spec.View(shape, dims, orders)
        moving = {n: found for n, found in axes.items() if names_in(found)}
        present = {name for found in moving.values() for name in names_in(found)}
        groups = {n: g for n, g in self.groups.items() if n in present}
        unread = (n for n in self.parameters if n not in used)
        held = dict.fromkeys(unread, "forward does not read it on the example")
        for name in self.parameters:
            for dim, axis in enumerate(used.get(name, ())):
                blocks = [block for block, _ in self._pieces(axis)]
                atoms = (a for b in blocks for a in b if a.size > 1 and not _beside_moving(a, b))
                inside = chain.from_iterable((a, *a.shares.values()) for a in atoms)
                # Then whatever was written out unit by unit, as it stays in order itself.
                outer = (
                    a for a in self.axes.atoms(axis) if not (a.pinned or "").startswith(PIECES)
                )
                inside = chain(inside, outer)
                why = next((a.pinned for a in map(self.axes.find, inside) if a.pinned), None)
                if why and not why.startswith(NATURAL):
                    held[f"{name}[{dim}]"] = why
        return spec.Spec(
            groups,
            moving,
            tuple(n for n in self.parameters if n in moving),
            sites=self._sites(groups),
            held=held,
            notes=tuple(seen.told()),
            tolerance=1e-4 if seen.low_precision else 1e-8,
            example=example,
            views=views,
        )

    def _settle(self, used: Mapping[str, list[AtomAxis]]) -> None:
        """Two levels are all that a spec has: outer units, and units in each of them."""
        w, again = self.axes, True
        if self.watcher.nested:
            self._free_experts()
        for axis in (axis for axes in used.values() for axis in axes):
            for atom in [a for a in w.atoms(axis) if a.by_number]:
                w.pin(((atom,),), atom.pinned or "")
        while again:
            again = False
            for axes in used.values():
                leaves = {a for axis in axes for a in w.atoms(axis)}
                for atom in leaves:
                    if atom.pinned is not None or w.find(atom) is not atom:
                        continue
                    outer = [c for c in w.context(atom) if c.pinned is None and not c.parts]
                    fits = [c for c in outer if c in leaves and not w.context(c)]
                    for gone in [c for c in outer if c not in fits[:1]]:
                        w.uniform(atom, gone)
                        again = True

    def _free_experts(self) -> None:
        """Experts that are chosen by number: the order of all that is stacked, and of the choice.

        A network that sends its data to the experts with the largest scores computes the same with
        experts and scores in another order, whatever way it takes. What an operation sees, though,
        is only their numbers: so it is assumed here, and proven with all the rest.
        """
        w, seen = self.axes, self.watcher
        for router in dict.fromkeys(map(w.find, seen.routers)):
            stacks = [w.known[t] for t in seen.routed if seen.follows(t) is router]
            # Those that were read before the choice was made, whose first axis is that of scores.
            early = (w.known[t] for t in w.own if t.ndim > 2 and t not in seen.routed)
            stacks += [axes for axes in early if list(w.atoms(axes[0])) == [router]]
            if stacks and router.by_number:
                router.pinned, router.by_number = None, False
                inner = (axis for axes in stacks for axis in axes[1:])
                w.alike_in_all(router, [a for axis in inner for a in w.atoms(axis)])

    def _laid_out(
        self, axes: Sequence[AtomAxis]
    ) -> tuple[tuple[tuple[int, ...], ...], list[list[Piece]]]:
        """Dimensions that make an axis of the spec together, and what it is made of."""
        w = self.axes
        lies = [set(w.atoms(axis)) for axis in axes]
        to = list(range(len(axes)))
        for dim, atoms in enumerate(lies):
            inner = (c for a in atoms if a.pinned is None for c in w.context(a))
            outer = {x for c in inner for x in w.leaves([c])} - atoms
            for other, there in enumerate(lies):
                if other != dim and outer & there:
                    low, high = sorted((to[dim], to[other]))
                    to = [low if t == high else t for t in to]
        dims = tuple(tuple(d for d, t in enumerate(to) if t == first) for first in sorted(set(to)))
        return dims, [self._pieces(*(axes[d] for d in together)) for together in dims]

    def _pieces(self, *axes: AtomAxis) -> list[Piece]:
        """Blocks of one axis, or of several as one, row-major; all of it written out."""
        w = self.axes
        if len(axes) == 1 and all(map(self._plain, w.normal(axes[0]))):
            return [(block, None) for block in w.normal(axes[0])]
        size = math.prod(map(total, axes))
        where = torch.arange(size).view([total(axis) for axis in axes])
        out: list[Piece] = []
        blocks: list[tuple[AtomBlock, tuple[slice, ...]]] = [((), ())]
        for axis in axes:
            longer = []
            for block, at in blocks:
                start = 0
                for factor in w.normal(axis) or ((),):
                    end = start + length(factor)
                    longer.append(((*block, *factor), (*at, slice(start, end))))
                    start = end
            blocks = longer
        for block, at in blocks:
            sizes = [a.size for a in block]
            out += self._written_out(block, where[at].reshape(sizes))
        return out

    def _plain(self, block: AtomBlock) -> bool:
        """True if nothing in it has to be written out."""
        if len(block) == 1:
            return True
        inside = any(a.parts is not None for a in block)
        outer = {c for a in block if a.pinned is None for c in self.axes.context(a)}
        return not inside and not any(a.pinned is not None and a in outer for a in block)

    def _written_out(self, block: AtomBlock, where: Tensor) -> list[Piece]:
        """A block in blocks of nothing but units that move, or stay, as a whole."""
        w, out = self.axes, []
        block = w.beside(block, block)
        for k, factor in enumerate(block):
            atom = w.find(factor)
            before, after = block[:k], block[k + 1 :]
            if atom.parts is not None:
                start = 0
                for i, part in enumerate(atom.parts):
                    end = start + length(part)
                    own = where.narrow(k, start, end - start)
                    own = own.reshape(
                        [*own.shape[:k], *[a.size for a in part], *own.shape[k + 1 :]]
                    )
                    if len(atom.parts) > 1:
                        before, after = (
                            w.members(block[:k], atom, i),
                            w.members(block[k + 1 :], atom, i),
                        )
                    out += self._written_out((*before, *part, *after), own)
                    start = end
                return out
            others = (*before, *after)
            if atom.pinned is not None and any(
                w.find(a).pinned is None and w.lies_within(a, atom) for a in others
            ):
                for i in range(atom.size):
                    if atom.reached and i not in atom.reached:
                        self._hold_unreached(others, atom, i)
                    own = where.select(k, i)
                    out += self._written_out(w.members(others, atom, i), own)
                return out
        return [(tuple(map(w.find, block)), where.reshape(-1))]

    def _hold_unreached(self, block: AtomBlock, outer: Atom, i: int) -> None:
        """What the example does not run is not known."""
        for atom in block:
            new = self.axes.member(atom, outer, i)
            if new is not atom and new.pinned is None:
                why = f"unit {i} beside it is not run on the example"
                self.axes.pin(((new,),), why)

    def _name(self, axis: AtomAxis, module: str) -> None:
        for block, _ in self._pieces(axis):
            for atom in block:
                if atom.pinned is not None or atom in self.names or atom.size == 1 or atom.equal:
                    continue
                outer = self.axes.context(atom)
                if any(c.pinned is not None or c.parts is not None for c in outer):
                    continue
                if outer and outer[0] not in self.names:
                    if outer[0] not in block:
                        continue  # named where both are seen together
                    self._give(outer[0], module, None)
                self._give(atom, module, self.names[outer[0]] if outer else None)

    def _give(self, atom: Atom, module: str, outer: str | None) -> None:
        stem = f"{outer}/" if outer else f"{module or 'network'}#"
        numbered = (f"{stem}{n}" for n in count(1))
        names = (name.removesuffix("#1") for name in numbered)
        name = next(name for name in names if name not in self.groups)
        self.names[atom] = name
        self.groups[name] = spec.Group(name, atom.size, outer)

    def _axis(self, pieces: Sequence[Piece]) -> spec.Axis:
        """In names and numbers; neighbours that stay are one stretch."""
        out: list[spec.Block] = []
        for block, _ in pieces or [((), None)]:
            factors: list[spec.Factor] = []
            for name, run in groupby(block, self.names.get):
                sizes = [a.size for a in run]
                still = [math.prod(sizes)] if math.prod(sizes) != 1 else []
                factors += [name] * len(sizes) if name else still
            out.append(tuple(factors) or (1,))
        merged: list[spec.Block] = []
        for fixed, blocks in groupby(out, lambda b: len(b) == 1 and isinstance(b[0], int)):
            same = list(blocks)
            merged += [(sum(int(b[0]) for b in same),)] if fixed else same
        return tuple(merged)

    def _sites(self, groups: Mapping[str, spec.Group]) -> dict[str, spec.ActivationSite]:
        """For each group the last activation function on it, else the last operation at all."""
        best: dict[str, tuple[bool, spec.ActivationSite]] = {}
        for entry in self.watcher.log:
            if not entry.data:
                continue
            preferred = entry.op.rstrip("_") in ACTIVATIONS
            pieces = [self._pieces(axis) if axis else [] for axis in entry.axes]
            found = [self._axis(mine) if mine else () for mine in pieces]
            moving = [dim for dim, axis in enumerate(found) if names_in([axis])]
            if len(moving) != 1:
                continue  # another axis moves too: positions would not be the same samples
            dim = moving[0]
            order = _order(pieces[dim])
            for start, block in spec.Spec(self.groups, {}, ()).blocks(found[dim]):
                at = (dim - len(found), start, block, order)
                for name in names_in([(block,)]) & groups.keys():
                    # An inner group can be told apart only beside its outer one.
                    clear = groups[name].within in (None, *block)
                    if clear and (name not in best or preferred >= best[name][0]):
                        site = spec.ActivationSite(entry.module, entry.op, entry.nth, *at)
                        best[name] = (preferred, site)
        return {n: best[n][1] for n in groups if n in best}


def _beside_moving(atom: Atom, block: AtomBlock) -> bool:
    """True for the pieces of units that move as wholes."""
    return str(atom.pinned).startswith(PIECES) and any(a.pinned is None for a in block)


def _order(pieces: Sequence[Piece]) -> tuple[int, ...] | None:
    """Where the positions of all pieces are, one piece behind the other; None: where they lie."""
    where = [positions for _, positions in pieces if positions is not None]
    if not where:
        return None
    order = torch.cat(where)
    return None if torch.equal(order, torch.arange(len(order))) else tuple(order.tolist())


def names_in(axes: Sequence[spec.Axis]) -> set[str]:
    """Groups that occur in the axes of a tensor."""
    return {f for axis in axes for block in axis for f in block if isinstance(f, str)}
