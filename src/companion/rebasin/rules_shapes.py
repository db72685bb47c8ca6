"""Rules for operations that move, cut and join numbers without computing with them.

See :mod:`companion.rebasin.rules`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from companion.rebasin.axes import Atom, Axis
from companion.rebasin.rules import ONE, SPATIAL, Named, Out, Watch, broadcast, fixed_like, rule


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "flatten")
def reshape(w: Watch, n: Named, out: Any) -> Out:
    """The same numbers in row-major order under another shape."""
    x = n["self"]
    return w.axes.reshape(w.of(x), x.shape, out.shape)


rule("unflatten")(reshape)


@rule("as_strided")
def as_strided(w: Watch, n: Named, out: Any) -> Out:
    """Only where it changes nothing but the memory behind the numbers."""
    return w.of(n["self"]) if n["self"].shape == out.shape else None


@rule("t", "numpy_T")
def transpose_all(w: Watch, n: Named, out: Any) -> Out:
    """Axes in reverse."""
    return w.of(n["self"])[::-1]


@rule("transpose")
def transpose(w: Watch, n: Named, out: Any) -> Out:
    """Two axes change places."""
    axes = list(w.of(n["self"]))
    i, j = n["dim0"], n["dim1"]
    if axes:
        axes[i], axes[j] = axes[j], axes[i]
    return axes


@rule("permute")
def permute(w: Watch, n: Named, out: Any) -> Out:
    """Axes in another order."""
    axes = w.of(n["self"])
    return [axes[i] for i in n["dims"]]


@rule("expand")
def expand(w: Watch, n: Named, out: Any) -> Out:
    """Copies along an axis look the same in any order."""
    return broadcast(w, [n["self"]], out.shape)


@rule("repeat")
def repeat(w: Watch, n: Named, out: Any) -> Out:
    """Copies one behind the other: the copies, times the units."""
    axes: list[Axis] = [()] * (out.ndim - n["self"].ndim) + list(w.of(n["self"]))
    found = []
    for axis, times in zip(axes, n["repeats"], strict=True):
        copies = w.axes.free(times)
        found.append(w.axes.merge([copies, axis]) if copies and axis else copies or axis)
    return found


@rule("cat")
def cat(w: Watch, n: Named, out: Any) -> Out:
    """Along the axis one behind the other, along the others element by element."""
    tensors = [t for t in n["tensors"] if t.ndim == out.ndim]
    dim = n["dim"] % out.ndim
    axes: list[Axis] = list(w.of(tensors[0]))
    for tensor in tensors[1:]:
        for i, (mine, other) in enumerate(zip(axes, w.of(tensor), strict=True)):
            if i != dim:
                w.axes.unify(mine, other)
    parts = [w.of(t)[dim] or ONE for t in tensors if t.shape[dim]]
    axes[dim] = tuple(block for part in parts for block in part)
    return axes


@rule("stack")
def stack(w: Watch, n: Named, out: Any) -> Out:
    """A new axis; along the others element by element."""
    dim = n["dim"] % out.ndim
    axes = broadcast(w, n["tensors"], n["tensors"][0].shape)
    axes.insert(dim, w.axes.fixed(out.shape[dim], "stacked in order"))
    return axes


def _piece(w: Watch, tensor: Tensor, dim: int, start: int, stop: int) -> list[Axis]:
    axes = list(w.of(tensor))
    if (start, stop) != (0, tensor.shape[dim]):
        _, rest = w.axes.cut(axes[dim], start)
        axes[dim], _ = w.axes.cut(rest, stop - start)
        if stop - start == 1:
            w.axes.pin(axes[dim], "one unit is picked out")
            axes[dim] = ()
    return axes


@rule("slice")
def slice_(w: Watch, n: Named, out: Any) -> Out:
    """A stretch of an axis."""
    x = n["self"]
    dim = n["dim"] % x.ndim
    if n["step"] != 1:
        axes = list(w.of(x))
        w.axes.pin(axes[dim], "every so many are picked out")
        axes[dim] = w.axes.fixed(out.shape[dim], "every so many are picked out")
        return axes
    low, high, _ = slice(n["start"], n["end"]).indices(x.shape[dim])
    return _piece(w, x, dim, low, high)


@rule("narrow")
def narrow(w: Watch, n: Named, out: Any) -> Out:
    """A stretch of an axis."""
    return _piece(w, n["self"], n["dim"] % out.ndim, n["start"], n["start"] + n["length"])


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk")
def split(w: Watch, n: Named, out: Any) -> Out:
    """An axis cut into stretches."""
    dim = n["dim"] % n["self"].ndim
    found, start = [], 0
    for piece in out:
        found.append(_piece(w, n["self"], dim, start, start + piece.shape[dim]))
        start += piece.shape[dim]
    return found


@rule("select")
def select(w: Watch, n: Named, out: Any) -> Out:
    """One position of an axis: it stays, and what lies within it is that position's own."""
    x = n["self"]
    return _select(w, x, n["dim"] % x.ndim, n["index"] % x.shape[n["dim"]])


