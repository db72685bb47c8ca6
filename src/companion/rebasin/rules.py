"""What each operation does to the axes of its tensors: one rule per kind of operation.

A rule reads the axes of the inputs, unifies or pins some, and returns the axes of the output. The
operations are ATen's, below autograd; there is no rule for any network. An operation without a
rule pins every axis it touches, which is always right. Explained in our chapter 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from companion.rebasin.axes import PICKED, Atom, AtomAxis, Axes, total

__all__ = ["CONSTANT", "PICKED", "RULES", "TensorAxes", "pointwise", "tensors_in"]

SPATIAL = "positions of an image"
FILTER = "positions of a kernel"
CONSTANT = "meets constants that differ along it"
BY_POSITION = ("scatter", "scatter_add", "scatter_reduce", "gather", "index", "index_select")
"""Operations that take numbers to positions, or from them."""
SAME_NUMBERS = (
    "unsqueeze",
    "squeeze",
    "view",
    "_unsafe_view",
    "clone",
    "_to_copy",
    "detach",
    "expand",
)
"""Operations whose output holds the numbers that their input holds."""
SMALL = 100_000
"""Numbers of a constant up to which it is looked at, whether they are equal along an axis."""
ONE: AtomAxis = ((Atom(1, pinned="one unit"),),)


class TensorAxes(Axes):
    """The algebra, and the axes of every tensor of a forward pass: what a rule works on."""

    def __init__(self) -> None:
        super().__init__()
        self.known: Any = WeakIdKeyDictionary()
        self.own: Any = WeakIdKeyDictionary()
        # Tensors that hold positions on an axis (of maxima, of the largest few): who reads them
        # sees its order.
        self.positions: Any = WeakIdKeyDictionary()
        self.numbers: Any = WeakIdKeyDictionary()  # those whose order was seen already, likewise

    def of(self, tensor: Tensor) -> list[AtomAxis]:
        """The axes of a tensor; one made outside of any operation is a constant."""
        if tensor not in self.known:
            self.known[tensor] = [
                self.alike(n)
                if 0 < tensor.numel() < SMALL and bool((tensor == tensor.narrow(i, 0, 1)).all())
                else self.fixed(n, f"{CONSTANT} in {self.where}")
                for i, n in enumerate(tensor.shape)
            ]
        found: list[AtomAxis] = self.known[tensor]
        return found

    def at_positions(self, axis: AtomAxis, index: Tensor, size: int) -> AtomAxis | None:
        """``axis``, of ``size``, where ``index`` holds positions on it: its units are those that
        were counted, in any order. None: it holds other numbers.
        """
        counted = self.positions.get(index, self.numbers.get(index))
        if counted is None or total(counted) != size:
            return None
        return self.join(axis, counted)

    def fix(self, shape: Sequence[int], why: str) -> list[AtomAxis]:
        """New axes of ``shape`` whose positions stay."""
        return [self.fixed(n, why) for n in shape]

    def pin_all(self, axes: Iterable[AtomAxis], why: str, by_number: bool = False) -> None:
        """The positions of these axes stay in order."""
        for axis in axes:
            self.pin(axis, why, by_number)


Named = Mapping[str, Any]
"""The arguments of an operation by the names of its schema, in its order, defaults filled in."""
Out = list[Any] | None
"""Axes of the output; of each output, where there are several; None: no rule after all."""
Rule = Callable[[TensorAxes, Named, Any], Out]
RULES: dict[str, Rule] = {}
"""ATen's name, without the underscore of an in-place form -> rule."""


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations by ATen's names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
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


def broadcast(w: TensorAxes, tensors: Sequence[Tensor], shape: Sequence[int]) -> list[AtomAxis]:
    """Element by element, aligned at the last axis: what lies at one place is one unit."""
    out: list[AtomAxis] = [() for _ in shape]
    pairs: list[tuple[AtomAxis, int]] = []
    for tensor in tensors:
        for back, axis in enumerate(reversed(w.of(tensor)), 1):
            if tensor.shape[-back] != 1:
                pairs.append((axis, len(shape) - back))
    # Outer units first: whether inner ones share an order depends on them.
    pairs.sort(key=lambda p: any(a.within for a in w.atoms(p[0])))
    for axis, dim in pairs:
        out[dim] = w.join(out[dim], axis) if out[dim] else axis
    return [
        axis if axis or size == 1 else w.alike(size) for axis, size in zip(out, shape, strict=True)
    ]


@rule(
    """clone _to_copy detach alias contiguous lift lift_fresh to copy dropout _prelu_kernel where
    masked_fill lerp fill zero hardswish hardsigmoid rrelu rrelu_with_noise"""
)
def pointwise(w: TensorAxes, n: Named, out: Any) -> Out:
    """Element by element."""
    return broadcast(w, tensors_in(n.values()), out.shape)


# Moving, cutting and joining numbers


@rule("transpose")
def transpose(w: TensorAxes, n: Named, out: Any) -> Out:
    """Two axes change places."""
    axes = list(w.of(n["self"]))
    i, j = n["dim0"], n["dim1"]
    if axes:
        axes[i], axes[j] = axes[j], axes[i]
    return axes


