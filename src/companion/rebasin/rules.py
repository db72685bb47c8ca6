"""What each operation does to the axes of its tensors: one rule per kind of operation.

A rule reads the axes of the inputs, unifies or pins some, and returns the axes of the output. The
operations are ATen's, below autograd; there is no rule for any network. An operation without a
rule pins every axis it touches, which is always right. Explained in our chapter 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from companion.rebasin.axes import Atom, Axes, Axis, total

SPATIAL = "positions of an image"
KERNEL = "positions of a kernel"
ONE: Axis = ((Atom(1, pinned="one unit"),),)


class Watch(Protocol):
    """What a rule sees."""

    axes: Axes

    def of(self, tensor: Tensor) -> list[Axis]:
        """The axes of a tensor."""
        ...

    def refuse(self, tensors: Iterable[Tensor], why: str) -> None:
        """Pin every axis of these tensors, and note why as a refusal."""
        ...


Named = Mapping[str, Any]
"""The arguments of an operation by the names of its schema, in its order, defaults filled in."""
Out = list[Axis] | list[list[Axis]] | None
"""Axes of the output; of each output, where there are several; None: no rule after all."""
Rule = Callable[[Watch, Named, Any], Out]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations by ATen's names, their in-place forms included."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
            RULES[name + "_"] = function
        return function

    return register


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """All tensors among the arguments, those in lists included."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found


def fixed_like(w: Watch, shape: Sequence[int], why: str) -> list[Axis]:
    """Axes of ``shape`` whose positions stay."""
    return [w.axes.fixed(n, why) for n in shape]


def broadcast(w: Watch, tensors: Sequence[Tensor], shape: Sequence[int]) -> list[Axis]:
    """Element by element, aligned at the last axis: what lies at one place is one unit."""
    out: list[Axis] = [() for _ in shape]
    pairs: list[tuple[Axis, int]] = []
    for tensor in tensors:
        for back, axis in enumerate(reversed(w.of(tensor)), 1):
            if tensor.shape[-back] != 1:
                pairs.append((axis, len(shape) - back))
    # Outer units first: whether inner ones share an order depends on them.
    pairs.sort(key=lambda p: any(a.within is not None for a in w.axes.atoms(p[0])))
    for axis, dim in pairs:
        if out[dim]:
            w.axes.unify(out[dim], axis)
        else:
            out[dim] = axis
    return [
        axis if axis or size == 1 else w.axes.free(size)
        for axis, size in zip(out, shape, strict=True)
    ]


def pointwise(w: Watch, n: Named, out: Any) -> Out:
    """Element by element."""
    return broadcast(w, tensors_in(n.values()), out.shape)


rule(
    *("clone", "_to_copy", "detach", "alias", "contiguous", "lift", "lift_fresh", "to", "copy"),
    *("dropout", "_prelu_kernel", "where", "masked_fill", "lerp", "fill", "zero"),
    *("hardswish", "hardsigmoid", "rrelu", "rrelu_with_noise"),
)(pointwise)


@rule("empty", "zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "new_empty")
def constant(w: Watch, n: Named, out: Any) -> Out:
    """One number everywhere looks the same in any order."""
    return [w.axes.free(n) for n in out.shape]


rule(*("empty_like", "zeros_like", "ones_like", "full_like", "scalar_tensor"))(constant)


def fits(axes: Sequence[Axis], shape: Sequence[int]) -> bool:
    """True if the axes have the sizes of a tensor of ``shape``."""
    return len(axes) == len(shape) and all(
        size in (0, total(axis)) for axis, size in zip(axes, shape, strict=True)
    )
