"""From a network to its permutation spec: watch one forward pass, then prove what was seen.

    spec = derive(module, example)      # example: what forward takes, such as a batch of two images

Nothing about any network is written down. Each axis of each parameter starts out as units of their
own; the operations of one real forward pass (:mod:`companion.rebasin.rules`) say which of them are
the same units, and which cannot move. What is left is proven with random permutations
(:mod:`companion.rebasin.proof`) before anybody gets to see it. Source: our chapter 2.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from companion.core.errors import BadParameter, one_of
from companion.core.theta import layout
from companion.rebasin import proof, rules, rules_shapes, rules_sums
from companion.rebasin.axes import Axes, Axis
from companion.rebasin.resolve import Seen, resolve
from companion.rebasin.spec import Spec
from companion.rebasin.trace import Tracer

log = logging.getLogger("companion")


# The modules that register the rules of operations when they are imported.
REGISTERED = (rules_shapes, rules_sums)


class Watcher(Tracer):
    """Keeps the axes of every tensor of a forward pass. See :class:`companion.rebasin.rules.Watch`.

    Arguments:
        module: the network.
        state: its state dict with the tensors that forward uses.
    """

    def __init__(self, module: nn.Module, state: Mapping[str, torch.Tensor]):
        super().__init__(module)
        self.axes = Axes()
        self.log: list[Seen] = []
        self.low_precision = False
        self._known: Any = WeakIdKeyDictionary()
        self._live: Any = WeakIdKeyDictionary()
        self.state: dict[str, list[Axis]] = {}
        self.read: set[int] = set()
        self.notes: list[str] = []
        for name, tensor in state.items():
            if tensor not in self._known:
                movable = tensor.is_floating_point()
                self._known[tensor] = [
                    self.axes.free(n) if movable else self.axes.fixed(n, "whole numbers")
                    for n in tensor.shape
                ]
            self.state[name] = self._known[tensor]

    def of(self, tensor: torch.Tensor) -> list[Axis]:
        if tensor not in self._known:
            # Made outside of any operation: a constant, of which nothing is known.
            self._known[tensor] = rules.fixed_like(self, tensor.shape, "a constant")
        found: list[Axis] = self._known[tensor]
        return found

    def refuse(self, tensors: Iterable[torch.Tensor], why: str) -> None:
        for tensor in tensors:
            for axis in self.of(tensor):
                self.axes.pin(axis, f"{why} in {self.where or 'the network'}")

    def inputs(self, tensors: Sequence[torch.Tensor]) -> None:
        """These come from outside: their units stay, and what is made of them is data."""
        for tensor in tensors:
            self._known[tensor] = rules.fixed_like(self, tensor.shape, "the input")
            self._live[tensor] = True

    def outputs(self, tensors: Sequence[torch.Tensor]) -> None:
        """These are what the network says: their units stay."""
        for tensor in tensors:
            for axis in self.of(tensor):
                self.axes.pin(axis, "the output")

    def seen(
        self, func: Any, op: str, nth: int, args: tuple[Any, ...], kwargs: Any, out: Any
    ) -> None:
        self.axes.where = where = self.where or "the network"
        names = [a.name for a in func._schema.arguments]
        named = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
        named = {n: named.get(n) for n in names} | dict(zip(names, args, strict=False)) | kwargs
        given = rules.tensors_in(named.values())
        made = rules.tensors_in([out])
        self.read.update(id(self._known[t]) for t in given if t in self._known)
        found = self._apply(func, op, named, out, given)
        if found is None:
            if given:
                log.debug("no rule for %s in %s", op, where)
            self.refuse(given, f"no rule for the operation {op}")
            found = [rules.fixed_like(self, t.shape, f"made by {op}") for t in made]
        live = any(t in self._live for t in given)
        if live and op == "_local_scalar_dense":
            self._note(f"forward reads a number out of its data in {where}: proven for this path")
        for tensor, axes in zip(made, found, strict=True):
            if not rules.fits(axes, tensor.shape):
                raise AssertionError(f"rule for {op}: {axes} for shape {tuple(tensor.shape)}")
            self.axes.close(axes)
            self._known[tensor] = axes
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

    def _apply(
        self, func: Any, op: str, named: dict[str, Any], out: Any, given: list[torch.Tensor]
    ) -> list[list[Axis]] | None:
        made = rules.tensors_in([out])
        if not made and not given:
            return []
        if op.rstrip("_") in rules.RULES or op in rules.RULES:
            rule = rules.RULES.get(op) or rules.RULES[op.rstrip("_")]
        elif torch.Tag.pointwise in func.tags:
            rule = rules.pointwise
        else:
            return None
        found = rule(self, named, out)
        if found is None:
            return None
        if isinstance(out, torch.Tensor):
            return [found]  # type: ignore[list-item]
        return found  # type: ignore[return-value]


def derive(module: nn.Module, example: Any, *, unread: str = "refuse") -> Spec:
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
    watcher.outputs(net.raw)
    parameters = layout(module).parameters
    missed = [n for n in parameters if id(watcher.state[n]) not in watcher.read]
    if missed and unread == "refuse":
        raise BadParameter(
            f"forward does not read {', '.join(missed[:3])}"
            f"{f' and {len(missed) - 3} more' if len(missed) > 3 else ''} on this example, so "
            "nothing is known of their units. Give an example that runs them, or say "
            'unread="hold" to leave them as they are.'
        )
    found = resolve(
        watcher.axes,
        watcher.state,
        watcher.read,
        watcher.log,
        parameters=parameters,
        notes=watcher.notes,
        tolerance=1e-4 if watcher.low_precision else 1e-8,
        example=example,
    )
    proof.prove(net, found, reference)
    return found


def _watched(module: nn.Module, example: Any) -> tuple[proof.Subject, Watcher, list[torch.Tensor]]:
    """One forward pass under watch, with as much noise as the network bears."""
    # Some inputs must stay what they are (logarithms, numbers of categories), some weights as well.
    for shake in (("weights", "inputs"), ("weights",), ()):
        net = proof.Subject(module, example, shake=shake)
        watcher = Watcher(net.module, net.state)
        watcher.inputs(net.tensors)
        # The fused attention of torch.nn is one operation; taken apart it is many known ones.
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with watcher:
                reference = net.run()
        except BadParameter:
            if not shake:
                raise
            continue
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
        if proof.finite(reference) or not shake:
            break
    return net, watcher, reference
