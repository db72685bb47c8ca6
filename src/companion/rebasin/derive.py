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
from itertools import count, groupby
from typing import Any

import torch
from torch import nn

from companion.core.errors import BadParameter, one_of
from companion.core.theta import layout
from companion.rebasin import proof, rules, spec
from companion.rebasin.axes import Atom, AtomAxis, AtomBlock, total
from companion.rebasin.trace import Tracer, taken_apart

logger = logging.getLogger("companion")

ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "sigmoid", "hardtanh", "leaky_relu", "elu", "mish")
"""Functions after which activation matching looks (Git Re-Basin, Section 3.1)."""

NATURAL = ("the input", "the output", "positions of", "entries of a vocabulary", "whole numbers")
"""How reasons begin that go without saying; all others are told, in :attr:`Spec.held`."""


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
    net, watcher, reference = _watched(module, example)
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


def _watched(module: nn.Module, example: Any) -> tuple[proof.Subject, Watcher, list[torch.Tensor]]:
    """One forward pass under watch, with as much noise as the network bears."""
    # Some inputs must stay what they are (logarithms, numbers of categories), some weights as well.
    for shake in (("weights", "inputs"), ("weights",), ()):
        net = proof.Subject(module, example, shake=shake)
        watcher = Watcher(net)
        try:
            # The fused attention of torch.nn is one operation; taken apart it is many known ones.
            with taken_apart(), watcher:
                reference = net.run()
        except BadParameter:
            if not shake:
                raise
            continue
        if not shake or all(bool(torch.isfinite(t).all()) for t in reference):
            break
    return net, watcher, reference


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

    def __init__(self, net: proof.Subject):
        super().__init__(net.module)
        self.axes = rules.TensorAxes()
        self.log: list[Seen] = []
        self.low_precision = False
        self.state: dict[str, list[AtomAxis]] = {}  # tied entries share one list
        self.read: set[int] = set()  # ids of the lists that an operation has read
        self.notes: list[str] = []
        known, free = self.axes.known, self.axes.free
        for name, tensor in net.state.items():
            if tensor not in known:
                movable = tensor.is_floating_point()
                numbers = "complex" if tensor.is_complex() else "whole"
                fixed = self.axes.fix(tensor.shape, f"{numbers} numbers")
                known[tensor] = [free(n) for n in tensor.shape] if movable else fixed
            self.state[name] = known[tensor]
        self._live: Any = type(known)()  # what is made of the input
        for tensor in net.tensors:
            known[tensor] = self.axes.fix(tensor.shape, "the input")
            self._live[tensor] = True

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
        rule = rules.RULES.get(op.rstrip("_"))
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = rules.pointwise
        found: Any = rule and rule(axes, named, out)
        if found is None:
            if given:
                logger.debug("no rule for %s in %s", op, where)
            for tensor in given:
                axes.pin_all(axes.of(tensor), f"no rule for the operation {op} in {where}")
            found = [axes.fix(t.shape, f"made by {op}") for t in made]
        elif isinstance(out, torch.Tensor):
            found = [found]
        live = any(t in self._live for t in given)
        if live and op == "_local_scalar_dense":
            self._note(f"forward reads a number out of its data in {where}: proven for this path")
        for tensor, mine in zip(made, found, strict=True):
            sizes = zip(mine, tensor.shape, strict=True)
            if len(mine) != tensor.ndim or any(n and n != total(axis) for axis, n in sizes):
                raise AssertionError(f"rule for {op}: {mine} for shape {tuple(tensor.shape)}")
            axes.close(mine)
            axes.known[tensor] = mine
            if live:
                self._live[tensor] = True
                if tensor.dtype in (torch.float32, torch.float16, torch.bfloat16):
                    self.low_precision = True
                    kind = str(tensor.dtype).removeprefix("torch.")
                    self._note(f"forward computes in {kind} in {where}: proven to 1e-4")
        if found:
            self.log.append(Seen(self.where, op, nth, tuple(found[0]), live))

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


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
        axes = {n: tuple(self._axis(a) for a in found) for n, found in used.items()}
        moving = {n: found for n, found in axes.items() if names_in(found)}
        present = {name for found in moving.values() for name in names_in(found)}
        groups = {n: g for n, g in self.groups.items() if n in present}
        unread = (n for n in self.parameters if n not in used)
        held = dict.fromkeys(unread, "forward does not read it on the example")
        for name in self.parameters:
            for dim, axis in enumerate(used.get(name, ())):
                atoms = (a for block in self._blocks(axis) for a in block if a.size > 1)
                why = next((a.pinned for a in atoms if a.pinned), None)
                if why and not why.startswith(NATURAL):
                    held[f"{name}[{dim}]"] = why
        return spec.Spec(
            groups,
            moving,
            tuple(n for n in self.parameters if n in moving),
            sites=self._sites(groups),
            held=held,
            notes=tuple(seen.notes),
            tolerance=1e-4 if seen.low_precision else 1e-8,
            example=example,
        )

    def _settle(self, used: Mapping[str, list[AtomAxis]]) -> None:
        """An inner atom needs its outer one in the same block of every parameter."""
        again = True
        while again:
            again = False
            blocks = (b for axes in used.values() for axis in axes for b in self.axes.normal(axis))
            for atom, beside in ((atom, block) for block in blocks for atom in block):
                outer = atom.within and self.axes.find(atom.within)
                if atom.pinned is None and outer and outer not in beside:
                    self.axes.uniform(atom)
                    again = True

    def _blocks(self, axis: AtomAxis) -> list[AtomBlock]:
        """Normal blocks, with what lies within pinned atoms written out piece by piece."""
        return [b for block in self.axes.normal(axis) for b in self._written_out(block)]

    def _written_out(self, block: AtomBlock) -> list[AtomBlock]:
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

    def _name(self, axis: AtomAxis, module: str) -> None:
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
        stem = f"{outer}/" if outer else f"{module or 'network'}#"
        numbered = (f"{stem}{n}" for n in count(1))
        names = (name.removesuffix("#1") for name in numbered)
        name = next(name for name in names if name not in self.groups)
        self.names[atom] = name
        self.groups[name] = spec.Group(name, atom.size, outer)

    def _axis(self, axis: AtomAxis) -> spec.Axis:
        """In names and numbers; neighbours that stay are one stretch."""
        out: list[spec.Block] = []
        for block in self._blocks(axis) or [()]:
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
            found = [self._axis(axis) if axis else () for axis in entry.axes]
            moving = [dim for dim, axis in enumerate(found) if names_in([axis])]
            if len(moving) != 1:
                continue  # another axis moves too: positions would not be the same samples
            dim = moving[0]
            for start, block in spec.Spec(self.groups, {}, ()).blocks(found[dim]):
                at = (dim - len(found), start, block)
                for name in names_in([(block,)]) & groups.keys():
                    # An inner group can be told apart only beside its outer one.
                    clear = groups[name].within in (None, *block)
                    if clear and (name not in best or preferred >= best[name][0]):
                        site = spec.ActivationSite(entry.module, entry.op, entry.nth, *at)
                        best[name] = (preferred, site)
        return {n: best[n][1] for n in groups if n in best}


def names_in(axes: Sequence[spec.Axis]) -> set[str]:
    """Groups that occur in the axes of a tensor."""
    return {f for axis in axes for block in axis for f in block if isinstance(f, str)}