@rule("repeat")
def repeat(w: TensorAxes, n: Named, out: Any) -> Out:
    """Copies one behind the other: the copies, times the units."""
    axes: list[AtomAxis] = [()] * (out.ndim - n["self"].ndim) + list(w.of(n["self"]))
    found = []
    for axis, times in zip(axes, n["repeats"], strict=True):
        copies = w.alike(times)
        found.append(w.merge([copies, axis]) if copies and axis else copies or axis)
    return found


@rule("cat")
def cat(w: TensorAxes, n: Named, out: Any) -> Out:
    """Along the axis one behind the other, along the others element by element."""
    tensors = [t for t in n["tensors"] if t.ndim == out.ndim]
    dim = n["dim"] % out.ndim
    if len(tensors) > 1 and all(t.shape[dim] == 1 for t in tensors):
        outer = w.fixed(len(tensors), f"stacked in order in {w.where}")
        rest = [[a for d, a in enumerate(w.of(t)) if d != dim] for t in tensors]
        axes = _side_by_side(w, rest, outer)
        axes.insert(dim, outer)
        return axes
    axes = list(w.of(tensors[0]))
    for tensor in tensors[1:]:
        for i, (mine, other) in enumerate(zip(axes, w.of(tensor), strict=True)):
            if i != dim:
                axes[i] = w.join(mine, other)
    parts = [w.of(t)[dim] or ONE for t in tensors if t.shape[dim]]
    axes[dim] = tuple(block for part in parts for block in part)
    return axes


@rule("stack")
def stack(w: TensorAxes, n: Named, out: Any) -> Out:
    """A new axis; each tensor keeps its own units along the others."""
    dim = n["dim"] % out.ndim
    outer = w.fixed(out.shape[dim], f"stacked in order in {w.where}")
    axes = _side_by_side(w, [w.of(t) for t in n["tensors"]], outer)
    axes.insert(dim, outer)
    return axes


def _side_by_side(
    w: TensorAxes, pieces: Sequence[Sequence[AtomAxis]], outer: AtomAxis
) -> list[AtomAxis]:
    """Axes that tensors have in common: the same units, or those of each unit of ``outer``."""
    out = []
    for same in zip(*pieces, strict=True):
        first, *others = [w.normal(axis) for axis in same]
        inner = any(a.within or a.pinned for axis in same for a in w.atoms(axis))
        if not outer or inner or total(first) == 1 or all(axis == first for axis in others):
            for axis in others:
                first = w.join(first, axis)
            out.append(first)
        else:
            out.append(w.rows(outer, list(same)))
    return out


def _piece(w: TensorAxes, tensor: Tensor, dim: int, start: int, size: int) -> list[AtomAxis]:
    if size == 1 != tensor.shape[dim]:
        axes = w.pick(w.of(tensor), dim, start)
        axes.insert(dim % tensor.ndim, ())
        return axes
    return w.piece(w.of(tensor), dim % tensor.ndim, start, size)


@rule("slice")
def slice_(w: TensorAxes, n: Named, out: Any) -> Out:
    """A stretch of an axis."""
    x, dim = n["self"], n["dim"] % n["self"].ndim
    low, high, _ = slice(n["start"], n["end"]).indices(x.shape[dim])
    if (step := n["step"]) != 1:
        count, rest = divmod(x.shape[dim], step)
        if rest or low >= step or out.shape[dim] != count or count == 1:
            return _put_in_order(w, x, [dim], out, "every so many are picked out")
        # One of each few: gates and units that alternate.
        axes = list(w.of(x))
        axes[dim : dim + 1] = w.divide(axes[dim], [count, step])
        return w.pick(axes, dim + 1, low)
    return _piece(w, x, dim, low, high - low)


@rule("split split_with_sizes chunk unsafe_split unsafe_chunk")
def split(w: TensorAxes, n: Named, out: Any) -> Out:
    """An axis cut into stretches."""
    dim, found, start = n["dim"], [], 0
    for piece in out:
        found.append(_piece(w, n["self"], dim, start, piece.shape[dim]))
        start += piece.shape[dim]
    return found


@rule("glu")
def glu(w: TensorAxes, n: Named, out: Any) -> Out:
    """The first half times the sigmoid of the second: unit by unit."""
    dim, x, size = n["dim"] % n["self"].ndim, n["self"], out.shape[n["dim"]]
    axes, gates = (_piece(w, x, dim, start, size) for start in (0, size))
    return [w.join(a, b) for a, b in zip(axes, gates, strict=True)]


@rule("pixel_shuffle")
def pixel_shuffle(w: TensorAxes, n: Named, out: Any) -> Out:
    """Channels in blocks become pixels; the blocks keep their inside."""
    axes = list(w.of(n["self"]))
    channels, inside = w.divide(axes[-3], [out.shape[-3], n["upscale_factor"] ** 2])
    w.pin_all([inside, *axes[-2:]], SPATIAL)
    return [*axes[:-3], channels, *w.fix(out.shape[-2:], SPATIAL)]