@rule("unbind")
def unbind(w: Watch, n: Named, out: Any) -> Out:
    """Every position of an axis for itself."""
    x = n["self"]
    return [_select(w, x, n["dim"] % x.ndim, i) for i in range(len(out))]


def _select(w: Watch, x: Tensor, dim: int, i: int) -> list[Axis]:
    axes = list(w.of(x))
    axis = w.axes.normal(axes.pop(dim))
    w.axes.pin(axis, "one unit is picked out")
    if len(axis) != 1 or len(axis[0]) != 1:
        return axes
    outer = axis[0][0]

    def own(atom: Atom) -> Atom:
        return w.axes.member(atom, outer, i) if w.axes.lies_within(atom, outer) else atom

    return [tuple(tuple(own(a) for a in b) for b in w.axes.normal(other)) for other in axes]


@rule("glu")
def glu(w: Watch, n: Named, out: Any) -> Out:
    """The first half times the sigmoid of the second: unit by unit."""
    x = n["self"]
    dim = n["dim"] % x.ndim
    axes = list(w.of(x))
    axes[dim], gates = w.axes.cut(axes[dim], out.shape[dim])
    w.axes.unify(axes[dim], gates)
    return axes


@rule("log_sigmoid_forward")
def log_sigmoid(w: Watch, n: Named, out: Any) -> Out:
    """Element by element, with a buffer of the same shape or none."""
    axes = w.of(n["self"])
    none: list[Axis] = [() for _ in out[1].shape]
    return [axes, axes if out[1].numel() else none]


@rule("_weight_norm_interface")
def weight_norm(w: Watch, n: Named, out: Any) -> Out:
    """Directions times lengths: the norm is over all axes but one."""
    return [broadcast(w, [n["v"], n["g"]], out[0].shape), w.of(n["g"])]


@rule("pixel_shuffle")
def pixel_shuffle(w: Watch, n: Named, out: Any) -> Out:
    """Channels in blocks become pixels; the blocks keep their inside."""
    axes = list(w.of(n["self"]))
    channels, inside = w.axes.divide(axes[-3], [out.shape[-3], n["upscale_factor"] ** 2])
    w.axes.pin(inside, SPATIAL)
    for axis in axes[-2:]:
        w.axes.pin(axis, SPATIAL)
    return [*axes[:-3], channels, *fixed_like(w, out.shape[-2:], SPATIAL)]


@rule("constant_pad_nd")
def pad(w: Watch, n: Named, out: Any) -> Out:
    """Equal numbers before and after: new units, in any order among themselves."""
    axes = list(w.of(n["self"]))
    for i in range(len(n["pad"]) // 2):
        before, after = n["pad"][2 * i : 2 * i + 2]
        dim = len(axes) - 1 - i
        if before < 0 or after < 0:
            return None
        if before or after:
            middle = axes[dim] or ONE
            axes[dim] = (
                *((Atom(before),),) * bool(before),
                *middle,
                *((Atom(after),),) * bool(after),
            )
    return axes


@rule("roll", "flip")
def shuffle(w: Watch, n: Named, out: Any) -> Out:
    """Positions change places among themselves."""
    axes = list(w.of(n["self"]))
    for dim in n["dims"] or range(len(axes)):
        w.axes.pin(axes[dim], "positions change places")
        axes[dim] = w.axes.fixed(out.shape[dim], "positions change places")
    return axes
