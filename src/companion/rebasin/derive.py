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

from companion.rebasin import proof, rules
from companion.rebasin.axes import Axes, Axis
from companion.rebasin.resolve import Seen, resolve
from companion.rebasin.spec import Spec
from companion.rebasin.trace import Tracer
from companion.theta import layout

log = logging.getLogger("companion")


class Watcher(Tracer):
    """Keeps the axes of every tensor of a forward pass. See :class:`companion.rebasin.rules.Watch`.

    Arguments:
        module: the network; state: its state dict with the tensors that forward uses.
    """

    def __init__(self, module: nn.Module, state: Mapping[str, torch.Tensor]):
        super().__init__(module)
        self.axes = Axes()
        self.log: list[Seen] = []
        self.low_precision = False
        self._known: Any = WeakIdKeyDictionary()
        self._live: Any = WeakIdKeyDictionary()
        self.state: dict[str, list[Axis]] = {}
        self.touched: list[str] = []
        self._names: Any = WeakIdKeyDictionary()
        for name, tensor in state.items():
            if tensor not in self._known:
                movable = tensor.is_floating_point()
                self._known[tensor] = [
                    self.axes.free(n) if movable else self.axes.fixed(n, "whole numbers")
                    for n in tensor.shape
                ]
                self._names[tensor] = name
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
        for tensor in given:
            if tensor in self._names and (name := self._names[tensor]) not in self.touched:
                self.touched.append(name)
        found = self._apply(func, op, named, out, given)
        if found is None:
            if given:
                log.debug("no rule for %s in %s", op, where)
            self.refuse(given, f"no rule for the operation {op}")
            found = [rules.fixed_like(self, t.shape, f"made by {op}") for t in made]
        live = any(t in self._live for t in given)
        for tensor, axes in zip(made, found, strict=True):
            if not rules.fits(axes, tensor.shape):
                raise AssertionError(f"rule for {op}: {axes} for shape {tuple(tensor.shape)}")
            self.axes.close(axes)
            self._known[tensor] = axes
            if live:
                self._live[tensor] = True
                self.low_precision |= tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
        if found:
            self.log.append(Seen(self.where, op, nth, tuple(found[0]), live))

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


def arguments(example: Any) -> tuple[Any, ...]:
    """Positional arguments of forward: a tensor alone is the only one."""
    return example if isinstance(example, tuple) else (example,)


def derive(module: nn.Module, example: Any, *, prove: bool = True) -> Spec:
    """Which units of ``module`` can be reordered without changing what it computes.

    Arguments:
        module: any network; not changed. Watched in eval mode, in float64, on its own device.
        example: what its forward takes: a tensor, or a tuple of positional arguments. Two images
            are enough. Shapes matter where the network's operations depend on them.
        prove: run random permutations and refuse if the outputs change.

    Returns:
        the spec; axes on which nothing can move are not in it, and ``held`` says why where an
        operation was refused (grouped convolutions, operations without a rule).

    Raises:
        BadParameter: forward fails on the example, or makes no floating-point output.
        Unproven: outputs change under the permutations found; the message names the layers.

    Source: the spec is Git Re-Basin's (Section 3.2, its weight_matching code writes one by hand for
    each network); deriving and proving it is ours. Chapter 2.
    """
    args = arguments(example)
    net = proof.Subject(module, args)
    watcher = Watcher(net.module, net.state)
    watcher.inputs(net.tensors)
    # The fused attention of torch.nn is one operation; taken apart it is many known ones.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with watcher:
            reference = net.run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    watcher.outputs(net.raw)
    found = resolve(
        watcher.axes,
        watcher.state,
        watcher.touched,
        watcher.log,
        parameters=layout(module).parameters,
        tolerance=1e-4 if watcher.low_precision else 1e-8,
        example=args,
    )
    if prove:
        proof.prove(net, found, reference)
    return found