@rule("pixel_unshuffle")
def pixel_unshuffle(w: TensorAxes, n: Named, out: Any) -> Out:
    """Pixels become channels, a block for each channel of before."""
    axes = list(w.of(n["self"]))
    w.pin_all(axes[-2:], SPATIAL)
    block = w.fixed(n["downscale_factor"] ** 2, SPATIAL)
    return [*axes[:-3], w.merge([axes[-3], block]), *w.fix(out.shape[-2:], SPATIAL)]


@rule("channel_shuffle native_channel_shuffle")
def channel_shuffle(w: TensorAxes, n: Named, out: Any) -> Out:
    """Groups of channels are dealt out like cards: the first of each, the second of each, …"""
    axes = list(w.of(n["self"]))
    axes[1] = w.merge(w.divide(axes[1], [n["groups"], out.shape[1] // n["groups"]])[::-1])
    return axes


@rule("im2col")
def im2col(w: TensorAxes, n: Named, out: Any) -> Out:
    """Patches as columns: channels, times the positions of a patch."""
    axes = list(w.of(n["self"]))
    w.pin_all(axes[-2:], SPATIAL)
    patch = w.fixed(math.prod(n["kernel_size"]), SPATIAL)
    return [*axes[:-3], w.merge([axes[-3], patch]), *w.fix(out.shape[-1:], SPATIAL)]


@rule("col2im")
def col2im(w: TensorAxes, n: Named, out: Any) -> Out:
    """Columns as patches of an image."""
    axes = list(w.of(n["self"]))
    channels, patch = w.divide(axes[-2], [out.shape[-3], math.prod(n["kernel_size"])])
    w.pin_all([patch, axes[-1]], SPATIAL)
    return [*axes[:-2], channels, *w.fix(out.shape[-2:], SPATIAL)]


@rule("max_unpool2d max_unpool3d")
def unpool(w: TensorAxes, n: Named, out: Any) -> Out:
    """Numbers go back to the pixels that they were maxima of, channel by channel."""
    axes = broadcast(w, [n["self"], n["indices"]], n["self"].shape)
    dims = len(n["output_size"])
    w.pin_all(axes[-dims:], SPATIAL)
    return [*axes[:-dims], *w.fix(out.shape[-dims:], SPATIAL)]


@rule("unfold")
def windows(w: TensorAxes, n: Named, out: Any) -> Out:
    """Windows along one axis, their positions as a new one."""
    dim = n["dimension"] % max(n["self"].ndim, 1)
    axes = _put_in_order(w, n["self"], [dim], out, "windows along it")
    return [*axes, *w.fix(out.shape[-1:], "positions of a window")]


@rule("diagonal")
def diagonal(w: TensorAxes, n: Named, out: Any) -> Out:
    """Positions of two axes at once: the same units on both."""
    axes = list(w.of(n["self"]))
    one, two = (n[k] % len(axes) for k in ("dim1", "dim2"))
    first, second = axes[one], axes[two]
    rest = [a for d, a in enumerate(axes) if d not in (one, two)]
    if n["offset"] or n["self"].shape[one] != n["self"].shape[two]:
        w.pin_all((first, second), "a diagonal beside the main one")
        return [*rest, *w.fix(out.shape[-1:], "a diagonal beside the main one")]
    return [*rest, w.join(first, second)]


@rule("diag_embed")
def diag_embed(w: TensorAxes, n: Named, out: Any) -> Out:
    """Numbers on the main diagonal: the same units on two axes."""
    if n["offset"]:
        return None
    axes = list(w.of(n["self"]))
    units = axes.pop()
    for dim in sorted(n[k] % out.ndim for k in ("dim1", "dim2")):
        axes.insert(dim, units)
    return axes


@rule("tril triu")
def triangle(w: TensorAxes, n: Named, out: Any) -> Out:
    """One axis is counted against the other."""
    return _put_in_order(w, n["self"], (-2, -1), out, "positions are counted against each other")


@rule("constant_pad_nd")
def pad(w: TensorAxes, n: Named, out: Any) -> Out:
    """Equal numbers before and after."""
    axes = list(w.of(n["self"]))
    for i in range(len(n["pad"]) // 2):
        before, after = n["pad"][2 * i : 2 * i + 2]
        dim = len(axes) - 1 - i
        if before < 0 or after < 0:
            return None
        if before or after:
            ends = [((Atom(size, equal=True),),) if size else () for size in (before, after)]
            axes[dim] = (*ends[0], *(axes[dim] or ONE), *ends[1])
    return axes


def _within(w: TensorAxes, axes: Sequence[AtomAxis], dim: int) -> list[AtomAxis]:
    """What is done along one axis mixes its units: no other axis may depend on them."""
    rest = list(axes)
    rest[dim] = ()
    w.close(rest)
    return list(axes)


def _counted(w: TensorAxes, n: Named, out: Any) -> list[AtomAxis]:
    """Whatever is counted is seen by number."""
    for tensor in tensors_in(n.values()):
        w.pin_all(w.of(tensor), f"counted in {w.where}", by_number=True)
    return w.fix(out.shape, "counted")


def _put_in_order_of(w: TensorAxes, axes: list[AtomAxis], dim: int, out: Any) -> list[AtomAxis]:
    w.pin(axes[dim], f"its order is seen in {w.where}")
    axes[dim] = w.fixed(out.shape[dim], f"its order is seen in {w.where}")
    return axes


def _put_in_order(
    w: TensorAxes, x: Tensor, dims: Iterable[int], out: Any, why: str
) -> list[AtomAxis]:
    """Axes ``dims`` are seen in order, before and after."""
    axes = list(w.of(x))
    for dim in dims:
        w.pin(axes[dim], f"{why} in {w.where}")
        axes[dim] = w.fixed(out.shape[dim], f"{why} in {w.where}")
    return axes


# Products


def _product(w: TensorAxes, x: Tensor, y: Tensor) -> list[AtomAxis]:
    a, b = list(w.of(x)), list(w.of(y))
    batch = [w.join(a[0], b[0])] if len(a) == 3 else []
    summed = b[-2] if len(b) > 1 else b[0]
    # Every row meets every column: inner units may depend on the batch axis, not on either of them.
    w.close([*batch, a[-1]])
    w.close([*batch, summed])
    w.unify(a[-1], summed)
    return [*batch, *a[len(batch) : -1], *(b[-1:] if len(b) > 1 else [])]


def _plus(w: TensorAxes, term: Tensor, axes: list[AtomAxis]) -> list[AtomAxis]:
    for back, axis in enumerate(reversed(w.of(term)), 1):
        if term.shape[-back] != 1:
            axes[-back] = w.join(axes[-back], axis) if axes[-back] else axis
    return axes


@rule("convolution")
def convolution(w: TensorAxes, n: Named, out: Any) -> Out:
    """Channels mix like the units of a linear layer, position by position."""
    x, weight, bias = n["input"], n["weight"], n["bias"]
    transposed, groups = n["transposed"], n["groups"]
    a, k = list(w.of(x)), list(w.of(weight))
    if len(a) < len(k):  # no batch
        a.insert(0, ())
    w.pin_all(k[2:], FILTER)
    w.pin_all(a[2:], SPATIAL)
    w.close([a[1]])
    if groups == 1:
        channels, made = (k[0], k[1]) if transposed else (k[1], k[0])
        w.close([channels])
        w.close([made])
        w.unify(a[1], channels)
    else:
        # Groups in any order, and what each of them reads and makes as well.
        first, second = (size // groups for size in (weight.shape[0], x.shape[-weight.ndim + 1]))
        outer, rows = w.divide(k[0] or ONE, [groups, first]) if first > 1 else (k[0], ())
        w.close([outer, k[1]])
        mine, other = (rows, k[1]) if transposed else (k[1], rows)
        w.unify(a[1], w.merge([outer, mine]) if second > 1 else outer)
        made = w.merge([outer, other])
    if bias is not None:
        made = w.join(made, w.of(bias)[0])
    return [a[0], made, *w.fix(out.shape[2:], SPATIAL)][-out.ndim :]


@rule("embedding")
def embedding(w: TensorAxes, n: Named, out: Any) -> Out:
    """Rows looked up by number: their order is the vocabulary's."""
    rows, units = w.of(n["weight"])
    w.close([units])
    w.pin(rows, "entries of a vocabulary")
    return [*w.of(n["indices"]), units]


@rule("index")
def index(w: TensorAxes, n: Named, out: Any) -> Out:
    """Positions looked up by number in some axes; the other axes go along."""
    x, indices = n["self"], list(n["indices"])
    if any(i is not None and i.dtype == torch.bool and i.ndim > 1 for i in indices):
        return None  # a mask over several axes
    asked = [d for d, i in enumerate(indices) if i is not None]
    one = indices[asked[0]] if len(asked) == 1 and indices[asked[0]].dtype != torch.bool else None
    if one is not None and one.numel() == 1 and one not in w.positions and one not in w.numbers:
        at = int(indices[asked[0]]) % x.shape[asked[0]]
        axes = w.pick(w.of(x), asked[0], at)
        return [*axes[: asked[0]], *[() for _ in indices[asked[0]].shape], *axes[asked[0] :]]
    shape = torch.broadcast_shapes(*_counts(out, indices))
    axes = list(w.of(x))
    table = x in w.own
    why = "entries of a table" if table else f"looked up by number in {w.where}"
    outer = tuple(a for d in asked for a in w.atoms(axes[d]) if not a.equal)
    for d in asked:
        if w.at_positions(axes[d], indices[d], x.shape[d]) is None:
            _seen(w, indices[d])
            w.pin(axes[d], why, by_number=True)
    found = w.fix(shape, "looked up by number")
    for atom in (a for axis in found for a in w.atoms(axis)):
        atom.tells = outer
    if one is not None:  # a row of numbers for each unit, in any order
        own = enumerate(w.of(one))
        moving = {i: x for i, x in own if any(a.pinned is None and not a.equal for a in w.atoms(x))}
        found = [moving.get(i, axis) for i, axis in enumerate(found)]
    rest = [a for d, a in enumerate(axes) if d not in asked]
    together = list(asked) == list(range(asked[0], asked[0] + len(asked)))
    at = asked[0] if together else 0
    return [*rest[:at], *found, *rest[at:]]


@rule("index_select")
def index_select(w: TensorAxes, n: Named, out: Any) -> Out:
    """Positions looked up by number in one axis; the others go along."""
    dim = n["dim"] % max(n["self"].ndim, 1)
    return index(w, {"self": n["self"], "indices": [None] * dim + [n["index"]]}, out)


@rule("index_put _unsafe_index_put _index_put_impl")
def index_put(w: TensorAxes, n: Named, out: Any) -> Out:
    """Numbers put at positions of some axes; the other axes go along."""
    x, indices = n["self"], list(n["indices"])
    if any(i is not None and i.dtype == torch.bool and i.ndim > 1 for i in indices):
        return None
    asked = [d for d, i in enumerate(indices) if i is not None]
    places = w.fix([1] * max(i.ndim for i in indices if i is not None), "")
    rest = [a for d, a in enumerate(w.of(x)) if d not in asked]
    together = asked == list(range(asked[0], asked[0] + len(asked)))
    at = asked[0] if together else 0
    target = [*rest[:at], *places, *rest[at:]]
    values = w.of(n["values"])
    for back in range(1, min(len(values), len(target)) + 1):
        mine = len(target) - back
        if at <= mine < at + len(places):
            w.pin(values[-back], "put by number")
        elif n["values"].shape[-back] != 1:
            target[mine] = w.join(target[mine], values[-back]) if target[mine] else values[-back]
    del target[at : at + len(places)]
    w.pin_all((w.of(x)[d] for d in asked), f"looked up by number in {w.where}", by_number=True)
    for d in asked:
        target.insert(d, w.fixed(out.shape[d], "looked up by number"))
    return target


@rule("index_add index_copy index_reduce index_fill")
def index_add(w: TensorAxes, n: Named, out: Any) -> Out:
    """Rows go to positions of one axis; the other axes go along."""
    dim, source = n["dim"] % max(out.ndim, 1), n.get("source")
    axes = list(w.of(n["self"]))
    for i, axis in enumerate(w.of(source)) if isinstance(source, Tensor) and source.ndim else ():
        if i == dim and "alpha" in n and n["index"].ndim:
            w.unify(axis, w.of(n["index"])[0])  # a sum, in any order
        elif i == dim:
            w.pin(axis, f"put by number in {w.where}")
        else:
            axes[i] = w.join(axes[i], axis)
    w.pin(axes[dim], f"looked up by number in {w.where}", by_number=True)
    axes[dim] = w.fixed(out.shape[dim], "looked up by number")
    return axes


@rule("gather")
def gather(w: TensorAxes, n: Named, out: Any) -> Out:
    """Positions looked up by number in one axis, for each place of the others."""
    x, where, dim = n["self"], n["index"], n["dim"] % max(n["self"].ndim, 1)
    axes = w.of(x)
    for i, size in enumerate(where.shape):
        if i != dim:
            axes = w.piece(axes, i, 0, size)
    if w.at_positions(axes[dim], where, x.shape[dim] if x.ndim else 1) is None:
        _seen(w, where)
        w.pin(axes[dim], f"looked up by number in {w.where}", by_number=True)
    found = list(w.of(where))
    for i, axis in enumerate(axes):
        if i != dim and axis:
            found[i] = w.join(axis, found[i])
    found[dim] = w.fixed(out.shape[dim], "looked up by number")
    w.pin(w.of(where)[dim], "numbers of positions")
    return found


@rule("scatter scatter_add scatter_reduce")
def scatter(w: TensorAxes, n: Named, out: Any) -> Out:
    """Numbers go to positions of one axis, for each place of the others."""
    x, dim = n["self"], n["dim"] % max(n["self"].ndim, 1)
    axes = list(w.of(x))
    to = w.at_positions(axes[dim], n["index"], x.shape[dim]) if axes else None
    if to is None:
        _seen(w, n["index"])
    for tensor in tensors_in([n["index"], n.get("src")]):
        for i, axis in enumerate(w.of(tensor)):
            if i == dim and to is not None:
                w.pin(axis, f"put by number in {w.where}")
            elif i == dim or tensor.shape[i] != x.shape[i]:
                w.pin_all((axis, axes[i]), f"put by number in {w.where}", by_number=True)
            elif axis:
                axes[i] = w.join(axes[i], axis)
    if to is not None:
        axes[dim] = to
        return axes
    w.pin(axes[dim], f"looked up by number in {w.where}", by_number=True)
    axes[dim] = w.fixed(out.shape[dim], "looked up by number")
    return axes


def _seen(w: TensorAxes, index: Tensor) -> None:
    """Positions are used as numbers of something else."""
    if (counted := w.positions.get(index)) is not None:
        w.pin(counted, f"its order is seen in {w.where}", by_number=True)


@rule("_embedding_bag _embedding_bag_forward_only")
def embedding_bag(w: TensorAxes, n: Named, out: Any) -> Out:
    """Sums of rows looked up by number."""
    rows, units = w.of(n["weight"])
    w.close([units])
    w.pin(rows, "entries of a vocabulary")
    given = tensors_in([n["indices"], n["offsets"], n["per_sample_weights"]])
    w.pin_all((a for t in given for a in w.of(t)), "entries of a vocabulary")
    bags, *others = (w.fix(t.shape, "bags of entries") for t in out)
    return [[bags[0], units], *others]


def _counts(out: Tensor, indices: Sequence[Tensor | None]) -> list[tuple[int, ...]]:
    """Shapes of the positions asked for; a mask asks for as many as are left in the output."""
    given = [(d, i) for d, i in enumerate(indices) if i is not None]
    masks = [d for d, i in given if i.dtype == torch.bool]
    left = (out.shape[masks[0]],) if masks else ()
    return [left if i.dtype == torch.bool else tuple(i.shape) for _, i in given]


@rule(
    """_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math
    _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention
    _scaled_dot_product_cudnn_attention scaled_dot_product_attention
    _scaled_dot_product_fused_attention_overrideable"""
)
def attention(w: TensorAxes, n: Named, out: Any) -> Out:
    """softmax(q k^T) v: heads in any order, units of q and k in a common one, units of v in one."""
    inputs = [n["query"], n["key"], n["value"]]
    q, k, v = (list(w.of(t)) for t in inputs)
    for axes, tensor in zip((k, v), inputs[1:], strict=True):
        for i, size in enumerate(tensor.shape[:-2]):
            if (times := n["query"].shape[i] // max(size, 1)) > 1:  # queries share keys
                axes[i] = w.merge([axes[i], w.alike(times)]) if size > 1 else w.alike(times)
    batch = [
        w.join(w.join(*both[:2]), both[2]) for both in zip(q[:-2], k[:-2], v[:-2], strict=True)
    ]
    for axis in (q[-1], k[-1], v[-1]):
        w.close([*batch, axis])
    w.unify(q[-1], k[-1])
    w.unify(k[-2], v[-2])
    w.pin_all((q[-2], k[-2]), "positions of a sequence")
    for mask in tensors_in([n.get("attn_mask"), n.get("attn_bias")]):
        _plus(w, mask, [*batch, q[-2], k[-2]])
    made = [*batch, q[-2], v[-1]]
    if not isinstance(out, tuple):
        return made
    others = [
        made[:-1] if t.ndim == len(q) - 1 else w.fix(t.shape, "") for t in tensors_in(out[1:])
    ]
    return [made, *others]


@rule("_cdist_forward _euclidean_dist")
def distances(w: TensorAxes, n: Named, out: Any) -> Out:
    """Between rows: a sum over their units."""
    a, b = list(w.of(n["x1"])), list(w.of(n["x2"]))
    w.close([*a[:-2], a[-1]])
    w.close([*b[:-2], b[-1]])
    w.unify(a[-1], b[-1])
    return [*(w.join(x, y) for x, y in zip(a[:-2], b[:-2], strict=True)), a[-2], b[-2]]


@rule("_trilinear")
def trilinear(w: TensorAxes, n: Named, out: Any) -> Out:
    """Products of three tensors, summed over some axes: what a bilinear layer is."""
    found: list[AtomAxis] = []
    for k in "123":
        axes = list(w.of(n[f"i{k}"]))
        for dim in sorted(n[f"expand{k}"]):
            axes.insert(dim, ())
        found = [
            w.join(x, y) if x and y else x or y for x, y in zip(found or axes, axes, strict=True)
        ]
    return [axis for dim, axis in enumerate(found) if dim not in n["sumdim"]]


@rule("_grouped_mm")
def grouped_mm(w: TensorAxes, n: Named, out: Any) -> Out:
    """Stretches of rows, each times a matrix of its own: its expert's."""
    x, y = w.of(n["self"]), w.of(n["mat2"])
    if n["self"].ndim != 2 or n["mat2"].ndim != 3:
        return None
    w.pin(y[0], f"chosen by number in {w.where}", by_number=True)
    w.pin(x[0], f"rows are in stretches in {w.where}")
    rows, experts = w.fixed(out.shape[0], "rows of each expert"), tuple(w.atoms(y[0]))
    for told in [t for a in w.atoms(x[0]) for t in a.tells if total(y[0]) == t.size]:
        w.unify(((told,),), y[0])
    for atom in (a for axis in (x[0], rows) for a in w.atoms(axis)):
        atom.tells = (*atom.tells, *experts)
    w.close([y[0], y[1]])
    w.close([x[0], x[1]])
    w.unify(x[1], y[1])
    made = y[2]
    if n.get("bias") is not None:
        made = w.join(made, w.of(n["bias"])[-1])
    return [rows, made]


@rule("_pack_padded_sequence")
def pack(w: TensorAxes, n: Named, out: Any) -> Out:
    """Steps of sequences one behind the other; features go along."""
    axes = w.of(n["input"])
    w.pin_all(axes[:2], "steps of sequences")
    return [[*w.fix(out[0].shape[:1], "steps of sequences"), *axes[2:]], w.fix(out[1].shape, "")]


@rule("_thnn_fused_lstm_cell _thnn_fused_gru_cell")
def recurrent_cell(w: TensorAxes, n: Named, out: Any) -> Out:
    """One step: gates and state have the same units."""
    state = n["cx"] if "cx" in n else n["hx"]
    batch, units = w.of(state)
    for tensor in tensors_in(n.values()):
        if tensor is not state:
            times = tensor.shape[-1] // state.shape[-1]
            w.unify(w.of(tensor)[-1], tuple(b for _ in range(times) for b in units))
    same = [batch, units]
    return [same if t.shape == state.shape else w.fix(t.shape, "kept for gradients") for t in out]


@rule("grid_sampler_2d grid_sampler_3d cudnn_grid_sampler _grid_sampler_2d_cpu_fallback")
def grid_sampler(w: TensorAxes, n: Named, out: Any) -> Out:
    """Pixels between pixels: channels go along."""
    x, grid = tensors_in(n.values())[:2]
    axes, points = w.of(x), w.of(grid)
    w.pin_all((*axes[2:], *points[1:]), SPATIAL)
    return [w.join(axes[0], points[0]), axes[1], *w.fix(out.shape[2:], SPATIAL)]


@rule("_fft_c2c _fft_r2c _fft_c2r")
def fourier(w: TensorAxes, n: Named, out: Any) -> Out:
    """Waves along some axes; the others go along."""
    return _put_in_order(w, n["self"], n["dim"], out, "a Fourier transform along it")


# Norms, reductions and pooling


@rule("native_layer_norm _fused_rms_norm")
def layer_norm(w: TensorAxes, n: Named, out: Any) -> Out:
    """Statistics over the last axes: their units may be in any order, with scale and shift."""
    axes, shape = list(w.of(n["input"])), n["normalized_shape"]
    kept = [*axes[: -len(shape)], *[() for _ in shape]]
    w.close(kept)  # they must not depend on what the statistics are over
    for tensor in tensors_in([n["weight"], n.get("bias")]):
        axes = _plus(w, tensor, axes)
    return [axes, kept, kept][: len(out)]


@rule(
    """native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
    cudnn_batch_norm miopen_batch_norm batch_norm _batch_norm_with_update _batch_norm_no_update"""
)
def batch_norm(w: TensorAxes, n: Named, out: Any) -> Out:
    """Channel by channel, with scale, shift and running statistics."""
    x, *others = tensors_in(n.values())
    axes = w.of(x)
    for tensor in others:
        w.unify(axes[1], w.of(tensor)[0])
    if not isinstance(out, tuple | list):
        return axes
    return [axes, *[[axes[1] if len(t) else ()] if t.ndim == 1 else [] for t in out[1:]]]


@rule("native_group_norm")
def group_norm(w: TensorAxes, n: Named, out: Any) -> Out:
    """Statistics over groups of channels: groups in any order, channels within each as well."""
    axes, channels, groups = list(w.of(n["input"])), n["C"], n["group"]
    w.close([axes[1]])
    for axis in axes[2:]:
        w.close([axis])
    for tensor in tensors_in([n["weight"], n["bias"]]):
        axes[1] = w.join(axes[1], w.of(tensor)[0])
    if 1 < groups < channels:
        outer = Atom(groups)
        w.unify(axes[1], ((outer, Atom(channels // groups, within=(outer,))),))
    other = [axes[0], () if groups == 1 else w.fixed(groups, "groups of a norm")]
    return [axes, other, other]


@rule(
    """mean sum amax amin var std logsumexp prod any all nansum linalg_vector_norm norm
    count_nonzero max min"""
)
def reduce(w: TensorAxes, n: Named, out: Any) -> Out:
    """A symmetric function along some axes: in any order there."""
    x, dim = n["self"], n.get("dim")
    if isinstance(out, tuple) and isinstance(dim, int):
        return positions(w, n, out)
    if isinstance(out, tuple):
        return None
    if "other" in n:
        return pointwise(w, n, out)  # maximum of two
    dims = range(x.ndim) if dim in (None, []) else [dim] if isinstance(dim, int) else dim
    gone = {d % max(x.ndim, 1) for d in dims}
    kept = bool(n.get("keepdim"))
    axes = enumerate(w.of(x))
    return [() if i in gone else axis for i, axis in axes if kept or i not in gone]


@rule("cumsum cumprod cummax cummin logcumsumexp")
def ordered(w: TensorAxes, n: Named, out: Any) -> Out:
    """The order of an axis is seen; where the others only go along, they may move."""
    found = _put_in_order(
        w,
        n["self"],
        [n["dim"]] if n["self"].ndim else [],
        tensors_in([out])[0],
        "its order is seen",
    )
    return [found] * len(out) if isinstance(out, tuple) else found


@rule("sort topk kthvalue median nanmedian mode argsort argmax argmin aminmax")
def positions(w: TensorAxes, n: Named, out: Any) -> Out:
    """Numbers by their size, in whatever order they came; who reads where they were sees it."""
    x, dim = n["self"], n.get("dim")
    made = tensors_in([out])
    if dim is None or x.ndim == 0:
        w.pin_all(w.of(x), f"its order is seen in {w.where}")
        found = [w.fix(t.shape, "its order is seen") for t in made]
    else:
        axes, why = list(w.of(x)), f"its order is seen in {w.where}"
        axis = axes.pop(dim)
        w.close(axes)
        if made[0].ndim == x.ndim:
            axes.insert(dim % x.ndim, w.fixed(made[0].shape[dim], why))
        found = [list(axes) for _ in made]
        for tensor in made:
            if not tensor.is_floating_point():
                w.positions[tensor] = axis
    return found if isinstance(out, tuple) else found[0]


def pool(w: TensorAxes, n: Named, out: Any, dims: int) -> Out:
    """Neighbouring positions become one; channels go along."""
    axes = list(w.of(tensors_in(n.values())[0]))
    w.pin_all(axes[-dims:], SPATIAL)
    first = out[0] if isinstance(out, tuple) else out
    found = [*axes[:-dims], *w.fix(first.shape[-dims:], SPATIAL)]
    return [found] * len(out) if isinstance(out, tuple) else found


# Rules that are a line

RULES_IN_A_LINE: dict[str, Rule] = {
    # One number everywhere, or copies along an axis, look the same in any order.
    """empty zeros ones full empty_strided new_empty_strided new_zeros new_ones new_full new_empty
    empty_like zeros_like ones_like full_like scalar_tensor""": lambda w, n, out: [
        w.alike(size) for size in out.shape
    ],
    "expand": lambda w, n, out: broadcast(w, [n["self"]], out.shape),
    # The same numbers in row-major order under another shape; axes in another order.
    "view _unsafe_view reshape _reshape_alias squeeze unsqueeze flatten unflatten": (
        lambda w, n, out: w.reshape(w.of(n["self"]), n["self"].shape, out.shape)
    ),
    # Only where it changes nothing but the memory behind the numbers.
    "histc bincount repeat_interleave affine_grid_generator searchsorted": (
        lambda w, n, out: _counted(w, n, out)
    ),
    "view_as_real": lambda w, n, out: [*w.of(n["self"]), w.fixed(2, "real and imaginary")],
    "view_as_complex": lambda w, n, out: _put_in_order(
        w, n["self"], [-1], n["self"], "real and imaginary"
    )[:-1],
    "linalg_cross": lambda w, n, out: _put_in_order_of(
        w, broadcast(w, [n["self"], n["other"]], out.shape), n["dim"], out
    ),
    "as_strided": lambda w, n, out: w.of(n["self"]) if n["self"].shape == out.shape else None,
    "t numpy_T": lambda w, n, out: w.of(n["self"])[::-1],
    "permute": lambda w, n, out: [w.of(n["self"])[i] for i in n["dims"]],
    "narrow": lambda w, n, out: _piece(w, n["self"], n["dim"], n["start"], n["length"]),
    "select": lambda w, n, out: w.pick(
        w.of(n["self"]), n["dim"] % n["self"].ndim, n["index"] % n["self"].shape[n["dim"]]
    ),
    "unbind": lambda w, n, out: [
        w.pick(w.of(n["self"]), n["dim"] % n["self"].ndim, i) for i in range(len(out))
    ],
    "roll flip rot90": lambda w, n, out: _put_in_order(
        w, n["self"], n["dims"] or range(out.ndim), out, "positions change places"
    ),
    "mm bmm mv dot vdot matmul": lambda w, n, out: _product(w, *tensors_in(n.values())[:2]),
    # A product, plus a term that is broadcast.
    "addmm baddbmm addmv": lambda w, n, out: _plus(
        w, tensors_in(n.values())[0], _product(w, *tensors_in(n.values())[1:3])
    ),
    # In any order, along its axis and along the others.
    "_softmax _log_softmax softmax log_softmax _safe_softmax": lambda w, n, out: _within(
        w, w.of(n["self"]), n["dim"]
    ),
    # With a buffer of the same shape or none.
    "log_sigmoid_forward": lambda w, n, out: [
        w.of(n["self"]),
        w.of(n["self"]) if out[1].numel() else [()] * out[1].ndim,
    ],
    # Directions times lengths: the norm is over all axes but one.
    "_weight_norm_interface": lambda w, n, out: [
        broadcast(w, [n["v"], n["g"]], out[0].shape),
        w.of(n["g"]),
    ],
    "var_mean std_mean": lambda w, n, out: [reduce(w, n, out[0])] * 2,
    """upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    _upsample_lanczos2d_aa""": lambda w, n, out: pool(w, n, out, 2),
    "upsample_linear1d": lambda w, n, out: pool(w, n, out, 1),
    "upsample_trilinear3d": lambda w, n, out: pool(w, n, out, 3),
}
for _dims in (1, 2, 3):
    RULES_IN_A_LINE |= {
        f"""avg_pool{_dims}d _adaptive_avg_pool{_dims}d max_pool{_dims}d adaptive_max_pool{_dims}d
        max_pool{_dims}d_with_indices upsample_nearest{_dims}d _upsample_nearest_exact{_dims}d
        reflection_pad{_dims}d
        replication_pad{_dims}d""": partial(pool, dims=_dims)
    }
for _names, _rule in RULES_IN_A_LINE.items():
    rule(_names)(_rule)
